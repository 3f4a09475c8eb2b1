"""Cholesky factorisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from woodbury.errors import NotPositiveDefiniteError, SingularError
from woodbury.operators.factorization import reciprocal_condition
from woodbury.solvers.direct import FactorState, Forming

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["Cholesky", "CholeskyState"]


@dataclass(frozen=True, eq=False)
class CholeskyState(FactorState):
    """The factor ``L`` with ``A = L L^H``, ``[n, n]`` in double precision."""

    factor: Tensor


@dataclass(frozen=True)
class Cholesky(Forming):
    r"""Direct solve by $A = L L^H$, for hermitian positive definite operators that fit in memory.

    The matrix is formed and factorised in double precision, whatever the operator's dtype, and the
    answer refined against the operator's own products. No jitter is added: where the factor does
    not exist the error says how far the matrix is from positive definite.

    Args:
        budget_bytes: memory that the preparation may take at the peak; default is what the system
            says is available.

    Raises:
        BudgetError: the matrix and its factor do not fit; nothing was allocated.
        TagError: the operator is not tagged hermitian, or is tagged so and its matrix is not.
        NotPositiveDefiniteError: an eigenvalue is negative.
        SingularError: the smallest eigenvalue is zero to working precision.

    Cost: ``n`` products to form the matrix, $n^3/3$ multiplications, 16 $n^2$ bytes at the peak and
    8 $n^2$ kept; then $2 n^2$ and one or two products per column.

    Source: Golub and Van Loan, "Matrix Computations" (4th ed.), 4.2 and 3.5.3.

    Example:
        >>> import torch
        >>> from woodbury import Cholesky, Dense, solve
        >>> A = Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), tags={"positive_definite"})
        >>> solve(A, torch.tensor([3.0, 4.0]), Cholesky()).value
        tensor([1., 1.])
    """

    needs: ClassVar[tuple[str, ...]] = ("hermitian",)

    def _prepare(self, A: LinearOperator) -> CholeskyState:
        dense = self._form(A, hermitian=True)
        n = A.shape[0]
        norm = torch.linalg.matrix_norm(dense).item()
        factor, info = torch.linalg.cholesky_ex(dense)
        singular = False
        if info.item() == 0 and n > 0:
            # A small pivot is not needed for that: the estimate sees what the pivots hide.
            rcond = reciprocal_condition(
                torch.linalg.matrix_norm(dense, 1).item(),
                lambda B, adjoint: torch.cholesky_solve(B, factor),
                dense,
            )
            singular = rcond <= math.sqrt(n) * torch.finfo(dense.dtype).eps
        if info.item() > 0 or singular:
            raise _diagnosis(dense, int(info.item()))
        return CholeskyState.of(self, A, A.shape[0], norm=norm, factor=factor)

    def _apply(self, A: LinearOperator, state: CholeskyState, B: Tensor) -> Tensor:
        block = B.unsqueeze(1) if B.dim() == 1 else B
        X = torch.cholesky_solve(block.to(state.factor.dtype), state.factor).to(B.dtype)
        return X.squeeze(1) if B.dim() == 1 else X


def _diagnosis(dense: Tensor, minor: int) -> NotPositiveDefiniteError | SingularError:
    eigenvalues = torch.linalg.eigvalsh(dense)
    smallest, largest = eigenvalues[0].item(), eigenvalues[-1].item()
    spread = dense.shape[0] * torch.finfo(dense.dtype).eps * max(abs(smallest), abs(largest))
    if smallest < -spread:
        return NotPositiveDefiniteError(
            f"the leading minor of order {minor} is not positive definite: the eigenvalues run "
            f"from {smallest:.6g} to {largest:.6g}; add damping above {-smallest:.3g}, for example "
            f"A + {-2 * smallest:.3g} * Identity({dense.shape[0]}), or use Eigh()"
        )
    return SingularError(
        f"the matrix is singular to working precision: the eigenvalues run from {smallest:.6g} to "
        f"{largest:.6g}; add damping, or use Eigh() for the pseudo-inverse"
    )
