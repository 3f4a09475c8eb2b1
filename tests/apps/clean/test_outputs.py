from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from woodbury.apps.clean.outputs import (
    Correction,
    build_rows,
    cleaned_frame,
    write_cleaned,
    write_rows,
)
from woodbury.apps.tables import prepare_labels, read_table
from woodbury.errors import DataError


def rows_for(values: Any, wrong: dict[int, int]) -> pd.DataFrame:
    """Rows that suspect ``wrong[i]`` to be the class of row ``i``."""
    labels = prepare_labels(pd.Series(values), "kind", "classification", "t.csv")
    suggested = labels.codes[labels.present].copy()
    probability = np.full(len(suggested), 0.1)
    for i, code in wrong.items():
        suggested[i], probability[i] = code, 0.9 + i / 1000
    return build_rows(labels, probability, suggested, 1 - probability)


def test_rows() -> None:
    rows = rows_for(["a", "b", "c"] * 4, {3: 1, 5: 0})
    assert list(rows.columns) == [
        "row",
        "label",
        "suggested_label",
        "error_probability",
        "weight",
        "rank",
    ]
    assert rows["row"].tolist() == list(range(12))
    assert rows["rank"].tolist() == [3, 4, 5, 2, 6, 1, 7, 8, 9, 10, 11, 12]
    assert rows["suggested_label"].tolist()[3:6] == ["b", "b", "a"]


def test_rows_without_label_come_last() -> None:
    rows = rows_for(["a", None, "b"] * 6, {0: 1})
    assert rows["rank"].tolist()[0] == 1
    assert sorted(rows["rank"].tolist()[1::3]) == list(range(13, 19))
    assert rows["error_probability"].isna().tolist() == [False, True, False] * 6
    assert (rows["weight"][1::3] == 0).all()
    assert not Correction(rows).changed[1::3].any()


@pytest.mark.parametrize("bad", [np.zeros(11), np.full(12, np.nan)])
def test_unusable_answers_are_refused(bad: np.ndarray) -> None:
    labels = prepare_labels(pd.Series(["a", "b", "c"] * 4), "kind", "auto", "t.csv")
    with pytest.raises(DataError, match="Try another --model"):
        build_rows(labels, bad, labels.codes, np.ones(12))


def save(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_cleaned_keeps_the_format_and_the_other_columns(
    flowers: pd.DataFrame, tmp_path: Path, suffix: str
) -> None:
    table = read_table(save(flowers, tmp_path / f"t{suffix}"), "kind")
    correction = Correction(rows_for(flowers["kind"], {4: 0}))
    path = write_cleaned(table, correction, tmp_path, "auto")
    assert path.name == f"cleaned{suffix}"
    if suffix == ".parquet":
        back = pd.read_parquet(path)
    else:
        back = pd.read_csv(path, sep="\t" if suffix == ".tsv" else ",")
    expected = flowers.assign(woodbury_changed=False)
    expected.loc[4, ["kind", "woodbury_changed"]] = ["rose", True]
    pd.testing.assert_frame_equal(back, expected, check_dtype=False)
    pd.testing.assert_frame_equal(
        cleaned_frame(table, correction), expected, check_dtype=False, check_column_type=False
    )


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_another_format_on_request(flowers: pd.DataFrame, tmp_path: Path, format: str) -> None:
    other = ".parquet" if format == "csv" else ".csv"
    table = read_table(save(flowers, tmp_path / f"t{other}"), "kind")
    correction = Correction(rows_for(flowers["kind"], {4: 0}))
    path = write_cleaned(table, correction, tmp_path, format)
    assert path.name == f"cleaned.{format}"
    back = pd.read_csv(path) if format == "csv" else pd.read_parquet(path)
    assert back.loc[4, "kind"] == "rose"
    assert back["size"].tolist() == flowers["size"].tolist()


def test_cleaning_a_cleaned_file(flowers: pd.DataFrame, tmp_path: Path) -> None:
    flowers["woodbury_changed"] = True
    table = read_table(save(flowers, tmp_path / "t.csv"), "kind")
    path = write_cleaned(table, Correction(rows_for(flowers["kind"], {4: 0})), tmp_path, "auto")
    back = pd.read_csv(path)
    assert list(back.columns).count("woodbury_changed") == 1
    assert np.flatnonzero(back["woodbury_changed"]).tolist() == [4]


def test_cleaned_npz(tmp_path: Path) -> None:
    y = np.array(["no", "yes"] * 6)
    np.savez(tmp_path / "t.npz", X=np.arange(24).reshape(12, 2), y=y)
    table = read_table(tmp_path / "t.npz", None)
    correction = Correction(rows_for(y, {2: 1}))
    path = write_cleaned(table, correction, tmp_path, "auto")
    assert path.name == "cleaned.npz"
    with np.load(path) as back:
        assert back["y"].tolist()[:4] == ["no", "yes", "yes", "yes"]
        assert np.flatnonzero(back["woodbury_changed"]).tolist() == [2]
        assert back["X"].tolist() == np.arange(24).reshape(12, 2).tolist()
    frame = cleaned_frame(table, correction)
    assert list(frame.columns) == ["x0", "x1", "y", "woodbury_changed"]


@pytest.mark.parametrize(
    "values",
    [
        pd.Series([1, 2, 3] * 4, dtype="int64"),
        pd.Series([1, 2, 3] * 4, dtype="uint8"),
        pd.Series([1.0, 2.0, 3.0] * 4),
        pd.Series(["a", "b", "c"] * 4, dtype="string"),
        pd.Series(["a", "b", "c"] * 4, dtype=object),
        pd.Series([1, 2, 3] * 4, dtype=object),
        pd.Series([True, False, True] * 4),
        pd.Series([True, False, True] * 4, dtype=object),
        pd.Series(pd.Categorical(["b", "a", "b"] * 4, categories=["b", "a"])),
    ],
)
def test_the_label_keeps_its_type(values: pd.Series) -> None:
    rows = rows_for(values, {})
    rows.loc[0, ["suggested_label", "error_probability"]] = [rows.loc[1, "label"], 0.9]
    fixed = Correction(rows).apply(values)
    assert fixed.dtype == values.dtype
    assert fixed.iloc[0] == values.iloc[1]
    assert fixed.iloc[1:].tolist() == values.iloc[1:].tolist()


def test_labels_of_a_csv_become_numbers_in_the_frame(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("x,y\n" + "1,3\n2,4\n" * 6)
    table = read_table(path, "y")
    fixed = cleaned_frame(table, Correction(rows_for(table.labels, {0: 1})))
    assert fixed["y"].tolist() == [4, 4, *[3, 4] * 5]


def test_quantities_are_written_short(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("x,y\n" + "".join(f"{i},{i / 8}\n" for i in range(1, 31)))
    table = read_table(path, "y")
    labels = prepare_labels(table.labels, "y", "regression", "t.csv")
    suggested = labels.codes + np.pi
    probability = np.where(np.arange(30) == 4, 0.9, 0.1)
    correction = Correction(build_rows(labels, probability, suggested, probability))
    out = write_cleaned(table, correction, tmp_path, "auto").read_text().splitlines()
    assert out[4:6] == ["4,0.5,False", "5,3.76659,True"]


def test_row_files_hold_the_same(tmp_path: Path) -> None:
    rows = rows_for(["a", "b", "c"] * 4, {3: 1})
    back = pd.read_csv(write_rows(rows, tmp_path, "csv"))
    pd.testing.assert_frame_equal(back, rows, check_dtype=False)
    stored = pd.read_parquet(write_rows(rows, tmp_path, "parquet"))
    pd.testing.assert_frame_equal(stored, rows, check_dtype=False)
