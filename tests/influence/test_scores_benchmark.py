"""The small setting of the benchmark of scores runs, and its certificate covers its error."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def test_scores_beside_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.influence_scores")
    monkeypatch.setattr(sys, "argv", ["influence_scores.py", "--small", "--no-peer"])
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    limit = re.search(r"certified ([0-9.]+),", printed)
    error = re.search(r"exact scores of [0-9]+ rows: ([0-9.]+)", printed)
    assert limit is not None
    assert error is not None
    assert float(error[1]) <= 0.01
    assert float(limit[1]) <= 0.01
