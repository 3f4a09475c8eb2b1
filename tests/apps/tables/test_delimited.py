from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from woodbury.apps.tables.delimited import examine, read_arrow, rewrite
from woodbury.errors import DataError


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [
        ("a,b\n1,2\n", ","),
        ("a;b\n1,5;2\n", ";"),
        ("a\tb\n1\t2\n", "\t"),
        ("a|b\n1|2\n", "|"),
        ('"a,x;y";b\n1;2\n', ";"),
    ],
)
def test_delimiter_is_found(tmp_path: Path, text: str, delimiter: str) -> None:
    dialect = examine(write(tmp_path / "t.csv", text))
    assert dialect.delimiter == delimiter
    assert len(dialect.header) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "t.csv", "größe,name\n1,“Zoë”\n2,Ann\n", encoding)
    dialect = examine(path)
    assert dialect.encoding == encoding
    table = read_arrow(path, dialect)
    assert table.column_names == ["größe", "name"]
    assert table.column("name").to_pylist() == ["“Zoë”", "Ann"]


def test_blank_lines_and_windows_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "a,b\r\n1,2\r\n\r\n3,4\r\n")
    dialect = examine(path)
    assert read_arrow(path, dialect).column("a").to_pylist() == [1, 3]
    out = tmp_path / "out.csv"
    changed = np.array([False, True])
    rewrite(
        path, dialect, out, column="b", replacements={1: "9"}, changed=changed, changed_column="c"
    )
    assert out.read_bytes() == b"a,b,c\r\n1,2,False\r\n3,9,True\r\n"


def test_spelling_of_other_cells_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'id,text,label\n007,"a ""b"", c\nd",x\n1.10,plain,y\n')
    dialect = examine(path)
    out = tmp_path / "out.csv"
    rewrite(
        path,
        dialect,
        out,
        column="label",
        replacements={1: "a,b"},
        changed=np.array([False, True]),
        changed_column="w",
    )
    assert out.read_text() == (
        'id,text,label,w\n007,"a ""b"", c\nd",x,False\n1.10,plain,"a,b",True\n'
    )


def test_missing_words_become_null(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "a,b\nNA,x\n1.5,?\n,z\n")
    table = read_arrow(path, examine(path))
    assert table.column("a").to_pylist() == [None, 1.5, None]
    assert table.column("b").to_pylist() == ["x", None, "z"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["t.csv is empty"]),
        ("\n\n", ["t.csv is empty"]),
        ("a,b,c\n1,2,3\n4,5\n", ["line 3", "2 cells", "header names 3", "'4,5'", "cut off"]),
        ("a,b\n1,2\n3,4,5\n", ["line 3", "3 cells", "header names 2", "quotes"]),
        ('a,b\n1,2\n3,"x\n4,5\n', ["line 3", "quotation mark is opened there"]),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path / "t.csv", text)
    with pytest.raises(DataError) as caught:
        read_arrow(path, examine(path))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"PK\x03\x04\0\0\0\0")
    with pytest.raises(DataError, match=r"t\.csv is not a text file"):
        examine(path)


def test_cut_utf16(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("ab,c\n".encode("utf-16")[:-1])
    with pytest.raises(DataError, match="begins with a byte order mark"):
        examine(path)


def test_rewrite_notices_a_changed_file(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "a,b\n1,2\n3,4\n")
    dialect = examine(path)
    for n in (1, 3):
        with pytest.raises(DataError, match="does not any more"):
            rewrite(
                path,
                dialect,
                tmp_path / "o.csv",
                column="b",
                replacements={},
                changed=np.zeros(n, dtype=bool),
                changed_column="w",
            )


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1, max_size=6)


@settings(max_examples=40)
@given(
    rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=6),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
def test_rewriting_nothing_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], quoting: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, quoting=quoting, lineterminator="\n")  # type: ignore[arg-type]
        writer.writerow(["first", "second"])
        writer.writerows(rows)
    dialect = examine(path)
    out = path.with_name("out.csv")
    rewrite(
        path,
        dialect,
        out,
        column="second",
        replacements={},
        changed=np.zeros(len(rows), dtype=bool),
        changed_column="w",
    )
    with out.open(newline="", encoding="utf-8") as handle:
        back = list(csv.reader(handle, delimiter=dialect.delimiter))
    assert back[0] == ["first", "second", "w"]
    assert [tuple(line[:2]) for line in back[1:]] == rows
    assert read_arrow(path, dialect, as_text=["first", "second"]).num_rows == len(rows)
