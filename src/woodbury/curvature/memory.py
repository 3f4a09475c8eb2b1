"""How much memory a graph keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["graph_bytes", "storage_bytes"]


def storage_bytes(tensors: Iterable[Tensor], ignore: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages behind ``tensors``, leaving out those behind ``ignore``."""
    skip = {tensor.untyped_storage().data_ptr() for tensor in ignore}
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def graph_bytes(roots: Iterable[Tensor], ignore: Iterable[Tensor] = ()) -> int:
    """Bytes that the autograd graphs behind ``roots`` keep alive, ``roots`` included.

    Every distinct storage counts once; those behind ``ignore`` (parameters, data) do not count.
    What a custom function hides from Python is not seen.
    """
    roots = list(roots)
    return storage_bytes([*roots, *_saved(roots)], ignore)


def _saved(roots: list[Tensor]) -> Iterator[Tensor]:
    pending: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        yield from _saved_by(node)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)


# Shows what is kept without unpacking it, which may mean computing it again; not in every torch.
_SHOWS_DATA = hasattr(torch._C._autograd.SavedTensor, "data")


def _saved_by(node: Any) -> Iterator[Tensor]:
    for name in dir(node):
        if not name.startswith("_raw_saved_"):
            continue
        if _SHOWS_DATA:
            kept = [getattr(raw, "data", None) for raw in _listed(getattr(node, name))]
        else:
            custom = name == "_raw_saved_tensors"  # of a Function written in Python
            kept = _listed(getattr(node, "saved_tensors" if custom else name.removeprefix("_raw")))
        yield from (tensor for tensor in kept if isinstance(tensor, Tensor))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]
