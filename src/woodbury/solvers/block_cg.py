"""Block conjugate gradients: the columns of a block share one Krylov space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from woodbury.solvers.cg import CG
from woodbury.solvers.columns import norms
from woodbury.solvers.preconditioned import KrylovState, Preconditioned, preconditioning
from woodbury.solvers.recipe import Outcome, Problem

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator
    from woodbury.spaces import Space

__all__ = ["BlockCG"]

# Diagonals of a Cholesky factor below this, relative to the largest: orthonormalised once more,
# and no block of directions at all.
_AGAIN, _DEPENDENT = 1e-2, 1e-6


@dataclass(frozen=True)
class BlockCG(Preconditioned):
    r"""Conjugate gradients in the Krylov space that the columns of a block span together.

    Step $i$ minimises the error of each column in the norm of ``A`` over $\mathcal{K}_i(MA, M R_0)$
    of the whole block, ``k`` times as large as that of one column: where products or the
    preconditioner are what costs, a block takes a fraction of the steps of :class:`CG`. With the
    residuals as $R = Q C$, $Q^H M Q = I$,
    $X \mathrel{+}= P (P^H A P)^{-1} C$, $Q S = Q - A P (P^H A P)^{-1}$, $P = M Q + P S^H$,
    $C = S C$.

    The block ends when all its columns claim to have converged, when the residuals become linearly
    dependent to working precision, or when a direction has no positive curvature. :class:`CG` then
    takes over from the iterate it has: it verifies the true residuals, does what is left to be
    done, and all statuses are its own. One column is solved by :class:`CG` alone.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 n``.
        preconditioner: $M \approx A^{-1}$, hermitian positive definite: an operator, or a recipe
            that prepares one.

    Raises:
        TagError: the operator or the preconditioner is not known to be hermitian.
        ArgumentError: a tolerance or limit is negative or not a number.

    Cost: one product with the block, and one with the preconditioner, per step, and
    $12 n k^2$ multiplications; one product to take over. Memory of 8 blocks ``[n, k]``.

    Source: O'Leary, "The block conjugate gradient algorithm and related methods" (1980); Dubrulle,
    "Retooling the method of block conjugate gradients" (2001), algorithm BCGrQ.

    Example:
        >>> import torch
        >>> from woodbury import CG, Diagonal, solve
        >>> from woodbury.solvers import BlockCG
        >>> A = Diagonal(torch.linspace(1.0, 100.0, 200).double(), tags={"positive_definite"})
        >>> B = torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> solve(A, B, BlockCG()).steps < solve(A, B, CG()).steps / 2
        True
    """

    needs: ClassVar[tuple[str, ...]] = ("hermitian",)

    def _run(self, problem: Problem, state: KrylovState) -> Outcome:
        limit = self.limit(problem.A)
        taken = 0
        if problem.width > 1 and limit > 0:
            tolerances = problem.tolerances(self.rtol, self.atol)
            block = _Block(problem, state.preconditioner, tolerances)
            problem.x0, taken = block.run(limit)
        progress = problem.progress
        if progress is not None and taken:
            problem.progress = lambda step, residual: progress(step + taken, residual)
        finish = CG(self.rtol, self.atol, limit - taken, self.preconditioner)
        outcome = finish._run(problem, state)
        outcome.steps += taken
        steps = outcome.info["column_steps"]
        outcome.info["column_steps"] = [step + taken for step in steps]
        outcome.info["block_steps"] = taken
        return outcome


class _Block:
    """The recurrences of the whole block, as long as its columns are independent."""

    def __init__(self, problem: Problem, M: LinearOperator | None, tolerances: list[float]) -> None:
        self.problem = problem
        self.space: Space = problem.A.space
        self.precondition: Callable[[Tensor], Tensor] | None = preconditioning(M)
        self.tolerances = tolerances
        self.X, self.Q = problem.start()

    def run(self, limit: int) -> tuple[Tensor, int]:
        """The iterate and the steps it took, up to ``limit``."""
        now = norms(self.space, self.Q)
        basis = self.orthonormal(self.Q)
        if self.done(now) or basis is None:
            return self.X, 0
        self.Q, Z, C = basis
        P = Z.clone()
        # From the norm of M, which the recurrence knows, to that of the residual.
        ratios = [r / c for r, c in zip(now, _lengths(C), strict=True)]
        for step in range(limit):
            self.problem.note(step, now)
            image = self.problem.product(P)
            factor = _cholesky(self.space.gram(P, image))
            if factor is None:
                return self.X, step
            inverse = torch.cholesky_inverse(factor)
            basis = self.orthonormal(torch.addmm(self.Q, image, inverse, alpha=-1))
            X = torch.addmm(self.X, P, inverse @ C)
            now = [r * c for r, c in zip(ratios, _lengths(C), strict=True)]
            if basis is None:
                # Either all is solved in this step, or CG goes on from the iterate before it.
                return (X if bool(torch.isfinite(X).all()) else self.X), step + 1
            self.X = X
            self.Q, Z, S = basis
            P = torch.addmm(Z, P, S.mH)
            C = S @ C
            now = [r * c for r, c in zip(ratios, _lengths(C), strict=True)]
            if self.precondition is not None and self.done([0.1 * r for r in now]):
                now = norms(self.space, self.Q @ C)
                ratios = [r / c for r, c in zip(now, _lengths(C), strict=True)]
            if self.done(now):
                return self.X, step + 1
        return self.X, limit

    def done(self, now: list[float]) -> bool:
        """Whether all columns are within their tolerance."""
        return all(r <= tolerance for r, tolerance in zip(now, self.tolerances, strict=True))

    def orthonormal(self, W: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """``Q``, ``M Q`` and ``S`` with ``W = Q S``, ``Q^H M Q = I``; ``None`` if dependent."""
        whole: Tensor | None = None
        MW = W
        for _ in range(2):
            U = W if self.precondition is None else self.precondition(W)
            L = _cholesky(self.space.gram(W, U))
            if L is None:
                return None
            W = torch.linalg.solve_triangular(L.mH, W, upper=True, left=False)
            MW = W
            if self.precondition is not None:
                MW = torch.linalg.solve_triangular(L.mH, U, upper=True, left=False)
            whole = L.mH if whole is None else L.mH @ whole
            sizes = torch.diagonal(L).real
            if bool(sizes.amin() >= _AGAIN * sizes.amax()):
                break
        assert whole is not None  # set in the first pass
        return W, MW, whole


def _lengths(C: Tensor) -> list[float]:
    found: list[float] = torch.linalg.vector_norm(C, dim=0).tolist()
    return found


def _cholesky(G: Tensor) -> Tensor | None:
    """The factor of a Gram matrix; ``None`` where it is not definite to working precision."""
    L, info = torch.linalg.cholesky_ex((G + G.mH) / 2)
    sizes: Any = torch.diagonal(L).real
    if int(info) or not bool(sizes.amin() > _DEPENDENT * sizes.amax()):
        return None
    return L
