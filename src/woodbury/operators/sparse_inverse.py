"""The inverse of a sparse matrix by sparse LU factorisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from woodbury.errors import GradientError, NotPositiveDefiniteError, SingularError
from woodbury.operators.base import LinearOperator
from woodbury.operators.dtypes import precise, real_dtype
from woodbury.operators.factorization import require_finite
from woodbury.operators.sparse import Sparse, entries
from woodbury.operators.superlu import has_positive_pivots, sparse_condition, superlu
from woodbury.operators.tags import inverse_tags

__all__ = ["SparseInverse"]


class SparseInverse(LinearOperator):
    """The inverse of a :class:`~woodbury.Sparse` matrix, kept as its SuperLU factors.

    Factorised in float64 (complex128); without row exchanges, and with an ordering for symmetric
    patterns, where the matrix is tagged positive definite. Solves can be differentiated with
    respect to the right-hand side and to the stored values.

    Args:
        operator: the matrix to invert, square and on the CPU.

    Raises:
        NonFiniteError: it holds NaN or infinity.
        NotPositiveDefiniteError: it is tagged positive definite and a pivot is not positive.
        SingularError: it is singular to working precision.
        GradientError: ``logdet()`` of values that require a gradient, for which the inverse would
            be needed entry by entry.

    Cost: one factorisation when made; a product is two sparse triangular solves.
    """

    def __init__(self, operator: Sparse) -> None:
        super().__init__(
            operator.shape,
            dtype=operator.dtype,
            device=operator.device,
            tags=inverse_tags(operator.tags),
            space=operator.out_space,
            out_space=operator.space,
        )
        self.operator = operator
        self._lu = _factorize(operator)

    def _matmat(self, X: Tensor) -> Tensor:
        return self._solve_with_gradient(X, adjoint=False)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self._solve_with_gradient(Y, adjoint=True)

    def _solve_with_gradient(self, B: Tensor, *, adjoint: bool) -> Tensor:
        values = self.operator.values
        if torch.is_grad_enabled() and (B.requires_grad or values.requires_grad):
            result = _SparseSolve.apply(values, B, self, adjoint)
            assert isinstance(result, Tensor)
            return result
        return self._raw_solve(B, adjoint=adjoint)

    def _raw_solve(self, B: Tensor, *, adjoint: bool) -> Tensor:
        right = precise(B.detach()).resolve_conj().resolve_neg().contiguous().numpy()
        return torch.from_numpy(self._lu.solve(right, trans="H" if adjoint else "N")).to(self.dtype)

    def _logdet(self) -> Tensor:
        if torch.is_grad_enabled() and self.operator.values.requires_grad:
            raise GradientError(
                "the log-determinant of a sparse matrix has no gradient here; detach the values, "
                "or use Dense(A.to_dense()).logdet()"
            )
        pivots = torch.from_numpy(self._lu.U.diagonal())
        return -pivots.abs().log().sum().to(real_dtype(self.dtype))

    def _inverse(self) -> LinearOperator:
        return self.operator


class _SparseSolve(torch.autograd.Function):
    """``X = A^-1 B`` (``A^-H B``); the values' gradient is ``-(A^-H G) X^H`` on the pattern."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, B: Tensor, inverse: SparseInverse, adjoint: bool
    ) -> Tensor:
        ctx.inverse, ctx.adjoint = inverse, adjoint
        ctx.save_for_backward(values, B)
        return inverse._raw_solve(B, adjoint=adjoint)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        values, B = ctx.saved_tensors
        W = _SparseSolve.apply(values, G, ctx.inverse, not ctx.adjoint)
        grad_values = None
        if ctx.needs_input_grad[0]:
            X = _SparseSolve.apply(values, B, ctx.inverse, ctx.adjoint)
            left, right = (X, W) if ctx.adjoint else (W, X)
            grad_values = -entries(left, right, ctx.inverse.operator)
        return grad_values, W if ctx.needs_input_grad[1] else None, None, None


def _factorize(operator: Sparse) -> Any:
    require_finite(operator.values, "the sparse matrix")
    matrix = operator.to_scipy_sparse().astype(
        "complex128" if operator.dtype.is_complex else "float64"
    )
    definite = "positive_definite" in operator.tags
    factor = superlu(matrix, symmetric=definite)
    if definite and not has_positive_pivots(factor):
        raise NotPositiveDefiniteError(
            "tagged positive definite, but the factorisation has a pivot that is not positive; "
            "drop the tag, or add a multiple of the identity"
        )
    rcond = sparse_condition(matrix, factor)
    if not rcond >= torch.finfo(torch.float64).eps:
        raise SingularError(
            f"the sparse matrix is singular to working precision: reciprocal condition {rcond:.1e} "
            f"is below {torch.finfo(torch.float64).eps:.1e}; add a multiple of the identity"
        )
    return factor
