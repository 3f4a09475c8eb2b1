"""Where vectors live: named tensors <-> one flat vector, and the inner products of that vector.

Solvers and spectra see contiguous tensors ``[n]`` or blocks ``[n, k]`` and reach inner products
only through a :class:`Space`. A vector that is sharded over processes therefore needs a new
``Space`` (one that reduces over the processes), not a new solver.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import DeviceError, DtypeError, ShapeError

__all__ = ["Space"]


class Space:
    r"""A finite-dimensional Euclidean space of named tensors laid end to end.

    The inner product of two columns is $\langle x, y\rangle = \sum_i \bar x_i y_i$.

    Args:
        shapes: number of entries ``n`` of an unnamed vector, or a mapping from name to shape. The
            order of the mapping is the order of the flat vector.
        dtype: dtype of the tensors; ``None`` accepts any.
        device: device of the tensors; ``None`` accepts any.

    Raises:
        ShapeError: a size is negative.

    Cost: products and memory are those of a dot product; ``unflatten`` copies nothing.

    Example:
        >>> import torch
        >>> from woodbury import Space
        >>> space = Space({"weight": (2, 3), "bias": (2,)})
        >>> space.dim
        8
        >>> flat = torch.arange(8.0)
        >>> space.unflatten(flat)["bias"]
        tensor([6., 7.])
        >>> torch.equal(space.flatten(space.unflatten(flat)), flat)
        True
    """

    def __init__(
        self,
        shapes: int | Mapping[str, tuple[int, ...] | torch.Size],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.named = isinstance(shapes, Mapping)
        mapping = shapes if isinstance(shapes, Mapping) else {"": (operator.index(shapes),)}
        self.shapes = {name: torch.Size(shape) for name, shape in mapping.items()}
        for name, shape in self.shapes.items():
            if any(size < 0 for size in shape):
                raise ShapeError(f"shape of {name!r} is {tuple(shape)}: sizes must not be negative")
        self.sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.dim = sum(self.sizes.values())
        self.dtype = dtype
        self.device = None if device is None else indexed_device(device)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Space:
        """The space of a mapping of named tensors, which must share one dtype and one device."""
        if not tensors:
            raise ShapeError("no tensors given: a space needs at least one")
        dtypes = {tensor.dtype for tensor in tensors.values()}
        devices = {tensor.device for tensor in tensors.values()}
        if len(dtypes) > 1:
            listing = ", ".join(f"{name}: {tensor.dtype}" for name, tensor in tensors.items())
            raise DtypeError(f"tensors of several dtypes ({listing}); convert them to one first")
        if len(devices) > 1:
            listing = ", ".join(f"{name}: {tensor.device}" for name, tensor in tensors.items())
            raise DeviceError(f"tensors on several devices ({listing}); move them to one first")
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return cls(shapes, dtype=dtypes.pop(), device=devices.pop())

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Lay named tensors end to end: ``[n]``, or ``[n, k]`` where each has a trailing ``k``.

        Copies, unless there is a single tensor.

        Raises:
            ShapeError: a name is missing or unknown, or a shape is another.
            DtypeError: the tensors are of several dtypes.
        """
        missing = [name for name in self.shapes if name not in tensors]
        extra = [name for name in tensors if name not in self.shapes]
        if missing or extra:
            raise ShapeError(f"names do not match the space: missing {missing}, unknown {extra}")
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len(dtypes) > 1:  # concatenation would promote them silently
            raise DtypeError(f"tensors of several dtypes: {sorted(map(str, dtypes))}")
        trailing: torch.Size | None = None
        parts = []
        for name, shape in self.shapes.items():
            tensor = tensors[name]
            lead, tail = tensor.shape[: len(shape)], tensor.shape[len(shape) :]
            if lead != shape or len(tail) > 1 or (trailing is not None and tail != trailing):
                raise ShapeError(
                    f"{name!r} has shape {tuple(tensor.shape)}, expected {tuple(shape)} or "
                    f"{(*shape, 'k')} with one k for all names"
                )
            trailing = tail
            parts.append(tensor.reshape(self.sizes[name], *tail))
        if not parts:
            return torch.zeros(0, dtype=self.dtype, device=self.device)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Named views of ``flat`` (``[n]`` or ``[n, k]``); a block's columns become a last axis.

        Raises:
            ShapeError, DtypeError, DeviceError: ``flat`` is not of this space.
        """
        self.check(flat)
        tail = flat.shape[1:]
        views, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + self.sizes[name]
            views[name] = flat[start:stop].view((*shape, *tail))
            start = stop
        return views

    def check(self, x: Tensor, what: str = "vector") -> None:
        """Raise unless ``x`` is ``[n]`` or ``[n, k]`` of this space's dtype and device."""
        if x.dim() not in (1, 2) or x.shape[0] != self.dim:
            raise ShapeError(
                f"{what} has shape {tuple(x.shape)}, expected [{self.dim}] or [{self.dim}, k]"
            )
        if self.dtype is not None and x.dtype != self.dtype:
            raise DtypeError(
                f"{what} is {x.dtype}, the space is {self.dtype}; convert with .to({self.dtype})"
            )
        if self.device is not None and x.device != self.device:
            raise DeviceError(
                f"{what} is on {x.device}, the space on {self.device}; move it with .to(...)"
            )

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Column-wise inner products: a scalar for ``[n]``, ``[k]`` for ``[n, k]``."""
        if x is not y and x.shape != y.shape:  # vecdot would broadcast
            raise ShapeError(f"inner product of shapes {tuple(x.shape)} and {tuple(y.shape)}")
        if x.dim() == 1:
            return torch.vdot(x, y)
        return torch.linalg.vecdot(x, y, dim=0)

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        """All inner products ``x^H y`` of two blocks ``[n, j]`` and ``[n, k]``: ``[j, k]``."""
        return x.mH @ y

    def norm(self, x: Tensor) -> Tensor:
        """Column-wise Euclidean norms: a scalar for ``[n]``, ``[k]`` for ``[n, k]``."""
        return torch.linalg.vector_norm(x, dim=0)

    def __eq__(self, other: Any) -> bool:
        # Mappings compare equal in any order; the flat vector has one.
        return (
            type(other) is type(self)
            and vars(other) == vars(self)
            and list(other.shapes) == list(self.shapes)
        )

    def __hash__(self) -> int:
        return hash((type(self), tuple(self.shapes.items()), self.dtype, self.device))

    def __repr__(self) -> str:
        if not self.named:
            return f"Space({self.dim})"
        names = ", ".join(f"{name}: {tuple(shape)}" for name, shape in self.shapes.items())
        return f"Space({{{names}}}, dim={self.dim})"


def indexed_device(device: torch.device | str) -> torch.device:
    """``cuda`` as the ``cuda:0`` that tensors report, so that devices can be compared."""
    found = torch.device(device)
    if found.type in ("cpu", "meta") or ":" in str(found):
        return found
    return torch.empty(0, device=found).device
