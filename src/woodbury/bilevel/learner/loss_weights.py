"""Weights of the terms of a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from woodbury.bilevel.learner.hyper import Hyper, own
from woodbury.errors import ArgumentError

__all__ = ["LossWeights"]


class LossWeights(Hyper):
    r"""The training loss $\sum_k e^{\lambda_k} \ell_k$ of several terms.

    The learner is then given its criterion as a mapping from the names of the terms to criteria,
    and a criterion of its own for validation.

    Args:
        initial: $e^{\lambda_k}$ at the start by name of the term, each positive.

    Raises:
        ArgumentError: no terms, or a weight that is not positive.

    Example:
        >>> from woodbury.bilevel import LossWeights
        >>> LossWeights({"class": 1.0, "shape": 0.25}).weights()
        {'class': tensor(1.), 'shape': tensor(0.2500)}
    """

    def __init__(self, initial: Mapping[str, float]) -> None:
        super().__init__()
        if not initial:
            raise ArgumentError("initial is empty; give a weight for every term of the loss")
        for name, weight in initial.items():
            if not 0 < weight < math.inf:
                raise ArgumentError(
                    f"the weight of {name!r} is {weight}; exp(lambda) is positive: for almost none "
                    "give 1e-8"
                )
        self.names = list(initial)
        self.log_weights = own(torch.tensor([math.log(w) for w in initial.values()]))

    def weights(self) -> dict[str, Tensor]:
        """The weights by name."""
        return dict(zip(self.names, self.log_weights.exp(), strict=True))

    def combine(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms, each ``[B]`` or a scalar."""
        weights = self.weights()
        first, *others = [weights[name] * loss for name, loss in losses.items()]
        for other in others:
            first = first + other
        return first
