from __future__ import annotations

from typing import Any

import pytest

from woodbury.apps.settings import check_seed, parse_bytes
from woodbury.errors import DataError


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("2GiB", 2 * 1024**3),
        ("2 gib", 2 * 1024**3),
        ("2G", 2 * 1024**3),
        ("1.5GB", 1_500_000_000),
        ("500MB", 500_000_000),
        ("128M", 128 * 1024**2),
        (70_000_000, 70_000_000),
        ("1t", 1024**4),
    ],
)
def test_amounts(text: str | int, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "much", "2 GiBs", "-1GiB", "1e9", "0", "1MiB", "10"])
def test_bad_amounts(text: str) -> None:
    with pytest.raises(DataError):
        parse_bytes(text)


@pytest.mark.parametrize("seed", [-1, 2**31, 1.0, True, "1", None])
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises(DataError, match="seed must be a whole number from 0 to 2147483647"):
        check_seed(seed)


def test_seeds() -> None:
    assert [check_seed(seed) for seed in (0, 2**31 - 1)] == [0, 2**31 - 1]
