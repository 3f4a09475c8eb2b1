"""Transposes of operators that have no better form of theirs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from woodbury.operators.base import LinearOperator
from woodbury.operators.tags import transposed_tags

__all__ = ["Adjoint", "Transpose"]


class _Flipped(LinearOperator):
    """What ``A.T`` and ``A.H`` share."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(
            (operator.shape[1], operator.shape[0]),
            dtype=operator.dtype,
            device=operator.device,
            tags=transposed_tags(operator.tags),
            space=operator.out_space,
            out_space=operator.space,
        )
        self.operator = operator

    def _logdet(self) -> Tensor | None:
        return self.operator._logdet()

    def _has_inverse(self) -> bool:
        return self.operator.has_inverse


class Transpose(_Flipped):
    """``A.T`` (not conjugated) through the adjoint products of ``A``.

    Args:
        operator: ``A``.

    Example:
        >>> import torch
        >>> from woodbury import FunctionOperator
        >>> shift = FunctionOperator(lambda X: X.roll(1, 0), (3, 3), lambda X: X.roll(-1, 0))
        >>> shift.T @ torch.tensor([1.0, 2.0, 3.0])
        tensor([2., 3., 1.])
    """

    _made_of = ("operator",)

    def _matmat(self, X: Tensor) -> Tensor:
        return _conjugated(self.operator._rmatmat, X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return _conjugated(self.operator._matmat, Y)

    def _to_dense(self) -> Tensor:
        return self.operator._to_dense().mT

    def _diagonal(self) -> Tensor:
        return self.operator._diagonal()

    def _trace(self) -> Tensor | None:
        return self.operator._trace()

    def _inverse(self) -> LinearOperator | None:
        inner = self.operator._inverse()
        return None if inner is None else inner.T


class Adjoint(_Flipped):
    """``A.H`` of an operator of complex dtype, through its adjoint products.

    Args:
        operator: ``A``.

    Example:
        >>> import torch
        >>> from woodbury import FunctionOperator
        >>> complex64 = torch.complex64
        >>> turn = FunctionOperator(lambda X: 1j * X, (2, 2), lambda X: -1j * X, dtype=complex64)
        >>> turn.H @ torch.ones(2, dtype=complex64)
        tensor([0.-1.j, 0.-1.j])
    """

    _made_of = ("operator",)

    def _matmat(self, X: Tensor) -> Tensor:
        return self.operator._rmatmat(X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self.operator._matmat(Y)

    def _to_dense(self) -> Tensor:
        return self.operator._to_dense().mH.resolve_conj()

    def _diagonal(self) -> Tensor:
        return self.operator._diagonal().conj().resolve_conj()

    def _inverse(self) -> LinearOperator | None:
        inner = self.operator._inverse()
        return None if inner is None else inner.H


def are_transposes(a: LinearOperator, b: LinearOperator) -> bool:
    """Whether ``b`` is known to be ``a.T``."""
    if a is b:
        return "symmetric" in a.tags
    return a._transpose_of is b or b._transpose_of is a


def are_adjoint(a: LinearOperator, b: LinearOperator) -> bool:
    """Whether ``b`` is known to be ``a.H``."""
    if not a.dtype.is_complex:
        return are_transposes(a, b)
    if a is b:
        return "hermitian" in a.tags
    return a._adjoint_of is b or b._adjoint_of is a


def _conjugated(apply: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
    """``conj(apply(conj(X)))``, which is ``apply(X)`` for a real dtype."""
    if not X.dtype.is_complex:
        return apply(X)
    return apply(X.conj().resolve_conj()).conj().resolve_conj()
