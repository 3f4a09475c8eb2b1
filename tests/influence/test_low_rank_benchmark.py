"""The small setting of the benchmark of low-rank queries runs, and prints what it should."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest


def test_ranks_beside_nobody(printed: Callable[..., str]) -> None:
    found = printed("low_rank_queries.py", "--small", "--no-peer")
    assert found.count("the bound holds for every score: True") == 3
    lines = re.findall(r"^(\d+) +[\d.]+ +[\d.]+ +([\d.]+) +([\d.]+) +[\d.]+", found, re.M)
    errors = {int(rank): (float(true), float(measured)) for rank, true, measured in lines}
    assert 1 > errors[2][0] > errors[4][0] > 0.05
    assert errors[40] == (0, 0)
    for true, measured in errors.values():
        assert measured == pytest.approx(true, abs=2e-4)
