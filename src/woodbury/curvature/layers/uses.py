r"""One use of parameters in a forward pass: what was multiplied by what, as far as that is known.

A *matrix use* computes $y_t = W x_t + b$ at positions $t$, so that the gradient of the weight is
$\sum_t g_t x_t^T$ with $g_t$ the gradient at $y_t$. A *vector use* computes $y = w \odot x + b$
with broadcasting. The classes say how inputs and output gradients are read off for each kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature.layers.references import Reference

__all__ = ["Arrangement", "MatrixUse", "Piece", "Use", "VectorUse", "arrangement"]


@dataclass(frozen=True)
class Arrangement:
    """Where the examples are in a tensor: on an axis, maybe together with positions.

    Attributes:
        axis: of the examples.
        order: ``"own"``: nothing else is on that axis. ``"major"``: the positions of one example
            follow each other. ``"minor"``: the examples of one position follow each other.
            ``"one"``: there is one example, and all axes are its own.
    """

    axis: int = 0
    order: str = "own"

    def fits(self, shape: Sequence[int], size: int) -> bool:
        """Whether a tensor of this shape can hold ``size`` examples like that."""
        if self.axis >= len(shape):
            return False
        length = shape[self.axis]
        return length == size if self.order == "own" else length % size == 0 and length > 0

    def front(self, tensor: Tensor, size: int) -> Tensor:
        """The examples moved to a first axis of length ``size``."""
        if self.order == "one":
            return tensor.unsqueeze(0)
        if self.order == "own":
            return tensor.movedim(self.axis, 0)
        if self.order == "major":
            return tensor.unflatten(self.axis, (size, -1)).movedim(self.axis, 0)
        return tensor.unflatten(self.axis, (-1, size)).movedim(self.axis + 1, 0)


def candidates(rank: int) -> list[Arrangement]:
    """All arrangements of tensors with ``rank`` axes for examples, the usual ones first."""
    own = [Arrangement(axis) for axis in range(rank)]
    return own + [Arrangement(axis, order) for axis in range(rank) for order in ("major", "minor")]


@dataclass(frozen=True)
class Piece:
    """The part of a use that belongs to one block: some outputs, some inputs.

    Attributes:
        weight: the rows of the weight, ``None`` where the weight is a constant.
        bias: the rows of the bias, ``None`` where there is none or it is a constant.
        outputs: which outputs.
        group: which group of input channels.
    """

    weight: Reference | None
    bias: Reference | None
    outputs: slice
    group: int = 0


@dataclass
class Use:
    """One call of a function with parameters.

    Attributes:
        shape: of the output.
        edge: into the graph at the output.
        number: of the call in the forward pass.
    """

    shape: torch.Size
    edge: Any
    number: int

    def rank(self) -> int:
        """How many leading axes of the output may hold examples."""
        raise NotImplementedError

    def leading(self, grad: Tensor) -> Tensor:
        """The gradient at the output with the axes that may hold examples in front."""
        return grad


@dataclass
class MatrixUse(Use):
    """A use with a Kronecker form.

    Attributes:
        x: what was multiplied: ``[..., m]``, for an embedding indices ``[...]``.
        pieces: one for each block it belongs to.
        transposed: whether the weight is stored as ``[in, out]``.
        one_hot: whether ``x`` holds indices.
    """

    x: Tensor
    pieces: list[Piece] = field(default_factory=list)
    transposed: bool = False
    one_hot: bool = False

    def rank(self) -> int:
        """All axes but the last."""
        return len(self.shape) - 1

    def inputs(self, piece: Piece) -> Tensor:
        """``[*lead, m]`` or indices ``[*lead]``, with the leading axes of the output."""
        return self.x

    def mask(self) -> Tensor | None:
        """Positions ``[*lead]`` whose gradient counts; ``None`` for all."""
        return None


@dataclass
class VectorUse(Use):
    r"""An elementwise use $y = w \odot x + b$.

    Attributes:
        x: what the weight is multiplied by, of the shape of the output; ``None`` without a weight.
        weight: the parameter, or ``None``.
        bias: the parameter, or ``None``.
        pattern: shape of the parameters, padded to the axes of the output.
    """

    x: Tensor | None
    weight: Reference | None
    bias: Reference | None
    pattern: tuple[int, ...]

    def rank(self) -> int:
        """All axes before the first on which the parameters have more than one entry."""
        return len(self.shape)

    def terms(self, grad: Tensor, arrangement: Arrangement, size: int) -> dict[Reference, Tensor]:
        """Gradients per example ``[size, n]`` of weight and bias."""
        result: dict[Reference, Tensor] = {}
        if self.weight is not None:
            assert self.x is not None  # made together
            x = self.x.expand(self.shape) if self.x.shape != grad.shape else self.x
            result[self.weight] = self._reduced(grad * x, arrangement, size)
        if self.bias is not None:
            part = self._reduced(grad, arrangement, size)
            result[self.bias] = result[self.bias] + part if self.bias in result else part
        return result

    def _reduced(self, product: Tensor, arrangement: Arrangement, size: int) -> Tensor:
        front = arrangement.front(product, size)
        pattern = list(self.pattern)
        if arrangement.order == "own":
            del pattern[arrangement.axis]  # behind the examples, axes are as they were
        axes = [i + 1 for i, length in enumerate(pattern) if length == 1]
        return (front.sum(axes) if axes else front).reshape(size, -1)


def arrangement(
    use: Use, first: Tensor | None, last: Tensor | None, size: int
) -> Arrangement | None:
    """Where the examples are, so that the first and the last gradient are in their own places."""
    for where in candidates(use.rank()):
        if isinstance(use, VectorUse) and use.pattern[where.axis] != 1:
            continue
        if not where.fits(use.shape, size):
            continue
        a = None if first is None else where.front(use.leading(first), size)
        b = None if last is None else where.front(use.leading(last), size)
        if (a is None or not bool(a[1:].any())) and (b is None or not bool(b[:-1].any())):
            return where
    return None
