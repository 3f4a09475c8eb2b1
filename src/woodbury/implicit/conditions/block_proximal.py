"""A minimum over blocks, each with a proximal operator and a step of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.implicit.conditions.common import (
    combine,
    flagged,
    gradient,
    need_functions,
    need_step,
)

__all__ = ["block_proximal"]


def block_proximal(
    fun: Callable[..., Tensor],
    proxes: Sequence[Callable[..., Any]],
    steps: float | Sequence[float] = 1.0,
) -> Callable[..., Any]:
    r"""The condition of block coordinate descent with proximal steps.

    $F_j = x_j - \operatorname{prox}_{\eta_j h_j}(x_j - \eta_j \nabla_j f(x, \theta))$, zero at the
    minimisers of $f(x, \theta) + \sum_j h_j(x_j, c_j)$. All blocks are taken at the same ``x``, not
    one after the other: the solutions are the same, and so is the derivative.

    Args:
        fun: ``f(x, theta)``, a scalar, with ``x`` a tuple of blocks.
        proxes: one ``prox(y, *c, step=eta)`` for each block.
        steps: $\eta_j$, one for all or one for each.

    Returns:
        ``F(x, theta, *c)``, a tuple like ``x``; ``c`` holds one argument for each block: the tuple
        of the parameters of its prox, or one tensor.

    Raises:
        ArgumentError: the numbers of blocks, proxes and steps differ, or a step is not positive.

    Cost: a gradient and the proximal operators.

    Source: Blondel et al. 2022, table 1; Xu and Yin 2013.

    Example:
        >>> import torch
        >>> from woodbury.implicit import block_proximal, prox_l1, prox_ridge
        >>> f = lambda x, c: ((x[0] + x[1] - c) ** 2).sum() / 2
        >>> F = block_proximal(f, (prox_l1, prox_ridge))
        >>> x = torch.tensor([1.0]), torch.tensor([1.0])
        >>> F(x, torch.tensor([3.0]), torch.tensor(1.0), torch.tensor(1.0))
        (tensor([0.]), tensor([0.]))
    """
    proxes = tuple(proxes)
    need_functions(fun=fun, **{f"proxes[{i}]": prox for i, prox in enumerate(proxes)})
    each = (steps,) * len(proxes) if isinstance(steps, (int, float)) else tuple(steps)
    if len(each) != len(proxes):
        raise ArgumentError(f"there are {len(proxes)} proxes and {len(each)} steps")
    for step in each:
        need_step(step)

    def condition(x: Any, theta: Any, *parameters: Any) -> Any:
        if not isinstance(x, (tuple, list)) or len(x) != len(proxes):
            raise ArgumentError(f"x must be a tuple of {len(proxes)} blocks, one for each prox")
        if parameters and len(parameters) != len(proxes):
            raise ArgumentError(f"{len(parameters)} parameters for {len(proxes)} proxes")
        slopes = gradient(fun, x, theta)
        rows = []
        for j, (block, prox, step) in enumerate(zip(x, proxes, each, strict=True)):
            own = parameters[j] if parameters else ()
            own = own if isinstance(own, (tuple, list)) else (own,)
            moved = combine(lambda p, q, step=step: p - step * q, block, slopes[j])
            rows.append(combine(lambda p, q: p - q, block, prox(moved, *own, step=step)))
        return type(x)(rows)

    return flagged(condition, "block_proximal")
