"""L-BFGS with a first inverse Hessian of the caller's choice, for the fits of this job."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Minimum", "minimize"]

Objective = Callable[[Tensor], tuple[float, Tensor]]
Preconditioner = Callable[[Tensor], Tensor]
MEMORY = 10
SMALLEST_STEP = 1e-8


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where a minimisation ended.

    Attributes:
        place: the last iterate.
        value: the objective there.
        gain: half the product of gradient and step that were next: what was left to gain.
        steps: iterations taken.
    """

    place: Tensor
    value: float
    gain: float
    steps: int


def minimize(
    objective: Objective,
    start: Tensor,
    *,
    precondition: Preconditioner | None = None,
    rebuild: Callable[[], Preconditioner] | None = None,
    rebuild_every: int = 12,
    max_steps: int = 200,
    tolerance: float = 1e-9,
) -> Minimum:
    """Minimise by L-BFGS with backtracking.

    Args:
        objective: place to value and gradient.
        start: tensor of any shape, float64.
        precondition: the first inverse Hessian; a multiple of the identity if not given.
        rebuild: called every ``rebuild_every`` steps for a new one at the last place evaluated.
        rebuild_every: see there.
        max_steps: most iterations.
        tolerance: ends where the next step promises a gain below this.

    Returns:
        A :class:`Minimum`.
    """
    place = start
    value, gradient = objective(place)
    pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=MEMORY)
    gain, steps = float("inf"), 0
    while steps < max_steps:
        if rebuild is not None and steps and steps % rebuild_every == 0:
            precondition = rebuild()
            pairs.clear()
        direction = _apply(gradient, pairs, precondition)
        slope = -(gradient * direction).sum().item()
        gain = -0.5 * slope
        if not gain > tolerance:
            break
        length = 1.0
        if not pairs and precondition is None:
            length = min(1.0, 1 / gradient.abs().sum().item())
        while True:
            trial = place - length * direction
            trial_value, trial_gradient = objective(trial)
            if trial_value <= value + 1e-4 * length * slope:
                break
            length /= 2
            if length < SMALLEST_STEP:  # down to rounding
                return Minimum(place, value, max(gain, 0.0), steps)
        step, change = trial - place, trial_gradient - gradient
        product = (step * change).sum().item()
        if product > 1e-14 * step.norm().item() * change.norm().item():
            pairs.append((step, change, 1 / product))
        place, value, gradient = trial, trial_value, trial_gradient
        steps += 1
    return Minimum(place, value, max(gain, 0.0), steps)


def _apply(
    gradient: Tensor,
    pairs: deque[tuple[Tensor, Tensor, float]],
    precondition: Preconditioner | None,
) -> Tensor:
    """The inverse Hessian times the gradient, by the two-loop recursion."""
    q = gradient.clone()
    factors = []
    for step, change, rho in reversed(pairs):
        alpha = rho * (step * q).sum()
        q -= alpha * change
        factors.append(alpha)
    if precondition is not None:
        q = precondition(q)
    elif pairs:
        step, change, rho = pairs[-1]
        q /= rho * (change * change).sum()
    for (step, change, rho), alpha in zip(pairs, reversed(factors), strict=True):
        q += (alpha - rho * (change * q).sum()) * step
    return q
