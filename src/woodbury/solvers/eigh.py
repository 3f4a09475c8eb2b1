"""Eigendecomposition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.solvers.columns import norms
from woodbury.solvers.direct import FactorState, Forming
from woodbury.solvers.recipe import Problem
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["Eigh", "EighState"]


@dataclass(frozen=True, eq=False)
class EighState(FactorState):
    """Eigenpairs kept, in double precision.

    Attributes:
        basis: eigenvectors ``[n, r]``.
        eigenvalues: ``[r]``, ascending.
        rank: ``r``; the other ``n - r`` eigenvalues are zero to ``rcond``.
    """

    basis: Tensor
    eigenvalues: Tensor
    rank: int


@dataclass(frozen=True)
class Eigh(Forming):
    r"""Direct solve by $A = V \Lambda V^H$, for hermitian operators: indefinite and singular too.

    $x = \sum_{|\lambda_i| > \text{rcond} \max|\lambda|} v_i \lambda_i^{-1} v_i^H b$, the
    pseudo-inverse: of a singular system with a solution it gives the one of smallest norm
    (``converged``), otherwise the least-squares solution of smallest norm (``inconsistent``).

    Args:
        rcond: eigenvalues of modulus up to ``rcond`` times the largest count as zero; default
            ``n`` times the machine epsilon of the operator's dtype.
        budget_bytes: memory that the preparation may take at the peak; default is what the system
            says is available.

    Raises:
        BudgetError: the matrix and its eigenvectors do not fit; nothing was allocated.
        TagError: the operator is not tagged hermitian, or is tagged so and its matrix is not.
        ArgumentError: ``rcond`` is not between 0 and 1.

    Cost: ``n`` products to form the matrix, about $9 n^3$ multiplications, 32 $n^2$ bytes at the
    peak and 8 $n^2$ kept; then $4 n^2$ and one or two products per column.

    Source: Golub and Van Loan, "Matrix Computations" (4th ed.), 8.3 and 5.5.

    Example:
        >>> import torch
        >>> from woodbury import Dense, Eigh, solve
        >>> A = Dense(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), tags={"symmetric"})
        >>> solve(A, torch.tensor([2.0, 2.0]), Eigh()).value.round(decimals=4)
        tensor([1., 1.])
        >>> solve(A, torch.tensor([2.0, 0.0]), Eigh(), throw=False).status.name
        'inconsistent'
    """

    rcond: float | None = None

    needs: ClassVar[tuple[str, ...]] = ("hermitian",)
    peak: ClassVar[int] = 4  # the eigenvectors, and as much again to work in, twice

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rcond is not None and not 0 <= self.rcond < 1:
            raise ArgumentError(f"rcond is {self.rcond}; it must be in [0, 1)")

    def _prepare(self, A: LinearOperator) -> EighState:
        n = A.shape[0]
        dense = self._form(A, hermitian=True)
        eigenvalues, basis = torch.linalg.eigh(dense)
        norm = eigenvalues.abs().amax().item() if n else 0.0
        rcond = n * torch.finfo(A.dtype).eps if self.rcond is None else self.rcond
        kept = eigenvalues.abs() > rcond * norm
        rank = int(kept.sum())
        if rank < n:
            eigenvalues, basis = eigenvalues[kept], basis[:, kept]
        return EighState.of(self, A, n, norm=norm, basis=basis, eigenvalues=eigenvalues, rank=rank)

    def _apply(self, A: LinearOperator, state: EighState, B: Tensor) -> Tensor:
        block = (B.unsqueeze(1) if B.dim() == 1 else B).to(state.basis.dtype)
        X = state.basis @ ((state.basis.mH @ block) / state.eigenvalues.unsqueeze(1))
        X = X.to(B.dtype)
        return X.squeeze(1) if B.dim() == 1 else X

    def _verdict(
        self, problem: Problem, state: Any, X: Tensor, found: list[float]
    ) -> list[SolveStatus]:
        statuses = super()._verdict(problem, state, X, found)
        if state.rank == problem.A.shape[0]:
            return statuses
        b = problem.b.to(state.basis.dtype)
        outside = b - state.basis @ (state.basis.mH @ b)
        allowed = math.sqrt(torch.finfo(problem.A.dtype).eps)
        sizes = zip(norms(problem.A.space, outside), problem.b_norms, strict=True)
        return [
            SolveStatus.inconsistent if r > allowed * norm else status
            for (r, norm), status in zip(sizes, statuses, strict=True)
        ]
