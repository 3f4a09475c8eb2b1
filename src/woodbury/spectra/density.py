"""``density``: how the eigenvalues are distributed, from a few Lanczos runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.decompositions.lanczos_batch import LanczosBatch, tridiagonal
from woodbury.errors import ArgumentError, ShapeError
from woodbury.spectra.estimate import Estimate, exactly, of_samples
from woodbury.spectra.method import require_square, require_tag, seeded
from woodbury.spectra.slq import SLQ, Progress, eigenvalues_by_products, means, tail

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from woodbury.operators.base import LinearOperator

__all__ = ["SpectralDensity", "density"]


@dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity:
    r"""$\phi(t) = \frac1n \sum_i \delta(t - \lambda_i)$ as nodes and weights.

    Attributes:
        nodes: Ritz values, ``[p, m]``, ascending; or all eigenvalues, ``[1, n]``, where they were
            computed.
        weights: of the nodes, ``[p, m]``; each row sums to 1.
        errors: within this of a node there is an eigenvalue (without reorthogonalisation: to
            rounding), ``[p, m]``.
        n: size of the operator.
        products: columns that the operator was multiplied by.
        method: what was used.
        run: the tridiagonal matrices; ``None`` where all eigenvalues were computed.

    Example:
        >>> import torch
        >>> from woodbury import FunctionOperator
        >>> from woodbury.spectra import SLQ, density
        >>> values = torch.linspace(0, 1, 3000).double()
        >>> A = FunctionOperator(
        ...     lambda X: values[:, None] * X, (3000, 3000), dtype=values.dtype, tags={"symmetric"}
        ... )
        >>> found = density(A, SLQ(probes=10, steps=40))
        >>> found.wasserstein(values) < 0.01
        True
        >>> x, y = found.grid(points=200)
        >>> torch.trapezoid(y, x).round(decimals=3)
        tensor(1., dtype=torch.float64)
    """

    nodes: Tensor
    weights: Tensor
    errors: Tensor
    n: int
    products: int
    method: SLQ
    run: LanczosBatch | None

    @property
    def support(self) -> tuple[float, float]:
        """The outermost nodes, each moved outwards by the least error of a node at its place."""
        low, high = float(self.nodes.min()), float(self.nodes.max())
        near = 1e-4 * (high - low)
        # Copies of an eigenvalue that is known have errors of their own.
        below = float(self.errors[self.nodes <= low + near].min())
        above = float(self.errors[self.nodes >= high - near].min())
        return low - below, high + above

    def smoothing(self) -> float:
        """The standard deviation that :meth:`grid` takes by default: 1 % of the spectral range."""
        low, high = float(self.nodes.min()), float(self.nodes.max())
        return 0.01 * ((high - low) or abs(high) or 1.0)

    def grid(self, points: int = 512, *, smoothing: float | None = None) -> tuple[Tensor, Tensor]:
        r"""The density convolved with a Gaussian of standard deviation ``smoothing``.

        Args:
            points: of the grid, which reaches 4 standard deviations beyond the nodes.
            smoothing: in units of the eigenvalues; default 1 % of the spectral range.

        Returns:
            Places ``[points]`` and values ``[points]`` whose integral is 1, float64.

        Raises:
            ArgumentError: fewer than 2 points, or a smoothing that is not positive.
        """
        sigma = self.smoothing() if smoothing is None else smoothing
        if points < 2 or not sigma > 0:
            raise ArgumentError(
                f"points is {points} and smoothing {sigma}; give at least 2 and more than 0"
            )
        low, high = float(self.nodes.min()), float(self.nodes.max())
        x = torch.linspace(low - 4 * sigma, high + 4 * sigma, points, dtype=torch.float64)
        y = torch.zeros_like(x)
        nodes, weights = self._flat()
        scale = 1 / (sigma * (2 * torch.pi) ** 0.5)
        for t, w in zip(nodes.split(4096), weights.split(4096), strict=True):
            y += torch.exp(-0.5 * ((x[:, None] - t) / sigma).square()) @ w * scale
        return x, y

    def trace(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        r"""$\operatorname{tr} f(A)$ for a function of real numbers, given and returning tensors.

        The bias is an estimate of the quadrature error: it is extrapolated from shorter rules, and
        means something where ``f`` is analytic around the spectrum.
        """
        if self.run is None:
            return exactly(f(self.nodes).sum(), self.method, self.products, self._rounding(f))
        values = means(self.nodes, self.weights, f)
        samples, error = self.n * values, self.n * float(tail(self.run, f, values).mean())
        return of_samples(
            samples, bias=error + self._rounding(f), products=self.products, method=self.method
        )

    def moment(self, power: int) -> Estimate:
        r"""$\frac1n \operatorname{tr} A^k$; without quadrature error for $k < 2m$.

        Raises:
            ArgumentError: ``power`` is negative.
        """
        if power < 0:
            raise ArgumentError(f"power is {power}; it must be 0 or more")

        def f(x: Tensor) -> Tensor:
            return x**power / self.n

        if self.run is None or power >= 2 * min(self.run.sizes):
            return self.trace(f)
        samples = self.n * means(self.nodes, self.weights, f)
        return of_samples(
            samples, bias=self._rounding(f), products=self.products, method=self.method
        )

    def below(self, x: float) -> Estimate:
        r"""How many eigenvalues are at most ``x``.

        The bias is a bound of the quadrature error: at every place, the distribution function of a
        Gauss rule is off by no more than the weight of the neighbouring node (the inequalities of
        Chebyshev, Markov and Stieltjes).
        """
        inside = self.nodes <= x
        samples = self.n * (self.weights * inside).sum(1)
        if self.run is None:
            return exactly(samples[0], self.method, self.products)
        count = inside.sum(1, keepdim=True)
        padded = torch.nn.functional.pad(self.weights, (1, 1))
        beside = torch.maximum(padded.gather(1, count), padded.gather(1, count + 1))
        return of_samples(
            samples,
            bias=self.n * float(beside.mean()),
            products=self.products,
            method=self.method,
        )

    def wasserstein(self, eigenvalues: Tensor) -> float:
        r"""The 1-Wasserstein distance $\int |F(t) - G(t)|\,dt$ to the density of eigenvalues.

        Args:
            eigenvalues: real, ``[k]``, at least one, each of weight $1/k$.

        Returns:
            The distance, in the units of the eigenvalues.

        Raises:
            ShapeError: not ``[k]`` with at least one.
        """
        if eigenvalues.dim() != 1 or len(eigenvalues) == 0:
            raise ShapeError(f"eigenvalues have shape {tuple(eigenvalues.shape)}, expected [k]")
        nodes, weights = self._flat()
        other = eigenvalues.to(nodes)
        places = torch.cat([nodes, other])
        masses = torch.cat([weights, torch.full_like(other, -1 / len(other))])
        places, order = places.sort()
        gap = masses[order].cumsum(0)[:-1].abs()
        return float((gap * places.diff()).sum())

    def plot(
        self, axes: Axes | None = None, *, smoothing: float | None = None, log: bool = True
    ) -> Axes:
        """Draw the smoothed density.

        Args:
            axes: of matplotlib to draw on; new ones by default.
            smoothing: see :meth:`grid`.
            log: whether the density has a logarithmic axis, so that single outliers are seen.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from woodbury.spectra.plots import plot_density

        return plot_density(self, axes, smoothing=smoothing, log=log)

    def _flat(self) -> tuple[Tensor, Tensor]:
        """One measure: the mean of the rules."""
        return self.nodes.flatten(), self.weights.flatten() / len(self.nodes)

    def _rounding(self, f: Callable[[Tensor], Tensor]) -> float:
        sizes = means(self.nodes, self.weights, lambda x: f(x).abs())
        return float(self.n * torch.finfo(torch.float64).eps * sizes.max())

    def __repr__(self) -> str:
        low, high = self.support
        return (
            f"SpectralDensity(n={self.n}, support=[{low:.4g}, {high:.4g}], "
            f"products={self.products}, method={self.method!r})"
        )


def density(
    A: LinearOperator,
    method: SLQ | None = None,
    *,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> SpectralDensity:
    r"""The spectral density of a hermitian operator by stochastic Lanczos quadrature.

    Args:
        A: hermitian operator ``[n, n]``.
        method: default ``SLQ(probes=10, steps=80)``.
        generator: draws the probes; the same numbers every time if not given.
        progress: called as ``progress(products_done, products_in_all)`` after each block.

    Returns:
        A :class:`SpectralDensity`.

    Raises:
        TagError: ``A`` is not tagged hermitian.
        ShapeError: ``A`` is not square, or empty.
        NonFiniteError: a product is NaN or infinite.

    Cost: that of :class:`SLQ`.

    Source: Lin, Saad and Yang, "Approximating spectral densities of large matrices" (2016), section
    3; Ghorbani, Krishnan and Xiao, "An investigation into neural net optimization via Hessian
    eigenvalue density" (2019), algorithm 1.

    Example:
        >>> import torch
        >>> from woodbury import Hessian, Objective
        >>> from woodbury.spectra import SLQ, density
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1)
        ... )
        >>> objective = Objective(model, "mse", (torch.randn(64, 20), torch.randn(64, 1)))
        >>> found = density(Hessian(objective), SLQ(probes=4, steps=20))
        >>> low, high = found.support
        >>> low < 0 < high  # a Hessian is indefinite
        True
    """
    require_square(A, "density()")
    require_tag(A, "hermitian", "density()")
    method = SLQ(probes=10, steps=80) if method is None else method
    n = A.shape[0]
    if n == 0:
        raise ShapeError("the operator is empty: it has no spectrum")
    if not method._spares(n):
        values = eigenvalues_by_products(A).unsqueeze(0)
        if progress is not None:
            progress(n, n)
        equal = torch.full_like(values, 1 / n)
        return SpectralDensity(values, equal, torch.zeros_like(values), n, n, method, None)
    run = method.run(A, seeded(A, generator), progress)
    nodes, vectors = torch.linalg.eigh(tridiagonal(run.diagonal, run.off_diagonal))
    weights, errors = vectors[:, 0].square(), vectors[:, -1].abs() * run.remainder.unsqueeze(1)
    return SpectralDensity(nodes, weights, errors, n, run.products, method, run)
