"""What the conditions share: gradients within a tree, arithmetic between trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from woodbury.errors import ArgumentError, ShapeError

__all__ = ["combine", "flagged", "gradient", "need_functions", "need_step", "pullback"]

Function = TypeVar("Function", bound=Callable[..., Any])


def flagged(function: Function, name: str, *, symmetric: bool = False) -> Function:
    """Name a condition and say whether its Jacobian is symmetric, so that solvers may use it."""
    function.__name__ = function.__qualname__ = name
    function.symmetric = symmetric  # type: ignore[attr-defined]
    return function


def need_functions(**functions: Any) -> None:
    """Refuse what cannot be called."""
    for name, function in functions.items():
        if not callable(function):
            raise ArgumentError(f"{name} is {type(function).__name__}; it must be a function")


def need_step(step: float) -> None:
    """Refuse a step that is not a positive number."""
    if not isinstance(step, (int, float)) or not step > 0:
        raise ArgumentError(f"step is {step!r}; it must be a positive number")


def gradient(fun: Callable[..., Tensor], x: Any, *args: Any) -> Any:
    """The gradient of ``fun(x, *args)`` with respect to the tree ``x``."""
    return torch.func.grad(fun)(x, *args)


def pullback(fun: Callable[..., Any], x: Any, cotangent: Any) -> tuple[Any, Any]:
    """The value of ``fun(x)``, and ``(d fun / d x)^T cotangent``."""
    linear: Any = torch.func.vjp(fun, x)  # its stubs know an auxiliary output, too
    value, pull = linear
    got, wanted = (tuple(t.shape for t in tree_flatten(v)[0]) for v in (value, cotangent))
    if got != wanted:
        raise ShapeError(f"the constraint has values of shapes {got}, its multipliers {wanted}")
    return value, pull(cotangent)[0]


def combine(function: Callable[..., Tensor], first: Any, *others: Any) -> Any:
    """``function`` of the leaves of trees that have the structure of the first."""
    leaves, spec = tree_flatten(first)
    columns = [leaves]
    for other in others:
        more, found = tree_flatten(other)
        if found != spec:
            raise ShapeError(f"two trees that should agree do not: {spec} and {found}")
        columns.append(more)
    return tree_unflatten([function(*row) for row in zip(*columns, strict=True)], spec)
