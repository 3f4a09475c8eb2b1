"""A criterion as one loss per example, and its curvature in the outputs by differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, DataError, GradientError, ShapeError, StructureError

__all__ = ["Criterion", "Product", "per_example", "reduce_losses", "weighted_sum"]

Product = Callable[[Tensor], Tensor]

# Fields of a criterion that are found or set while it is used, and say nothing of what it is.
_MOMENTARY = {"classes_last", "training"}


class Criterion:
    """A function of outputs and targets, as one loss per example.

    Args:
        function: maps ``(output, target)`` to losses ``[B, ...]`` or to their mean, a scalar.
        reduction: how the elements of one example are put together, ``"mean"`` or ``"sum"``.
        convex: whether the loss is known to be convex in the outputs.
        linear: whether it is known to be linear in them, at least piece by piece.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Tensor],
        reduction: str = "mean",
        *,
        convex: bool = False,
        linear: bool = False,
    ) -> None:
        if reduction not in ("none", "mean", "sum", "batchmean"):
            raise ArgumentError(f"reduction is {reduction!r}; use 'mean', 'sum' or 'none'")
        self.function = function
        # "batchmean" is torch's name for: sum over elements, mean over examples.
        self.add = reduction in ("sum", "batchmean")
        self.convex = convex
        self.linear = linear

    def losses(self, output: Tensor, target: Any, size: int) -> Tensor:
        """Losses ``[size]``, or their mean where the function gives no more than that."""
        return reduce_losses(self.function(output, target), size, add=self.add)

    def identity(self) -> list[Any]:
        """Which criterion this is, as tensors and words; a function is known by its name only."""
        inside = vars(self.function) if isinstance(self.function, torch.nn.Module) else vars(self)
        plain = {
            name: value
            for name, value in {**inside, **inside.get("_buffers", {})}.items()
            if isinstance(value, Tensor | str | int | float) and name not in _MOMENTARY
        }
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return [type(self).__name__, name, self.add, plain]

    def curvature(self, output: Tensor, target: Any, weights: Tensor | None) -> Product:
        """``U -> H U`` for ``U [k, *output.shape]``, ``H`` the Hessian of ``sum_i w_i loss_i``."""
        size = output.shape[0]
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            total = weighted_sum(self.losses(leaf, target, size), weights, size)
            (slope,) = torch.autograd.grad(total, leaf, create_graph=True)
        if self.linear or not slope.requires_grad:
            raise StructureError(
                "the criterion is linear in the outputs, so its Gauss-Newton matrix is zero; move "
                "the last nonlinearity into the criterion (cross_entropy on logits instead of NLL "
                "on log-probabilities), or use the Hessian or Fisher(kind='empirical')"
            )

        def product(U: Tensor) -> Tensor:
            columns = [torch.autograd.grad(slope, leaf, u, retain_graph=True)[0] for u in U]
            return torch.stack(columns)

        return product


def reduce_losses(value: Any, size: int, *, add: bool = False) -> Tensor:
    """Losses ``[size]`` from ``[size, ...]``; a scalar (a mean over the batch) stays one.

    Raises:
        GradientError: ``value`` is no tensor.
        ShapeError: ``value`` has neither ``size`` rows nor no axes.
    """
    if not isinstance(value, Tensor):
        raise GradientError(f"the loss returned {type(value).__name__}; it must return a tensor")
    if value.dim() == 0:
        return value
    if value.shape[0] != size:
        raise ShapeError(
            f"the loss returned shape {tuple(value.shape)} for {size} examples; expected one loss "
            f"per example [{size}], or their mean, a scalar"
        )
    if value.dim() == 1:
        return value
    flat = value.flatten(1)
    return flat.sum(1) if add else flat.mean(1)


def weighted_sum(losses: Tensor, weights: Tensor | None, size: int) -> Tensor:
    """``sum_i w_i loss_i`` of a batch of ``size``.

    Raises:
        DataError: there are weights, and the losses come as their mean only.
    """
    if weights is not None:
        return (per_example(losses, "weights") * weights).sum()
    return losses * size if losses.dim() == 0 else losses.sum()


def per_example(losses: Tensor, what: str) -> Tensor:
    """``losses`` if there is one for each example.

    Raises:
        DataError: there is only their mean.
    """
    if losses.dim() == 0:
        raise DataError(
            f"the loss returns a scalar, and {what} take one loss per example: let it return [B], "
            "without a sum or mean over the batch (reduction='none')"
        )
    return losses
