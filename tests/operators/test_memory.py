from __future__ import annotations

import pytest
import torch

from woodbury.operators import memory


def test_available(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert 0 < memory.available_bytes(cpu) < 2**50
    monkeypatch.setattr(memory, "_kernel_bytes", lambda: 10**9)
    monkeypatch.setattr(memory, "_group_bytes", lambda: 10**8)
    assert memory.available_bytes(cpu) == 10**8
    monkeypatch.setattr(memory, "_group_bytes", lambda: -5)
    assert memory.available_bytes(cpu) == 0
    monkeypatch.setattr(memory, "_group_bytes", lambda: None)
    assert memory.available_bytes(cpu) == 10**9
    monkeypatch.setattr(memory, "_kernel_bytes", lambda: None)
    assert memory.available_bytes(cpu) == 2 * 2**30


@pytest.mark.parametrize(
    ("amount", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**43, "8.0 TiB")],
)
def test_words(amount: int, words: str) -> None:
    assert memory.in_words(amount) == words
