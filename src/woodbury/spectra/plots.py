"""Plots of what the room returns, with matplotlib where it is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from woodbury.spectra.density import SpectralDensity
    from woodbury.spectra.eigenpairs import Eigenpairs
    from woodbury.spectra.estimate import Estimate

__all__ = ["plot_density", "plot_eigenpairs", "plot_estimate"]

_COLOR = "#1d6b57"


def new_axes(axes: Axes | None) -> Axes:
    """The axes given, or new ones."""
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'plot() needs matplotlib. Install it with: pip install "woodbury[plot]"',
            name=error.name,
        ) from error
    return pyplot.subplots()[1]


def plot_density(
    found: SpectralDensity, axes: Axes | None, *, smoothing: float | None, log: bool
) -> Axes:
    """The smoothed density over the eigenvalues."""
    axes = new_axes(axes)
    sigma = found.smoothing() if smoothing is None else smoothing
    x, y = found.grid(1024, smoothing=sigma)
    axes.plot(x.numpy(), y.numpy(), color=_COLOR)
    if log:
        # One eigenvalue of n, smoothed, is the least that is worth showing.
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.1 / (found.n * sigma * (2 * torch.pi) ** 0.5))
    axes.set_xlabel(f"eigenvalue (smoothed with a standard deviation of {sigma:.2g})")
    axes.set_ylabel("density")
    axes.set_title(f"{found.n:,} eigenvalues, {found.products:,} products")
    return axes


def plot_estimate(found: Estimate, axes: Axes | None) -> Axes:
    """Samples in their order with the interval, or entries with theirs."""
    axes = new_axes(axes)
    low, high = (end.cpu().numpy() for end in found.interval())
    value = found.value.cpu()
    if value.dim():
        place = torch.arange(len(value)).numpy()
        axes.fill_between(place, low, high, color=_COLOR, alpha=0.25, label="95 % interval")
        axes.plot(place, value.numpy(), color=_COLOR, label="estimate")
        axes.set_xlabel("entry")
    else:
        axes.axhspan(float(low), float(high), color=_COLOR, alpha=0.25, label="95 % interval")
        axes.axhline(float(value), color=_COLOR, label="estimate")
        axes.set_xlabel("probe")
    axes.set_title(f"{type(found.method).__name__}, {found.products:,} products")
    axes.legend()
    return axes


def plot_eigenpairs(found: Eigenpairs, axes: Axes | None) -> Axes:
    """Eigenvalues with their residuals as error bars."""
    axes = new_axes(axes)
    style: dict[str, Any] = {"fmt": "o", "color": _COLOR, "capsize": 3}
    axes.errorbar(range(len(found.values)), found.values.cpu(), yerr=found.residuals, **style)
    axes.set_xlabel("index")
    axes.set_ylabel("eigenvalue, with its residual")
    axes.set_title(f"{found.status.name}, {found.products:,} products")
    return axes
