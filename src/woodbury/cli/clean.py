"""``woodbury clean``: find the wrong labels of a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from woodbury.cli.messages import failures_told
from woodbury.errors import BudgetError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from woodbury.apps.clean import CleanResult

__all__ = ["clean"]

DEFAULT_FOLDER = "woodbury-report"
SHOWN = 5


def clean(
    table: Annotated[
        Path | None,
        typer.Argument(help="CSV, TSV, Parquet, or NPZ with arrays X and y.", show_default=False),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Column that holds the label (NPZ: the array, or y)."),
    ] = None,
    trusted: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Rows known to be right: row numbers (from 0), one a line; or a CSV with a column "
            "'row' of them, or with a column 'trusted' of true and false for every row.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            help="Column to read as text (may be repeated). others are recognized.",
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(metavar="auto|classification|regression", help="What the label is.")
    ] = "auto",
    model: Annotated[
        str,
        typer.Option(
            metavar="auto|linear|kernel|mlp", help="Model to judge with; auto compares them."
        ),
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the results: new, empty, or of an earlier run, which is replaced.",
            show_default=f"{DEFAULT_FOLDER}/NAME of the table",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that draws.")] = 0,
    budget: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory the model may use, like 2GiB or 500MB.")
    ] = "2GiB",
    format: Annotated[
        str,
        typer.Option(metavar="auto|csv|parquet", help="Of rows and cleaned; auto: as the table."),
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run in the same folder.")
    ] = False,
    demo: Annotated[
        str | None,
        typer.Option(metavar="digits", help="Instead of a TABLE, show it on digits with errors."),
    ] = None,
) -> None:
    """Find the labels of TABLE that are probably wrong, and suggest better ones.

    Writes rows.csv (one line a row: label, suggested_label, error_probability, weight, rank),
    the cleaned table, summary.json and report.html, which opens in any browser, offline.
    """
    from rich.console import Console

    folder = out or Path(DEFAULT_FOLDER) / (demo or (table.stem if table else ""))
    with failures_told(
        (DataError, BudgetError),
        stopped="Add --resume to the same command to go on.",
        remedy="Another --model may do; the table is unchanged.",
    ):
        result = _run(
            table,
            demo,
            label=label,
            trusted=trusted,
            text=text,
            task=task,
            model=model,
            out=folder,
            seed=seed,
            budget=budget,
            format=format,
            resume=resume,
        )
    _summarise(Console(), result)


def _run(table: Path | None, demo: str | None, **options: Any) -> CleanResult:
    if (table is None) == (demo is None):
        raise DataError(
            "Give one table, as in 'woodbury clean TABLE --label COLUMN', or '--demo digits'."
        )
    truth = None
    source: Any = table
    if demo is not None:
        from woodbury.apps.clean.demo import DEMOS, demo_table

        if demo not in DEMOS:
            raise DataError(f"There is no demonstration {demo!r}. There is: {', '.join(DEMOS)}.")
        for name in ("label", "trusted", "text"):
            if options[name]:
                raise DataError(f"--demo brings its own table; leave --{name} away.")
        source, options["label"], truth = demo_table(demo, options["seed"])
        source.attrs["name"] = demo
    from woodbury.apps.clean import clean as job

    return job(source, **options, truth=truth, progress=True)


def _summarise(console: Console, result: CleanResult) -> None:
    from rich.table import Table
    from rich.text import Text

    summary = result.summary
    n = summary["table"]["rows"]
    thing = "label" if summary["task"] == "classification" else "value"
    console.print()
    verdict = Text.assemble(
        f"{summary['suspects']:,} of {n:,} rows have a {thing} in ",
        (summary["label"], "bold"),
        f" that is probably wrong ({summary['suspect_share']:.1%}).",
    )
    console.print(verdict, highlight=False)
    prepared = summary["preparation"]
    model = summary["certificate"].get("model", summary["settings"]["model"])
    console.print(
        f"Judged by the {model} model on {prepared['features']:,} numbers a row, scaled "
        f"{'jointly' if prepared['scaling'] == 'joint' else 'column by column'} "
        f"({prepared['reason']}).",
        highlight=False,
    )
    for note in summary["notes"]:
        console.print(Text(f"Note: {note}", style="yellow"), highlight=False)
    if summary["suspects"]:
        shown = Table(box=None, header_style="dim", pad_edge=False)
        for name in ("row", "label", "suggested", "probably wrong"):
            shown.add_column(name, justify="right" if name in ("row", "probably wrong") else "left")
        for line in result.suspects.head(SHOWN).itertuples():
            shown.add_row(
                str(line.row),
                Text(_short(line.label)),
                Text(_short(line.suggested_label)),
                f"{line.error_probability:.1%}",
            )
        console.print(shown)
    if "average_precision" in summary:
        names = ("average_precision", "auc", "precision", "recall", "expected_calibration_error")
        said = ", ".join(f"{name.replace('_', ' ')} {summary[name]:.4f}" for name in names)
        console.print(f"Against the truth: {said}.", highlight=False, soft_wrap=True)
    if summary["replaced_an_earlier_run"]:
        console.print("The results of an earlier run in this folder were replaced.")
    assert result.folder is not None
    files = [name for key, name in summary["files"].items() if key != "report"]
    console.print(
        f"Wrote {', '.join(files)} to {result.folder} in {summary['seconds']['total']:.1f} s.",
        highlight=False,
        soft_wrap=True,
    )
    report = (result.folder / "report.html").resolve()
    console.print(Text.assemble(("Report: ", "bold"), str(report)), highlight=False, soft_wrap=True)


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else text[:39] + "…"
