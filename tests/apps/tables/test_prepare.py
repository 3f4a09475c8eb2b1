from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits

from woodbury.apps.tables import Prepared, prepare, read_table
from woodbury.errors import BudgetError, DataError

generator = np.random.default_rng(0)


def frame(n: int = 60, **columns: Any) -> pd.DataFrame:
    base = {"size": generator.normal(size=n), "kind": ["a", "b", "a"] * (n // 3)}
    return pd.DataFrame({**columns, **base})


def prepared(table: Any, **options: Any) -> Prepared:
    return prepare(read_table(table, options.pop("label", "kind")), **options)


def test_every_kind_together() -> None:
    table = frame(
        yes=[True, False] * 30,
        gaps=[1.0, None, 3.5, 7.0] * 15,
        color=["red", "blue", "green", "red"] * 15,
        day=pd.date_range("2024-01-01", periods=60).astype(str),
        words=[" ".join(generator.choice(list("abcdefgh"), 6)) for _ in range(60)],
        empty=[None] * 60,
    )
    seen: list[tuple[str, float]] = []
    result = prepared(table, progress=lambda stage, fraction: seen.append((stage, fraction)))
    assert result.X.dtype == np.float32
    assert result.X.flags["C_CONTIGUOUS"]
    assert np.isfinite(result.X).all()
    kinds = {str(use["name"]): use["kind"] for use in result.columns}
    assert kinds == {
        "yes": "boolean",
        "gaps": "numeric",
        "color": "categorical",
        "day": "date",
        "words": "text",
        "empty": "unused",
        "size": "numeric",
    }
    counted = sum(int(str(use["features"])) for use in result.columns)
    assert result.X.shape == (60, counted + 1)  # one mark of missing values
    assert [fraction for _, fraction in seen] == sorted(fraction for _, fraction in seen)
    assert seen[-1][1] == 1.0
    assert any("'empty'" in note for note in result.notes)


def test_two_values_become_zero_and_one() -> None:
    table = frame(rare=[7] + [3] * 59, gap=[1.0, None, 5.0] * 20)
    X = prepared(table).X
    assert X[:2, 0].tolist() == [1, 0]
    assert X[:3, 1].tolist() == [0, 0.5, 1]
    assert X[:3, 3].tolist() == [0, 1, 0]  # the mark of missing values


def test_codes_are_used_both_as_numbers_and_as_categories() -> None:
    result = prepared(frame(code=[4, 1, 2, 3] * 15))
    assert result.columns[0]["kind"] == "levels"
    assert result.X.shape == (60, 6)
    assert (result.X[:, 2:].sum(axis=1) == 1).all()


def test_order_of_rows_and_labels_is_kept(tmp_path: Path) -> None:
    table = frame(x=np.arange(60) ** 1.5)
    table.to_csv(tmp_path / "t.csv", index=False)
    result = prepared(tmp_path / "t.csv")
    assert (np.diff(result.X[:, 0]) > 0).all()
    assert result.labels.given.tolist() == table["kind"].tolist()


def test_images_from_a_table_of_pixels() -> None:
    digits = load_digits(as_frame=True).frame
    result = prepared(digits, label="target")
    assert result.scaling == "joint"
    assert result.reason == "all 64 columns are whole numbers from 0 to 16"
    assert result.image_shape == (8, 8)
    assert result.X.shape == (1797, 64)


@pytest.mark.parametrize(
    ("shape", "expected"), [((8, 8), (8, 8)), ((8, 8, 1), (8, 8)), ((64,), (8, 8))]
)
def test_images_from_npz(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    digits = load_digits()
    images = digits.images.astype(np.uint8).reshape(-1, *shape)
    np.savez(tmp_path / "t.npz", X=images, y=digits.target)
    result = prepared(tmp_path / "t.npz", label=None)
    assert (result.scaling, result.image_shape) == ("joint", expected)


def test_embeddings_and_mixed_arrays_from_npz(tmp_path: Path) -> None:
    y = np.arange(100) % 3
    embedding = generator.normal(size=(100, 32))
    np.savez(tmp_path / "t.npz", X=embedding, y=y)
    result = prepared(tmp_path / "t.npz", label=None)
    assert (result.scaling, result.image_shape) == ("joint", None)
    np.savez(tmp_path / "t.npz", X=embedding * np.geomspace(1, 1e4, 32), y=y)
    assert prepared(tmp_path / "t.npz", label=None).scaling == "per column"


def test_pixels_with_a_gap_or_a_word_are_not_images() -> None:
    digits = load_digits(as_frame=True).frame
    digits["note"] = ["a", "b", "c"] * 599
    assert prepared(digits, label="target").image_shape is None
    digits = digits.drop(columns="note").astype({"pixel_3_3": "float64"})
    digits.loc[5, "pixel_3_3"] = None
    assert prepared(digits, label="target").scaling == "per column"


def test_a_copy_of_the_label_is_left_out() -> None:
    table = frame(code=[1, 2, 1] * 20, name=["A!", "B!", "A!"] * 20)
    result = prepared(table)
    assert [use["kind"] for use in result.columns] == ["unused", "unused", "numeric"]
    assert "is the label in other words" in result.notes[0]
    target = pd.DataFrame({"y": np.arange(60) / 7, "z": np.arange(60) / 7, "x": frame()["size"]})
    assert prepared(target, label="y").X.shape == (60, 1)


def test_the_label_is_never_looked_at() -> None:
    table = frame(color=["red", "blue", "green", "red"] * 15)
    other = table.assign(kind=["b", "a", "b"] * 20)
    assert np.array_equal(prepared(table).X, prepared(other).X)


def test_many_notes_are_summed_up() -> None:
    table = frame(**{f"empty{i}": [None] * 60 for i in range(20)})
    notes = prepared(table).notes
    assert len(notes) == 9
    assert notes[-1] == "... and 12 more such columns (20 left out in all)."


def test_nothing_left_to_learn_from() -> None:
    table = frame(empty=[None] * 60).drop(columns="size").assign(row=range(60))
    with pytest.raises(DataError, match="no column that could tell one label from another"):
        prepared(table)


def test_wordless_text_is_left_out() -> None:
    result = prepare(read_table(frame(t=["!", "?", "."] * 20), "kind"), text=["t"])
    assert result.columns[0]["kind"] == "unused"
    assert "Column 't' is left out" in result.notes[0]


def test_infinite_and_missing_values_in_npz(tmp_path: Path) -> None:
    rows = generator.normal(size=(40, 5))
    for value in (np.inf, np.nan, 1e40):
        rows[3, 2] = value
        np.savez(tmp_path / "t.npz", X=rows, y=np.arange(40) % 2)
        with pytest.raises(DataError, match="in row 3, column 2"):
            prepared(tmp_path / "t.npz", label=None)


def test_huge_values() -> None:
    table = frame(x=np.where(np.arange(60) == 3, 1e308, 0.5))
    with pytest.raises(DataError, match=r"column 'x' is 1e\+308, too large, in row 3"):
        prepared(table)


def test_budget() -> None:
    with pytest.raises(BudgetError, match=r"60 x 1 numbers.*Raise --budget"):
        prepared(frame(), budget_bytes=100)
