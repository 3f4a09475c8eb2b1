"""Successive over-relaxation, forward or backward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from woodbury.errors import ArgumentError
from woodbury.operators.base import LinearOperator
from woodbury.operators.sparse import Sparse
from woodbury.solvers.stationary import Stationary
from woodbury.solvers.triangular import TriangularInverse, parts_of

__all__ = ["SOR", "Sweep", "relaxation", "require_omega", "require_sweep", "split_products"]

Sweep = Literal["forward", "backward", "symmetric"]


@dataclass(frozen=True)
class SOR(Stationary):
    r"""$x \leftarrow x + (D/\omega + L)^{-1} (b - A x)$ for $A = L + D + U$.

    ``"backward"`` takes $U$ in place of $L$. For hermitian positive definite $A$ it converges for
    every $0 < \omega < 2$ (Ostrowski and Reich); where, moreover, $A$ is consistently ordered and
    $\mu$ is the spectral radius of Jacobi's method, the best $\omega = 2 / (1 + \sqrt{1 - \mu^2})$
    gives the spectral radius $\omega - 1$ (Young). Without such properties it may diverge, and says
    so. It is not hermitian, so it cannot precondition :class:`CG`: take :class:`SSOR`.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 n``.
        sweeps: steps taken where it preconditions.
        omega: $0 < \omega < 2$; no other value converges (Kahan).
        sweep: ``"forward"`` (rows from the first to the last) or ``"backward"``.

    Raises:
        SingularError: a diagonal entry is zero; the message names the row.
        NonFiniteError: an entry is NaN or infinite.
        StructureError: a sparse operator is not on the CPU.
        ArgumentError: ``omega``, ``sweep`` or a limit makes no sense.

    Cost: one product and one triangular solve per step; nothing to prepare for sparse operators,
    ``n`` products and $n^2$ numbers for others (the matrix is formed).

    Source: Young, "Iterative methods for solving partial difference equations of elliptic type"
    (1954); Saad, "Iterative methods for sparse linear systems" (2nd ed.), 4.1 and 4.2.5.

    Example:
        >>> import torch
        >>> from woodbury import Dense, SOR, solve
        >>> A = Dense(torch.tensor([[4.0, 1.0], [2.0, 5.0]]))
        >>> solve(A, torch.tensor([5.0, 7.0]), SOR(omega=1.03)).value
        tensor([1.0000, 1.0000])
    """

    omega: float = field(kw_only=True)
    sweep: Literal["forward", "backward"] = field(default="forward", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_omega(self.omega)
        require_sweep(self.sweep, ("forward", "backward"))

    def _products(self, A: LinearOperator) -> int:
        return split_products(A)

    def _correction(self, A: LinearOperator) -> LinearOperator:
        return relaxation(A, self.omega, self.sweep, "SOR()")


def relaxation(A: LinearOperator, omega: float, sweep: Sweep, name: str) -> TriangularInverse:
    """The correction of (successive, symmetric) over-relaxation as an operator."""
    parts = parts_of(A, name)
    if sweep == "forward":
        return TriangularInverse(A, parts.lower(omega))
    if sweep == "backward":
        return TriangularInverse(A, parts.upper_adjoint(omega), upper=True)
    lower = parts.lower(omega)
    tags = set()
    if parts.hermitian:
        tags.add("hermitian")
        if bool((torch.real(parts.diagonal) > 0).all()):
            tags.add("positive_definite")
    return TriangularInverse(
        A,
        lower,
        lower if parts.hermitian else parts.upper_adjoint(omega),
        middle=parts.diagonal,
        factor=(2 - omega) / omega,
        tags=tags,
    )


def split_products(A: LinearOperator) -> int:
    """Columns multiplied to have the triangles: none for a sparse matrix, else all."""
    return 0 if isinstance(A, Sparse) else A.shape[1]


def require_omega(omega: float) -> None:
    """Raise unless over-relaxation can converge."""
    if not 0 < omega < 2:
        raise ArgumentError(
            f"omega is {omega}; over-relaxation converges for no matrix unless 0 < omega < 2"
        )


def require_sweep(sweep: str, known: tuple[str, ...] = get_args(Sweep)) -> None:
    """Raise unless the direction of the sweep is known."""
    if sweep not in known:
        raise ArgumentError(f"sweep is {sweep!r}; it must be one of {list(known)}")
