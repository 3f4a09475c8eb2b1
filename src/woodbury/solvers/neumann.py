"""The truncated Neumann series."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.decompositions.power import extreme_eigenvalues
from woodbury.errors import ArgumentError, NonFiniteError, TagError
from woodbury.solvers.columns import norms
from woodbury.solvers.recipe import Outcome, Problem, Recipe, State
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["Neumann", "NeumannState"]

# Products that find the step: the largest Ritz value plus its error then bounds the spectrum.
_LANCZOS_STEPS = 10


@dataclass(frozen=True, eq=False)
class NeumannState(State):
    """The step length in use."""

    step: float


@dataclass(frozen=True)
class Neumann(Recipe):
    r"""$x = \alpha \sum_{j=0}^{K} (I - \alpha A)^j\, b$ with ``K = terms``: ``K + 1`` summands.

    The error relative to $A^{-1}b$ is at most $\|I - \alpha A\|^{K+1}$. $K$ steps of gradient
    descent of length $\alpha$ that are differentiated by unrolling give ``terms = K - 1``. The
    status is ``completed``: the series aims at no tolerance, the residual says what it reached. For
    a hermitian operator $\|b - A x\|$ cannot rise from one term to the next unless the series
    diverges; where it does, the sum before is returned with the status ``diverged``.

    Args:
        terms: $K \ge 0$; ``K = 0`` is $x = \alpha b$.
        step: $\alpha$, which must be below $2 / \lambda_{max}$. By default one over an upper bound
            of $|\lambda|$ from 10 Lanczos steps. Needed where the operator is not hermitian.

    Raises:
        ArgumentError: ``terms`` is negative or ``step`` is not positive.
        TagError: no step is given and the operator is not tagged hermitian.
        NonFiniteError: no step is given and a product is NaN or infinite.

    Cost: ``terms`` products and one for the residual; 10 more, once, where the step is found.
    Memory of 3 blocks ``[n, k]``.

    Source: Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit
    differentiation" (2020), algorithm 3, with the factor $\alpha$ that its pseudocode leaves out.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal, Neumann, solve
        >>> A = Diagonal(torch.tensor([1.0, 2.0]))
        >>> solve(A, torch.ones(2), Neumann(terms=20, step=0.5)).value
        tensor([1.0000, 0.5000])
    """

    terms: int
    step: float | None = None

    def __post_init__(self) -> None:
        if self.terms < 0:
            raise ArgumentError(f"terms is {self.terms}; it must be >= 0")
        if self.step is not None and not 0 < self.step < math.inf:
            raise ArgumentError(f"step is {self.step}; it must be a positive number")

    def check(self, A: LinearOperator) -> None:
        """As for every recipe; a step can be found for hermitian operators only."""
        super().check(A)
        if self.step is None and "hermitian" not in A.tags:
            raise TagError(
                f"Neumann finds its step for hermitian operators only, {type(A).__name__} has tags "
                f"{sorted(A.tags)}: give step=... below 2 / (largest eigenvalue), or promise "
                "'hermitian' where the operator is made"
            )

    def _prepare(self, A: LinearOperator) -> NeumannState:
        if self.step is not None:
            return NeumannState.of(self, A, step=self.step)
        found = extreme_eigenvalues(A, _LANCZOS_STEPS)
        if found.radius == 0:  # the zero operator: any step is as good
            return NeumannState.of(self, A, found.products, step=1.0)
        step = 1 / found.radius
        if not math.isfinite(step):
            raise NonFiniteError(
                f"the largest eigenvalue of {type(A).__name__} is about {found.radius}, so there "
                "is no step; scale the operator"
            )
        return NeumannState.of(self, A, found.products, step=step)

    def _apply(self, A: LinearOperator, state: NeumannState, B: Tensor) -> Tensor:
        X, V = state.step * B, B
        for _ in range(self.terms):
            V = V - state.step * (A @ V.to(A.dtype)).to(V.dtype)
            X = X + state.step * V
        return X

    def _run(self, problem: Problem, state: NeumannState) -> Outcome:
        return _Series(problem, state.step).run(self.terms)


class _Series:
    """Partial sums ``X`` and the next power ``V``, which is the residual of ``X``."""

    def __init__(self, problem: Problem, step: float) -> None:
        self.problem = problem
        self.space = problem.A.space
        self.step = step
        self.hermitian = "hermitian" in problem.A.tags
        self.X, self.V = problem.start()
        self.smallest = norms(self.space, self.V)  # residual so far, per column
        self.now = list(self.smallest)
        self.stopped: dict[int, SolveStatus] = {}
        self.rounding = 1e3 * torch.finfo(problem.A.dtype).eps

    def run(self, terms: int) -> Outcome:
        self.problem.note(0, self.now)
        term = 0
        for term in range(terms + 1):
            if len(self.stopped) == self.problem.width:
                break
            self.X.add_(self.V, alpha=self.step)
            last = term == terms
            # The last residual is taken from b, not from the recurrence: it goes into the result.
            W = self.problem.residual(self.X) if last else self.next_power()
            self.now = self.judge(norms(self.space, W), W)
            self.V = W
            self.problem.note(term + 1, self.now)
        statuses = [self.stopped.get(j, SolveStatus.completed) for j in range(self.problem.width)]
        return Outcome(
            self.X,
            statuses,
            steps=term,
            residuals=None if self.stopped else self.now,
            info={"step": self.step},
        )

    def next_power(self) -> Tensor:
        return self.V - self.step * self.problem.product(self.V)

    def judge(self, found: list[float], W: Tensor) -> list[float]:
        """Stop the columns whose residual rises, one term back; returns the residuals in force."""
        diverging = [
            j for j, norm in enumerate(found) if j not in self.stopped and not norm <= self.limit(j)
        ]
        for j in diverging:
            finite = math.isfinite(found[j])
            self.stopped[j] = SolveStatus.diverged if finite else SolveStatus.non_finite
            found[j] = self.now[j]
            if self.X.dim() == 1:
                self.X.sub_(self.V, alpha=self.step)
            else:
                self.X[:, j].sub_(self.V[:, j], alpha=self.step)
        for j in self.stopped:
            found[j] = self.now[j]
            (W if W.dim() == 1 else W[:, j]).zero_()
        self.smallest = [min(s, norm) for s, norm in zip(self.smallest, found, strict=True)]
        return found

    def limit(self, j: int) -> float:
        """The residual above which the series of a column cannot be converging."""
        if self.hermitian:
            return 1.01 * self.smallest[j] + self.rounding * self.problem.b_norms[j]
        # Powers of a matrix that is not normal may grow before they fall.
        return self.problem.b_norms[j] / math.sqrt(torch.finfo(self.problem.A.dtype).eps)
