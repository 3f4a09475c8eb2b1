"""Jacobi's method, and its diagonal as a preconditioner."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from woodbury.errors import ArgumentError
from woodbury.operators.base import LinearOperator
from woodbury.operators.diagonal import Diagonal
from woodbury.operators.scaled import Scaled
from woodbury.operators.sum import Sum
from woodbury.solvers.stationary import Stationary
from woodbury.solvers.triangular import require_nonzero

__all__ = ["Jacobi", "hook_products"]


@dataclass(frozen=True)
class Jacobi(Stationary):
    r"""$x \leftarrow x + \omega D^{-1} (b - A x)$ with the diagonal $D$ of $A$.

    It converges from every start exactly where the spectral radius of $I - \omega D^{-1}A$ is below
    1: for strictly diagonally dominant matrices with $0 < \omega \le 1$, and for hermitian positive
    definite ones with $0 < \omega < 2 / \lambda_{max}(D^{-1}A)$. The status is ``diverged`` where
    it does not; the iterate of smallest residual is then returned.

    As ``CG(preconditioner=Jacobi())`` it is ``sweeps`` steps from zero: one is $\omega D^{-1}$,
    positive definite where the diagonal is positive.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 n``.
        sweeps: steps taken where it preconditions.
        omega: the damping $\omega > 0$.

    Raises:
        SingularError: a diagonal entry is zero; the message names the row.
        NonFiniteError: a diagonal entry is NaN or infinite.
        ArgumentError: ``omega`` is not positive, or a limit makes no sense.

    Cost: one product per step, and one more to start from ``x0``. The diagonal is free where the
    structure gives it and costs ``n`` products in blocks of 64 MiB elsewhere. Memory of 4 blocks
    ``[n, k]``.

    Source: Saad, "Iterative methods for sparse linear systems" (2nd ed.), 4.1.

    Example:
        >>> import torch
        >>> from woodbury import Dense, Jacobi, solve
        >>> A = Dense(torch.tensor([[4.0, 1.0], [2.0, 5.0]]))
        >>> solve(A, torch.tensor([5.0, 7.0]), Jacobi()).value
        tensor([1.0000, 1.0000])
    """

    omega: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.omega < math.inf:
            raise ArgumentError(f"omega is {self.omega}; it must be a positive number")

    def _products(self, A: LinearOperator) -> int:
        return hook_products(A, "_diagonal")

    def _correction(self, A: LinearOperator) -> LinearOperator:
        diagonal = A.diagonal().detach()
        require_nonzero(diagonal, "Jacobi()")
        tags = {"diagonal"}
        if not diagonal.is_complex() or bool((diagonal.imag == 0).all()):
            tags.add("hermitian")
            if bool((torch.real(diagonal) > 0).all()):
                tags.add("positive_definite")
        return Diagonal._derived(self.omega / diagonal, tags, A.space)


def hook_products(A: LinearOperator, hook: str) -> int:
    """Columns that ``_diagonal`` or ``_columns`` multiply by: none where the structure gives it."""
    if isinstance(A, Sum):
        return max(hook_products(term, hook) for term in A.terms)
    if isinstance(A, Scaled):
        return hook_products(A.operator, hook)
    return A.shape[1] if getattr(type(A), hook) is getattr(LinearOperator, hook) else 0
