"""A block-diagonal matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from woodbury.errors import DtypeError, ShapeError, SingularError
from woodbury.operators.base import LinearOperator
from woodbury.operators.dense import Dense, verify_tags
from woodbury.operators.diagonal import Diagonal
from woodbury.operators.factorization import Factorization, factorize
from woodbury.operators.identity import Identity, multiple_of_identity, same_kind
from woodbury.operators.sum import total
from woodbury.operators.tags import inverse_tags, scaled_tags, sum_tags, transposed_tags
from woodbury.spaces import Space

__all__ = ["BlockDiagonal"]


class BlockDiagonal(LinearOperator):
    r"""$\operatorname{diag}(A_1, \dots, A_b)$.

    Tags that all blocks hold are kept. Sums and products of two of them with matching blocks, and
    sums with a diagonal, are again block diagonal.

    Args:
        blocks: matrices or operators, or one stack ``[b, m, n]`` of matrices of one size, which is
            multiplied, factorised and inverted in one batched call.
        tags: of every block. For a stack, verified as by :class:`~woodbury.Dense`; for a list of
            blocks taken on trust beside the blocks' own.
        space: :class:`~woodbury.Space` of the vectors ``x`` in ``A @ x``.

    Raises:
        ShapeError: no blocks, or a tensor that is not a matrix (a stack of them).
        TagError: a tag is not true of the stack.
        SingularError: on inversion, where a block is not square or is singular.

    Cost: a product costs one with each block. Inverse, trace, diagonal and log-determinant are
    those of the blocks.

    Example:
        >>> import torch
        >>> from woodbury import BlockDiagonal
        >>> A = BlockDiagonal([torch.tensor([[2.0]]), torch.tensor([[1.0, 1.0], [0.0, 4.0]])])
        >>> A @ torch.ones(3)
        tensor([2., 2., 4.])
        >>> A.solve(torch.tensor([2.0, 2.0, 4.0]))
        tensor([1., 1., 1.])
    """

    _made_of = ("stack", "_blocks")

    stack: Tensor | None = None
    _blocks: tuple[LinearOperator, ...] | None = None

    def __init__(
        self,
        blocks: Tensor | Sequence[Tensor | LinearOperator],
        *,
        tags: Iterable[str] = (),
        space: Space | None = None,
        out_space: Space | None = None,
    ) -> None:
        given = frozenset({tags} if isinstance(tags, str) else tags)
        if isinstance(blocks, Tensor):
            self._init_stack(blocks, given, space, out_space)
            verify_tags(blocks.detach(), self.tags)
            return
        operators = [Dense(b) if isinstance(b, Tensor) else b for b in blocks]
        if not operators:
            raise ShapeError("no blocks given: a block-diagonal matrix needs at least one")
        self._blocks = same_kind(operators)
        common = self.blocks[0].tags
        for block in self.blocks[1:]:
            common &= block.tags
        super().__init__(
            (sum(b.shape[0] for b in self.blocks), sum(b.shape[1] for b in self.blocks)),
            dtype=self.blocks[0].dtype,
            device=self.blocks[0].device,
            tags=common | given,
            space=space,
            out_space=out_space,
        )

    def _init_stack(
        self, stack: Tensor, tags: Iterable[str], space: Space | None, out_space: Space | None
    ) -> None:
        if stack.dim() != 3:
            raise ShapeError(f"the stack has shape {tuple(stack.shape)}, expected [b, m, n]")
        if stack.layout != torch.strided:
            raise DtypeError(f"the stack has layout {stack.layout}; convert it with .to_dense()")
        self.stack = stack
        count, rows, columns = stack.shape
        LinearOperator.__init__(
            self,
            (count * rows, count * columns),
            dtype=stack.dtype,
            device=stack.device,
            tags=tags,
            space=space,
            out_space=out_space,
        )

    @classmethod
    def _stacked(
        cls, stack: Tensor, tags: Iterable[str], space: Space | None, out_space: Space | None
    ) -> BlockDiagonal:
        """A stack whose tags follow from a rule: nothing is verified."""
        self = cls.__new__(cls)
        self._init_stack(stack, tags, space, out_space)
        return self

    @property
    def blocks(self) -> tuple[LinearOperator, ...]:
        """The blocks as operators; those of a stack are views."""
        if self._blocks is not None:
            return self._blocks
        assert self.stack is not None
        return tuple(Dense._derived(matrix, self.tags) for matrix in self.stack.unbind(0))

    @property
    def block_shapes(self) -> list[tuple[int, int]]:
        """``(m_i, n_i)`` of each block."""
        if self.stack is None:
            return [block.shape for block in self.blocks]
        return [(self.stack.shape[1], self.stack.shape[2])] * self.stack.shape[0]

    def _of(self, blocks: Sequence[LinearOperator], tags: Iterable[str] = ()) -> BlockDiagonal:
        return BlockDiagonal(blocks, tags=tags, space=self.space, out_space=self.out_space)

    def _matmat(self, X: Tensor) -> Tensor:
        if self.stack is not None:
            return _batched(self.stack, X)
        parts = X.split([columns for _, columns in self.block_shapes])
        return torch.cat([b._matmat(x) for b, x in zip(self.blocks, parts, strict=True)])

    def _rmatmat(self, Y: Tensor) -> Tensor:
        if self.stack is not None:
            return _batched(self.stack.mH, Y)
        parts = Y.split([rows for rows, _ in self.block_shapes])
        return torch.cat([b._rmatmat(y) for b, y in zip(self.blocks, parts, strict=True)])

    def _to_dense(self) -> Tensor:
        return torch.block_diag(*[block._to_dense() for block in self.blocks])

    def _squares(self) -> bool:
        return all(rows == columns for rows, columns in self.block_shapes)

    def _diagonal(self) -> Tensor:
        if not self._squares():
            return super()._diagonal()
        if self.stack is not None:
            return torch.diagonal(self.stack, dim1=1, dim2=2).reshape(-1)
        return torch.cat([block._diagonal() for block in self.blocks])

    def _trace(self) -> Tensor | None:
        if self.stack is not None or not self._squares():
            return None
        return total([block.trace() for block in self.blocks])

    def _logdet(self) -> Tensor | None:
        self._require_squares()
        if self.stack is not None:
            return factorize(self.stack, self.tags).logdet().sum()
        parts = [block._logdet() for block in self.blocks]
        known = [part for part in parts if part is not None]
        return total(known) if len(known) == len(parts) else None

    def _has_inverse(self) -> bool:
        return self.stack is not None or all(block.has_inverse for block in self.blocks)

    def _inverse(self) -> LinearOperator | None:
        self._require_squares()
        if self.stack is not None:
            return StackInverse(self, factorize(self.stack, self.tags))
        if not self._has_inverse():
            return None
        inverses = [block.inverse() for block in self.blocks]
        return BlockDiagonal(inverses, space=self.out_space, out_space=self.space)

    def _require_squares(self) -> None:
        for index, (rows, columns) in enumerate(self.block_shapes):
            if rows != columns:
                raise SingularError(
                    f"block {index} is {rows} x {columns}, so the whole has no inverse"
                )

    def _transpose(self) -> LinearOperator:
        tags = transposed_tags(self.tags)
        if self.stack is not None:
            return BlockDiagonal._stacked(self.stack.mT, tags, self.out_space, self.space)
        blocks = [block.T for block in self.blocks]
        return BlockDiagonal(blocks, tags=tags, space=self.out_space, out_space=self.space)

    def _adjoint(self) -> LinearOperator:
        tags = transposed_tags(self.tags)
        if self.stack is not None:
            return BlockDiagonal._stacked(self.stack.mH, tags, self.out_space, self.space)
        blocks = [block.H for block in self.blocks]
        return BlockDiagonal(blocks, tags=tags, space=self.out_space, out_space=self.space)

    def _scale(self, factor: complex | Tensor) -> LinearOperator:
        tags = scaled_tags(self.tags, factor)
        if self.stack is not None:
            return BlockDiagonal._stacked(factor * self.stack, tags, self.space, self.out_space)
        return self._of([factor * block for block in self.blocks], tags)

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, BlockDiagonal):
            return self._plus_blocks(other)
        if not self._squares():
            return None
        shift = multiple_of_identity(other)
        if shift is None and not isinstance(other, Diagonal):
            return None
        tags = sum_tags(self.tags, other.tags)
        if self.stack is not None:
            count, size, _ = self.stack.shape
            if shift is None:
                added = torch.diag_embed(other._diagonal().view(count, size))
            else:
                added = shift * torch.eye(size, dtype=self.dtype, device=self.device)
            stack = self.stack + added
            return BlockDiagonal._stacked(stack, tags, self.space, self.out_space)
        sizes = [rows for rows, _ in self.block_shapes]
        parts: list[LinearOperator]
        if shift is None:
            parts = [Diagonal(values) for values in other._diagonal().split(sizes)]
        else:
            parts = [shift * Identity(n, dtype=self.dtype, device=self.device) for n in sizes]
        return self._of([a + b for a, b in zip(self.blocks, parts, strict=True)], tags)

    def _plus_blocks(self, other: BlockDiagonal) -> BlockDiagonal | None:
        if self.block_shapes != other.block_shapes:
            return None
        tags = sum_tags(self.tags, other.tags)
        if self.stack is not None and other.stack is not None:
            stack = self.stack + other.stack
            return BlockDiagonal._stacked(stack, tags, self.space, self.out_space)
        return self._of([a + b for a, b in zip(self.blocks, other.blocks, strict=True)], tags)

    def _compose(self, other: LinearOperator) -> LinearOperator | None:
        if not isinstance(other, BlockDiagonal):
            return None
        if self.stack is not None and other.stack is not None:
            return None  # two batched products are faster than many small ones
        inner = [columns for _, columns in self.block_shapes]
        if inner != [rows for rows, _ in other.block_shapes]:
            return None
        blocks = [a @ b for a, b in zip(self.blocks, other.blocks, strict=True)]
        return BlockDiagonal(blocks, space=other.space, out_space=self.out_space)


class StackInverse(LinearOperator):
    """The inverse of a :class:`BlockDiagonal` stack, kept as its batched factorisation.

    Args:
        operator: the block-diagonal operator.
        factorization: of its stack.
    """

    def __init__(self, operator: BlockDiagonal, factorization: Factorization) -> None:
        super().__init__(
            operator.shape,
            dtype=operator.dtype,
            device=operator.device,
            tags=inverse_tags(operator.tags),
            space=operator.out_space,
            out_space=operator.space,
        )
        self.operator = operator
        self._factor = factorization

    def _matmat(self, X: Tensor) -> Tensor:
        return self._solve(X, adjoint=False)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self._solve(Y, adjoint=True)

    def _solve(self, X: Tensor, *, adjoint: bool) -> Tensor:
        blocks = X.reshape(*self._factor.factor.shape[:2], X.shape[1])
        return self._factor.solve(blocks, adjoint=adjoint).reshape(X.shape)

    def _logdet(self) -> Tensor:
        return -self._factor.logdet().sum()

    def _inverse(self) -> LinearOperator:
        return self.operator


def _batched(stack: Tensor, X: Tensor) -> Tensor:
    count, rows, columns = stack.shape
    return torch.bmm(stack, X.reshape(count, columns, X.shape[1])).reshape(count * rows, X.shape[1])
