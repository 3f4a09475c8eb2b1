"""What recipes share that solve least squares through a low-rank factorisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from woodbury.decompositions.meta import MetaFactor
from woodbury.decompositions.two_sided import TwoSided, default_rcond
from woodbury.errors import ArgumentError, RankError
from woodbury.solvers.certified import normal_residuals, statuses_of
from woodbury.solvers.columns import norms
from woodbury.solvers.recipe import Outcome, Problem, Recipe, State
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["Factored", "FactoredState"]


@dataclass(frozen=True, eq=False)
class FactoredState(State):
    """The factorisation and its pseudo-inverse.

    Attributes:
        factor: of the operator that was prepared for.
        inverse: the pseudo-inverse, ``[n, m]``; in the state of an adjoint, its adjoint.
        norm: the largest singular value of the approximation.
    """

    factor: MetaFactor
    inverse: TwoSided
    norm: float


@dataclass(frozen=True)
class Factored(Recipe):
    """Base of recipes that apply the pseudo-inverse of a low-rank approximation.

    A subclass adds ``_factorise`` and its options.
    """

    rank: int
    rcond: float | None = None
    seed: int = 0

    rectangular: ClassVar[bool] = True
    mirrors: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RankError(f"rank is {self.rank}; it must be 1 to the shorter side of A")
        if self.rcond is not None and not 0 <= self.rcond < 1:
            raise ArgumentError(f"rcond is {self.rcond}; it must be in [0, 1)")

    def _factorise(self, A: LinearOperator, generator: torch.Generator) -> MetaFactor:
        raise NotImplementedError

    def _prepare(self, A: LinearOperator) -> FactoredState:
        generator = torch.Generator(A.device).manual_seed(self.seed)
        factor = self._factorise(A, generator)
        rcond = self.rcond
        if rcond is None:
            rcond = default_rcond(A.shape, A.dtype)
        inverse = factor.operator.pseudo_inverse(rcond)
        # The largest singular value is the reciprocal of the smallest of the pseudo-inverse's.
        norm = 1 / inverse.core.abs().amin().item() if inverse.core.numel() else 0.0
        return FactoredState.of(self, A, factor.products, factor=factor, inverse=inverse, norm=norm)

    def adjoint_state(self, A: LinearOperator, state: State) -> State:
        """The adjoint of the pseudo-inverse: nothing is prepared anew."""
        assert isinstance(state, FactoredState)  # made by _prepare
        inverse = state.inverse.H
        assert isinstance(inverse, TwoSided)
        return replace(state, shape=A.H.shape, inverse=inverse, products=0)

    def as_preconditioner(self, A: LinearOperator, state: State) -> LinearOperator:
        """The pseudo-inverse, which has no tags: of a hermitian ``A`` it is not quite hermitian."""
        assert isinstance(state, FactoredState)
        return state.inverse

    def _apply(self, A: LinearOperator, state: FactoredState, B: Tensor) -> Tensor:
        return (state.inverse @ B.to(state.inverse.dtype)).to(B.dtype)

    def _run(self, problem: Problem, state: FactoredState) -> Outcome:
        A = problem.A
        X, R = problem.start()
        X = X + self._apply(A, state, R)
        R = problem.residual(X)
        normal = normal_residuals(problem, R, problem.adjoint_product(R), state.norm)
        residuals = norms(A.out_space, R)
        rtol = math.sqrt(torch.finfo(A.dtype).eps)
        statuses = statuses_of(
            residuals, problem.tolerances(rtol, 0.0), normal, rtol, SolveStatus.completed
        )
        info = {"normal_residual": normal, "rank": state.inverse.left.shape[1]}
        return Outcome(X, statuses, residuals=residuals, info=info)
