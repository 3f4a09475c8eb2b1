"""Least squares through the generalised Nystrom approximation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from woodbury.decompositions.meta import generalized_nystrom
from woodbury.errors import ArgumentError
from woodbury.solvers.factored import Factored

if TYPE_CHECKING:
    import torch

    from woodbury.decompositions.meta import MetaFactor
    from woodbury.operators.base import LinearOperator

__all__ = ["GeneralizedNystrom"]


@dataclass(frozen=True)
class GeneralizedNystrom(Factored):
    r"""Least squares through the generalised Nystrom approximation of any operator.

    $x = \hat A^+ b$ with $\hat A = (A D)(B^H A D)^+_\epsilon (B^H A)$ for Gaussian $D$ and $B$
    (:func:`~woodbury.decompositions.generalized_nystrom`), which takes one pass over ``A`` and its
    adjoint.

    The status is ``converged`` where the residual vanishes, ``least_squares`` where $A^H (b - A x)$
    does, both to the square root of the machine epsilon: so it is where ``A`` has no more than the
    rank. Elsewhere it is ``completed``: read the residual, and ``info["normal_residual"]``.

    Args:
        rank: of the sketch, 1 to ``min(m, n)``.
        rcond: singular values of the approximation up to ``rcond`` times the largest count as zero;
            default ``max(m, n)`` times the machine epsilon.
        seed: of the draw.
        oversampling: columns of $B$ beyond ``rank``; by default half of it, rounded up.

    Raises:
        RankError: ``rank`` is not between 1 and ``min(m, n)``.
        NonFiniteError: a product is NaN or infinite.
        ArgumentError: ``rcond`` is not in [0, 1), or ``oversampling`` is negative.

    Cost: ``rank`` products and ``rank + oversampling`` adjoint ones, $O((m + n) k^2)$
    multiplications, memory of six blocks to prepare; then $(m + n) k$ multiplications and two
    products a column.

    Source: Nakatsukasa, "Fast and stable randomized low-rank matrix approximation" (2020).

    Example:
        >>> import torch
        >>> from woodbury import GeneralizedNystrom, LowRank, solve
        >>> A = LowRank(torch.eye(6, 2).double(), V=torch.ones(4, 2).double())  # of rank 1
        >>> solution = solve(A, torch.ones(6).double(), GeneralizedNystrom(rank=2))
        >>> solution.status.name, solution.info["rank"]
        ('least_squares', 1)
    """

    oversampling: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.oversampling is not None and self.oversampling < 0:
            raise ArgumentError(f"oversampling is {self.oversampling}; it must be at least 0")

    def _factorise(self, A: LinearOperator, generator: torch.Generator) -> MetaFactor:
        return generalized_nystrom(
            A, self.rank, oversampling=self.oversampling, generator=generator
        )
