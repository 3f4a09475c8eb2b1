"""Rows whose label the user vouches for."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from woodbury.apps.tables.delimited import examine
from woodbury.errors import DataError

__all__ = ["read_trusted", "trusted_mask"]

TRUE = {"true", "1", "yes", "t", "y"}
FALSE = {"false", "0", "no", "f", "n", ""}


def read_trusted(path: Path, n: int) -> np.ndarray:
    """Read which rows are trusted from a file.

    The file is one of: row numbers, one a line (0-based, as in ``rows.csv``); a CSV or TSV with a
    column ``row`` of such numbers (a part of ``rows.csv`` will do); a CSV or TSV with a column
    ``trusted`` of true and false, one line for each row of the table.

    Args:
        path: the file.
        n: rows of the table.

    Returns:
        bool ``[n]``.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the file is empty, in another form, or names rows that do not exist.
    """
    dialect = examine(path)
    with path.open(encoding=dialect.encoding, newline="") as handle:
        lines = [
            (reader.line_num, [cell.strip() for cell in cells])
            for reader in [csv.reader(handle, delimiter=dialect.delimiter)]
            for cells in reader
            if cells
        ]
    header = [cell.casefold() for cell in lines[0][1]]
    if "row" in header:
        return _rows(lines[1:], header.index("row"), n, path.name)
    if "trusted" in header:
        return _flags(lines[1:], header.index("trusted"), n, path.name)
    if len(header) == 1 and _whole(header[0]) is not None:
        return _rows(lines, 0, n, path.name)
    raise DataError(
        f"{path.name} (--trusted) must hold row numbers, one a line, or have a column 'row' of "
        f"row numbers or a column 'trusted' of true and false. Its first line is "
        f"{dialect.delimiter.join(lines[0][1])[:60]!r}."
    )


def _whole(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _rows(lines: Sequence[tuple[int, list[str]]], column: int, n: int, where: str) -> np.ndarray:
    mask = np.zeros(n, dtype=bool)
    for line, cells in lines:
        text = cells[column] if column < len(cells) else ""
        row = _whole(text)
        if row is None or not 0 <= row < n:
            raise DataError(
                f"{where} (--trusted), line {line}: {text!r} is not a row of the table. "
                f"Rows are numbered 0 to {n - 1:,}, as in the column 'row' of rows.csv."
            )
        mask[row] = True
    return mask


def _flags(lines: Sequence[tuple[int, list[str]]], column: int, n: int, where: str) -> np.ndarray:
    if len(lines) != n:
        raise DataError(
            f"{where} (--trusted) has {len(lines):,} lines under 'trusted' and the table {n:,} "
            "rows. Give one true or false for each row, or a column 'row' of row numbers."
        )
    mask = np.zeros(n, dtype=bool)
    for row, (line, cells) in enumerate(lines):
        word = cells[column].casefold() if column < len(cells) else ""
        if word not in TRUE | FALSE:
            raise DataError(
                f"{where} (--trusted), line {line}: {cells[column]!r} is neither true nor false."
            )
        mask[row] = word in TRUE
    return mask


def trusted_mask(trusted: Any, n: int, present: np.ndarray) -> np.ndarray | None:
    """Bring trusted rows in any accepted form to one mask, and check them against the labels.

    Args:
        trusted: None, a path (see :func:`read_trusted`), a bool sequence ``[n]``, or row numbers.
        n: rows of the table.
        present: rows that have a label, bool ``[n]``.

    Returns:
        bool ``[n]``, or None where nothing is trusted on purpose.

    Raises:
        DataError: a row does not exist, has no label, or none (or all) of the rows are trusted.

    Example:
        >>> import numpy as np
        >>> trusted_mask([0, 2], 3, np.ones(3, dtype=bool)).tolist()
        [True, False, True]
    """
    if trusted is None:
        return None
    if isinstance(trusted, str | Path):
        mask = read_trusted(Path(trusted), n)
    else:
        mask = _from_array(np.asarray(trusted), n)
    unlabelled = np.flatnonzero(mask & ~present)
    if len(unlabelled):
        raise DataError(
            f"Row {unlabelled[0]} is listed as trusted but has no label "
            f"({len(unlabelled):,} such rows). Fill it in, or take the row off the list."
        )
    if not mask.any():
        raise DataError("No row is listed as trusted. List some rows, or leave --trusted away.")
    if mask[present].all():
        raise DataError("Every row is listed as trusted, so there is nothing to look for.")
    return mask


def _from_array(array: np.ndarray, n: int) -> np.ndarray:
    if array.dtype == bool and array.shape == (n,):
        return array
    if array.dtype.kind in "iu" and array.ndim == 1 and array.size:
        if array.min() < 0 or array.max() >= n:
            raise DataError(
                f"trusted names rows {array.min()} to {array.max()}; rows are 0 to {n - 1:,}."
            )
        mask = np.zeros(n, dtype=bool)
        mask[array] = True
        return mask
    raise DataError(
        f"trusted must be a path, a bool array of shape [{n}] or row numbers; it has dtype "
        f"{array.dtype} and shape {list(array.shape)}."
    )
