from __future__ import annotations

from typing import Any

import pytest

from woodbury.apps.clean.settings import Settings
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
