"""What an operator knows of itself without a product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.operators.base import LinearOperator
from woodbury.operators.block_diagonal import BlockDiagonal
from woodbury.operators.kronecker import Kronecker
from woodbury.operators.low_rank_update import LowRankUpdate
from woodbury.operators.product import Product
from woodbury.operators.scaled import Scaled
from woodbury.operators.shifted_kronecker import ShiftedKronecker
from woodbury.operators.sum import Sum
from woodbury.operators.transpose import Adjoint, Transpose
from woodbury.spectra.method import multiply, real_if_hermitian

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["by_products", "knows_diagonal", "knows_trace"]


def knows_diagonal(A: LinearOperator) -> bool:
    """Whether ``A.diagonal()`` takes no products."""
    if type(A)._diagonal is LinearOperator._diagonal:
        return False
    return all(part.is_square and knows_diagonal(part) for part in _parts(A))


def knows_trace(A: LinearOperator) -> bool:
    """Whether ``A.trace()`` takes no products."""
    if knows_diagonal(A):
        return True
    if isinstance(A, Product):
        return A._is_unitary_congruence() and knows_trace(A._middle())
    parts = list(_parts(A))
    if parts:
        return all(part.is_square and knows_trace(part) for part in parts)
    return type(A)._trace is not LinearOperator._trace


def by_products(A: LinearOperator) -> tuple[Tensor, int]:
    """The diagonal from a product with every unit vector, a block at a time, and their number."""
    n = A.shape[0]
    width = max(1, min(n, 2**22 // max(1, n)))
    diagonal = torch.zeros(n, dtype=A.dtype, device=A.device)
    for start in range(0, n, width):
        stop = min(start + width, n)
        units = torch.zeros(n, stop - start, dtype=A.dtype, device=A.device)
        units[start:stop] = torch.eye(stop - start, dtype=A.dtype, device=A.device)
        diagonal[start:stop] = torch.diagonal(multiply(A, units)[start:stop])
    return real_if_hermitian(diagonal, A), n


def _parts(A: LinearOperator) -> Iterable[LinearOperator]:
    """The operators that ``A`` asks for their diagonal to know its own."""
    if isinstance(A, Sum):
        return A.terms
    if isinstance(A, Scaled | Transpose | Adjoint):
        return (A.operator,)
    if isinstance(A, Kronecker):
        return A.factors
    if isinstance(A, ShiftedKronecker):
        return A.kronecker.factors
    if isinstance(A, BlockDiagonal):
        return () if A.stack is not None else A.blocks
    if isinstance(A, LowRankUpdate):
        return (A.base,)
    return ()
