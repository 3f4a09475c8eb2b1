"""What is measured of a query: its loss, the margin of its label, or any function of outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from woodbury.curvature import Objective
from woodbury.curvature.batches import split
from woodbury.curvature.likelihoods import Bernoulli, Categorical
from woodbury.errors import ArgumentError, DataError, StructureError

__all__ = ["Measurement", "measured", "support"]

Measurement = Literal["loss", "margin"] | Callable[[Tensor, Any], Tensor]


def support(measurement: Measurement) -> int:
    """The sign of a change that speaks for the prediction: a lower loss, else a higher value."""
    return -1 if measurement == "loss" else 1


def measured(objective: Objective, measurement: Measurement, data: Any) -> Objective:
    """The queries as an objective, whose loss of an example is what is measured of it.

    Args:
        objective: of the training data.
        measurement: see :class:`woodbury.Influence`.
        data: the queries, in a form that :class:`woodbury.Objective` takes.

    Raises:
        ArgumentError: a measurement that is not known.
        StructureError: ``"margin"`` with a criterion that has no classes; a measurement of outputs
            where the objective is a loss only.
    """
    if measurement == "loss":
        return objective.with_data(data)
    if measurement == "margin":
        return objective.measuring(_margin(objective), data)
    if not callable(measurement):
        raise ArgumentError(
            f"measurement is {measurement!r}; give 'loss', 'margin', or a function (outputs, "
            "batch) that returns one number for each query, [B]"
        )
    objective.criterion  # noqa: B018 - raises where there are no outputs
    return objective.measuring(measurement, data)


def _margin(objective: Objective) -> Callable[[Tensor, Any], Tensor]:
    criterion = objective.criterion
    if isinstance(criterion, Categorical):
        return lambda outputs, batch: _categorical_margin(criterion, outputs, _labels(batch))
    if isinstance(criterion, Bernoulli):
        return lambda outputs, batch: _bernoulli_margin(outputs, _labels(batch))
    raise StructureError(
        "a margin needs labels: it is defined for cross-entropy and binary cross-entropy on "
        "logits; for other criteria measure the 'loss', or give a function (outputs, batch)"
    )


def _labels(batch: Any) -> Tensor:
    target = split(batch)[2]
    if not isinstance(target, Tensor):
        raise DataError(f"the labels are a {type(target).__name__}, expected a tensor")
    return target


def _categorical_margin(criterion: Categorical, outputs: Tensor, labels: Tensor) -> Tensor:
    """``log p_y / (1 - p_y)``, the mean over the counted elements of an example."""
    if labels.is_floating_point():
        raise DataError("a margin needs labels that are class numbers, these are probabilities")
    axis = outputs.dim() - 1 if criterion.classes_last else 1
    logits = outputs.movedim(axis, -1)
    counted = labels != criterion.ignore_index
    index = labels.where(counted, 0).unsqueeze(-1)
    own = logits.gather(-1, index).squeeze(-1)
    others = logits.scatter(-1, index, float("-inf")).logsumexp(-1)
    margin = ((own - others) * counted).flatten(1) if labels.dim() > 1 else own - others
    if margin.dim() == 1:
        return margin
    return margin.sum(1) / counted.flatten(1).sum(1).clamp(min=1)


def _bernoulli_margin(outputs: Tensor, labels: Tensor) -> Tensor:
    """``log p_y / (1 - p_y) = (2 y - 1) z``, the mean over the elements of an example."""
    sign = torch.where(labels > 0.5, 1, -1).to(outputs.dtype)
    margin = sign * outputs
    return margin.flatten(1).mean(1) if margin.dim() > 1 else margin
