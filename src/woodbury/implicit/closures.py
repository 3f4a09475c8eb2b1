"""Tensors that a condition uses without being given them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import GradientError, WoodburyError
from woodbury.implicit.trees import named_leaves

__all__ = ["Witness", "explained", "from_outer_world", "name_of", "refuse_closed_over"]

_DEPTH = 4  # of objects within objects that are searched for a name


Found = Callable[[Any], bool]


def from_outer_world(found: list[Tensor], inputs: list[Tensor], *, inside: bool) -> list[Tensor]:
    """Without the wrappers that transforms within the condition put round its own arguments.

    Args:
        found: tensors that an evaluation met and did not make.
        inputs: what it was given.
        inside: whether a transform is active outside.
    """
    storages = {t.untyped_storage().data_ptr() for t in inputs}

    def is_own(t: Tensor) -> bool:
        functorch: Any = torch._C._functorch
        if not inside or functorch.is_dead_tensor_wrapper(t):
            return True
        while functorch.is_functorch_wrapped_tensor(t):
            t = functorch.get_unwrapped(t)
        return t.untyped_storage().data_ptr() in storages

    return [t for t in found if not (_is_wrapped(t) and is_own(t))]


def refuse_closed_over(found: list[Tensor], function: Callable[..., Any]) -> None:
    """Raise where one of the tensors that came from outside should have a derivative.

    Raises:
        GradientError: a tensor requires a gradient, or belongs to a ``torch.func`` transform.
    """
    for t in found:
        if _is_wrapped(t):
            raise _lost(name_of(t, function), t, "belongs to a torch.func transform")
        if t.requires_grad:
            raise _lost(name_of(t, function), t, "requires a gradient")


@contextlib.contextmanager
def explained(function: Callable[..., Any]) -> Iterator[None]:
    """Say what is wrong where a tensor of a transform is used from outside the arguments."""
    try:
        yield
    except WoodburyError:
        raise
    except RuntimeError as error:
        for name, value in _reachable(function):
            found = _search(value, name, _is_wrapped, _DEPTH)
            if found is not None:
                raise _lost(
                    repr(found[0]), found[1], "belongs to a torch.func transform"
                ) from error
        raise


def _is_wrapped(value: Any) -> bool:
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def _lost(name: str, t: Tensor, why: str) -> GradientError:
    return GradientError(
        f"{name} of shape {tuple(t.shape)} {why}, but the condition takes it from outside its "
        "arguments, so its derivative would be lost: pass it as an argument (for a module "
        "dict(model.named_parameters()), with torch.func.functional_call in the condition), or "
        "detach it"
    )


class Witness:
    """Remembers the versions of tensors, to see whether they are changed in place."""

    def __init__(self, found: list[Tensor], function: Callable[..., Any]) -> None:
        self.seen = [(t, t._version) for t in found if not _is_wrapped(t) and not t.is_inference()]
        self.function = function

    def check(self) -> None:
        """Raise if one has changed.

        Raises:
            GradientError: a tensor has another version now.
        """
        for t, version in self.seen:
            if t._version != version:
                raise GradientError(
                    f"{name_of(t, self.function)} of shape {tuple(t.shape)}, which the condition "
                    f"uses, was modified in place between the solution and its derivative (version "
                    f"{t._version}, expected {version}): the derivative would belong to another "
                    "problem; take it before the change, or give the condition a copy"
                )


def name_of(tensor: Tensor, function: Callable[..., Any]) -> str:
    """What the source of ``function`` calls a tensor, as far as that can be found."""
    for name, value in _reachable(function):
        found = _search(value, name, lambda value: value is tensor, _DEPTH)
        if found is not None:
            return repr(found[0])
    return "a tensor"


def _reachable(function: Any) -> Iterator[tuple[str, Any]]:
    """What a function can reach: its closure, its globals, what it is bound to."""
    if isinstance(function, functools.partial):
        yield from _reachable(function.func)
        yield from ((f"partial argument {i}", value) for i, value in enumerate(function.args))
        yield from function.keywords.items()
    elif inspect.ismethod(function):
        yield "self", function.__self__
        yield from _reachable(function.__func__)
    elif inspect.isfunction(function):
        if hasattr(function, "__wrapped__"):
            yield from _reachable(function.__wrapped__)
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not yet assigned
                continue
        for name in _global_names(function.__code__):
            if name in function.__globals__:
                yield name, function.__globals__[name]
    elif not inspect.isbuiltin(function):
        yield "self", function


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _search(value: Any, name: str, wanted: Found, depth: int) -> tuple[str, Any] | None:
    """The first thing within ``value`` that is wanted, with what one would write to reach it."""
    if wanted(value):
        return name, value
    if depth == 0 or isinstance(value, (Tensor, type, types.ModuleType, str, bytes, int, float)):
        return None
    for inner, item in _within(value, name):
        found = _search(item, inner, wanted, depth - 1)
        if found is not None:
            return found
    return None


def _within(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.nn.Module):
        yield from ((f"{name}.{path}", tensor) for path, tensor in value.named_parameters())
        yield from ((f"{name}.{path}", tensor) for path, tensor in value.named_buffers())
    elif isinstance(value, (dict, list, tuple)):
        yield from (pair for pair in named_leaves(value, name) if pair[1] is not value)
    elif inspect.isfunction(value) or inspect.ismethod(value):
        yield from _reachable(value)
    else:
        attributes = getattr(value, "__dict__", {})
        yield from ((f"{name}.{attribute}", item) for attribute, item in attributes.items())
