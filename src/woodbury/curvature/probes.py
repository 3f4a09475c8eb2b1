"""Checks that a loss is what an objective takes it for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from woodbury.curvature.batches import Batch
from woodbury.curvature.losses import per_example
from woodbury.errors import DataError

if TYPE_CHECKING:
    from woodbury.curvature.problem import Problem

__all__ = ["require_examplewise", "require_examplewise_on_some", "some_examples"]

# Examples that a check looks at.
_FEW = 4
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-3}


def some_examples(batch: Batch, start: int, stop: int) -> Batch:
    """The batch of some examples; what has no row per example is the same for all."""
    leaves, structure = tree_flatten(batch.data)
    parts = [
        x[start:stop] if isinstance(x, Tensor) and x.dim() > 0 and len(x) == batch.size else x
        for x in leaves
    ]
    rows = batch.places()[start:stop]
    return Batch(batch.index, tree_unflatten(parts, structure), stop - start, rows)


def require_examplewise_on_some(problem: Problem, batch: Batch) -> None:
    """:func:`require_examplewise` on the first examples, or on all where data does not split.

    Raises:
        DataError: as :func:`require_examplewise`.
    """
    if batch.size > _FEW:
        try:
            require_examplewise(problem, some_examples(batch, 0, _FEW))
            return
        except (RuntimeError, ValueError, IndexError):
            pass  # the data does not split, or the mistake is shown once more
    require_examplewise(problem, batch)


def require_examplewise(problem: Problem, batch: Batch) -> None:
    """Raise unless the loss of an example is the same on its own and within its batch.

    A loss that divides by the size of the batch, or sums over it, or mixes examples, shows here.

    Raises:
        DataError: it is not, or there is only a scalar for the whole batch.
    """
    with torch.no_grad():
        params = problem.leaves()
        losses = per_example(problem.losses(params, batch), "gradients per example")
        if batch.size == 1 or problem.replayed:
            return
        row = int(losses.abs().argmax())
        try:
            alone = problem.losses(params, some_examples(batch, row, row + 1))
        except (RuntimeError, ValueError, IndexError):  # the model does not take one example
            return
    within, own = float(losses[row]), float(alone.reshape(-1)[0])
    tolerance = _AGREEMENT.get(losses.dtype, 0.1)
    if abs(within - own) <= tolerance * max(abs(within), abs(own)):
        return
    ratio = f", {within / own:.3g} times as much" if own else ""
    raise DataError(
        f"the loss of example {row} of batch {batch.index} is {own:.6g} on its own and "
        f"{within:.6g} within its batch of {batch.size}{ratio}; a loss must belong to its example: "
        "return one loss per example without sums or means over the batch (reduction='none'), and "
        "leave the mean to the objective"
    )
