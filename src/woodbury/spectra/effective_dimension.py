"""``effective_dimension``: how many directions stand out above a damping."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, NotPositiveDefiniteError
from woodbury.spectra.enclosure import enclosed
from woodbury.spectra.estimate import Estimate, exactly
from woodbury.spectra.method import require_square, require_tag, seeded
from woodbury.spectra.slq import SLQ, eigenvalues_by_products

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["effective_dimension"]


def effective_dimension(
    A: LinearOperator,
    damping: float,
    method: SLQ | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""$d(\lambda) = \operatorname{tr}\big(A (A + \lambda I)^{-1}\big)$, between 0 and the rank.

    The number of parameters that the data determines at that damping; of a kernel matrix, the
    degrees of freedom of ridge regression. The ``bias`` encloses the quadrature error: 0 is a lower
    bound of the spectrum, so that the rules of Gauss and Gauss-Radau have the truth between them.

    Args:
        A: positive semidefinite operator ``[n, n]``.
        damping: $\lambda > 0$.
        method: default ``SLQ()``.
        generator: draws the probes; the same numbers every time if not given.

    Returns:
        An :class:`Estimate`.

    Raises:
        TagError: ``A`` is not tagged positive semidefinite.
        ArgumentError: ``damping`` is not positive.
        NotPositiveDefiniteError: a negative eigenvalue was found beyond rounding.
        NonFiniteError: a product is NaN or infinite.

    Cost: that of :class:`SLQ`.

    Source: Zhang, "Learning bounds for kernel regression using effective data dimensionality"
    (2005); Golub and Meurant, "Matrices, Moments and Quadrature" (2010), theorem 6.4.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.spectra import effective_dimension
        >>> A = Diagonal(torch.tensor([1.0, 1.0, 0.0]), tags={"positive_semidefinite"})
        >>> effective_dimension(A, 1.0).value
        tensor(1., dtype=torch.float64)
    """
    require_square(A, "effective_dimension()")
    require_tag(A, "positive_semidefinite", "effective_dimension()")
    if not damping > 0:
        raise ArgumentError(f"damping is {damping}; it must be positive")
    method = SLQ() if method is None else method

    def f(x: Tensor) -> Tensor:
        return x / (x + damping)

    n = A.shape[0]
    if not method._spares(n):
        values = eigenvalues_by_products(A)
        noise = _noise(A, values)
        _require_semidefinite(values, noise)
        values = values.clamp_min(0)
        return exactly(f(values).sum(), method, n, n * noise / damping)
    run = method.run(A, seeded(A, generator))
    rule = run.quadrature()
    noise = _noise(A, rule[0])
    _require_semidefinite(rule[0], noise)
    # Rounding makes zeros a little negative, so that the bound is a little lower.
    return enclosed(run, f, n, method, rule, lower=-min(2 * noise, damping / 2))


def _noise(A: LinearOperator, values: Tensor) -> float:
    """How far below zero rounding may push the eigenvalue 0."""
    return 100 * torch.finfo(A.dtype).eps * float(values.abs().max()) + 1e-300


def _require_semidefinite(values: Tensor, noise: float) -> None:
    low = float(values.min())
    if low < -noise:
        raise NotPositiveDefiniteError(
            f"the eigenvalue {low:.3g} was found: A is not positive semidefinite, and the "
            "effective dimension means nothing"
        )
