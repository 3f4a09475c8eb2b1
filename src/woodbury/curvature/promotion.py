"""An objective in half precision as the same one in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from woodbury.curvature.batches import Batch
from woodbury.curvature.functions import ModuleFunction
from woodbury.curvature.objective import Objective
from woodbury.spaces import Space

__all__ = ["HALF", "promoted"]

HALF = (torch.float16, torch.bfloat16)


def promoted(objective: Objective) -> Objective:
    """The objective with parameters, buffers and data in float32; itself where it is no half.

    Squares of gradients have twice the digits of gradients, and sums of them over data would be
    noise in half precision.
    """
    if objective.dtype not in HALF:
        return objective
    other = copy.copy(objective)
    other._params = {name: value.float() for name, value in objective._params.items()}
    other.space = Space.of(other._params)
    if isinstance(other.l2, Tensor):
        other.l2 = other.l2.float()
    if other._weights is not None:
        other._weights = other._weights.float()
    predict, loss = objective._predict, objective._loss
    if isinstance(predict, ModuleFunction):
        wide = copy.copy(predict)
        wide.constants, wide.buffers = _wide(predict.constants), _wide(predict.buffers)
        predict = wide
    other._predict = None if predict is None else _on_wide_batches(predict)
    if loss is not None:
        other._loss = lambda params, data: loss(params, _wide(data))
    return other


def _on_wide_batches(predict: Callable[[Any, Batch], Any]) -> Callable[[Any, Batch], Any]:
    def function(params: Any, batch: Batch) -> Any:
        return predict(
            params, Batch(batch.index, _wide(batch.data), batch.size, batch.rows, batch.resident)
        )

    return function


def _wide(tree: Any) -> Any:
    return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype in HALF else x, tree)
