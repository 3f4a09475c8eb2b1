from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from woodbury.apps.tables import prepare_labels
from woodbury.errors import DataError


def prepared(values: Sequence[Any], task: str = "auto") -> Any:
    return prepare_labels(pd.Series(values), "kind", task, "t.csv")


@pytest.mark.parametrize(
    ("values", "task"),
    [
        (["a", "b"] * 10, "classification"),
        ([0, 1, 2] * 10, "classification"),
        ([0.0, 1.0, 2.0] * 10, "classification"),
        ([0.5, 1.0, 1.5] * 10, "classification"),
        ([True, False] * 10, "classification"),
        (list(range(50)) * 2, "classification"),
        (list(range(51)) * 2, "regression"),
        ([i / 7 for i in range(1, 22)] * 2, "regression"),
        ([str(i / 7) for i in range(1, 22)] * 2, "regression"),
    ],
)
def test_task_is_recognised(values: list[Any], task: str) -> None:
    assert prepared(values).task == task


def test_a_quantity_is_announced() -> None:
    assert "taken for a quantity (--task classification" in prepared(range(60)).notes[0]


def test_classes_keep_type_and_spelling() -> None:
    assert prepared(["10", "9", "2"] * 5).classes.tolist() == [2, 9, 10]
    assert prepared(["03", "3", "x"] * 5).classes.tolist() == ["03", "3", "x"]
    assert prepared(["1.0", "2.0"] * 5).classes.tolist() == ["1.0", "2.0"]
    assert prepared([1.0, 2.0] * 5).classes.tolist() == [1, 2]
    assert prepared(pd.Categorical(["b", "a"] * 5)).classes.tolist() == ["a", "b"]
    assert prepared([True, False] * 5).classes.tolist() == ["False", "True"]


def test_codes_and_decode_are_inverse() -> None:
    values = ["pear", "fig", "fig", "plum"] * 5
    labels = prepared(values)
    assert labels.n_classes == 3
    assert labels.decode(labels.codes).tolist() == values
    assert labels.given.tolist() == values


def test_rows_without_label_are_set_aside() -> None:
    labels = prepared(["a", None, " ", "b"] * 6)
    assert labels.present.tolist() == [True, False, False, True] * 6
    assert labels.codes[:4].tolist() == [0, -1, -1, 1]
    assert labels.given[1] is None
    assert "12 rows have no label in 'kind' (the first is row 1)" in labels.notes[0]


def test_regression_with_missing_targets() -> None:
    labels = prepared([1.5, np.nan, 2.5, 3.5] * 5, "regression")
    assert np.isnan(labels.codes[1])
    assert labels.codes[[0, 2, 3]].tolist() == [1.5, 2.5, 3.5]
    assert labels.n_classes == 0


def test_lookalike_labels_are_announced() -> None:
    notes = prepared(["Cat", "cat ", "dog"] * 5).notes
    assert len(notes) == 1
    assert "'Cat' and 'cat '" in notes[0]


@pytest.mark.parametrize(
    ("values", "task", "words"),
    [
        ([None] * 20, "auto", ["'kind' is empty", "--label"]),
        (["a"] * 20, "auto", ["same label 'a'", "'kind'"]),
        ([1.5] * 20, "regression", ["same label '1.5'"]),
        (["a", "b"] * 4, "auto", ["8 labelled rows", "at least 10"]),
        ([*["a", "b"] * 9, "c"], "auto", ["a class with one", "'c' (row 18)", "merge"]),
        ([*["a", "b"] * 9, "c", "d"], "auto", ["2 classes with one", "'c' (row 18); 'd' (row 19)"]),
        ([f"v{i}" for i in range(50_000)] + ["v0"], "auto", ["50,000 different values"]),
        (list(range(50_000)), "classification", ["50,000", "--task regression"]),
        ([1.0, 2.0, float("inf")] * 10, "auto", ["infinite (inf) in row 2"]),
        (["1", "2", "-inf"] * 10, "regression", ["infinite (-inf) in row 2"]),
        (["1.5", "2.5", "many"] * 10, "regression", ["'kind'", "row 2 holds 'many'"]),
    ],
)
def test_unusable_labels(values: list[Any], task: str, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        prepared(values, task)
    assert all(word in str(caught.value) for word in ["t.csv", *words]), str(caught.value)
