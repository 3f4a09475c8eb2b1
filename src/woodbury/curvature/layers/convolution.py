"""Convolutions of one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from woodbury.curvature.layers.references import References
from woodbury.curvature.layers.uses import MatrixUse, Piece

__all__ = ["ConvolutionUse", "convolution_use", "unfold"]


@dataclass
class ConvolutionUse(MatrixUse):
    """A convolution: at every place of the output a linear map of a patch of the input.

    Attributes:
        kernel: sizes of the kernel.
        stride: steps between patches.
        padding: zeros before and after each axis.
        dilation: steps between entries of a patch.
        groups: how many groups of channels.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def rank(self) -> int:
        """The first axis."""
        return 1

    def leading(self, grad: Tensor) -> Tensor:
        """``[B, *places, out]``."""
        return grad.movedim(1, -1)

    def inputs(self, piece: Piece) -> Tensor:
        """Patches ``[B, *places, in * kernel]`` of the group of channels."""
        x = self.x.chunk(self.groups, dim=1)[piece.group]
        return unfold(x, self.kernel, self.stride, self.padding, self.dilation)


def unfold(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """The patches of ``x [B, C, *sizes]`` that a kernel sees, ``[B, *places, C * kernel]``.

    The entries of a patch are in the order of a weight ``[out, C, *kernel]``.
    """
    if any(pair != (0, 0) for pair in padding):
        x = F.pad(x, [length for pair in reversed(padding) for length in pair])
    dims = len(kernel)
    for i in range(dims):
        x = x.unfold(2 + i, dilation[i] * (kernel[i] - 1) + 1, stride[i])[..., :: dilation[i]]
    order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
    x = x.permute(order)
    return x.reshape(*x.shape[: 1 + dims], -1)


def convolution_use(refs: References, given: Mapping[str, Any], parts: Any) -> MatrixUse | None:
    """``conv1d``, ``conv2d`` or ``conv3d``."""
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    dims = weight.dim() - 2
    found, found_bias = refs.find(weight), refs.find(bias)
    if x.dim() != weight.dim() or refs.owner(x) is not None or (found is not None and found[1]):
        return None
    if found is None and refs.owner(weight) is not None:
        return None
    kernel, groups = tuple(weight.shape[2:]), int(given.get("groups", 1))
    stride, dilation = (
        _several(given.get("stride", 1), dims),
        _several(given.get("dilation", 1), dims),
    )
    padding = _padding(given.get("padding", 0), kernel, dilation)
    if found is not None and math.prod(weight.shape[1:]) == 0:
        return None
    step = len(weight) // groups
    pieces = []
    for group in range(groups):
        rows = slice(group * step, (group + 1) * step)
        pieces.append(
            Piece(
                None if found is None else found[0].part(rows.start, rows.stop),
                None if found_bias is None else found_bias[0].part(rows.start, rows.stop),
                rows,
                group,
            )
        )
    use = ConvolutionUse(x.shape, None, 0, x.detach(), pieces)
    use.kernel, use.stride, use.padding, use.dilation = kernel, stride, padding, dilation
    use.groups = groups
    return use


def _several(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _padding(
    value: Any, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    if value == "valid":
        value = 0
    if value == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((length, length) for length in _several(value, len(kernel)))
