"""The randomised range finder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.decompositions.lanczos import draw
from woodbury.decompositions.orthonormal import orthonormalize
from woodbury.errors import ArgumentError, NonFiniteError, RankError

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator
    from woodbury.spaces import Space

__all__ = ["RangeBasis", "range_finder", "require_rank"]

# Probes of the error; it is below the estimate but with probability 10^-_PROBES.
_PROBES = 10


@dataclass(frozen=True, eq=False)
class RangeBasis:
    r"""An orthonormal $Q$ with $A \approx Q Q^H A$.

    Attributes:
        basis: $Q$, ``[m, r]``; ``r`` is at most the rank asked for, less where ``A`` has no more.
        error: a bound on $\|A - QQ^H A\|$ that fails with probability at most $10^{-10}$; ``None``
            where no tolerance was given.
        products: columns that ``A`` or its adjoint was multiplied by.

    Example:
        >>> import torch
        >>> from woodbury import LowRank
        >>> from woodbury.decompositions import range_finder
        >>> A = LowRank(torch.eye(6, 2), V=torch.ones(4, 2))
        >>> range_finder(A, 3).basis.shape  # A has rank 1
        torch.Size([6, 1])
    """

    basis: Tensor
    error: float | None
    products: int


def range_finder(
    A: LinearOperator,
    rank: int,
    *,
    power: int = 0,
    tolerance: float | None = None,
    max_rank: int | None = None,
    generator: torch.Generator | None = None,
) -> RangeBasis:
    r"""$Q$ = an orthonormal basis of $(A A^H)^q A\,\Omega$ with Gaussian $\Omega$.

    Between products with ``A`` and its adjoint the block is orthonormalised, so that small singular
    values are not lost. With a ``tolerance``, blocks of ``rank`` columns are added until the error
    is within it: $\|A - QQ^H A\| \le 10\sqrt{2/\pi}\,\max_i \|(I - QQ^H) A\,\omega_i\|$ for ten
    Gaussian $\omega_i$, but with probability $10^{-10}$.

    Args:
        A: operator ``[m, n]``.
        rank: columns of $\Omega$, 1 to ``min(m, n)``; of one block, where there is a tolerance.
        power: $q$, power iterations. Each brings the basis closer to the leading left singular
            vectors where singular values decay slowly.
        tolerance: target of $\|A - QQ^H A\|$, absolute, in the unit of ``A``.
        max_rank: where to stop at the latest; ``min(m, n)`` by default.
        generator: draws $\Omega$; the same one every time if not given.

    Returns:
        A :class:`RangeBasis`.

    Raises:
        RankError: ``rank`` is not between 1 and ``min(m, n)``, or ``max_rank`` is less than it.
        ArgumentError: ``power`` or ``tolerance`` is negative.
        NonFiniteError: a product is NaN or infinite.

    Cost: ``(2 q + 1) rank`` products and $O((m + n) r^2)$ multiplications; ten products more with
    a tolerance. Memory of three blocks.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness" (2011), algorithms 4.2
    and 4.4, equation 4.3.

    Example:
        >>> import torch
        >>> from woodbury import Dense
        >>> from woodbury.decompositions import range_finder
        >>> A = Dense(torch.outer(torch.arange(4.0), torch.ones(3)))
        >>> Q = range_finder(A, 2).basis
        >>> torch.allclose(Q @ (Q.T @ A.to_dense()), A.to_dense(), atol=1e-6)
        True
    """
    short = min(A.shape)
    require_rank(rank, A)
    if power < 0:
        raise ArgumentError(f"power is {power}; it must be at least 0")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ArgumentError(f"tolerance is {tolerance}; it must be a number >= 0")
    if max_rank is not None and max_rank < rank:
        raise RankError(f"max_rank is {max_rank}, below the rank {rank} of one block")
    limit = short if max_rank is None else min(max_rank, short)
    finder = _Finder(A, power, generator)
    finder.grow(rank)
    if tolerance is None:
        return RangeBasis(finder.basis, None, finder.products)
    probes = finder.forward(finder.draw(_PROBES))
    while True:
        seen = finder.outside(probes)
        error = 10 * math.sqrt(2 / math.pi) * max(_norms(seen, A.out_space))
        size = finder.basis.shape[1]
        if error <= tolerance or size >= limit or not finder.grow(min(rank, limit - size)):
            return RangeBasis(finder.basis, error, finder.products)


def require_rank(rank: int, A: LinearOperator) -> None:
    """Raise unless an approximation of ``A`` may have this rank."""
    if not 1 <= rank <= min(A.shape):
        raise RankError(
            f"rank is {rank}, the operator has shape {A.shape}: the rank must be 1 to "
            f"{min(A.shape)}"
        )


class _Finder:
    """A basis that grows."""

    def __init__(self, A: LinearOperator, power: int, generator: torch.Generator | None) -> None:
        if generator is None:
            generator = torch.Generator(A.device).manual_seed(0)
        self.A, self.power, self.generator = A, power, generator
        work = torch.float32 if A.dtype.itemsize == 2 else A.dtype
        self.basis = torch.empty(A.shape[0], 0, dtype=work, device=A.device)
        self.products = 0
        self.largest = 0.0  # norm of a product with a normalised block, for what rounding is

    def draw(self, columns: int) -> Tensor:
        return draw(self.A.shape[1], columns, self.A, self.generator)

    def forward(self, X: Tensor) -> Tensor:
        self.products += X.shape[1]
        return (self.A @ X.to(self.A.dtype)).to(X.dtype)

    def backward(self, Y: Tensor) -> Tensor:
        self.products += Y.shape[1]
        return self.A.rmatmat(Y.to(self.A.dtype)).to(Y.dtype)

    def outside(self, Y: Tensor) -> Tensor:
        """What of ``Y`` the basis does not span."""
        for _ in range(2):
            Y = Y - self.basis @ self.A.out_space.gram(self.basis, Y)
        return Y

    def grow(self, columns: int) -> bool:
        """Add up to so many directions; whether there were any left."""
        A = self.A
        X, _ = orthonormalize(self.draw(columns), A.space)
        Y = self.forward(X)
        self.largest = max(self.largest, *_norms(Y, A.out_space))
        if not math.isfinite(self.largest):
            raise NonFiniteError(f"a product with {type(A).__name__} holds NaN or infinity")
        # Half-precision products are summed in single precision and rounded once.
        eps = max(10 * torch.finfo(Y.dtype).eps, torch.finfo(A.dtype).eps)
        floor = eps * self.largest
        Y = self._directions(Y, floor)
        for _ in range(self.power):
            X, _ = orthonormalize(self.backward(Y), A.space)
            Y = self._directions(self.forward(X), floor)
        self.basis = torch.cat([self.basis, Y], dim=1) if self.basis.shape[1] else Y
        return Y.shape[1] > 0

    def _directions(self, Y: Tensor, floor: float) -> Tensor:
        """Orthonormal directions of ``Y`` that are new, without those that are rounding."""
        for least in (floor, 0.5) if self.basis.shape[1] else (floor,):
            Q, R = orthonormalize(self.outside(Y), self.A.out_space)
            if not bool(torch.isfinite(R).all()):
                raise NonFiniteError(
                    f"a product with {type(self.A).__name__} holds NaN or infinity"
                )
            wide = torch.complex128 if R.is_complex() else torch.float64
            U, sizes, _ = torch.linalg.svd(R.to(wide), full_matrices=False)
            Y = Q @ U[:, sizes > least].to(Q.dtype)
        return Y


def _norms(Y: Tensor, space: Space) -> list[float]:
    """Norms of the columns; 0 where there is none."""
    squares = space.inner(Y, Y)
    if squares.is_complex():
        squares = squares.real
    found: list[float] = squares.sqrt().tolist()
    return [*found, 0.0]
