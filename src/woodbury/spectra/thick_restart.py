"""Thick-restart Lanczos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.spectra.eigenpairs import EigenMethod, EigenProblem
from woodbury.spectra.method import wide

if TYPE_CHECKING:
    from woodbury.spaces import Space

__all__ = ["ThickRestartLanczos"]


@dataclass(frozen=True)
class ThickRestartLanczos(EigenMethod):
    r"""Lanczos that starts again from the best Ritz vectors and the residual they share.

    A basis of ``basis`` vectors is filled, with full reorthogonalisation; of its Ritz vectors the
    wanted ones and half of the others are kept. Where the Krylov space is exhausted it goes on with
    a random vector.

    A Krylov space of one vector holds one eigenvector of a multiple eigenvalue. Once all pairs have
    converged, the basis is therefore filled once more from a random vector orthogonal to them
    (``verify``); what that finds beyond them takes their place, and the work goes on.

    Args:
        rtol: largest residual of a pair, relative to its eigenvalue.
        max_products: a limit; default the larger of 1,000 and ``20 n``.
        basis: vectors kept, more than the pairs wanted; default ``max(2k + 10, 20)``.
        verify: look for copies of multiple eigenvalues.

    Raises:
        ArgumentError: a limit is too small.

    Cost: per restart, products and orthogonalisation of half of the basis; memory of ``basis + 1``
    vectors and as many again during a restart.

    Source: Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems"
    (2000), algorithm 1.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.spectra import ThickRestartLanczos, eigenpairs
        >>> A = Diagonal(torch.cat([torch.linspace(0, 1, 300), torch.tensor([3.0, 3.0])]).double())
        >>> eigenpairs(A, 2, method=ThickRestartLanczos()).values.round(decimals=9)
        tensor([3., 3.], dtype=torch.float64)
    """

    basis: int | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis is not None and self.basis < 3:
            raise ArgumentError(f"basis is {self.basis}; it must be at least 3")

    def _run(self, problem: EigenProblem) -> Tensor:
        n, k = problem.A.shape[0], problem.k
        m = max(2 * k + 10, 20) if self.basis is None else self.basis
        if m < k + 2:
            raise ArgumentError(f"basis is {m} for {k} pairs; it must be at least {k + 2}")
        run = _Basis(problem, min(m, n))
        limit, verified = problem.limit(self.max_products), not self.verify
        checking: list[float] | None = None
        while True:
            run.fill(limit)
            values, vectors, residuals = run.ritz()
            wanted = problem.order(values)[:k]
            problem.steps += 1
            done = len(wanted) == k and all(
                problem.good(values[i].item(), residuals[i].item(), self.rtol) for i in wanted
            )
            found = sorted(values[wanted].tolist())
            if done and checking is not None:
                # Nothing new among the wanted values: the vectors stand.
                gaps = [abs(a - b) for a, b in zip(found, checking, strict=True)]
                tolerance = max(self.rtol * max(map(abs, found)), problem.floor())
                verified = verified or max(gaps) <= 2 * tolerance
            if problem.products >= limit or run.complete or (done and verified):
                return run.vectors(vectors[:, wanted])
            if done:
                checking = found
                run.restart(values[wanted], vectors[:, wanted], fresh=True)
            else:
                more = max(1, (len(values) - k) // 2)
                kept = problem.order(values)[: min(k + more, len(values) - 1)]
                run.restart(values[kept], vectors[:, kept])


class _Basis:
    """Orthonormal vectors, and the operator between them."""

    def __init__(self, problem: EigenProblem, m: int) -> None:
        self.problem, self.m = problem, m
        first = problem.draw(1)
        self.space: Space = problem.A.space
        # By rows, which a product with few vectors reads at full speed.
        self.rows = torch.empty(m + 1, len(first), dtype=first.dtype, device=first.device)
        self.rows[0] = (first / self.space.norm(first))[:, 0]
        self.T = np.zeros((m, m), dtype=wide(first[:1]).numpy().dtype)
        self.size = 0  # columns of T
        self.beta = 0.0

    @property
    def complete(self) -> bool:
        """Whether the basis is one of the whole space."""
        return self.size == self.rows.shape[1]

    def fill(self, limit: int) -> None:
        """Expand to the full size, or as far as products last."""
        problem, space = self.problem, self.space
        eps = torch.finfo(self.rows.dtype).eps
        while self.size < self.m and (problem.products < limit or self.size == 0):
            j = self.size
            w = problem.product(self.rows[j].unsqueeze(1))
            Q = self.rows[: j + 1].T
            inside = space.gram(Q, w)
            w = w - Q @ inside
            again = space.gram(Q, w)  # else what the basis lacks in orthogonality would grow
            w, inside = w - Q @ again, inside + again
            self.beta = float(space.norm(w))
            column = wide(inside)[:, 0].numpy()
            self.T[: j + 1, j] = column
            self.T[j, : j + 1] = column.conj()
            self.T[j, j] = column[j].real
            self.size = j + 1
            problem.scale = max(problem.scale, float(abs(column[j])))
            if self.beta <= 10 * eps * max(problem.scale, self.beta):
                self.beta = 0.0
                if self.complete:
                    return
                w = self._random()
            self.rows[j + 1] = (w / space.norm(w))[:, 0]

    def _random(self) -> Tensor:
        """A random vector orthogonal to the basis."""
        w, Q = self.problem.draw(1), self.rows[: self.size].T
        for _ in range(3):
            w = w - Q @ self.space.gram(Q, w)
            w = w / self.space.norm(w)
        return w

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values, their coordinates, and estimates of their residuals."""
        T = torch.from_numpy(self.T[: self.size, : self.size])
        values, vectors = torch.linalg.eigh(T)
        self.problem.scale = max(self.problem.scale, float(values.abs().max()))
        return values, vectors, self.beta * vectors[-1].abs()

    def vectors(self, coordinates: Tensor) -> Tensor:
        """The vectors with coordinates ``[size, k]``."""
        return self.rows[: self.size].T @ coordinates.to(self.rows)

    def restart(self, values: Tensor, coordinates: Tensor, *, fresh: bool = False) -> None:
        """Keep some Ritz vectors and the residual that they share, or a random one."""
        kept = len(values)
        rest = self.rows[self.size].clone()
        self.rows[:kept] = self.vectors(coordinates).T
        self.T[:] = 0
        self.T[np.arange(kept), np.arange(kept)] = values.numpy()
        self.size = kept
        self.rows[kept] = self._random()[:, 0] if fresh else rest
