"""The factor of a sketch as a change of variables, and the operator that it whitens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.operators.base import LinearOperator

if TYPE_CHECKING:
    from woodbury.solvers.recipe import Problem
    from woodbury.spaces import Space

__all__ = ["Whitened", "Whitener"]


class Whitener(LinearOperator):
    r"""$R^{-1}$ of a triangular factor, or $V\Sigma^{-1}$ where it is singular.

    Args:
        factor: $R$ ``[n, n]``, upper triangular, or $V \Sigma^{-1}$ ``[n, r]``.
        triangular: which of the two.
        dtype: of the vectors.
    """

    def __init__(self, factor: Tensor, triangular: bool, dtype: torch.dtype, space: Space) -> None:
        rows, columns = factor.shape
        super().__init__((rows, columns), dtype=dtype, device=factor.device, out_space=space)
        self.factor, self.triangular = factor, triangular

    def _matmat(self, X: Tensor) -> Tensor:
        wide = X.to(self.factor.dtype)
        if self.triangular:
            return torch.linalg.solve_triangular(self.factor, wide, upper=True).to(X.dtype)
        return (self.factor @ wide).to(X.dtype)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        wide = Y.to(self.factor.dtype)
        if self.triangular:
            return torch.linalg.solve_triangular(self.factor.mH, wide, upper=False).to(Y.dtype)
        return (self.factor.mH @ wide).to(Y.dtype)


class Whitened(LinearOperator):
    """``A N``, or ``N^H A``; its products are counted as those of ``A`` by the problem."""

    def __init__(self, whitener: Whitener, problem: Problem, *, left: bool) -> None:
        A = problem.A
        rank = whitener.shape[1]
        shape = (rank, A.shape[1]) if left else (A.shape[0], rank)
        super().__init__(shape, dtype=whitener.dtype, device=A.device)
        self.whitener, self.problem, self.left = whitener, problem, left

    def _matmat(self, X: Tensor) -> Tensor:
        if self.left:
            return self.whitener._rmatmat(self.problem.product(X))
        return self.problem.product(self.whitener._matmat(X))

    def _rmatmat(self, Y: Tensor) -> Tensor:
        if self.left:
            return self.problem.adjoint_product(self.whitener._matmat(Y))
        return self.whitener._rmatmat(self.problem.adjoint_product(Y))
