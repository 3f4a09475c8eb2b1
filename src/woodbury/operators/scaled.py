"""A multiple of an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from woodbury.errors import SingularError
from woodbury.operators.base import LinearOperator
from woodbury.operators.dtypes import real_dtype
from woodbury.operators.tags import scaled_tags

__all__ = ["Scaled"]


class Scaled(LinearOperator):
    """``c * A`` for a number or a scalar tensor ``c`` (which may carry a gradient).

    Made by ``c * A``, which uses the structure of ``A`` where it can take the factor in.

    Args:
        factor: ``c``.
        operator: ``A``.

    Cost: a product costs one with ``A`` and ``m k`` multiplications.

    Example:
        >>> import torch
        >>> from woodbury import FunctionOperator
        >>> A = FunctionOperator(lambda X: X.cumsum(0), (3, 3), tags={"lower_triangular"})
        >>> (-2.0 * A) @ torch.ones(3)
        tensor([-2., -4., -6.])
    """

    _made_of = ("factor", "operator")

    def __init__(self, factor: complex | Tensor, operator: LinearOperator) -> None:
        super().__init__(
            operator.shape,
            dtype=operator.dtype,
            device=operator.device,
            tags=scaled_tags(operator.tags, factor),
            space=operator.space,
            out_space=operator.out_space,
        )
        self.factor = factor
        self.operator = operator

    def _matmat(self, X: Tensor) -> Tensor:
        return self.factor * self.operator._matmat(X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return conjugate(self.factor) * self.operator._rmatmat(Y)

    def _to_dense(self) -> Tensor:
        return self.factor * self.operator._to_dense()

    def _columns(self, index: Tensor) -> Tensor:
        return self.factor * self.operator._columns(index)

    def _diagonal(self) -> Tensor:
        return self.factor * self.operator._diagonal()

    def _trace(self) -> Tensor:
        return self.factor * self.operator.trace()

    def _logdet(self) -> Tensor | None:
        inner = self.operator._logdet()
        if inner is None:
            return None
        self._require_nonzero()
        size = torch.as_tensor(abs(self.factor), dtype=real_dtype(self.dtype), device=self.device)
        return inner + self.shape[0] * torch.log(size)

    def _has_inverse(self) -> bool:
        return self.operator.has_inverse

    def _inverse(self) -> LinearOperator | None:
        inner = self.operator._inverse()
        if inner is None:
            return None
        self._require_nonzero()
        return (1 / self.factor) * inner

    def _require_nonzero(self) -> None:
        if self.factor == 0 and self.shape[0] > 0:
            raise SingularError("the operator is multiplied by 0, so it has no inverse")

    def _transpose(self) -> LinearOperator:
        return self.factor * self.operator.T

    def _adjoint(self) -> LinearOperator:
        return conjugate(self.factor) * self.operator.H

    def _scale(self, factor: complex | Tensor) -> LinearOperator:
        return (factor * self.factor) * self.operator

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        """``c I + d I`` is ``(c + d) I``; other multiples are left as they are."""
        from woodbury.operators.identity import Identity, multiple_of_identity

        if not isinstance(self.operator, Identity):
            return None
        factor = multiple_of_identity(other)
        return None if factor is None else (self.factor + factor) * self.operator


def conjugate(factor: complex | Tensor) -> complex | Tensor:
    """The complex conjugate of a number or a scalar tensor."""
    return factor.conj().resolve_conj() if isinstance(factor, Tensor) else factor.conjugate()
