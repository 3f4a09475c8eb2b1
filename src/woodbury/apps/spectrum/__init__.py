"""Draw the spectral density of a matrix or of a model's curvature: ``woodbury spectrum``.

Names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from woodbury.apps.spectrum.job import SpectrumResult, spectrum

__all__ = ["SpectrumResult", "spectrum"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from woodbury.apps.spectrum import job
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "woodbury":
            raise
        raise ModuleNotFoundError(
            f"woodbury.apps.spectrum needs the package {error.name!r}. Install what reading files "
            'and writing reports need: pip install "woodbury[app]"',
            name=error.name,
        ) from error
    return getattr(job, name)
