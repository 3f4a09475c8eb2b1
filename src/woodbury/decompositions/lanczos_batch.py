"""Lanczos from many start vectors at once, one product a step for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, NonFiniteError, ShapeError, TagError
from woodbury.spaces import Space

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["LanczosBatch", "Reorthogonalization", "lanczos_batch"]

Reorthogonalization = Literal["full", "selective", "none"]

# Converged Ritz vectors are computed anew when there are others, and every so many steps.
_RENEW_EVERY = 10
# Steps from one call of ``until`` to the next.
_LOOK = 5


@dataclass(frozen=True, eq=False)
class LanczosBatch:
    r"""$A Q_j = Q_j T_j + \beta_j q_{j,m+1} e_m^H$ for $p$ start vectors.

    Where the Krylov space of a start vector is exhausted early, its $T_j$ is padded with decoupled
    copies of its first diagonal entry, so that its quadrature rule is unchanged.

    Attributes:
        diagonal: of the $T_j$, ``[p, m]``, float64 on the CPU.
        off_diagonal: of the $T_j$, ``[p, m - 1]``, float64 on the CPU.
        remainder: $\beta_j$, ``[p]``; 0 where the space is exhausted.
        sizes: steps taken for each start vector.
        norms: norms of the start vectors, ``[p]``, float64 on the CPU.
        bases: the $Q_j$, ``[p, n, m]``, zero beyond the sizes; ``None`` where they were not kept.
        products: columns that ``A`` was multiplied by.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.decompositions import lanczos_batch
        >>> A = Diagonal(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
        >>> nodes, weights = lanczos_batch(A, 3, torch.ones(3, 2).double()).quadrature()
        >>> nodes[0], weights[0]
        (tensor([1.0000, 2.0000, 4.0000], dtype=torch.float64),
         tensor([0.3333, 0.3333, 0.3333], dtype=torch.float64))
    """

    diagonal: Tensor
    off_diagonal: Tensor
    remainder: Tensor
    sizes: tuple[int, ...]
    norms: Tensor
    bases: Tensor | None
    products: int

    def quadrature(
        self, steps: int | None = None, *, radau: float | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Nodes and weights of Gauss rules: $v^H f(A) v / v^H v \approx \sum_i w_i f(\theta_i)$.

        Args:
            steps: of the shorter rule that so many steps would have given; default all.
            radau: a bound of the spectrum, to be a node of its own: the Gauss-Radau rule of one
                node more. Where a derivative of even order has one sign and that of odd order the
                other, as for the logarithm, the two rules enclose the truth if it is a bound from
                below.

        Returns:
            Nodes ``[p, m]`` (ascending) and weights ``[p, m]`` that sum to 1, float64 on the CPU.

        Raises:
            ArgumentError: ``radau`` is not outside the Ritz values.

        Source: Golub and Meurant, "Matrices, Moments and Quadrature" (2010), theorems 6.4 and 6.6.
        """
        m = self.diagonal.shape[1] if steps is None else min(steps, self.diagonal.shape[1])
        diagonal, off = self.diagonal[:, :m], self.off_diagonal[:, : m - 1]
        if radau is not None:
            shifted = tridiagonal(diagonal - radau, off)
            ends = torch.linalg.eigvalsh(shifted)
            low, high = float(ends.min()), float(ends.max())
            if not (low > 0 or high < 0):
                raise ArgumentError(
                    f"radau is {radau:.6g}, but there are eigenvalues from {low + radau:.6g} to "
                    f"{high + radau:.6g}; it must bound the spectrum"
                )
            beta = self.remainder if m == self.diagonal.shape[1] else self.off_diagonal[:, m - 1]
            last = torch.zeros(len(diagonal), m, 1, dtype=torch.float64)
            last[:, -1, 0] = beta.square()
            node = radau + torch.linalg.solve(shifted, last)[:, -1]
            diagonal, off = torch.cat([diagonal, node], 1), torch.cat([off, beta[:, None]], 1)
        values, vectors = torch.linalg.eigh(tridiagonal(diagonal, off))
        return values, vectors[:, 0, :].square()

    def without_bases(self) -> LanczosBatch:
        """The same without its large tensors."""
        return replace(self, bases=None)


def require_hermitian(A: LinearOperator, what: str) -> None:
    """Raise unless ``A`` is tagged hermitian.

    Raises:
        TagError: it is not; says what needs it.
    """
    if "hermitian" not in A.tags:
        raise TagError(
            f"{what} needs the tag 'hermitian', {type(A).__name__} has {sorted(A.tags)}; promise "
            "it where the operator is made if it holds"
        )


def tridiagonal(diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    """Dense symmetric tridiagonal matrices ``[..., m, m]``."""
    return (
        torch.diag_embed(diagonal)
        + torch.diag_embed(off_diagonal, 1)
        + torch.diag_embed(off_diagonal, -1)
    )


def lanczos_batch(
    A: LinearOperator,
    steps: int,
    starts: Tensor,
    *,
    reorthogonalize: Reorthogonalization = "full",
    progress: Callable[[int], object] | None = None,
    until: Callable[[LanczosBatch], bool] | None = None,
) -> LanczosBatch:
    r"""Tridiagonalise a hermitian operator on the Krylov spaces of the columns of a block.

    Every step is one product with all columns whose space is not exhausted yet. ``"full"``
    reorthogonalises against everything before, twice where much cancels; ``"selective"`` only
    against Ritz vectors that have converged to half the digits, which is all that rounding brings
    back; ``"none"`` keeps nothing: copies of converged eigenvalues appear, whose weights share that
    of the eigenvalue, so that quadrature stays right while eigenvalues must not be counted.

    Args:
        A: hermitian operator ``[n, n]``.
        steps: $m$; fewer are taken where all spaces are exhausted.
        starts: ``[n, p]``, no column zero.
        reorthogonalize: ``"full"``, ``"selective"`` or ``"none"``.
        progress: called with the number of steps done, after each.
        until: called with what there is after every fifth step; the recurrences end where it says
            so.

    Returns:
        A :class:`LanczosBatch`.

    Raises:
        TagError: ``A`` is not tagged hermitian.
        ArgumentError: ``steps`` is less than 1, a start is zero, or ``reorthogonalize`` is unknown.
        ShapeError: ``starts`` is not ``[n, p]`` with at least one column.
        NonFiniteError: a product is NaN or infinite.

    Cost: ``p m`` products in ``m`` blocks; memory of ``p (m + 3)`` vectors, ``4 p`` for ``"none"``;
    besides products $4 n p m^2$ multiplications for ``"full"``, $8 n p m$ times the number of
    converged Ritz vectors for ``"selective"``.

    Source: Golub and Van Loan, "Matrix Computations" (4th ed.), 10.3; Parlett and Scott, "The
    Lanczos algorithm with selective orthogonalization" (1979); for "none" Greenbaum, "Behavior of
    slightly perturbed Lanczos and conjugate-gradient recurrences" (1989).

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.decompositions import lanczos_batch
        >>> A = Diagonal(torch.linspace(0, 1, 50).double())
        >>> found = lanczos_batch(A, 8, torch.randn(50, 3).double())
        >>> found.bases.shape, found.products
        (torch.Size([3, 50, 8]), 24)
    """
    require_hermitian(A, "lanczos_batch")
    if steps < 1:
        raise ArgumentError(f"steps is {steps}; it must be at least 1")
    if reorthogonalize not in ("full", "selective", "none"):
        raise ArgumentError(
            f"reorthogonalize is {reorthogonalize!r}; it must be 'full', 'selective' or 'none'"
        )
    if starts.dim() != 2 or starts.shape[0] != A.shape[0] or starts.shape[1] == 0:
        raise ShapeError(
            f"starts has shape {tuple(starts.shape)}, expected [{A.shape[0]}, p] with p >= 1"
        )
    run = _Run(A, min(steps, A.shape[0]), starts, reorthogonalize)
    for step in range(run.steps):
        if not run.running:
            break
        run.advance(step)
        if progress is not None:
            progress(step + 1)
        if until is not None and step % _LOOK == _LOOK - 1 and until(run.result()):
            break
    return run.result()


class _Run:
    """The recurrences of all columns that still run; columns whose space is exhausted leave."""

    def __init__(
        self, A: LinearOperator, steps: int, starts: Tensor, kind: Reorthogonalization
    ) -> None:
        self.A, self.steps, self.kind = A, steps, kind
        n, p = starts.shape
        work = torch.float32 if A.dtype.itemsize == 2 else A.dtype
        V = starts.to(work)
        norms = A.space.norm(V)
        if not bool((norms > 0).all()):
            raise ArgumentError(f"start vectors have norms {norms.tolist()}; none may be zero")
        self.norms = norms.double().cpu()
        self.eps = torch.finfo(work).eps
        self.V, self.previous = V / norms, torch.zeros_like(V)
        self.bases = None
        if kind != "none":
            self.bases = torch.zeros(p, steps, n, dtype=work, device=V.device)
        self.diagonal: list[list[float]] = [[] for _ in range(p)]
        self.off_diagonal: list[list[float]] = [[] for _ in range(p)]
        self.remainder = [0.0] * p
        self.scale = [0.0] * p
        self.converged: list[Tensor | None] = [None] * p
        self.running = list(range(p))
        self.products = 0

    def advance(self, step: int) -> None:
        space, running = self.A.space, self.running
        if self.bases is not None:
            self.bases[running, step] = self.V.T
        W = (self.A @ self.V.contiguous().to(self.A.dtype)).to(self.V.dtype)
        self.products += len(running)
        beta = torch.tensor(
            [self.off_diagonal[j][-1] if step else 0.0 for j in running],
            dtype=W.real.dtype,
            device=W.device,
        )
        W = W - self.previous * beta
        alpha = space.inner(self.V, W)
        alpha = alpha.real if alpha.is_complex() else alpha
        before, W = space.norm(W), W - self.V * alpha
        if self.kind == "full":
            assert self.bases is not None
            B = self.bases[:, : step + 1]
            B = B if len(running) == len(self.norms) else B[running]
            W = W - project(B, W, space)
            # A pass leaves rounding of the size of what it started from.
            if bool((space.norm(W) < 0.1 * before).any()):
                W = W - project(B, W, space)
        elif self.kind == "selective":
            self._purge(W, alpha.tolist(), step)
        size = space.norm(W)
        self._note(step, alpha.tolist(), size.tolist())
        keep = [k for k, j in enumerate(running) if self.remainder[j] > 0]
        self.previous, self.V = self.V, W / torch.where(size > 0, size, 1)
        if len(keep) < len(running):
            self.previous, self.V = self.previous[:, keep], self.V[:, keep]
            self.running = [running[k] for k in keep]

    def _note(self, step: int, alpha: list[float], size: list[float]) -> None:
        for j, a, b in zip(self.running, alpha, size, strict=True):
            if not math.isfinite(a) or not math.isfinite(b):
                raise NonFiniteError(
                    f"the product of step {step + 1} with {type(self.A).__name__} holds NaN or "
                    "infinity"
                )
            self.diagonal[j].append(a)
            self.scale[j] = max(self.scale[j], abs(a), b)
            self.remainder[j] = b if b > 10 * self.eps * self.scale[j] else 0.0
            if step + 1 < self.steps and self.remainder[j] > 0:
                self.off_diagonal[j].append(b)

    def _purge(self, W: Tensor, alpha: list[float], step: int) -> None:
        """Take the converged Ritz vectors out of the columns of ``W``, in place."""
        space = self.A.space
        running = self.running
        diagonal = [[*self.diagonal[j], a] for j, a in zip(running, alpha, strict=True)]
        off = [self.off_diagonal[j] for j in running]
        T = tridiagonal(
            torch.tensor(diagonal, dtype=torch.float64), torch.tensor(off, dtype=torch.float64)
        )
        if not bool(torch.isfinite(T).all()):
            return  # reported with the norms
        values, vectors = torch.linalg.eigh(T)
        # Rounding brings y back as eps |A| / error: it must stay below half of the digits.
        error = space.norm(W).double().cpu().unsqueeze(1) * vectors[:, -1].abs()
        found = error <= self.eps**0.5 * values.abs().amax(1, keepdim=True)
        for k, j in enumerate(running):
            Y = self.converged[j]
            count = int(found[k].sum())
            if count and (Y is None or Y.shape[1] != count or step % _RENEW_EVERY == 0):
                assert self.bases is not None
                S = vectors[k][:, found[k]].to(self.bases.dtype).to(self.bases.device)
                Y = self.bases[j, : step + 1].T @ S
                self.converged[j] = Y = Y / space.norm(Y)
            if Y is not None:
                w = W[:, k : k + 1]
                for _ in range(2):
                    w -= Y @ space.gram(Y, w)

    def result(self) -> LanczosBatch:
        sizes = tuple(len(d) for d in self.diagonal)
        m = max(sizes)
        padded = [d + [d[0]] * (m - len(d)) for d in self.diagonal]
        diagonal = torch.tensor(padded, dtype=torch.float64)
        off = torch.zeros(len(sizes), max(0, m - 1), dtype=torch.float64)
        for j, values in enumerate(self.off_diagonal):
            values = values[: sizes[j] - 1]
            off[j, : len(values)] = torch.tensor(values, dtype=torch.float64)
        return LanczosBatch(
            diagonal=diagonal,
            off_diagonal=off,
            remainder=torch.tensor(self.remainder, dtype=torch.float64),
            sizes=sizes,
            norms=self.norms,
            bases=None if self.bases is None else self.bases[:, :m].mT,
            products=self.products,
        )


def project(B: Tensor, W: Tensor, space: Space) -> Tensor:
    """``Q_j Q_j^H w_j``, ``[n, p]``, for bases by rows ``[p, m, n]`` and columns ``[n, p]``."""
    if type(space).gram is Space.gram:
        # Rows times matrix: torch has no fast batch of matrix times column.
        inside = torch.bmm(W.T.unsqueeze(1), B.mH)
        return torch.bmm(inside, B).squeeze(1).T
    columns = [q.T @ space.gram(q.T, W[:, j : j + 1]) for j, q in enumerate(B.unbind(0))]
    return torch.cat(columns, dim=1)
