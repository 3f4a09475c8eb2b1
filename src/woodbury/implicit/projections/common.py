"""What all projections need: their arguments looked at, whatever transform is active."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, DtypeError, ShapeError

__all__ = ["bound", "need_real", "observe", "refuse"]


def need_real(y: Tensor, what: str, dims: int = 1) -> None:
    """Refuse what has no projection: other things than real floating tensors ``[..., n]``."""
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise DtypeError(f"{what} is {kind}; a real floating-point tensor is needed")
    if y.dim() < dims or 0 in y.shape[y.dim() - dims :]:
        least = "[..., n]" if dims == 1 else "[..., m, n]"
        raise ShapeError(f"{what} has shape {tuple(y.shape)}; it must be {least}, not empty")


def bound(value: Tensor | float, like: Tensor, shape: torch.Size, what: str) -> Tensor:
    """A parameter of a set as a tensor of the shape, dtype and device that its use needs."""
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if value.dtype != like.dtype:
        raise DtypeError(f"{what} is {value.dtype} and the point is {like.dtype}; convert one")
    try:
        return value.expand(shape)
    except RuntimeError as error:
        raise ShapeError(
            f"{what} has shape {tuple(value.shape)}, which does not broadcast to {tuple(shape)}"
        ) from error


def refuse(wrong: Callable[..., Tensor], what: str, *tensors: Tensor) -> None:
    """Raise ``what``, with the first offending values, where ``wrong(*tensors)`` holds.

    Raises:
        ArgumentError: it holds somewhere. ``{}`` in ``what`` becomes the values there.
    """

    def look(*plain: Tensor) -> Tensor:
        bad = wrong(*plain)
        if bool(bad.any()):
            first = [t[bad][0].item() for t in plain if t.shape == bad.shape]
            raise ArgumentError(what.format(*first))
        return bad

    observe(look, *tensors)


def observe(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function`` of the values, without a derivative, seen through every active transform.

    The tensors of ``function`` are batched over leading dimensions, which ``vmap`` prolongs; so
    they must have been broadcast against each other before.
    """
    return _Observe.apply(function, *(t.detach() for t in tensors))


class _Observe(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pragma: no cover - nothing is differentiable
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Any, *tensors: Tensor) -> Any:
        size = info.batch_size
        front = [
            t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        return _Observe.apply(function, *front), 0
