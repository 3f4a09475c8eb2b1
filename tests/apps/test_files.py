from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from woodbury.apps.files import plain, writable_folder, write_json
from woodbury.errors import DataError


def test_a_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    made = writable_folder(tmp_path / "a" / "b")
    assert list(made.iterdir()) == []
    (made / "kept").write_text("x")
    assert [item.name for item in writable_folder(made).iterdir()] == ["kept"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written .* Choose another with --out"):
        writable_folder(tmp_path / "file")


def test_json_is_strict(tmp_path: Path) -> None:
    content = {
        "a": np.float32(1.5),
        "b": [np.int64(3), float("nan"), float("inf")],
        3: {"c": np.array([True, False]), "d": Path("x"), "e": None},
    }
    path = write_json(content, tmp_path / "s.json")
    assert json.loads(path.read_text()) == {
        "a": 1.5,
        "b": [3, None, None],
        "3": {"c": [True, False], "d": "x", "e": None},
    }
    assert plain((1, 2)) == [1, 2]
