"""A Kronecker product."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from woodbury.errors import ShapeError, SingularError
from woodbury.operators.base import LinearOperator
from woodbury.operators.dense import Dense
from woodbury.operators.identity import Identity, multiple_of_identity, same_kind
from woodbury.operators.sum import total
from woodbury.spaces import Space

__all__ = ["Kronecker"]

# Fewer trailing columns than this, and one large product with a copy beats many thin ones
# (measured on a CPU: benchmarks/operators.py).
_THIN = 32


class Kronecker(LinearOperator):
    r"""$A_1 \otimes A_2 \otimes \dots \otimes A_d$.

    With rows laid end to end,
    $(A \otimes B) \operatorname{vec}(X) = \operatorname{vec}(A X B^T)$: the curvature of a linear
    layer with weight ``[out, in]`` is ``Kronecker(out_factor, in_factor)`` of the flattened weight.

    Tags that all factors hold are kept; each is a theorem for Kronecker products.

    Args:
        factors: matrices ``[m_i, n_i]`` or operators.
        tags: further tags, taken on trust.
        space: :class:`~woodbury.Space` of the vectors ``x`` in ``A @ x``.

    Raises:
        ShapeError: no factors, or a tensor that is not a matrix.
        DtypeError: the factors differ in dtype.
        DeviceError: the factors differ in device.

    Cost: a product with ``k`` columns is one product with each factor:
    ``n (n_1 + ... + n_d) k`` multiplications instead of ``n^2 k``, for ``n = n_1 ... n_d``.
    Inverse, trace, diagonal and log-determinant are those of the factors.

    Example:
        >>> import torch
        >>> from woodbury import Kronecker
        >>> A = Kronecker(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.eye(2))
        >>> A @ torch.tensor([1.0, 2.0, 3.0, 4.0])
        tensor([2., 4., 4., 6.])
        >>> A.logdet()
        tensor(1.3863)
    """

    _made_of = ("factors",)

    def __init__(
        self,
        *factors: Tensor | LinearOperator,
        tags: Iterable[str] = (),
        space: Space | None = None,
        out_space: Space | None = None,
    ) -> None:
        self.factors = _flattened(factors)
        common = self.factors[0].tags
        for factor in self.factors[1:]:
            common &= factor.tags
        given = {tags} if isinstance(tags, str) else set(tags)
        super().__init__(
            (
                math.prod(factor.shape[0] for factor in self.factors),
                math.prod(factor.shape[1] for factor in self.factors),
            ),
            dtype=self.factors[0].dtype,
            device=self.factors[0].device,
            tags=common | given,
            space=space,
            out_space=out_space,
        )

    def _of(self, factors: Sequence[LinearOperator]) -> Kronecker:
        return Kronecker(*factors, space=self.space, out_space=self.out_space)

    def _matmat(self, X: Tensor) -> Tensor:
        return self._apply(X, adjoint=False)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self._apply(Y, adjoint=True)

    def _apply(self, X: Tensor, *, adjoint: bool) -> Tensor:
        k = X.shape[1]
        sides = [f.shape[::-1] if adjoint else f.shape for f in self.factors]
        sizes = [columns for _, columns in sides]
        # What shrinks the vector most goes first: the later factors then have less to do.
        for i in sorted(range(len(sides)), key=lambda i: sides[i][0] / max(sides[i][1], 1)):
            if isinstance(self.factors[i], Identity):
                continue
            left, right = math.prod(sizes[:i]), math.prod(sizes[i + 1 :]) * k
            X = _along_axis(self.factors[i], X.reshape(left, sizes[i], right), adjoint=adjoint)
            sizes[i] = sides[i][0]
        X = X.reshape(math.prod(sizes), k)
        return X.clone() if all(isinstance(f, Identity) for f in self.factors) else X

    def _to_dense(self) -> Tensor:
        dense = self.factors[0]._to_dense()
        for factor in self.factors[1:]:
            dense = _kron(dense, factor._to_dense())
        return dense.clone() if len(self.factors) == 1 else dense

    def _columns(self, index: Tensor) -> Tensor:
        columns = torch.ones(1, len(index), dtype=self.dtype, device=self.device)
        sizes = [factor.shape[1] for factor in self.factors]
        for i, factor in enumerate(self.factors):
            digit = index // math.prod(sizes[i + 1 :]) % sizes[i]
            part = factor._columns(digit)
            columns = (columns.unsqueeze(1) * part.unsqueeze(0)).reshape(-1, len(index))
        return columns

    def _squares(self) -> bool:
        return all(factor.is_square for factor in self.factors)

    def _diagonal(self) -> Tensor:
        if not self._squares():
            return super()._diagonal()
        diagonal = self.factors[0]._diagonal()
        for factor in self.factors[1:]:
            diagonal = torch.outer(diagonal, factor._diagonal()).reshape(-1)
        return diagonal

    def _trace(self) -> Tensor | None:
        if not self._squares():
            return None
        trace = self.factors[0].trace()
        for factor in self.factors[1:]:
            trace = trace * factor.trace()
        return trace

    def _logdet(self) -> Tensor | None:
        if not self._squares():
            self._refuse_rectangular()
        n = self.shape[0]
        parts: list[Tensor] = []
        for factor in self.factors:
            part = factor._logdet()
            if part is None:
                return None
            parts.append(part * (n // max(factor.shape[0], 1)))
        return total(parts)

    def _has_inverse(self) -> bool:
        return all(factor.has_inverse for factor in self.factors)

    def _inverse(self) -> LinearOperator | None:
        if not self._squares():
            self._refuse_rectangular()
        if not self._has_inverse():
            return None
        return self._of([factor.inverse() for factor in self.factors])

    def _refuse_rectangular(self) -> None:
        shapes = [factor.shape for factor in self.factors]
        raise SingularError(
            f"factors of shapes {shapes} are not all square, so the rank is not full"
        )

    def _transpose(self) -> LinearOperator:
        factors = [factor.T for factor in self.factors]
        return Kronecker(*factors, space=self.out_space, out_space=self.space)

    def _adjoint(self) -> LinearOperator:
        factors = [factor.H for factor in self.factors]
        return Kronecker(*factors, space=self.out_space, out_space=self.space)

    def _scale(self, factor: complex | Tensor) -> LinearOperator:
        """The smallest factor takes ``c`` in, so that the result is a Kronecker product again."""
        factors = list(self.factors)
        i = min(range(len(factors)), key=lambda i: math.prod(factors[i].shape))
        scaled = factor * factors[i]
        part = factors[i]
        if isinstance(part, Dense):  # cheap beside the whole, and then no pass over the result
            scaled = Dense._derived(factor * part.matrix, scaled.tags, part.space, part.out_space)
        factors[i] = scaled
        return self._of(factors)

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        from woodbury.operators.shifted_kronecker import ShiftedKronecker

        shift = multiple_of_identity(other)
        hermitian = all("hermitian" in factor.tags for factor in self.factors)
        return ShiftedKronecker(self, shift) if shift is not None and hermitian else None

    def _compose(self, other: LinearOperator) -> LinearOperator | None:
        """``(A1 x B1) @ (A2 x B2)`` is ``(A1 A2) x (B1 B2)`` where the sizes match."""
        if not isinstance(other, Kronecker) or len(other.factors) != len(self.factors):
            return None
        pairs = list(zip(self.factors, other.factors, strict=True))
        if any(a.shape[1] != b.shape[0] for a, b in pairs):
            return None
        return Kronecker(*[a @ b for a, b in pairs], space=other.space, out_space=self.out_space)


def _flattened(factors: Sequence[Tensor | LinearOperator]) -> tuple[LinearOperator, ...]:
    """Operators of one dtype and device; the Kronecker product is associative."""
    if not factors:
        raise ShapeError("no factors given: a Kronecker product needs at least one")
    flat: list[LinearOperator] = []
    for factor in factors:
        operator = Dense(factor) if isinstance(factor, Tensor) else factor
        flat.extend(operator.factors if isinstance(operator, Kronecker) else [operator])
    return same_kind(flat)


def _kron(A: Tensor, B: Tensor) -> Tensor:
    """``torch.kron`` of two matrices, which fails for some strides (torch 2.13)."""
    rows, columns = A.shape[0] * B.shape[0], A.shape[1] * B.shape[1]
    return (A[:, None, :, None] * B[None, :, None, :]).reshape(rows, columns)


def _along_axis(operator: LinearOperator, X: Tensor, *, adjoint: bool) -> Tensor:
    """The operator applied to the middle axis of ``[left, n, right]``."""
    left, n, right = X.shape
    apply = operator._rmatmat if adjoint else operator._matmat
    if left == 1:
        return apply(X.reshape(n, right)).unsqueeze(0)
    if isinstance(operator, Dense):
        matrix = operator.matrix.mH if adjoint else operator.matrix
        if right >= _THIN:
            return torch.bmm(matrix.expand(left, -1, -1), X)
        result = X.transpose(1, 2).reshape(left * right, n) @ matrix.mT
        return result.view(left, right, len(matrix)).transpose(1, 2)
    result = apply(X.transpose(0, 1).reshape(n, left * right))
    return result.view(len(result), left, right).transpose(0, 1)
