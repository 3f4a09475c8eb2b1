"""``woodbury spectrum``: draw the spectral density of a matrix or of a model's curvature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from woodbury.cli.messages import failures_told
from woodbury.errors import WoodburyError

if TYPE_CHECKING:
    from rich.console import Console

    from woodbury.apps.spectrum import SpectrumResult

__all__ = ["spectrum"]

DEFAULT_FOLDER = "woodbury-spectrum"


def spectrum(
    matrix: Annotated[
        Path | None,
        typer.Argument(help="Matrix Market file, .mtx or .mtx.gz.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="Instead of a MATRIX: a function of yours that builds the network. Its module is "
            "imported from the current folder, that is, run.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE.safetensors", help="Weights of the network."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Data of the network: arrays X and y."),
    ] = None,
    criterion: Annotated[
        str, typer.Option(metavar="cross_entropy|mse|bce", help="Loss of the network.")
    ] = "cross_entropy",
    kind: Annotated[
        str,
        typer.Option(
            "--matrix",
            metavar="hessian|gauss-newton|fisher",
            help="Which curvature of the network.",
        ),
    ] = "hessian",
    l2: Annotated[float, typer.Option(help="Regulariser of the network.")] = 0.0,
    dtype: Annotated[
        str,
        typer.Option(metavar="auto|float32|float64", help="Precision; auto: that of the network."),
    ] = "auto",
    gram: Annotated[
        bool, typer.Option("--gram", help="Draw AᵀA of the matrix: squared singular values.")
    ] = False,
    symmetric_part: Annotated[
        bool, typer.Option("--symmetric-part", help="Draw (A + Aᵀ) / 2 of the matrix.")
    ] = False,
    probes: Annotated[int, typer.Option(help="Random vectors.")] = 10,
    steps: Annotated[int, typer.Option(help="Lanczos steps from each.")] = 80,
    seed: Annotated[int, typer.Option(help="Of the random vectors.")] = 0,
    budget: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory that may be used, like 2GiB or 500MB.")
    ] = "2GiB",
    figure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the density into this file, too: .png, .svg or .pdf (needs matplotlib).",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the results.",
            show_default=f"{DEFAULT_FOLDER}/NAME",
        ),
    ] = None,
) -> None:
    """Draw the spectral density of MATRIX, or of the curvature of a network.

    Writes spectrum.html, which opens in any browser, offline, and summary.json with the numbers.
    """
    from rich.console import Console

    name = matrix.name.split(".mtx")[0] if matrix else (model or "").replace(":", "-")
    with failures_told(WoodburyError, stopped="Nothing was written."):
        from woodbury.apps.spectrum import spectrum as job

        result = job(
            matrix,
            model=model,
            weights=weights,
            data=data,
            criterion=criterion,
            kind=kind,
            l2=l2,
            dtype=dtype,
            gram=gram,
            symmetric_part=symmetric_part,
            probes=probes,
            steps=steps,
            seed=seed,
            budget=budget,
            figure=figure,
            out=out or Path(DEFAULT_FOLDER) / name,
            progress=True,
        )
    _summarise(Console(), result)


def _summarise(console: Console, result: SpectrumResult) -> None:
    from rich.table import Table
    from rich.text import Text

    summary = result.summary
    low, high = summary["outermost"]
    ends = (
        f"from {low:.6g} to {high:.6g}"
        if summary["exact"]
        else f"the smallest at most {low:.6g}, the largest at least {high:.6g}"
    )
    console.print(
        Text(f"{summary['size']:,} eigenvalues of {summary['name']}, {ends}."), soft_wrap=True
    )
    shown = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("", "value", "95 % interval"):
        shown.add_column(column, justify="left" if not column else "right")
    for line in summary["quantities"].values():
        within = "exact" if line["exact"] else f"{line['low']:.5g} to {line['high']:.5g}"
        shown.add_row(line["name"], f"{line['value']:.6g}", within)
    console.print(shown)
    for note in summary["notes"]:
        console.print(Text(f"Note: {note}", style="yellow"), highlight=False, soft_wrap=True)
    assert result.folder is not None
    console.print(
        f"Wrote summary.json to {result.folder} in {summary['seconds']:.1f} s "
        f"({summary['products']:,} products).",
        highlight=False,
        soft_wrap=True,
    )
    report = (result.folder / "spectrum.html").resolve()
    console.print(Text.assemble(("Report: ", "bold"), str(report)), highlight=False, soft_wrap=True)
