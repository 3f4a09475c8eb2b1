"""A root as a fixed point of Newton's method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from woodbury.errors import ShapeError
from woodbury.implicit.conditions.common import flagged, need_functions, need_step
from woodbury.operators import Dense
from woodbury.solvers import LU, solve

__all__ = ["newton_residual"]


def newton_residual(G: Callable[..., Any], step: float = 1.0) -> Callable[..., Any]:
    r"""The condition $F(x, \theta) = \eta\, [\partial_x G(x, \theta)]^{-1} G(x, \theta) = 0$.

    $x - F$ is a step of Newton's method. At a root of $G$ the Jacobian of $F$ is $\eta I$ whatever
    $G$ is, so a linear solve with it takes one product: the work is in $F$ itself, which is
    preconditioned perfectly. The derivative of the solution is that of ``F = G``.

    Args:
        G: ``G(x, *args)``, a tree of as many entries as ``x``.
        step: $\eta > 0$, the damping.

    Returns:
        ``F(x, *args)``, a tree like ``x``.

    Raises:
        ArgumentError: ``G`` is not a function, or the step is not positive.
        ShapeError: ``G`` has not as many entries as ``x``.
        SingularError: the Jacobian of ``G`` is singular.

    Cost: a Jacobian of ``n`` rows and its LU factorisation, ``O(n^3)``.

    Source: Blondel et al. 2022, table 1.

    Example:
        >>> import torch
        >>> from woodbury.implicit import newton_residual
        >>> F = newton_residual(lambda x, a: x**2 - a)
        >>> F(torch.tensor([3.0]), torch.tensor([4.0]))
        tensor([0.8333])
    """
    need_functions(G=G)
    need_step(step)

    def condition(x: Any, *args: Any) -> Any:
        leaves, spec = tree_flatten(x)
        sizes, shapes = [t.numel() for t in leaves], [t.shape for t in leaves]

        def split(flat: Tensor) -> Any:
            parts = flat.split(sizes)
            pieces = [p.reshape(shape) for p, shape in zip(parts, shapes, strict=True)]
            return tree_unflatten(pieces, spec)

        def flat_G(flat: Tensor) -> Tensor:
            value = torch.cat([t.reshape(-1) for t in tree_flatten(G(split(flat), *args))[0]])
            if value.shape != flat.shape:
                raise ShapeError(f"G has {value.numel()} entries and x has {flat.numel()}")
            return value

        flat = torch.cat([t.reshape(-1) for t in leaves])
        moved = solve(Dense(torch.func.jacrev(flat_G)(flat)), flat_G(flat), LU()).value
        return split(step * moved)

    return flagged(condition, "newton_residual")
