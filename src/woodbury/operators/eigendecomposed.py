"""A hermitian matrix given by its eigenvectors and eigenvalues."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from woodbury.errors import (
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    SingularError,
    TagError,
)
from woodbury.operators.base import LinearOperator
from woodbury.operators.dense import Dense
from woodbury.operators.diagonal import Diagonal
from woodbury.operators.dtypes import real_dtype
from woodbury.operators.identity import Identity, multiple_of_identity
from woodbury.operators.kronecker import Kronecker

__all__ = ["Eigendecomposed"]


class Eigendecomposed(LinearOperator):
    r"""$Q \operatorname{diag}(\lambda) Q^H$ with a unitary $Q$ and real $\lambda$.

    Functions of it are functions of the eigenvalues: inverse, square root, multiples of the
    identity added to it. The basis may have structure: with ``Kronecker(Q_1, Q_2)`` this is the
    eigenvalue-corrected Kronecker factorisation of EK-FAC.

    Args:
        basis: $Q$, an operator with the tag ``unitary``.
        values: $\lambda$, ``[n]``, real, in the precision of the basis.

    Raises:
        TagError: the basis is not tagged unitary.
        ShapeError: sizes do not fit.
        NonFiniteError: an eigenvalue is NaN or infinite.
        SingularError: on inversion, where an eigenvalue is zero beside the largest.
        NotPositiveDefiniteError: of a power, where an eigenvalue is negative.

    Cost: a product costs two with the basis; inverse, root, trace and log-determinant as many
    operations as there are eigenvalues; the diagonal a product with the squares of a basis of
    matrices or Kronecker factors.

    Source: George et al., "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis" (2018), for Kronecker bases.

    Example:
        >>> import torch
        >>> from woodbury import Dense
        >>> from woodbury.operators import Eigendecomposed
        >>> values, vectors = torch.linalg.eigh(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> A = Eigendecomposed(Dense(vectors, tags={"unitary"}), values)
        >>> A.sqrt() @ (A.sqrt() @ torch.tensor([1.0, 0.0]))
        tensor([2.0000, 1.0000])
        >>> A.logdet()
        tensor(1.0986)
    """

    _made_of = ("basis", "values")

    def __init__(self, basis: LinearOperator, values: Tensor) -> None:
        if "unitary" not in basis.tags:
            raise TagError(
                f"the basis {type(basis).__name__} has tags {sorted(basis.tags)}; it must be "
                "tagged unitary"
            )
        if values.shape != (basis.shape[1],):
            raise ShapeError(
                f"there are eigenvalues of shape {tuple(values.shape)} for a basis of "
                f"{basis.shape[1]} vectors"
            )
        finite = torch.isfinite(values.detach())
        if not bool(finite.all()):
            index = int((~finite).nonzero()[0])
            raise NonFiniteError(f"eigenvalue {index} is {values[index].item()}")
        lowest = float(values.detach().min()) if len(values) else 1.0
        tag = "hermitian"
        if lowest >= 0:
            tag = "positive_definite" if lowest > 0 else "positive_semidefinite"
        super().__init__(
            basis.shape,
            dtype=basis.dtype,
            device=basis.device,
            tags={tag},
            space=basis.out_space,
        )
        self.basis = basis
        self.values = values.to(real_dtype(basis.dtype))

    def _matmat(self, X: Tensor) -> Tensor:
        return self.basis._matmat(self.values.unsqueeze(1) * self.basis._rmatmat(X))

    def _diagonal(self) -> Tensor:
        squares = _squares(self.basis)
        if squares is None:
            return super()._diagonal()
        return squares._matvec(self.values).to(self.dtype)

    def _trace(self) -> Tensor:
        return self.values.sum().to(self.dtype)

    def _logdet(self) -> Tensor:
        self._require_invertible()
        return self.values.abs().log().sum()

    def _has_inverse(self) -> bool:
        return True

    def _inverse(self) -> LinearOperator:
        self._require_invertible()
        return Eigendecomposed(self.basis, self.values.reciprocal())

    def _require_invertible(self) -> None:
        sizes = self.values.detach().abs()
        if not len(sizes):
            return
        smallest, largest = float(sizes.min()), float(sizes.max())
        if not smallest > torch.finfo(sizes.dtype).eps * largest:
            raise SingularError(
                f"the eigenvalues run from {smallest:.3g} to {largest:.3g} in absolute value, so "
                f"the operator is singular to working precision ({sizes.dtype}); add a larger "
                "multiple of the identity"
            )

    def power(self, exponent: float) -> Eigendecomposed:
        r"""$Q \operatorname{diag}(\lambda^e) Q^H$ of a positive (semi)definite matrix.

        Raises:
            NotPositiveDefiniteError: an eigenvalue is negative.
            SingularError: the exponent is negative and an eigenvalue is zero.
        """
        if len(self.values) and bool((self.values < 0).any()):
            raise NotPositiveDefiniteError(
                f"the smallest eigenvalue is {float(self.values.min()):.3g}; powers need "
                "eigenvalues that are not negative"
            )
        if exponent < 0:
            self._require_invertible()
        return Eigendecomposed(self.basis, self.values**exponent)

    def sqrt(self) -> Eigendecomposed:
        """The positive square root."""
        return self.power(0.5)

    def _adjoint(self) -> LinearOperator:
        return self

    def _transpose(self) -> LinearOperator | None:
        return self if not self.dtype.is_complex else None

    def _scale(self, factor: complex | Tensor) -> LinearOperator | None:
        is_complex = factor.dtype.is_complex if isinstance(factor, Tensor) else factor.imag != 0
        if is_complex:
            return None
        real = factor if isinstance(factor, Tensor) else factor.real
        return Eigendecomposed(self.basis, real * self.values)

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        shift = multiple_of_identity(other)
        if isinstance(other, Eigendecomposed) and other.basis is self.basis:
            return Eigendecomposed(self.basis, self.values + other.values)
        if shift is None or (isinstance(shift, complex) and shift.imag != 0):
            return None
        if isinstance(shift, Tensor) and shift.dtype.is_complex:
            return None
        real = shift if isinstance(shift, Tensor) else shift.real
        return Eigendecomposed(self.basis, self.values + real)


def _squares(basis: LinearOperator) -> LinearOperator | None:
    """The matrix of squared absolute values, where the structure gives it."""
    square: Callable[[Tensor], Tensor] = lambda Q: Q.abs().square()  # noqa: E731
    if isinstance(basis, Identity):
        return Identity(basis.shape[0], dtype=real_dtype(basis.dtype), device=basis.device)
    if isinstance(basis, Dense):
        return Dense(square(basis.matrix))
    if isinstance(basis, Diagonal):
        return Diagonal(square(basis.values))
    if isinstance(basis, Kronecker):
        factors = [_squares(factor) for factor in basis.factors]
        known = [factor for factor in factors if factor is not None]
        return Kronecker(*known) if len(known) == len(factors) else None
    return None
