"""What every command says when it does not end well, and the exit code it ends with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from woodbury.errors import WoodburyError

__all__ = ["failures_told"]

MISTAKE = 2
INTERRUPTED = 130


@contextmanager
def failures_told(
    mistakes: type[Exception] | tuple[type[Exception], ...], *, stopped: str, remedy: str = ""
) -> Iterator[None]:
    """Turn what is raised inside into a line on standard error and an exit code.

    Args:
        mistakes: errors that are the user's: exit code 2.
        stopped: what to do after Ctrl-C.
        remedy: what may help where another error of woodbury is met.
    """
    try:
        yield
    except mistakes as error:
        _say("Error", str(error))
        raise typer.Exit(MISTAKE) from None
    except KeyboardInterrupt:
        _say("Stopped", stopped)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if os.environ.get("WOODBURY_DEBUG"):
            raise
        kind = "Out of memory" if isinstance(error, MemoryError) else "Failed"
        said = " ".join(str(error).split())[:400] or "no message"
        _say(kind, f"{type(error).__name__}: {said}")
        if remedy and isinstance(error, WoodburyError):
            _say("", remedy)
        _say("", "Set WOODBURY_DEBUG=1 for the traceback to report.")
        raise typer.Exit(1) from None


def _say(kind: str, text: str) -> None:
    """Print a message as it is: no markup in it, no line broken, so that it can be copied."""
    from rich.console import Console
    from rich.text import Text

    line = Text(f"{kind}: ", style="bold red") if kind else Text()
    Console(stderr=True).print(line.append(text, style="default"), soft_wrap=True, highlight=False)
