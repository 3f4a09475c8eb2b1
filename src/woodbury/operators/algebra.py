"""The algebra of operators, simplified only where it is a theorem.

Here: ``(A.T).T`` is ``A``; ``A.T`` is ``A`` where ``A`` is symmetric; sums and products are
flattened (both are associative), the terms of a sum meet in any order (it is commutative), numbers
are taken out of products; ``1 * A``, ``I @ A`` and ``A @ I`` are ``A``. What a class knows about
its own kind is asked of it through ``_transpose``, ``_adjoint``, ``_scale``, ``_add`` and
``_compose``.
"""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from woodbury.errors import DeviceError, DtypeError, ShapeError
from woodbury.operators.base import LinearOperator
from woodbury.operators.identity import Identity, adapted
from woodbury.operators.product import Product
from woodbury.operators.scaled import Scaled
from woodbury.operators.sum import Sum
from woodbury.operators.transpose import Adjoint, Transpose

_CPU = torch.device("cpu")

__all__ = ["add", "adjoint", "compose", "scale", "transpose"]


def transpose(operator: LinearOperator) -> LinearOperator:
    """``A.T``: ``A`` itself where it is symmetric, its structural transpose where it has one."""
    if "symmetric" in operator.tags:
        return operator
    if operator._transpose_of is not None:
        return operator._transpose_of
    flipped = operator._transpose()
    if flipped is None:
        flipped = Transpose(operator)
    if flipped is not operator:
        flipped._transpose_of = operator
    return flipped


def adjoint(operator: LinearOperator) -> LinearOperator:
    """``A.H``: ``A`` itself where it is hermitian, ``A.T`` for a real dtype."""
    if "hermitian" in operator.tags:
        return operator
    if not operator.dtype.is_complex:
        return transpose(operator)
    if operator._adjoint_of is not None:
        return operator._adjoint_of
    flipped = operator._adjoint()
    if flipped is None:
        flipped = Adjoint(operator)
    if flipped is not operator:
        flipped._adjoint_of = operator
    return flipped


def scale(factor: complex | Tensor, operator: LinearOperator) -> LinearOperator:
    """``c * A`` for a number or a scalar tensor."""
    if isinstance(factor, Tensor):
        is_complex = factor.dtype.is_complex
        if factor.device not in (operator.device, _CPU):
            raise DeviceError(
                f"the factor is on {factor.device}, the operator on {operator.device}"
            )
    else:
        is_complex = not isinstance(factor, numbers.Real)
        # NumPy's scalars would promote the dtype of what they multiply.
        factor = complex(factor) if is_complex else float(factor.real)
    if is_complex and not operator.dtype.is_complex:
        raise DtypeError(f"the factor {factor} is complex, the operator {operator.dtype}")
    if not isinstance(factor, Tensor) and factor == 1:
        return operator
    structural = operator._scale(factor)
    return Scaled(factor, operator) if structural is None else structural


def add(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    """``A + B``."""
    if left.shape != right.shape:
        raise ShapeError(f"cannot add operators of shapes {left.shape} and {right.shape}")
    left, right = adapted(left, right), adapted(right, left)
    _require_same_kind(left, right, "add")
    merged: list[LinearOperator] = []
    for term in [*_terms(left), *_terms(right)]:
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
    left, right = adapted(left, right), adapted(right, left)
    _require_same_kind(left, right, "multiply")
    (c, heads), (d, tails) = _factors(left), _factors(right)
    factors: list[LinearOperator] = []
    for factor in [*heads, *tails]:
        joined = factors[-1]._compose(factor) if factors else None
        if joined is None:
            factors.append(factor)
        else:
            factors[-1] = joined
    if not factors:  # both are multiples of the identity
        return scale(c * d, left.operator if isinstance(left, Scaled) else left)
    return scale(c * d, factors[0] if len(factors) == 1 else Product(factors))


def _terms(operator: LinearOperator) -> tuple[LinearOperator, ...]:
    return operator.terms if isinstance(operator, Sum) else (operator,)


def _factors(operator: LinearOperator) -> tuple[complex | Tensor, tuple[LinearOperator, ...]]:
    """A number and the factors it multiplies: numbers commute with everything."""
    if isinstance(operator, Scaled):
        inner, factors = _factors(operator.operator)
        return operator.factor * inner, factors
    if isinstance(operator, Identity):
        return 1.0, ()
    return 1.0, operator.factors if isinstance(operator, Product) else (operator,)


def _require_same_kind(left: LinearOperator, right: LinearOperator, verb: str) -> None:
    if left.dtype != right.dtype:
        raise DtypeError(
            f"cannot {verb} operators of {left.dtype} and {right.dtype}; nothing is promoted "
            "silently: make both of one dtype"
        )
    if left.device != right.device:
        raise DeviceError(
            f"cannot {verb} operators on {left.device} and {right.device}; make both on one device"
        )
