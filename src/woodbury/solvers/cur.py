"""Least squares through a CUR factorisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from woodbury.decompositions.cur import CURCore, cur
from woodbury.errors import ArgumentError
from woodbury.solvers.factored import Factored

if TYPE_CHECKING:
    import torch

    from woodbury.decompositions.meta import MetaFactor
    from woodbury.operators.base import LinearOperator

__all__ = ["CUR"]


@dataclass(frozen=True)
class CUR(Factored):
    r"""Least squares through some columns and rows of the operator.

    $x = (C G R)^+ b$ with columns $C$ and rows $R$ of ``A`` chosen by the pivots of a sketch
    (:func:`~woodbury.decompositions.cur`), which are in ``state.factor.columns`` and
    ``state.factor.rows``.

    The status is ``converged`` where the residual vanishes, ``least_squares`` where $A^H (b - A x)$
    does, both to the square root of the machine epsilon: so it is where ``A`` has no more than the
    rank. Elsewhere it is ``completed``: read the residual, and ``info["normal_residual"]``.

    Args:
        rank: of the sketch, 1 to ``min(m, n)``.
        rcond: singular values of the approximation up to ``rcond`` times the largest count as zero;
            default ``max(m, n)`` times the machine epsilon.
        seed: of the draw.
        core: ``"projection"``, $G = C^+ A R^+$, or ``"intersection"``, the inverse of what $C$ and
            $R$ have in common, which needs no further product.
        oversampling: rows of the sketch beyond ``rank``.

    Raises:
        RankError: ``rank`` is not between 1 and ``min(m, n)``.
        NonFiniteError: a product is NaN or infinite.
        ArgumentError: ``rcond`` is not in [0, 1), ``core`` is unknown, or ``oversampling`` is
            negative.

    Cost: ``2 rank + oversampling`` adjoint products and ``rank`` products (twice for the projection
    core), $O((m + n) k^2)$ multiplications, memory of six blocks to prepare; then $(m + n) k$
    multiplications and two products a column.

    Source: Dong and Martinsson, "Simpler is better" (2023); Karpowicz, "Meta-factorization" (2021).

    Example:
        >>> import torch
        >>> from woodbury import CUR, LowRank, solve
        >>> A = LowRank(torch.eye(6, 2).double(), V=torch.eye(4, 2).double())
        >>> solution = solve(A, torch.ones(6).double(), CUR(rank=2))
        >>> solution.value.round(decimals=4), solution.status.name
        (tensor([1., 1., 0., 0.], dtype=torch.float64), 'least_squares')
    """

    core: CURCore = "projection"
    oversampling: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.core not in get_args(CURCore):
            raise ArgumentError(f"core is {self.core!r}; it must be one of {get_args(CURCore)}")
        if self.oversampling < 0:
            raise ArgumentError(f"oversampling is {self.oversampling}; it must be at least 0")

    def _factorise(self, A: LinearOperator, generator: torch.Generator) -> MetaFactor:
        return cur(
            A, self.rank, core=self.core, oversampling=self.oversampling, generator=generator
        )
