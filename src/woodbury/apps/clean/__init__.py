"""Find the wrong labels of a table: ``woodbury.clean(...)`` and the command ``woodbury clean``.

Names are imported on first use: the numerics do not need what reading tables and reports need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from woodbury.apps.clean.job import CleanResult, clean

__all__ = ["CleanResult", "clean"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from woodbury.apps.clean import job
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "woodbury":
            raise
        raise ModuleNotFoundError(
            f"woodbury.clean needs the package {error.name!r}. Install what reading tables and "
            'writing reports need: pip install "woodbury[app]"',
            name=error.name,
        ) from error
    return getattr(job, name)
