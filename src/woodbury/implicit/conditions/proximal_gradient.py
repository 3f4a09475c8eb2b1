"""A minimum of a smooth function plus one with a proximal operator."""

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

__all__ = ["proximal_gradient"]


def proximal_gradient(
    fun: Callable[..., Tensor], prox: Callable[..., Any], step: float = 1.0
) -> Callable[..., Any]:
    r"""The condition of a proximal gradient step that does not move.

    $F(x, \theta, c) = x - \operatorname{prox}_{\eta h(\cdot, c)}(x - \eta \nabla_x f(x, \theta))$
    is zero at the minimisers of $f(\cdot, \theta) + h(\cdot, c)$, for every $\eta > 0$, on which
    the derivative of the solution does not depend.

    Args:
        fun: ``f(x, theta)``, the smooth part, a scalar; ``x`` and ``theta`` any trees of tensors
            (several arguments go into a tuple).
        prox: ``prox(y, *c, step=eta)``, such as :func:`prox_l1`.
        step: $\eta$; near ``1 / L`` of the gradient it scales the equations best.

    Returns:
        ``F(x, theta, *c)``, a tree like ``x``; ``c`` are the parameters of the prox.

    Raises:
        ArgumentError: something is not a function, or the step is not positive.

    Cost: a gradient and a proximal operator.

    Source: Blondel et al. 2022, table 1.

    Example:
        >>> import torch
        >>> from woodbury.implicit import prox_l1, proximal_gradient
        >>> F = proximal_gradient(lambda x, c: ((x - c) ** 2).sum() / 2, prox_l1)
        >>> F(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 0.5]), torch.tensor(1.0))
        tensor([0., 0.])
    """
    need_functions(fun=fun, prox=prox)
    need_step(step)

    def condition(x: Any, theta: Any, *parameters: Any) -> Any:
        slope = gradient(fun, x, theta)
        moved = combine(lambda p, q: p - step * q, x, slope)
        return combine(lambda p, q: p - q, x, prox(moved, *parameters, step=step))

    return flagged(condition, "proximal_gradient")
