"""A matrix with one block for every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from woodbury.errors import StructureError
from woodbury.operators import BlockDiagonal, Eigendecomposed, LinearOperator, Permutation
from woodbury.operators.identity import Identity, multiple_of_identity

__all__ = ["LayerMatrix"]


class LayerMatrix(LinearOperator):
    r"""$P \operatorname{diag}(A_1, \dots, A_L) P^T$: a block $A_l$ for the parameters of layer $l$.

    The permutation $P$ takes blocks laid end to end to the flat vector of all parameters (a bias is
    the last column of its layer's block, but lies behind the weight in the flat vector). Inverse,
    square root, trace, log-determinant and diagonal are those of the blocks.

    Args:
        permutation: $P$, whose ``out_space`` is that of the parameters.
        blocks: the blocks by name, in the order of $P$.
        damping: what was added to each block, for the record.

    Attributes:
        blocks: the blocks by name.
        damping: the multiple of the identity that was added to each block, by name.

    Cost: a product costs one with each block and two copies of the vector.

    Example:
        >>> import torch
        >>> from woodbury import Dense
        >>> from woodbury.curvature import LayerMatrix
        >>> from woodbury.operators import Permutation
        >>> blocks = {"a": Dense(torch.tensor([[4.0]])), "b": Dense(2 * torch.eye(2))}
        >>> A = LayerMatrix(Permutation(torch.tensor([2, 0, 1])), blocks)
        >>> A.diagonal()
        tensor([2., 2., 4.])
    """

    _made_of = ("permutation", "block_diagonal")

    def __init__(
        self,
        permutation: Permutation,
        blocks: Mapping[str, LinearOperator],
        damping: Mapping[str, float] | None = None,
    ) -> None:
        self.permutation = permutation
        self.blocks = dict(blocks)
        self.block_diagonal = BlockDiagonal(list(self.blocks.values()))
        self.damping = dict.fromkeys(self.blocks, 0.0) if damping is None else dict(damping)
        kept = {"symmetric", "hermitian", "positive_semidefinite", "positive_definite"}
        super().__init__(
            permutation.shape,
            dtype=self.block_diagonal.dtype,
            device=self.block_diagonal.device,
            tags=self.block_diagonal.tags & kept,
            space=permutation.out_space,
        )

    def _each(
        self,
        function: Callable[[LinearOperator], LinearOperator],
        damping: Mapping[str, float] | None = None,
    ) -> LayerMatrix:
        """The matrix of functions of the blocks."""
        blocks = {name: function(block) for name, block in self.blocks.items()}
        return LayerMatrix(self.permutation, blocks, damping or self.damping)

    def _matmat(self, X: Tensor) -> Tensor:
        inner = self.block_diagonal._matmat(self.permutation._rmatmat(X))
        return self.permutation._matmat(inner)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        inner = self.block_diagonal._rmatmat(self.permutation._rmatmat(Y))
        return self.permutation._matmat(inner)

    def _diagonal(self) -> Tensor:
        return self.permutation._matvec(self.block_diagonal._diagonal())

    def _trace(self) -> Tensor | None:
        return self.block_diagonal.trace()

    def _logdet(self) -> Tensor | None:
        return self.block_diagonal._logdet()

    def _has_inverse(self) -> bool:
        return self.block_diagonal.has_inverse

    def _inverse(self) -> LinearOperator | None:
        if not self._has_inverse():
            return None
        return self._each(lambda block: block.inverse())

    def _adjoint(self) -> LinearOperator:
        return self if "hermitian" in self.tags else self._each(lambda block: block.H)

    def _transpose(self) -> LinearOperator:
        return self if "symmetric" in self.tags else self._each(lambda block: block.T)

    def _scale(self, factor: complex | Tensor) -> LinearOperator:
        return self._each(lambda block: factor * block)

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        shift = multiple_of_identity(other)
        if shift is None:
            return None
        added = float(torch.as_tensor(shift).detach().real)
        return self._each(
            lambda block: block + shift * Identity(block.shape[0]).like(block),
            {name: damping + added for name, damping in self.damping.items()},
        )

    def power(self, exponent: float) -> LayerMatrix:
        """The power of every block; all of them must be given by eigenvectors and eigenvalues.

        Raises:
            StructureError: a block is of another kind.
            NotPositiveDefiniteError: an eigenvalue is negative.
            SingularError: the exponent is negative and an eigenvalue is zero.
        """

        def raised(block: LinearOperator) -> LinearOperator:
            if not isinstance(block, Eigendecomposed):
                raise StructureError(
                    f"a block is a {type(block).__name__}, whose powers have no structural form"
                )
            return block.power(exponent)

        return self._each(raised)

    def sqrt(self) -> LayerMatrix:
        """The positive square root of every block; see :meth:`power`."""
        return self.power(0.5)
