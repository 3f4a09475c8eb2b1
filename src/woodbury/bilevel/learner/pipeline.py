"""The training loss with hyperparameters in it, and the validation loss, as modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from woodbury.bilevel.learner.hyper import Hyper
from woodbury.bilevel.learner.loss_weights import LossWeights
from woodbury.curvature.batches import batch_size, split
from woodbury.curvature.criteria import make_criterion
from woodbury.curvature.functions import output_tensor
from woodbury.curvature.likelihoods import Categorical
from woodbury.curvature.losses import Criterion
from woodbury.errors import ArgumentError, DataError

__all__ = ["Term", "TrainingLoss", "ValidationLoss", "rows_in"]

Predict = Callable[..., Any]


class Term:
    """A criterion on what a model returns, as losses ``[B]`` or their mean."""

    def __init__(self, criterion: Any) -> None:
        self.criterion: Criterion = make_criterion(criterion)
        # A function of the user's is given what the model returned, whatever that is.
        self.raw = type(self.criterion) is Criterion and not isinstance(criterion, nn.Module)

    def losses(self, result: Any, target: Any, size: int) -> Tensor:
        """The losses of a batch of ``size`` examples."""
        if self.raw:
            return self.criterion.losses(result, target, size)
        output, named = output_tensor(result, size)
        if named and isinstance(self.criterion, Categorical):
            self.criterion.classes_last = True
        return self.criterion.losses(output, target, size)


class ValidationLoss(nn.Module):
    """``batch -> mean criterion`` of a model, without any hyperparameter."""

    def __init__(self, model: nn.Module, criterion: Any) -> None:
        super().__init__()
        self.model = model
        self.term = Term(criterion)

    def forward(self, batch: Any) -> Tensor:
        """The mean loss of the batch."""
        size = checked_size(batch)
        args, kwargs, target = split(batch)
        return self.term.losses(self.model(*args, **kwargs), target, size).mean()


class TrainingLoss(nn.Module):
    """``batch -> mean training loss``, without the penalties of weight decay."""

    def __init__(self, model: nn.Module, criterion: Any, hypers: Mapping[str, Hyper]) -> None:
        super().__init__()
        self.model = model
        self.hypers = nn.ModuleDict(hypers)
        terms = criterion if isinstance(criterion, Mapping) else {"": criterion}
        if not terms:
            raise ArgumentError("criterion is an empty mapping; give at least one term")
        self.terms = {name: Term(term) for name, term in terms.items()}
        self.combiner = _combiner(hypers, criterion)

    def forward(self, batch: Any) -> Tensor:
        """The mean loss of the batch."""
        return self.evaluate(self.model, batch)

    def evaluate(self, predict: Predict, batch: Any) -> Tensor:
        """The same, with ``predict`` in place of the model (a wrapper of it)."""
        hypers: list[Any] = list(self.hypers.values())
        size = checked_size(batch)
        args, kwargs, target = split(batch)
        rows = rows_in(batch, size) if any(hyper.needs_rows for hyper in hypers) else None
        for hyper in hypers:
            args = hyper.inputs(args, rows)
        result = predict(*args, **kwargs)
        for hyper in hypers:
            result = hyper.outputs(result)
            target = hyper.target(target, rows)
        terms = {name: t.losses(result, target, size) for name, t in self.terms.items()}
        losses = next(iter(terms.values())) if self.combiner is None else self.combiner(terms)
        for hyper in hypers:
            losses = hyper.weigh(losses, rows)
        return losses.mean()


def _combiner(
    hypers: Mapping[str, Hyper], criterion: Any
) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
    """What makes one loss of several terms."""
    found = [hyper for hyper in hypers.values() if isinstance(hyper, LossWeights)]
    if len(found) > 1:
        raise ArgumentError(f"{len(found)} LossWeights are given; one has all terms")
    names = set(criterion) if isinstance(criterion, Mapping) else None
    if found:
        if names != set(found[0].names):
            given = "one criterion" if names is None else f"the terms {sorted(names)}"
            raise ArgumentError(
                f"LossWeights is of {sorted(found[0].names)}, and criterion has {given}; give a "
                "mapping from the same names to criteria"
            )
        return found[0].combine
    if names is not None and len(names) > 1:
        return _plain_sum
    return None


def _plain_sum(terms: Mapping[str, Tensor]) -> Tensor:
    first, *others = terms.values()
    for other in others:
        first = first + other
    return first


def checked_size(batch: Any) -> int:
    """Number of rows of a batch.

    Raises:
        DataError: there are none, or inputs and targets differ in their number.
    """
    size = batch_size(batch)
    if size == 0:
        raise DataError("the batch has no rows; leave it out")
    target = split(batch)[2]
    if isinstance(target, Tensor) and target.dim() > 0 and len(target) != size:
        raise DataError(f"the batch has {size} rows of inputs and {len(target)} targets")
    return size


def rows_in(batch: Any, size: int) -> Tensor | None:
    """The row numbers that a batch carries, ``[size]``, or ``None``.

    Raises:
        DataError: they are no integers ``[size]``.
    """
    rows = batch.get("indices") if isinstance(batch, Mapping) else None
    if isinstance(batch, tuple | list) and len(batch) == 3:
        rows = batch[2]
    if rows is None:
        return None
    whole = isinstance(rows, Tensor) and not (rows.is_floating_point() or rows.is_complex())
    if not whole or rows.dtype == torch.bool or rows.shape != (size,):
        found = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows)
        raise DataError(
            f"the indices of a batch of {size} rows are {found}; give integers [{size}]"
        )
    return rows.long()
