from __future__ import annotations

from typing import Any

import pytest

from woodbury.apps.clean.settings import Settings, parse_bytes
from woodbury.errors import DataError

GOOD: dict[str, Any] = {
    "label": "kind",
    "text": None,
    "task": "auto",
    "model": "auto",
    "seed": 0,
    "budget": "2GiB",
    "format": "auto",
}


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


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("task", "guess", "task must be one of auto, classification, regression, not 'guess'"),
        ("model", "forest", "model must be one of auto, linear, kernel, mlp, not 'forest'"),
        ("format", "xls", "format must be one of auto, csv, parquet, not 'xls'"),
        ("seed", -1, "seed must be a whole number"),
        ("seed", 1.5, "seed must be a whole number"),
        ("seed", True, "seed must be a whole number"),
        ("budget", "x", "'x' is not an amount of memory"),
    ],
)
def test_bad_settings(name: str, value: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        Settings.check(**{**GOOD, name: value})
    assert words in str(caught.value)


def test_text_is_one_column_or_several() -> None:
    assert Settings.check(**{**GOOD, "text": "a"}).text == ("a",)
    assert Settings.check(**{**GOOD, "text": ["a", "b"]}).as_json()["text"] == ["a", "b"]
