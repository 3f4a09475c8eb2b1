"""The command line: arguments in, messages out; the work is done by ``woodbury.apps``."""

from __future__ import annotations

import typer

from woodbury import __version__
from woodbury.cli.attribute import attribute
from woodbury.cli.clean import clean
from woodbury.cli.spectrum import spectrum

__all__ = ["app"]

app = typer.Typer(
    name="woodbury",
    help="Inverses nobody can form, and what they are good for.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("attribute")(attribute)
app.command("clean")(clean)
app.command("spectrum")(spectrum)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"woodbury {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Inverses nobody can form, and what they are good for."""
