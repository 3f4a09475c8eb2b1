"""Gradients of the loss of every example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from woodbury.curvature.batches import Batch
from woodbury.curvature.losses import per_example
from woodbury.curvature.problem import Params, Problem
from woodbury.errors import ArgumentError
from woodbury.spaces import Space

__all__ = ["ExampleGradients", "Examples", "each_row", "per_example_gradients"]

_CHUNK_BYTES = 64 * 2**20


class Examples(Protocol):
    """Losses per example as a function of parameters: what gradients are taken of."""

    @property
    def space(self) -> Space:
        """Of the parameters."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""

    @property
    def replayed(self) -> bool:
        """Whether examples depend on their batch."""

    def leaves(self) -> dict[str, Tensor]:
        """The parameters as leaves of a new graph."""

    def params_vector(self) -> Tensor:
        """The parameters as one flat vector ``[n]``."""

    def losses(self, params: Params, batch: Batch) -> Tensor:
        """Losses ``[B]`` of a batch."""


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
    gradients = ExampleGradients(problem)
    for batch in problem.batches("gradients per example"):
        places = batch.places().to(problem.device)
        for start in range(0, batch.size, rows):
            part = slice(start, min(start + rows, batch.size))
            yield places[part], gradients.of(batch, part)


class ExampleGradients:
    """Gradients of some examples of a batch: vectorised as long as the model allows it."""

    def __init__(self, problem: Examples) -> None:
        self.problem = problem
        self.vectorized = not problem.replayed

    def of(self, batch: Batch, part: slice | Tensor) -> Tensor:
        """The gradients ``[b, n]`` of the examples at ``part`` of the batch."""
        if self.vectorized:
            try:
                return _vectorized(self.problem, batch, part)
            except (RuntimeError, ValueError):  # the model has something that vmap cannot do
                self.vectorized = False
        return _one_by_one(self.problem, batch, part)


def _one_by_one(problem: Examples, batch: Batch, part: slice | Tensor) -> Tensor:
    leaves = problem.leaves()
    with torch.enable_grad():
        losses = per_example(problem.losses(leaves, batch), "gradients per example")[part]
    result = torch.zeros(len(losses), problem.space.dim, dtype=problem.dtype, device=problem.device)
    for loss, row in zip(losses, result, strict=True):
        gradients = torch.autograd.grad(
            loss, list(leaves.values()), retain_graph=True, allow_unused=True
        )
        views = problem.space.unflatten(row).values()
        for view, gradient in zip(views, gradients, strict=True):
            if gradient is not None:
                view.copy_(gradient)
    return result


def _vectorized(problem: Examples, batch: Batch, part: slice | Tensor) -> Tensor:
    def loss(flat: Tensor, single: Batch) -> Tensor:
        losses = problem.losses(problem.space.unflatten(flat), single)
        return per_example(losses, "gradients per example").sum()

    return each_row(problem, batch, part, torch.func.grad(loss))


def each_row(
    problem: Examples,
    batch: Batch,
    part: slice | Tensor,
    function: Callable[..., Any],
    *extra: Tensor,
) -> Tensor:
    """``function(parameters [n], batch of one row, *rows of extra)`` for the rows ``part``.

    Rows are vectorised over; raises what ``torch.func.vmap`` raises for a model that it cannot do.
    """
    leaves, structure = tree_flatten(batch.data)
    # What has a row per example is sliced; anything else is the same for all.
    sliced = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == batch.size for x in leaves]
    parts = [x[part] if cut else x for x, cut in zip(leaves, sliced, strict=True)]
    rows = [x for x, cut in zip(parts, sliced, strict=True) if cut]

    def one(flat: Tensor, *row: Tensor) -> Tensor:
        given = iter(row[: len(rows)])
        data = [next(given)[None] if cut else x for x, cut in zip(parts, sliced, strict=True)]
        single = Batch(batch.index, tree_unflatten(data, structure), 1, slice(0, 1))
        result: Tensor = function(flat, single, *row[len(rows) :])
        return result

    in_dims = (None, *[0] * (len(rows) + len(extra)))
    result: Tensor = torch.func.vmap(one, in_dims=in_dims)(problem.params_vector(), *rows, *extra)
    return result
