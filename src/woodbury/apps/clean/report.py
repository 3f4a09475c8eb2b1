"""The report: one HTML file that opens offline and reads well without knowing the library."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from woodbury.apps.clean.report_certificate import certificate_groups
from woodbury.apps.clean.report_charts import calibration_chart, histogram, matrix, scatter
from woodbury.apps.clean.report_rows import suspect_cards
from woodbury.apps.pages import write_page

if TYPE_CHECKING:
    from woodbury.apps.clean.job import CleanResult

__all__ = ["write_report"]

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
MODEL_WORDS = {
    "linear": {
        "classification": "a linear model (multinomial logistic regression)",
        "regression": "a linear model (ridge regression)",
    },
    "kernel": {
        "classification": "a kernel model (similar rows should have similar labels)",
        "regression": "a kernel model (similar rows should have similar values)",
    },
    "mlp": {
        "classification": "a small neural network",
        "regression": "a small neural network",
    },
}


def write_report(result: CleanResult, path: Path) -> Path:
    """Write the report of a run.

    Args:
        result: of the job.
        path: the HTML file; written whole or not at all.

    Returns:
        The path.
    """
    return write_page(path, TEMPLATE, _context(result))


def _context(result: CleanResult) -> dict[str, Any]:
    summary = result.summary
    rows = result.rows
    probability = rows["error_probability"].dropna().to_numpy()
    weight = rows["weight"][rows["error_probability"].notna()].to_numpy()
    cards = suspect_cards(result)
    classification = summary["task"] == "classification"
    columns = summary["preparation"]["columns"]
    return {
        "summary": summary,
        "labelled": len(probability),
        "model": _model_words(summary),
        "cards": cards,
        "pictures": bool(cards) and "image" in cards[0],
        "classification": classification,
        "matrix": _matrix(result) if classification else None,
        "scatter": None if classification else _scatter(result),
        "by_class": _by_class(result) if classification else [],
        "scores": histogram(
            probability,
            0.0,
            1.0,
            title="Distribution of error probabilities",
            label="probability that the label is wrong",
            mark_from=0.5,
        ),
        "weights": histogram(
            weight,
            min(0.0, float(weight.min())),
            max(1.0, float(weight.max())),
            title="Distribution of row weights",
            label="weight of the row in the fit",
        ),
        "calibration": (
            calibration_chart(summary["calibration"]) if "calibration" in summary else None
        ),
        "certificate": certificate_groups(summary["certificate"]),
        "history": _history(summary["history"]),
        "columns": columns,
        "unused": [column for column in columns if column["kind"] == "unused"],
        "command": _command(summary),
        "cleaned_name": summary.get("files", {}).get("cleaned", "cleaned.csv"),
        "rows_name": summary.get("files", {}).get("rows", "rows.csv"),
    }


def _model_words(summary: dict[str, Any]) -> str:
    name = summary["certificate"].get("model", summary["settings"]["model"])
    return MODEL_WORDS.get(str(name), {}).get(summary["task"], str(name))


def _matrix(result: CleanResult) -> dict[str, Any] | None:
    suspects = result.suspects
    differs = suspects[suspects["label"] != suspects["suggested_label"]]
    classes = result.summary["classes"]
    return matrix(differs["label"].to_numpy(), differs["suggested_label"].to_numpy(), classes)


def _scatter(result: CleanResult) -> Markup:
    rows = result.rows.dropna(subset=["error_probability"])
    return scatter(
        rows["label"].to_numpy(dtype=np.float64),
        rows["suggested_label"].to_numpy(dtype=np.float64),
        rows["error_probability"].to_numpy() > 0.5,
    )


def _by_class(result: CleanResult, most: int = 30) -> list[dict[str, Any]]:
    rows = result.rows.dropna(subset=["error_probability"])
    suspect = (rows["error_probability"] > 0.5).groupby(rows["label"]).agg(["size", "sum"])
    suspect = suspect.sort_values("sum", ascending=False, kind="stable").head(most)
    kept = result.summary["certificate"].get("noise", {}).get("labels_kept_by_class")
    kept_of = dict(zip(result.summary["classes"], kept, strict=True)) if kept else {}
    return [
        {
            "label": label,
            "rows": int(size),
            "suspects": int(bad),
            "share": bad / size,
            "kept": kept_of.get(label),
        }
        for label, size, bad in suspect.itertuples()
    ]


def _history(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Rounds as a table: their plain numbers and words, under the names the engine gave."""
    plain = [
        {key: value for key, value in line.items() if isinstance(value, str | int | float)}
        for line in history
    ]
    names = list(dict.fromkeys(key for line in plain for key in line))
    if not names:
        return None
    lines = [[_cell(line.get(name)) for name in names] for line in plain]
    return {"names": [name.replace("_", " ") for name in names], "lines": lines}


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _command(summary: dict[str, Any]) -> str:
    table = summary["table"]["path"]
    if table is None:
        return ""
    words = ["woodbury", "clean", table, "--label", summary["label"]]
    for column in summary["settings"]["text"]:
        words += ["--text", column]
    if summary["settings"]["task"] != "auto":
        words += ["--task", summary["settings"]["task"]]
    return " ".join(shlex.quote(word) for word in words)
