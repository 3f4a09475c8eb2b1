"""The inverse that an operator's structure gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from woodbury.solvers.direct import Direct
from woodbury.solvers.recipe import Problem, State
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["Structural", "StructuralState"]


@dataclass(frozen=True, eq=False)
class StructuralState(State):
    """The inverse as an operator."""

    inverse: LinearOperator


@dataclass(frozen=True)
class Structural(Direct):
    r"""Direct solve by the operator's own inverse, as $(A \otimes B)^{-1} = A^{-1} \otimes B^{-1}$.

    What :func:`~woodbury.solve` does by default where ``A.has_inverse``. The status is
    ``converged`` where the residual is below the square root of the machine epsilon, and
    ``completed`` where the condition number allows no better.

    Raises:
        StructureError: the operator has no structural inverse.
        SingularError: the operator is singular.

    Cost: that of the structural inverse, and one or two products for residual and refinement.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal, solve
        >>> solve(Diagonal(torch.tensor([2.0, 4.0])), torch.ones(2)).value
        tensor([0.5000, 0.2500])
    """

    def _prepare(self, A: LinearOperator) -> StructuralState:
        return StructuralState.of(self, A, inverse=A.inverse())

    def adjoint_state(self, A: LinearOperator, state: State) -> State:
        """The adjoint of the inverse."""
        assert isinstance(state, StructuralState)  # made by _prepare
        return StructuralState.of(self, A.H, inverse=state.inverse.H)

    def _apply(self, A: LinearOperator, state: StructuralState, B: Tensor) -> Tensor:
        return (state.inverse @ B.to(A.dtype)).to(B.dtype)

    def _verdict(
        self, problem: Problem, state: Any, X: Tensor, found: list[float]
    ) -> list[SolveStatus]:
        eps = torch.finfo(problem.A.dtype).eps
        statuses = []
        for r, norm in zip(found, problem.b_norms, strict=True):
            if not math.isfinite(r):
                statuses.append(SolveStatus.non_finite)
            elif r <= math.sqrt(eps) * norm:
                statuses.append(SolveStatus.converged)
            else:
                statuses.append(SolveStatus.completed)
        return statuses
