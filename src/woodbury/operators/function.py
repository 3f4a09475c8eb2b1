"""An operator made from a function that multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from woodbury.errors import DeviceError, DtypeError, ShapeError
from woodbury.operators.base import LinearOperator
from woodbury.spaces import Space

__all__ = ["FunctionOperator"]


class FunctionOperator(LinearOperator):
    r"""$A$ given by a function that computes $X \mapsto A X$.

    Args:
        matmat: maps a contiguous ``[n, k]`` to ``[m, k]`` (``[n]`` to ``[m]`` where ``vectorized``
            is false). It must be linear.
        shape: ``(m, n)``.
        rmatmat: maps ``[m, k]`` to ``A^H @ Y``, ``[n, k]``. Not needed where ``tags`` hold
            ``"symmetric"`` or ``"hermitian"``.
        tags: names from :data:`woodbury.operators.TAGS`, promised to hold.
        dtype: dtype of products; default ``torch.get_default_dtype()``.
        device: device of products.
        vectorized: whether the functions take blocks; otherwise they are called per column.
        space: :class:`~woodbury.Space` of the vectors ``x`` in ``A @ x``.

    Raises:
        ShapeError: at a product, where the function returns another shape than promised.
        DtypeError: at a product, where the function returns another dtype than promised.
        DeviceError: at a product, where the function returns another device than promised.

    Cost: that of the function; ``k`` calls for a block of ``k`` columns if not ``vectorized``.

    Example:
        >>> import torch
        >>> from woodbury import FunctionOperator
        >>> A = FunctionOperator(lambda X: torch.cumsum(X, 0), (3, 3), tags={"lower_triangular"})
        >>> A @ torch.ones(3)
        tensor([1., 2., 3.])
    """

    def __init__(
        self,
        matmat: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        rmatmat: Callable[[Tensor], Tensor] | None = None,
        *,
        tags: Iterable[str] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        vectorized: bool = True,
        space: Space | None = None,
    ) -> None:
        super().__init__(
            shape,
            dtype=torch.get_default_dtype() if dtype is None else dtype,
            device="cpu" if device is None else device,
            tags=tags,
            space=space,
        )
        self._forward = matmat
        self._backward = rmatmat
        self.vectorized = vectorized

    def _matmat(self, X: Tensor) -> Tensor:
        return self._apply(self._forward, X, self.shape[0], "matmat")

    def _matvec(self, x: Tensor) -> Tensor:
        if self.vectorized:
            return super()._matvec(x)
        x = x.resolve_conj().resolve_neg().contiguous()
        return self._verified(self._forward(x), (self.shape[0],), "matmat")

    def _rmatmat(self, Y: Tensor) -> Tensor:
        if self._backward is None:
            return super()._rmatmat(Y)
        return self._apply(self._backward, Y, self.shape[1], "rmatmat")

    def _apply(
        self, function: Callable[[Tensor], Tensor], X: Tensor, rows: int, name: str
    ) -> Tensor:
        X = X.resolve_conj().resolve_neg()
        if self.vectorized:
            return self._verified(function(X.contiguous()), (rows, X.shape[1]), name)
        columns = [
            self._verified(function(column.contiguous()), (rows,), name) for column in X.unbind(1)
        ]
        return torch.stack(columns, dim=1)

    def _verified(self, result: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
        if not isinstance(result, Tensor):
            raise DtypeError(f"{name} returned {type(result).__name__}, expected a tensor")
        if result.shape != shape:
            raise ShapeError(f"{name} returned shape {tuple(result.shape)}, expected {shape}")
        if result.dtype != self.dtype:
            raise DtypeError(f"{name} returned {result.dtype}, the operator is {self.dtype}")
        if result.device != self.device:
            raise DeviceError(f"{name} returned a tensor on {result.device}, not {self.device}")
        return result
