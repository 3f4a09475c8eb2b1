"""What factorisations share: the matrix in float64, refinement, and the verdict on the answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, BudgetError, NonFiniteError, TagError
from woodbury.operators.memory import available_bytes, in_words
from woodbury.solvers.columns import norms, rounding_limit
from woodbury.solvers.recipe import Outcome, Problem, Recipe, State
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["Direct", "FactorState", "Forming", "form", "wide"]

# Refinement stops earlier where it no longer halves the residual.
_REFINEMENTS = 3

# The system is not asked for what it has left where less than this is needed.
_ALWAYS_BYTES = 64 * 2**20

# Rows of the matrix that are compared with its columns at a time.
_BLOCK_BYTES = 16 * 2**20


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
        return Outcome(X, statuses, residuals=found, info=self._info(state))

    def _info(self, state: Any) -> dict[str, Any]:
        """What the factorisation says beside the answer."""
        return {}

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
                useful = r <= rounding_limit(math.inf, norm, eps)
                statuses.append(SolveStatus.precision if useful else SolveStatus.singular)
            else:
                statuses.append(SolveStatus.stagnation)
        return statuses


@dataclass(frozen=True)
class Forming(Direct):
    """Base of the direct recipes that form the matrix, within a budget of memory.

    Args:
        budget_bytes: what forming and factorising may take at the peak; default is what the system
            says is available.
    """

    budget_bytes: int | None = field(default=None, kw_only=True, repr=False)

    # Matrices in double precision at the peak of the preparation, that of the operator not counted.
    peak: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.budget_bytes is not None and self.budget_bytes < 0:
            raise ArgumentError(f"budget_bytes is {self.budget_bytes}; it must be >= 0")

    def _form(self, A: LinearOperator, *, hermitian: bool = False) -> Tensor:
        """The matrix in double precision, in memory of its own; see :func:`form`.

        Raises:
            BudgetError: it does not fit; nothing was allocated.
        """
        rows, columns = A.shape
        need = self.peak * rows * columns * torch.empty((), dtype=wide(A.dtype)).element_size()
        allowed = self.budget_bytes
        if allowed is None and need > _ALWAYS_BYTES:
            allowed = available_bytes(A.device)
        if allowed is not None and need > allowed:
            name = type(self).__name__
            said = "are available" if self.budget_bytes is None else "is the budget"
            raise BudgetError(
                f"{name} forms the matrix: {rows} x {columns} in {wide(A.dtype)} takes "
                f"{in_words(need)} ({need:,} bytes) with its factors, and {in_words(allowed)} "
                f"{said}; {self._instead(A)}, or raise budget_bytes"
            )
        return form(A, hermitian=hermitian)

    def _instead(self, A: LinearOperator) -> str:
        """What needs no matrix."""
        if "hermitian" in A.tags:
            return "use an iterative recipe, which only multiplies (CG() or MINRES())"
        return "use an iterative recipe, which only multiplies (GMRES() or LSMR())"


def wide(dtype: torch.dtype) -> torch.dtype:
    """Double precision of the same kind."""
    return torch.complex128 if dtype.is_complex else torch.float64


def form(A: LinearOperator, *, hermitian: bool) -> Tensor:
    """The matrix in double precision, to be changed freely.

    Where ``hermitian``, it is checked to be so and made so, a block of rows at a time.

    Raises:
        NonFiniteError: an entry is NaN or infinite.
        TagError: the operator is tagged hermitian, and its matrix is not.
    """
    dense = A.to_dense().detach().resolve_conj()
    dense = dense.to(wide(A.dtype), copy=True, memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(dense.sum())) and not bool(torch.isfinite(dense).all()):
        bad = int((~torch.isfinite(dense)).sum())
        raise NonFiniteError(
            f"{bad} of {dense.numel()} entries of the matrix of {type(A).__name__} are NaN or "
            "infinite"
        )
    if not hermitian or dense.numel() == 0:
        return dense
    # Rounding makes the products of a symmetric operator slightly asymmetric.
    parts = torch.view_as_real(dense) if dense.is_complex() else dense
    low, high = (bound.item() for bound in parts.aminmax())
    allowed = math.sqrt(torch.finfo(A.dtype).eps) * max(-low, high)
    n = dense.shape[0]
    height = max(1, _BLOCK_BYTES // (n * dense.element_size()))
    for start in range(0, n, height):
        stop = min(start + height, n)
        rows, columns = dense[start:stop, start:], dense[start:, start:stop]
        gap = (rows - columns.mH).abs()
        if gap.amax().item() > allowed:
            row, column = divmod(int(gap.argmax()), gap.shape[1])
            row, column = row + start, column + start
            raise TagError(
                f"{type(A).__name__} is tagged hermitian, but its entries ({row}, {column}) and "
                f"({column}, {row}) are {dense[row, column].item():.6g} and "
                f"{dense[column, row].item():.6g}"
            )
        mean = (rows + columns.mH) / 2
        rows.copy_(mean)
        columns.copy_(mean.mH)
    return dense
