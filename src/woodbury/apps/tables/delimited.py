"""CSV and TSV files: how they are laid out, reading them fast, writing them back unchanged.

Values are parsed by pyarrow (several times faster than pandas' own parser). The cleaned copy of a
file is made from its raw lines, so every cell that is not corrected keeps its exact spelling
(``007``, ``1.10``, quotation marks), and the file is never held in memory for it.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from woodbury.errors import DataError

__all__ = ["Dialect", "examine", "read_arrow", "rewrite"]

CHUNK = 1 << 22
MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
DELIMITERS = (",", ";", "\t", "|")
# What pandas and R write for "no value"; "?" is what many UCI tables use.
MISSING = ["", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "#N/A", "<NA>", "?"]
# A field longer than the csv module's default of 128 KiB is legal in a table of documents.
csv.field_size_limit(1 << 30)


@dataclass(frozen=True)
class Dialect:
    """How one delimited file is written.

    Attributes:
        delimiter: the character between cells.
        encoding: the Python codec that decodes the file.
        quotes: number of quotation marks in it.
        header: names of the columns, in file order.
        sha256: hash of the file's bytes.
        size: its length in bytes.
    """

    delimiter: str
    encoding: str
    quotes: int
    header: tuple[str, ...]
    sha256: str
    size: int


def examine(path: Path) -> Dialect:
    """Read a delimited file once and find its encoding, delimiter, header and hash.

    Args:
        path: the file; ``.tsv`` prefers tabs.

    Returns:
        The file's :class:`Dialect`.

    Raises:
        DataError: the file is empty, is not text, or its header repeats or omits a name.

    Cost:
        One pass over the bytes; 4 MiB of memory.
    """
    digest, size, quotes = hashlib.sha256(), 0, 0
    candidates: dict[str, codecs.IncrementalDecoder] | None = None
    start = b""
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            if candidates is None:
                start = chunk
                candidates = _decoders(chunk, path)
            digest.update(chunk)
            size += len(chunk)
            quotes += chunk.count(b'"')
            _try_decoders(candidates, chunk)
    if candidates is None or not start.strip():
        raise DataError(f"{path.name} is empty. Give a table with a header line and rows under it.")
    _try_decoders(candidates, b"", final=True)
    if not candidates and start.startswith(MARKS):
        raise DataError(
            f"{path.name} begins with a byte order mark of Unicode text but cannot be decoded as "
            "such. It may be cut off: copy it again, or save it as UTF-8."
        )
    encoding = next(iter(candidates), "latin-1")
    delimiter, header = _read_header(path, encoding)
    return Dialect(delimiter, encoding, quotes, header, digest.hexdigest(), size)


def _decoders(start: bytes, path: Path) -> dict[str, codecs.IncrementalDecoder]:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        names = ["utf-16"]
    elif start.startswith(codecs.BOM_UTF8):
        names = ["utf-8-sig"]
    else:
        if b"\0" in start[:65536]:
            raise DataError(
                f"{path.name} is not a text file although it is named like one "
                "(it contains zero bytes). Save the table again as CSV, TSV, Parquet or NPZ."
            )
        names = ["utf-8", "cp1252"]
    return {name: codecs.getincrementaldecoder(name)() for name in names}


def _try_decoders(
    candidates: dict[str, codecs.IncrementalDecoder], chunk: bytes, final: bool = False
) -> None:
    """Drop the codecs that cannot decode this chunk; while UTF-8 holds, only it is tried."""
    for name in list(candidates):
        try:
            candidates[name].decode(chunk, final)
        except UnicodeDecodeError:
            del candidates[name]


def _read_header(path: Path, encoding: str) -> tuple[str, tuple[str, ...]]:
    with path.open(encoding=encoding, newline="") as handle:
        first = next((raw for raw in handle if raw.strip()), "")
    unquoted = "".join(first.split('"')[::2])
    counts = {mark: unquoted.count(mark) for mark in DELIMITERS}
    delimiter = max(counts, key=lambda mark: counts[mark])
    if counts[delimiter] == 0:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding=encoding, newline="") as handle:
        header = next((row for row in csv.reader(handle, delimiter=delimiter) if row), [])
    return delimiter, tuple(name.strip() for name in header)


def read_arrow(path: Path, dialect: Dialect, as_text: Iterable[str] = ()) -> pa.Table:
    """Parse a delimited file into an Arrow table.

    Args:
        path: the file.
        dialect: what :func:`examine` found.
        as_text: columns to keep as text instead of guessing their type.

    Returns:
        The table ``[n, columns]``, with the header's names.

    Raises:
        DataError: a line has too few or too many cells, or a quotation mark is never closed.
    """
    if dialect.quotes % 2:
        # Arrow would silently read everything after the open mark as one cell.
        problem = _find_problem(path, dialect)
        if problem:
            raise DataError(problem)
    convert = pa_csv.ConvertOptions(
        column_types={name: pa.string() for name in as_text},
        null_values=MISSING,
        strings_can_be_null=True,
    )
    try:
        return pa_csv.read_csv(
            path,
            read_options=pa_csv.ReadOptions(
                # pyarrow skips a UTF-8 byte order mark by itself.
                encoding="utf-8" if dialect.encoding == "utf-8-sig" else dialect.encoding,
                block_size=1 << 24,
                column_names=list(dialect.header),
                skip_rows_after_names=1,
            ),
            parse_options=pa_csv.ParseOptions(
                delimiter=dialect.delimiter, newlines_in_values=dialect.quotes > 0
            ),
            convert_options=convert,
        )
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise DataError(
            _find_problem(path, dialect)
            or f"{path.name} cannot be parsed: {error}. Correct the file and run again."
        ) from None


def _find_problem(path: Path, dialect: Dialect) -> str:
    """Describe the first line that does not fit the header; Arrow rarely says where it is."""
    width = len(dialect.header)
    with path.open(encoding=dialect.encoding, newline="", errors="replace") as handle:
        reader = csv.reader(handle, delimiter=dialect.delimiter, strict=True)
        line = 1
        try:
            for cells in reader:
                if cells and len(cells) != width:
                    return _misfit(path.name, line, cells, dialect)
                line = reader.line_num + 1
        except csv.Error as error:
            return (
                f"{path.name}, line {line}: {error}. A quotation mark is opened there and not "
                "closed, or the file is cut off. Correct that line and run again."
            )
    return ""


def _misfit(name: str, line: int, cells: list[str], dialect: Dialect) -> str:
    text = dialect.delimiter.join(cells)
    if len(text) > 80:
        text = text[:77] + "..."
    width = len(dialect.header)
    hint = "Is the file cut off there?"
    if len(cells) > width:
        hint = 'A cell that contains the delimiter must stand in quotes ("...").'
    return (
        f"{name}, line {line}: {len(cells)} cells where the header names {width}: {text!r}. "
        f"{hint} Correct that line and run again."
    )


def _records(handle: TextIO, dialect: Dialect) -> Iterator[str]:
    """Yield the raw text of each record, blank lines left out, as the parser does."""
    if not dialect.quotes:
        yield from (raw for raw in handle if raw.strip("\r\n"))
        return
    seen: list[str] = []

    def recorded() -> Iterator[str]:
        for raw in handle:
            seen.append(raw)
            yield raw

    for cells in csv.reader(recorded(), delimiter=dialect.delimiter):
        if cells:
            yield "".join(seen)
        seen.clear()


def rewrite(
    path: Path,
    dialect: Dialect,
    out: Path,
    *,
    column: str,
    replacements: dict[int, str],
    changed: np.ndarray,
    changed_column: str,
) -> None:
    """Write a delimited file again with some cells of one column replaced and a column added.

    Args:
        path: the file to copy.
        dialect: what :func:`examine` found.
        out: where the copy goes, in the same encoding, with the same delimiter and line ends.
        column: the column whose cells are replaced.
        replacements: new text of that cell by row number.
        changed: values of the added column, bool ``[n]``, written ``True`` or ``False``.
        changed_column: the added column's name.

    Raises:
        DataError: the file no longer has ``n`` rows (it was changed while the job ran).

    Cost:
        One pass over the file; memory for one record.
    """
    index = dialect.header.index(column)
    flags = ("False", "True")
    count = -1
    with (
        path.open(encoding=dialect.encoding, newline="") as source,
        out.open("w", encoding=dialect.encoding, newline="") as target,
    ):
        for count, raw in enumerate(_records(source, dialect), start=-1):
            body = raw.rstrip("\r\n")
            end = raw[len(body) :] or "\n"
            if count == -1:
                target.write(f"{body}{dialect.delimiter}{changed_column}{end}")
                continue
            if count >= len(changed):
                break
            if count in replacements:
                body = _with_cell(body, index, replacements[count], dialect.delimiter)
            target.write(f"{body}{dialect.delimiter}{flags[int(changed[count])]}{end}")
    if count != len(changed) - 1:
        raise DataError(
            f"{path.name} had {len(changed):,} rows when it was read and does not any more. "
            "Leave the table alone while it is being cleaned, and run again."
        )


def _with_cell(body: str, index: int, text: str, delimiter: str) -> str:
    cells = next(csv.reader(io.StringIO(body, newline=""), delimiter=delimiter))
    cells[index] = text
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, lineterminator="").writerow(cells)
    return buffer.getvalue()
