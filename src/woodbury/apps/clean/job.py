"""The whole job: read a table, prepare it, find its wrong labels, write what was found."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from woodbury import __version__
from woodbury.apps.clean.metrics import score
from woodbury.apps.clean.outputs import (
    SUSPECT,
    Correction,
    build_rows,
    cleaned_frame,
    write_cleaned,
    write_rows,
)
from woodbury.apps.clean.settings import Settings
from woodbury.apps.clean.state import RunFolder
from woodbury.apps.files import plain, write_json
from woodbury.apps.progress import Display, ProgressCallback
from woodbury.apps.tables import Prepared, Table, prepare, read_table, trusted_mask
from woodbury.errors import DataError

if TYPE_CHECKING:
    from woodbury.apps.clean.engine import EngineResult

__all__ = ["CleanResult", "clean"]

# Above this share of suspects the table is more likely uninformative than wrong.
DOUBTFUL_SHARE = 0.35


@dataclass
class CleanResult:
    """What was found in a table.

    Attributes:
        rows: one line for each row of the table, in its order: ``row`` (from 0), ``label``,
            ``suggested_label``, ``error_probability`` (that the label is wrong; NaN for a row
            without a label), ``weight`` (how much the row counted in the last fit) and ``rank``
            (1 is the most suspicious).
        summary: what ``summary.json`` holds: settings, counts, preparation, certificate.
        probabilities: the model's probability of each class had the row been left out,
            float ``[m, C]`` for the ``m`` rows with a label, or None for regression.
        folder: where files were written, or None.

    Example:
        >>> import woodbury
        >>> from sklearn.datasets import load_iris
        >>> frame = load_iris(as_frame=True).frame
        >>> frame.loc[3, "target"] = 2  # a wrong label
        >>> found = woodbury.clean(frame, label="target", model="linear")
        >>> int(found.cleaned.loc[3, "target"]), bool(found.cleaned.loc[3, "woodbury_changed"])
        (0, True)
        >>> found.summary["task"], found.probabilities.shape
        ('classification', (150, 3))
    """

    rows: pd.DataFrame
    summary: dict[str, Any]
    probabilities: np.ndarray | None
    folder: Path | None
    table: Table = field(repr=False)
    prepared: Prepared = field(repr=False)

    @property
    def suspects(self) -> pd.DataFrame:
        """The rows whose label is probably wrong (probability above 0.5), worst first."""
        return self.rows[self.rows["error_probability"] > SUSPECT].sort_values("rank")

    @cached_property
    def cleaned(self) -> pd.DataFrame:
        """The table with those labels replaced, and a column ``woodbury_changed`` that says so."""
        return cleaned_frame(self.table, Correction(self.rows))

    def report(self, path: str | Path) -> Path:
        """Write the report as one HTML file that opens offline.

        Args:
            path: where to.

        Returns:
            The path.
        """
        from woodbury.apps.clean.report import write_report

        return write_report(self, Path(path))


def clean(
    table: str | Path | pd.DataFrame,
    *,
    label: str | None = None,
    trusted: str | Path | Sequence[int] | np.ndarray | None = None,
    text: str | Sequence[str] | None = None,
    task: str = "auto",
    model: str = "auto",
    out: str | Path | None = None,
    seed: int = 0,
    budget: str | int = "2GiB",
    resume: bool = False,
    format: str = "auto",
    truth: Sequence[Any] | np.ndarray | None = None,
    progress: bool | ProgressCallback | None = None,
) -> CleanResult:
    """Find the labels of a table that are probably wrong, and suggest better ones.

    A model is fitted to the table; for every row it is computed what the model would predict had
    that row been left out (from one fit and an inverse curvature); rows are ranked by the
    probability that their label is wrong; every row gets a weight, learned by hypergradients; and
    the model is fitted again until nothing changes.

    Args:
        table: path of a CSV, TSV, Parquet or NPZ (``X``, ``y``) file, or a data frame ``[n, ...]``.
        label: the label column; for NPZ the array of labels, ``y`` by default.
        trusted: rows whose label is known to be right: row numbers, a bool array ``[n]``, or a
            file (row numbers, one a line; or a CSV with a column ``row``; or a CSV with a column
            ``trusted`` of true and false).
        text: columns to read as text whatever they look like; others are recognised.
        task: ``"auto"``, ``"classification"`` or ``"regression"``.
        model: ``"auto"``, ``"linear"``, ``"kernel"`` or ``"mlp"``.
        out: folder for ``rows``, ``cleaned``, ``summary.json`` and ``report.html``; nothing is
            written if None.
        seed: of everything that draws; the same seed gives the same answer.
        budget: memory the model may use, such as ``"2GiB"`` or a number of bytes.
        resume: go on with a run in ``out`` that was interrupted; the result is the same.
        format: of the files: ``"auto"`` (that of the table, CSV for a data frame), ``"csv"`` or
            ``"parquet"``.
        truth: the true labels ``[n]``, if they are known, to score the answer.
        progress: True or False to show progress on standard error or not (by default, where that
            is a terminal), or a function of (stage, fraction).

    Returns:
        The :class:`CleanResult`.

    Raises:
        DataError: the table, a column or a setting cannot be used; says which and what to do.
        BudgetError: the budget is too small for the table.

    Cost:
        A few fits of the model; see ``summary["seconds"]``.

    Example:
        >>> import woodbury
        >>> from sklearn.datasets import load_iris
        >>> frame = load_iris(as_frame=True).frame
        >>> frame.loc[3, "target"] = 2  # a wrong label
        >>> found = woodbury.clean(frame, label="target", model="linear")
        >>> int(found.suspects["row"].iloc[0])
        3
    """
    start = time.monotonic()
    settings = Settings.check(
        label=label, text=text, task=task, model=model, seed=seed, budget=budget, format=format
    )
    if isinstance(trusted, str | Path) and not Path(trusted).is_file():
        raise DataError(f"There is no file {trusted} (--trusted). Check the spelling.")
    folder = RunFolder.open(Path(out), resume) if out is not None else None
    forward = progress if callable(progress) else None
    shown = sys.stderr.isatty() if progress is None else progress is True
    with Display(forward=forward, quiet=not shown) as display:
        display("reading the table", 0.0)
        source = read_table(table, label, text=settings.text)
        prepared = prepare(
            source,
            task=task,
            text=settings.text,
            seed=seed,
            budget_bytes=settings.budget_bytes,
            progress=display,
        )
        mask = trusted_mask(trusted, len(source), prepared.labels.present)
        known = _check_truth(truth, prepared)
        if folder is not None:
            folder.begin(settings.as_json(), _source(source, mask))
        try:
            seconds = {"reading and preparing": time.monotonic() - start}
            answer = _run_engine(prepared, settings, mask, folder, display)
            seconds["model"] = time.monotonic() - start - sum(seconds.values())
            display("writing", 0.0)
            result = _assemble(source, prepared, settings, answer, mask, known)
            _write(result, settings, folder, seconds, start)
        except Exception:
            if folder is not None:
                with suppress(OSError):
                    folder.end("failed")
            raise
    return result


def _check_truth(truth: Any, prepared: Prepared) -> np.ndarray | None:
    if truth is None:
        return None
    known = np.asarray(truth)
    n = len(prepared.labels.present)
    if prepared.labels.task != "classification":
        raise DataError("truth scores classification; this table's label is a quantity.")
    if known.shape != (n,):
        raise DataError(f"truth has shape {list(known.shape)}; the table has {n} rows.")
    return known


def _source(table: Table, mask: np.ndarray | None) -> dict[str, Any]:
    trusted = None if mask is None else hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()
    return {"name": table.name, "sha256": table.sha256, "trusted_sha256": trusted}


def _run_engine(
    prepared: Prepared,
    settings: Settings,
    mask: np.ndarray | None,
    folder: RunFolder | None,
    display: Display,
) -> EngineResult:
    from woodbury.apps.clean import engine

    labels = prepared.labels
    keep = labels.present
    return engine.run(
        prepared.X if keep.all() else prepared.X[keep],
        labels.codes[keep],
        task=labels.task,
        n_classes=labels.n_classes,
        model=settings.model,
        seed=settings.seed,
        budget_bytes=settings.budget_bytes,
        trusted=None if mask is None else mask[keep],
        progress=display,
        checkpoint=None if folder is None else folder.checkpoint,
        resume=folder is not None and folder.resumed,
    )


def _assemble(
    table: Table,
    prepared: Prepared,
    settings: Settings,
    answer: EngineResult,
    mask: np.ndarray | None,
    truth: np.ndarray | None,
) -> CleanResult:
    labels = prepared.labels
    rows = build_rows(labels, answer.error_probability, answer.suggested, answer.weight)
    suspects = int((rows["error_probability"] > SUSPECT).sum())
    summary: dict[str, Any] = {
        "woodbury": __version__,
        "table": {
            "name": table.name,
            "path": None if table.path is None else str(table.path),
            "sha256": table.sha256,
            "rows": len(table),
        },
        "label": table.label,
        "task": labels.task,
        "classes": None if labels.classes is None else labels.classes.tolist(),
        "rows_without_label": int((~labels.present).sum()),
        "rows_trusted": 0 if mask is None else int(mask.sum()),
        "suspects": suspects,
        "suspect_share": suspects / max(1, int(labels.present.sum())),
        "expected_wrong_labels": float(np.sum(answer.error_probability)),
        "changed": int(Correction(rows).changed.sum()),
        "preparation": {
            "features": prepared.X.shape[1],
            "scaling": prepared.scaling,
            "reason": prepared.reason,
            "image_shape": prepared.image_shape,
            "columns": prepared.columns,
        },
        "notes": prepared.notes + _doubts(suspects, prepared, table.label),
        "settings": settings.as_json(),
        "certificate": answer.certificate,
        "history": answer.history,
    }
    if truth is not None:
        given = rows["label"].to_numpy()
        suggested = rows["suggested_label"].to_numpy()
        keep = labels.present
        summary |= score(answer.error_probability, suggested[keep], truth[keep], given[keep])
    return CleanResult(rows, plain(summary), answer.probabilities, None, table, prepared)


def _doubts(suspects: int, prepared: Prepared, label: str) -> list[str]:
    """Say so where the answer itself is doubtful."""
    labels = prepared.labels
    share = suspects / max(1, int(labels.present.sum()))
    if share < DOUBTFUL_SHARE:
        return []
    note = (
        f"{share:.0%} of the labels look wrong. Unless you know them to be that bad, it is more "
        f"likely that the other columns say too little about {label!r}: look at the first "
        "suspects only, and do not use the cleaned table."
    )
    if labels.classes is not None and labels.classes.dtype.kind in "iuf":
        note += " If its numbers are a quantity, --task regression treats them as one."
    return [note]


def _write(
    result: CleanResult,
    settings: Settings,
    folder: RunFolder | None,
    seconds: dict[str, float],
    start: float,
) -> None:
    result.summary["seconds"] = seconds
    result.summary["peak_memory_bytes"] = _peak_memory()
    if folder is None:
        seconds["total"] = time.monotonic() - start
        return
    result.folder = folder.path
    wanted = "parquet" if result.table.kind == "parquet" else "csv"
    rows_format = wanted if settings.format == "auto" else settings.format
    cleaned = write_cleaned(result.table, Correction(result.rows), folder.path, settings.format)
    files = {"rows": write_rows(result.rows, folder.path, rows_format), "cleaned": cleaned}
    files |= {"summary": folder.path / "summary.json", "report": folder.path / "report.html"}
    result.summary["files"] = {name: path.name for name, path in files.items()}
    result.summary["replaced_an_earlier_run"] = folder.replaces
    seconds["writing"] = time.monotonic() - start - sum(seconds.values())
    seconds["total"] = time.monotonic() - start
    result.report(files["report"])
    result.summary = plain(result.summary)
    write_json(result.summary, files["summary"])
    folder.end("finished")


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
