"""One weight for every training example."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from woodbury.bilevel.learner.hyper import Hyper, own
from woodbury.curvature.losses import per_example
from woodbury.errors import ArgumentError, DataError

__all__ = ["ExampleWeights", "check_rows"]


class ExampleWeights(Hyper):
    r"""Weights $w_i$ of the examples: the loss of a batch is $\frac1B \sum_{i \in B} w_i \ell_i$.

    ``"sigmoid"``: $w_i = \sigma(\lambda_i)$, each between 0 and 1 for itself. ``"softmax"``:
    $w_i = N e^{\lambda_i} / \sum_j e^{\lambda_j}$ over **all** examples, with mean 1.

    The batches must say which rows they hold: ``(inputs, targets, indices)``, or a mapping with
    ``indices``. :class:`~woodbury.bilevel.Indexed` adds them to a data set.

    Args:
        count: number $N$ of training examples.
        kind: ``"sigmoid"`` or ``"softmax"``.
        initial: weight of every example at the start, in (0, 1), for ``"sigmoid"``.

    Raises:
        ArgumentError: ``count`` is not positive, ``initial`` is not in (0, 1), or ``kind`` is
            unknown.
        DataError: at use, a batch without indices, with indices outside 0 to N - 1, or a criterion
            that returns only the mean over the batch.

    Cost: a vector ``[N]``; a softmax over it in every step with ``"softmax"``.

    Source: data hyper-cleaning, Franceschi et al., "Forward and Reverse Gradient-Based
    Hyperparameter Optimization" (ICML 2017), section 5.1.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import ExampleWeights
        >>> ExampleWeights(3).weights()
        tensor([0.5000, 0.5000, 0.5000])
    """

    needs_rows = True

    def __init__(
        self,
        count: int,
        kind: Literal["sigmoid", "softmax"] = "sigmoid",
        *,
        initial: float = 0.5,
    ) -> None:
        super().__init__()
        if count < 1:
            raise ArgumentError(f"count is {count}; give the number of training examples")
        if kind not in ("sigmoid", "softmax"):
            raise ArgumentError(f"kind is {kind!r}; use 'sigmoid' or 'softmax'")
        if not 0 < initial < 1:
            raise ArgumentError(f"initial is {initial}; a sigmoid weight is between 0 and 1")
        self.kind = kind
        start = math.log(initial / (1 - initial)) if kind == "sigmoid" else 0.0
        self.logits = own(torch.full((count,), start))

    def weights(self) -> Tensor:
        """The weights ``[N]`` of all examples."""
        if self.kind == "sigmoid":
            return self.logits.sigmoid()
        return self.logits.softmax(0) * len(self.logits)

    def weigh(self, losses: Tensor, rows: Tensor | None) -> Tensor:
        """``w_i loss_i`` for the rows of the batch."""
        rows = check_rows(rows, len(self.logits), "ExampleWeights")
        # A softmax is over all examples, a sigmoid needs those of the batch only.
        weights = self.logits[rows].sigmoid() if self.kind == "sigmoid" else self.weights()[rows]
        return per_example(losses, "weights of examples") * weights


def check_rows(rows: Tensor | None, count: int, name: str) -> Tensor:
    """``rows``, seen to be numbers of rows.

    Raises:
        DataError: there are none, or some are outside 0 to ``count - 1``.
    """
    if rows is None:
        raise DataError(
            f"{name} needs to know which rows a batch holds; let it be (inputs, targets, indices) "
            "or a mapping with 'indices': DataLoader(Indexed(dataset), ...)"
        )
    low, high = (int(bound) for bound in rows.aminmax())
    if low < 0 or high >= count:
        raise DataError(
            f"{name} is of {count} examples, and a batch holds row {low if low < 0 else high}; "
            f"rows are 0 to {count - 1}"
        )
    return rows
