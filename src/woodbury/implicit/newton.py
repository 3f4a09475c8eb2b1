"""Newton's method with conjugate gradients: minimise an objective to high accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.curvature import Hessian
from woodbury.errors import NonFiniteError
from woodbury.solvers import CG, SolveStatus, solve

if TYPE_CHECKING:
    from woodbury.curvature import Objective

__all__ = ["newton_cg"]


def newton_cg(
    objective: Objective, *, gtol: float = 1e-8, max_steps: int = 100, max_products: int = 200
) -> Tensor:
    r"""Minimise an objective by line-search Newton-CG from its current parameters.

    Each step solves $H p = -\nabla F$ by conjugate gradients to the tolerance
    $\min(0.5, \sqrt{\|\nabla F\|})$ (superlinear convergence), takes the best iterate found before
    negative curvature, or the negative gradient where there is none, and backtracks until
    $F(\theta + t p) \le F(\theta) + 10^{-4}\, t\, \langle\nabla F, p\rangle$.

    Args:
        objective: what to minimise; its parameters are the start and are not changed.
        gtol: stop at $\|\nabla F\| \le$ ``gtol`` times ``max(1, initial norm)``.
        max_steps: outer steps.
        max_products: Hessian products per step.

    Returns:
        The parameters ``[n]`` with the smallest gradient norm that were reached; compare
        ``objective.with_params(result).gradient()`` with the tolerance you need.

    Raises:
        NonFiniteError: the objective or its gradient at the start is not finite.

    Cost: a few Hessian products per step; memory of one linearisation.

    Source: Nocedal and Wright, "Numerical Optimization" (2nd ed.), algorithm 7.1.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.implicit import newton_cg
        >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> loss = lambda p, batch: (p["w"] * batch - 1).square().mean()
        >>> start = {"w": torch.zeros(1, dtype=torch.float64)}
        >>> newton_cg(Objective.functional(loss, start, [x]))
        tensor([0.6000], dtype=torch.float64)
    """
    theta = objective.params_vector()
    gradient = objective.gradient()
    start = torch.linalg.vector_norm(gradient).item()
    value = float(objective.value())
    best, best_norm = theta, start
    for _ in range(max_steps):
        norm = torch.linalg.vector_norm(gradient).item()
        if norm < best_norm:
            best, best_norm = theta, norm
        if norm <= gtol * max(1.0, start):
            break
        forcing = min(0.5, norm**0.5)
        solution = solve(
            Hessian(objective),
            -gradient,
            CG(rtol=max(forcing, 1e-12), max_steps=max_products),
            throw=False,
        )
        direction = solution.value
        if solution.status is SolveStatus.non_finite or not torch.isfinite(direction).all():
            raise NonFiniteError("a Hessian product is NaN or infinite; check the objective")
        slope = torch.dot(gradient, direction).item()
        if slope >= 0:
            direction, slope = -gradient, -(norm**2)
        length, moved = 1.0, None
        while length > 1e-12:
            trial = objective.with_params(theta + length * direction)
            trial_value = float(trial.value())
            # Near the minimum the decrease is below rounding: then the gradient decides.
            flat = abs(length * slope) <= 1e-12 * max(1.0, abs(value))
            if trial_value <= value + 1e-4 * length * slope or (
                flat and torch.linalg.vector_norm(trial.gradient()).item() < norm
            ):
                moved = trial
                break
            length /= 2
        if moved is None:
            break
        objective, theta, value = moved, theta + length * direction, trial_value
        gradient = objective.gradient()
    norm = torch.linalg.vector_norm(gradient).item()
    return theta if norm < best_norm else best
