"""LDL factorisation of hermitian indefinite matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from woodbury.errors import SingularError
from woodbury.operators.factorization import reciprocal_condition
from woodbury.solvers.direct import FactorState, Forming

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["LDL", "LDLState"]


@dataclass(frozen=True, eq=False)
class LDLState(FactorState):
    """The factors of ``A = P L D L^H P^H`` in one matrix ``[n, n]``, in double precision.

    Attributes:
        factor: unit lower triangle ``L``; ``D`` with blocks of one or two rows on its diagonal.
        pivots: row exchanges ``[n]`` as LAPACK has them; negative for blocks of two rows.
        inertia: the numbers of positive, negative and zero eigenvalues.
        rcond: reciprocal condition number in the 1-norm, estimated from above.
    """

    factor: Tensor
    pivots: Tensor
    inertia: tuple[int, int, int]
    rcond: float


@dataclass(frozen=True)
class LDL(Forming):
    r"""Direct solve by $A = P L D L^H P^H$, for hermitian operators, indefinite ones too.

    Half the work of :class:`~woodbury.solvers.LU` and as stable: the pivoting of Bunch and Kaufman
    takes diagonal blocks of two rows where a single pivot would be small. By Sylvester's law
    ``D`` tells how many eigenvalues are positive and negative: ``info["inertia"]`` is (positive,
    negative, zero). ``info["condition"]`` is the condition number in the 1-norm, an estimate
    that is hardly ever more than three times too small.

    The matrix is formed and factorised in double precision, whatever the operator's dtype, and the
    answer refined against the operator's own products.

    Args:
        budget_bytes: memory that the preparation may take at the peak; default is what the system
            says is available.

    Raises:
        BudgetError: the matrix and its factors do not fit; nothing was allocated.
        TagError: the operator is not tagged hermitian, or is tagged so and its matrix is not.
        SingularError: the matrix is singular to working precision; :class:`~woodbury.Eigh` takes
            the pseudo-inverse.

    Cost: ``n`` products to form the matrix, $n^3/3$ multiplications, 16 $n^2$ bytes at the peak
    and 8 $n^2$ kept; then $2 n^2$ and one or two products per column.

    Source: Bunch and Kaufman, "Some stable methods for calculating inertia and solving symmetric
    linear systems" (1977); Golub and Van Loan, "Matrix Computations" (4th ed.), 4.4.

    Example:
        >>> import torch
        >>> from woodbury import Dense, LDL, solve
        >>> saddle = Dense(torch.tensor([[2.0, 1.0], [1.0, 0.0]]), tags={"symmetric"})
        >>> solution = solve(saddle, torch.tensor([3.0, 1.0]), LDL())
        >>> solution.value, solution.info["inertia"]
        (tensor([1., 1.]), (1, 1, 0))
    """

    needs: ClassVar[tuple[str, ...]] = ("hermitian",)

    def _prepare(self, A: LinearOperator) -> LDLState:
        dense = self._form(A, hermitian=True)
        n = A.shape[0]
        norm = torch.linalg.matrix_norm(dense).item()
        one_norm = torch.linalg.matrix_norm(dense, 1).item() if n else 0.0
        complex_ = dense.is_complex()
        factor, pivots, _ = torch.linalg.ldl_factor_ex(dense, hermitian=complex_)
        inertia = _inertia(factor, pivots)
        rcond = 0.0
        if inertia[2] == 0:
            rcond = reciprocal_condition(
                one_norm,
                lambda B, adjoint: torch.linalg.ldl_solve(factor, pivots, B, hermitian=complex_),
                dense,
            )
        if rcond <= math.sqrt(n) * torch.finfo(dense.dtype).eps:
            raise SingularError(
                "the matrix is singular to working precision: its reciprocal condition number is "
                f"{rcond:.1e}, and its pivots have {inertia[0]} positive, {inertia[1]} negative "
                f"and {inertia[2]} zero eigenvalues; add damping, or use Eigh() for the "
                "pseudo-inverse"
            )
        return LDLState.of(
            self, A, n, norm=norm, factor=factor, pivots=pivots, inertia=inertia, rcond=rcond
        )

    def _apply(self, A: LinearOperator, state: LDLState, B: Tensor) -> Tensor:
        block = (B.unsqueeze(1) if B.dim() == 1 else B).to(state.factor.dtype)
        X = torch.linalg.ldl_solve(
            state.factor, state.pivots, block.contiguous(), hermitian=block.is_complex()
        ).to(B.dtype)
        return X.squeeze(1) if B.dim() == 1 else X

    def _info(self, state: Any) -> dict[str, Any]:
        return {"inertia": state.inertia, "condition": 1 / state.rcond}


def _inertia(factor: Tensor, pivots: Tensor) -> tuple[int, int, int]:
    """Signs of the eigenvalues of ``D``; a block of two rows has one of either sign."""
    double = pivots < 0
    single = torch.diagonal(factor).real[~double]
    pairs = int(double.sum()) // 2
    positive, negative = int((single > 0).sum()), int((single < 0).sum())
    return positive + pairs, negative + pairs, single.numel() - positive - negative
