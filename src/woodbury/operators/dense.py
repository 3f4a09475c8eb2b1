"""A matrix held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from woodbury.errors import DtypeError, ShapeError, TagError
from woodbury.operators.base import LinearOperator
from woodbury.operators.dtypes import is_batched
from woodbury.operators.factorization import Factorization, factorize
from woodbury.operators.tags import Tags, inverse_tags, transposed_tags
from woodbury.spaces import Space

__all__ = ["Dense", "DenseInverse", "verify_tags"]


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
    (``n^3 / 3``) where tagged positive definite, not at all where triangular or unitary, otherwise
    by LU (``2 n^3 / 3``); it keeps the factor and forms no inverse matrix.

    Example:
        >>> import torch
        >>> from woodbury import Dense
        >>> A = Dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), tags={"positive_definite"})
        >>> A.solve(torch.tensor([1.0, 2.0]))
        tensor([0.0909, 0.6364])
        >>> A.logdet()
        tensor(2.3979)
    """

    _made_of = ("matrix",)
    _forgets = ("_kept",)

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
            verify_tags(matrix.detach(), self.tags)

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

    def _logdet(self) -> Tensor | None:
        if "unitary" in self.tags:
            return super()._logdet()
        return self._factorization().logdet()

    def _inverse(self) -> LinearOperator:
        return self.H if "unitary" in self.tags else DenseInverse(self)

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


def verify_tags(matrix: Tensor, tags: Tags) -> None:
    """Raise :class:`TagError` where a tag is plainly not true of ``[..., n, n]``; see Dense."""
    if not tags or matrix.numel() == 0 or is_batched(matrix):
        return
    tolerance = torch.finfo(matrix.dtype).eps ** 0.75 * matrix.abs().max()
    for tag, difference in _DIFFERENCES.items():
        if tag not in tags or (tag == "hermitian" and not matrix.dtype.is_complex):
            continue  # of a real matrix hermitian is symmetric, which is in the tags too
        wrong = difference(matrix).abs()
        # A NaN contradicts nothing here: what factorises the matrix finds and names it.
        if bool((wrong > tolerance).any()):
            place = tuple((wrong > tolerance).nonzero()[0].tolist())
            raise TagError(
                f"tagged {tag}, but entry {place} contradicts it by {wrong[place].item():.3g} "
                f"where {tolerance.item():.3g} is rounding; drop the tag, or make it true first"
            )
    diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1)
    diagonal = diagonal.real if diagonal.dtype.is_complex else diagonal
    for tag, negative in (
        ("positive_definite", diagonal <= 0),
        ("positive_semidefinite", diagonal < -tolerance),
    ):
        if tag in tags and bool(negative.any()):
            place = tuple(negative.nonzero()[0].tolist())
            raise TagError(f"tagged {tag}, but diagonal entry {place} is {diagonal[place].item()}")


_DIFFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "lower_triangular": lambda matrix: torch.triu(matrix, 1),
    "upper_triangular": lambda matrix: torch.tril(matrix, -1),
    "symmetric": lambda matrix: matrix - matrix.mT,
    "hermitian": lambda matrix: matrix - matrix.mH,
}
