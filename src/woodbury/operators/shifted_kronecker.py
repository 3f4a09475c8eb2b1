"""A Kronecker product plus a multiple of the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from woodbury.errors import NotPositiveDefiniteError, SingularError, StructureError
from woodbury.operators.base import LinearOperator
from woodbury.operators.dense import Dense
from woodbury.operators.diagonal import Diagonal
from woodbury.operators.dtypes import precise
from woodbury.operators.factorization import require_finite
from woodbury.operators.identity import Identity, multiple_of_identity
from woodbury.operators.kronecker import Kronecker
from woodbury.operators.tags import sum_tags

__all__ = ["ShiftedKronecker"]


class ShiftedKronecker(LinearOperator):
    r"""$A_1 \otimes \dots \otimes A_d + c I$ with hermitian factors.

    With $A_i = Q_i \Lambda_i Q_i^H$ and $Q = Q_1 \otimes \dots \otimes Q_d$ the inverse is
    $Q (\Lambda_1 \otimes \dots \otimes \Lambda_d + c I)^{-1} Q^H$: a product of a Kronecker
    product, a diagonal and a Kronecker product. Made by ``Kronecker(...) + c * Identity(n)``.

    Args:
        kronecker: a Kronecker product whose factors are all tagged hermitian.
        shift: ``c``.

    Raises:
        StructureError: a factor is not tagged hermitian.
        SingularError: on inversion, where an eigenvalue is zero.
        NonFiniteError: on inversion, where a factor holds NaN or infinity.
        NotPositiveDefiniteError: on inversion, where a factor tagged positive semidefinite has a
            negative eigenvalue beyond rounding.

    Cost: a product costs one with the Kronecker product. The inverse costs one eigendecomposition
    of each factor, in float64 (in float32 the smallest eigenvalues would be rounding errors as
    large as a small ``c``), and its product two with a Kronecker product.

    Source: Martens and Grosse (2015), appendix B, for two factors.

    Example:
        >>> import torch
        >>> from woodbury import Dense, Identity, Kronecker
        >>> A = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), tags={"positive_definite"})
        >>> (Kronecker(A, A) + 1.0 * Identity(4)).logdet()
        tensor(5.7683)
    """

    _made_of = ("kronecker", "shift", "_multiple")

    def __init__(self, kronecker: Kronecker, shift: complex | Tensor) -> None:
        loose = [i for i, factor in enumerate(kronecker.factors) if "hermitian" not in factor.tags]
        if loose:
            raise StructureError(f"factors {loose} are not tagged hermitian; use Sum")
        self.kronecker = kronecker
        self.shift = shift
        self._multiple = shift * Identity(
            kronecker.shape[0],
            dtype=kronecker.dtype,
            device=kronecker.device,
            space=kronecker.space,
        )
        super().__init__(
            kronecker.shape,
            dtype=kronecker.dtype,
            device=kronecker.device,
            tags=sum_tags(kronecker.tags, self._multiple.tags),
            space=kronecker.space,
            out_space=kronecker.out_space,
        )

    def _matmat(self, X: Tensor) -> Tensor:
        return self.kronecker._matmat(X) + self._multiple._matmat(X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self.kronecker._rmatmat(Y) + self._multiple._rmatmat(Y)

    def _to_dense(self) -> Tensor:
        return self.kronecker._to_dense() + self._multiple._to_dense()

    def _columns(self, index: Tensor) -> Tensor:
        return self.kronecker._columns(index) + self._multiple._columns(index)

    def _diagonal(self) -> Tensor:
        return self.kronecker._diagonal() + self._multiple._diagonal()

    def _trace(self) -> Tensor:
        return self.kronecker.trace() + self._multiple.trace()

    def _logdet(self) -> Tensor:
        return self._eigendecomposition()[1].logdet()

    def _inverse(self) -> LinearOperator:
        basis, values = self._eigendecomposition()
        return basis @ values.inverse() @ basis.H

    def _eigendecomposition(self) -> tuple[LinearOperator, Diagonal]:
        """``Q`` and the eigenvalues of the whole, shift included, as a diagonal operator."""
        bases: list[LinearOperator] = []
        eigenvalues: Tensor | None = None
        for factor in self.kronecker.factors:
            values, basis = _eigh(factor)
            bases.append(basis)
            eigenvalues = values if eigenvalues is None else _outer(eigenvalues, values)
        assert eigenvalues is not None
        shifted = eigenvalues + self.shift
        _require_condition(shifted.detach())
        tags = {"diagonal"} | (self.tags & {"hermitian", "positive_definite"})
        diagonal = Diagonal._derived(shifted.to(self.dtype), tags, self.space)
        return Kronecker(*bases, space=self.space), diagonal

    def _transpose(self) -> LinearOperator:
        return self.kronecker.T + self._multiple.T

    def _adjoint(self) -> LinearOperator:
        return self.kronecker.H + self._multiple.H

    def _scale(self, factor: complex | Tensor) -> LinearOperator | None:
        is_complex = factor.dtype.is_complex if isinstance(factor, Tensor) else factor.imag != 0
        if is_complex:  # the factors would no longer be hermitian
            return None
        return factor * self.kronecker + factor * self._multiple

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        shift = multiple_of_identity(other)
        return None if shift is None else ShiftedKronecker(self.kronecker, self.shift + shift)


def _eigh(factor: LinearOperator) -> tuple[Tensor, LinearOperator]:
    """Eigenvalues in float64, and the eigenvectors as a unitary operator of the factor's dtype."""
    matrix = factor._to_dense()
    require_finite(matrix, "a factor")
    values, vectors = torch.linalg.eigh(precise(matrix))
    if "positive_semidefinite" in factor.tags and len(values):
        rounding = 10 * len(values) * torch.finfo(factor.dtype).eps * values[-1].abs()
        if bool(values[0] < -rounding):
            raise NotPositiveDefiniteError(
                f"a factor tagged positive semidefinite has the eigenvalue {values[0].item():.3g} "
                f"(largest {values[-1].item():.3g}); drop the tag"
            )
        values = values.clamp(min=0)
    return values, Dense._derived(vectors.to(factor.dtype), {"unitary"}, factor.space)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return torch.outer(a, b).reshape(-1)


def _require_condition(eigenvalues: Tensor) -> None:
    if not len(eigenvalues):
        return
    sizes = eigenvalues.abs()
    smallest, largest = float(sizes.min()), float(sizes.max())
    eps = torch.finfo(eigenvalues.dtype).eps
    if not smallest > eps * largest:
        raise SingularError(
            f"the eigenvalues run from {smallest:.3g} to {largest:.3g} in absolute value, so the "
            f"operator is singular to working precision ({eps:.1e}); add a larger multiple of the "
            "identity"
        )
