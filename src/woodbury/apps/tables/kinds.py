"""What each column of a table is: numbers, yes/no, categories, dates, text, or of no use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from woodbury.errors import DataError

__all__ = ["LARGEST", "Column", "classify", "more_distinct_than"]

SAMPLE = 1000
LARGEST = 1e30  # beyond it squares overflow in float32, which models compute in
# Text: cells of several words, mostly different from each other.
TEXT_WORDS = 3.0
TEXT_DISTINCT = 0.2
# A column of strings is one of numbers if at most this share of them is something else.
STRAY_SHARE = 0.05
MAX_CODES = 6
DATE_PATTERN = (
    r"^\s*(\d{4}[-/]\d{1,2}[-/]\d{1,2}|\d{1,2}[./-]\d{1,2}[./-]\d{4})([T\s]\d{1,2}:.*)?\s*$"
)


@dataclass
class Column:
    """One column and how it will be used.

    Attributes:
        name: its name in the table.
        kind: ``numeric``, ``levels`` (3 to 6 whole numbers, which may be codes), ``boolean`` (two
            values), ``categorical``, ``date``, ``text``, or ``unused``.
        values: the column ``[n]``: float64 for the first three (NaN where missing),
            datetime64 for dates, strings for the rest (None where missing).
        note: why it is not used, or what was done to it, as a sentence; empty if nothing.
    """

    name: str
    kind: str
    values: pd.Series
    note: str = ""


def classify(name: str, column: pd.Series, *, text: bool, where: str) -> Column:
    """Find out what a column is.

    Args:
        name: its name.
        column: its values ``[n]``, any dtype.
        text: whether the user named it as text.
        where: name of the table, for messages.

    Returns:
        The :class:`Column`.

    Raises:
        DataError: it holds infinite values, or was named as text and holds numbers.

    Example:
        >>> import pandas as pd
        >>> classify("size", pd.Series([1.5, 2.0, 3.0, None]), text=False, where="t.csv").kind
        'numeric'
    """
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    if column.isna().all():
        return _unused(name, column, f"Column {name!r} is empty in every row; it is left out.")
    kind = _dtype_kind(column)
    if text and kind != "string":
        raise DataError(
            f"{where}: --text names column {name!r}, which holds {kind} values, not text. "
            "Leave --text away for it."
        )
    if kind == "string":
        return _strings(name, column, forced_text=text)
    if kind == "date":
        moments = pd.to_datetime(column, utc=True).dt.tz_localize(None)
        return Column(name, "date", moments)
    if kind == "boolean":
        return _constant_or(Column(name, "boolean", column.astype("float64")))
    values = pd.Series(column.to_numpy(dtype=np.float64, na_value=np.nan), copy=False)
    return _numeric(name, values, where)


def _dtype_kind(column: pd.Series) -> str:
    types = pd.api.types
    if types.is_bool_dtype(column.dtype):
        return "boolean"
    if types.is_numeric_dtype(column.dtype) and not types.is_complex_dtype(column.dtype):
        return "numeric"
    if types.is_datetime64_any_dtype(column.dtype):
        return "date"
    if column.dtype == object:
        inferred = pd.api.types.infer_dtype(column, skipna=True)
        if inferred == "boolean":
            return "boolean"
        if inferred in ("integer", "floating", "mixed-integer-float", "decimal"):
            return "numeric"
        if inferred in ("datetime", "datetime64", "date"):
            return "date"
    return "string"


def _numeric(name: str, values: pd.Series, where: str) -> Column:
    array = values.to_numpy()
    extreme = np.abs(array) > LARGEST  # False for NaN
    if extreme.any():
        row = int(extreme.argmax())
        what = "infinite" if np.isinf(array[row]) else f"{array[row]:g}, too large,"
        raise DataError(
            f"{where}: column {name!r} is {what} in row {row} ({extreme.sum():,} rows in all). "
            "Write the true value there, or leave the cell empty, which counts as missing."
        )
    found = _constant_or(Column(name, "numeric", values))
    if found.kind == "numeric" and _is_row_number(array):
        return _unused(
            name,
            values,
            f"Column {name!r} numbers the rows (all different, without gaps); it is left out.",
        )
    return _few(found)


def _few(found: Column) -> Column:
    """Tell columns of two numbers, and of few whole numbers, from other numeric ones."""
    if found.kind != "numeric" or more_distinct_than(found.values, MAX_CODES):
        return found
    distinct = found.values.dropna().unique()
    if len(distinct) == 2:
        found.kind = "boolean"
    elif 3 <= len(distinct) <= MAX_CODES and np.all(distinct == np.round(distinct)):
        found.kind = "levels"
    return found


def _is_row_number(array: np.ndarray) -> bool:
    n = len(array)
    if n < 20 or np.isnan(array[0]) or np.nanmax(array) - np.nanmin(array) != n - 1:
        return False
    return bool(np.all(array == np.round(array)) and len(np.unique(array)) == n)


def more_distinct_than(values: pd.Series, count: int) -> bool:
    """Whether the first rows alone have more than ``count`` values: saves hashing a long column.

    Example:
        >>> more_distinct_than(pd.Series([1, 2, 3]), 2)
        True
    """
    return bool(values.iloc[:SAMPLE].nunique() > count)


def _strings(name: str, column: pd.Series, forced_text: bool) -> Column:
    column = column.astype(object).where(column.notna(), None)
    column = column.map(lambda value: value if value is None else str(value))
    if forced_text:
        return Column(name, "text", column)
    present = column.dropna()
    sample = present.iloc[:: max(1, len(present) // SAMPLE)]
    numbers = _as_numbers(sample)
    if numbers.isna().mean() <= STRAY_SHARE:
        return _mostly_numbers(name, column)
    if sample.str.match(DATE_PATTERN).mean() >= 1 - STRAY_SHARE:
        found = _dates(name, column)
        if found is not None:
            return found
    words = sample.map(lambda value: len(value.split())).mean()
    distinct = present.nunique()
    if words >= TEXT_WORDS and distinct > max(30, TEXT_DISTINCT * len(present)):
        return Column(name, "text", column)
    if distinct == len(present) and distinct >= 20:
        return _unused(
            name,
            column,
            f"Column {name!r} has a different value in every row, like a name or an identifier; "
            f"it is left out (--text {name!r} reads it as text).",
        )
    return _constant_or(Column(name, "categorical", column))


def _as_numbers(column: pd.Series) -> pd.Series:
    """Text as numbers, with a decimal comma understood; NaN where it is none."""
    numbers = pd.to_numeric(column, errors="coerce")
    if numbers.isna().mean() > STRAY_SHARE:
        with_point = column.str.replace(r"^(\s*[-+]?\d+),(\d+\s*)$", r"\1.\2", regex=True)
        numbers = pd.to_numeric(with_point, errors="coerce")
    return numbers.astype("float64")


def _mostly_numbers(name: str, column: pd.Series) -> Column:
    numbers = _as_numbers(column)
    stray = column.notna() & (numbers.isna() | np.isinf(numbers))
    if stray.mean() > STRAY_SHARE:
        return _constant_or(Column(name, "categorical", column))
    numbers = numbers.mask(stray)
    note = ""
    if stray.any():
        row = int(stray.to_numpy().argmax())
        note = (
            f"Column {name!r} holds numbers except in {int(stray.sum()):,} rows "
            f"(row {row}: {column.iloc[row]!r}), which count as missing. Correct them if they are "
            "not."
        )
    found = _few(_constant_or(Column(name, "numeric", numbers)))
    found.note = found.note or note
    return found


def _dates(name: str, column: pd.Series) -> Column | None:
    """ISO dates, else day first unless that leaves more dates unread than month first."""
    text = column.str.strip()
    best: pd.Series | None = None
    choices: tuple[dict[str, Any], ...] = (
        {"format": "ISO8601"},
        {"format": "mixed", "dayfirst": True},
        {"format": "mixed", "dayfirst": False},
    )
    for options in choices:
        read = pd.to_datetime(text, errors="coerce", utc=True, **options).dt.tz_localize(None)
        if best is None or read.notna().sum() > best.notna().sum():
            best = read
    assert best is not None
    if best.isna().sum() - column.isna().sum() > STRAY_SHARE * len(column):
        return None
    return Column(name, "date", best)


def _constant_or(found: Column) -> Column:
    if more_distinct_than(found.values, 1) or found.values.nunique(dropna=False) > 1:
        return found
    value = found.values.iloc[0]
    shown = f"{value:g}" if isinstance(value, float) else repr(str(value))
    return _unused(
        found.name, found.values, f"Column {found.name!r} is {shown} in every row; it is left out."
    )


def _unused(name: str, values: pd.Series, note: str) -> Column:
    return Column(name, "unused", values, note)
