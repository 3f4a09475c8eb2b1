from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pandas as pd
import pytest

from woodbury.apps.tables.kinds import Column, classify
from woodbury.errors import DataError

WORDS = np.random.default_rng(0).choice(["who", "sees", "the", "old", "tree", "here"], (200, 7))


def kind(values: Any, text: bool = False) -> Column:
    return classify("c", pd.Series(values), text=text, where="t.csv")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.5, 2.0, 2.5, None], "numeric"),
        ([3, 1, 2, 4, 9, 8, 7] * 10, "numeric"),
        ([3.5, 1, 2] * 10, "numeric"),
        ([3, 1, 2] * 10, "levels"),
        ([3, 1, None, 2] * 10, "levels"),
        ([3, 1, None] * 10, "boolean"),
        ([3.5, 1.5] * 10, "boolean"),
        ([True, False, None], "boolean"),
        ([True, False], "boolean"),
        (["red", "blue", None] * 5, "categorical"),
        (pd.Categorical(["red", "blue"] * 5), "categorical"),
        (["1.5", "2", "oops"] + ["3"] * 60, "numeric"),
        (["1,5", "2,25", "3,0"] * 5, "numeric"),
        (["2024-01-02", "2024-02-03"] * 5, "date"),
        (["2024-01-02 10:30", "2024-02-03 11:00"] * 5, "date"),
        (["2.1.2024", "31.12.2023"] * 5, "date"),
        (["12/31/2023", "01/02/2024"] * 5, "date"),
        ([datetime.date(2024, 1, 2), datetime.date(2024, 1, 3)] * 3, "date"),
        (pd.date_range("2024-01-01", periods=9, tz="Europe/Berlin"), "date"),
        ([" ".join(words) for words in WORDS], "text"),
        ([None] * 9, "unused"),
        ([7] * 9, "unused"),
        (["x"] * 9, "unused"),
        (range(100, 200), "unused"),
        ([f"user{i}" for i in range(50)], "unused"),
    ],
)
def test_kinds(values: Any, expected: str) -> None:
    found = kind(values)
    assert found.kind == expected
    assert bool(found.note) == (expected == "unused" or "oops" in list(values))


def test_text_on_request() -> None:
    assert kind(["a b", "c"] * 5).kind == "categorical"
    assert kind(["a b", "c"] * 5, text=True).kind == "text"
    with pytest.raises(DataError, match=r"t\.csv: --text names column 'c', which holds numeric"):
        kind([1, 2], text=True)


def test_stray_words_among_numbers_count_as_missing() -> None:
    found = kind(["1.5"] * 50 + ["oops"] + ["2"] * 50)
    assert np.isnan(found.values[50])
    assert found.values[0] == 1.5
    assert "(row 50: 'oops')" in found.note


def test_decimal_comma() -> None:
    assert kind(["1,5", "-2,25"] * 5).values.tolist()[:2] == [1.5, -2.25]


def test_dates_of_both_orders() -> None:
    assert kind(["31.12.2023", "1.2.2024"]).values.tolist() == [
        pd.Timestamp(2023, 12, 31),
        pd.Timestamp(2024, 2, 1),
    ]
    assert kind(["12/31/2023", "1/2/2024"]).values.tolist()[0] == pd.Timestamp(2023, 12, 31)


def test_infinite_values() -> None:
    with pytest.raises(DataError, match=r"t\.csv: column 'c' is infinite in row 2 \(1 rows"):
        kind([1.0, 2.0, float("inf")])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([None] * 9, "is empty in every row"),
        ([7] * 9, "is 7 in every row"),
        (range(30), "numbers the rows"),
        ([f"user{i}" for i in range(50)], "--text 'c' reads it as text"),
    ],
)
def test_unused_columns_say_why(values: Any, words: str) -> None:
    assert words in kind(values).note
