"""The product of operators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from woodbury.operators.base import LinearOperator
from woodbury.operators.identity import multiple_of_identity
from woodbury.operators.sum import total
from woodbury.operators.tags import Tags, inverse_tags
from woodbury.operators.transpose import are_adjoint, are_transposes

__all__ = ["Product"]


class Product(LinearOperator):
    """``A @ B @ ...``, applied from the right; made by ``A @ B``, which merges what it can.

    A congruence ``P @ M @ P.H`` is recognised: it keeps what ``M`` knows (see
    :mod:`woodbury.operators.tags`), and where ``P`` is unitary, ``P @ M @ P.H + c * I`` becomes
    ``P @ (M + c * I) @ P.H``, so that it can be inverted wherever ``M + c * I`` can.

    Args:
        factors: operators of one dtype and device whose shapes fit.
        tags: tags beside those that follow from the factors.

    Cost: a product costs one product with each factor.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal, FunctionOperator
        >>> shift = FunctionOperator(lambda X: X.roll(1, 0), (3, 3), lambda X: X.roll(-1, 0))
        >>> congruence = shift @ Diagonal(torch.tensor([1.0, 2.0, 3.0])) @ shift.T
        >>> congruence @ torch.ones(3), "symmetric" in congruence.tags
        (tensor([3., 1., 2.]), True)
    """

    _made_of = ("factors",)

    def __init__(self, factors: Sequence[LinearOperator], *, tags: Iterable[str] = ()) -> None:
        first, last = factors[0], factors[-1]
        super().__init__(
            (first.shape[0], last.shape[1]),
            dtype=first.dtype,
            device=first.device,
            tags=product_tags(factors) | frozenset(tags),
            space=last.space,
            out_space=first.out_space,
        )
        self.factors = tuple(factors)

    def _matmat(self, X: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            X = factor._matmat(X)
        return X

    def _rmatmat(self, Y: Tensor) -> Tensor:
        for factor in self.factors:
            Y = factor._rmatmat(Y)
        return Y

    def _to_dense(self) -> Tensor:
        return self._apply_head(self.factors[-1]._to_dense())

    def _columns(self, index: Tensor) -> Tensor:
        return self._apply_head(self.factors[-1]._columns(index))

    def _apply_head(self, X: Tensor) -> Tensor:
        """All factors but the last, applied to ``X``."""
        for factor in reversed(self.factors[:-1]):
            X = factor._matmat(X) if X.shape[1] else X.new_zeros(factor.shape[0], 0)
        return X

    def _trace(self) -> Tensor | None:
        # tr(P M P^H) = tr(M) where P is unitary.
        return self._middle().trace() if self._is_unitary_congruence() else None

    def _logdet(self) -> Tensor | None:
        if not all(factor.is_square for factor in self.factors):
            return super()._logdet()
        parts = [factor._logdet() for factor in self.factors]
        known = [part for part in parts if part is not None]
        return total(known) if len(known) == len(parts) else None

    def _has_inverse(self) -> bool:
        return "unitary" in self.tags or all(factor.has_inverse for factor in self.factors)

    def _inverse(self) -> LinearOperator | None:
        if not all(factor.has_inverse for factor in self.factors):
            return super()._inverse()
        inverses = [factor.inverse() for factor in reversed(self.factors)]
        return Product(inverses, tags=inverse_tags(self.tags))

    def _transpose(self) -> LinearOperator:
        return Product([factor.T for factor in reversed(self.factors)])

    def _adjoint(self) -> LinearOperator:
        return Product([factor.H for factor in reversed(self.factors)])

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        if multiple_of_identity(other) is None or not self._is_unitary_congruence():
            return None
        shifted = self._middle()._add(other)
        return None if shifted is None else self._around(shifted)

    def _scale(self, factor: complex | Tensor) -> LinearOperator | None:
        if not self._is_unitary_congruence():
            return None
        scaled = self._middle()._scale(factor)
        return None if scaled is None else self._around(scaled)

    def _is_unitary_congruence(self) -> bool:
        first, last = self.factors[0], self.factors[-1]
        return len(self.factors) > 2 and "unitary" in first.tags and are_adjoint(first, last)

    def _around(self, middle: LinearOperator) -> LinearOperator:
        inner = middle.factors if isinstance(middle, Product) else (middle,)
        return Product([self.factors[0], *inner, self.factors[-1]])

    def _middle(self) -> LinearOperator:
        inner = self.factors[1:-1]
        return inner[0] if len(inner) == 1 else Product(inner)


def product_tags(factors: Sequence[LinearOperator]) -> Tags:
    """Tags of ``A @ B @ ...``."""
    if factors[0].shape[0] != factors[-1].shape[1]:
        return frozenset()
    tags: Tags = frozenset({"diagonal", "lower_triangular", "upper_triangular", "unitary"})
    for factor in factors:
        tags &= factor.tags
    return tags | _congruence_tags(factors)


def _congruence_tags(factors: Sequence[LinearOperator]) -> Tags:
    """Tags of ``P1 @ ... @ M @ ... @ P1.H`` from those of the middle ``M``."""
    count = len(factors)
    pairs = [(factors[i], factors[count - 1 - i]) for i in range(count // 2)]
    if count % 2:
        middle = factors[count // 2].tags
    else:  # P @ P.H is P @ I @ P.H
        middle = frozenset({"symmetric", "hermitian", "positive_semidefinite", "positive_definite"})
    tags: set[str] = set()
    if all(are_transposes(a, b) for a, b in pairs):
        tags |= middle & {"symmetric"}
    if all(are_adjoint(a, b) for a, b in pairs):
        tags |= middle & {"hermitian", "positive_semidefinite"}
        if all("unitary" in a.tags for a, _ in pairs):
            tags |= middle & {"positive_definite"}
    return frozenset(tags)
