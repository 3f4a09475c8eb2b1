"""A matrix between two thin blocks, and its pseudo-inverse."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.decompositions.orthonormal import orthonormalize
from woodbury.errors import ArgumentError
from woodbury.operators.base import LinearOperator
from woodbury.operators.tags import transposed_tags

if TYPE_CHECKING:
    from woodbury.spaces import Space

__all__ = ["TwoSided", "default_rcond", "small_svd"]


class TwoSided(LinearOperator):
    r"""$F G H^*$ with thin $F$ and $H$, where $H^* x$ are inner products in the space of ``x``.

    In plain spaces it is :class:`~woodbury.LowRank`; it is right in weighted and sharded ones too,
    and has a pseudo-inverse.

    Args:
        left: $F$, ``[m, k]``.
        core: $G$, ``[k, l]``, or ``[k]`` for a diagonal.
        right: $H$, ``[n, l]``.
        space: where the vectors ``x`` live.
        out_space: where their images live.

    Cost: a product is ``(m k + k l + n l)`` multiplications a column.

    Example:
        >>> import torch
        >>> from woodbury import Space
        >>> from woodbury.decompositions import TwoSided
        >>> F, H = torch.ones(3, 1), torch.tensor([[1.0], [2.0]])
        >>> A = TwoSided(F, torch.tensor([2.0]), H, space=Space(2), out_space=Space(3))
        >>> A @ torch.tensor([1.0, 1.0])
        tensor([6., 6., 6.])
    """

    _made_of = ("left", "core", "right")

    def __init__(
        self, left: Tensor, core: Tensor, right: Tensor, *, space: Space, out_space: Space
    ) -> None:
        super().__init__(
            (left.shape[0], right.shape[0]),
            dtype=left.dtype,
            device=left.device,
            space=space,
            out_space=out_space,
        )
        self.left, self.core, self.right = left, core, right

    def _matmat(self, X: Tensor) -> Tensor:
        inside = self.space.gram(self.right, X)
        if self.core.dim() == 1:
            return self.left @ (self.core.unsqueeze(1) * inside)
        return self.left @ (self.core @ inside)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        inside = self.out_space.gram(self.left, Y)
        if self.core.dim() == 1:
            return self.right @ (self.core.conj().unsqueeze(1) * inside)
        return self.right @ (self.core.mH @ inside)

    def _transpose(self) -> LinearOperator | None:
        return None if self.dtype.is_complex else self._adjoint()

    def _adjoint(self) -> LinearOperator:
        core = self.core.conj() if self.core.dim() == 1 else self.core.mH
        flipped = TwoSided(
            self.right, core.resolve_conj(), self.left, space=self.out_space, out_space=self.space
        )
        flipped.tags = transposed_tags(self.tags)
        return flipped

    def singular_value_decomposition(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""$U \operatorname{diag}(s) V^*$ of the same operator, ``s`` descending.

        Returns:
            ``U`` ``[m, r]``, ``s`` ``[r]`` in double precision, ``V`` ``[n, r]``, where ``r`` is
            the smaller of ``k`` and ``l``.

        Cost: $O((m + n) k^2)$ multiplications.
        """
        Q, R = orthonormalize(self.left, self.out_space)
        P, S = orthonormalize(self.right, self.space)
        core = torch.diag(self.core) if self.core.dim() == 1 else self.core
        wide = torch.complex128 if self.dtype.is_complex else torch.float64
        middle = R.to(wide) @ core.to(wide) @ S.to(wide).mH
        U, s, V = small_svd(middle)
        return Q @ U.to(Q.dtype), s, P @ V.to(P.dtype)

    def pseudo_inverse(self, rcond: float | None = None) -> TwoSided:
        r"""$(F G H^*)^+ = V \operatorname{diag}(1/s) U^*$.

        Args:
            rcond: singular values up to ``rcond`` times the largest count as zero; default
                ``max(m, n)`` times the machine epsilon, at most its square root.

        Raises:
            ArgumentError: ``rcond`` is not in [0, 1).
        """
        if rcond is not None and not 0 <= rcond < 1:
            raise ArgumentError(f"rcond is {rcond}; it must be in [0, 1)")
        if rcond is None:
            rcond = default_rcond(self.shape, self.dtype)
        U, s, V = self.singular_value_decomposition()
        kept = s > rcond * (s[0].item() if len(s) else 0.0)
        values = s[kept].reciprocal().to(self.dtype)
        return TwoSided(V[:, kept], values, U[:, kept], space=self.out_space, out_space=self.space)


def default_rcond(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """What counts as zero, relative to the largest; in half precision ``m eps`` would be all."""
    eps = torch.finfo(dtype).eps
    return min(max(shape) * eps, math.sqrt(eps))


def small_svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``M = U diag(s) V^H`` of a small matrix, with ``V`` not transposed."""
    if not math.prod(M.shape):
        return M[:, :0], torch.zeros(0, dtype=torch.float64, device=M.device), M.mH[:, :0]
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return U, s, Vh.mH
