"""A minimum as a fixed point of mirror descent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.implicit.conditions.common import (
    combine,
    flagged,
    gradient,
    need_functions,
    need_step,
)

__all__ = ["mirror_descent"]


def mirror_descent(
    fun: Callable[..., Tensor],
    mirror: Callable[[Any], Any] | None = None,
    projection: Callable[..., Any] | None = None,
    step: float = 1.0,
) -> Callable[..., Any]:
    r"""The condition $F = x - P^\phi_C(\nabla\phi(x) - \eta \nabla_x f(x, \theta)) = 0$.

    $P^\phi_C(y) = \arg\min_{z \in C} \phi(z) - \langle y, z\rangle$ is the projection in the
    geometry of $\phi$. Without ``mirror`` that is the geometry of the entropy on the product of
    simplices in the last dimension, where the fixed point is $x \odot e^{-\eta g}$, scaled to sum
    to one: written so, it needs no logarithm, and its derivative is finite where entries are zero.

    Args:
        fun: ``f(x, theta)``, a scalar; ``x`` and ``theta`` any trees of tensors.
        mirror: $\nabla \phi$, with ``projection``; ``None`` for the entropy.
        projection: $P^\phi_C$, called as ``projection(y, *c)``.
        step: $\eta > 0$.

    Returns:
        ``F(x, theta, *c)``, a tree like ``x``.

    Raises:
        ArgumentError: only one of ``mirror`` and ``projection``, or a step that is not positive.

    Cost: a gradient and a projection.

    Source: Blondel et al. 2022, table 1; Beck and Teboulle 2003.

    Example:
        >>> import torch
        >>> from woodbury.implicit import mirror_descent
        >>> F = mirror_descent(lambda x, c: ((x - c) ** 2).sum() / 2)
        >>> F(torch.tensor([0.75, 0.25, 0.0]), torch.tensor([1.0, 0.5, 0.0])).abs() < 1e-6
        tensor([True, True, True])
    """
    need_functions(fun=fun)
    need_step(step)
    if (mirror is None) != (projection is None):
        raise ArgumentError("mirror and projection belong together: give both or neither")

    def condition(x: Any, theta: Any, *parameters: Any) -> Any:
        slope = gradient(fun, x, theta)
        if mirror is None or projection is None:
            return combine(lambda p, q: p - _entropic(p, step * q), x, slope)
        moved = combine(lambda p, q: p - step * q, mirror(x), slope)
        return combine(lambda p, q: p - q, x, projection(moved, *parameters))

    return flagged(condition, "mirror_descent")


def _entropic(x: Tensor, shift: Tensor) -> Tensor:
    # The smallest shift is taken out for the sake of the exponential; it cancels in the quotient.
    weights = x * torch.exp(shift.detach().amin(-1, keepdim=True) - shift)
    return weights / weights.sum(-1, keepdim=True)
