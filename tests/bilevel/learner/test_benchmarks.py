"""The benchmarks of the learner run at small size, and what they print is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest


def test_millions(printed: Callable[..., str]) -> None:
    out = printed("hyper_millions.py", "--small")
    assert float(re.search(r"published by at most (\S+),", out)[1]) < 1e-5
    products = re.findall(r"^K = (\d)(, certified)? .* (\d)(?:  residual.*)?$", out, re.M)
    assert [(int(k), int(n)) for k, certified, n in products if not certified] == [
        (k, k) for k in (0, 1, 3, 5)
    ]
    assert all(int(n) == int(k) + 1 for k, certified, n in products if certified)


def test_overfit(
    monkeypatch: pytest.MonkeyPatch, printed: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "overfit.svg"
    monkeypatch.setenv("WOODBURY_DATA", "no-such-folder")  # digits, which are always there
    out = printed("validation_overfit.py", "--small", "--figure", str(figure))
    per_weight = re.search(r"^linear +one per weight (.*)$", out, re.M)[1].split()
    for_all = re.search(r"^linear +one for all (.*)$", out, re.M)[1].split()
    assert (per_weight[0], for_all[0]) == ("650", "1")
    assert float(per_weight[1]) > float(for_all[1])
    assert figure.read_text().count("<svg") == 1


def test_clean_weights(printed: Callable[..., str]) -> None:
    pytest.importorskip("sklearn")
    out = printed("clean_weights.py", "--small")
    found = dict(re.findall(r"^ +20% (.*?) +([\d.]+) +[\d.]+ ", out, re.M))
    assert float(found["weights of examples"]) > 0.8
    assert float(found["learned labels"]) > 0.8
    assert float(found["woodbury clean, linear"]) > 0.95
