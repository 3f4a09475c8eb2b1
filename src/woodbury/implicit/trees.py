"""Pytrees at the boundary, one flat vector inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)

from woodbury.errors import ArgumentError, DeviceError, DtypeError, GradientError, ShapeError

__all__ = ["Arguments", "Unknown", "half_or_work"]

_HALF = (torch.float16, torch.bfloat16)


def half_or_work(t: Tensor) -> Tensor:
    """Half precision as float32, in which conditions are evaluated and solved; others as is."""
    return t.float() if t.dtype in _HALF else t


def named_leaves(tree: Any, name: str) -> list[tuple[str, Any]]:
    """The leaves with what one would write to reach them, ``x['weight'][0]``."""
    pairs, _ = tree_flatten_with_path(tree)
    return [(f"{name}{keystr(path)}", leaf) for path, leaf in pairs]


@dataclass(frozen=True, eq=False)
class Unknown:
    """How a pytree of tensors, the solution, lies in one flat vector ``[n]``.

    Attributes:
        spec: structure of the pytree.
        names: what to call each leaf.
        shapes: shape of each leaf.
        dtypes: dtype of each leaf as it was given.
        dtype: that of the flat vector: float32 for half precision.
        device: of all leaves.
    """

    spec: TreeSpec
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Any, name: str = "x") -> Unknown:
        """The layout of ``x``.

        Raises:
            DtypeError: a leaf is not a tensor of real floating-point numbers, or they mix.
            DeviceError: leaves lie on several devices.
            ShapeError: there is no entry at all.
        """
        pairs = named_leaves(x, name)
        for leaf_name, leaf in pairs:
            if not isinstance(leaf, Tensor):
                raise DtypeError(
                    f"{leaf_name} is {type(leaf).__name__}; a solution is a tensor or a pytree of "
                    "tensors: convert with torch.as_tensor, and return the rest as auxiliary "
                    "output (has_aux=True)"
                )
            if not leaf.is_floating_point():
                raise DtypeError(
                    f"{leaf_name} is {leaf.dtype}; a solution that can be differentiated has real "
                    "floating-point entries (torch.view_as_real makes them of complex ones)"
                )
        if sum(leaf.numel() for _, leaf in pairs) == 0:
            shapes = {leaf_name: tuple(leaf.shape) for leaf_name, leaf in pairs}
            raise ShapeError(
                f"the solution has no entries ({shapes}): an empty batch has no solution to "
                "differentiate; skip it"
            )
        dtypes = {half_or_work(leaf).dtype for _, leaf in pairs}
        devices = {leaf.device for _, leaf in pairs}
        if len(dtypes) > 1:
            listing = ", ".join(f"{leaf_name}: {leaf.dtype}" for leaf_name, leaf in pairs)
            raise DtypeError(f"the solution has several dtypes ({listing}); convert them to one")
        if len(devices) > 1:
            listing = ", ".join(f"{leaf_name}: {leaf.device}" for leaf_name, leaf in pairs)
            raise DeviceError(f"the solution is on several devices ({listing})")
        _, spec = tree_flatten(x)
        return cls(
            spec,
            tuple(leaf_name for leaf_name, _ in pairs),
            tuple(leaf.shape for _, leaf in pairs),
            tuple(leaf.dtype for _, leaf in pairs),
            dtypes.pop(),
            devices.pop(),
        )

    @property
    def size(self) -> int:
        """The number of entries of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    def flatten(self, tree: Any, what: str) -> Tensor:
        """A pytree like the solution as one vector ``[n]`` of the dtype of the work.

        Raises:
            ShapeError: its structure or the shape of a leaf is another.
            DtypeError: a leaf is not a floating tensor.
        """
        leaves, spec = tree_flatten(tree)
        if spec != self.spec:
            raise ShapeError(f"{what} has the structure {spec}, the solution {self.spec}")
        for name, shape, leaf in zip(self.names, self.shapes, leaves, strict=True):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise DtypeError(f"{what} is {kind} where {name} is; expected a floating tensor")
            if leaf.shape != shape:
                raise ShapeError(
                    f"{what} has shape {tuple(leaf.shape)} where {name} has {tuple(shape)}"
                )
        parts = [leaf.reshape(-1).to(self.dtype) for leaf in leaves]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unflatten(self, flat: Tensor, *, work: bool) -> Any:
        """The pytree of views of ``flat [n]``; in the dtype of the work, or as it was given."""
        parts = flat.split([math.prod(shape) for shape in self.shapes])
        leaves = [
            part.view(shape) if work else part.view(shape).to(dtype)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
        return tree_unflatten(leaves, self.spec)


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a condition takes beside the solution: tensors, of which some are differentiated.

    Attributes:
        spec: structure of the tuple of arguments.
        leaves: all leaves; ``None`` where a tensor goes.
        places: where the tensors go.
        names: what to call each tensor.
        wanted: which tensors are differentiated.
        tensors: the tensors themselves, as they were given.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]
    places: tuple[int, ...]
    names: tuple[str, ...]
    wanted: tuple[bool, ...]
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, args: Sequence[Any], argnums: int | Sequence[int] | None) -> Arguments:
        """The layout of ``args``.

        Raises:
            ArgumentError: ``argnums`` points outside.
            GradientError: an argument named by ``argnums`` holds no floating tensor, or holds an
                integer, boolean or empty one.
        """
        chosen = checked_argnums(argnums, len(args))
        leaves: list[Any] = []
        places, names, wanted, tensors = [], [], [], []
        for index, arg in enumerate(args):
            for name, leaf in named_leaves(arg, f"argument {index}"):
                place = len(leaves)
                is_tensor = isinstance(leaf, Tensor)
                asked = chosen is None or index in chosen
                if chosen is not None and asked:
                    _check_wanted(name, leaf)
                leaves.append(None if is_tensor else leaf)
                if is_tensor:
                    places.append(place)
                    names.append(name)
                    wanted.append(asked and leaf.is_floating_point() and leaf.numel() > 0)
                    tensors.append(leaf)
        _, spec = tree_flatten(tuple(args))
        return cls(spec, tuple(leaves), tuple(places), tuple(names), tuple(wanted), tuple(tensors))

    def filled(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The arguments with other tensors in the place of those given."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.spec)


def checked_argnums(argnums: int | Sequence[int] | None, count: int) -> tuple[int, ...] | None:
    """Positions among ``count`` arguments, counted from the front.

    Raises:
        ArgumentError: one is out of range.
    """
    if argnums is None:
        return None
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    for number in numbers:
        if not -count <= number < count:
            raise ArgumentError(
                f"argnums holds {number}, but there are {count} arguments after the start; they "
                "are counted from 0, the start x0 not included"
            )
    return tuple(number % count for number in numbers)


def _check_wanted(name: str, leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise GradientError(
            f"{name} is {type(leaf).__name__}, and argnums asks for its derivative: pass a "
            "floating tensor, torch.tensor(value)"
        )
    if not leaf.is_floating_point():
        raise GradientError(
            f"{name} is {leaf.dtype}, and argnums asks for its derivative: only real "
            "floating-point tensors have one; leave it out of argnums or convert with .double()"
        )
    if leaf.numel() == 0:
        raise GradientError(
            f"{name} is empty (shape {tuple(leaf.shape)}), and argnums asks for its derivative: "
            "an empty batch; skip it"
        )
