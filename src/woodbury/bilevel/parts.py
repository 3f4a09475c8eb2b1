"""Named tensors and their parts, as the modules of this room hand them to each other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from woodbury.curvature.batches import Batch
from woodbury.errors import GradientError, ShapeError
from woodbury.spaces import Space

Tensors = Tensor | Mapping[str, Tensor]
Parts = dict[str, Tensor | None]


def named(tensors: Tensors, what: str) -> tuple[dict[str, Tensor], bool]:
    """The tensors by name (``""`` for a single one), and whether they had names.

    Raises:
        GradientError: there is none, or one is not of floating point.
    """
    is_named = not isinstance(tensors, Tensor)
    mapping = dict(tensors) if isinstance(tensors, Mapping) else {"": tensors}
    if not mapping:
        raise GradientError(f"{what} is empty; give at least one tensor")
    for name, tensor in mapping.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise GradientError(f"{what}[{name!r}] is {kind}; a floating tensor is needed")
    return mapping, is_named


def detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without their graph, over the same memory."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New leaves over the same memory."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def add_scaled(total: Tensor | None, part: Tensor | None, weight: float) -> Tensor | None:
    """``total + weight * part``, where ``None`` is zero; ``total`` may be changed."""
    if part is None:
        return total
    return part * weight if total is None else total.add_(part, alpha=weight)


def or_zeros(part: Tensor | None, like: Tensor) -> Tensor:
    """``part``, zeros like ``like`` for ``None``."""
    return torch.zeros_like(like) if part is None else part.detach()


def write(space: Space, tensors: Mapping[str, Tensor], flat: Tensor) -> None:
    """Copy a flat vector into named tensors."""
    parts = space.unflatten(vector(flat, "the vector"))
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(parts[name])


def vector(flat: Tensor, what: str) -> Tensor:
    """``flat``, seen to be one vector."""
    if flat.dim() != 1:
        raise ShapeError(f"{what} has shape {tuple(flat.shape)}, expected one flat vector")
    return flat


def rows_of(batch: Batch | None) -> int:
    """What a batch counts; a loss without data counts as one example."""
    return 1 if batch is None else batch.size
