"""Sums, products, multiples and transposes of operators, simplified only where it is a theorem.

Simplifications made here: ``(A.T).T`` is ``A``; ``A.T`` is ``A`` where ``A`` is symmetric; sums and
products are flattened (both are associative); ``c * (d * A)`` is ``(c d) * A``; ``1 * A`` is ``A``;
``I @ A`` and ``A @ I`` are ``A``. Everything else a class knows about its own kind is asked of it
through ``_add``, ``_compose``, ``_scale`` and ``_transpose``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from woodbury.errors import DeviceError, DtypeError, ShapeError
from woodbury.operators.base import LinearOperator
from woodbury.operators.tags import Tags, scaled_tags, sum_tags, transposed_tags

__all__ = ["Adjoint", "Product", "Scaled", "Sum", "Transpose", "add", "adjoint", "compose", "scale"]


class Sum(LinearOperator):
    """``A + B + ...``: products add; one product costs one product with each term."""

    def __init__(self, terms: Sequence[LinearOperator]) -> None:
        first = terms[0]
        tags = first.tags
        for term in terms[1:]:
            tags = sum_tags(tags, term.tags)
        super().__init__(
            first.shape,
            dtype=first.dtype,
            device=first.device,
            tags=tags,
            space=_common_space(terms),
        )
        self.terms = tuple(terms)

    def _matmat(self, X: Tensor) -> Tensor:
        result = self.terms[0]._matmat(X)
        for term in self.terms[1:]:
            result = result + term._matmat(X)
        return result

    def _rmatmat(self, Y: Tensor) -> Tensor:
        result = self.terms[0]._rmatmat(Y)
        for term in self.terms[1:]:
            result = result + term._rmatmat(Y)
        return result

    def _to_dense(self) -> Tensor:
        return _total([term._to_dense() for term in self.terms])

    def _diagonal(self) -> Tensor:
        return _total([term._diagonal() for term in self.terms])

    def _trace(self) -> Tensor:
        return _total([term.trace() for term in self.terms])

    def _transpose(self) -> LinearOperator:
        return Sum([transpose(term) for term in self.terms])

    def _scale(self, factor: complex | Tensor) -> LinearOperator:
        return Sum([scale(factor, term) for term in self.terms])


class Scaled(LinearOperator):
    """``c * A`` for a number or a scalar tensor ``c`` (which may carry a gradient)."""

    def __init__(self, factor: complex | Tensor, operator: LinearOperator) -> None:
        super().__init__(
            operator.shape,
            dtype=operator.dtype,
            device=operator.device,
            tags=scaled_tags(operator.tags, _number(factor)),
            space=operator.space,
        )
        self.factor = factor
        self.operator = operator

    def _matmat(self, X: Tensor) -> Tensor:
        return self.factor * self.operator._matmat(X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return _conj(self.factor) * self.operator._rmatmat(Y)

    def _to_dense(self) -> Tensor:
        return self.factor * self.operator._to_dense()

    def _diagonal(self) -> Tensor:
        return self.factor * self.operator._diagonal()

    def _trace(self) -> Tensor:
        return self.factor * self.operator.trace()

    def _logdet(self) -> Tensor | None:
        inner = self.operator._logdet()
        if inner is None:
            return None
        factor = torch.as_tensor(self.factor, dtype=self.dtype, device=self.device)
        return inner + self.shape[0] * torch.log(torch.abs(factor))

    def _inverse(self) -> LinearOperator | None:
        inner = self.operator._inverse()
        return None if inner is None else scale(1 / self.factor, inner)

    def _transpose(self) -> LinearOperator:
        return scale(self.factor, transpose(self.operator))

    def _scale(self, factor: complex | Tensor) -> LinearOperator:
        return scale(factor * self.factor, self.operator)


class Product(LinearOperator):
    """``A @ B @ ...``: applied from the right; one product costs one product with each factor."""

    def __init__(self, factors: Sequence[LinearOperator]) -> None:
        first, last = factors[0], factors[-1]
        super().__init__(
            (first.shape[0], last.shape[1]),
            dtype=first.dtype,
            device=first.device,
            tags=_product_tags(factors),
            space=last.space,
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
        dense = self.factors[-1]._to_dense()
        for factor in reversed(self.factors[:-1]):
            dense = factor._matmat(dense)
        return dense

    def _logdet(self) -> Tensor | None:
        if not all(factor.is_square for factor in self.factors):
            return None
        parts = [factor._logdet() for factor in self.factors]
        known = [part for part in parts if part is not None]
        return _total(known) if len(known) == len(parts) else None

    def _inverse(self) -> LinearOperator | None:
        inverses: list[LinearOperator] = []
        for factor in reversed(self.factors):
            inner = factor._inverse() if factor.is_square else None
            if inner is None:
                return None
            inverses.append(inner)
        return Product(inverses)

    def _transpose(self) -> LinearOperator:
        return Product([transpose(factor) for factor in reversed(self.factors)])


class Transpose(LinearOperator):
    """``A.T`` of an operator that has no better form of it."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(
            (operator.shape[1], operator.shape[0]),
            dtype=operator.dtype,
            device=operator.device,
            tags=transposed_tags(operator.tags),
        )
        self.operator = operator

    def _matmat(self, X: Tensor) -> Tensor:
        if not self.dtype.is_complex:
            return self.operator._rmatmat(X)
        return self.operator._rmatmat(X.conj().resolve_conj()).conj()

    def _rmatmat(self, Y: Tensor) -> Tensor:
        if not self.dtype.is_complex:
            return self.operator._matmat(Y)
        return self.operator._matmat(Y.conj().resolve_conj()).conj()

    def _to_dense(self) -> Tensor:
        return self.operator._to_dense().mT

    def _diagonal(self) -> Tensor:
        return self.operator._diagonal()

    def _trace(self) -> Tensor | None:
        return self.operator._trace()

    def _logdet(self) -> Tensor | None:
        return self.operator._logdet()

    def _inverse(self) -> LinearOperator | None:
        inner = self.operator._inverse()
        return None if inner is None else transpose(inner)

    def _transpose(self) -> LinearOperator:
        return self.operator


class Adjoint(LinearOperator):
    """``A.H`` of an operator of complex dtype."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(
            (operator.shape[1], operator.shape[0]),
            dtype=operator.dtype,
            device=operator.device,
            tags=transposed_tags(operator.tags),
        )
        self.operator = operator

    def _matmat(self, X: Tensor) -> Tensor:
        return self.operator._rmatmat(X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self.operator._matmat(Y)

    def _to_dense(self) -> Tensor:
        return self.operator._to_dense().mH

    def _diagonal(self) -> Tensor:
        return self.operator._diagonal().conj()

    def _logdet(self) -> Tensor | None:
        return self.operator._logdet()

    def _inverse(self) -> LinearOperator | None:
        inner = self.operator._inverse()
        return None if inner is None else adjoint(inner)


def transpose(operator: LinearOperator) -> LinearOperator:
    """``A.T``: ``A`` itself where it is symmetric, its structural transpose where it has one."""
    if "symmetric" in operator.tags:
        return operator
    structural = operator._transpose()
    return Transpose(operator) if structural is None else structural


def adjoint(operator: LinearOperator) -> LinearOperator:
    """``A.H``: ``A`` itself where it is hermitian, ``A.T`` for a real dtype."""
    if "hermitian" in operator.tags:
        return operator
    if not operator.dtype.is_complex:
        return transpose(operator)
    return operator.operator if isinstance(operator, Adjoint) else Adjoint(operator)


def scale(factor: complex | Tensor, operator: LinearOperator) -> LinearOperator:
    """``c * A``."""
    if isinstance(factor, Tensor):
        if factor.dtype.is_complex and not operator.dtype.is_complex:
            raise DtypeError(f"complex factor {factor.dtype} on an operator of {operator.dtype}")
    elif isinstance(factor, complex) and not operator.dtype.is_complex:
        raise DtypeError(f"complex factor {factor} on an operator of {operator.dtype}")
    elif factor == 1:
        return operator
    structural = operator._scale(factor)
    return Scaled(factor, operator) if structural is None else structural


def add(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    """``A + B``."""
    if left.shape != right.shape:
        raise ShapeError(f"cannot add operators of shapes {left.shape} and {right.shape}")
    left, right = _adapt(left, right)
    _same_kind(left, right, "add")
    terms = [*_terms(left), *_terms(right)]
    # A new term may merge with any earlier one: addition is commutative.
    merged: list[LinearOperator] = []
    for term in terms:
        for index, other in enumerate(merged):
            joined = other._add(term)
            if joined is None:
                joined = term._add(other)
            if joined is not None:
                merged[index] = joined
                break
        else:
            merged.append(term)
    return merged[0] if len(merged) == 1 else Sum(merged)


def compose(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    """``A @ B``."""
    if left.shape[1] != right.shape[0]:
        raise ShapeError(f"cannot multiply operators of shapes {left.shape} and {right.shape}")
    left, right = _adapt(left, right)
    _same_kind(left, right, "multiply")
    factors: list[LinearOperator] = []
    for factor in [*_factors(left), *_factors(right)]:
        joined = _join(factors[-1], factor) if factors else None
        if joined is None:
            factors.append(factor)
        else:
            factors[-1] = joined
    return factors[0] if len(factors) == 1 else Product(factors)


def _join(left: LinearOperator, right: LinearOperator) -> LinearOperator | None:
    """One operator for ``left @ right`` where there is a simpler one."""
    from woodbury.operators.identity import Identity

    if isinstance(right, Identity):
        return left
    return left._compose(right)


def _terms(operator: LinearOperator) -> tuple[LinearOperator, ...]:
    return operator.terms if isinstance(operator, Sum) else (operator,)


def _factors(operator: LinearOperator) -> tuple[LinearOperator, ...]:
    return operator.factors if isinstance(operator, Product) else (operator,)


def _adapt(left: LinearOperator, right: LinearOperator) -> tuple[LinearOperator, LinearOperator]:
    """Give an identity made without a dtype or device those of its partner."""
    return _like(left, right), _like(right, left)


def _like(operator: LinearOperator, other: LinearOperator) -> LinearOperator:
    from woodbury.operators.identity import Identity

    if isinstance(operator, Identity):
        return operator.like(other)
    if isinstance(operator, Scaled) and isinstance(operator.operator, Identity):
        inner = operator.operator.like(other)
        return operator if inner is operator.operator else Scaled(operator.factor, inner)
    return operator


def _same_kind(left: LinearOperator, right: LinearOperator, verb: str) -> None:
    if left.dtype != right.dtype:
        raise DtypeError(f"cannot {verb} operators of {left.dtype} and {right.dtype}")
    if left.device != right.device:
        raise DeviceError(f"cannot {verb} operators on {left.device} and {right.device}")


def _common_space(operators: Sequence[LinearOperator]) -> object:
    for operator in operators:
        if operator.space.named or type(operator.space).__name__ != "Space":
            return operator.space
    return operators[0].space


def _product_tags(factors: Sequence[LinearOperator]) -> Tags:
    tags = frozenset({"diagonal", "lower_triangular", "upper_triangular", "unitary"})
    for factor in factors:
        tags &= factor.tags
    if factors[0].shape[0] != factors[-1].shape[1]:
        return frozenset()
    return tags | _congruence_tags(factors)


def _congruence_tags(factors: Sequence[LinearOperator]) -> Tags:
    """Tags of ``P1 @ ... @ M @ ... @ P1.H`` from those of the middle ``M``."""
    count = len(factors)
    real = not factors[0].dtype.is_complex
    pairs = [(factors[i], factors[count - 1 - i]) for i in range(count // 2)]
    hermitian = all(_are_adjoint(a, b) for a, b in pairs)
    symmetric = hermitian if real else all(_are_transposes(a, b) for a, b in pairs)
    if count % 2:
        middle = factors[count // 2].tags
    else:  # P @ P.H is P @ I @ P.H
        middle = frozenset({"symmetric", "hermitian", "positive_semidefinite", "positive_definite"})
    tags: set[str] = set()
    if symmetric:
        tags |= middle & {"symmetric"}
    if hermitian:
        tags |= middle & {"hermitian", "positive_semidefinite"}
        if all("unitary" in a.tags for a, _ in pairs):
            tags |= middle & {"positive_definite"}
    return frozenset(tags)


def _are_transposes(a: LinearOperator, b: LinearOperator) -> bool:
    if isinstance(a, Transpose) and a.operator is b:
        return True
    if isinstance(b, Transpose) and b.operator is a:
        return True
    if a is b:
        return "symmetric" in a.tags
    return _share_transposed_data(a, b)


def _are_adjoint(a: LinearOperator, b: LinearOperator) -> bool:
    if not a.dtype.is_complex:
        return _are_transposes(a, b)
    if isinstance(a, Adjoint) and a.operator is b:
        return True
    if isinstance(b, Adjoint) and b.operator is a:
        return True
    return a is b and "hermitian" in a.tags


def _share_transposed_data(a: LinearOperator, b: LinearOperator) -> bool:
    """Whether ``b`` was made as ``a.T``: structural transposes remember where they came from."""
    return getattr(b, "transpose_of", None) is a or getattr(a, "transpose_of", None) is b


def _total(parts: Sequence[Tensor]) -> Tensor:
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def _number(factor: complex | Tensor) -> complex | float:
    return factor.item() if isinstance(factor, Tensor) else factor


def _conj(factor: complex | Tensor) -> complex | Tensor:
    return factor.conj() if isinstance(factor, Tensor) else factor.conjugate()
