"""Learned labels: a distribution over the classes for every training example."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from woodbury.bilevel.learner.example_weights import check_rows
from woodbury.bilevel.learner.hyper import Hyper, own
from woodbury.errors import ArgumentError, DataError, DtypeError

__all__ = ["LabelCorrection"]


class LabelCorrection(Hyper):
    r"""Soft labels $\operatorname{softmax}(\Lambda_i)$ that replace those of the data.

    The loss of example $i$ is the cross-entropy with the probabilities
    $\operatorname{softmax}(\Lambda_i) \in \mathbb R^C$, which start at ``confidence`` for the label
    given and share the rest evenly. The criterion must take probabilities for a target, as
    cross-entropy does. Batches must say which rows they hold, as for
    :class:`~woodbury.bilevel.ExampleWeights`.

    Args:
        labels: the labels given, ``[N]``, integers from 0 to ``classes - 1``.
        classes: number $C$ of classes; default ``max(labels) + 1``.
        confidence: probability of the label given at the start, above ``1 / C`` and below 1.

    Raises:
        DtypeError: ``labels`` are not integers.
        DataError: ``labels`` are empty or outside 0 to ``classes - 1``; at use, unknown rows.
        ArgumentError: fewer than two classes, or ``confidence`` out of its range.

    Cost: a matrix ``[N, C]``.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import LabelCorrection
        >>> correction = LabelCorrection(torch.tensor([0, 2]), confidence=0.8)
        >>> correction.probabilities()
        tensor([[0.8000, 0.1000, 0.1000],
                [0.1000, 0.1000, 0.8000]])
        >>> correction.labels()
        tensor([0, 2])
    """

    needs_rows = True

    def __init__(
        self, labels: Tensor, classes: int | None = None, *, confidence: float = 0.9
    ) -> None:
        super().__init__()
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise DtypeError(f"labels are {labels.dtype}; give the integers of the classes")
        if labels.dim() != 1 or len(labels) == 0:
            raise DataError(f"labels have shape {tuple(labels.shape)}; expected [N] with N >= 1")
        low, high = (int(bound) for bound in labels.aminmax())
        classes = high + 1 if classes is None else classes
        if classes < 2:
            raise ArgumentError(f"classes is {classes}; at least two are needed")
        if low < 0 or high >= classes:
            raise DataError(
                f"labels reach from {low} to {high}; {classes} classes are 0 to {classes - 1}"
            )
        if not 1 / classes < confidence < 1:
            raise ArgumentError(
                f"confidence is {confidence}; it must be above 1 / classes = {1 / classes:.3g} and "
                "below 1"
            )
        start = math.log(confidence * (classes - 1) / (1 - confidence))
        onehot = torch.nn.functional.one_hot(labels.long(), classes)
        self.logits = own(onehot.to(torch.get_default_dtype()) * start)

    def probabilities(self) -> Tensor:
        """The labels in force, ``[N, C]``, rows that sum to 1."""
        return self.logits.softmax(1)

    def labels(self) -> Tensor:
        """The most probable class of every example, ``[N]``."""
        return self.logits.argmax(1)

    def target(self, target: Any, rows: Tensor | None) -> Tensor:
        """The probabilities ``[B, C]`` of the rows of the batch."""
        rows = check_rows(rows, len(self.logits), "LabelCorrection")
        return self.logits[rows].softmax(1)
