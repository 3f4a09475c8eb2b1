"""A minimum over a set that can be projected onto."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from woodbury.implicit.conditions.common import (
    combine,
    flagged,
    gradient,
    need_functions,
    need_step,
)

__all__ = ["projected_gradient"]


def projected_gradient(
    fun: Callable[..., Tensor], projection: Callable[..., Any], step: float = 1.0
) -> Callable[..., Any]:
    r"""The condition $F(x, \theta, c) = x - P_{C(c)}(x - \eta \nabla_x f(x, \theta)) = 0$.

    It holds at the minimisers of a convex $f$ over the convex set $C$; the derivative of the
    solution does not depend on $\eta$.

    Args:
        fun: ``f(x, theta)``, a scalar; ``x`` and ``theta`` any trees of tensors (several
            arguments go into a tuple).
        projection: ``P(y, *c)``, one of :mod:`woodbury.implicit.projections` or another.
        step: $\eta > 0$; near ``1 / L`` of the gradient it scales the equations best.

    Returns:
        ``F(x, theta, *c)``, a tree like ``x``; ``c`` are the arguments of the projection.

    Raises:
        ArgumentError: something is not a function, or the step is not positive.

    Cost: a gradient and a projection.

    Source: Blondel et al. 2022, table 1.

    Example:
        >>> import torch
        >>> from woodbury.implicit import project_simplex, projected_gradient
        >>> F = projected_gradient(lambda x, c: ((x - c) ** 2).sum() / 2, project_simplex)
        >>> F(torch.tensor([0.75, 0.25]), torch.tensor([1.0, 0.5]))
        tensor([0., 0.])
    """
    need_functions(fun=fun, projection=projection)
    need_step(step)

    def condition(x: Any, theta: Any, *parameters: Any) -> Any:
        slope = gradient(fun, x, theta)
        moved = combine(lambda p, q: p - step * q, x, slope)
        return combine(lambda p, q: p - q, x, projection(moved, *parameters))

    return flagged(condition, "projected_gradient")
