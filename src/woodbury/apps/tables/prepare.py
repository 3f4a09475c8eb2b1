"""From a table to the float32 matrix ``X`` and the labels ``y`` that models are fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from woodbury.apps.tables.encode import encode_categories, encode_dates, encode_text
from woodbury.apps.tables.kinds import LARGEST, Column, classify, more_distinct_than
from woodbury.apps.tables.labels import Labels, prepare_labels
from woodbury.apps.tables.scaling import scale_columns, scale_jointly, shared_unit
from woodbury.apps.tables.source import Table
from woodbury.errors import BudgetError, DataError

__all__ = ["Prepared", "prepare"]

Progress = Callable[[str, float], None]
STAGE = "preparing columns"
NUMBERS = ("numeric", "levels", "boolean")


@dataclass
class Prepared:
    """A table as numbers.

    Attributes:
        X: float32 ``[n, d]``, finite, every numeric column of about unit variance.
        labels: the label column.
        columns: how each column was used: ``{"name", "kind", "how", "features"}``.
        scaling: ``"joint"`` (one scale for all columns) or ``"per column"``.
        reason: why, as a phrase.
        image_shape: ``(h, w)`` or ``(h, w, 3)`` where a row is an image, else None.
        notes: sentences for the user.
    """

    X: np.ndarray
    labels: Labels
    columns: list[dict[str, object]]
    scaling: str
    reason: str
    image_shape: tuple[int, ...] | None
    notes: list[str]


def prepare(
    table: Table,
    *,
    task: str = "auto",
    text: Sequence[str] = (),
    seed: int = 0,
    budget_bytes: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Turn a table into numbers.

    Numbers are imputed by the median with an indicator and scaled robustly; columns in one unit
    (pixels) are scaled jointly; categories are one-hot or hashed; dates become a time and phases;
    text goes through TF-IDF and a truncated SVD. Labels are never looked at for it.

    Args:
        table: what :func:`read_table` returned, ``n`` rows.
        task: ``"auto"``, ``"classification"`` or ``"regression"``.
        text: columns to read as text whatever they look like.
        seed: of what draws (the SVD).
        budget_bytes: the most that ``X`` may take.
        progress: called with ``(stage, fraction)``.

    Returns:
        The :class:`Prepared` table.

    Raises:
        DataError: the label or a column cannot be used; the message names it and the remedy.
        BudgetError: ``X`` would not fit into the budget.

    Cost:
        A few passes over the table; memory of ``X`` twice.

    Example:
        >>> import pandas as pd
        >>> from woodbury.apps.tables import prepare, read_table
        >>> frame = pd.DataFrame({"size": range(0, 24, 2), "color": ["red", "blue", "blue"] * 4,
        ...                       "kind": ["a", "b"] * 6})
        >>> prepared = prepare(read_table(frame, "kind"))
        >>> prepared.X.shape, prepared.labels.task
        ((12, 2), 'classification')
    """
    labels = prepare_labels(table.labels, table.label, task, table.name)
    if table.array is not None:
        result = _from_array(table, labels, budget_bytes)
    else:
        result = _from_frame(table, labels, text, seed, budget_bytes, progress)
    if result.X.shape[1] == 0:
        raise DataError(
            f"{table.name} has no column that could tell one label from another (all are empty, "
            "constant, identifiers, or the label itself). Add columns that describe the rows."
        )
    return result


def _from_array(table: Table, labels: Labels, budget_bytes: int | None) -> Prepared:
    rows = table.array
    assert rows is not None
    shape = rows.shape[1:] if rows.ndim > 2 else None
    flat = rows.reshape(len(rows), -1)
    _check_budget(flat.shape, budget_bytes, table.name)
    usable = np.abs(flat) <= LARGEST if flat.dtype.kind == "f" else np.True_
    if not usable.all():
        row, column = (int(i[0]) for i in np.nonzero(~usable))
        raise DataError(
            f"{table.name}: X holds {flat[row, column]} in row {row}, column {column}. "
            "Write true numbers there before saving, or give the table as CSV with empty cells."
        )
    if flat.dtype == bool:
        flat = flat.astype(np.uint8)
    reason = "the rows are images" if shape else _array_unit(flat)
    if shape is None and reason and _is_square(flat.shape[1]) and flat.dtype.kind in "iu":
        side = int(np.sqrt(flat.shape[1]))
        shape = (side, side)
    X = scale_jointly(flat) if reason else scale_columns(flat)[0]
    columns: list[dict[str, object]] = [
        {"name": "X", "kind": "array", "how": "numbers", "features": X.shape[1]}
    ]
    notes = table.notes + labels.notes
    if shape is not None and len(shape) == 3 and shape[2] == 1:
        shape = shape[:2]
    return Prepared(X, labels, columns, *_scaling(reason), shape, notes)


def _array_unit(flat: np.ndarray) -> str:
    """Reason to scale an array jointly: one unit, or spreads of one order (embeddings)."""
    reason = shared_unit(flat)
    if reason:
        return reason
    spread = np.array([flat[:, j].std(dtype=np.float64) for j in range(flat.shape[1])])
    spread = spread[spread > 0]
    if len(spread) >= 16 and np.quantile(spread, 0.95) <= 10 * np.quantile(spread, 0.05):
        return f"all {flat.shape[1]} columns of X spread alike"
    return ""


def _from_frame(
    table: Table,
    labels: Labels,
    text: Sequence[str],
    seed: int,
    budget_bytes: int | None,
    progress: Progress | None,
) -> Prepared:
    frame = table.frame
    assert frame is not None
    report = progress or (lambda stage, fraction: None)
    columns = []
    for i, name in enumerate(frame.columns):
        column = classify(name, frame[name], text=name in text, where=table.name)
        columns.append(_without_copy_of_label(column, labels))
        report(STAGE, 0.4 * (i + 1) / frame.shape[1])
    notes = table.notes + labels.notes + _column_notes(columns)
    pixels, reason = _pixels(columns)
    if pixels is not None:
        _check_budget(pixels.shape, budget_bytes, table.name)
        uses = [_use(column, "pixel, scaled jointly", 1) for column in columns]
        shape = None
        if _is_square(pixels.shape[1]):
            side = int(np.sqrt(pixels.shape[1]))
            shape = (side, side)
        notes = table.notes + labels.notes
        X = scale_jointly(pixels)
        report(STAGE, 1.0)
        return Prepared(X, labels, uses, *_scaling(reason), shape, notes)
    X, uses = _encode(columns, len(table), seed, budget_bytes, table.name, notes, report)
    return Prepared(X, labels, uses, *_scaling(""), None, notes)


def _scaling(reason: str) -> tuple[str, str]:
    if reason:
        return "joint", reason
    return "per column", "the columns are in different units"


def _column_notes(columns: Sequence[Column], most: int = 8) -> list[str]:
    notes = [column.note for column in columns if column.note]
    if len(notes) <= most:
        return notes
    unused = sum(column.kind == "unused" for column in columns)
    rest = f"... and {len(notes) - most:,} more such columns ({unused:,} left out in all)."
    return [*notes[:most], rest]


def _pixels(columns: Sequence[Column]) -> tuple[np.ndarray | None, str]:
    """All columns as one matrix, if they are in one unit; constant ones keep their place."""
    plain = [pd.api.types.is_numeric_dtype(column.values.dtype) for column in columns]
    if not all(plain) or not any(column.kind == "numeric" for column in columns):
        return None, ""
    if any(column.kind == "unused" and " numbers the rows " in column.note for column in columns):
        return None, ""
    if any(column.values.isna().any() for column in columns):
        return None, ""
    probe = np.column_stack([column.values.to_numpy()[:50_000] for column in columns])
    if not shared_unit(probe):
        return None, ""
    rows = np.column_stack([column.values.to_numpy(dtype=np.float32) for column in columns])
    reason = shared_unit(rows)
    return (rows, reason) if reason else (None, "")


def _without_copy_of_label(column: Column, labels: Labels) -> Column:
    """A column that repeats the label, errors included, would hide every error: leave it out."""
    if column.kind not in ("categorical", *NUMBERS):
        return column
    if labels.task == "regression":
        if column.kind not in NUMBERS:
            return column
        values = column.values.to_numpy()
        same = np.array_equal(values, labels.codes, equal_nan=True)
    else:
        if more_distinct_than(column.values, labels.n_classes):
            return column
        codes, found = pd.factorize(column.values)
        if len(found) != labels.n_classes or ((codes < 0) != (labels.codes < 0)).any():
            return column
        pairs = codes * np.int64(labels.n_classes) + labels.codes
        same = len(np.unique(pairs[codes >= 0])) == labels.n_classes
    if same:
        column.kind = "unused"
        column.note = (
            f"Column {column.name!r} is the label in other words, errors included; it is left out."
        )
    return column


def _encode(
    columns: Sequence[Column],
    n: int,
    seed: int,
    budget_bytes: int | None,
    where: str,
    notes: list[str],
    report: Progress,
) -> tuple[np.ndarray, list[dict[str, object]]]:
    numeric = [column for column in columns if column.kind in NUMBERS]
    _check_budget((n, max(1, len(numeric))), budget_bytes, where)
    uses: list[dict[str, object]] = [_use(column, "", 0) for column in columns]
    by_name = {str(use["name"]): use for use in uses}
    blocks = _encode_numbers(numeric, n, by_name) if numeric else []
    report(STAGE, 0.7)
    rest = [column for column in columns if column.kind in ("categorical", "date", "text")]
    for i, column in enumerate(rest):
        block, how = _encode_one(column, seed)
        if block is None:
            notes.append(f"Column {column.name!r} is left out: {how}.")
            by_name[column.name].update(kind="unused", how=how)
            continue
        by_name[column.name].update(how=how, features=block.shape[1])
        blocks.append(block)
        _check_budget((n, sum(b.shape[1] for b in blocks)), budget_bytes, where)
        report(STAGE, 0.7 + 0.25 * (i + 1) / len(rest))
    X = np.concatenate(blocks, axis=1) if blocks else np.empty((n, 0), dtype=np.float32)
    report(STAGE, 1.0)
    return X, uses


def _encode_numbers(
    numeric: Sequence[Column], n: int, uses: dict[str, dict[str, object]]
) -> list[np.ndarray]:
    stacked = np.empty((n, len(numeric)), dtype=np.float64)
    for j, column in enumerate(numeric):
        stacked[:, j] = column.values.to_numpy()
        uses[column.name].update(how="scaled by its own spread", features=1)
    scaled, marks = scale_columns(stacked)
    del stacked
    codes = []
    for j, column in enumerate(numeric):
        if column.kind == "boolean":
            # Scaling would make a rare mark the most important column of all.
            scaled[:, j] = _zero_one(column.values.to_numpy())
            uses[column.name]["how"] = "0 or 1"
        elif column.kind == "levels":
            values = column.values.to_numpy()
            levels = np.unique(values[~np.isnan(values)])
            codes.append((values[:, None] == levels).astype(np.float32))
            uses[column.name].update(how="scaled, and one-hot", features=1 + len(levels))
    return [scaled, marks, *codes]


def _zero_one(values: np.ndarray) -> np.ndarray:
    low, high = np.nanmin(values), np.nanmax(values)
    return np.nan_to_num((values - low) / (high - low), nan=0.5)


def _encode_one(column: Column, seed: int) -> tuple[np.ndarray | None, str]:
    if column.kind == "categorical":
        return encode_categories(column.values)
    if column.kind == "text":
        return encode_text(column.values, seed)
    parts = encode_dates(column.values)
    scaled, marks = scale_columns(parts[:, :1])
    phases = np.nan_to_num(parts[:, 1:]).astype(np.float32)
    return np.concatenate([scaled, phases, marks], axis=1), "time, season, weekday"


def _use(column: Column, how: str, features: int) -> dict[str, object]:
    return {"name": column.name, "kind": column.kind, "how": how, "features": features}


def _is_square(d: int) -> bool:
    return int(np.sqrt(d)) ** 2 == d


def _check_budget(shape: tuple[int, ...], budget_bytes: int | None, where: str) -> None:
    need = int(np.prod(shape, dtype=np.int64)) * 4
    if budget_bytes is not None and need > budget_bytes:
        raise BudgetError(
            f"{where} becomes {shape[0]:,} x {shape[1]:,} numbers, which take "
            f"{need / 2**30:.1f} GiB, and the budget is {budget_bytes / 2**30:.1f} GiB. Raise "
            f"--budget, or give fewer columns (smaller images) or rows."
        )
