from __future__ import annotations

import datetime
import decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from woodbury.apps.tables import read_table
from woodbury.errors import DataError


def test_csv(flowers_csv: Path, flowers: pd.DataFrame) -> None:
    table = read_table(flowers_csv, "kind")
    assert table.kind == "delimited"
    assert list(table.frame.columns) == ["size", "petals", "color"]  # type: ignore[union-attr]
    assert table.labels.tolist() == flowers["kind"].tolist()
    assert table.position == 3


def test_tsv_and_parquet_hold_the_same(flowers: pd.DataFrame, tmp_path: Path) -> None:
    flowers.to_csv(tmp_path / "t.tsv", sep="\t", index=False)
    flowers.to_parquet(tmp_path / "t.parquet")
    tables = [read_table(tmp_path / name, "kind") for name in ("t.tsv", "t.parquet")]
    for table in tables:
        assert table.frame is not None
        assert table.frame["size"].tolist() == flowers["size"].tolist()
        assert table.frame["color"].tolist() == flowers["color"].tolist()


def test_labels_keep_their_spelling(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,code\n1,007\n2,1.0\n")
    assert read_table(path, "code").labels.tolist() == ["007", "1.0"]


def test_parquet_types(tmp_path: Path) -> None:
    arrow = pa.table(
        {
            "price": pa.array([decimal.Decimal("1.50"), None]),
            "day": pa.array([datetime.date(2024, 1, 2), None]),
            "hour": pa.array([datetime.time(1, 2), None]),
            "size": pa.array(["s", "l"]).dictionary_encode(),
            "lasts": pa.array([datetime.timedelta(1), None]),
            "parts": pa.array([[1], [2, 3]]),
            "kind": pa.array(["a", "b"]).dictionary_encode(),
        }
    )
    pa_parquet.write_table(arrow, tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet", "kind")
    assert table.frame is not None
    assert table.frame["price"].tolist()[0] == 1.5
    assert str(table.frame["day"].dtype).startswith("datetime64")
    assert table.frame["size"].tolist() == ["s", "l"]
    assert table.frame["hour"].iloc[0].startswith("01:02")
    assert "parts" not in table.frame
    assert "'parts' holds list" in table.notes[0]


def test_npz_shapes(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    for shape, stored in [((4, 3), (4, 3)), ((4, 5, 5), (4, 5, 5)), ((4, 3, 5, 5), (4, 5, 5, 3))]:
        np.savez(path, X=np.zeros(shape), y=np.array([0, 1, 0, 1]))
        table = read_table(path, None)
        assert table.label == "y"
        assert table.array is not None
        assert table.array.shape == stored


def test_npz_with_another_label(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", X=np.zeros((2, 3)), digit=np.array(["a", "b"]))
    assert read_table(tmp_path / "t.npz", "digit").labels.tolist() == ["a", "b"]


def test_frame_is_hashed_by_content(flowers: pd.DataFrame) -> None:
    first = read_table(flowers, "kind").sha256
    assert read_table(flowers.copy(), "kind").sha256 == first
    flowers.loc[0, "size"] += 1
    assert read_table(flowers, "kind").sha256 != first


def test_column_of_an_earlier_run_is_no_feature(flowers: pd.DataFrame) -> None:
    flowers["woodbury_changed"] = False
    assert "woodbury_changed" not in read_table(flowers, "kind").frame  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.xlsx", b"x", ["t.xlsx is a spreadsheet", "CSV"]),
        ("t.csv.gz", b"x", ["t.csv.gz is compressed", "Unpack"]),
        ("t.json", b"x", ["t.json", "'.json'", ".parquet"]),
        ("t.parquet", b"PAR1 cut", ["t.parquet cannot be read as Parquet", "cut off"]),
        ("t.npz", b"PK\x03\x04 cut", ["t.npz cannot be read as NPZ", "cut off"]),
        ("t.npz", b"", ["t.npz cannot be read as NPZ"]),
        ("t.csv", b"", ["t.csv is empty"]),
        ("t.csv", b"a,kind\n", ["t.csv has a header but no rows"]),
        ("t.csv", b"kind\nx\ny\n", ["only the column 'kind'"]),
        ("t.csv", b"a,b,a,kind\n1,2,3,x\n", ["columns 1 and 3 share the name 'a'"]),
        ("t.csv", b"a,,,kind\n1,2,3,x\n", ["columns 2 and 3 share an empty name"]),
        ("t.csv", b"a,Kind\n1,x\n", ["no column 'kind'", "Did you mean 'Kind'?", "'a', 'Kind'"]),
        ("t.csv", b"1,2\n3,4\n", ["no column 'kind'", "all numbers", "line of column names"]),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / name, "kind")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_truncated_copies_of_good_files(flowers: pd.DataFrame, tmp_path: Path) -> None:
    flowers.to_parquet(tmp_path / "t.parquet")
    np.savez(tmp_path / "t.npz", X=np.random.default_rng(0).normal(size=(50, 9)), y=np.arange(50))
    for name in ("t.parquet", "t.npz"):
        content = (tmp_path / name).read_bytes()
        for share in (0.1, 0.5, 0.95):
            (tmp_path / name).write_bytes(content[: int(share * len(content))])
            with pytest.raises(DataError, match="cannot be read"):
                read_table(tmp_path / name, "y" if name == "t.npz" else "kind")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"A": np.zeros(3)}, ["no array 'X'", "'A'", "numpy.savez"]),
        ({"X": np.zeros((3, 2))}, ["no array 'y'"]),
        ({"X": np.zeros((3, 2)), "y": np.zeros(4)}, ["[3, 2]", "[4]"]),
        ({"X": np.zeros(3), "y": np.zeros(3)}, ["[3]", "[n, d]"]),
        ({"X": np.array([["a"], ["b"]]), "y": np.zeros(2)}, ["X holds <U1, not numbers"]),
        ({"X": np.zeros((2, 4, 4, 5)), "y": np.zeros(2)}, ["[2, 4, 4, 5]", "1 or 3 channels"]),
        ({"X": np.zeros((2, 0)), "y": np.zeros(2)}, ["without a single value"]),
        ({"X": np.array([{}, 1], dtype=object), "y": np.zeros(2)}, ["Python objects"]),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays: dict[str, np.ndarray], words: list[str]) -> None:
    np.savez(tmp_path / "t.npz", **arrays, allow_pickle=True)
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / "t.npz", None)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_bad_calls(flowers: pd.DataFrame, flowers_csv: Path, tmp_path: Path) -> None:
    cases = [
        (tmp_path, "kind", (), "is a folder"),
        (tmp_path / "none.csv", "kind", (), "There is no file"),
        (flowers_csv, None, (), "--label COLUMN"),
        (flowers_csv, "kind", ("colour",), "no column 'colour' (--text). Did you mean 'color'?"),
        (flowers_csv, "kind", ("kind",), "both as label and as text"),
        (flowers.iloc[:0], "kind", (), "no rows"),
        ([[1, 2]], "kind", (), "not list"),
    ]
    for table, label, text, words in cases:
        with pytest.raises(DataError) as caught:
            read_table(table, label, text=text)
        assert words in str(caught.value)


def test_label_of_lists(tmp_path: Path) -> None:
    pd.DataFrame({"a": [1, 2], "kind": [[1], [2]]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="'kind' holds lists"):
        read_table(tmp_path / "t.parquet", "kind")


def test_unreadable_file(flowers_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the superuser may read everything
    with pytest.raises(DataError, match="permission denied"):
        read_table(flowers_csv, "kind")
