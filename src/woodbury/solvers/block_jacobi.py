"""The block Jacobi method, and its diagonal blocks as a preconditioner."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, NotPositiveDefiniteError, ShapeError, SingularError
from woodbury.operators.base import LinearOperator
from woodbury.operators.dtypes import precise, working_dtype
from woodbury.operators.factorization import require_finite
from woodbury.operators.sparse import Sparse
from woodbury.solvers.jacobi import hook_products
from woodbury.solvers.stationary import Stationary

__all__ = ["BlockJacobi"]


@dataclass(frozen=True)
class BlockJacobi(Stationary):
    r"""$x \leftarrow x + D^{-1} (b - A x)$ with the diagonal blocks $D$ of $A$, inverted.

    Unknowns that are strongly coupled belong into one block: the displacements of a node, the
    weights of a layer. As ``CG(preconditioner=BlockJacobi(size=3))`` it is ``sweeps`` steps from
    zero; one is $D^{-1}$, positive definite where the blocks are. Where the iteration diverges its
    status says so.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 n``.
        sweeps: steps taken where it preconditions.
        size: of blocks of consecutive unknowns; the last may be smaller.
        blocks: or the unknowns of every block, as sequences of indices; together they hold each of
            ``0 .. n - 1`` once.

    Raises:
        ArgumentError: neither or both of ``size`` and ``blocks`` are given, or a limit makes no
            sense.
        ShapeError: ``blocks`` do not hold every unknown once.
        SingularError: a block is singular to working precision; the message names it.
        NotPositiveDefiniteError: the operator is tagged positive definite and a block is not.
        NonFiniteError: an entry of a block is NaN or infinite.

    Cost: the blocks are read where the operator is :class:`~woodbury.Sparse` or gives columns by
    its structure; elsewhere they cost ``n`` products, of which no more than a block of columns of
    64 MiB is kept. ``s^3`` multiplications and ``s^2`` numbers for a block of size ``s``; then
    $s$ multiplications per entry of a vector.

    Source: Saad, "Iterative methods for sparse linear systems" (2nd ed.), 4.1.1.

    Example:
        >>> import torch
        >>> from woodbury import BlockJacobi, CG, Dense, solve
        >>> pair = torch.tensor([[2.0, 1.9], [1.9, 2.0]])
        >>> A = Dense(torch.block_diag(pair, 5 * pair) + 0.01, tags={"positive_definite"})
        >>> solve(A, torch.ones(4), CG(preconditioner=BlockJacobi(size=2))).steps
        2
    """

    size: int | None = field(default=None, kw_only=True)
    blocks: Sequence[Sequence[int]] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.size is None) == (self.blocks is None):
            raise ArgumentError("give either size or blocks: what is to be inverted together")
        if self.size is not None and self.size < 1:
            raise ArgumentError(f"size is {self.size}; it must be at least 1")
        if self.blocks is not None:
            # As tuples the recipe can be compared and hashed like every other.
            blocks = tuple(tuple(int(i) for i in block) for block in self.blocks if len(block))
            object.__setattr__(self, "blocks", blocks)

    def _products(self, A: LinearOperator) -> int:
        return 0 if isinstance(A, Sparse) else hook_products(A, "_columns")

    def _correction(self, A: LinearOperator) -> LinearOperator:
        groups = self._groups(A.shape[0], A.device)
        stacks = _sparse_blocks(A, groups) if isinstance(A, Sparse) else _blocks(A, groups)
        inverses, definite = [], True
        for index, stack in zip(groups, stacks, strict=True):
            inverse, positive = _invert(stack, index, A)
            inverses.append(inverse.to(working_dtype(A.dtype)))
            definite = definite and positive
        tags = A.tags & {"hermitian"}
        return _BlockInverse(A, groups, inverses, {"positive_definite"} if definite else tags)

    def _groups(self, n: int, device: torch.device) -> list[Tensor]:
        """Indices of the blocks, those of one size together: ``[count, size]`` each."""
        if self.size is not None:
            size = min(self.size, n)
            whole = n - n % size
            index = torch.arange(n, device=device)
            groups = [index[:whole].view(-1, size)]
            return groups if whole == n else [*groups, index[whole:].view(1, -1)]
        assert self.blocks is not None  # checked when made
        every = torch.tensor([i for block in self.blocks for i in block], dtype=torch.int64)
        found = torch.zeros(n, dtype=torch.int64)
        inside = (every >= 0) & (every < n)
        found.index_add_(0, every[inside], torch.ones_like(every[inside]))
        if not bool(inside.all()) or bool((found != 1).any()):
            outside = every[~inside][:5].tolist()
            raise ShapeError(
                f"blocks must hold each of 0 .. {n - 1} once: {int((found == 0).sum())} are "
                f"missing, {int((found > 1).sum())} repeated, outside are {outside}"
            )
        sizes = sorted({len(block) for block in self.blocks})
        return [
            torch.tensor([block for block in self.blocks if len(block) == size], device=device)
            for size in sizes
        ]


class _BlockInverse(LinearOperator):
    """Inverted diagonal blocks, each size in one batched product."""

    def __init__(
        self,
        like: LinearOperator,
        groups: Sequence[Tensor],
        inverses: Sequence[Tensor],
        tags: Iterable[str],
    ) -> None:
        super().__init__(
            like.shape,
            dtype=like.dtype,
            device=like.device,
            tags=tags,
            space=like.out_space,
            out_space=like.space,
        )
        self.groups, self.inverses = tuple(groups), tuple(inverses)

    def _matmat(self, X: Tensor) -> Tensor:
        return self._multiply(X, self.inverses)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self._multiply(Y, [inverse.mH for inverse in self.inverses])

    def _multiply(self, X: Tensor, inverses: Sequence[Tensor]) -> Tensor:
        Y = torch.empty(X.shape, dtype=X.dtype, device=X.device)
        for index, inverse in zip(self.groups, inverses, strict=True):
            part = torch.bmm(inverse, X[index].to(inverse.dtype))
            Y = Y.index_copy(0, index.reshape(-1), part.reshape(-1, X.shape[1]).to(X.dtype))
        return Y


def _blocks(A: LinearOperator, groups: Sequence[Tensor]) -> list[Tensor]:
    """The diagonal blocks from columns, of which a limited number is in memory."""
    stacks = []
    for index in groups:
        count, size = index.shape
        at_once = max(1, A._block_width() // size)
        stack = torch.empty(count, size, size, dtype=A.dtype, device=A.device)
        for first in range(0, count, at_once):
            part = index[first : first + at_once]
            columns = A.columns(part.reshape(-1)).detach().view(A.shape[0], len(part), size)
            for i, rows in enumerate(part):
                stack[first + i] = columns[rows, i]
        stacks.append(stack)
    return stacks


def _sparse_blocks(A: Sparse, groups: Sequence[Tensor]) -> list[Tensor]:
    """The diagonal blocks from the stored entries: one pass over them for each size."""
    values, stacks = A.values.detach(), []
    for index in groups:
        count, size = index.shape
        block = torch.full((A.shape[0],), -1, dtype=torch.int64, device=A.device)
        place = torch.zeros_like(block)
        block[index.reshape(-1)] = torch.arange(count, device=A.device).repeat_interleave(size)
        place[index.reshape(-1)] = torch.arange(size, device=A.device).repeat(count)
        inside = (block[A.rows] == block[A.column_indices]) & (block[A.rows] >= 0)
        rows, columns = A.rows[inside], A.column_indices[inside]
        stack = torch.zeros(count, size, size, dtype=A.dtype, device=A.device)
        stack[block[rows], place[rows], place[columns]] = values[inside]
        stacks.append(stack)
    return stacks


def _invert(stack: Tensor, index: Tensor, A: LinearOperator) -> tuple[Tensor, bool]:
    """The inverses of a stack of blocks, and whether all are positive definite."""
    require_finite(stack, "the diagonal blocks")
    work = precise(stack)
    definite = False
    if "hermitian" in A.tags:
        factor, failed = torch.linalg.cholesky_ex(work)
        definite = not bool(failed.any())
        if not definite and "positive_definite" in A.tags:
            which = int(failed.nonzero()[0])
            raise NotPositiveDefiniteError(
                f"tagged positive definite, but the diagonal block {_name(index[which])} is not; "
                "drop the tag, or add a multiple of the identity"
            )
    if definite:
        inverse = torch.cholesky_inverse(factor)
    else:
        inverse, failed = torch.linalg.inv_ex(work)
        inverse = torch.where((failed == 0)[:, None, None], inverse, torch.inf)
    condition = _norm(work) * _norm(inverse)
    bad = ~(condition * torch.finfo(work.dtype).eps < 1)
    if bool(bad.any()):
        which = int(bad.nonzero()[0])
        raise SingularError(
            f"the diagonal block {_name(index[which])} is singular to working precision (condition "
            f"{condition[which].item():.1e}); add a multiple of the identity, or choose other "
            "blocks"
        )
    return inverse, definite


def _norm(stack: Tensor) -> Tensor:
    return stack.abs().sum(-2).amax(-1)


def _name(index: Tensor) -> str:
    rows = index.tolist()
    shown = ", ".join(map(str, rows[:6])) + (", ..." if len(rows) > 6 else "")
    return f"of rows {shown}"
