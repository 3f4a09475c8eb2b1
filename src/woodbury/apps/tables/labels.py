"""The label column: classes or numbers, and every way it can be unusable."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from woodbury.errors import DataError

__all__ = ["Labels", "prepare_labels"]

MIN_ROWS = 10
MAX_CLASSES = 1000
# Above this many distinct whole numbers a label is taken for a quantity (an age, a price).
MAX_AUTO_CLASSES = 50
# ... and above this many distinct fractional numbers.
MAX_AUTO_FRACTIONS = 20


@dataclass
class Labels:
    """Labels ready for fitting.

    Attributes:
        task: ``"classification"`` or ``"regression"``.
        given: the labels in the user's terms ``[n]``: integers where the table holds whole numbers,
            else floats or text; None or NaN where a row has no label.
        present: rows that have a label, bool ``[n]``.
        codes: class index ``[n]`` int64 (-1 where missing), or the target ``[n]`` float64.
        classes: value of each class ``[C]`` in the type of ``given``, None for regression.
        notes: sentences for the user.
    """

    task: str
    given: np.ndarray
    present: np.ndarray
    codes: np.ndarray
    classes: np.ndarray | None
    notes: list[str] = field(default_factory=list)

    @property
    def n_classes(self) -> int:
        """Number of classes ``C``, 0 for regression."""
        return 0 if self.classes is None else len(self.classes)

    def decode(self, suggested: np.ndarray) -> np.ndarray:
        """Class indices (or predicted targets) ``[m]`` in the user's terms."""
        return suggested if self.classes is None else self.classes[suggested.astype(np.int64)]


def prepare_labels(column: pd.Series, name: str, task: str, where: str) -> Labels:
    """Decide the task and turn a label column into codes.

    Args:
        column: the label column ``[n]`` of any dtype.
        name: its name, for messages.
        task: ``"auto"``, ``"classification"`` or ``"regression"``. ``auto`` takes regression for
            more than 50 distinct whole numbers or more than 20 distinct fractional ones.
        where: name of the table, for messages.

    Returns:
        The :class:`Labels`.

    Raises:
        DataError: nothing is labelled, the label is constant, infinite, not numeric where
            regression was asked for, has too many classes, or a class with one row.

    Example:
        >>> import pandas as pd
        >>> column = pd.Series(["cat", "dog"] * 5)
        >>> prepare_labels(column, "animal", "auto", "pets.csv").classes.tolist()
        ['cat', 'dog']
    """
    column = _untyped(column)
    present = column.notna().to_numpy()
    notes: list[str] = []
    if not present.any():
        raise DataError(f"{where}: the label column {name!r} is empty. Name another with --label.")
    if present.sum() < MIN_ROWS:
        raise DataError(
            f"{where} has {present.sum()} labelled rows. Finding wrong labels needs at least "
            f"{MIN_ROWS}, and is useful from some hundreds."
        )
    if not present.all():
        missing = np.flatnonzero(~present)
        notes.append(
            f"{len(missing):,} rows have no label in {name!r} (the first is row {missing[0]}); "
            "they are not judged and stand at the end of the ranking."
        )
    distinct, codes = _distinct(column)
    numbers = pd.to_numeric(pd.Series(distinct), errors="coerce").to_numpy(dtype=np.float64)
    numeric = not np.isnan(numbers).any()
    _refuse_infinite(distinct, numbers, codes, name, where)
    if len(distinct) == 1:
        raise DataError(
            f"{where}: every row has the same label {_show(distinct[0])} in {name!r}. "
            "Name a column with at least two labels, with --label."
        )
    if task == "auto":
        task = "regression" if numeric and _is_quantity(numbers) else "classification"
        if task == "regression":
            notes.append(
                f"{name!r} holds {len(distinct):,} different numbers and is taken for a quantity "
                "(--task classification treats every number as a class)."
            )
    if task == "regression":
        if not numeric:
            _refuse_text(distinct, numbers, codes, name, where)
        target = np.where(codes >= 0, numbers[codes], np.nan)
        return Labels("regression", target, present, target, None, notes)
    return _classes(distinct, codes, numbers if numeric else None, name, where, notes)


def _untyped(column: pd.Series) -> pd.Series:
    """Categories as their values, booleans as words; blanks around text as no label at all."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    if pd.api.types.is_bool_dtype(column.dtype):
        column = column.map({True: "True", False: "False"})
    if pd.api.types.is_string_dtype(column.dtype) or column.dtype == object:
        column = column.where(column.astype(str).str.strip() != "", None)
    return column.reset_index(drop=True)


def _distinct(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct values ``[C]`` and each row's index into them ``[n]``, -1 where missing."""
    codes, found = pd.factorize(column)
    values = np.asarray(found)
    if values.dtype.kind not in "biuf":
        values = np.array(
            [value if isinstance(value, str) else str(value) for value in values], dtype=object
        )
    numbers = pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(dtype=np.float64)
    order = (
        np.lexsort((values.astype(str), numbers))
        if not np.isnan(numbers).any()
        else np.argsort(values.astype(str), kind="stable")
    )
    place = np.empty(len(order) + 1, dtype=np.int64)
    place[order] = np.arange(len(order))
    place[-1] = -1
    return values[order], place[codes]


def _is_quantity(numbers: np.ndarray) -> bool:
    whole = bool(np.all(numbers == np.round(numbers)))
    return len(np.unique(numbers)) > (MAX_AUTO_CLASSES if whole else MAX_AUTO_FRACTIONS)


def _refuse_infinite(
    distinct: np.ndarray, numbers: np.ndarray, codes: np.ndarray, name: str, where: str
) -> None:
    infinite = np.isinf(numbers)
    if infinite.any():
        row = int(np.flatnonzero(np.isin(codes, np.flatnonzero(infinite)))[0])
        raise DataError(
            f"{where}: the label column {name!r} is infinite ({distinct[codes[row]]}) in row {row}."
            " Write the true value there, or leave the cell empty."
        )


def _refuse_text(
    distinct: np.ndarray, numbers: np.ndarray, codes: np.ndarray, name: str, where: str
) -> None:
    bad = np.flatnonzero(np.isnan(numbers))
    row = int(np.flatnonzero(np.isin(codes, bad))[0])
    raise DataError(
        f"{where}: regression needs numbers in the label column {name!r}, and row {row} holds "
        f"{_show(distinct[codes[row]])}. Correct it, leave the cell empty, or use "
        "--task classification."
    )


def _classes(
    distinct: np.ndarray,
    codes: np.ndarray,
    numbers: np.ndarray | None,
    name: str,
    where: str,
    notes: list[str],
) -> Labels:
    counts = np.bincount(codes[codes >= 0], minlength=len(distinct))
    if len(distinct) > MAX_CLASSES or len(distinct) > (codes >= 0).sum() / 2:
        remedy = "Name the column that holds the class with --label, or group its values"
        if numbers is not None:
            remedy += "; if the numbers are a quantity, use --task regression"
        raise DataError(
            f"{where}: the label column {name!r} has {len(distinct):,} different values in "
            f"{(codes >= 0).sum():,} rows, which is too many for classes (at most "
            f"{MAX_CLASSES:,}, two rows or more each). {remedy}."
        )
    single = np.flatnonzero(counts == 1)
    if len(single):
        shown = "; ".join(
            f"{_show(distinct[c])} (row {int(np.flatnonzero(codes == c)[0])})" for c in single[:5]
        )
        more = f" and {len(single) - 5} more" if len(single) > 5 else ""
        raise DataError(
            f"{where}: a class needs at least two rows, and {name!r} has "
            f"{'a class' if len(single) == 1 else f'{len(single)} classes'} with one: "
            f"{shown}{more}. Correct the spelling, merge the class with another, or remove the row."
        )
    values = distinct
    if values.dtype == object and numbers is not None:
        whole = np.all(numbers == np.round(numbers)) and np.abs(numbers).max() < 2**53
        if whole and all(str(int(x)) == v for x, v in zip(numbers, values, strict=True)):
            values = numbers.astype(np.int64)  # "3" -> 3, but "03" and "3.0" keep their spelling
    elif values.dtype.kind == "f" and np.all(values == np.round(values)):
        values = values.astype(np.int64)
    _note_lookalikes(values, name, notes)
    given = np.empty(len(codes), dtype=object)
    given[codes >= 0] = values[codes[codes >= 0]]
    if values.dtype.kind in "iu" and (codes >= 0).all():
        given = given.astype(np.int64)
    return Labels("classification", given, codes >= 0, codes, values, notes)


def _note_lookalikes(values: np.ndarray, name: str, notes: list[str]) -> None:
    seen: dict[str, object] = {}
    for value in values:
        key = " ".join(str(value).split()).casefold()
        if key in seen:
            notes.append(
                f"Labels {_show(seen[key])} and {_show(value)} of {name!r} differ only in case or "
                "spaces and are treated as two classes. Spell them alike if they are one."
            )
        seen.setdefault(key, value)


def _show(value: object) -> str:
    text = str(value)
    return repr(text if len(text) <= 40 else text[:37] + "...")
