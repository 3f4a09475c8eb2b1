"""The identity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from woodbury.errors import DeviceError, DtypeError, ShapeError
from woodbury.operators.base import LinearOperator
from woodbury.operators.dtypes import real_dtype
from woodbury.spaces import Space

__all__ = ["Identity"]


class Identity(LinearOperator):
    r"""The identity $I_n$.

    Made without a dtype or device it takes those of what it is combined with, so that
    ``A + 1e-3 * Identity(n)`` works for every ``A``.

    Args:
        n: size.
        dtype: dtype; default ``torch.get_default_dtype()``, adapting in algebra.
        device: device; default the CPU, adapting in algebra.
        space: :class:`~woodbury.Space` of its vectors.

    Raises:
        ShapeError: ``n`` is negative.

    Cost: a product copies its argument, so that changing one in place never changes the other.

    Example:
        >>> import torch
        >>> from woodbury import Identity
        >>> (2.0 * Identity(3)).logdet()
        tensor(2.0794)
    """

    _made_of = ()

    def __init__(
        self,
        n: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        space: Space | None = None,
    ) -> None:
        if n < 0:
            raise ShapeError(f"n is {n}; the size of an identity must not be negative")
        super().__init__(
            (n, n),
            dtype=torch.get_default_dtype() if dtype is None else dtype,
            device="cpu" if device is None else device,
            tags={"diagonal", "positive_definite", "unitary"},
            space=space,
        )
        self._free_dtype = dtype is None
        self._free_device = device is None

    def like(self, other: LinearOperator) -> Identity:
        """This identity with ``other``'s dtype and device, where they were left open."""
        dtype = other.dtype if self._free_dtype else self.dtype
        device = other.device if self._free_device else self.device
        if dtype == self.dtype and device == self.device:
            return self
        return Identity(self.shape[0], dtype=dtype, device=device, space=self.space)

    def _matmat(self, X: Tensor) -> Tensor:
        return X.clone()

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return Y.clone()

    def _to_dense(self) -> Tensor:
        return torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def _diagonal(self) -> Tensor:
        return torch.ones(self.shape[0], dtype=self.dtype, device=self.device)

    def _logdet(self) -> Tensor:
        return torch.zeros((), dtype=real_dtype(self.dtype), device=self.device)

    def _columns(self, index: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(index, self.shape[0]).mT.to(self.dtype)

    def _inverse(self) -> LinearOperator:
        return self

    def _transpose(self) -> LinearOperator:
        return self

    def _adjoint(self) -> LinearOperator:
        return self

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        """``I + c I`` is ``(1 + c) I``."""
        factor = multiple_of_identity(other)
        return None if factor is None else (1 + factor) * self


def multiple_of_identity(operator: LinearOperator) -> complex | Tensor | None:
    """``c`` where the operator is ``c * I``, otherwise ``None``."""
    from woodbury.operators.scaled import Scaled

    if isinstance(operator, Identity):
        return 1.0
    if isinstance(operator, Scaled) and isinstance(operator.operator, Identity):
        return operator.factor
    return None


def adapted(operator: LinearOperator, other: LinearOperator) -> LinearOperator:
    """The operator; if it is (a multiple of) an identity made open, of ``other``'s kind."""
    from woodbury.operators.scaled import Scaled

    if isinstance(operator, Identity):
        return operator.like(other)
    if isinstance(operator, Scaled) and isinstance(operator.operator, Identity):
        inner = operator.operator.like(other)
        return operator if inner is operator.operator else Scaled(operator.factor, inner)
    return operator


def same_kind(operators: Sequence[LinearOperator]) -> tuple[LinearOperator, ...]:
    """The operators of one dtype and device; identities made open adapt to the others."""
    lead = next((op for op in operators if multiple_of_identity(op) is None), operators[0])
    fitted = tuple(adapted(op, lead) for op in operators)
    for op in fitted:
        if op.dtype != lead.dtype:
            raise DtypeError(f"operators of {lead.dtype} and {op.dtype}; make them of one dtype")
        if op.device != lead.device:
            raise DeviceError(f"operators on {lead.device} and {op.device}; move them to one")
    return fitted
