"""Which part of which parameter a tensor is, seen from its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Reference", "References"]


@dataclass(frozen=True, order=True)
class Reference:
    """Rows of a parameter.

    Attributes:
        name: of the parameter.
        start: first row (index on axis 0).
        stop: the row after the last.
    """

    name: str
    start: int
    stop: int

    def part(self, start: int, stop: int) -> Reference:
        """Rows ``start`` to ``stop`` of these rows."""
        return Reference(self.name, self.start + start, self.start + stop)


class References:
    """Finds the selected parameters, and views of them, among the arguments of a function."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        for name, leaf in leaves.items():
            if leaf.numel():
                key = leaf.untyped_storage().data_ptr()
                self._by_storage.setdefault(key, []).append((name, leaf))

    def owner(self, tensor: object) -> tuple[str, Tensor] | None:
        """The parameter a tensor is (a view of), with its name."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad or not tensor.numel():
            return None
        for name, leaf in self._by_storage.get(tensor.untyped_storage().data_ptr(), ()):
            offset = tensor.storage_offset() - leaf.storage_offset()
            if 0 <= offset < leaf.numel():
                return name, leaf
        return None

    def find(self, tensor: object) -> tuple[Reference, bool] | None:
        """The rows a tensor is, and whether it is their transpose; ``None`` for anything else."""
        owner = self.owner(tensor)
        if owner is None:
            return None
        assert isinstance(tensor, Tensor)  # or it would have no owner
        name, leaf = owner
        if tensor is leaf:
            return Reference(name, 0, len(leaf) if leaf.dim() else 1), False
        if tensor.dim() != leaf.dim() or leaf.dim() == 0:
            return None
        offset = tensor.storage_offset() - leaf.storage_offset()
        if offset % leaf.stride(0):
            return None
        start = offset // leaf.stride(0)
        if tensor.shape[1:] == leaf.shape[1:] and _strides(tensor) == _strides(leaf, len(tensor)):
            return Reference(name, start, start + len(tensor)), False
        turned = tensor.mT if tensor.dim() == 2 else tensor
        if turned.shape[1:] == leaf.shape[1:] and _strides(turned) == _strides(leaf, len(turned)):
            return Reference(name, start, start + len(turned)), True
        return None


def _strides(tensor: Tensor, rows: int | None = None) -> list[int]:
    """Strides of the axes that have more than one entry."""
    sizes = [len(tensor) if rows is None else rows, *tensor.shape[1:]]
    return [stride for stride, size in zip(tensor.stride(), sizes, strict=True) if size > 1]
