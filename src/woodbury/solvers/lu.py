"""LU factorisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.errors import SingularError
from woodbury.solvers.direct import FactorState, Forming

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator
    from woodbury.solvers.recipe import State

__all__ = ["LU", "LUState"]


@dataclass(frozen=True, eq=False)
class LUState(FactorState):
    """The factors of ``P A = L U`` in one matrix ``[n, n]``, in double precision.

    Attributes:
        factor: unit lower triangle ``L`` below the diagonal, ``U`` on and above it.
        pivots: row exchanges ``[n]``.
        adjoint: whether the factors are those of ``A.H``.
    """

    factor: Tensor
    pivots: Tensor
    adjoint: bool = False


@dataclass(frozen=True)
class LU(Forming):
    r"""Direct solve by $P A = L U$ with row exchanges, for any invertible operator in memory.

    The matrix is formed and factorised in double precision, whatever the operator's dtype, and the
    answer refined against the operator's own products.

    Args:
        budget_bytes: memory that the preparation may take at the peak; default is what the system
            says is available.

    Raises:
        BudgetError: the matrix and its factors do not fit; nothing was allocated.
        SingularError: a pivot is zero to working precision.

    Cost: ``n`` products to form the matrix, $2n^3/3$ multiplications, 16 $n^2$ bytes at the peak
    and 8 $n^2$ kept; then $2 n^2$ and one or two products per column.

    Source: Golub and Van Loan, "Matrix Computations" (4th ed.), 3.4 and 3.5.3.

    Example:
        >>> import torch
        >>> from woodbury import Dense, solve
        >>> from woodbury.solvers import LU
        >>> A = Dense(torch.tensor([[0.0, 2.0], [1.0, 1.0]]))
        >>> solve(A, torch.tensor([2.0, 2.0]), LU()).value
        tensor([1., 1.])
    """

    def _prepare(self, A: LinearOperator) -> LUState:
        n = A.shape[0]
        dense = self._form(A)
        norm = torch.linalg.matrix_norm(dense).item()
        factor, pivots, _ = torch.linalg.lu_factor_ex(dense)
        sizes = torch.diagonal(factor).abs()
        if n and sizes.amin().item() <= n * torch.finfo(dense.dtype).eps * sizes.amax().item():
            raise SingularError(
                f"the matrix is singular to working precision: the pivots run from "
                f"{sizes.amin().item():.3g} to {sizes.amax().item():.3g}; add damping"
            )
        return LUState.of(self, A, n, norm=norm, factor=factor, pivots=pivots)

    def adjoint_state(self, A: LinearOperator, state: State) -> State:
        """The same factors, to be used for ``A.H``."""
        assert isinstance(state, LUState)  # made by _prepare
        return LUState.of(
            self,
            A.H,
            norm=state.norm,
            factor=state.factor,
            pivots=state.pivots,
            adjoint=not state.adjoint,
        )

    def _apply(self, A: LinearOperator, state: LUState, B: Tensor) -> Tensor:
        block = (B.unsqueeze(1) if B.dim() == 1 else B).to(state.factor.dtype)
        X = torch.linalg.lu_solve(state.factor, state.pivots, block, adjoint=state.adjoint)
        return (X.squeeze(1) if B.dim() == 1 else X).to(B.dtype)
