"""The sketches that Nystrom approximations are made of, which can be widened."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.decompositions.lanczos import draw
from woodbury.decompositions.orthonormal import orthonormalize
from woodbury.errors import NonFiniteError

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["ColumnSketch", "NystromSketch", "RandomSketch"]


class NystromSketch:
    r"""$Y = A\Omega$ and the core $\Omega^H A\,\Omega$, for an $\Omega$ that grows by columns."""

    def __init__(self, A: LinearOperator, chunk: int, generator: torch.Generator | None) -> None:
        if generator is None:  # one for all growths, or they would draw the same numbers
            generator = torch.Generator(A.device).manual_seed(0)
        self.A, self.chunk, self.generator = A, chunk, generator
        self.work = torch.float32 if A.dtype.itemsize == 2 else A.dtype
        self.Y = torch.empty(A.shape[0], 0, dtype=self.work, device=A.device)
        self.products = 0

    def grow(self, columns: int) -> None:
        """Multiply ``A`` by more columns."""
        raise NotImplementedError

    def parts(self) -> tuple[Tensor, Tensor, float]:
        """``Y``, the core, and the size of rounding, which the Gaussian sketch adds as a shift."""
        raise NotImplementedError

    def forget(self) -> None:
        """Let go of the blocks, which cannot grow any more."""
        self.Y = self.Y[:, :0].clone()

    def _append(self, name: str, block: Tensor) -> None:
        old = getattr(self, name)
        setattr(self, name, torch.cat([old, block], dim=1) if old.shape[1] else block)

    def _rounding(self) -> float:
        """How large the rounding errors in the products may be."""
        found = torch.finfo(self.A.dtype).eps * _size(self.Y, self.A)
        if not math.isfinite(found):
            raise NonFiniteError(f"a product with {type(self.A).__name__} holds NaN or infinity")
        return found


class ColumnSketch(NystromSketch):
    r"""$\Omega$ picks columns uniformly without replacement."""

    def __init__(self, A: LinearOperator, chunk: int, generator: torch.Generator | None) -> None:
        super().__init__(A, chunk, generator)
        self.order = torch.randperm(A.shape[0], device=A.device, generator=self.generator)

    def grow(self, columns: int) -> None:
        """Read or multiply more columns."""
        index = self.order[self.products : self.products + columns]
        parts = [self.A.columns(part).to(self.work) for part in index.split(self.chunk)]
        self._append("Y", torch.cat(parts, dim=1))
        self.products += len(index)

    def parts(self) -> tuple[Tensor, Tensor, float]:
        """The columns, and their rows of the same numbers."""
        return self.Y, self.Y[self.order[: self.products]], self._rounding()


class RandomSketch(NystromSketch):
    r"""$\Omega$ is an orthonormal basis of $[G, AG, \dots, A^{d-1}G]$ with Gaussian ``G``.

    ``depth`` is $d$: 1 gives the Gaussian sketch, more a block Krylov space. Everything is done for
    $A + \nu I$ with $\nu$ of the size of rounding.
    """

    def __init__(
        self, A: LinearOperator, chunk: int, generator: torch.Generator | None, depth: int
    ) -> None:
        super().__init__(A, chunk, generator)
        self.depth = depth
        self.omega = self.Y
        self.shift = 0.0  # what Y holds already

    def grow(self, columns: int) -> None:
        """Draw more columns, and multiply until their Krylov space has the depth."""
        n = self.A.shape[0]
        block = draw(n, min(columns, n - self.omega.shape[1]), self.A, self.generator)
        for level in range(self.depth):
            block = self._directions(block)
            if not block.shape[1]:
                return
            product = self._multiply(block)
            self._append("omega", block)
            self._append("Y", torch.add(product, block, alpha=self.shift))
            if level + 1 < self.depth:
                block = product[:, : n - self.omega.shape[1]]

    def parts(self) -> tuple[Tensor, Tensor, float]:
        """What belongs to the operator with the shift."""
        rounding = self._rounding()
        self.Y.add_(self.omega, alpha=rounding - self.shift)
        self.shift = rounding
        return self.Y, self.A.space.gram(self.omega, self.Y), rounding

    def forget(self) -> None:
        """Let go of both blocks."""
        super().forget()
        self.omega = self.Y

    def _multiply(self, block: Tensor) -> Tensor:
        product = torch.empty_like(block)
        for start in range(0, block.shape[1], self.chunk):
            part = slice(start, start + self.chunk)
            product[:, part] = self.A @ block[:, part].contiguous().to(self.A.dtype)
        self.products += block.shape[1]
        return product

    def _directions(self, block: Tensor) -> Tensor:
        """An orthonormal basis of what a block adds to the space; less where it adds less."""
        space, old = self.A.space, self.omega
        if not old.shape[1]:
            return orthonormalize(block, space)[0]
        # Below this there is nothing but the rounding of the products; then, of the first pass.
        for floor in (10 * torch.finfo(self.A.dtype).eps * _size(block, self.A), 0.5):
            block = block - old @ space.gram(old, block)
            Q, R = orthonormalize(block, space)
            wide = torch.complex128 if R.is_complex() else torch.float64
            U, sizes, _ = torch.linalg.svd(_finite(R, self.A).to(wide), full_matrices=False)
            block = Q @ U[:, sizes > floor].to(Q.dtype)
        return block


def _size(block: Tensor, A: LinearOperator) -> float:
    """The Frobenius norm."""
    squares = A.space.inner(block, block)
    total = squares.real if squares.is_complex() else squares
    return float(total.sum().sqrt())


def _finite(R: Tensor, A: LinearOperator) -> Tensor:
    if not bool(torch.isfinite(R).all()):
        raise NonFiniteError(f"a product with {type(A).__name__} holds NaN or infinity")
    return R
