"""The truncated Neumann series."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.solvers.columns import norms
from woodbury.solvers.preconditioned import KrylovState, preconditioning
from woodbury.solvers.recipe import Outcome, Problem, Recipe, State
from woodbury.solvers.richardson import Richardson, find_spectrum, require_hermitian
from woodbury.solvers.solution import SolveStatus
from woodbury.solvers.stationary import Sweeps

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["Neumann", "NeumannState"]

# Products that find the step: the largest Ritz value plus its error then bounds the spectrum.
_LANCZOS_STEPS = 10


@dataclass(frozen=True, eq=False)
class NeumannState(KrylovState):
    """The step length in use, beside the preconditioner."""

    step: float


@dataclass(frozen=True)
class Neumann(Recipe):
    r"""$x = \alpha \sum_{j=0}^{K} (I - \alpha M A)^j M\, b$ with ``K = terms``: ``K + 1`` summands.

    $M$ is the preconditioner, $I$ if there is none. The error relative to $A^{-1}b$ is at most
    $\|I - \alpha M A\|^{K+1}$. Without preconditioner, $K$ steps of gradient
    descent of length $\alpha$ that are differentiated by unrolling give ``terms = K - 1``. The
    status is ``completed``: the series aims at no tolerance, the residual says what it reached. For
    a hermitian operator $\|b - A x\|$ cannot rise from one term to the next unless the series
    diverges; where it does, the sum before is returned with the status ``diverged``.

    Args:
        terms: $K \ge 0$; ``K = 0`` is $x = \alpha b$.
        step: $\alpha$, which must be below $2 / \lambda_{max}(M A)$. By default one over an upper
            bound of $|\lambda(M A)|$ from 10 Lanczos steps. Needed where the operator or the
            preconditioner is not hermitian.
        preconditioner: $M$, an operator or a recipe (``Jacobi()``).

    Raises:
        ArgumentError: ``terms`` is negative or ``step`` is not positive.
        TagError: no step is given, and the operator or the preconditioner is not tagged hermitian.
        NonFiniteError: no step is given and a product is NaN or infinite.
        NotPositiveDefiniteError: no step is given and the preconditioner is not positive definite.

    Cost: ``terms`` products and one for the residual, ``terms + 1`` with the preconditioner; 10
    more, once, where the step is found. Memory of 3 blocks ``[n, k]``, of 4 with a preconditioner.

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
    preconditioner: LinearOperator | Recipe | None = None

    def __post_init__(self) -> None:
        if self.terms < 0:
            raise ArgumentError(f"terms is {self.terms}; it must be >= 0")
        if self.step is not None and not 0 < self.step < math.inf:
            raise ArgumentError(f"step is {self.step}; it must be a positive number")

    def check(self, A: LinearOperator) -> None:
        """As for every recipe; a step can be found for hermitian operators only."""
        super().check(A)
        if self.step is None:
            require_hermitian(self, A, "step=... below 2 / (largest eigenvalue)")

    def _prepare(self, A: LinearOperator) -> NeumannState:
        # The series is Richardson's iteration, unrolled.
        series = Richardson(step=self.step or 1.0, preconditioner=self.preconditioner)
        state = series.prepare(A)
        assert isinstance(state, KrylovState)  # made by Richardson
        M, products, step = state.preconditioner, state.products, self.step
        if step is None:
            found = find_spectrum(A, M, _LANCZOS_STEPS)
            products += found.products
            step = 1 / (found.radius or 1.0)  # for the zero operator any step is as good
        return NeumannState.of(self, A, products, preconditioner=M, step=step)

    def adjoint_state(self, A: LinearOperator, state: State) -> State:
        """The same step, and the adjoint of the preconditioner."""
        assert isinstance(state, NeumannState)  # made by _prepare
        M = state.preconditioner
        return replace(state, shape=A.H.shape, preconditioner=None if M is None else M.H)

    def as_preconditioner(self, A: LinearOperator, state: State) -> LinearOperator:
        """The truncated series as an operator."""
        assert isinstance(state, NeumannState)  # made by _prepare
        if state.preconditioner is None:
            return super().as_preconditioner(A, state)
        return Sweeps(A, state.step * state.preconditioner, self.terms + 1)

    def _apply(self, A: LinearOperator, state: NeumannState, B: Tensor) -> Tensor:
        precondition = preconditioning(state.preconditioner)
        V = B
        X = Z = B if precondition is None else precondition(B)
        for _ in range(self.terms):
            V = V.sub((A @ Z.to(A.dtype)).to(V.dtype), alpha=state.step)
            Z = V if precondition is None else precondition(V)
            X = X + Z
        return state.step * X

    def _run(self, problem: Problem, state: NeumannState) -> Outcome:
        return _Series(problem, state).run(self.terms)


class _Series:
    """Partial sums ``X``, the residual ``V`` of ``X``, and the next summand ``step * Z``."""

    def __init__(self, problem: Problem, state: NeumannState) -> None:
        self.problem = problem
        self.space = problem.A.space
        self.step = state.step
        self.precondition = preconditioning(state.preconditioner)
        # Residuals fall in a norm of their own where there is a preconditioner.
        self.hermitian = "hermitian" in problem.A.tags and self.precondition is None
        self.X, self.V = problem.start()
        self.Z = self.V
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
            self.Z = self.V if self.precondition is None else self.precondition(self.V)
            self.X.add_(self.Z, alpha=self.step)
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
        return self.V - self.step * self.problem.product(self.Z)

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
                self.X.sub_(self.Z, alpha=self.step)
            else:
                self.X[:, j].sub_(self.Z[:, j], alpha=self.step)
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
