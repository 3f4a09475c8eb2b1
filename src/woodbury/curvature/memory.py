"""How much memory there is, and how much a graph keeps."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["available_bytes", "graph_bytes", "in_words", "storage_bytes"]

_FALLBACK = 2 * 2**30


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be had on a device.

    Args:
        device: a CUDA device is asked through torch; for the CPU it is what the kernel calls
            available, limited by the control group the process is in.

    Returns:
        Bytes; 2 GiB where the system does not tell.

    Example:
        >>> import torch
        >>> from woodbury.curvature.memory import available_bytes
        >>> available_bytes(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    known = [amount for amount in (_kernel_bytes(), _group_bytes()) if amount is not None]
    return max(0, min(known)) if known else _FALLBACK


def _kernel_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _group_bytes() -> int | None:
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        return int(limit) - int((root / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or the limit is "max"
        return None


def in_words(amount: float) -> str:
    """Bytes for people: ``'1.5 GiB'``.

    Example:
        >>> from woodbury.curvature.memory import in_words
        >>> in_words(3 * 2**29)
        '1.5 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


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
