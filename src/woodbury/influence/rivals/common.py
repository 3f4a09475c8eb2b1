"""What the estimators share: gradients of queries, passes over training gradients, scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature import Objective
from woodbury.errors import StructureError
from woodbury.influence.chunks import gradient_chunks
from woodbury.influence.measurements import Measurement, measured, support
from woodbury.influence.scores import Scores

__all__ = ["against", "as_scores", "asked_of", "chunk_of", "query_gradients"]

_CHUNK_BYTES = 128 * 2**20


def asked_of(objective: Objective, measurement: Measurement, queries: Any) -> Objective:
    """The queries as an objective whose losses are the measurements.

    Raises:
        StructureError: the examples depend on each other (mode ``"train"``).
    """
    if objective.replayed:
        raise StructureError(
            "in mode 'train' the loss of an example depends on its batch; use "
            "Objective(..., mode='eval')"
        )
    return measured(objective, measurement, objective.data if queries is None else queries)


def chunk_of(objective: Objective) -> int:
    """How many gradients are held at once."""
    itemsize = torch.finfo(objective.dtype).bits // 8
    return max(1, _CHUNK_BYTES // (itemsize * objective.space.dim))


def query_gradients(asked: Objective) -> Tensor:
    """The gradients of the measurements, ``[Q, n]`` in the order of the queries."""
    pieces: list[Any] = list(gradient_chunks(asked, chunk_of(asked)))
    return asked.in_order(pieces)


def against(objective: Objective, columns: Tensor) -> Tensor:
    """Inner products of ``columns [k, n]`` with all training gradients, ``[k, N]``."""
    return _collected(objective, lambda gradients: gradients @ columns.T).T


def _collected(objective: Objective, apply: Callable[[Tensor], Tensor]) -> Tensor:
    pieces: list[Any] = [
        (places, apply(gradients))
        for places, gradients in gradient_chunks(objective, chunk_of(objective))
    ]
    return objective.in_order(pieces)


def as_scores(
    objective: Objective, values: Tensor, measurement: Measurement, **settings: Any
) -> Scores:
    """Values ``[Q, N]`` with what they are."""
    return Scores(
        values=values.contiguous(),
        rows=torch.arange(objective.num_examples),
        support=support(measurement),
        settings={
            "measurement": measurement if isinstance(measurement, str) else "function",
            "examples_in_the_mean": objective.num_examples,
            **settings,
        },
    )
