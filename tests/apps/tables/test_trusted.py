from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from woodbury.apps.tables import trusted_mask
from woodbury.errors import DataError

PRESENT = np.array([True, True, True, True, False])


@pytest.mark.parametrize(
    "text",
    [
        "1\n3\n",
        "row\n3\n1\n1\n",
        "row,label,rank\n1,a,1\n3,b,2\n",
        "label;row\nx;1\ny;3\n",
        "trusted\nFalse\nTrue\n0\n1\nno\n",
    ],
)
def test_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "checked.csv"
    path.write_text(text)
    mask = trusted_mask(path, 5, PRESENT)
    assert mask is not None
    assert np.flatnonzero(mask).tolist() == [1, 3]


@pytest.mark.parametrize(
    "value", [[1, 3], np.array([3, 1]), [False, True, False, True, False], {1: 0, 3: 0}.keys()]
)
def test_arrays(value: Any) -> None:
    mask = trusted_mask(list(value), 5, PRESENT)
    assert mask is not None
    assert np.flatnonzero(mask).tolist() == [1, 3]


def test_nothing_trusted_is_not_a_mask() -> None:
    assert trusted_mask(None, 5, PRESENT) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "checked.csv is empty"),
        ("hello\nworld\n", "must hold row numbers"),
        ("1\nx\n", "line 2: 'x' is not a row of the table"),
        ("row\n0\n5\n", "line 3: '5' is not a row of the table. Rows are numbered 0 to 4"),
        ("row\n-1\n", "'-1' is not a row"),
        ("row\n1.5\n", "'1.5' is not a row"),
        ("row\n", "No row is listed"),
        ("trusted\ntrue\n", "has 1 lines under 'trusted' and the table 5 rows"),
        ("trusted\n1\n1\n1\n1\nmaybe\n", "line 6: 'maybe' is neither true nor false"),
        ("0\n4\n", "Row 4 is listed as trusted but has no label"),
        ("0\n1\n2\n3\n", "Every row is listed"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "checked.csv"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        trusted_mask(path, 5, PRESENT)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([7], "rows are 0 to 4"),
        ([True, False], r"bool array of shape \[5\]"),
        ([0.5], "dtype float64"),
        ([], "dtype float64 and shape"),
    ],
)
def test_bad_values(value: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        trusted_mask(value, 5, PRESENT)
