"""A minimum without constraints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from woodbury.implicit.conditions.common import flagged, gradient, need_functions

__all__ = ["stationary"]


def stationary(fun: Callable[..., Tensor]) -> Callable[..., Any]:
    r"""The condition $F(x, \theta) = \nabla_x f(x, \theta) = 0$.

    Its Jacobian is the Hessian, so it is marked symmetric.

    Args:
        fun: ``f(x, *args)``, a scalar, twice differentiable; ``x`` any tree of tensors.

    Returns:
        ``F(x, *args)``, a tree like ``x``.

    Raises:
        ArgumentError: ``fun`` is not a function.

    Cost: one gradient.

    Source: Blondel et al. 2022, table 1.

    Example:
        >>> import torch
        >>> from woodbury.implicit import stationary
        >>> F = stationary(lambda x, theta: 0.5 * ((x - theta) ** 2).sum())
        >>> F(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor([2.])
    """
    need_functions(fun=fun)

    def condition(x: Any, *args: Any) -> Any:
        return gradient(fun, x, *args)

    return flagged(condition, "stationary", symmetric=True)
