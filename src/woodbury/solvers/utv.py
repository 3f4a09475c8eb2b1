"""Least squares through a UTV factorisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from woodbury.decompositions.meta import utv
from woodbury.errors import ArgumentError
from woodbury.solvers.factored import Factored

if TYPE_CHECKING:
    import torch

    from woodbury.decompositions.meta import MetaFactor
    from woodbury.operators.base import LinearOperator

__all__ = ["UTV"]


@dataclass(frozen=True)
class UTV(Factored):
    r"""Least squares through a randomised UTV factorisation.

    $x = V T^+ U^H b$ with orthonormal $U$ and $V$ and a triangular $T$ that reveals the rank
    (:func:`~woodbury.decompositions.utv`): nearly as good as a truncated SVD, by QR factorisations.

    The status is ``converged`` where the residual vanishes, ``least_squares`` where $A^H (b - A x)$
    does, both to the square root of the machine epsilon: so it is where ``A`` has no more than the
    rank. Elsewhere it is ``completed``: read the residual, and ``info["normal_residual"]``.

    Args:
        rank: of the sketch, 1 to ``min(m, n)``.
        rcond: singular values of the approximation up to ``rcond`` times the largest count as zero;
            default ``max(m, n)`` times the machine epsilon.
        seed: of the draw.
        power: power iterations of the range finder.

    Raises:
        RankError: ``rank`` is not between 1 and ``min(m, n)``.
        NonFiniteError: a product is NaN or infinite.
        ArgumentError: ``rcond`` is not in [0, 1), or ``power`` is negative.

    Cost: ``(2 power + 2) rank`` products with ``A`` and its adjoint, $O((m + n) k^2)$
    multiplications, memory of four blocks to prepare; then $(m + n) k$ multiplications and two
    products a column.

    Source: Gopal and Martinsson, "The powerURV algorithm for computing rank-revealing full
    factorizations" (2018); Karpowicz, "Meta-factorization" (2021).

    Example:
        >>> import torch
        >>> from woodbury import UTV, Diagonal, solve
        >>> A = Diagonal(torch.tensor([4.0, 2.0, 0.0], dtype=torch.float64))
        >>> solve(A, torch.ones(3).double(), UTV(rank=2)).value.round(decimals=4)
        tensor([0.2500, 0.5000, 0.0000], dtype=torch.float64)
    """

    power: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power < 0:
            raise ArgumentError(f"power is {self.power}; it must be at least 0")

    def _factorise(self, A: LinearOperator, generator: torch.Generator) -> MetaFactor:
        return utv(A, self.rank, power=self.power, generator=generator)
