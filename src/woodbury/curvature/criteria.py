"""Criteria as losses per example, and their curvature in the outputs.

The objective is a mean over *examples*, so every criterion is first turned into one loss per
example. An example may have several elements (tokens, pixels, regression targets):

- ``reduction="mean"`` (the default everywhere): the loss of an example is the mean over its own
  elements. Elements that ``ignore_index`` excludes are not counted, and an example all of whose
  elements are excluded has loss 0. Weights per class multiply each element and are not divided out
  again (torch divides by their sum over the batch, which depends on how the data is batched).
- ``reduction="sum"``: the sum over the example's own elements.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from woodbury.curvature.likelihoods import Bernoulli, Categorical, Gaussian
from woodbury.curvature.losses import Criterion
from woodbury.errors import ArgumentError

__all__ = ["make_criterion"]

# Losses of torch that are convex in their first argument, whatever their settings.
_CONVEX = (
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.SoftMarginLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.MultiMarginLoss,
    nn.NLLLoss,
)
# Losses of torch whose second derivative in the outputs is zero wherever it exists.
_LINEAR = (nn.L1Loss, nn.NLLLoss, nn.KLDivLoss)

_BY_NAME: dict[Any, Callable[[], nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}


def make_criterion(criterion: Any) -> Criterion:
    """A criterion as losses per example.

    Args:
        criterion: ``"cross_entropy"`` or ``"mse"``; a loss module of torch with any reduction; or a
            callable ``(output, target)`` that returns losses per example ``[B, ...]`` (averaged
            over their further axes) or the mean over the batch, a scalar.

    Raises:
        ArgumentError: none of these.

    Example:
        >>> import torch
        >>> from woodbury.curvature.criteria import make_criterion
        >>> mse = make_criterion("mse")
        >>> mse.losses(torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [0.0, 2.0]]), 2)
        tensor([1., 2.])
    """
    if isinstance(criterion, str) or callable(criterion):
        with contextlib.suppress(TypeError):  # an unhashable callable
            criterion = _BY_NAME.get(criterion, lambda: criterion)()
    if type(criterion) is nn.CrossEntropyLoss:
        return Categorical(criterion)
    if type(criterion) is nn.MSELoss:
        return Gaussian(criterion)
    if type(criterion) is nn.BCEWithLogitsLoss:
        return Bernoulli(criterion)
    if isinstance(criterion, nn.Module) and isinstance(getattr(criterion, "reduction", None), str):
        unreduced: Any = copy.copy(criterion)
        unreduced.reduction = "none"
        reduction = str(criterion.reduction)
        kind = type(criterion)
        return Criterion(unreduced, reduction, convex=kind in _CONVEX, linear=kind in _LINEAR)
    if callable(criterion):
        return Criterion(criterion)
    raise ArgumentError(
        f"criterion is {criterion!r}; give 'cross_entropy', 'mse', a loss module of torch, or a "
        "callable (output, target) that returns one loss per example"
    )
