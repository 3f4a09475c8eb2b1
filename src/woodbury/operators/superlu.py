"""Sparse LU factorisation by SuperLU, through SciPy."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from woodbury.errors import SingularError
from woodbury.operators.factorization import reciprocal_condition

__all__ = ["Ordering", "has_positive_pivots", "sparse_condition", "superlu"]

Ordering = Literal["COLAMD", "MMD_AT_PLUS_A", "MMD_ATA", "NATURAL"]


def superlu(
    matrix: Any,
    *,
    symmetric: bool,
    ordering: Ordering | None = None,
    pivot_threshold: float = 1.0,
) -> Any:
    """Factorise a SciPy sparse matrix in double precision.

    Args:
        matrix: square, in double precision.
        symmetric: take the pivots from the diagonal, in the order of ``A + A^T``; for matrices that
            are positive definite, or close to it.
        ordering: of the columns; default ``MMD_AT_PLUS_A`` if symmetric, ``COLAMD`` otherwise.
        pivot_threshold: a diagonal entry is taken as pivot where it is at least that fraction of
            the largest entry of its column; 0 where symmetric.

    Raises:
        SingularError: a pivot is zero.
    """
    from scipy.sparse.linalg import splu

    options: dict[str, Any] = {"permc_spec": ordering or "COLAMD"}
    options["diag_pivot_thresh"] = pivot_threshold
    if symmetric:
        options = {
            "permc_spec": ordering or "MMD_AT_PLUS_A",
            "diag_pivot_thresh": 0.0,
            "options": {"SymmetricMode": True},
        }
    try:
        return splu(matrix.tocsc(), **options)
    except RuntimeError as error:
        raise SingularError(
            f"the sparse matrix is singular ({error}); add a multiple of the identity"
        ) from error


def has_positive_pivots(factor: Any) -> bool:
    """Whether a hermitian matrix factorised as symmetric turned out positive definite.

    That is so where all pivots are positive and none was taken off the diagonal.
    """
    diagonal = bool((factor.perm_r == factor.perm_c).all())
    return diagonal and bool((factor.U.diagonal().real > 0).all())


def sparse_condition(matrix: Any, factor: Any) -> float:
    """The reciprocal condition number in the 1-norm, estimated from above by a few solves."""
    dtype = torch.complex128 if matrix.dtype.kind == "c" else torch.float64
    n = matrix.shape[0]

    def solve(B: Tensor, adjoint: bool) -> Tensor:
        return torch.from_numpy(factor.solve(B.contiguous().numpy(), trans="H" if adjoint else "N"))

    size = float(abs(matrix).sum(axis=0).max()) if n else 0.0
    return reciprocal_condition(size, solve, torch.empty(n, 0, dtype=dtype))
