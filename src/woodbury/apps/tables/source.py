"""Tables as they come: CSV, TSV, Parquet, NPZ files and data frames, read but not yet prepared."""

from __future__ import annotations

import difflib
import hashlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pa_parquet

from woodbury.apps.tables.delimited import Dialect, examine, read_arrow
from woodbury.errors import DataError

__all__ = ["CHANGED_COLUMN", "Table", "fingerprint", "read_table"]

SUFFIXES = {
    ".csv": "delimited",
    ".tsv": "delimited",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".npz": "npz",
}
CHANGED_COLUMN = "woodbury_changed"


@dataclass
class Table:
    """A table with its label column, as it was given.

    Attributes:
        name: what to call it in messages (the file's name).
        kind: ``"delimited"``, ``"parquet"``, ``"npz"`` or ``"frame"``.
        label: name of the label column (of the array, for NPZ).
        labels: that column, ``[n]``; text for delimited files, so that no spelling is lost.
        frame: the other columns, ``[n, columns]``, or None where the rows are arrays.
        array: the rows as one array ``[n, d]`` or images ``[n, h, w]``, ``[n, h, w, 3]``, or None.
        path: the file, or None for a data frame.
        dialect: how the file is written, for delimited files.
        sha256: hash of the content, to recognise the same input again.
        original: the user's data frame, where that is the input.
        position: place of the label among the columns.
        notes: sentences for the user about what was found while reading.
    """

    name: str
    kind: str
    label: str
    labels: pd.Series
    frame: pd.DataFrame | None
    array: np.ndarray | None
    sha256: str
    path: Path | None = None
    dialect: Dialect | None = None
    original: pd.DataFrame | None = None
    position: int = 0
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)


def read_table(table: Any, label: str | None, *, text: Sequence[str] = ()) -> Table:
    """Read a table and split off its label column.

    Args:
        table: path of a ``.csv``, ``.tsv``, ``.parquet``, ``.pq`` or ``.npz`` file (arrays ``X``
            and ``y``), or a pandas data frame (``frame.attrs["name"]`` names it in messages).
        label: name of the label column; for NPZ the array of labels, ``"y"`` if None.
        text: columns that must exist because the user named them as text.

    Returns:
        The table, ``n`` rows.

    Raises:
        DataError: the file is missing, unreadable, empty, or lacks the label column; the message
            names the file and the column and says what to do.

    Example:
        >>> import pandas as pd
        >>> from woodbury.apps.tables import read_table
        >>> table = read_table(pd.DataFrame({"size": [1.0, 2.0], "kind": ["a", "b"]}), "kind")
        >>> len(table), list(table.frame.columns)
        (2, ['size'])
    """
    if isinstance(table, pd.DataFrame):
        return _from_frame(table, label, text)
    if not isinstance(table, str | Path):
        raise DataError(
            f"A table is a path or a pandas.DataFrame, not {type(table).__name__}. "
            "Wrap arrays in a DataFrame, or save them with numpy.savez(path, X=..., y=...)."
        )
    path = Path(table)
    kind = _kind_of(path)
    try:
        if kind == "npz":
            result = _from_npz(path, label or "y")
        elif kind == "parquet":
            result = _from_parquet(path, label, text)
        else:
            result = _from_delimited(path, label, text)
    except PermissionError:
        raise DataError(f"{path} may not be read (permission denied). Allow reading it.") from None
    if len(result) == 0:
        raise DataError(f"{path.name} has a header but no rows. There is nothing to clean.")
    return result


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _kind_of(path: Path) -> str:
    if path.is_dir():
        raise DataError(f"{path} is a folder. Name the table inside it.")
    if not path.exists():
        raise DataError(f"There is no file {path} (looked in {Path.cwd()}). Check the spelling.")
    suffix = path.suffix.lower()
    if suffix in (".gz", ".zip", ".bz2", ".xz", ".zst"):
        raise DataError(f"{path.name} is compressed. Unpack it first and give the file inside.")
    if suffix in (".xls", ".xlsx", ".ods"):
        raise DataError(f"{path.name} is a spreadsheet. Save the sheet as CSV and give that file.")
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path.name}: cannot tell the format from the ending {suffix!r}. "
            "Tables end in .csv, .tsv, .parquet (or .pq) or .npz; rename the file."
        )
    return SUFFIXES[suffix]


def _check_names(names: Sequence[str], label: str | None, text: Sequence[str], where: str) -> str:
    """Refuse duplicate and missing columns; return the label's name."""
    if label is None:
        raise DataError(
            f"Say which column of {where} holds the label, with --label COLUMN (label=... in "
            f"Python). Its columns are: {_listing(names)}."
        )
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        places = [i + 1 for i, name in enumerate(names) if name == repeated[0]]
        what = f"the name {repeated[0]!r}" if repeated[0] else "an empty name"
        raise DataError(
            f"{where}: columns {_and(places)} share {what}. Give every column its own name."
        )
    for wanted, option in [(label, "--label"), *((name, "--text") for name in text)]:
        if wanted not in names:
            close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
            guess = f" Did you mean {close[0]!r}?" if close else ""
            raise DataError(
                f"{where} has no column {wanted!r} ({option}).{guess} "
                f"Its columns are: {_listing(names)}."
            )
    if label in text:
        raise DataError(f"Column {label!r} is named both as label and as text. Name it once.")
    if len(names) < 2:
        raise DataError(
            f"{where} has only the column {label!r}. Labels are judged by the other columns: "
            "give a table with at least one more."
        )
    return label


def _listing(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def _and(numbers: Sequence[int]) -> str:
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _from_frame(frame: pd.DataFrame, label: str | None, text: Sequence[str]) -> Table:
    names = [str(name) for name in frame.columns]
    name = str(frame.attrs.get("name", "the data frame"))
    label = _check_names(names, None if label is None else str(label), text, name)
    if len(frame) == 0:
        raise DataError("The data frame has no rows. There is nothing to clean.")
    original = frame
    frame = frame.set_axis(names, axis=1).reset_index(drop=True)
    digest = hashlib.sha256("\0".join(names).encode())
    for column_name in names:
        column = frame[column_name]
        if column.dtype == object:
            column = column.astype(str)
        digest.update(pd.util.hash_pandas_object(column, index=False).to_numpy().tobytes())
    labels = frame[label]
    features = frame.drop(columns=[label, CHANGED_COLUMN], errors="ignore")
    return Table(
        name,
        "frame",
        label,
        labels,
        features,
        None,
        digest.hexdigest(),
        original=original,
        position=names.index(label),
    )


def _from_delimited(path: Path, label: str | None, text: Sequence[str]) -> Table:
    dialect = examine(path)
    try:
        label = _check_names(dialect.header, label, text, path.name)
    except DataError as error:
        if len(dialect.header) > 1 and all(_is_number(name) for name in dialect.header):
            raise DataError(
                f"{error} (The first line of {path.name} is all numbers: if it is data, "
                "write a line of column names above it.)"
            ) from None
        raise
    arrow = read_arrow(path, dialect, as_text=[label])
    labels, frame, notes = _split(arrow, label)
    return Table(
        path.name,
        "delimited",
        label,
        labels,
        frame,
        None,
        dialect.sha256,
        path,
        dialect,
        position=dialect.header.index(label),
        notes=notes,
    )


def _from_parquet(path: Path, label: str | None, text: Sequence[str]) -> Table:
    try:
        with pa_parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            label = _check_names(names, label, text, path.name)
            arrow = file.read()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise DataError(
            f"{path.name} cannot be read as Parquet ({_first_line(error)}). It may be cut off: "
            "copy it again, or write it again with pandas.DataFrame.to_parquet."
        ) from None
    labels, frame, notes = _split(arrow, label)
    return Table(
        path.name,
        "parquet",
        label,
        labels,
        frame,
        None,
        fingerprint(path),
        path,
        position=names.index(label),
        notes=notes,
    )


def _split(arrow: pa.Table, label: str) -> tuple[pd.Series, pd.DataFrame, list[str]]:
    """Separate the label; make the rest a pandas frame of plain columns, without a second copy."""
    notes: list[str] = []
    labels = _plain(arrow.column(label))
    if labels is None:
        raise DataError(f"The label column {label!r} holds lists. Give one label for each row.")
    drop = [label] + ([CHANGED_COLUMN] if CHANGED_COLUMN in arrow.column_names else [])
    arrow = arrow.drop_columns(drop)
    columns = {}
    for name in arrow.column_names:
        column = _plain(arrow.column(name))
        if column is None:
            notes.append(
                f"Column {name!r} holds {arrow.schema.field(name).type}, which is not a plain "
                "value; it is left out. Spread it over columns of its own to use it."
            )
        else:
            columns[name] = column
    table = pa.table(columns) if columns else None
    del arrow, columns
    frame = (
        pd.DataFrame(index=range(len(labels)))
        if table is None
        else table.to_pandas(date_as_object=False, split_blocks=True, self_destruct=True)
    )
    return labels.to_pandas(), frame, notes


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """The column as numbers, booleans, times or text; None where it is nested."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _plain(column.cast(kind.value_type))
    if pa.types.is_decimal(kind) or pa.types.is_float16(kind):
        return column.cast(pa.float64())
    if pa.types.is_duration(kind):
        return column.cast(pa.int64()).cast(pa.float64())
    if pa.types.is_time(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        try:
            return column.cast(pa.string())
        except pa.ArrowInvalid:
            return None
    return None if pa.types.is_nested(kind) else column


def _from_npz(path: Path, label: str) -> Table:
    try:
        # np.load leaves a file open that it cannot read; given a handle, it does not.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            names = list(archive.files)
            missing = [name for name in ("X", label) if name not in names]
            if missing:
                raise DataError(
                    f"{path.name} has no array {missing[0]!r}; it holds {_listing(names)}. "
                    "Save it with numpy.savez(path, X=rows, y=labels); "
                    "--label names another array of labels than y."
                )
            rows, labels = archive["X"], archive[label]
    except DataError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError) as error:
        if isinstance(error, PermissionError):
            raise
        hint = "It may be cut off: copy it again, or save it again with numpy.savez."
        if "allow_pickle" in str(error) or "Object arrays" in str(error):
            hint = "It holds Python objects: save X as numbers and y as numbers or text."
        raise DataError(
            f"{path.name} cannot be read as NPZ ({_first_line(error)}). {hint}"
        ) from None
    _check_arrays(rows, labels, label, path.name)
    if rows.ndim == 4 and rows.shape[1] in (1, 3) and rows.shape[3] not in (1, 3):
        rows = np.moveaxis(rows, 1, 3)  # channels first -> last, as thumbnails want them
    return Table(path.name, "npz", label, pd.Series(labels), None, rows, fingerprint(path), path)


def _check_arrays(rows: np.ndarray, labels: np.ndarray, label: str, where: str) -> None:
    if rows.dtype.kind not in "biuf":
        raise DataError(
            f"{where}: X holds {rows.dtype}, not numbers. Save X as integers or floats; "
            "a table with text or categories belongs in CSV or Parquet."
        )
    if labels.ndim != 1 or rows.ndim not in (2, 3, 4) or len(rows) != len(labels):
        raise DataError(
            f"{where}: X has shape {list(rows.shape)} and {label} {list(labels.shape)}. "
            "X must be [n, d], [n, h, w] or [n, h, w, 3] and the labels [n]."
        )
    if rows.ndim == 4 and rows.shape[1] not in (1, 3) and rows.shape[3] not in (1, 3):
        raise DataError(
            f"{where}: X has shape {list(rows.shape)}; images need 1 or 3 channels, first or last."
        )
    if rows[:1].size == 0 and len(rows):
        raise DataError(f"{where}: X has shape {list(rows.shape)}: rows without a single value.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
