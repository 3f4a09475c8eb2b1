"""Symmetric successive over-relaxation."""

from __future__ import annotations

from dataclasses import dataclass, field

from woodbury.operators.base import LinearOperator
from woodbury.solvers.sor import relaxation, require_omega, split_products
from woodbury.solvers.stationary import Stationary

__all__ = ["SSOR"]


@dataclass(frozen=True)
class SSOR(Stationary):
    r"""$x \leftarrow x + M (b - A x)$: one sweep of :class:`SOR` forward, then one backward.

    $$M = \frac{2 - \omega}{\omega} \left(\frac{D}{\omega} + U\right)^{-1} D
    \left(\frac{D}{\omega} + L\right)^{-1}, \qquad A = L + D + U.$$

    $M$ is hermitian where $A$ is, and positive definite where moreover the diagonal is positive;
    the eigenvalues of $M A$ then lie in $(0, 1]$ for positive definite $A$, so that it converges
    for every $0 < \omega < 2$ and preconditions :class:`CG` and :class:`Chebyshev` (bounds up to
    1). With $\omega = 1$ it is the symmetric method of Gauss and Seidel.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 n``.
        sweeps: steps taken where it preconditions.
        omega: $0 < \omega < 2$.

    Raises:
        SingularError: a diagonal entry is zero; the message names the row.
        NonFiniteError: an entry is NaN or infinite.
        StructureError: a sparse operator is not on the CPU.
        ArgumentError: ``omega`` or a limit makes no sense.

    Cost: one product and two triangular solves per step; nothing to prepare for sparse operators,
    ``n`` products and $n^2$ numbers for others (the matrix is formed).

    Source: Saad, "Iterative methods for sparse linear systems" (2nd ed.), 4.1 and 10.2.

    Example:
        >>> import torch
        >>> from woodbury import CG, Dense, SSOR, solve
        >>> A = Dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), tags={"positive_definite"})
        >>> b = torch.tensor([5.0, 4.0])
        >>> solve(A, b, SSOR(omega=1.1)).value
        tensor([1.0000, 1.0000])
        >>> solve(A, b, CG(preconditioner=SSOR(omega=1.1))).value
        tensor([1.0000, 1.0000])
    """

    omega: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_omega(self.omega)

    def _products(self, A: LinearOperator) -> int:
        return split_products(A)

    def _correction(self, A: LinearOperator) -> LinearOperator:
        return relaxation(A, self.omega, "symmetric", "SSOR()")
