"""Gradients of the loss of every example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from woodbury.curvature.batches import Batch
from woodbury.curvature.losses import per_example
from woodbury.curvature.problem import Problem
from woodbury.errors import ArgumentError

__all__ = ["per_example_gradients"]

_CHUNK_BYTES = 64 * 2**20


def per_example_gradients(problem: Problem, rows: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """See :meth:`woodbury.Objective.per_example_gradients`."""
    if rows is None:
        itemsize = torch.finfo(problem.dtype).bits // 8
        rows = max(1, _CHUNK_BYTES // (itemsize * problem.space.dim))
    if rows < 1:
        raise ArgumentError(f"rows is {rows}; a chunk holds at least one example")
    problem.require_rows("gradients per example")
    return _chunks(problem, rows)


def _chunks(problem: Problem, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    vectorized = not problem.replayed
    for batch in problem.batches("gradients per example"):
        places = batch.places().to(problem.device)
        for start in range(0, batch.size, rows):
            stop = min(start + rows, batch.size)
            if vectorized:
                try:
                    yield places[start:stop], _vectorized(problem, batch, start, stop)
                    continue
                except (RuntimeError, ValueError):  # the model has something that vmap cannot do
                    vectorized = False
            yield places[start:stop], _one_by_one(problem, batch, start, stop)


def _one_by_one(problem: Problem, batch: Batch, start: int, stop: int) -> Tensor:
    leaves = problem.leaves()
    with torch.enable_grad():
        losses = per_example(problem.losses(leaves, batch), "gradients per example")
    result = torch.zeros(
        stop - start, problem.space.dim, dtype=problem.dtype, device=problem.device
    )
    for i in range(start, stop):
        gradients = torch.autograd.grad(
            losses[i], list(leaves.values()), retain_graph=True, allow_unused=True
        )
        for part, gradient in zip(
            problem.space.unflatten(result[i - start]).values(), gradients, strict=True
        ):
            if gradient is not None:
                part.copy_(gradient)
    return result


def _vectorized(problem: Problem, batch: Batch, start: int, stop: int) -> Tensor:
    leaves, structure = tree_flatten(batch.data)
    # What has a row per example is sliced; anything else is the same for all.
    sliced = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == batch.size for x in leaves]
    parts = [x[start:stop] if cut else x for x, cut in zip(leaves, sliced, strict=True)]
    rows = [x for x, cut in zip(parts, sliced, strict=True) if cut]

    def loss(flat: Tensor, *row: Tensor) -> Tensor:
        given = iter(row)
        data = [next(given)[None] if cut else x for x, cut in zip(parts, sliced, strict=True)]
        single = Batch(batch.index, tree_unflatten(data, structure), 1, slice(0, 1))
        losses = problem.losses(problem.space.unflatten(flat), single)
        return per_example(losses, "gradients per example").sum()

    flat = problem.params_vector()
    gradient: Callable[..., Any] = torch.func.grad(loss)
    result = torch.func.vmap(gradient, in_dims=(None, *[0] * len(rows)))(flat, *rows)
    return result
