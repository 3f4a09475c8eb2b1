"""What a recipe prepared, as tensors, numbers and words, and back.

Files that hold nothing else can be read without running code of theirs, which is what
``torch.load(weights_only=True)`` insists on. States, recipes, operators and spaces of this library
are written as the name of their class and their attributes; when they are read, only such classes
are made, and nothing of them is called. An attribute that is a function has no such form, and then
neither has the state.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import DataError
from woodbury.operators.base import LinearOperator
from woodbury.solvers.recipe import Recipe, State
from woodbury.spaces import Space

__all__ = ["pack", "unpack"]

_PACKAGE = __name__.partition(".")[0] + "."
_OPEN = (Recipe, LinearOperator, Space)


class _NoFormError(Exception):
    """Something that is not made of tensors, numbers and words."""


def pack(state: State) -> dict[str, Any] | None:
    """The state as a dictionary of tensors, numbers and words; ``None`` where it has no such form.

    A recipe that holds an operator has none either: it equals no recipe that is made later, so that
    its state would be of no use.

    Args:
        state: what ``recipe.prepare`` returned, or ``solution.state``.

    Example:
        >>> import io
        >>> import torch
        >>> from woodbury import Dense, Nystrom, solve
        >>> from woodbury.solvers.packing import pack, unpack
        >>> A = Dense(torch.diag(torch.tensor([4.0, 2.0, 0.0])), tags={"positive_semidefinite"})
        >>> recipe, file = Nystrom(rank=2, damping=1.0), io.BytesIO()
        >>> torch.save(pack(recipe.prepare(A)), file)
        >>> state = unpack(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        >>> solve(A, torch.ones(3), recipe, state=state).value
        tensor([0.2000, 0.3333, 1.0000])
    """
    try:
        packed: dict[str, Any] = _packed(state, ())
    except _NoFormError:
        return None
    return packed


def unpack(packed: Mapping[str, Any]) -> State:
    """What :func:`pack` was given.

    Raises:
        DataError: it is something else.
    """
    try:
        state = _unpacked(packed)
    except (KeyError, TypeError, ValueError, AttributeError, ImportError) as error:
        raise DataError(f"this is no packed state: {error}") from None
    if not isinstance(state, State):
        raise DataError(f"this is no packed state but a {type(state).__name__}")
    return state


def _packed(value: Any, within: tuple[Any, ...]) -> Any:
    """``value`` in that form; ``within`` are the objects it is part of."""
    if isinstance(value, Enum):
        if not type(value).__module__.startswith(_PACKAGE):
            raise _NoFormError
        return {"enum": _name(type(value)), "name": value.name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    for kind in (torch.Size, tuple, list, frozenset):
        if type(value) is kind:
            parts = sorted(value) if kind is frozenset else value
            return {kind.__name__: [_packed(part, within) for part in parts]}
    if type(value) is dict:
        pairs = [[_packed(k, within), _packed(v, within)] for k, v in value.items()]
        return {"dict": pairs}
    if not _is_ours(type(value)) or any(value is outer for outer in within):
        raise _NoFormError
    if isinstance(value, LinearOperator) and any(isinstance(outer, Recipe) for outer in within):
        raise _NoFormError
    fields = {key: _packed(part, (*within, value)) for key, part in vars(value).items()}
    return {"class": _name(type(value)), "fields": fields}


def _unpacked(packed: Any) -> Any:
    if not isinstance(packed, Mapping):
        if packed is None or isinstance(packed, bool | int | float | str | Tensor):
            return packed
        raise DataError(f"a packed state holds a {type(packed).__name__}")
    if "class" in packed:
        kind = _class(packed["class"])
        if not _is_ours(kind):
            raise DataError(f"a packed state holds a {packed['class']}, which is no part of one")
        made = kind.__new__(kind)
        # Fields of frozen classes, too.
        vars(made).update({key: _unpacked(part) for key, part in packed["fields"].items()})
        return made
    if "enum" in packed:
        kind = _class(packed["enum"])
        if not (isinstance(kind, type) and issubclass(kind, Enum)):
            raise DataError(f"a packed state holds a {packed['enum']}, which is no enumeration")
        return kind[packed["name"]]
    ((kind, parts),) = packed.items()
    if kind == "complex":
        return complex(*parts)
    if kind == "dtype":
        dtype = getattr(torch, parts)
        if not isinstance(dtype, torch.dtype):
            raise DataError(f"a packed state holds the dtype {parts}")
        return dtype
    if kind == "device":
        return torch.device(parts)
    if kind == "dict":
        return {_unpacked(key): _unpacked(value) for key, value in parts}
    kinds = {each.__name__: each for each in (torch.Size, tuple, list, frozenset)}
    return kinds[kind](_unpacked(part) for part in parts)


def _is_ours(kind: Any) -> bool:
    """Whether objects of this class are what their attributes are."""
    if not isinstance(kind, type) or not kind.__module__.startswith(_PACKAGE):
        return False
    return issubclass(kind, _OPEN) or dataclasses.is_dataclass(kind)


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str) -> Any:
    """The class of that name in this package."""
    module, _, path = name.partition(":")
    if not module.startswith(_PACKAGE):
        raise DataError(f"a packed state names {name}, which is not of this library")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found
