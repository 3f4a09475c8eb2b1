"""The sum of operators."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from woodbury.operators.base import LinearOperator
from woodbury.operators.tags import sum_tags
from woodbury.spaces import Space

__all__ = ["Sum"]


class Sum(LinearOperator):
    """``A + B + ...``; made by ``A + B``, which checks shapes and merges what can be merged.

    A sum with a :class:`~woodbury.Dense` term is no larger than that term, so it may be formed: its
    inverse and log-determinant are those of the dense sum.

    Args:
        terms: operators of one shape, dtype and device.

    Cost: a product costs one product with each term.

    Example:
        >>> import torch
        >>> from woodbury import FunctionOperator, Identity
        >>> shift = FunctionOperator(lambda X: X.roll(1, 0), (3, 3), lambda X: X.roll(-1, 0))
        >>> (shift + 2.0 * Identity(3)) @ torch.tensor([1.0, 0.0, 0.0])
        tensor([2., 1., 0.])
    """

    _made_of = ("terms",)

    def __init__(self, terms: Sequence[LinearOperator]) -> None:
        first = terms[0]
        common = first.tags
        for term in terms[1:]:
            common = sum_tags(common, term.tags)
        super().__init__(
            first.shape,
            dtype=first.dtype,
            device=first.device,
            tags=common,
            space=common_space([term.space for term in terms]),
            out_space=common_space([term.out_space for term in terms]),
        )
        self.terms = tuple(terms)

    def _matmat(self, X: Tensor) -> Tensor:
        return total([term._matmat(X) for term in self.terms])

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return total([term._rmatmat(Y) for term in self.terms])

    def _to_dense(self) -> Tensor:
        return total([term._to_dense() for term in self.terms])

    def _columns(self, index: Tensor) -> Tensor:
        return total([term._columns(index) for term in self.terms])

    def _diagonal(self) -> Tensor:
        return total([term._diagonal() for term in self.terms])

    def _trace(self) -> Tensor:
        return total([term.trace() for term in self.terms])

    def _has_inverse(self) -> bool:
        return self.is_square and any(_is_dense(term) for term in self.terms)

    def _inverse(self) -> LinearOperator | None:
        return self._formed()._inverse() if self._has_inverse() else None

    def _logdet(self) -> Tensor | None:
        return self._formed()._logdet() if self._has_inverse() else super()._logdet()

    def _formed(self) -> LinearOperator:
        from woodbury.operators.dense import Dense

        return Dense._derived(self._to_dense(), self.tags, self.space, self.out_space)

    def _transpose(self) -> LinearOperator:
        return Sum([term.T for term in self.terms])

    def _adjoint(self) -> LinearOperator:
        return Sum([term.H for term in self.terms])

    def _scale(self, factor: complex | Tensor) -> LinearOperator:
        return Sum([factor * term for term in self.terms])


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors; never in place, because a part may be kept by its operator."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def common_space(spaces: Sequence[Space]) -> Space:
    """The first space that says more than a number of entries, or else the first."""
    for space in spaces:
        if space.named or type(space) is not Space:
            return space
    return spaces[0]


def _is_dense(operator: LinearOperator) -> bool:
    from woodbury.operators.dense import Dense, DenseInverse
    from woodbury.operators.low_rank_update import LowRankUpdate
    from woodbury.operators.scaled import Scaled

    if isinstance(operator, Scaled):
        return _is_dense(operator.operator)
    if isinstance(operator, LowRankUpdate):
        return _is_dense(operator.base)
    return isinstance(operator, (Dense, DenseInverse))
