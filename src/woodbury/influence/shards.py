"""Rows of numbers in files: quantised, in shards that are there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from woodbury._files import atomic
from woodbury.errors import DataError

__all__ = [
    "Chunk",
    "Quantized",
    "RowType",
    "Shard",
    "chunks",
    "quantize",
    "read_shard",
    "write_shard",
]

RowType = Literal["float64", "float32", "float16", "int8"]
_FORMAT = "woodbury gradient store 1"
_LEVELS = {"float16": 1.0, "int8": 127.0}


@dataclass(frozen=True, eq=False)
class Quantized:
    r"""Rows as they are stored.

    Attributes:
        values: ``[b, K]`` in the type of the store.
        scales: what the values of a piece are to be multiplied by, ``[b, L]`` float32; ``None``
            for types that need none.
        errors: norm of what rounding took from each piece, ``[b, L]`` float32.
    """

    values: Tensor
    scales: Tensor | None
    errors: Tensor


def quantize(rows: Tensor, sizes: Sequence[int], kind: RowType) -> Quantized:
    r"""Round rows ``[b, K]`` of pieces of these sizes.

    ``"int8"`` and ``"float16"`` have a scale for each piece of each row, its largest magnitude over
    127 or 1, so that small gradients of one layer are not lost beside large ones of another. The
    errors are measured, not bounded: $\|r - \hat r\|$ of each piece.
    """
    dtype = getattr(torch, kind)
    if kind not in _LEVELS:
        values, scales = rows.to(dtype), None
    else:
        largest = torch.stack([part.abs().amax(1) for part in rows.split(list(sizes), 1)], 1)
        scales = (largest / _LEVELS[kind]).float()
        # A scale that float32 cannot hold would make infinities of what is next to nothing.
        scales = scales.where(scales >= torch.finfo(torch.float32).tiny, 1)
        scaled = rows / _spread(scales, sizes).to(rows.dtype)
        limit = _LEVELS[kind]
        values = scaled.round().clamp(-limit, limit) if kind == "int8" else scaled
        values = values.to(dtype)
    rest = (rows.double() - restored(values, scales, sizes, torch.float64)).square()
    errors = torch.stack([part.sum(1) for part in rest.split(list(sizes), 1)], 1).sqrt()
    return Quantized(values, scales, at_least(errors))


def restored(
    values: Tensor, scales: Tensor | None, sizes: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Stored rows as numbers of ``dtype``."""
    found = values.to(dtype)
    return found if scales is None else found * _spread(scales, sizes).to(dtype)


def _spread(scales: Tensor, sizes: Sequence[int]) -> Tensor:
    counts = torch.tensor(list(sizes), device=scales.device)
    return scales.repeat_interleave(counts, dim=1)


def at_least(values: Tensor) -> Tensor:
    """In float32, rounded up: a bound stays one."""
    found = values.float()
    up = torch.nextafter(found, torch.full_like(found, torch.inf))
    return torch.where(found.to(values.dtype) < values, up, found)


@dataclass(frozen=True)
class Shard:
    """A file of rows.

    Attributes:
        path: where.
        count: of its rows.
        batches: how many batches of the data are in it and the shards before.
    """

    path: Path
    count: int
    batches: int


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some rows of a store.

    Attributes:
        places: in the training data, ``[b]``.
        values: ``[b, K]``.
        errors: ``[b, L]``, see :class:`Quantized`.
        dropped: norms of what the projection left out, ``[b, L]``.
    """

    places: Tensor
    values: Tensor
    errors: Tensor
    dropped: Tensor


def write_shard(
    path: Path, places: Tensor, rows: Quantized, dropped: Tensor, batches: int
) -> Shard:
    """Write a shard: the same tensors make the same bytes."""
    tensors = {
        "places": places,
        "values": rows.values,
        "errors": rows.errors,
        "dropped": at_least(dropped),
    }
    if rows.scales is not None:
        tensors["scales"] = rows.scales
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One word only: the order of several is not fixed by the format.
    words = json.dumps({"format": _FORMAT, "count": len(places), "batches": batches})
    with atomic(path) as temporary:
        save_file(plain, temporary, metadata={"words": words})
    return Shard(path, len(places), batches)


def read_shard(path: Path) -> Shard:
    """The head of a shard; its rows stay on disk.

    Raises:
        DataError: the file is damaged, or no shard.
    """
    try:
        with safe_open(path, framework="pt") as file:
            words: dict[str, Any] = json.loads((file.metadata() or {}).get("words", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); delete it and the shards behind it, and write again"
        ) from None
    if words.get("format") != _FORMAT:
        raise DataError(f"{path} is no shard of a gradient store; give another folder")
    return Shard(path, int(words["count"]), int(words["batches"]))


def chunks(
    shard: Shard, sizes: Sequence[int], dtype: torch.dtype, step: int, device: torch.device
) -> Iterator[Chunk]:
    """The rows of a shard, ``step`` at a time; the file is mapped, and no more of it is read."""
    with safe_open(shard.path, framework="pt") as file:
        names = set(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        for start in range(0, shard.count, step):
            part = slice(start, min(start + step, shard.count))
            found = {name: piece[part].to(device) for name, piece in slices.items()}
            values = restored(found["values"], found.get("scales"), sizes, dtype)
            yield Chunk(
                found["places"], values, found["errors"].double(), found["dropped"].double()
            )
