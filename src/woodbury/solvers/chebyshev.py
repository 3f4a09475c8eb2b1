"""Chebyshev's iteration, a solver and a polynomial preconditioner."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.operators.base import LinearOperator
from woodbury.solvers.columns import take
from woodbury.solvers.preconditioned import KrylovState, Preconditioned, preconditioning
from woodbury.solvers.recipe import Outcome, Problem, State
from woodbury.solvers.richardson import find_spectrum, require_hermitian
from woodbury.solvers.stationary import Corrections, Iteration, is_monotone

if TYPE_CHECKING:
    from woodbury.operators.tags import Tags

__all__ = ["Chebyshev", "ChebyshevState"]

# Products that bound the spectrum.
_LANCZOS_STEPS = 20
# Ratio of the bounds of a polynomial that preconditions: conjugate gradients find the few small
# eigenvalues themselves, and a low degree spread over all of them would help none.
_SPREAD = 30


@dataclass(frozen=True, eq=False)
class ChebyshevState(KrylovState):
    """The interval that holds the spectrum, beside the preconditioner."""

    bounds: tuple[float, float]


@dataclass(frozen=True)
class Chebyshev(Preconditioned):
    r"""The polynomial in $M A$ whose residual is smallest on a whole interval $[a, b]$.

    With $\theta = (a + b) / 2$ and $\delta = (b - a) / 2$ the residual after $k$ steps is
    $r_k = T_k\!\left(\frac{\theta - A M}{\delta}\right) r_0 / T_k(\theta / \delta)$, so that for
    hermitian $A$ and positive definite $M$ with all eigenvalues of $M A$ in $[a, b]$

    $$\|r_k\|_M \le \frac{\|r_0\|_M}{T_k(\theta / \delta)} \le 2 \left(\frac{\sqrt\kappa - 1}
    {\sqrt\kappa + 1}\right)^k \|r_0\|_M, \qquad \kappa = b / a:$$

    the bound of conjugate gradients, without one inner product that a step would wait for. An
    eigenvalue beyond $b$ lets it diverge, which the status says; one in $(0, a)$ slows it down.

    As a preconditioner it is the polynomial of fixed ``degree``, hermitian, and positive definite
    for positive definite $A$ with eigenvalues below $b$. Where no bounds are given it is that of
    $[\max(a, b / 30), b]$, which leaves the smallest eigenvalues to the method it preconditions.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 n``.
        preconditioner: $M$, an operator or a recipe.
        bounds: $(a, b)$, $0 < a \le b$. By default from 20 Lanczos steps: $b$ is the largest Ritz
            value with its error added; $a$ the smallest with its error taken off, at least a tenth
            of it, or $10^{-3} b$ where it is 0 to rounding. Needed where $A$ or $M$ is not
            hermitian (the eigenvalues of $M A$ must be real).
        degree: of the polynomial, at least 0, where it preconditions.

    Raises:
        TagError: no bounds are given, and the operator or the preconditioner is not hermitian.
        ArgumentError: ``bounds``, ``degree`` or a limit makes no sense.
        NonFiniteError: no bounds are given and a product is NaN or infinite.

    Cost: one product, and one with the preconditioner, per step; one more product to start from
    ``x0``, and 20, once, for the bounds. Where it preconditions, ``degree`` products each time,
    which ``Solution.products`` of the other method does not count. Memory of 5 blocks ``[n, k]``.

    Source: Golub and Varga, "Chebyshev semi-iterative methods" (1961); Saad, "Iterative methods for
    sparse linear systems" (2nd ed.), algorithm 12.1.

    Example:
        >>> import torch
        >>> from woodbury import Chebyshev, Diagonal, solve
        >>> A = Diagonal(torch.linspace(1.0, 9.0, 100), tags={"positive_definite"})
        >>> solution = solve(A, torch.ones(100), Chebyshev(rtol=1e-5, bounds=(1.0, 9.0)))
        >>> solution.ok, solution.steps <= 18  # 2 / 2^k = 1e-5 at k = 17.6
        (True, True)
    """

    bounds: tuple[float, float] | None = field(default=None, kw_only=True)
    degree: int = field(default=3, kw_only=True)

    hermitian_preconditioner = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bounds is not None:
            low, high = self.bounds
            if not 0 < low <= high < math.inf:
                raise ArgumentError(
                    f"bounds are {self.bounds}; they must be two numbers 0 < a <= b that hold the "
                    "eigenvalues"
                )
        if self.degree < 0:
            raise ArgumentError(f"degree is {self.degree}; it must be >= 0")

    def check(self, A: LinearOperator) -> None:
        """As for every recipe; bounds can be found for hermitian operators only."""
        super().check(A)
        if self.bounds is None:
            require_hermitian(self, A, "bounds=(a, b) that hold the eigenvalues")

    def _prepare(self, A: LinearOperator) -> ChebyshevState:
        state = super()._prepare(A)
        M, products, bounds = state.preconditioner, state.products, self.bounds
        if bounds is None:
            found = find_spectrum(A, M, _LANCZOS_STEPS)
            products += found.products
            high = found.radius or 1.0  # for the zero operator any bound is as good
            low = max(found.smallest - found.smallest_error, 0.1 * found.smallest)
            # Else A is singular or indefinite, and there is no bound to find.
            known = low > math.sqrt(torch.finfo(A.dtype).eps) * high
            bounds = (low if known else 1e-3 * high, high)
        return ChebyshevState.of(self, A, products, preconditioner=M, bounds=bounds)

    def as_preconditioner(self, A: LinearOperator, state: State) -> LinearOperator:
        """The polynomial of fixed degree, as an operator."""
        assert isinstance(state, ChebyshevState)  # made by _prepare
        low, high = state.bounds
        if self.bounds is None:
            low = max(low, high / _SPREAD)
        return ChebyshevPolynomial(A, state.preconditioner, (low, high), self.degree)

    def _apply(self, A: LinearOperator, state: ChebyshevState, B: Tensor) -> Tensor:
        precondition = preconditioning(self.as_preconditioner(A, state))
        assert precondition is not None
        return precondition(B)

    def _run(self, problem: Problem, state: ChebyshevState) -> Outcome:
        M = state.preconditioner
        loop = Iteration(
            problem,
            _Corrections(M, state.bounds),
            problem.tolerances(self.rtol, self.atol),
            monotone=is_monotone(problem.A, M),
            polynomial=True,
        )
        return loop.run(self.limit(problem.A), {"bounds": state.bounds})


class _Recurrence:
    r"""The scalars of $d_k = \rho_k \rho_{k-1} d_{k-1} + (2 \rho_k / \delta) z_k$.

    Written without a division by $\delta$, which is 0 where the bounds are equal.
    """

    def __init__(self, bounds: tuple[float, float]) -> None:
        low, high = bounds
        self.theta, self.delta = (high + low) / 2, (high - low) / 2
        self.rho = math.nan

    def next(self) -> tuple[float, float]:
        """The factors of the last direction and of ``z``."""
        if math.isnan(self.rho):
            self.rho = self.delta / self.theta
            return 0.0, 1 / self.theta
        below = 2 * self.theta - self.delta * self.rho
        last, self.rho = self.rho, self.delta / below
        return self.rho * last, 2 / below


class _Corrections(Corrections):
    """The directions of Chebyshev's iteration."""

    def __init__(self, M: LinearOperator | None, bounds: tuple[float, float]) -> None:
        super().__init__(M)
        self.recurrence = _Recurrence(bounds)
        self.last: Tensor | None = None

    def direction(self, Z: Tensor) -> Tensor:
        momentum, step = self.recurrence.next()
        D = step * Z
        if self.last is not None:
            D.add_(self.last, alpha=momentum)
        self.last = D
        return D

    def keep(self, columns: Sequence[int]) -> None:
        if self.last is not None:
            self.last = take(self.last, columns)


class ChebyshevPolynomial(LinearOperator):
    """``p(M A) M`` with Chebyshev's polynomial of fixed degree: ``degree + 1`` steps from zero."""

    def __init__(
        self,
        operator: LinearOperator,
        M: LinearOperator | None,
        bounds: tuple[float, float],
        degree: int,
    ) -> None:
        tags: Tags = operator.tags & {"hermitian", "positive_definite"}
        if M is not None:
            tags &= M.tags
        super().__init__(
            operator.shape,
            dtype=operator.dtype,
            device=operator.device,
            tags=tags,
            space=operator.out_space,
            out_space=operator.space,
        )
        self.operator, self.M, self.bounds, self.degree = operator, M, bounds, degree

    def _matmat(self, X: Tensor) -> Tensor:
        M = None if self.M is None else self.M._matmat
        return self._polynomial(X, self.operator._matmat, M)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        M = None if self.M is None else self.M._rmatmat
        return self._polynomial(Y, self.operator._rmatmat, M)

    def _polynomial(
        self,
        B: Tensor,
        A: Callable[[Tensor], Tensor],
        M: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        recurrence = _Recurrence(self.bounds)
        X = D = B.new_zeros(B.shape)
        for step in range(self.degree + 1):
            R = B - A(X) if step else B
            momentum, factor = recurrence.next()
            D = momentum * D + factor * (R if M is None else M(R))
            X = X + D
        return X
