"""Bounds on the smallest eigenvalue and singular value that structure proves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.operators.block_diagonal import BlockDiagonal
from woodbury.operators.dense import Dense
from woodbury.operators.diagonal import Diagonal
from woodbury.operators.identity import Identity
from woodbury.operators.scaled import Scaled
from woodbury.operators.sparse import Sparse
from woodbury.operators.sum import Sum

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["smallest_eigenvalue_bound", "smallest_singular_value_bound"]


def smallest_eigenvalue_bound(A: LinearOperator) -> float | None:
    r"""A number $\mu \le \lambda_{min}(A)$ that structure proves positive, or ``None``.

    From a multiple of the identity beside positive semidefinite terms, from diagonals and blocks,
    and for :class:`~woodbury.Dense` and :class:`~woodbury.Sparse` matrices from the circles of
    Gershgorin. Tags are taken at their word.

    Args:
        A: hermitian operator.

    Cost: no products; one pass over the stored entries of matrices.

    Example:
        >>> import torch
        >>> from woodbury import Identity, LowRank
        >>> from woodbury.solvers import smallest_eigenvalue_bound
        >>> smallest_eigenvalue_bound(LowRank(torch.ones(3, 1)) + 0.5 * Identity(3))
        0.5
    """
    if "hermitian" not in A.tags or A.shape[0] == 0:
        return None
    bound = _least(A)
    return bound if bound is not None and 0 < bound < math.inf else None


def _least(A: LinearOperator) -> float | None:
    from woodbury.solvers.nystrom import split_shift

    if "hermitian" not in A.tags:
        return None
    found = [0.0] if "positive_semidefinite" in A.tags else []
    H, shift = split_shift(A)
    if H is not A:
        inner = _least(H)
        return None if inner is None else inner + shift
    if isinstance(A, Identity):
        found.append(1.0)
    elif isinstance(A, Diagonal):
        found.append(_real(A.values).amin().item())
    elif isinstance(A, Scaled) and not isinstance(A.factor, complex):
        inner, factor = _least(A.operator), float(torch.as_tensor(A.factor).detach())
        if inner is not None and factor >= 0:
            found.append(factor * inner)
    elif isinstance(A, Sum):
        parts = [_least(term) for term in A.terms]
        if None not in parts:
            found.append(sum(part for part in parts if part is not None))
    elif isinstance(A, BlockDiagonal):
        parts = [_least(block) for block in A.blocks]
        if None not in parts:
            found.append(min(part for part in parts if part is not None))
    elif isinstance(A, (Dense, Sparse)):
        diagonal, rows, _ = _absolute_sums(A)
        found.append((_real(A._diagonal().detach()).double() - rows + diagonal).amin().item())
    return max(found, default=None)


def smallest_singular_value_bound(A: LinearOperator) -> float | None:
    r"""A number $\sigma \le \sigma_{min}(A)$ that structure proves positive, or ``None``.

    For hermitian operators :func:`smallest_eigenvalue_bound`; for matrices that are diagonally
    dominant by rows, with margin $a$, and by columns, with $b$, it is $\sqrt{a b}$.

    Args:
        A: square operator.

    Cost: no products; one pass over the stored entries of matrices.

    Source: Varah, "A lower bound for the smallest singular value of a matrix" (1975), corollary 2.

    Example:
        >>> import torch
        >>> from woodbury import Dense
        >>> from woodbury.solvers.certificate import smallest_singular_value_bound
        >>> smallest_singular_value_bound(Dense(torch.tensor([[3.0, 1.0], [-1.0, 3.0]])))
        2.0
    """
    found = smallest_eigenvalue_bound(A)
    if "unitary" in A.tags and A.shape[0]:
        return 1.0
    if found is not None or not isinstance(A, (Dense, Sparse)) or not A.is_square:
        return found
    diagonal, rows, columns = _absolute_sums(A)
    if diagonal.numel() == 0:
        return None
    by_rows = (2 * diagonal - rows).amin().item()
    by_columns = (2 * diagonal - columns).amin().item()
    return math.sqrt(by_rows * by_columns) if by_rows > 0 and by_columns > 0 else None


def _absolute_sums(A: Dense | Sparse) -> tuple[Tensor, Tensor, Tensor]:
    """Moduli of the diagonal, and sums of moduli of rows and of columns, in float64."""
    diagonal = A._diagonal().detach().abs().double()
    if isinstance(A, Dense):
        sizes = A.matrix.detach().abs().double()
        return diagonal, sizes.sum(1), sizes.sum(0)
    sizes = A.values.detach().abs().double()
    zero = torch.zeros(A.shape[0], dtype=torch.float64, device=A.device)
    rows = zero.index_add(0, A.rows, sizes)
    return diagonal, rows, zero.index_add(0, A.column_indices, sizes)


def _real(values: Tensor) -> Tensor:
    return values.real if values.is_complex() else values
