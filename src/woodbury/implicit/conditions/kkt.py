"""A minimum under equations and inequalities."""

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
    pullback,
)

__all__ = ["kkt"]


def kkt(
    fun: Callable[..., Tensor],
    equality: Callable[..., Any] | None = None,
    inequality: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    r"""The Karush-Kuhn-Tucker equations of $\min_z f$ with $h(z) = 0$ and $g(z) \le 0$.

    With $x = (z, \nu, \lambda)$,
    $F(x, \theta) = (\nabla_z f + \partial h^T \nu + \partial g^T \lambda,\ h(z),\
    \lambda \odot g(z))$. That $g(z) \le 0$ and $\lambda \ge 0$ is for the solver to see to: the
    derivative does not need it. Without inequalities the Jacobian is symmetric and marked so. It is
    singular where a constraint and its multiplier are both zero, or where the gradients of the
    active constraints depend on each other.

    Args:
        fun: ``f(z, *args)``, a scalar; ``z`` any tree of tensors.
        equality: ``h(z, *args)``, a tensor or a tree; ``None`` for none.
        inequality: ``g(z, *args)``, likewise.

    Returns:
        ``F(x, *args)``, with ``x`` a tuple ``(z, nu, lam)``, of which what belongs to a missing
        constraint is left out: ``(z, nu)`` or ``(z, lam)``; the value has the same structure.

    Raises:
        ArgumentError: no constraint is given (use ``stationary``), or ``x`` is no such tuple.
        ShapeError: a multiplier has not the shape of its constraint.

    Cost: a gradient, and a vector-Jacobian product with each constraint.

    Source: Blondel et al. 2022, table 1; Amos and Kolter 2017.

    Example:
        >>> import torch
        >>> from woodbury.implicit import kkt
        >>> F = kkt(lambda z, b: (z**2).sum() / 2, equality=lambda z, b: z.sum() - b)
        >>> F((torch.tensor([0.5, 0.5]), torch.tensor(-0.5)), torch.tensor(1.0))
        (tensor([0., 0.]), tensor(0.))
    """
    if equality is None and inequality is None:
        raise ArgumentError("kkt has no constraint: give equality, inequality, or use stationary")
    given = {"equality": equality, "inequality": inequality}
    need_functions(fun=fun, **{name: f for name, f in given.items() if f is not None})
    count = 1 + sum(f is not None for f in given.values())

    def condition(x: Any, *args: Any) -> Any:
        if not isinstance(x, (tuple, list)) or len(x) != count:
            names = ["z", *(["nu"] if equality else []), *(["lam"] if inequality else [])]
            raise ArgumentError(f"x must be the tuple ({', '.join(names)}), it is {type(x)}")
        z, multipliers = x[0], list(x[1:])
        total = gradient(fun, z, *args)
        rows = []
        for constraint in (equality, inequality):
            if constraint is None:
                continue
            multiplier = multipliers.pop(0)

            def at(z: Any, constraint: Callable[..., Any] = constraint) -> Any:
                return constraint(z, *args)

            value, pulled = pullback(at, z, multiplier)
            total = combine(torch.add, total, pulled)
            active = constraint is inequality
            rows.append(combine(torch.mul, multiplier, value) if active else value)
        return type(x)((total, *rows))

    return flagged(condition, "kkt", symmetric=inequality is None)
