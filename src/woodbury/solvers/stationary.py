"""What stationary and polynomial methods share: one loop of corrections, and its verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.operators.base import LinearOperator
from woodbury.solvers.columns import dots, norms, take
from woodbury.solvers.preconditioned import Iterative, KrylovState, preconditioning
from woodbury.solvers.recipe import Outcome, Problem, State
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.operators.tags import Tags

__all__ = ["Corrections", "Iteration", "Stationary", "Sweeps"]

# Steps from one look at the size of rounding to the next.
_LOOK = 50


@dataclass(frozen=True)
class Stationary(Iterative):
    r"""Base of $x \leftarrow x + M (b - A x)$ with a fixed $M \approx A^{-1}$.

    A subclass gives ``_correction``, the operator $M$. As a preconditioner the recipe is ``sweeps``
    steps from zero.
    """

    sweeps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sweeps < 1:
            raise ArgumentError(f"sweeps is {self.sweeps}; it must be at least 1")

    def as_preconditioner(self, A: LinearOperator, state: State) -> LinearOperator:
        """``sweeps`` steps from zero, as an operator."""
        assert isinstance(state, KrylovState)  # made by _prepare
        assert state.preconditioner is not None
        if self.sweeps == 1:
            return state.preconditioner
        return Sweeps(A, state.preconditioner, self.sweeps)

    def _correction(self, A: LinearOperator) -> LinearOperator:
        raise NotImplementedError(f"{type(self).__name__} does not define _correction")

    def _prepare(self, A: LinearOperator) -> KrylovState:
        return KrylovState.of(self, A, self._products(A), preconditioner=self._correction(A))

    def _products(self, A: LinearOperator) -> int:
        """Columns that ``A`` is multiplied by for the correction."""
        return 0

    def _apply(self, A: LinearOperator, state: KrylovState, B: Tensor) -> Tensor:
        precondition = preconditioning(self.as_preconditioner(A, state))
        assert precondition is not None
        return precondition(B)

    def _run(self, problem: Problem, state: KrylovState) -> Outcome:
        M = state.preconditioner
        tolerances = problem.tolerances(self.rtol, self.atol)
        loop = Iteration(problem, Corrections(M), tolerances, monotone=is_monotone(problem.A, M))
        return loop.run(self.limit(problem.A))


def is_monotone(A: LinearOperator, M: LinearOperator | None) -> bool:
    """Whether ``M^(1/2) A M^(1/2)`` makes sense and is hermitian."""
    return "hermitian" in A.tags and (M is None or "positive_definite" in M.tags)


class Sweeps(LinearOperator):
    r"""$\sum_{j<s} (I - M A)^j M$: ``s`` steps of $x \leftarrow x + M(b - A x)$ from zero.

    Hermitian where ``A`` and ``M`` are; positive definite where, moreover, both are and ``s`` is
    odd (for an even ``s`` that takes the eigenvalues of ``M A`` to be below 2).
    """

    def __init__(self, operator: LinearOperator, step: LinearOperator, count: int) -> None:
        shared = operator.tags & step.tags
        tags: Tags = shared & {"hermitian"}
        if "positive_definite" in shared and count % 2:
            tags |= {"positive_definite"}
        super().__init__(
            step.shape,
            dtype=step.dtype,
            device=step.device,
            tags=tags,
            space=step.space,
            out_space=step.out_space,
        )
        self.operator, self.step, self.count = operator, step, count

    def _matmat(self, X: Tensor) -> Tensor:
        return self._sweep(X, self.operator._matmat, self.step._matmat)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self._sweep(Y, self.operator._rmatmat, self.step._rmatmat)

    def _sweep(
        self, B: Tensor, A: Callable[[Tensor], Tensor], M: Callable[[Tensor], Tensor]
    ) -> Tensor:
        X = M(B)
        for _ in range(self.count - 1):
            X = X + M(B - A(X))
        return X


class Corrections:
    r"""The directions $d = \alpha M r$ of a stationary method.

    Args:
        M: the operator $M$; ``None`` for the identity.
        step: $\alpha$.
    """

    def __init__(self, M: LinearOperator | None, step: float = 1.0) -> None:
        self.precondition = preconditioning(M)
        self.step = step

    def next(self, R: Tensor) -> tuple[Tensor, Tensor]:
        """The next direction and $M r$; neither is changed by the loop."""
        Z = R if self.precondition is None else self.precondition(R)
        return self.direction(Z), Z

    def direction(self, Z: Tensor) -> Tensor:
        """The direction from $M r$."""
        return Z if self.step == 1 else self.step * Z

    def keep(self, columns: Sequence[int]) -> None:
        """Go on with some of the columns only."""


class Iteration:
    r"""$x \leftarrow x + d$ with $r = b - A x$ computed anew in every step.

    A step costs one product either way, so every residual is true. Where ``monotone``
    ($M^{1/2} A M^{1/2}$ is hermitian) the norms $\|M^{1/2} r_i\|$ of a stationary method are
    log-convex in $i$: the first rise proves divergence, and a standstill is final. Those of a
    polynomial method (``polynomial``) with the right bounds never exceed the first. Without
    symmetry residuals may grow for a long time before they fall.

    Args:
        problem: the systems.
        corrections: gives the directions.
        tolerances: norms of the residual that count as converged.
        monotone: see above.
        polynomial: see above.
    """

    def __init__(
        self,
        problem: Problem,
        corrections: Corrections,
        tolerances: Sequence[float],
        *,
        monotone: bool,
        polynomial: bool = False,
    ) -> None:
        self.problem, self.space = problem, problem.A.space
        self.corrections, self.tolerances = corrections, tolerances
        self.monotone, self.polynomial = monotone, polynomial
        self.eps = torch.finfo(problem.A.dtype).eps
        self.X, self.R = problem.start()
        self.value = torch.zeros_like(self.X)
        self.best = self.X.clone()
        first = problem.b_norms if problem.x0 is None else norms(self.space, self.R)
        self.norm, self.smallest, self.looked = list(first), list(first), list(first)
        self.largest = [max(pair) for pair in zip(first, problem.b_norms, strict=True)]
        self.measure = [math.inf] * len(first)  # smallest |M^(1/2) r|, or the first
        self.size = [0.0] * len(first)  # |A d| / |d|: from below, the norm of A
        self.steps = [0] * len(first)
        self.status: list[SolveStatus | None] = [None] * len(first)
        self.running = list(range(len(first)))
        for j, norm in enumerate(first):
            self._judge_size(j, norm)

    def run(self, limit: int, info: dict[str, Any] | None = None) -> Outcome:
        """Take at most ``limit`` steps."""
        step = 0
        self.problem.note(step, self.norm)
        self._leave()
        while self.running and step < limit:
            D, Z = self.corrections.next(self.R)
            if self.monotone and self._measured(Z):
                keep = self._leave()
                if not self.running:
                    break
                D = D if D.dim() == 1 else take(D, keep)
            step += 1
            self._advance(D, look=step % _LOOK == 0)
            self.problem.note(step, self.norm)
        for j in self.running:
            self.status[j] = SolveStatus.max_steps
        self._leave()
        return Outcome(
            self.value,
            [status or SolveStatus.max_steps for status in self.status],
            steps=max(self.steps),
            residuals=self.smallest,
            info={"column_steps": self.steps, **(info or {})},
        )

    def _advance(self, D: Tensor, *, look: bool) -> None:
        moved = norms(self.space, D)
        X = self.X + D
        R = self.problem.residual(X, self.running)
        found = norms(self.space, R)
        pairs = zip(self.running, found, strict=True)
        if look or any(norm > self.smallest[j] for j, norm in pairs):
            changed = norms(self.space, R - self.R)
            for j, change, length in zip(self.running, changed, moved, strict=True):
                if length > 0 and math.isfinite(change):
                    self.size[j] = max(self.size[j], change / length)
        rising = []
        for position, (j, norm) in enumerate(zip(self.running, found, strict=True)):
            self.steps[j] += 1
            # Also where the norm is NaN: the iterate before is the best one.
            if not norm < self.smallest[j] and self.norm[j] == self.smallest[j]:
                rising.append(position)
        if rising:
            self._keep_best(rising)
        self.X, self.R = X, R
        for j, norm in zip(self.running, found, strict=True):
            self.norm[j] = norm
            self.smallest[j] = min(self.smallest[j], norm) if norm == norm else self.smallest[j]
            self._judge_size(j, norm)
        if look:
            self._look()
        self._leave()

    def _judge_size(self, j: int, norm: float) -> None:
        if not math.isfinite(norm):
            self.status[j] = SolveStatus.non_finite
        elif norm <= self.tolerances[j]:
            self.status[j] = SolveStatus.converged
        elif not self.monotone and norm * math.sqrt(self.eps) > self.largest[j]:
            self.status[j] = SolveStatus.diverged

    def _measured(self, Z: Tensor) -> bool:
        """Look at |M^(1/2) r|; returns whether a column ends."""
        found = dots(self.space, self.R, Z)
        levels: list[float] | None = None
        ended = False
        for position, (j, square) in enumerate(zip(self.running, found, strict=True)):
            if not 0 < square < math.inf:
                finite = math.isfinite(square)
                self.status[j] = (
                    SolveStatus.indefinite_preconditioner if finite else SolveStatus.non_finite
                )
                ended = True
                continue
            size = math.sqrt(square)
            if size > 1.001 * self.measure[j]:
                levels = levels or self._levels()
                if self.norm[j] > 1e3 * levels[position]:
                    self.status[j], ended = SolveStatus.diverged, True
            if self.measure[j] == math.inf or not self.polynomial:
                self.measure[j] = min(self.measure[j], size)
        return ended

    def _levels(self) -> list[float]:
        """How large rounding of ``A`` and ``x`` makes the residuals."""
        sizes = norms(self.space, self.X)
        return [
            self.eps * (self.size[j] * x + self.problem.b_norms[j])
            for j, x in zip(self.running, sizes, strict=True)
        ]

    def _look(self) -> None:
        """End the columns whose residual is down to rounding, or does not fall any more."""
        for j, level in zip(self.running, self._levels(), strict=True):
            if self.status[j] is not None:
                continue
            norm, before = self.smallest[j], self.looked[j]
            rounding = norm <= min(8 * level, 0.1 * self.problem.b_norms[j])
            if rounding and norm > 0.5 * before:
                self.status[j] = SolveStatus.precision
            elif self.monotone and norm > (1 - 1e-8) * before:
                self.status[j] = SolveStatus.stagnation
            self.looked[j] = norm

    def _keep_best(self, positions: Sequence[int]) -> None:
        """Keep the iterates before this step, whose residuals are the smallest so far."""
        if self.X.dim() == 1:
            self.best.copy_(self.X)
        else:
            self.best[:, [self.running[p] for p in positions]] = take(self.X, positions)

    def _leave(self) -> list[int]:
        """Take the columns that have a status out of the block; returns the places of the rest."""
        keep = [p for p, j in enumerate(self.running) if self.status[j] is None]
        if len(keep) == len(self.running):
            return keep
        for p, j in enumerate(self.running):
            if self.status[j] is None:
                continue
            latest = self.norm[j] == self.smallest[j]
            if self.X.dim() == 1:
                self.value = self.X if latest else self.best
            elif latest:
                self.value[:, j] = self.X[:, p]
            else:
                self.value[:, j] = self.best[:, j]
        self.running = [self.running[p] for p in keep]
        if keep:
            self.X, self.R = take(self.X, keep), take(self.R, keep)
            self.corrections.keep(keep)
        return keep
