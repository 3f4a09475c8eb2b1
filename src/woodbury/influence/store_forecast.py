"""Disk, memory and time of a gradient store, before it is written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from woodbury.curvature import FactoredGradients, Objective
from woodbury.curvature.layers import Block, MatrixBlock
from woodbury.influence.forecast import layered_cost
from woodbury.influence.projection import (
    BlockProjection,
    Eigenbasis,
    EigenProjection,
    RandomProjection,
    random_projections,
    row_of,
)
from woodbury.operators.memory import in_words

__all__ = ["StoreForecast", "store_forecast"]

_FLOAT = 4
# The head of a file, and the row number of an example.
_HEAD, _PLACE = 1024, 8
# What EK-FAC has of eigenvectors where nobody says otherwise.
_SIDE_LIMIT, _BLOCK_LIMIT = 8192, 1024


@dataclass(frozen=True)
class StoreForecast:
    """What it will take to write a :class:`GradientStore`.

    Attributes:
        disk: bytes of the rows that are still to be written and of the eigenbasis, at most.
        memory: bytes beside the model and the data: factors of the matrix, projections, the rows of
            a file, and the rows of a batch.
        numbers: of the row of an example.
        passes: over the gradients of the training examples: two of a fit, and one that writes.
        gradient_seconds: of a pass of the fit, over all examples.
        writing_seconds: of the pass that writes.

    Example:
        >>> import tempfile, torch
        >>> from woodbury import Objective
        >>> from woodbury.influence import GradientStore, RandomProjection
        >>> data = torch.ones(50, 4), torch.ones(50, 3)
        >>> objective = Objective(torch.nn.Linear(4, 3), "mse", data)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     forecast = GradientStore(objective, folder, RandomProjection(2, 2)).forecast()
        >>> forecast.numbers, forecast.passes, forecast.disk
        (4, 1, 2624)
    """

    disk: int
    memory: int
    numbers: int
    passes: int
    gradient_seconds: float
    writing_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds in all; eigendecompositions of the factors are not in it."""
        return max(0, self.passes - 1) * self.gradient_seconds + self.writing_seconds

    def __str__(self) -> str:
        return (
            f"about {self.seconds:.2g} s in {self.passes} passes over the gradients, "
            f"{in_words(self.disk)} on disk ({self.numbers} numbers for each example), "
            f"{in_words(self.memory)} of memory"
        )


def store_forecast(
    objective: Objective,
    factored: FactoredGradients,
    projection: EigenProjection | RandomProjection,
    dtype: str,
    *,
    shard: int,
    fitted: bool,
    kept: bool,
    left: int,
) -> StoreForecast:
    """Measured on the first batch, with projections of the same sizes in the place of the fitted.

    Args:
        objective: of the training data.
        factored: its gradients.
        projection: which is asked for.
        dtype: of the rows.
        shard: bytes of rows in a file.
        fitted: whether the matrix is there.
        kept: whether its eigenbasis is on disk.
        left: rows that are not written yet.
    """
    blocks, itemsize = factored.blocks, torch.finfo(objective.dtype).bits // 8
    stand_ins = _stand_ins(blocks, projection, objective)
    numbers = sum(one.size for one in stand_ins.values())
    if not left:
        return StoreForecast(0, 0, numbers, 0, 0.0, 0.0)
    batch = next(iter(factored.passes("forecast")))
    start = time.perf_counter()
    row_of(stand_ins, batch)
    projected = (time.perf_counter() - start) / batch.size
    gradient, factors = layered_cost(objective)
    # Of each piece the norms of two errors, and a scale where the type has one.
    scales = 3 if dtype in ("float16", "int8") else 2
    each = numbers * getattr(torch, dtype).itemsize + _FLOAT * scales * len(blocks) + _PLACE
    files = -(-left * numbers * getattr(torch, dtype).itemsize // shard)
    basis = sum(
        part.numel() * part.element_size()
        for one in stand_ins.values()
        for part in vars(one).values()
        if isinstance(part, torch.Tensor)
    )
    eigen = isinstance(projection, EigenProjection)
    fit = eigen and not fitted
    # A file is put together from its batches and then rounded: twice its numbers.
    held = min(left, shard // max(1, numbers * getattr(torch, dtype).itemsize) + batch.size)
    memory = basis + (factors if fit else 0) + 2 * held * numbers * itemsize
    return StoreForecast(
        disk=left * each + files * _HEAD + (basis + _HEAD if eigen and not kept else 0),
        memory=memory,
        numbers=numbers,
        passes=3 if fit else 1,
        gradient_seconds=gradient * objective.num_examples,
        writing_seconds=(gradient + projected) * left,
    )


def _stand_ins(
    blocks: Mapping[str, Block], projection: EigenProjection | RandomProjection, of: Objective
) -> dict[str, BlockProjection]:
    """Projections of the right sizes."""
    like = torch.zeros((), dtype=of.dtype, device=of.device)
    if isinstance(projection, RandomProjection):
        return dict(random_projections(blocks, projection, of.space, like))
    found: dict[str, BlockProjection] = {}
    for name, block in blocks.items():
        if isinstance(block, MatrixBlock):
            p, m = block.p, block.m
            left, right = (like.new_zeros(n, n) if n <= _SIDE_LIMIT else None for n in (p, m))
            rows, columns = min(p, projection.outputs), min(m, projection.inputs)
            found[name] = Eigenbasis(
                left,
                None if block.one_hot else right,
                like.new_ones(p, m),
                torch.arange(rows, device=of.device),
                torch.arange(columns, device=of.device),
            )
            continue
        n = block.size(of.space)
        left = like.new_zeros(n, n) if n <= _BLOCK_LIMIT else None
        kept = torch.arange(min(n, projection.vector), device=of.device)
        found[name] = Eigenbasis(left, None, like.new_ones(n), kept, None)
    return found
