"""An invertible operator plus a low-rank one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from woodbury.errors import StructureError
from woodbury.operators.base import LinearOperator
from woodbury.operators.dtypes import precise
from woodbury.operators.factorization import factorize, require_finite
from woodbury.operators.low_rank import LowRank
from woodbury.operators.tags import inverse_tags, scaled_tags, sum_tags, transposed_tags

__all__ = ["LowRankUpdate"]


class LowRankUpdate(LinearOperator):
    r"""$A = B + U C V^H$ for an operator $B$ that has a structural inverse.

    The inverse is again of this kind, by the Woodbury identity in the form that tolerates a
    singular $C$:

    $$A^{-1} = B^{-1} - B^{-1} U \, (I + C V^H B^{-1} U)^{-1} C \, V^H B^{-1},$$

    and by the determinant lemma
    $\log|\det A| = \log|\det B| + \log|\det(I + C V^H B^{-1} U)|$. The matrix of size ``r`` is
    formed and factorised in float64 (complex128) whatever the dtype of ``A``.

    Made by ``B + LowRank(U, C, V)``.

    Args:
        base: ``B``; ``base.has_inverse`` must hold.
        low_rank: ``U C V^H``.
        tags: tags beside those that follow from the terms, for example ``"positive_definite"`` of a
            downdate that is known to leave it so.

    Raises:
        StructureError: ``base`` has no structural inverse.
        SingularError: on inversion, where ``B`` or ``I + C V^H B^-1 U`` is singular to working
            precision. If only ``B`` is, the identity does not apply though ``A`` may be invertible.

    Cost: a product costs one with ``B`` and one with the low-rank term; the inverse and the
    log-determinant ``r`` solves with ``B`` (``r + s`` where ``A`` is not hermitian), ``n r^2``
    multiplications and the factorisation of size ``r``, once.

    Source: Woodbury (1950); the form without the inverse of $C$ is Henderson and Searle (1981).

    Example:
        >>> import torch
        >>> from woodbury import Diagonal, LowRank
        >>> A = Diagonal(torch.tensor([1.0, 2.0, 4.0])) + LowRank(torch.ones(3, 1))
        >>> A.inverse()
        LowRankUpdate(shape=(3, 3), ...)
        >>> A.logdet()
        tensor(3.0910)
    """

    _made_of = ("base", "low_rank")

    def __init__(
        self, base: LinearOperator, low_rank: LowRank, *, tags: Iterable[str] = ()
    ) -> None:
        if not base.has_inverse:
            raise StructureError(
                f"{type(base).__name__} has no structural inverse to update; use Sum, and an "
                "iterative recipe for its inverse"
            )
        super().__init__(
            base.shape,
            dtype=base.dtype,
            device=base.device,
            tags=sum_tags(base.tags, low_rank.tags) | set(tags),
            space=base.space,
            out_space=base.out_space,
        )
        self.base = base
        self.low_rank = low_rank

    def _matmat(self, X: Tensor) -> Tensor:
        return self.base._matmat(X) + self.low_rank._matmat(X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self.base._rmatmat(Y) + self.low_rank._rmatmat(Y)

    def _to_dense(self) -> Tensor:
        return self.base._to_dense() + self.low_rank._to_dense()

    def _columns(self, index: Tensor) -> Tensor:
        return self.base._columns(index) + self.low_rank._columns(index)

    def _diagonal(self) -> Tensor:
        return self.base._diagonal() + self.low_rank._diagonal()

    def _trace(self) -> Tensor:
        return self.base.trace() + self.low_rank.trace()

    def _logdet(self) -> Tensor:
        base = self.base.logdet()
        W = self.base.inverse() @ self.low_rank.U
        return base + factorize(self._capacitance(W), frozenset()).logdet().to(base.dtype)

    def _inverse(self) -> LinearOperator:
        base = self.base.inverse()
        term = self.low_rank
        W = base @ term.U
        C = -factorize(self._capacitance(W), frozenset()).solve(precise(term.core))
        hermitian = {"hermitian"} <= self.base.tags & term.tags and term.V is term.U
        if hermitian:
            C = (C + C.mH) / 2
        Z = W if hermitian else base.rmatmat(term.V)
        tags = {"hermitian"} if hermitian else set()
        update = LowRank._derived(W, C.to(self.dtype), Z, tags, base.space, base.out_space)
        return LowRankUpdate(base, update, tags=inverse_tags(self.tags))

    def _capacitance(self, W: Tensor) -> Tensor:
        """``I + C V^H W``, ``[r, r]``, where ``W`` is ``B^-1 U``."""
        require_finite(self.low_rank.U, "U")
        require_finite(self.low_rank.V, "V")
        gram = precise(self.low_rank.V).mH @ precise(W)
        product = gram if self.low_rank.C is None else precise(self.low_rank.C) @ gram
        return torch.eye(len(product), dtype=product.dtype, device=product.device) + product

    def _transpose(self) -> LinearOperator:
        return self._flipped(self.base.T, self.low_rank._transpose())

    def _adjoint(self) -> LinearOperator:
        return self._flipped(self.base.H, self.low_rank._adjoint())

    def _flipped(self, base: LinearOperator, term: LinearOperator) -> LowRankUpdate:
        assert isinstance(term, LowRank)
        return LowRankUpdate(base, term, tags=transposed_tags(self.tags))

    def _scale(self, factor: complex | Tensor) -> LinearOperator:
        term = self.low_rank._scale(factor)
        assert isinstance(term, LowRank)
        return LowRankUpdate(factor * self.base, term, tags=scaled_tags(self.tags, factor))

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        tags = sum_tags(self.tags, other.tags)
        if isinstance(other, LowRank):
            return LowRankUpdate(self.base, self.low_rank._joined(other), tags=tags)
        if isinstance(other, LowRankUpdate):
            base, term = self._joined_base(other.base), self.low_rank._joined(other.low_rank)
        else:
            base, term = self._joined_base(other), self.low_rank
        return None if base is None else LowRankUpdate(base, term, tags=tags)

    def _joined_base(self, other: LinearOperator) -> LinearOperator | None:
        joined = self.base._add(other)
        if joined is None:
            joined = other._add(self.base)
        return joined if joined is not None and joined.has_inverse else None
