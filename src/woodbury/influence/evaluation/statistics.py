"""Correlations row by row, and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, ShapeError

__all__ = ["Interval", "bootstrap", "check_level", "pearson", "ranks", "spearman"]


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval.

    Attributes:
        value: of the sample itself.
        low: lower end.
        high: upper end.
        level: share of resamples between the ends.

    Example:
        >>> from woodbury.influence.evaluation import Interval
        >>> print(Interval(0.5, 0.41, 0.6, 0.95))
        0.500 (95 %: 0.410 to 0.600)
    """

    value: float
    low: float
    high: float
    level: float

    def __str__(self) -> str:
        level = f"{100 * self.level:.3g} %"
        return f"{self.value:.3f} ({level}: {self.low:.3f} to {self.high:.3f})"


def ranks(X: Tensor) -> Tensor:
    """Ranks along the last axis, 1 to ``n``; equal values share the mean of theirs."""
    X = X.double().contiguous()
    ordered = X.sort(dim=-1).values
    below = torch.searchsorted(ordered, X)
    upto = torch.searchsorted(ordered, X, right=True)
    return (below + upto + 1).double() / 2


def pearson(X: Tensor, Y: Tensor) -> Tensor:
    """Correlation along the last axis; NaN where a side is constant."""
    if X.shape != Y.shape:
        raise ShapeError(f"correlation of shapes {tuple(X.shape)} and {tuple(Y.shape)}")
    X, Y = X.double(), Y.double()
    x, y = X - X.mean(-1, keepdim=True), Y - Y.mean(-1, keepdim=True)
    # What rounding leaves of a constant is no variation.
    floor = [1e-14 * side.abs().amax(-1) * side.shape[-1] ** 0.5 for side in (X, Y)]
    sizes = [side.norm(dim=-1) for side in (x, y)]
    constant = (sizes[0] <= floor[0]) | (sizes[1] <= floor[1])
    product = (x * y).sum(-1) / (sizes[0] * sizes[1]).clamp_min(1e-300)
    return torch.where(constant, torch.nan, product.clamp(-1, 1))


def spearman(X: Tensor, Y: Tensor) -> Tensor:
    """Correlation of ranks along the last axis; NaN where a side is constant."""
    if X.shape != Y.shape:
        raise ShapeError(f"correlation of shapes {tuple(X.shape)} and {tuple(Y.shape)}")
    return pearson(ranks(X), ranks(Y))


def mean_correlation(
    correlation: Callable[[Tensor, Tensor], Tensor],
    predicted: Tensor,
    measured: Tensor,
    *,
    level: float,
    resamples: int,
    generator: torch.Generator | None,
) -> Interval:
    """The mean over queries of a correlation over subsets, with both drawn again.

    Args:
        correlation: :func:`pearson` or :func:`spearman`.
        predicted: ``[Q, S]``.
        measured: ``[Q, S]``.
        level: as for :func:`bootstrap`.
        resamples: as for :func:`bootstrap`.
        generator: as for :func:`bootstrap`.
    """

    def statistic(subsets: Tensor, queries: Tensor) -> float:
        a, b = (side[queries][:, subsets] for side in (predicted, measured))
        return float(correlation(a, b).nanmean())

    sizes = (measured.shape[1], len(measured))
    return bootstrap(statistic, sizes, level=level, resamples=resamples, generator=generator)


def check_level(level: float, resamples: int) -> None:
    """Raise unless an interval can be made of these."""
    if not 0 < level < 1:
        raise ArgumentError(f"level is {level}; it must be between 0 and 1, for example 0.95")
    if resamples < 2:
        raise ArgumentError(f"resamples is {resamples}; an interval needs many, 1000 or so")


def bootstrap(
    statistic: Callable[..., float],
    sizes: tuple[int, ...],
    *,
    level: float,
    resamples: int,
    generator: torch.Generator | None,
) -> Interval:
    """A percentile interval of a statistic that is a function of rows that were drawn.

    Args:
        statistic: called with index tensors, one for each of ``sizes``.
        sizes: how many units of each kind there are; each kind is drawn with replacement.
        level: share of resamples in the interval.
        resamples: how many.
        generator: draws; the same numbers every time if not given.

    Raises:
        ArgumentError: ``level`` or ``resamples`` makes no sense.
    """
    check_level(level, resamples)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    value = statistic(*(torch.arange(size) for size in sizes))
    found = torch.tensor(
        [
            statistic(*(torch.randint(size, (size,), generator=generator) for size in sizes))
            for _ in range(resamples)
        ],
        dtype=torch.float64,
    )
    found = found[torch.isfinite(found)]
    if not len(found):
        return Interval(value, float("nan"), float("nan"), level)
    tail = (1 - level) / 2
    low, high = torch.quantile(found, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(value, low, high, level)
