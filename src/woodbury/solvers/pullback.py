"""Derivatives of products with respect to the tensors that an operator is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import GradientError, WoodburyError
from woodbury.operators.base import LinearOperator
from woodbury.operators.parts import watched_tensors

__all__ = ["Watch", "pulled_back", "pushed_forward", "refuse_nested_forward_mode"]

Function = Callable[..., Tensor]


def pulled_back(
    function: Function,
    X: Tensor,
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    cotangent: Tensor,
    name: str,
) -> list[Tensor | None]:
    """Cotangents of ``tensors`` in ``function(X, *tensors)``, differentiable in everything.

    Raises:
        GradientError: the function, a product of the operator ``name``, cannot be differentiated.
    """
    try:
        if torch._C._are_functorch_transforms_active():
            found = _pullback_in_transform(function, X, tensors, needed, cotangent)
        else:
            found = _plain_pullback(function, X, tensors, needed, cotangent, name)
    except WoodburyError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise _not_differentiable(name, error) from error
    return found


def _pullback_in_transform(
    function: Function, X: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool], G: Tensor
) -> list[Tensor | None]:
    places = [i for i, wanted in enumerate(needed) if wanted and _is_floating(tensors[i])]
    partial = _with_others_fixed(lambda *new: function(X, *new), tensors, places)
    pull = torch.func.vjp(partial, *(tensors[i] for i in places))[1]
    found: list[Tensor | None] = [None] * len(tensors)
    for place, cotangent in zip(places, pull(G), strict=True):
        found[place] = cotangent
    return found


def _with_others_fixed(
    function: Function, tensors: Sequence[Tensor], places: Sequence[int]
) -> Function:
    """As a function of the tensors at the places only."""

    def partial(*new: Tensor) -> Tensor:
        arguments = list(tensors)
        for place, tensor in zip(places, new, strict=True):
            arguments[place] = tensor
        return function(*arguments)

    return partial


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _plain_pullback(
    function: Function,
    X: Tensor,
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    cotangent: Tensor,
    name: str,
) -> list[Tensor | None]:
    """By ``backward()``'s own engine, which also knows operators that ``torch.func`` does not."""
    further = torch.is_grad_enabled()

    def node(tensor: Tensor) -> Tensor:
        # Of its own, so that what else depends on the tensor stays out of the cotangent.
        connected = further and tensor.requires_grad
        return tensor.view_as(tensor) if connected else tensor.detach().requires_grad_()

    with torch.enable_grad():
        pairs = list(zip(tensors, needed, strict=True))
        new = [node(t) if wanted else t for t, wanted in pairs]
        block = node(X)
        Y = function(block, *new)
    wanted = [t for t, is_needed in zip(new, needed, strict=True) if is_needed]
    if not _covers([block, *new], Y):
        raise _out_of_sight(name)
    found = iter(torch.autograd.grad(Y, wanted, cotangent, create_graph=further, allow_unused=True))
    return [next(found) if is_needed else None for is_needed in needed]


def pushed_forward(
    function: Function,
    tensors: Sequence[Tensor],
    directions: Sequence[Tensor | None],
    name: str,
) -> Tensor:
    """The tangent of the function in the directions given.

    Raises:
        GradientError: the function, a product of the operator ``name``, cannot be differentiated.
    """
    places = [i for i, direction in enumerate(directions) if direction is not None]
    function = _with_others_fixed(function, tensors, places)
    moving, along = [tensors[i] for i in places], [directions[i] for i in places]
    try:
        if torch._C._are_functorch_transforms_active():
            return torch.func.jvp(function, tuple(moving), tuple(along))[1]
        # Dual levels do not nest. The pullback is linear in the cotangent, and its own pullback
        # is the tangent.
        with torch.enable_grad():
            new = [t.detach().requires_grad_() for t in moving]
            Y = function(*new)
            u = torch.zeros_like(Y, requires_grad=True)
            pulled = torch.autograd.grad(Y, new, u, create_graph=True, allow_unused=True)
            used = [(p, d) for p, d in zip(pulled, along, strict=True) if p is not None]
            if not used:
                return torch.zeros_like(Y)
        return torch.autograd.grad([p for p, _ in used], u, [d for _, d in used])[0]
    except WoodburyError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise _not_differentiable(name, error) from error


def refuse_nested_forward_mode() -> None:
    """Raise where torch would lose a tangent: forward mode in forward mode."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    forward = [level for level in stack if level.key() == torch._C._functorch.TransformType.Jvp]
    if len(forward) > 1:
        raise GradientError(
            "forward mode inside forward mode: torch drops the outer tangents of custom functions "
            "silently; take one of the two derivatives in reverse mode, as torch.func.hessian does"
        )


class Watch:
    """Looks on while an operator that does not say what it is made of is multiplied.

    Attributes:
        products: columns multiplied for the sake of looking.
    """

    def __init__(self, A: LinearOperator) -> None:
        self.A = A
        self.products = 0
        self.seen: Tensor | None = None

    def product(self, hook: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
        """``hook(X)`` with gradients enabled, remembered with its graph."""
        try:
            with torch.enable_grad():
                self.seen = hook(X)
        except RuntimeError as error:
            if isinstance(error, WoodburyError):
                raise
            hook(X)  # raises again unless it was for the gradients
            raise _not_differentiable(type(self.A).__name__, error) from error
        return self.seen.detach()

    def closed_over(self) -> list[Tensor]:
        """Tensors with a gradient that products use.

        Raises:
            GradientError: products depend on tensors in a way that cannot be followed.
        """
        if self.seen is None:  # b is zero: nothing was multiplied
            X = torch.zeros(self.A.shape[1], 1, dtype=self.A.dtype, device=self.A.device)
            self.products += 1
            self.product(self.A._matmat, X)
        assert self.seen is not None
        if not self.seen.requires_grad:
            return []
        self.products += 1
        found = [tensor for tensor in watched_tensors(self.A) if tensor.requires_grad]
        if not _covers(found, self.seen):
            raise _out_of_sight(type(self.A).__name__)
        return found


def _covers(tensors: Sequence[Tensor], result: Tensor) -> bool:
    """Whether every path from the result to a leaf meets one of the tensors."""
    ends = {t.grad_fn for t in tensors if t.grad_fn is not None}
    leaves = {id(t) for t in tensors if t.grad_fn is None}
    stack, visited = [result.grad_fn], set()
    while stack:
        node: Any = stack.pop()
        if node is None or node in visited or node in ends:
            continue
        visited.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in leaves:
            return False
        stack.extend(next_node for next_node, _ in node.next_functions)
    return True


def _out_of_sight(name: str) -> GradientError:
    return GradientError(
        f"the products of {name} carry a gradient of tensors that they use out of sight (in a "
        "custom autograd.Function, or a graph made before): write the product with plain tensor "
        "operations, call solve() under torch.no_grad(), or detach those tensors"
    )


def _not_differentiable(name: str, error: Exception) -> GradientError:
    return GradientError(
        f"the products of {name} cannot be differentiated with respect to the tensors they are "
        f"made of ({type(error).__name__}: {error}); call solve() under torch.no_grad(), or detach "
        "those tensors"
    )
