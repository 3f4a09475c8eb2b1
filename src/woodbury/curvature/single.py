"""Gradients per example of a few parameters, one by one, of whatever is backpropagated."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from woodbury.curvature.backprop import Backprop
from woodbury.curvature.batches import Batch
from woodbury.curvature.per_example import ExampleGradients
from woodbury.curvature.problem import Params
from woodbury.spaces import Space

__all__ = ["gradients_one_by_one"]


class _Restricted:
    """Scalars per example as a function of some of the parameters; the others are constants."""

    def __init__(self, backprop: Backprop, names: Iterable[str]) -> None:
        self.backprop = backprop
        values = backprop.problem.leaves()
        self.constants = {name: value.detach() for name, value in values.items()}
        self.mine = {name: self.constants[name] for name in names}
        self.space = Space.of(self.mine)
        first = next(iter(self.mine.values()))
        self.dtype, self.device = first.dtype, first.device
        self.replayed = backprop.problem.replayed

    def leaves(self) -> dict[str, Tensor]:
        return {name: value.detach().requires_grad_() for name, value in self.mine.items()}

    def params_vector(self) -> Tensor:
        return self.space.flatten(self.mine).clone()

    def losses(self, params: Params, batch: Batch) -> Tensor:
        data, cotangent = batch.data
        inner = Batch(batch.index, data, batch.size, batch.rows)
        root = self.backprop.evaluate({**self.constants, **params}, inner)
        return (root * cotangent).reshape(batch.size, -1).sum(1)


def gradients_one_by_one(
    backprop: Backprop, names: Iterable[str], batch: Batch, cotangent: Tensor
) -> dict[str, Tensor]:
    """Gradients ``[b, n]`` per example of ``<cotangent_i, root_i>`` for each of ``names``."""
    restricted = _Restricted(backprop, names)
    both = Batch(batch.index, (batch.data, cotangent), batch.size, batch.rows)
    flat = ExampleGradients(restricted).of(both, slice(0, batch.size))
    sizes = list(restricted.space.sizes.values())
    return dict(zip(restricted.space.sizes, torch.split(flat.detach(), sizes, dim=1), strict=True))
