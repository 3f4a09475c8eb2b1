"""Gradients and data of some rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from woodbury.curvature import Objective
from woodbury.curvature.layers import MatrixGradients, VectorGradients

__all__ = [
    "Gradients",
    "joined",
    "norms_of",
    "of_one_shape",
    "rows_of_data",
]

Gradients = MatrixGradients | VectorGradients


def of_one_shape(pieces: Sequence[Gradients]) -> bool:
    """Whether their examples have equally many positions."""
    vectors = isinstance(pieces[0], VectorGradients)
    return vectors or len({piece.grads.shape[1] for piece in pieces}) == 1  # type: ignore[union-attr]


def joined(pieces: Sequence[Gradients]) -> Gradients:
    """The examples of all pieces, of one shape."""
    first = pieces[0]
    if isinstance(first, VectorGradients):
        return VectorGradients(first.block, torch.cat([p.values for p in pieces]))  # type: ignore[union-attr]
    inputs, grads = zip(*((p.inputs, p.grads) for p in pieces), strict=True)  # type: ignore[union-attr]
    return MatrixGradients(first.block, torch.cat(inputs), torch.cat(grads))


def norms_of(blocks: Mapping[str, Gradients]) -> Tensor:
    """Norms of the gradients of every example over all blocks, ``[b]``."""
    return torch.stack([part.squared_norms() for part in blocks.values()]).sum(0).sqrt()


def rows_of_data(objective: Objective, wanted: Tensor) -> list[tuple[Tensor, object]]:
    """Places and data of some rows, batch by batch, in the form that the batches have."""
    found: list[tuple[Tensor, object]] = []
    for batch in objective.batches("chosen rows"):
        places = batch.places().to(wanted.device)
        index = torch.isin(places, wanted).nonzero().squeeze(1)
        if not len(index):
            continue
        leaves, structure = tree_flatten(batch.data)
        parts = [
            leaf[index.to(leaf.device)]
            if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == batch.size
            else leaf
            for leaf in leaves
        ]
        found.append((places[index], tree_unflatten(parts, structure)))
    return found
