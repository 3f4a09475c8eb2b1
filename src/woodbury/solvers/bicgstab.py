"""BiCGSTAB."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from woodbury.solvers.column import Column
from woodbury.solvers.columns import add_columns, inners, norms, take
from woodbury.solvers.loop import Loop, column_of
from woodbury.solvers.preconditioned import KrylovState, Preconditioned
from woodbury.solvers.recipe import Outcome, Problem
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["BiCGSTAB"]


@dataclass(frozen=True)
class BiCGSTAB(Preconditioned):
    r"""Stabilised biconjugate gradients: any square operator, in the memory of a few vectors.

    Each step is one of biconjugate gradients, $s = r - \alpha A M p$ with $\alpha = \langle
    \hat r, r\rangle / \langle \hat r, A M p\rangle$ for a fixed shadow residual $\hat r = r_0$, and
    one of minimal residuals, $r = s - \omega A M s$ with $\omega = \langle t, s\rangle / \langle t,
    t\rangle$, $t = A M s$. The preconditioner stands on the right, so that the residual is the true
    one. Nothing makes it fall from step to step: where the method fails, the iterate with the
    smallest residual is returned.

    Where $\langle \hat r, r\rangle$ or $\omega$ vanishes to working precision, or the residual has
    grown beyond what rounding can bring back, the iteration starts once more from the best iterate
    with a random shadow residual; after that the status is ``breakdown``. The columns of a block
    share each product and leave the block as they converge; a claim to have converged is checked
    with the true residual.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps, of two products each; default ``10 n``.
        preconditioner: $M \approx A^{-1}$: an operator, or a recipe that prepares one. A gradient
            needs its adjoint.

    Raises:
        ArgumentError: a tolerance or limit is negative or not a number.

    Cost: two products, and two with the preconditioner, per step; one more product to start from
    ``x0`` and one for the true residual. Memory of 8 vectors for each column.

    Source: van der Vorst, "Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG" (1992);
    Sleijpen and van der Vorst, "Reliable updated residuals in hybrid Bi-CG methods" (1996).

    Example:
        >>> import torch
        >>> from woodbury import BiCGSTAB, Dense, solve
        >>> A = Dense(torch.tensor([[2.0, 1.0], [-1.0, 2.0]]))
        >>> solve(A, torch.tensor([3.0, 1.0]), BiCGSTAB()).value
        tensor([1., 1.])
    """

    hermitian_preconditioner: ClassVar[bool] = False

    def _run(self, problem: Problem, state: KrylovState) -> Outcome:
        loop = _Loop(problem, state.preconditioner, problem.tolerances(self.rtol, self.atol))
        return loop.run(self.limit(problem.A))


class _Column(Column):
    """The scalars of one right-hand side, complex where the vectors are."""

    def __init__(
        self, index: int, tolerance: float, norm: float, b_norm: float, eps: float
    ) -> None:
        super().__init__(index, tolerance, norm, b_norm, eps)
        self.starts = 0
        self.broken = False
        self.shadow = 1.0  # norm of the shadow residual
        self.rho: complex = 1.0
        self.alpha: complex = 0.0
        self.omega: complex = 0.0
        self.beta: complex = 0.0
        self.left = 1.0

    def first(self, sigma: complex) -> None:
        """Take <shadow, A M p>: the length of the step of biconjugate gradients."""
        self.alpha = self.omega = 0.0
        self.left = 1.0
        if not math.isfinite(abs(sigma)):
            self.status, self.residual = SolveStatus.non_finite, None
        elif sigma == 0:
            self.broken = True
        else:
            self.alpha = self.rho / sigma

    def second(self, ts: complex, tt: float, s: float) -> None:
        """Take <t, s>, <t, t> and the norm of s: the length of the step of minimal residuals."""
        if not (math.isfinite(abs(ts)) and math.isfinite(tt)):
            self.status, self.residual = SolveStatus.non_finite, None
        elif tt == 0 or abs(ts) <= self.eps * math.sqrt(tt) * s:
            self.broken = True  # after this step, which is one of biconjugate gradients alone
        else:
            self.omega = ts / tt
            # How much of |s|^2 is left after the step.
            self.left = 1 - (abs(ts) / math.sqrt(tt) / s) ** 2

    def renew(self, rho: complex) -> None:
        """Take <shadow, r> of the new residual: the next direction, if there is one."""
        lost = self.norm > self.best / self.eps
        self.broken = self.broken or lost or not math.isfinite(abs(rho))
        self.broken = self.broken or abs(rho) <= self.eps * self.shadow * self.norm
        if not self.broken:
            self.beta = (rho / self.rho) * (self.alpha / self.omega)
            self.rho = rho


class _Loop(Loop[_Column]):
    """Directions ``P``, their images ``V`` and shadow residuals ``S``."""

    blocks: ClassVar[tuple[str, ...]] = ("X", "R", "P", "V", "S")
    keeps_start: ClassVar[bool] = True

    def __init__(
        self, problem: Problem, M: LinearOperator | None, tolerances: Sequence[float]
    ) -> None:
        super().__init__(problem, M, tolerances, _Column)
        self.P, self.S = self.R.clone(), self.R.clone()
        self.V = self.R
        self.generator = torch.Generator(self.R.device).manual_seed(0)

    def turn(self) -> None:
        """First directions: the residual, with itself or a random vector for a shadow."""
        for j, column in enumerate(self.columns):
            if not column.restart:
                continue
            column.restart = column.broken = False
            r = column_of(self.R, j)
            s = r
            if column.starts:
                s = torch.empty_like(r).copy_(
                    torch.randn(r.shape, dtype=r.dtype, device=r.device, generator=self.generator)
                )
            column.starts += 1
            column_of(self.P, j).copy_(r)
            column_of(self.S, j).copy_(s)
            column.shadow = norms(self.space, s.contiguous())[0]
            column.rho = inners(self.space, s.contiguous(), r.contiguous())[0]

    def advance(self, *, look: bool) -> None:
        """Two products, two steps, and what is to be done about their result."""
        columns = self.columns
        P = self.P if self.precondition is None else self.precondition(self.P)
        self.V = self.problem.product(P)
        if look:
            self.measure(P, self.V)
        for column, sigma in zip(columns, inners(self.space, self.S, self.V), strict=True):
            column.first(sigma)
        half = add_columns(self.R, [-c.alpha for c in columns], self.V)
        sizes = norms(self.space, half)
        done = [
            c.status is not None or c.broken or s <= c.target
            for c, s in zip(columns, sizes, strict=True)
        ]
        if all(done):
            S, self.R, now = half, half, sizes
        else:
            S = half if self.precondition is None else self.precondition(half)
            T = self.problem.product(S)
            products = zip(inners(self.space, T, half), inners(self.space, T, T), strict=True)
            for j, (ts, tt) in enumerate(products):
                if not done[j]:
                    columns[j].second(ts, abs(tt), sizes[j])
            self.R = add_columns(half, [-c.omega for c in columns], T)
            # By Pythagoras, where that does not cancel.
            squares = [c.left * s * s for c, s in zip(columns, sizes, strict=True)]
            if all(c.left > 0.01 for c in columns):
                now = [math.sqrt(square) for square in squares]
            else:
                now = norms(self.space, self.R)
        self.settle(P, S, now, look=look)

    def settle(self, P: Tensor, S: Tensor, now: Sequence[float], *, look: bool) -> None:
        """Take the step where it is one, and look at what it brought."""
        columns = self.columns
        rising, claims, ended = [], [], False
        for j, column in enumerate(columns):
            if column.status is None and column.advance(now[j]):
                rising.append(j)
            if column.status is not None:
                column.alpha = column.omega = 0.0  # the iterate stays what it was
                ended = True
            elif column.norm <= column.target or (look and column.norm <= column.level):
                claims.append(j)
        if rising:
            self.keep_best(rising)
        if ended:  # nothing times a number that is none would be none
            going = torch.tensor([c.status is None for c in columns], device=P.device)
            P, S = P.where(going, 0), S.where(going, 0)
        add_columns(self.X, [c.alpha for c in columns], P, out=self.X)
        if any(c.omega for c in columns):
            add_columns(self.X, [c.omega for c in columns], S, out=self.X)
        if claims:
            self.measure(P, self.V)
            self.verify(claims)
        running = [c for c in columns if c.status is None and not c.restart]
        if running:
            self.direct()
        if any(c.broken and c.status is None for c in columns):
            self.revive()
        if ended or claims or any(c.status is not None for c in columns):
            self.leave()

    def direct(self) -> None:
        """The next directions, p = r + beta (p - omega v)."""
        for column, rho in zip(self.columns, inners(self.space, self.S, self.R), strict=True):
            if column.status is None and not column.restart and not column.broken:
                column.renew(rho)
        add_columns(self.P, [-c.omega for c in self.columns], self.V, out=self.P)
        self.P = add_columns(self.R, [c.beta for c in self.columns], self.P, out=self.P)

    def revive(self) -> None:
        """Start again from the best iterates where there is no next direction, once."""
        for j, column in enumerate(self.columns):
            if not column.broken or column.status is not None:
                continue
            if column.starts > 1:
                column.status = SolveStatus.breakdown
                continue
            if column.best < column.norm:
                assert self.best is not None  # kept when the residual rose
                column_of(self.X, j).copy_(column_of(self.best, column.index))
            X = self.X if self.X.dim() == 1 else take(self.X, [j])
            R = self.problem.residual(X, [column.index])
            column.norm = column.best = norms(self.space, R)[0]
            column_of(self.R, j).copy_(column_of(R, 0))
            column.restart = True

    def prefers_best(self, column: _Column) -> bool:
        """The residual may have been smaller before."""
        return column.status is not None and not column.status.ok
