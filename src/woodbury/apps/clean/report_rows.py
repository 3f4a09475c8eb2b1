"""The suspects of the report: their pictures or values, and what stands out about each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from woodbury.apps.clean.report_charts import thumbnail

if TYPE_CHECKING:
    from woodbury.apps.clean.job import CleanResult

__all__ = ["suspect_cards"]

TOP = 56
FEW, DOUBTFUL = 10, 0.05
MAX_TEXT = 280
MAX_VALUES = 40
MAX_REASONS = 3
# Medians and shares by class are taken from at most this many rows.
SAMPLE = 50_000


def suspect_cards(result: CleanResult, top: int = TOP) -> list[dict[str, Any]]:
    """The most suspicious rows, ready to show.

    Args:
        result: of the job.
        top: how many at most. Where there are fewer than ten suspects, the most doubtful other
            rows follow, down to an error probability of 5 %.

    Returns:
        For each: ``row, given, suggested, probability`` and either ``image`` (a data
        URI) or ``texts``, ``values`` and ``reasons``.
    """
    ranked = result.rows.sort_values("rank")
    doubtful = int((ranked["error_probability"] >= DOUBTFUL).sum())
    count = max(len(result.suspects), min(FEW, doubtful))
    chosen = ranked.head(min(top, count))
    cards: list[dict[str, Any]] = [
        {
            "row": line["row"],
            "given": _show(line["label"]),
            "suggested": _short(_alternative(result, line)),
            "probability": line["error_probability"],
        }
        for line in chosen.to_dict("records")
    ]
    shape = result.prepared.image_shape
    if shape is not None:
        pixels = _pixels(result, chosen["row"].to_numpy())
        low, high = _range(result)
        for card, image in zip(cards, pixels, strict=True):
            card["image"] = thumbnail(image.reshape(shape), low, high)
        return cards
    if result.table.frame is None:
        return cards
    _add_values(result, cards)
    return cards


def _alternative(result: CleanResult, line: dict[Any, Any]) -> Any:
    """The suggested label; of a row that is right rather than wrong, the likeliest other class."""
    labels = result.prepared.labels
    if line["label"] != line["suggested_label"] or result.probabilities is None:
        return line["suggested_label"]
    assert labels.classes is not None
    place = int(labels.present[: line["row"]].sum())
    chances = result.probabilities[place].copy()
    chances[labels.codes[line["row"]]] = -1.0
    return labels.classes[int(chances.argmax())]


def _pixels(result: CleanResult, rows: np.ndarray) -> np.ndarray:
    table = result.table
    if table.array is not None:
        return table.array[rows]
    assert table.frame is not None
    return table.frame.iloc[rows].to_numpy(dtype=np.float64)


def _range(result: CleanResult) -> tuple[float, float]:
    probe = _pixels(result, np.arange(0, len(result.table), max(1, len(result.table) // 500)))
    return float(probe.min()), float(probe.max())


def _add_values(result: CleanResult, cards: list[dict[str, Any]]) -> None:
    frame = result.table.frame
    assert frame is not None
    kinds = {str(use["name"]): str(use["kind"]) for use in result.prepared.columns}
    texts = [name for name, kind in kinds.items() if kind == "text"]
    shown = [name for name in frame.columns if name not in texts]
    typical = _Typical(result, kinds)
    for card in cards:
        line = frame.iloc[card["row"]]
        card["texts"] = [(name, _show(line[name], MAX_TEXT)) for name in texts]
        card["values"] = [(name, _show(line[name])) for name in shown[:MAX_VALUES]]
        card["left_out"] = max(0, len(shown) - MAX_VALUES)
        card["reasons"] = typical.reasons(card["row"])


class _Typical:
    """What is usual, to say where a row is unlike its label's class (or unlike other rows)."""

    def __init__(self, result: CleanResult, kinds: dict[str, str]) -> None:
        assert result.table.frame is not None
        self._rows = result.rows
        self._frame = result.table.frame
        self._classes = result.prepared.labels.task == "classification"
        self._numeric: dict[str, tuple[dict[Any, float], float]] = {}
        self._categories: dict[str, pd.DataFrame] = {}
        self._sorted: dict[str, np.ndarray] = {}
        picked = np.flatnonzero(result.prepared.labels.present)
        picked = picked[:: max(1, len(picked) // SAMPLE)]
        labels = result.rows["label"].iloc[picked].to_numpy()
        for name, kind in kinds.items():
            column = self._frame[name].iloc[picked].reset_index(drop=True)
            if kind in ("numeric", "levels", "boolean") and column.dtype.kind in "iuf":
                spread = float(column.quantile(0.75) - column.quantile(0.25)) or float(column.std())
                if self._classes:
                    medians = column.groupby(labels).median().to_dict()
                    self._numeric[name] = (medians, spread or 1.0)
                else:
                    self._sorted[name] = np.sort(column.dropna().to_numpy())
            elif kind in ("categorical", "boolean") and self._classes:
                values = column.astype(str)
                self._categories[name] = pd.crosstab(values, labels, normalize="columns")

    def reasons(self, row: int) -> list[str]:
        """Up to three phrases on what is usual for the suggested label but not the given one."""
        line = self._rows.iloc[row]
        given, suggested = line["label"], line["suggested_label"]
        found = [
            *self._numeric_reasons(row, given, suggested),
            *self._category_reasons(row, given, suggested),
            *self._extremes(row),
        ]
        found.sort(key=lambda item: -item[0])
        return [text for _, text in found[:MAX_REASONS]]

    def _extremes(self, row: int) -> list[tuple[float, str]]:
        found = []
        for name, values in self._sorted.items():
            value = self._frame[name].iloc[row]
            if pd.isna(value):
                continue
            below, upto = (np.searchsorted(values, value, side) for side in ("left", "right"))
            share, word = max(
                (float(below) / len(values), "higher"), (1 - float(upto) / len(values), "lower")
            )
            if share >= 0.9:
                most = "almost every row" if share > 0.99 else f"{share:.0%} of the rows"
                text = f"{name} is {_show(value)}, {word} than in {most}"
                found.append((share, text))
        return found

    def _numeric_reasons(self, row: int, given: Any, suggested: Any) -> list[tuple[float, str]]:
        found = []
        for name, (medians, spread) in self._numeric.items():
            value = self._frame[name].iloc[row]
            if pd.isna(value) or given not in medians or suggested not in medians:
                continue
            far = abs(value - medians[given]) - abs(value - medians[suggested])
            if far / spread > 0.3:
                text = (
                    f"{name} is {_show(value)}; usual for {_show(given)} is "
                    f"{_show(medians[given])}, for {_show(suggested)} {_show(medians[suggested])}"
                )
                found.append((far / spread, text))
        return found

    def _category_reasons(self, row: int, given: Any, suggested: Any) -> list[tuple[float, str]]:
        found = []
        for name, shares in self._categories.items():
            value = str(self._frame[name].iloc[row])
            if value not in shares.index or not {given, suggested} <= set(shares.columns):
                continue
            here, there = (float(shares[label].at[value]) for label in (given, suggested))
            if there - here > 0.2:
                text = (
                    f"{name} is {_show(value)}, as in {there:.0%} of {_show(suggested)} and "
                    f"{here:.0%} of {_show(given)}"
                )
                found.append((2 * (there - here), text))
        return found


def _show(value: Any, most: int = 60) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)) or value is pd.NaT:
        return "–"
    text = f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _short(value: Any) -> str:
    """A suggestion; a predicted quantity is not known to six digits."""
    return f"{value:.4g}" if isinstance(value, float) else _show(value)
