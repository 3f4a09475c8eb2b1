"""What an estimator returns: a value, how far off it may be, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from woodbury.spectra.eigenpairs import EigenMethod
    from woodbury.spectra.method import Method

__all__ = ["Estimate"]


@dataclass(frozen=True, eq=False, repr=False)
class Estimate:
    r"""A number (or a vector) known up to a stated error.

    The error has two parts: chance, of which ``standard_error`` is the standard deviation, and
    ``bias``, what no averaging removes (rounding, a quadrature rule of finitely many nodes).

    Attributes:
        value: the estimate: a scalar in float64 (complex128) on the CPU, or ``[n]`` in the dtype
            and on the device of the operator.
        standard_error: of the part that is chance, real, in the shape of the value; 0 where the
            answer is exact.
        bias: how far the rest may be off, real, in the shape of the value.
        freedom: degrees of freedom of Student's distribution for :meth:`interval`, in the shape of
            the value: one less than there are samples, less where a few large ones decide;
            infinite where nothing was drawn.
        samples: what was averaged, ``[m]`` or ``[m, n]``; ``None`` where nothing was drawn.
        products: columns that the operator (or its adjoint) was multiplied by.
        method: what was used.
        skewness: of independent samples, in the shape of the value; ``None`` for leave-one-out
            methods, whose samples are not.
        info: what the method found beside.

    Example:
        >>> import torch
        >>> from woodbury import FunctionOperator
        >>> from woodbury.spectra import Hutchinson, trace
        >>> values = torch.linspace(1.0, 2.0, 1000)
        >>> M = values.diag() + 0.01
        >>> A = FunctionOperator(lambda X: M @ X, (1000, 1000), dtype=M.dtype)
        >>> found = trace(A, Hutchinson(products=20))
        >>> low, high = found.interval(0.95)
        >>> bool(low < 1510 < high), found.products
        (True, 20)
    """

    value: Tensor
    standard_error: Tensor
    bias: Tensor
    freedom: Tensor
    samples: Tensor | None
    products: int
    method: Method | EigenMethod
    skewness: Tensor | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        r"""$\hat x \mp (t\,\text{standard error} + \text{bias})$ with a quantile $t$ of Student's.

        Where samples are independent and skewed (squares are, whose few large values decide), the
        quantiles at the two ends are transformed to suit.

        Args:
            level: probability with which the interval is to hold the truth, between 0 and 1. Entry
                by entry where the value is a vector.

        Returns:
            Both ends, in the shape of the value.

        Raises:
            ArgumentError: ``level`` is not between 0 and 1, or the value is complex (then
                ``standard_error`` is that of the distance in the plane).
        """
        if not 0 < level < 1:
            raise ArgumentError(f"level is {level}; it must be between 0 and 1, like 0.95")
        if self.value.is_complex():
            raise ArgumentError(
                "the value is complex and has no interval; standard_error is that of the distance "
                "in the plane"
            )
        if not bool((self.standard_error > 0).any()):
            return self.value - self.bias, self.value + self.bias
        t = quantile(level, self.freedom)
        up, down = (self._skewed(side * t) * self.standard_error for side in (-1, 1))
        return self.value - down - self.bias, self.value - up + self.bias

    def _skewed(self, t: Tensor) -> Tensor:
        """The quantile of the studentised mean of skewed samples."""
        if self.skewness is None or self.samples is None:
            return t
        a = self.skewness / len(self.samples) ** 0.5
        flat = a.abs() < 1e-6
        a = torch.where(flat, 1, a)
        root = 1 + a * (t - a / 6)
        root = root.sign() * root.abs() ** (1 / 3)
        return torch.where(flat, t, 3 * (root - 1) / a)

    def certificate(self) -> dict[str, Any]:
        """What a reader needs to trust the value, in plain numbers and words (for reports)."""
        found: dict[str, Any] = {
            "method": repr(self.method),
            "products": self.products,
            "standard_error": float(self.standard_error.max()) if self._any() else 0.0,
            "bias": float(self.bias.max()) if self._any() else 0.0,
        }
        if self.value.dim() == 0 and not self.value.is_complex():
            low, high = self.interval()
            found |= {"value": float(self.value), "interval_95": [float(low), float(high)]}
        return found

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the samples and the interval (a scalar), or entries with their intervals.

        Args:
            axes: of matplotlib to draw on; new ones by default.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from woodbury.spectra.plots import plot_estimate

        return plot_estimate(self, axes)

    def _any(self) -> bool:
        return self.value.numel() > 0

    def __repr__(self) -> str:
        if self.value.dim():
            what = f"value=[{self.value.shape[0]}] {self.value.dtype}"
            error = f"standard_error<={self.certificate()['standard_error']:.3g}"
        else:
            what = f"{self.value.item():.8g}"
            error = f"standard_error={self.standard_error.item():.3g}"
        return f"Estimate({what}, {error}, products={self.products}, method={self.method!r})"


def quantile(level: float, freedom: Tensor) -> Tensor:
    """The two-sided quantile of Student's distribution; of the normal one for infinite freedom."""
    from scipy.special import ndtri, stdtrit

    side = (1 + level) / 2
    student = torch.as_tensor(stdtrit(freedom.double().cpu().numpy(), side))
    normal = torch.tensor(ndtri(side), dtype=torch.float64)
    return torch.where(freedom.isinf(), normal.to(freedom), student.to(freedom))


def of_samples(
    samples: Tensor,
    *,
    offset: Tensor | float = 0.0,
    bias: Tensor | float = 0.0,
    products: int,
    method: Method,
    error: Tensor | None = None,
    **info: Any,
) -> Estimate:
    """The mean of samples ``[m]`` or ``[m, n]`` plus what is known.

    Args:
        samples: what is averaged; at least two.
        offset: added to the mean.
        bias: see :class:`Estimate`.
        products: see :class:`Estimate`.
        method: see :class:`Estimate`.
        error: the standard error, where the samples are not independent.
        info: see :class:`Estimate`.
    """
    m = samples.shape[0]
    value = samples.mean(0) + offset
    distances = (samples - samples.mean(0)).abs()
    variance = distances.square().mean(0)
    some = variance > 0
    # The variance of heavy-tailed samples is itself uncertain: by Satterthwaite's rule it is worth
    # as many degrees of freedom as that of normal samples of the same relative variance.
    kurtosis = torch.where(some, distances.pow(4).mean(0) / variance.square(), 3.0)
    freedom = (m - 1) * (2 / (kurtosis - 1)).clamp_max(1)
    skewness = None
    if error is None:
        error = (variance / (m - 1)).sqrt()
        if not samples.is_complex():
            cube = (samples - samples.mean(0)).pow(3).mean(0)
            skewness = torch.where(some, cube / variance**1.5, 0)
    bias = torch.as_tensor(bias, dtype=error.dtype, device=error.device).expand(error.shape).clone()
    return Estimate(value, error, bias, freedom, samples, products, method, skewness, info)


def exactly(
    value: Tensor, method: Method | EigenMethod, products: int = 0, bias: float = 0.0
) -> Estimate:
    """An answer without chance."""
    zero = torch.zeros_like(value.real if value.is_complex() else value)
    return Estimate(value, zero, zero + bias, zero + math.inf, None, products, method)
