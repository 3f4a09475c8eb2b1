"""A kernel matrix, evaluated in blocks and never formed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from woodbury.errors import BudgetError, DeviceError, DtypeError, ShapeError, TagError
from woodbury.operators.base import LinearOperator
from woodbury.operators.dtypes import is_batched
from woodbury.operators.parts import same_substitution, transforms_active
from woodbury.spaces import Space

__all__ = ["Kernel"]

# Tensors above 32 MiB are handed back to the system when freed. Smaller ones fragment the heap of
# glibc before 2.38: with gradients recorded, to more than twice the whole matrix (measured).
_BLOCK_BYTES = 64 * 2**20
# Without gradients a block on the CPU is no larger than what the caches hold between evaluating it
# and multiplying: at 64 MiB every pass over it went to main memory, six times slower (measured).
_CACHED_BYTES = 4 * 2**20
# Rows and columns of a block are not cut below this, where products would become thin.
_SMALLEST_SIDE = 128
# Rows of the blocks whose diagonals make up the diagonal, and of the check on construction.
_DIAGONAL_SIDE = 32
_CHECK_ROWS = 8


class Kernel(LinearOperator):
    r"""$K_{ij} = k(x_i, z_j)$ for a kernel function $k$.

    The matrix is evaluated block by block inside a product and forgotten, also in the backward
    pass, which evaluates each block again: gradients flow to ``x``, ``z`` and whatever parameters
    the kernel function closes over, and the memory stays that of one block.

    Args:
        x: ``m`` points, ``[m, ...]``.
        z: ``n`` points, ``[n, ...]``; ``x`` if not given, and then the operator is symmetric.
        kernel: maps points ``[b, ...]`` and ``[c, ...]`` to ``[b, c]`` in the dtype of ``x``. A
            method ``kernel.diagonal(x, z) -> [b]``, if it has one, gives ``k(x_i, z_i)``, and
            ``kernel.write(x, z, out)`` writes into ``out`` ``[b, c]`` instead of a new tensor, for
            products without gradients.
        block_bytes: memory of one evaluated block. The kernel function's own temporaries come on
            top: one or two more blocks for a typical one, about seven where gradients are recorded.
            Below 32 MiB some systems do not reuse freed memory well, so that less saves nothing.
        tags: further tags, for example ``"positive_semidefinite"``; taken on trust.
        space: :class:`~woodbury.Space` of the vectors ``v`` in ``K @ v``.

    Raises:
        ShapeError: ``kernel`` returns another shape than ``[b, c]``.
        DtypeError: ``kernel`` returns another dtype, or ``x`` and ``z`` differ in dtype.
        DeviceError: ``x`` and ``z`` are on different devices.
        TagError: ``z`` is not given and ``kernel`` is not symmetric on the first points.
        BudgetError: ``block_bytes`` does not hold one entry.

    Cost: a product evaluates all ``m n`` entries once, or half of them where ``z`` is not given and
    no gradient recorded, and takes ``m n k`` multiplications; backward evaluates them once more. A
    block of right-hand sides is therefore much cheaper than its columns one by one. Without
    gradients blocks are no larger than 4 MiB on the CPU, which its caches hold.

    Example:
        >>> import torch
        >>> from woodbury import Kernel
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> K = Kernel(x, kernel=lambda a, b: torch.exp(-torch.cdist(a, b) ** 2))
        >>> K @ torch.ones(3)
        tensor([1.3862, 1.7358, 1.3862])
    """

    def __init__(
        self,
        x: Tensor,
        z: Tensor | None = None,
        *,
        kernel: Callable[[Tensor, Tensor], Tensor],
        block_bytes: int = _BLOCK_BYTES,
        tags: Iterable[str] = (),
        space: Space | None = None,
    ) -> None:
        other = x if z is None else z
        _require_fit(x, other)
        given = {tags} if isinstance(tags, str) else set(tags)
        if z is None:
            given.add("symmetric")
        super().__init__(
            (x.shape[0], other.shape[0]), dtype=x.dtype, device=x.device, tags=given, space=space
        )
        if block_bytes < x.element_size():
            raise BudgetError(
                f"block_bytes is {block_bytes}; one entry takes {x.element_size()} bytes"
            )
        self.x = x
        self.z = other
        self.kernel = kernel
        self.block_bytes = int(block_bytes)
        self._verify()

    def _verify(self) -> None:
        """Evaluate a few entries, so that a wrong kernel function is refused here."""
        with torch.no_grad():
            corner = self._evaluate(self.x[:_CHECK_ROWS], self.z[:_CHECK_ROWS])
        if self.z is not self.x or corner.numel() == 0 or is_batched(corner):
            return
        gap = float((corner - corner.mT).abs().max())
        rounding = torch.finfo(self.dtype).eps ** 0.5 * float(corner.abs().max())
        if gap > rounding:
            raise TagError(
                "z is not given, so the kernel has to be symmetric, but k(x, y) and k(y, x) differ "
                f"by {gap:.3g}; pass z=x.clone() for a kernel that is not symmetric"
            )

    def _evaluate(self, x: Tensor, z: Tensor) -> Tensor:
        block: object = self.kernel(x, z)
        expected = (x.shape[0], z.shape[0])
        if not isinstance(block, Tensor) or block.shape != expected:
            shape = tuple(block.shape) if isinstance(block, Tensor) else type(block).__name__
            raise ShapeError(f"kernel returned {shape} for {expected} points, expected {expected}")
        if block.dtype != self.dtype:
            raise DtypeError(f"kernel returned {block.dtype}, the points are {self.dtype}")
        return block

    def _entries(self) -> int:
        """How many entries a block may have."""
        size = self.block_bytes
        if self.device.type == "cpu" and not torch.is_grad_enabled():
            size = min(size, _CACHED_BYTES)
        return max(1, size // self.x.element_size())

    def _sides(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of a block inside the budget: whole rows where they fit."""
        entries = self._entries()
        width = min(columns, max(entries // _SMALLEST_SIDE, min(entries, _SMALLEST_SIDE)))
        return max(1, min(rows, entries // max(width, 1))), max(width, 1)

    def _matmat(self, X: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not self._records(X):
            with torch.no_grad():
                return self._matmat(X)
        if self._is_mirrored():
            return self._by_triangle(X)
        evaluate = self._evaluation()
        return self._in_blocks(self.x, self.z, X, lambda x, z, V: evaluate(x, z) @ V)

    def _records(self, X: Tensor) -> bool:
        """Whether a product has a gradient; what the kernel closes over, one entry shows."""
        if transforms_active() or any(T.requires_grad for T in (X, self.x, self.z)):
            return True
        return 0 in self.shape or self._evaluate(self.x[:1], self.z[:1]).requires_grad

    def _is_mirrored(self) -> bool:
        """Whether a product may take an evaluated entry for the one across the diagonal, too."""
        plain = not torch.is_grad_enabled() and not transforms_active()
        # Sums of many small products would lose digits in half precision.
        return plain and self.z is self.x and self.dtype.itemsize > 2

    def _by_triangle(self, X: Tensor) -> Tensor:
        """Half of the entries are evaluated, and each multiplied where it stands and mirrored."""
        n = self.shape[0]
        V = X.squeeze(1) if X.shape[1] == 1 else X
        Y = torch.zeros_like(V)
        add = torch.Tensor.addmv_ if V.dim() == 1 else torch.Tensor.addmm_
        evaluate = self._evaluation()
        start = 0
        while start < n:
            height, width = self._sides(n - start, n - start)
            stop = start + height
            for left in range(start, n, width):
                right = min(left + width, n)
                block = evaluate(self.x[start:stop], self.x[left:right])
                add(Y[start:stop], block, V[left:right])
                if right > stop:
                    beyond = max(stop, left)
                    add(Y[beyond:right], block[:, beyond - left :].mT, V[start:stop])
            start = stop
        return Y.view_as(X)

    def _evaluation(self) -> Callable[[Tensor, Tensor], Tensor]:
        """How blocks are evaluated: where nothing is recorded, one after the other in one buffer.

        Memory fresh from the system takes as long to touch as the kernel to evaluate.
        """
        write = getattr(self.kernel, "write", None)
        if write is None or torch.is_grad_enabled() or transforms_active():
            return self._evaluate
        buffer = self.x.new_empty(min(self._entries(), self.shape[0] * self.shape[1]))

        def evaluate(x: Tensor, z: Tensor) -> Tensor:
            out = buffer[: x.shape[0] * z.shape[0]].view(x.shape[0], z.shape[0])
            write(x, z, out)
            return out

        return evaluate

    def _rmatmat(self, Y: Tensor) -> Tensor:
        if "hermitian" in self.tags:
            return self._matmat(Y)
        if torch.is_grad_enabled() and not self._records(Y):
            with torch.no_grad():
                return self._rmatmat(Y)
        evaluate = self._evaluation()
        return self._in_blocks(self.z, self.x, Y, lambda z, x, V: evaluate(x, z).mH @ V)

    def _in_blocks(
        self,
        outer: Tensor,
        inner: Tensor,
        V: Tensor,
        times: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Blocks of rows of the result, each a sum over blocks of columns."""
        height, width = self._sides(outer.shape[0], inner.shape[0])
        inner_parts = list(zip(inner.split(width), V.split(width), strict=True))
        rows = [self._row(part, inner_parts, times) for part in outer.split(height)]
        return torch.cat(rows)

    def _row(
        self,
        outer: Tensor,
        inner_parts: list[tuple[Tensor, Tensor]],
        times: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        result: Tensor | None = None
        for points, vectors in inner_parts:
            if torch.is_grad_enabled() and not transforms_active():
                # Nothing of the block is saved: backward evaluates it again.
                part = checkpoint(
                    times,
                    outer,
                    points,
                    vectors,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=partial(_contexts, same_substitution()),
                )
            else:
                part = times(outer, points, vectors)
            result = part if result is None else result + part
        assert result is not None  # splitting gives at least one part
        return result

    def _to_dense(self) -> Tensor:
        return self._evaluated_columns(self.z)

    def _columns(self, index: Tensor) -> Tensor:
        return self._evaluated_columns(self.z[index])

    def _evaluated_columns(self, points: Tensor) -> Tensor:
        height, _ = self._sides(self.x.shape[0], points.shape[0])
        return torch.cat([self._evaluate(part, points) for part in self.x.split(height)])

    def _diagonal(self) -> Tensor:
        hook = getattr(self.kernel, "diagonal", None)
        if hook is not None:
            diagonal = hook(self.x, self.z)
            if not isinstance(diagonal, Tensor) or diagonal.shape != (self.shape[0],):
                shape = tuple(diagonal.shape) if isinstance(diagonal, Tensor) else type(diagonal)
                raise ShapeError(f"kernel.diagonal returned {shape}, expected ({self.shape[0]},)")
            return diagonal
        return torch.cat([torch.diagonal(block) for block in self._diagonal_blocks()])

    def _diagonal_blocks(self) -> Iterator[Tensor]:
        parts = zip(self.x.split(_DIAGONAL_SIDE), self.z.split(_DIAGONAL_SIDE), strict=True)
        for x, z in parts:
            yield self._evaluate(x, z)


def _contexts(
    again: AbstractContextManager[object],
) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """What a block is evaluated in the first time, and again in the backward pass."""
    return nullcontext(), again


def _require_fit(x: Tensor, z: Tensor) -> None:
    for name, points in (("x", x), ("z", z)):
        if points.dim() == 0:
            raise ShapeError(f"{name} is a scalar; expected points [m, ...]")
    if x.shape[1:] != z.shape[1:]:
        raise ShapeError(f"x has points of shape {tuple(x.shape[1:])}, z of {tuple(z.shape[1:])}")
    if x.dtype != z.dtype:
        raise DtypeError(f"x is {x.dtype}, z is {z.dtype}; make them of one dtype")
    if x.device != z.device:
        raise DeviceError(f"x is on {x.device}, z on {z.device}; move them to one device")
