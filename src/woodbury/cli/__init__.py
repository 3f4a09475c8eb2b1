"""The command ``woodbury``."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]

NEEDED = ("typer", "rich", "jinja2", "pandas", "pyarrow", "sklearn")


def main() -> None:
    """Run the command; exit code 0 is success, 2 a mistake in what was asked for."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"The command woodbury needs {', '.join(missing)}, not installed here. Install it "
            'with: pip install "woodbury[app]"',
            file=sys.stderr,
        )
        raise SystemExit(2)
    from woodbury.cli.app import app

    app()
