"""A permutation matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from woodbury.errors import DtypeError, ShapeError
from woodbury.operators.base import LinearOperator
from woodbury.operators.dtypes import real_dtype
from woodbury.spaces import Space

__all__ = ["Permutation"]


class Permutation(LinearOperator):
    r"""$P$ with $(P x)_{p_i} = x_i$: it puts entry $i$ at place $p_i$.

    Args:
        places: $p$, ``[n]``, every number from 0 to ``n - 1`` once; kept, not copied.
        dtype: dtype of its vectors; default ``torch.get_default_dtype()``.
        space: :class:`~woodbury.Space` of the vectors ``x`` in ``P @ x``.
        out_space: space of the vectors ``P @ x``.

    Raises:
        ShapeError: ``places`` is not one-dimensional, or not a permutation.
        DtypeError: ``places`` does not hold integers.

    Cost: a product copies its argument.

    Example:
        >>> import torch
        >>> from woodbury.operators import Permutation
        >>> P = Permutation(torch.tensor([2, 0, 1]))
        >>> P @ torch.tensor([1.0, 2.0, 3.0])
        tensor([2., 3., 1.])
        >>> P.inverse() @ (P @ torch.tensor([1.0, 2.0, 3.0]))
        tensor([1., 2., 3.])
    """

    _made_of = ("places",)

    def __init__(
        self,
        places: Tensor,
        *,
        dtype: torch.dtype | None = None,
        space: Space | None = None,
        out_space: Space | None = None,
    ) -> None:
        if places.dim() != 1:
            raise ShapeError(f"places have shape {tuple(places.shape)}, expected [n]")
        if places.is_floating_point() or places.dtype in (torch.bool, torch.complex64):
            raise DtypeError(f"places are {places.dtype}; they must be integers")
        n = len(places)
        if not _each_once(places):
            raise ShapeError(f"places are not the numbers 0 to {n - 1}, each once")
        super().__init__(
            (n, n),
            dtype=torch.get_default_dtype() if dtype is None else dtype,
            device=places.device,
            tags={"unitary"},
            space=space,
            out_space=out_space,
        )
        self.places = places.long()

    def _matmat(self, X: Tensor) -> Tensor:
        return torch.empty_like(X).index_copy_(0, self.places, X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return Y[self.places]

    def _diagonal(self) -> Tensor:
        own = torch.arange(len(self.places), device=self.device)
        return (self.places == own).to(self.dtype)

    def _logdet(self) -> Tensor:
        return torch.zeros((), dtype=real_dtype(self.dtype), device=self.device)

    def _columns(self, index: Tensor) -> Tensor:
        columns = torch.zeros(self.shape[0], len(index), dtype=self.dtype, device=self.device)
        columns[self.places[index], torch.arange(len(index), device=self.device)] = 1
        return columns

    def _inverse(self) -> LinearOperator:
        return Permutation(
            self.places.argsort(), dtype=self.dtype, space=self.out_space, out_space=self.space
        )

    def _transpose(self) -> LinearOperator:
        return self._inverse()

    def _adjoint(self) -> LinearOperator:
        return self._inverse()

    def _compose(self, other: LinearOperator) -> LinearOperator | None:
        if not isinstance(other, Permutation):
            return None
        return Permutation(
            self.places[other.places],
            dtype=self.dtype,
            space=other.space,
            out_space=self.out_space,
        )


def _each_once(places: Tensor) -> bool:
    """Whether ``places [n]`` are the numbers from 0 to ``n - 1``; no sorting, which takes long."""
    n = len(places)
    if n == 0:
        return True
    if int(places.min()) < 0 or int(places.max()) >= n:
        return False
    met = torch.zeros(n, dtype=torch.bool, device=places.device)
    return bool(met.index_fill_(0, places.long(), True).all())
