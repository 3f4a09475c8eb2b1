"""The method of Gauss and Seidel."""

from __future__ import annotations

from dataclasses import dataclass, field

from woodbury.operators.base import LinearOperator
from woodbury.solvers.sor import Sweep, relaxation, require_sweep, split_products
from woodbury.solvers.stationary import Stationary

__all__ = ["GaussSeidel"]


@dataclass(frozen=True)
class GaussSeidel(Stationary):
    r"""$x \leftarrow x + (D + L)^{-1} (b - A x)$ for $A = L + D + U$.

    Every row is solved for its unknown with the newest values of the others. ``"backward"`` goes
    through the rows from the last to the first, with $(D + U)^{-1}$; ``"symmetric"`` does one after
    the other, with $(D + U)^{-1} D (D + L)^{-1}$, which is hermitian where $A$ is and positive
    definite where moreover the diagonal is positive: it may precondition :class:`CG`.

    It converges for hermitian positive definite and for strictly diagonally dominant matrices; for
    consistently ordered ones twice as fast as :class:`Jacobi`. Elsewhere it may diverge, and says
    so.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 n``.
        sweeps: steps taken where it preconditions.
        sweep: ``"forward"``, ``"backward"`` or ``"symmetric"``.

    Raises:
        SingularError: a diagonal entry is zero; the message names the row.
        NonFiniteError: an entry is NaN or infinite.
        StructureError: a sparse operator is not on the CPU.
        ArgumentError: ``sweep`` or a limit makes no sense.

    Cost: one product and one triangular solve (two for ``"symmetric"``) per step; nothing to
    prepare for sparse operators, ``n`` products and $n^2$ numbers for others (the matrix is
    formed).

    Source: Saad, "Iterative methods for sparse linear systems" (2nd ed.), 4.1.

    Example:
        >>> import torch
        >>> from woodbury import Dense, GaussSeidel, solve
        >>> A = Dense(torch.tensor([[4.0, 1.0], [2.0, 5.0]]))
        >>> solve(A, torch.tensor([5.0, 7.0]), GaussSeidel()).value
        tensor([1.0000, 1.0000])
    """

    sweep: Sweep = field(default="forward", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sweep(self.sweep)

    def _products(self, A: LinearOperator) -> int:
        return split_products(A)

    def _correction(self, A: LinearOperator) -> LinearOperator:
        return relaxation(A, 1.0, self.sweep, "GaussSeidel()")
