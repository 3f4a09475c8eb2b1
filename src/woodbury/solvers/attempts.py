"""The recipes of a plan, one after the other, until one gives an answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from woodbury.errors import (
    BudgetError,
    NonFiniteError,
    NotPositiveDefiniteError,
    RankError,
    SingularError,
    StructureError,
)
from woodbury.solvers.cholesky import Cholesky
from woodbury.solvers.columns import norms, width
from woodbury.solvers.eigh import Eigh
from woodbury.solvers.lsmr import LSMR
from woodbury.solvers.lu import LU
from woodbury.solvers.preconditioned import Preconditioned
from woodbury.solvers.qr import QR
from woodbury.solvers.recipe import Outcome, Problem, Recipe, State
from woodbury.solvers.solution import SolveStatus
from woodbury.solvers.watchdog import AbandonedError, Watchdog

if TYPE_CHECKING:
    from torch import Tensor

    from woodbury.solvers.auto import Auto

__all__ = ["Attempts", "AutoState", "Choice"]

_BREAKS = (
    NotPositiveDefiniteError,
    SingularError,
    StructureError,
    BudgetError,
    RankError,
    NonFiniteError,
)


@dataclass(frozen=True)
class Choice:
    """One recipe of a plan.

    Attributes:
        recipe: what is tried.
        why: the reason, in words.
        steps: products for each column that it may take before the next one is tried; ``None`` for
            no limit.
        hopeless: products for each column that it must not look like needing beyond those taken;
            ``None`` for as many as it likes.
        patience: steps before the rate of convergence is judged.

    Example:
        >>> import torch
        >>> from woodbury import Auto, FunctionOperator
        >>> A = FunctionOperator(lambda X: 2 * X, (50, 50), tags={"positive_definite"})
        >>> [type(choice.recipe).__name__ for choice in Auto().plan(A)]
        ['CG', 'Cholesky', 'Eigh']
    """

    recipe: Recipe
    why: str
    steps: int | None = None
    hopeless: int | None = None
    patience: int = 12


@dataclass(frozen=True, eq=False)
class AutoState(State):
    """What worked last time.

    Attributes:
        chosen: the recipe that gave the last answer, or ``None``.
        inner: what it had prepared.

    Example:
        >>> import torch
        >>> from woodbury import Auto, Diagonal, solve
        >>> solve(Diagonal(torch.tensor([2.0])), torch.ones(1), Auto()).state.chosen
        Structural()
    """

    chosen: Recipe | None = None
    inner: State | None = None


class Attempts:
    """The recipes of a plan, one after the other, until one gives an answer."""

    def __init__(self, auto: Auto, problem: Problem, state: AutoState) -> None:
        self.auto, self.problem, self.state = auto, problem, state
        self.progress, self.history = problem.progress, problem.history
        self.tried: list[dict[str, Any]] = []
        self.best: tuple[float, Outcome, Choice, State] | None = None

    def run(self) -> Outcome:
        """The first answer that will do, or the best one of all."""
        choices = self.auto.plan(self.problem.A, self.problem.width)
        if self.state.chosen is not None:
            first = Choice(self.state.chosen, "it worked for the solve before")
            choices = [first, *choices]
        for number, choice in enumerate(choices):
            inner = self.state.inner if number == 0 and self.state.chosen is not None else None
            if self.spent():
                break
            if self.attempt(choice, inner):
                break
        return self.result()

    def spent(self) -> bool:
        """Whether the budget of products is used up."""
        limit = self.auto.products
        return limit is not None and self.problem.products >= limit

    def attempt(self, choice: Choice, inner: State | None) -> bool:
        """Try one recipe; returns whether its answer will do."""
        problem, before = self.problem, self.problem.products
        cost = 2 if isinstance(choice.recipe, LSMR) else 1
        recipe, steps, hopeless = choice.recipe, choice.steps, choice.hopeless
        if self.auto.products is not None:
            left = self.auto.products - before
            if left < 2 * min(problem.A.shape):  # nothing could come after it
                steps = hopeless = None
            if isinstance(recipe, Preconditioned):
                fitting = max(0, left // (cost * problem.width) - 1)
                recipe = replace(recipe, max_steps=fitting)
            elif isinstance(recipe, (Cholesky, Eigh, LU, QR)) and left < min(problem.A.shape):
                return self.note(choice, before, "the budget does not hold its products")
        dog = Watchdog(
            self.auto.rtol,
            steps,
            hopeless,
            patience=choice.patience,
            cost=cost,
            then=self.progress,
        )
        problem.progress = dog
        if self.history is not None:
            self.history.clear()
        try:
            recipe.check(problem.A)
            if inner is None:
                inner = recipe.prepare(problem.A)
                problem.products += inner.products
            outcome = recipe._run(problem, inner)
        except AbandonedError as reason:
            return self.note(choice, before, str(reason))
        except _BREAKS as error:
            return self.note(choice, before, f"{type(error).__name__}: {error}")
        finally:
            problem.progress = self.progress
        return self.judge(choice, inner, outcome, before)

    def judge(self, choice: Choice, inner: State, outcome: Outcome, before: int) -> bool:
        """Keep the answer if it is the best so far; returns whether it is good enough."""
        problem = self.problem
        X = outcome.value.to(problem.A.dtype).to(outcome.value.dtype)
        R = problem.residual(X) if outcome.residuals is None else None
        outcome.residuals = norms(problem.A.out_space, R) if R is not None else outcome.residuals
        residuals = outcome.residuals
        assert residuals is not None
        pairs = list(zip(residuals, problem.b_norms, strict=True))
        worst = max((r / size for r, size in pairs), default=0.0)
        tolerances = problem.tolerances(self.auto.rtol, self.auto.atol)
        statuses = self.statuses(outcome, residuals, tolerances)
        outcome.statuses = statuses
        good = all(status.ok for status in statuses)
        if math.isfinite(worst) and (self.best is None or good or worst < self.best[0]):
            self.best = worst, outcome, choice, inner
        worst_status = SolveStatus.worst(statuses)
        self.note(choice, before, worst_status.name, answered=good)
        return good

    def statuses(
        self, outcome: Outcome, residuals: Sequence[float], tolerances: Sequence[float]
    ) -> list[SolveStatus]:
        """A fixed amount of work is done well where the residual is small all the same."""
        found: list[SolveStatus] = []
        normal: list[float] | None = None
        for j, status in enumerate(outcome.statuses):
            if residuals[j] <= tolerances[j]:
                found.append(SolveStatus.converged)
            elif status is SolveStatus.completed:
                found.append(SolveStatus.stagnation)
            elif status is SolveStatus.inconsistent:
                normal = self.normal_residuals(outcome.value) if normal is None else normal
                fine = normal[j] <= max(self.auto.rtol, 1e-7)
                outcome.info["normal_residual"] = normal
                found.append(SolveStatus.least_squares if fine else status)
            else:
                found.append(status)
        return found

    def normal_residuals(self, X: Tensor) -> list[float]:
        r"""$\|A^H r\| / (\|A\| \|r\|)$ with the norm of ``A`` from below, by one more product."""
        A, problem = self.problem.A, self.problem
        R = problem.residual(X)
        of_normal = norms(A.space, problem.adjoint_product(R))
        sizes = norms(A.out_space, R)
        images = norms(A.out_space, problem.product(problem.adjoint_product(problem.b)))
        before = norms(A.space, problem.adjoint_product(problem.b))
        scale = max((i / s for i, s in zip(images, before, strict=True) if s > 0), default=0.0)
        return [
            g / (scale * r) if scale * r > 0 else 0.0 for g, r in zip(of_normal, sizes, strict=True)
        ]

    def note(self, choice: Choice, before: int, end: str, *, answered: bool = False) -> bool:
        """Write down how an attempt ended; returns whether it answered."""
        self.tried.append(
            {
                "recipe": repr(choice.recipe),
                "why": choice.why,
                "end": end,
                "products": self.problem.products - before,
            }
        )
        return answered

    def result(self) -> Outcome:
        """The best answer, with what was tried; the first iterate where there is none."""
        problem = self.problem
        if self.best is None:
            shape = problem.A.shape[1:] + problem.b.shape[1:]
            value = problem.b.new_zeros(shape) if problem.x0 is None else problem.x0.clone()
            failed = [SolveStatus.max_steps] * width(problem.b)
            return Outcome(value, failed, info={"tried": self.tried})
        _, outcome, choice, inner = self.best
        outcome.info["tried"] = self.tried
        outcome.info["chosen"] = repr(choice.recipe)
        outcome.info["why"] = choice.why
        outcome.state = replace(self.state, chosen=choice.recipe, inner=inner)
        return outcome
