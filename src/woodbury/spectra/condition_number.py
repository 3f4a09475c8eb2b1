"""``condition_number``: the ratio of the largest to the smallest singular value."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from woodbury.errors import ShapeError, SingularError
from woodbury.spectra.eigenpairs import EigenMethod, Eigenpairs, eigenpairs
from woodbury.spectra.estimate import Estimate, exactly
from woodbury.spectra.frobenius import gram_operator
from woodbury.spectra.method import Exact
from woodbury.spectra.thick_restart import ThickRestartLanczos

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["condition_number"]


def condition_number(
    A: LinearOperator,
    method: EigenMethod | None = None,
    *,
    inverse: LinearOperator | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""$\kappa(A) = \sigma_{max}(A) / \sigma_{min}(A)$.

    From the ends of the spectrum of ``A`` where it is positive semidefinite, otherwise from those
    of $A^H A$, whose condition number is the square: beyond $10^7$ in float64 ($10^3$ in float32)
    nothing is left of it then. The smallest eigenvalue is what costs. An operator for the inverse,
    for example ``woodbury.inverse(A, Cholesky())``, makes it a largest one.

    Args:
        A: operator ``[m, n]`` with ``m >= n``.
        method: of :func:`eigenpairs` for the smallest eigenvalue (and without ``inverse`` only);
            default ``ThickRestartLanczos()``, for a preconditioner :class:`LOBPCG`.
        inverse: operator for $A^{-1}$.
        generator: draws the first vectors; the same numbers every time if not given.

    Returns:
        An :class:`Estimate` without chance. Its ``bias`` is from the residuals of both eigenpairs,
        within which there is an eigenvalue; they are in ``info["largest"]`` and
        ``info["smallest"]``, of ``A``, $A^H A$ or the inverse.

    Raises:
        EigenError: an end of the spectrum did not converge.
        SingularError: the smallest eigenvalue is zero to working precision.
        ShapeError: there are fewer rows than columns, or the inverse has another shape.
        StructureError: $A^H A$ is needed, and there is no adjoint product.
        NonFiniteError: a product is NaN or infinite.

    Cost: the products of two eigenpairs, counted twice for $A^H A$ (those of the inverse are not
    counted).

    Source: Golub and Van Loan, "Matrix Computations" (4th ed.), 2.6.2; for the bounds 8.1.1.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.spectra import condition_number
        >>> A = Diagonal(torch.linspace(1, 50, 400).double(), tags={"positive_definite"})
        >>> condition_number(A).value.round(decimals=6)
        tensor(50., dtype=torch.float64)
    """
    rows, n = A.shape
    if rows < n or n == 0:
        raise ShapeError(f"the operator is {A.shape}: give one with at least as many rows, or A.H")
    if inverse is not None and inverse.shape != (n, rows):
        raise ShapeError(f"the inverse has shape {inverse.shape}, expected {(n, rows)}")
    if "unitary" in A.tags:
        return exactly(torch.ones((), dtype=torch.float64), Exact())
    squared = "positive_semidefinite" not in A.tags
    B = gram_operator(A) if squared else A
    top = eigenpairs(B, 1, "largest", ThickRestartLanczos(), generator=generator)
    products = top.products
    if inverse is None:
        method = ThickRestartLanczos() if method is None else method
        bottom = eigenpairs(B, 1, "smallest", method, generator=generator)
        products += bottom.products
        low, high = _within(bottom)
    else:
        # The singular values of the adjoint are the same, and its Gram operator is square of n.
        bottom = eigenpairs(
            gram_operator(inverse.H) if squared else inverse,
            1,
            "largest",
            ThickRestartLanczos(),
            generator=generator,
        )
        high, low = (1 / end for end in _within(bottom))
    floor = torch.finfo(A.dtype).eps * float(top.values[0])
    if high <= 0 or (low + high) / 2 <= floor:
        raise SingularError(
            f"the smallest eigenvalue found is {(low + high) / 2:.3g} beside {top.values[0]:.3g}: "
            "the operator is singular to working precision; add damping"
        )
    value = float(top.values[0]) / ((low + high) / 2)
    least = _within(top)[0] / high
    most = _within(top)[1] / low if low > 0 else math.inf
    if squared:
        value, least, most = math.sqrt(value), math.sqrt(max(0.0, least)), math.sqrt(most)
    bias = max(value - least, most - value)
    found = exactly(torch.tensor(value, dtype=torch.float64), bottom.method, products, bias)
    info = {"largest": top, "smallest": bottom}
    return replace(found, products=products * (2 if squared else 1), info=info)


def _within(found: Eigenpairs) -> tuple[float, float]:
    """Where the eigenvalue of the only pair is."""
    value, residual = float(found.values[0]), float(found.residuals[0])
    return value - residual, value + residual
