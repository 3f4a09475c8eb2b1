"""What holds at a solution: ``F(x, *args) = 0``, on flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, GradientError, NonFiniteError
from woodbury.implicit.trees import Arguments, Unknown, half_or_work

__all__ = ["Condition", "FlatCondition", "Kind"]

Kind = Literal["root", "fixed_point", "minimum"]


@dataclass(frozen=True, eq=False)
class Condition:
    r"""A function and what it says about a solution.

    ``root``: $F(x, \theta) = 0$. ``fixed_point``: $T(x, \theta) = x$, that is $F = x - T$.
    ``minimum``: $x$ minimises $f(\cdot, \theta)$, that is $F = \nabla_x f$.

    Attributes:
        function: ``F``, ``T`` or ``f``; called as ``function(x, *args)``.
        kind: which of the three it is.
        symmetric: whether $\partial F / \partial x$ is symmetric.
        definite: whether it is positive definite as well.
    """

    function: Callable[..., Any]
    kind: Kind
    symmetric: bool
    definite: bool

    @classmethod
    def of(
        cls, function: Callable[..., Any], kind: Kind, symmetric: bool | None = None
    ) -> Condition:
        """The condition; what is not said of symmetry is looked up among the function's flags."""
        if kind not in get_args(Kind):
            raise ArgumentError(f"kind is {kind!r}; it must be one of {list(get_args(Kind))}")
        if not callable(function):
            raise ArgumentError(f"the condition is {type(function).__name__}, not a function")
        minimum = kind == "minimum"
        if symmetric is None:
            symmetric = minimum or bool(getattr(function, "symmetric", False))
        definite = minimum or (symmetric and bool(getattr(function, "positive_definite", False)))
        return cls(function, kind, symmetric, definite and symmetric)

    @property
    def tags(self) -> frozenset[str]:
        """What may be promised of the Jacobian."""
        if self.definite:
            return frozenset({"positive_definite"})
        return frozenset({"symmetric"} if self.symmetric else ())

    @property
    def name(self) -> str:
        """What to call it in messages."""
        word = {"root": "F", "fixed_point": "T", "minimum": "f"}[self.kind]
        own = getattr(self.function, "__name__", type(self.function).__name__)
        return f"{word} = {own}"


@dataclass(frozen=True, eq=False)
class FlatCondition:
    """``F`` as a function of one flat vector and the tensors among the arguments.

    It is evaluated in float32 where tensors are in half precision, with autocast off, so that the
    linear solves that use it are done in float32.
    """

    condition: Condition
    unknown: Unknown
    arguments: Arguments

    def __call__(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The residual ``[n]``, differentiable in all."""
        with torch.autocast(self.unknown.device.type, enabled=False):
            args = self.arguments.filled([half_or_work(t) for t in tensors])
            if self.condition.kind == "minimum":
                return self._gradient(x, args)
            found = self.condition.function(self.unknown.unflatten(x, work=True), *args)
            flat = self.unknown.flatten(found, f"the value of {self.condition.name}")
            return flat if self.condition.kind == "root" else x - flat

    def value(self, x: Tensor, args: Sequence[Any]) -> Tensor:
        """The objective of a minimum, a scalar."""
        found = self.condition.function(self.unknown.unflatten(x, work=True), *args)
        if not isinstance(found, Tensor) or found.dim() != 0:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise GradientError(
                f"{self.condition.name} returned {shape}; what is minimised is a scalar tensor "
                "(for a batch of problems, the sum of their losses)"
            )
        return found.to(self.unknown.dtype)

    def _gradient(self, x: Tensor, args: Sequence[Any]) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            return torch.func.grad(self.value)(x, args)
        further = torch.is_grad_enabled()
        with torch.enable_grad():
            at = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            value = self.value(at, args)
            if not bool(torch.isfinite(value.detach())):
                raise NonFiniteError(
                    f"{self.condition.name} is {value.item()} at the solution: the solver "
                    "diverged, or the arguments hold such numbers (the mean of an empty batch is)"
                )
            if value.requires_grad:
                (found,) = torch.autograd.grad(value, at, create_graph=further, allow_unused=True)
                if found is not None:
                    return found
        raise GradientError(
            f"{self.condition.name} does not depend on its first argument: there is nothing to "
            "minimise over"
        )
