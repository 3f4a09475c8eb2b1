"""The tensors that an operator is made of, and the same operator made of others.

Differentiating through a solve needs the products of an operator as a function of these tensors. A
class that names them (``_made_of``) is rebuilt around others, so that it keeps its structure. Of
every other operator (one made from a function, a kernel, a class of the user's) a product is
watched: what tensors come into it from outside, and in later products those are replaced on the
way.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from woodbury.operators.base import LinearOperator

__all__ = [
    "Followed",
    "is_opaque",
    "parts",
    "rebuilt",
    "same_substitution",
    "transforms_active",
    "watched_tensors",
]


def transforms_active() -> bool:
    """Whether products happen inside a ``torch.func`` transform or with dual tensors."""
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


def parts(*operators: LinearOperator) -> list[Tensor]:
    """The tensors that the operators say they are made of, each once.

    Those of integers only where they belong to a transform, outside of which they are no good.
    """
    found: dict[int, Tensor] = {}
    for operator in operators:
        for part in _parts(operator):
            found.setdefault(id(part), part)
    return list(found.values())


def is_opaque(operator: LinearOperator) -> bool:
    """Whether it, or an operator that it is made of, does not say what it is made of."""
    names = _names(operator)
    if names is None:
        return True
    values = (getattr(operator, name, None) for name in names)
    return any(is_opaque(inner) for value in values for inner in _operators(value))


def rebuilt(
    operator: LinearOperator,
    originals: Sequence[Tensor],
    tensors: Sequence[Tensor],
    *,
    plain: bool = False,
) -> LinearOperator:
    """The operator with ``tensors`` in the place of ``originals``.

    ``plain``: only values matter, so an operator is itself where the values are the same.
    """
    return _Rebuild(originals, tensors, plain)(operator)


def watched_tensors(operator: LinearOperator) -> list[Tensor]:
    """The tensors that come into a product from outside, by running one."""
    X = torch.zeros(operator.shape[1], 1, dtype=operator.dtype, device=operator.device)
    with torch.no_grad(), _Recorder(X) as recorder:
        operator._matmat(X)
    return [tensor for tensor in recorder.found.values() if not _has_escaped(tensor)]


def from_outside(
    function: Callable[..., Any], inputs: Sequence[Tensor]
) -> tuple[Any, list[Tensor]]:
    """What ``function()`` returns, and the floating tensors it met that are not of ``inputs``."""
    with _Recorder(*inputs) as recorder:
        result = function()
    return result, list(recorder.found.values())


class Followed(LinearOperator):
    """An operator with other tensors in its products than those it closes over.

    Args:
        operator: what to follow.
        originals: tensors that its products use.
        tensors: what they use instead.
    """

    _made_of = ("tensors",)

    def __init__(
        self, operator: LinearOperator, originals: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> None:
        super().__init__(
            operator.shape,
            dtype=operator.dtype,
            device=operator.device,
            tags=operator.tags,
            space=operator.space,
            out_space=operator.out_space,
        )
        self.operator = operator
        self.originals = tuple(originals)
        self.tensors = tuple(tensors)

    def _following(self, hook: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        _ACTIVE.append(_Substitution(self.originals, self.tensors))
        try:
            with _ACTIVE[-1]:
                return hook(*arguments)
        finally:
            _ACTIVE.pop()

    def _matmat(self, X: Tensor) -> Tensor:
        return self._following(self.operator._matmat, X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self._following(self.operator._rmatmat, Y)

    def _to_dense(self) -> Tensor:
        return self._following(self.operator._to_dense)

    def _diagonal(self) -> Tensor:
        return self._following(self.operator._diagonal)

    def _columns(self, index: Tensor) -> Tensor:
        return self._following(self.operator._columns, index)


def same_substitution() -> AbstractContextManager[object]:
    """What is substituted now, to be entered again where a part of a product is recomputed."""
    if not _ACTIVE:
        return nullcontext()
    return _Substitution(_ACTIVE[-1].originals, _ACTIVE[-1].tensors)


class _Rebuild:
    """Copies of operators, each made once."""

    def __init__(self, originals: Sequence[Tensor], tensors: Sequence[Tensor], plain: bool) -> None:
        self.originals, self.tensors, self.plain = originals, tensors, plain
        pairs = zip(originals, tensors, strict=True)
        self.replacements = {
            id(old): new for old, new in pairs if not (plain and _same_values(old, new))
        }
        self.made: dict[int, LinearOperator] = {}

    def __call__(self, operator: LinearOperator) -> LinearOperator:
        if id(operator) not in self.made:
            self.made[id(operator)] = self._make(operator)
        return self.made[id(operator)]

    def _make(self, operator: LinearOperator) -> LinearOperator:
        names = _names(operator)
        if names is None:
            if not self.replacements:
                return operator
            return Followed(operator, self.originals, self.tensors)
        values = {name: getattr(operator, name, None) for name in names}
        fresh = {name: self._replace(value) for name, value in values.items()}
        if isinstance(operator, Followed) and self.plain:
            pairs = zip(operator.originals, fresh["tensors"], strict=True)
            if all(_same_values(old, new) for old, new in pairs):
                return operator.operator
        if all(_unchanged(values[name], fresh[name]) for name in names):
            return operator
        result = copy.copy(operator)
        for name, value in fresh.items():
            setattr(result, name, value)
        for name in operator._forgets:
            setattr(result, name, None)
        for link in ("_transpose_of", "_adjoint_of"):
            linked = getattr(operator, link)
            setattr(result, link, None if linked is None else self.made.get(id(linked)))
        return result

    def _replace(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.replacements.get(id(value), value)
        if isinstance(value, LinearOperator):
            return self(value)
        if isinstance(value, tuple):
            return tuple(self._replace(item) for item in value)
        return value


class _Recorder(TorchFunctionMode):
    """Notes the tensors that come into a computation from outside."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        # By weak references: a product in blocks must not hold all its blocks.
        self._made = {id(x): weakref.ref(x) for x in inputs}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and not self._is_made(value) and _matters(value):
                self.found.setdefault(id(value), value)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._made[id(value)] = weakref.ref(value)
        return result

    def _is_made(self, value: Tensor) -> bool:
        known = self._made.get(id(value))
        return known is not None and known() is value


class _Substitution(TorchFunctionMode):
    """Puts tensors in the place of others wherever torch is called with those."""

    def __init__(self, originals: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.originals, self.tensors = originals, tensors
        pairs = zip(originals, tensors, strict=True)
        self._replacements = {id(old): new for old, new in pairs if old is not new}

    def _replaced(self, value: Any) -> Any:
        return self._replacements.get(id(value), value) if isinstance(value, Tensor) else value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._replaced, (args, kwargs or {}))
        return func(*args, **kwargs)


# The innermost last; a nested one sees the tensors of its own operator.
_ACTIVE: list[_Substitution] = []


def _names(operator: LinearOperator) -> tuple[str, ...] | None:
    """What the class itself says; a subclass that says nothing may use more than its parent."""
    found: tuple[str, ...] | None = vars(type(operator)).get("_made_of")
    return found


def _parts(operator: LinearOperator) -> Iterator[Tensor]:
    for name in _names(operator) or ():
        yield from _tensors(getattr(operator, name, None))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if _matters(value):
            yield value
    elif isinstance(value, LinearOperator):
        yield from _parts(value)
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def _operators(value: Any) -> Iterator[LinearOperator]:
    if isinstance(value, LinearOperator):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _operators(item)


def _has_escaped(tensor: Tensor) -> bool:
    """Whether it belongs to a transform inside the product, which has ended."""
    functorch = torch._C._functorch
    if not functorch.is_functorch_wrapped_tensor(tensor):
        return False
    if functorch.unwrap_if_dead(tensor) is not tensor:
        return True
    current = functorch.maybe_current_level()
    return bool(current is None or functorch.maybe_get_level(tensor) > current)


def _matters(value: Tensor) -> bool:
    if value.is_floating_point() or value.is_complex():
        return True
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


def _unchanged(old: Any, new: Any) -> bool:
    if isinstance(old, tuple):
        return all(_unchanged(a, b) for a, b in zip(old, new, strict=True))
    return old is new


def _same_values(old: Tensor, new: Tensor) -> bool:
    """Whether both are the same memory; a tensor inside a transform has none of its own."""
    if old is new:
        return True
    try:
        return (
            old.data_ptr() == new.data_ptr()
            and old.shape == new.shape
            and old.stride() == new.stride()
            and old.is_conj() == new.is_conj()
            and old.is_neg() == new.is_neg()
        )
    except RuntimeError:
        return False
