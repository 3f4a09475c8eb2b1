"""What factorisations share: the matrix in float64, refinement, and the verdict on the answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from woodbury.errors import NonFiniteError, TagError
from woodbury.solvers.columns import norms
from woodbury.solvers.recipe import Outcome, Problem, Recipe, State
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["Direct", "FactorState", "form", "wide"]

# Refinement stops earlier where it no longer halves the residual.
_REFINEMENTS = 3


@dataclass(frozen=True, eq=False)
class FactorState(State):
    """A state that knows the norm of the matrix it factorised.

    Attributes:
        norm: a bound on the spectral norm of the matrix.
    """

    norm: float


@dataclass(frozen=True)
class Direct(Recipe):
    """Base of recipes that hold an exact inverse: ``_apply`` is it, up to rounding.

    Their tolerance is the square root of the machine epsilon of the operator's dtype.
    """

    def _run(self, problem: Problem, state: Any) -> Outcome:
        A, b = problem.A, problem.b
        X, R = problem.start()
        X = X + self._apply(A, state, R)
        R = problem.residual(X)
        found = norms(A.out_space, R)
        for _ in range(_REFINEMENTS):
            if all(r <= self._target(problem, norm) for r, norm in self._pairs(problem, found)):
                break
            trial = X + self._apply(A, state, R)
            trial_R = problem.residual(trial)
            trial_found = norms(A.out_space, trial_R)
            better = [new < old for new, old in zip(trial_found, found, strict=True)]
            if not any(better):
                break
            mask = torch.tensor(better, device=b.device)
            X, R = torch.where(mask, trial, X), torch.where(mask, trial_R, R)
            halved = any(n < 0.5 * o for n, o in zip(trial_found, found, strict=True))
            found = [min(n, o) for n, o in zip(trial_found, found, strict=True)]
            if not halved:
                break
        statuses = self._verdict(problem, state, X, found)
        return Outcome(X, statuses, residuals=found)

    def _pairs(self, problem: Problem, found: list[float]) -> list[tuple[float, float]]:
        return list(zip(found, problem.b_norms, strict=True))

    def _target(self, problem: Problem, norm: float) -> float:
        """The residual at which there is nothing to refine."""
        return 16 * math.sqrt(problem.A.shape[0]) * torch.finfo(problem.A.dtype).eps * norm

    def _verdict(
        self, problem: Problem, state: Any, X: Tensor, found: list[float]
    ) -> list[SolveStatus]:
        """Whether the residual is small, or else explained by rounding of ``A`` and ``x`` alone."""
        eps = torch.finfo(problem.A.dtype).eps
        room = 10 * eps * math.sqrt(problem.A.shape[0])
        statuses = []
        sizes = norms(problem.A.space, X)
        for r, size, norm in zip(found, sizes, problem.b_norms, strict=True):
            if not math.isfinite(r):
                statuses.append(SolveStatus.non_finite)
            elif r <= math.sqrt(eps) * norm:
                statuses.append(SolveStatus.converged)
            elif r <= room * (state.norm * size + norm):
                useful = r <= 0.1 * norm
                statuses.append(SolveStatus.precision if useful else SolveStatus.singular)
            else:
                statuses.append(SolveStatus.stagnation)
        return statuses


def wide(dtype: torch.dtype) -> torch.dtype:
    """Double precision of the same kind."""
    return torch.complex128 if dtype.is_complex else torch.float64


def form(A: LinearOperator, *, hermitian: bool) -> Tensor:
    """The matrix in double precision; where ``hermitian``, checked to be so and made so.

    Raises:
        NonFiniteError: an entry is NaN or infinite.
        TagError: the operator is tagged hermitian, and its matrix is not.
    """
    dense = A.to_dense().detach().to(wide(A.dtype))
    if not bool(torch.isfinite(dense).all()):
        bad = int((~torch.isfinite(dense)).sum())
        raise NonFiniteError(
            f"{bad} of {dense.numel()} entries of the matrix of {type(A).__name__} are NaN or "
            "infinite"
        )
    if not hermitian or dense.numel() == 0:
        return dense
    difference = (dense - dense.mH).abs()
    largest = dense.abs().amax()
    # Rounding makes the products of a symmetric operator slightly asymmetric.
    if bool(difference.amax() > math.sqrt(torch.finfo(A.dtype).eps) * largest):
        row, column = divmod(int(difference.argmax()), dense.shape[1])
        raise TagError(
            f"{type(A).__name__} is tagged hermitian, but its entries ({row}, {column}) and "
            f"({column}, {row}) are {dense[row, column].item():.6g} and "
            f"{dense[column, row].item():.6g}"
        )
    return (dense + dense.mH) / 2
