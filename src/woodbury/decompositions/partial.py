"""An operator of which some eigenpairs are known and the rest is one number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.errors import SingularError
from woodbury.operators.base import LinearOperator

if TYPE_CHECKING:
    from woodbury.spaces import Space

__all__ = ["PartialEigen"]


class PartialEigen(LinearOperator):
    r"""$U \operatorname{diag}(v) U^H + c\,(I - U U^H)$ with orthonormal $U$ and real $v$, $c$.

    What a low-rank factorisation becomes: itself ($c = 0$), its damped inverse and the
    preconditioner made of it.

    Args:
        basis: $U$, ``[n, r]``, orthonormal columns.
        values: $v$, ``[r]``, real.
        rest: $c$.
        space: where its vectors live.

    Cost: a product is $4 n r$ multiplications a column; inverse, log-determinant and trace cost
    ``r``.

    Example:
        >>> import torch
        >>> from woodbury.decompositions import PartialEigen
        >>> U = torch.tensor([[1.0], [0.0], [0.0]])
        >>> A = PartialEigen(U, torch.tensor([4.0]), 2.0)
        >>> A.inverse() @ torch.ones(3)
        tensor([0.2500, 0.5000, 0.5000])
    """

    def __init__(
        self, basis: Tensor, values: Tensor, rest: float, *, space: Space | None = None
    ) -> None:
        n, rank = basis.shape
        low = [rest] if rank < n else []
        low += [values.amin().item()] if rank else []
        tags = {"hermitian"}
        if all(value >= 0 for value in low):
            tags.add("positive_semidefinite")
        if all(value > 0 for value in low):
            tags.add("positive_definite")
        super().__init__((n, n), dtype=basis.dtype, device=basis.device, tags=tags, space=space)
        self.basis = basis
        self.values = values
        self.rest = rest if rank < n else 0.0

    def _matmat(self, X: Tensor) -> Tensor:
        inside = self.space.gram(self.basis, X)
        result = self.basis @ ((self.values - self.rest).unsqueeze(1) * inside)
        return result.add_(X, alpha=self.rest) if self.rest else result

    def _trace(self) -> Tensor:
        n, rank = self.basis.shape
        return self.values.sum() + self.rest * (n - rank)

    def _has_inverse(self) -> bool:
        n, rank = self.basis.shape
        return rank == n or self.rest != 0

    def _logdet(self) -> Tensor | None:
        if not self._has_inverse():
            return None
        n, rank = self.basis.shape
        self._require_invertible()
        rest = torch.as_tensor(abs(self.rest) if rank < n else 1.0, dtype=self.values.dtype)
        return self.values.abs().log().sum() + (n - rank) * rest.log().to(self.device)

    def _inverse(self) -> LinearOperator | None:
        if not self._has_inverse():
            return None
        n, rank = self.basis.shape
        self._require_invertible()
        rest = 1 / self.rest if rank < n else 0.0
        return PartialEigen(self.basis, self.values.reciprocal(), rest, space=self.space)

    def _require_invertible(self) -> None:
        zeros = int((self.values == 0).sum())
        if zeros:
            raise SingularError(
                f"{zeros} of the {len(self.values)} eigenvalues given are 0: the operator has no "
                "inverse; add damping"
            )
