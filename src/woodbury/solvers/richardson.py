"""Richardson's iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from woodbury.decompositions.power import ExtremeEigenvalues, extreme_eigenvalues
from woodbury.errors import ArgumentError, NonFiniteError, TagError
from woodbury.operators.identity import Identity
from woodbury.solvers.preconditioned import KrylovState, Preconditioned, preconditioning
from woodbury.solvers.recipe import Outcome, Problem, State
from woodbury.solvers.stationary import Corrections, Iteration, Sweeps, is_monotone

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["Richardson", "RichardsonState", "find_spectrum", "require_hermitian"]

# Products that find the step.
_LANCZOS_STEPS = 10


@dataclass(frozen=True, eq=False)
class RichardsonState(KrylovState):
    """The step length in use, beside the preconditioner."""

    step: float


@dataclass(frozen=True)
class Richardson(Preconditioned):
    r"""$x \leftarrow x + \alpha M (b - A x)$, gradient descent on $\tfrac12 x^H A x - b^H x$.

    For hermitian $A$ and positive definite $M$ it converges exactly where $0 < \alpha \lambda < 2$
    for all eigenvalues $\lambda$ of $M A$. With the best step $2 / (\lambda_{min} +
    \lambda_{max})$ every step lowers the error $\|x - A^{-1} b\|_{M^{-1}}$ by
    $(\kappa - 1) / (\kappa + 1)$ or better. Where it diverges the first rise of
    $\|M^{1/2} (b - A x)\|$ shows it, and the status says so.

    As a preconditioner it is ``sweeps`` steps from zero.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 n``.
        preconditioner: $M$, an operator or a recipe.
        step: $\alpha$. By default $2 / (\lambda_{min} + \lambda_{max})$ with the ends of the
            spectrum of $M A$ from 10 Lanczos steps, but at most $1.8 / \lambda_{max}$: that costs a
            tenth of the speed at the lower end, and the upper end is damped also where
            $\lambda_{min}$ is 0. Needed where $A$ or $M$ is not hermitian.
        sweeps: steps taken where it preconditions.

    Raises:
        TagError: no step is given, and the operator or the preconditioner is not hermitian.
        ArgumentError: ``step`` is not positive, or a limit makes no sense.
        NonFiniteError: no step is given and a product is NaN or infinite.

    Cost: one product, and one with the preconditioner, per step; one more product to start from
    ``x0``, and 10, once, to find the step. Memory of 4 blocks ``[n, k]``.

    Source: Richardson (1910); Saad, "Iterative methods for sparse linear systems" (2nd ed.), 4.2.1.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal, Richardson, solve
        >>> A = Diagonal(torch.tensor([1.0, 2.0, 4.0]), tags={"positive_definite"})
        >>> solution = solve(A, torch.ones(3), Richardson(rtol=1e-6))
        >>> solution.value
        tensor([1.0000, 0.5000, 0.2500])
        >>> round(solution.info["step"], 3)
        0.4
    """

    step: float | None = field(default=None, kw_only=True)
    sweeps: int = field(default=1, kw_only=True)

    hermitian_preconditioner = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step is not None and not 0 < self.step < math.inf:
            raise ArgumentError(f"step is {self.step}; it must be a positive number")
        if self.sweeps < 1:
            raise ArgumentError(f"sweeps is {self.sweeps}; it must be at least 1")

    def check(self, A: LinearOperator) -> None:
        """As for every recipe; a step can be found for hermitian operators only."""
        super().check(A)
        if self.step is None:
            require_hermitian(self, A, "step=... below 2 / (largest eigenvalue)")

    def _prepare(self, A: LinearOperator) -> RichardsonState:
        state = super()._prepare(A)
        M, products, step = state.preconditioner, state.products, self.step
        if step is None:
            found = find_spectrum(A, M, _LANCZOS_STEPS)
            products += found.products
            top = found.radius or 1.0  # for the zero operator any step is as good
            step = 2 / (top + max(found.smallest, top / 9))
        return RichardsonState.of(self, A, products, preconditioner=M, step=step)

    def as_preconditioner(self, A: LinearOperator, state: State) -> LinearOperator:
        """``sweeps`` steps from zero, as an operator."""
        assert isinstance(state, RichardsonState)  # made by _prepare
        M = state.preconditioner
        if M is None:
            M = Identity(A.shape[0], dtype=A.dtype, device=A.device, space=A.space)
        step = state.step * M
        return step if self.sweeps == 1 else Sweeps(A, step, self.sweeps)

    def _apply(self, A: LinearOperator, state: RichardsonState, B: Tensor) -> Tensor:
        precondition = preconditioning(self.as_preconditioner(A, state))
        assert precondition is not None
        return precondition(B)

    def _run(self, problem: Problem, state: RichardsonState) -> Outcome:
        M = state.preconditioner
        loop = Iteration(
            problem,
            Corrections(M, state.step),
            problem.tolerances(self.rtol, self.atol),
            monotone=is_monotone(problem.A, M),
        )
        return loop.run(self.limit(problem.A), {"step": state.step})


def require_hermitian(recipe: Any, A: LinearOperator, instead: str) -> None:
    """Raise unless the spectrum of ``A`` can be bounded by Lanczos."""
    if "hermitian" not in A.tags:
        name = type(recipe).__name__
        raise TagError(
            f"{name} bounds the spectrum of hermitian operators only, {type(A).__name__} has tags "
            f"{sorted(A.tags)}: give {instead}, or promise 'hermitian' where the operator is made"
        )


def find_spectrum(A: LinearOperator, M: LinearOperator | None, steps: int) -> ExtremeEigenvalues:
    """The ends of the spectrum of ``M A`` (of ``A`` where ``M`` is ``None``).

    Raises:
        NonFiniteError: the largest eigenvalue has no reciprocal in floating point.
    """
    found = extreme_eigenvalues(A, steps, preconditioner=M)
    if found.radius != 0 and not math.isfinite(1 / found.radius):
        raise NonFiniteError(
            f"the largest eigenvalue of {type(A).__name__} is about {found.radius}, so there is no "
            "step; scale the operator"
        )
    return found
