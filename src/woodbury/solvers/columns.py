"""Arithmetic on the columns of a block, with its scalars on the host in double precision.

A block is ``[n, k]``, or ``[n]`` for a single column: the one-column case then runs on plain
vectors, which is what makes it as fast as a solver written for one right-hand side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from woodbury.spaces import Space

__all__ = ["add_columns", "dots", "norms", "take", "width"]


def width(X: Tensor) -> int:
    """The number of columns."""
    return 1 if X.dim() == 1 else X.shape[1]


def dots(space: Space, X: Tensor, Y: Tensor) -> list[float]:
    """Real parts of the inner products of the columns of ``X`` and ``Y``."""
    values = space.inner(X, Y)
    if values.is_complex():
        values = values.real
    return [values.item()] if values.dim() == 0 else values.tolist()


def norms(space: Space, X: Tensor) -> list[float]:
    """Norms of the columns of ``X``. By ``inner``: many times faster than a norm over rows."""
    return [math.sqrt(value) if value >= 0 else math.nan for value in dots(space, X, X)]


def add_columns(X: Tensor, factors: Sequence[float], Y: Tensor, *, out: Tensor) -> Tensor:
    """``out = X + Y * factors`` column by column; ``out`` may be ``X`` or ``Y``."""
    if X.dim() == 1:
        return torch.add(X, Y, alpha=factors[0], out=out)
    scales = torch.tensor(factors, dtype=torch.float64).to(Y.dtype).to(Y.device)
    return torch.addcmul(X, Y, scales, out=out)


def take(X: Tensor, columns: Sequence[int]) -> Tensor:
    """Copy of some columns, as a block."""
    if X.dim() == 1:
        return X.unsqueeze(1)[:, list(columns)]
    return X[:, list(columns)]
