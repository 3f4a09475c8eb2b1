"""A matrix held in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from woodbury.errors import DtypeError, ShapeError, TagError
from woodbury.operators.base import LinearOperator
from woodbury.operators.factorization import Factorization, factorize
from woodbury.operators.tags import inverse_tags, transposed_tags
from woodbury.spaces import Space

__all__ = ["Dense", "DenseInverse"]


class Dense(LinearOperator):
    r"""A matrix $A \in \mathbb{K}^{m \times n}$ held in memory.

    Tags that are equalities (``symmetric``, ``hermitian``, ``diagonal``, triangular) are verified
    when the operator is made, to ``eps ** 0.75`` of the largest entry: one pass over the matrix, as
    much as one product, once. Of definiteness the diagonal is looked at; the rest shows when the
    matrix is factorised. ``unitary`` is taken on trust.

    Args:
        matrix: ``[m, n]``; kept, not copied. Changing it in place afterwards is an error.
        tags: names from :data:`woodbury.operators.TAGS`.
        space: :class:`~woodbury.Space` of the vectors ``x`` in ``A @ x``.

    Raises:
        ShapeError: ``matrix`` is not two-dimensional.
        TagError: a tag is not true of the matrix.

    Cost: a product is one matrix product. The inverse is factorised once: by Cholesky
    (``n^3 / 3``) where tagged positive definite, not at all where triangular, otherwise by LU
    (``2 n^3 / 3``); it keeps the factor and forms no inverse matrix.

    Example:
        >>> import torch
        >>> from woodbury import Dense
        >>> A = Dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), tags={"positive_definite"})
        >>> A.solve(torch.tensor([1.0, 2.0]))
        tensor([0.0909, 0.6364])
        >>> A.logdet()
        tensor(2.3979)
    """

    def __init__(
        self, matrix: Tensor, *, tags: Iterable[str] = (), space: Space | None = None
    ) -> None:
        if not isinstance(matrix, Tensor):
            raise DtypeError(f"matrix is {type(matrix).__name__}; make it a tensor first")
        if matrix.dim() != 2:
            raise ShapeError(f"the matrix has shape {tuple(matrix.shape)}, expected [m, n]")
        if matrix.layout != torch.strided:
            raise DtypeError(f"the matrix has layout {matrix.layout}; use Sparse")
        super().__init__(
            (matrix.shape[0], matrix.shape[1]),
            dtype=matrix.dtype,
            device=matrix.device,
            tags=tags,
            space=space,
        )
        self.matrix = matrix
        self._kept: Factorization | None = None
        if self.tags:
            _verify_tags(matrix.detach(), self.tags)

    @classmethod
    def _derived(
        cls,
        matrix: Tensor,
        tags: Iterable[str] = (),
        space: Space | None = None,
        out_space: Space | None = None,
    ) -> Dense:
        """A matrix whose tags follow from a rule: nothing is verified."""
        self = cls.__new__(cls)
        LinearOperator.__init__(
            self,
            (matrix.shape[0], matrix.shape[1]),
            dtype=matrix.dtype,
            device=matrix.device,
            tags=tags,
            space=space,
            out_space=out_space,
        )
        self.matrix = matrix
        self._kept = None
        return self

    def _matmat(self, X: Tensor) -> Tensor:
        return self.matrix @ X

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self.matrix.mH @ Y

    def _to_dense(self) -> Tensor:
        return self.matrix

    def _columns(self, index: Tensor) -> Tensor:
        return self.matrix[:, index]

    def _diagonal(self) -> Tensor:
        return torch.diagonal(self.matrix).clone()

    def _trace(self) -> Tensor:
        return torch.diagonal(self.matrix).sum()

    def _logdet(self) -> Tensor:
        return self._factorization().logdet()

    def _inverse(self) -> LinearOperator:
        return DenseInverse(self)

    def _factorization(self) -> Factorization:
        """The factor, kept for the next call unless it belongs to an autograd graph."""
        if self._kept is not None:
            return self._kept
        factorization = factorize(self.matrix, self.tags)
        # A graph is freed by the first backward pass, and a factor made under no_grad has none:
        # kept for a matrix that takes gradients, either would be wrong the second time.
        if not self.matrix.requires_grad:
            self._kept = factorization
        return factorization

    def _transpose(self) -> LinearOperator:
        return self._flipped(self.matrix.mT)

    def _adjoint(self) -> LinearOperator:
        return self._flipped(self.matrix.mH)

    def _flipped(self, matrix: Tensor) -> Dense:
        return Dense._derived(matrix, transposed_tags(self.tags), self.out_space, self.space)


class DenseInverse(LinearOperator):
    """The inverse of a :class:`Dense` matrix, kept as its factorisation.

    Args:
        operator: the matrix to invert.

    Raises:
        NotPositiveDefiniteError: it is tagged positive definite and is not; the message names the
            leading minor that is not positive.
        SingularError: it is singular to working precision; the message gives the reciprocal
            condition estimate.
        NonFiniteError: it holds NaN or infinity.

    Cost: one factorisation when made; a product with ``k`` columns is ``2 n^2 k`` multiplications.
    """

    def __init__(self, operator: Dense) -> None:
        super().__init__(
            operator.shape,
            dtype=operator.dtype,
            device=operator.device,
            tags=inverse_tags(operator.tags),
            space=operator.out_space,
            out_space=operator.space,
        )
        self.operator = operator
        self._factor = operator._factorization()

    def _matmat(self, X: Tensor) -> Tensor:
        return self._factor.solve(X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self._factor.solve(Y, adjoint=True)

    def _logdet(self) -> Tensor:
        return -self._factor.logdet()

    def _inverse(self) -> LinearOperator:
        return self.operator


def _verify_tags(matrix: Tensor, tags: frozenset[str]) -> None:
    if matrix.numel() == 0:
        return
    largest = matrix.abs().max()
    tolerance = torch.finfo(matrix.dtype).eps ** 0.75 * largest
    for tag, difference in (
        ("symmetric", lambda: matrix - matrix.mT),
        ("hermitian", lambda: matrix - matrix.mH),
        ("lower_triangular", lambda: torch.triu(matrix, 1)),
        ("upper_triangular", lambda: torch.tril(matrix, -1)),
    ):
        if tag not in tags:
            continue
        wrong = difference().abs()
        # A NaN is no contradiction here: it is found, and named, by what factorises.
        if bool((wrong > tolerance).any()):
            row, column = divmod(
                int(torch.where(wrong > tolerance, wrong, 0).argmax()), len(matrix)
            )
            raise TagError(
                f"tagged {tag}, but entry ({row}, {column}) contradicts it by "
                f"{wrong[row, column].item():.3g} where {tolerance.item():.3g} is rounding; "
                "drop the tag, or make it true first, for example by (A + A.T) / 2"
            )
    diagonal = torch.diagonal(matrix).real if matrix.dtype.is_complex else torch.diagonal(matrix)
    for tag, wrong in (
        ("positive_definite", diagonal <= 0),
        ("positive_semidefinite", diagonal < -tolerance),
    ):
        if tag in tags and bool(wrong.any()):
            index = int(wrong.nonzero()[0])
            raise TagError(f"tagged {tag}, but diagonal entry {index} is {diagonal[index].item()}")
