"""``woodbury attribute``: which training sequences are behind what a model of text says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from woodbury.cli.messages import failures_told
from woodbury.errors import BudgetError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from woodbury.apps.attribute import AttributeResult

__all__ = ["attribute"]


def attribute(
    model: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder of the model and its tokenizer, as save_pretrained() of transformers "
            "writes it.",
        ),
    ],
    train: Annotated[
        Path, typer.Option(metavar="FILE.jsonl", help="What it was trained on, one object a line.")
    ],
    query: Annotated[
        Path, typer.Option(metavar="FILE.jsonl", help="What is asked about, in the same form.")
    ],
    text: Annotated[
        str,
        typer.Option(help="Field of the text. Rows may have prompt and completion instead."),
    ] = "text",
    label: Annotated[str, typer.Option(help="Field of the class, for classifiers.")] = "label",
    task: Annotated[
        str | None,
        typer.Option(
            metavar="causal|classifier|masked",
            help="What the model is.",
            show_default="what its config says",
        ),
    ] = None,
    matrix: Annotated[
        str,
        typer.Option(
            metavar="ekfac|kfac|diagonal|identity|gauss_newton", help="Curvature to divide by."
        ),
    ] = "ekfac",
    layers: Annotated[
        str,
        typer.Option(
            metavar="linear|mlp|all",
            help="Whose parameters count: of linear layers, of those outside of attention, or all.",
        ),
    ] = "linear",
    damping: Annotated[
        float | None,
        typer.Option(
            help="Added to the curvature, in its unit.",
            show_default="a tenth of the mean eigenvalue, for each layer",
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Relative error that faster scores may cost; 0 for exact ones.")
    ] = 0.01,
    query_rank: Annotated[
        int | None,
        typer.Option(
            help="Keep queries as matrices of this rank for each layer (32 in the paper): for many "
            "long queries. What it costs is measured and in the report.",
            show_default="exact",
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            help="Score only so many rows for each query, the most similar in words.",
            show_default="all",
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Rows of a list in the report.")] = 10,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a row at most.", show_default="what the model takes"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 8,
    budget: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Memory for scores, gradients and solves, like 4GiB or 500MB; the model and what "
            "a batch takes in it come on top.",
        ),
    ] = "4GiB",
    seed: Annotated[int, typer.Option(help="Of sampled labels and masked tokens.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")] = Path(
        "woodbury-attribution"
    ),
) -> None:
    """Rank training sequences by their influence on each query.

    Writes scores.parquet, summary.json and attribution.html, which opens in any browser, offline,
    and shows the rows that speak for and against each query with their tokens coloured. A run that
    was stopped goes on where it was when the command is given again.
    """
    from rich.console import Console

    console = Console()
    with failures_told(
        (DataError, BudgetError),
        stopped=f"Give the command again to go on; what is done is in {out / 'work'}.",
        remedy="If the model, the data or the settings changed, choose another --out.",
    ):
        from woodbury.apps.attribute import attribute as job

        result = job(
            model,
            train,
            query,
            text=text,
            label=label,
            task=task,
            matrix=matrix,
            layers=layers,
            damping=damping,
            tolerance=tolerance,
            query_rank=query_rank,
            keep=keep,
            top=top,
            max_length=max_length,
            batch_size=batch_size,
            budget=budget,
            seed=seed,
            out=out,
            say=lambda words: console.print(words, highlight=False, soft_wrap=True, markup=False),
            progress=True,
        )
    _summarise(console, result)


def _summarise(console: Console, result: AttributeResult, shown: int = 3) -> None:
    from rich.table import Table
    from rich.text import Text

    summary = result.summary
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("query line", "loss", "speaks for it: training line (score)"):
        table.add_column(column, justify="right" if column == "loss" else "left")
    for q, lines in result.table.groupby("query", sort=True):
        strongest = lines[lines["score"] < 0].head(shown)
        rows = ", ".join(f"{r.line} ({r.score:.3g})" for r in strongest.itertuples())
        loss = summary["query_losses"][q]
        table.add_row(str(lines["query_line"].iloc[0]), f"{loss:.4g}", rows or "none")
    console.print(table)
    for note in summary["notes"]:
        console.print(Text(f"Note: {note}", style="yellow"), highlight=False, soft_wrap=True)
    assert result.folder is not None
    console.print(
        f"Wrote scores.parquet and summary.json to {result.folder} in {summary['seconds']:.1f} s.",
        highlight=False,
        soft_wrap=True,
    )
    report = (result.folder / "attribution.html").resolve()
    console.print(Text.assemble(("Report: ", "bold"), str(report)), highlight=False, soft_wrap=True)
