"""The data frames of a run, and the files ``rows`` and ``cleaned``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from woodbury._files import atomic
from woodbury.apps.tables import CHANGED_COLUMN, Labels, Table
from woodbury.apps.tables.delimited import rewrite
from woodbury.errors import DataError

__all__ = ["Correction", "build_rows", "cleaned_frame", "write_cleaned", "write_rows"]

# A label is called wrong, and replaced in the cleaned table, above this error probability.
SUSPECT = 0.5
DECIMALS = 6


class Correction:
    """Which labels are replaced, and by what.

    Attributes:
        rows: the frame :func:`build_rows` made.
        changed: rows whose label is replaced, bool ``[n]``.
    """

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = rows
        self._suggested = rows["suggested_label"].to_numpy(dtype=object)
        differs = rows["label"].to_numpy(dtype=object) != self._suggested
        self.changed = (rows["error_probability"].to_numpy() > SUSPECT) & differs

    def apply(self, column: pd.Series) -> pd.Series:
        """The label column with the suggestions in place.

        A class is written as some row of the column writes it, so its type stays; a quantity
        becomes float64.
        """
        fixed = column.copy()
        places = np.flatnonzero(self.changed)
        place_of = {label: i for i, label in enumerate(self.rows["label"])}
        if all(self._suggested[i] in place_of for i in places):
            fixed.iloc[places] = column.iloc[[place_of[self._suggested[i]] for i in places]].array
            return fixed
        numbers = pd.to_numeric(fixed).to_numpy(dtype=np.float64, copy=True)
        numbers[places] = self._suggested[places]
        return pd.Series(numbers, index=column.index, name=column.name)

    def texts(self) -> dict[int, str]:
        """New text of the changed cells by row number."""
        return {int(i): cell_text(self._suggested[i]) for i in np.flatnonzero(self.changed)}


def cell_text(value: Any) -> str:
    """A label as a cell of a text file."""
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)


def build_rows(
    labels: Labels, probability: np.ndarray, suggested: np.ndarray, weight: np.ndarray
) -> pd.DataFrame:
    """Put the engine's answer for the labelled rows into a frame of all rows.

    Args:
        labels: the label column, ``n`` rows of which ``m`` are labelled.
        probability: that the label is wrong, ``[m]``.
        suggested: class index or target, ``[m]``.
        weight: learned weight, ``[m]``.

    Returns:
        ``row, label, suggested_label, error_probability, weight, rank``, ``n`` rows in the order of
        the table; rank 1 is the most suspicious, ties go to the earlier row.

    Raises:
        DataError: the engine answered for another number of rows, or with NaN.
    """
    n, m = len(labels.present), int(labels.present.sum())
    for name, values in (("error_probability", probability), ("weight", weight)):
        if values.shape != (m,) or not np.isfinite(values).all():
            raise DataError(
                f"The model gave {name} of shape {list(values.shape)} with "
                f"{int((~np.isfinite(values)).sum())} non-finite values for {m} rows. Try another "
                "--model, and please report this table."
            )
    frame = pd.DataFrame({"row": np.arange(n), "label": labels.given})
    decoded = labels.decode(suggested)
    if m == n:
        frame["suggested_label"] = decoded
    else:
        padded = np.empty(n, dtype=object)
        padded[labels.present] = decoded
        frame["suggested_label"] = padded
    rounded = np.clip(np.round(probability.astype(np.float64), DECIMALS), 0.0, 1.0)
    frame["error_probability"] = _spread(rounded, labels.present, np.nan)
    frame["weight"] = _spread(np.round(weight.astype(np.float64), DECIMALS), labels.present, 0.0)
    order = np.argsort(
        _spread(-probability.astype(np.float64), labels.present, np.inf), kind="stable"
    )
    rank = np.empty(n, dtype=np.int64)
    rank[order] = np.arange(1, n + 1)
    frame["rank"] = rank
    return frame


def _spread(values: np.ndarray, present: np.ndarray, fill: float) -> np.ndarray:
    full = np.full(len(present), fill)
    full[present] = values
    return full


def cleaned_frame(table: Table, correction: Correction) -> pd.DataFrame:
    """The table with suspect labels replaced and a column ``woodbury_changed``."""
    if table.original is not None:
        frame = table.original.copy()
        name = frame.columns[table.position]
        frame[name] = correction.apply(frame[name])
    elif table.array is not None:
        flat = table.array.reshape(len(table), -1)
        frame = pd.DataFrame(flat, columns=[f"x{j}" for j in range(flat.shape[1])])
        frame[table.label] = correction.apply(table.labels)
    else:
        assert table.frame is not None
        frame = table.frame.copy(deep=False)
        # Delimited files are read with labels as text; the rows hold them as what they mean.
        labels = correction.rows["label"] if table.kind == "delimited" else table.labels
        frame.insert(min(table.position, frame.shape[1]), table.label, correction.apply(labels))
    frame[CHANGED_COLUMN] = correction.changed
    return frame


def write_rows(rows: pd.DataFrame, folder: Path, format: str) -> Path:
    """Write ``rows.csv`` or ``rows.parquet``."""
    path = folder / f"rows.{format}"
    with atomic(path) as temporary:
        if format == "parquet":
            rows.to_parquet(temporary, index=False)
        else:
            rows.to_csv(temporary, index=False, lineterminator="\n")
    return path


def write_cleaned(table: Table, correction: Correction, folder: Path, format: str) -> Path:
    """Write the cleaned table, in the table's own format unless another was asked for.

    CSV and TSV keep every other cell as it was spelled; Parquet keeps every other column as it
    was stored; NPZ keeps its arrays. Otherwise the cleaned data frame is written.
    """
    if format == "auto" and table.kind == "npz":
        path = folder / "cleaned.npz"
        with atomic(path) as temporary:
            assert table.array is not None
            labels = correction.apply(table.labels).to_numpy()
            labels = labels.astype(str) if labels.dtype == object else labels
            arrays = {"X": table.array, table.label: labels, CHANGED_COLUMN: correction.changed}
            with temporary.open("wb") as handle:
                np.savez_compressed(handle, allow_pickle=False, **arrays)
        return path
    if format == "parquet" or (format == "auto" and table.kind == "parquet"):
        path = folder / "cleaned.parquet"
        with atomic(path) as temporary:
            pa_parquet.write_table(_cleaned_arrow(table, correction), temporary)
        return path
    dialect = table.dialect
    if table.path is not None and dialect is not None and CHANGED_COLUMN not in dialect.header:
        path = folder / f"cleaned{table.path.suffix.lower()}"
        with atomic(path) as temporary:
            rewrite(
                table.path,
                dialect,
                temporary,
                column=table.label,
                replacements=correction.texts(),
                changed=correction.changed,
                changed_column=CHANGED_COLUMN,
            )
        return path
    path = folder / "cleaned.csv"
    with atomic(path) as temporary:
        pa_csv.write_csv(_cleaned_arrow(table, correction), temporary)
    return path


def _cleaned_arrow(table: Table, correction: Correction) -> pa.Table:
    if table.kind != "parquet" or table.path is None:
        return pa.Table.from_pandas(cleaned_frame(table, correction), preserve_index=False)
    arrow = pa_parquet.read_table(table.path)
    if CHANGED_COLUMN in arrow.column_names:
        arrow = arrow.drop_columns([CHANGED_COLUMN])
    labels = pa.Array.from_pandas(correction.apply(table.labels))
    arrow = arrow.set_column(arrow.column_names.index(table.label), table.label, labels)
    return arrow.append_column(CHANGED_COLUMN, pa.array(correction.changed))
