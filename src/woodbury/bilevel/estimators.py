"""How a hypergradient is estimated: one argument, and what it may keep between outer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.implicit.modes import Implicit, Mode, Phantom, Steps, Unrolled
from woodbury.operators import LinearOperator
from woodbury.solvers import CG, Neumann, Recipe, Solution
from woodbury.solvers.packing import pack, unpack
from woodbury.solvers.recipe import State
from woodbury.solvers.solution import SolveStatus
from woodbury.solvers.solve import solve_with_policy

if TYPE_CHECKING:
    from woodbury.solvers.solve import OnFailure

__all__ = ["Estimator", "FiniteDifference", "HypergradientState", "UnrolledDescent"]

Estimator = Mode | Recipe


@dataclass(frozen=True)
class UnrolledDescent(Mode):
    r"""By differentiating ``steps`` steps of gradient descent from where the parameters are.

    The derivative of $f(w_K(\lambda), \lambda)$ with $w_{j+1} = w_j - \alpha \nabla_w g(w_j,
    \lambda)$, exact for that function of $\lambda$. From $w^*$ it is the Neumann series with
    ``terms = steps - 1``; from elsewhere it needs no solution, and its bias falls as
    $\|I - \alpha H\|^K$. The parameters stay where they are.

    Args:
        steps: $K \ge 1$.
        step: $\alpha$; by default $1 / \lambda_{max}$ of the inner Hessian (10 or so products).

    Raises:
        ArgumentError: a value that makes no sense.

    Cost: ``2 steps + 1`` gradients in time and the graph of all steps in memory.

    Source: Franceschi, Donini, Frasconi and Pontil, "Forward and reverse gradient-based
    hyperparameter optimization" (2017); with few steps Shaban et al., "Truncated back-propagation
    for bilevel optimization" (2019).

    Example:
        >>> from woodbury.bilevel import UnrolledDescent
        >>> UnrolledDescent(steps=20, step=0.1)
        UnrolledDescent(steps=20, step=0.1)
    """

    steps: int
    step: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ArgumentError(f"steps is {self.steps!r}; at least one step is differentiated")
        if self.step is not None and not 0 < self.step < math.inf:
            raise ArgumentError(f"step is {self.step}; it must be positive, or None")


@dataclass(frozen=True)
class FiniteDifference(Mode):
    r"""The implicit hypergradient with second derivatives by central differences of gradients.

    $$H v \approx \frac{\nabla_w g(w + \epsilon v) - \nabla_w g(w - \epsilon v)}{2\epsilon},
    \qquad
    J q \approx \frac{\nabla_\lambda g(w + \epsilon q) - \nabla_\lambda g(w - \epsilon q)}
    {2\epsilon},$$

    with an error $O(\epsilon^2)$, none where $g$ is quadratic in $w$. For losses with operations
    that cannot be differentiated twice (fused attention, recurrent kernels, a backward of one's
    own), and in the memory of a gradient. ``FiniteDifference(Neumann(terms=0, step=...))`` takes
    two gradients in all beside those of the two losses.

    Args:
        recipe: how to solve with $H$; default ``CG(rtol=1e-4)``.
        radius: $\|\epsilon v\|$ relative to ``max(1, |w|)``; by default the cube root of the
            rounding unit, which balances rounding and truncation.
        on_failure: what a failed solve does: ``"raise"``, ``"warn"``, give ``"nan"``, ``"ignore"``.

    Raises:
        ArgumentError: ``radius`` is not positive.

    Cost: two gradients for each product, and two for $J q$.

    Source: Liu, Simonyan and Yang, "DARTS: differentiable architecture search" (2019), equation 8,
    for the mixed derivative.

    Example:
        >>> from woodbury import Neumann
        >>> from woodbury.bilevel import FiniteDifference
        >>> FiniteDifference(Neumann(terms=0, step=0.1)).radius is None
        True
    """

    recipe: Recipe | None = None
    radius: float | None = None
    on_failure: OnFailure = "raise"

    def __post_init__(self) -> None:
        Implicit(self.recipe, self.on_failure)  # checks both
        if self.radius is not None and not 0 < self.radius < math.inf:
            raise ArgumentError(f"radius is {self.radius}; it must be positive, or None")


def as_mode(estimator: Estimator | None) -> Mode:
    """The mode an estimator stands for; a recipe is :class:`~woodbury.implicit.Implicit` with it.

    The modes that differentiate a few steps from the solution are their Neumann series.
    """
    if estimator is None:
        return Implicit()
    if isinstance(estimator, Recipe):
        return Implicit(estimator)
    if isinstance(estimator, Steps):
        damping = estimator.damping if isinstance(estimator, Phantom) else 1.0
        length = estimator.length
        if length is None and damping != 1:
            raise ArgumentError(
                "Phantom needs its step here: give step below 2 / (largest eigenvalue)"
            )
        step = None if length is None else damping * length
        return Implicit(Neumann(terms=estimator.count - 1, step=step))
    if isinstance(estimator, Unrolled):
        raise ArgumentError(
            "Unrolled() does not say what is unrolled; here UnrolledDescent(steps, step) does"
        )
    if not isinstance(estimator, Mode):
        raise ArgumentError(
            f"estimator is {type(estimator).__name__}; give a recipe such as CG() or Neumann(...), "
            "or a mode: Implicit, Truncated, OneStep, UnrolledDescent, FiniteDifference"
        )
    return estimator


class HypergradientState:
    r"""What one outer step leaves to the next: the adjoint, and what the recipe prepared.

    The last $q = H^{-1}\nabla_w f$ is where the next solve starts. A sketch or factor is used again
    until the certificate says that it is of another Hessian:

    - the solve failed, or its residual is more than ``refresh`` times what it was right after the
      last preparation: prepared anew, and solved again in the same step;
    - the residual is what was asked, but it took more than ``refresh`` times the steps: prepared
      anew for the next step.

    Args:
        warm_start: start from the last adjoint. By default for recipes that run to a tolerance;
            those of fixed work (``Neumann``, ``Nystrom``) then stay what their formula says.
        refresh: the factor, above 1; infinity never refreshes unless a solve fails.

    Attributes:
        adjoint: the last $q$ ``[p]``, or ``None``.
        refreshes: how often a recipe prepared anew because of the certificate.
        reason: why it last did.

    Raises:
        ArgumentError: ``refresh`` is not above 1.

    Example:
        >>> import torch
        >>> from woodbury import CG
        >>> from woodbury.bilevel import Bilevel, HypergradientState, estimate_hypergradient
        >>> inner = lambda w, a: 0.5 * (a * w.square()).sum() - w.sum()
        >>> w, a = torch.tensor([1.0, 0.5]), torch.tensor([1.0, 2.0])
        >>> problem = Bilevel(inner, lambda w, a: 0.5 * w.square().sum(), w, a)
        >>> state = HypergradientState()
        >>> first = estimate_hypergradient(problem, CG(), state=state)
        >>> again = estimate_hypergradient(problem, CG(), state=state)
        >>> first.solution.steps, again.solution.steps
        (2, 0)
    """

    _PLAIN = ("adjoint", "refreshes", "reason", "_residual", "_steps", "_stale")

    def __init__(self, *, warm_start: bool | None = None, refresh: float = 2.0) -> None:
        if not refresh > 1:
            raise ArgumentError(f"refresh is {refresh}; it must be above 1")
        self.warm_start = warm_start
        self.refresh = refresh
        self.adjoint: Tensor | None = None
        self.refreshes = 0
        self.reason = ""
        self._prepared: State | None = None
        self._residual = 0.0
        self._steps = 0
        self._stale = ""

    def solve(
        self, A: LinearOperator, b: Tensor, recipe: Recipe, on_failure: OnFailure
    ) -> tuple[Solution, str]:
        """Solve, and say why the recipe prepared anew (empty: it did not, or had nothing)."""
        x0 = self._start(b, recipe)
        reason = self._stale
        prepared = self._fitting(A, recipe)
        if prepared is not None and not reason:
            solution = _solve(A, b, recipe, x0, prepared, "ignore")
            reason = self._judge(solution, recipe)
            if not reason:
                self._keep(solution)
                return solution, ""
        solution = _solve(A, b, recipe, x0, None, on_failure)
        self._residual = float(solution.residual)
        self._steps, self._stale = solution.steps, ""
        self._keep(solution)
        if prepared is None:
            return solution, ""
        self.refreshes += 1
        self.reason = reason
        return solution, reason

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs: tensors, numbers and words only.

        ``torch.load(weights_only=True)`` reads it. What was prepared and holds anything else (a
        preconditioner of one's own, an incomplete factor) is prepared anew after loading.
        """
        found = {name.lstrip("_"): getattr(self, name) for name in self._PLAIN}
        return {**found, "prepared": None if self._prepared is None else pack(self._prepared)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as if ``state`` had been reached here.

        Raises:
            ArgumentError: ``state`` is of something else.
            DataError: what was prepared is not in the form of :meth:`state_dict`.
        """
        names = {name.lstrip("_"): name for name in self._PLAIN}
        if set(state) != {*names, "prepared"}:
            raise ArgumentError(
                f"the state holds {sorted(state)}, a HypergradientState has "
                f"{sorted([*names, 'prepared'])}"
            )
        prepared = state["prepared"]
        self._prepared = None if prepared is None else unpack(prepared)
        for name, own in names.items():
            setattr(self, own, state[name])

    def _start(self, b: Tensor, recipe: Recipe) -> Tensor | None:
        kept, wanted = self.adjoint, self.warm_start
        if kept is None or not (hasattr(recipe, "rtol") if wanted is None else wanted):
            return None
        fits = (kept.shape, kept.dtype, kept.device) == (b.shape, b.dtype, b.device)
        return kept if fits else None

    def _fitting(self, A: LinearOperator, recipe: Recipe) -> State | None:
        kept = self._prepared
        if kept is None or kept.recipe != recipe:
            return None
        fits = (kept.shape, kept.dtype, kept.device) == (A.shape, A.dtype, A.device)
        return kept if fits else None

    def _judge(self, solution: Solution, recipe: Recipe) -> str:
        """Why what was prepared is of no more use; empty where it is."""
        residual = float(solution.residual)
        if not solution.ok:
            return f"the solve ended with {solution.status.name}"
        floor = max(getattr(recipe, "rtol", 0.0), 100 * torch.finfo(solution.value.dtype).eps)
        limit = self.refresh * max(self._residual, floor)
        if not residual <= limit:
            return f"the residual rose from {self._residual:.2g} to {residual:.2g}"
        if solution.status is not SolveStatus.completed and (
            solution.steps > self.refresh * max(self._steps, 1) + 1
        ):
            self._stale = f"the steps rose from {self._steps} to {solution.steps}"
        return ""

    def _keep(self, solution: Solution) -> None:
        self._prepared = solution.state
        value = solution.value.detach()
        self.adjoint = value.clone() if bool(torch.isfinite(value).all()) else None


def solve_adjoint(
    A: LinearOperator,
    b: Tensor,
    mode: Implicit | FiniteDifference,
    state: HypergradientState | None,
    x0: Tensor | None,
    prepared: State | None,
) -> tuple[Solution, str]:
    """$H q = b$ as a mode and a state have it, and why the recipe prepared anew."""
    recipe = default_recipe(mode)
    if state is not None:
        return state.solve(A, b, recipe, mode.on_failure)
    return _solve(A, b, recipe, x0, prepared, mode.on_failure), ""


def default_recipe(mode: Implicit | FiniteDifference) -> Recipe:
    """The recipe of a mode, conjugate gradients where it gives none."""
    if mode.recipe is not None:
        return mode.recipe
    # Differences of gradients are worth no more digits.
    return CG(rtol=1e-4) if isinstance(mode, FiniteDifference) else CG()


def _solve(
    A: LinearOperator,
    b: Tensor,
    recipe: Recipe,
    x0: Tensor | None,
    prepared: State | None,
    on_failure: OnFailure,
) -> Solution:
    with torch.no_grad():
        return solve_with_policy(
            A, b, recipe, on_failure=on_failure, backward="ignore", x0=x0, state=prepared
        )
