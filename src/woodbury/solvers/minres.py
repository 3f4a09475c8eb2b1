"""MINRES."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from woodbury.solvers.columns import add_columns, dots, norms, scale_columns, take
from woodbury.solvers.loop import Loop, column_of
from woodbury.solvers.minres_column import MINRESColumn
from woodbury.solvers.preconditioned import KrylovState, Preconditioned
from woodbury.solvers.recipe import Outcome, Problem
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["MINRES"]


@dataclass(frozen=True)
class MINRES(Preconditioned):
    r"""Minimal residuals for a hermitian operator, definite or not, singular or not.

    Step $i$ minimises $\|b - A x\|$ over $x_0 + \mathcal{K}_i(A, r_0)$, by Lanczos' recurrence
    $A V_i = V_{i+1} T_i$ and a QR factorisation of $T_i$ that is extended by one rotation a step.
    With a preconditioner the norm is $\sqrt{r^H M r}$ and the space $M\mathcal{K}_i(AM, r_0)$; the
    residual itself is then carried along, so that the tolerance is met by $\|b - A x\|$ all the
    same.

    Where ``A`` is singular and $b$ in its range, the solution found from ``x0 = 0`` is the one of
    smallest norm, $A^+ b$. Where $b$ is not in its range the status is ``inconsistent``: found by
    $\|A r\| \approx 0$ while $r$ stays, and confirmed with the true residual. The value then is
    $A^+ b$ too, because what Krylov's space adds to it lies along $r$ and is taken out; with a
    preconditioner it is a minimiser of $r^H M r$, and not of smallest norm. ``info`` then holds
    ``normal_residual``, $\|A r\| / (\|A\| \|r\|)$ of each column ($M r$ for $r$ with $M$).

    The columns of a block share each product and leave the block as they converge. When the
    recurrence claims convergence the true residual is computed; where rounding has let the two
    drift apart the iteration goes on, or starts again from the iterate it has.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 n``.
        preconditioner: $M \approx |A|^{-1}$, hermitian positive definite: an operator, or a recipe
            that prepares one.

    Raises:
        TagError: the operator or the preconditioner is not known to be hermitian. Whether the
            preconditioner is positive definite is found out on the way, and is a status.
        ArgumentError: a tolerance or limit is negative or not a number.

    Cost: one product, and one with the preconditioner, per step; one more product to start from
    ``x0`` and one for the true residual; where the system is inconsistent, two more. Memory of 7
    vectors for each column, of 10 with a preconditioner.

    Source: Paige and Saunders, "Solution of sparse indefinite systems of linear equations" (1975),
    section 6; Choi, Paige and Saunders, "MINRES-QLP" (2011) for the residual and the norm of $A r$;
    Liu, Milzarek and Roosta, "Obtaining pseudo-inverse solutions with MINRES" (2023) for $A^+ b$.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal, MINRES, solve
        >>> A = Diagonal(torch.tensor([1.0, -1.0, 0.0]))
        >>> solve(A, torch.tensor([1.0, 2.0, 0.0]), MINRES()).value
        tensor([ 1.0000, -2.0000,  0.0000])
        >>> solve(A, torch.ones(3), MINRES(), throw=False).status.name
        'inconsistent'
    """

    needs: ClassVar[tuple[str, ...]] = ("hermitian",)

    def _run(self, problem: Problem, state: KrylovState) -> Outcome:
        loop = _Loop(problem, state.preconditioner, problem.tolerances(self.rtol, self.atol))
        return loop.run(self.limit(problem.A))


class _Loop(Loop[MINRESColumn]):
    """Lanczos vectors ``Y`` with ``<Y, Z> = 1`` for ``Z = M Y``, and directions ``W`` of the steps.

    ``R`` is the residual by recurrence where there is a preconditioner; without one its norm is
    known, and ``R`` is of use at a start only.
    """

    blocks: ClassVar[tuple[str, ...]] = ("X", "R", "Y", "Y_old", "Z", "W", "W_old")
    keeps_start: ClassVar[bool] = True

    def __init__(
        self, problem: Problem, M: LinearOperator | None, tolerances: Sequence[float]
    ) -> None:
        super().__init__(problem, M, tolerances, MINRESColumn)
        self.Y = self.Z = torch.zeros_like(self.R)
        if M is not None:
            self.Z = torch.zeros_like(self.R)
        self.Y_old, self.W, self.W_old = (torch.zeros_like(self.R) for _ in range(3))

    def turn(self) -> None:
        """The first Lanczos vectors of the columns that start, from their residuals."""
        starting = [j for j, column in enumerate(self.columns) if column.restart]
        if not starting:
            return
        F = self.R.clone() if self.R.dim() == 1 else take(self.R, starting)
        if self.precondition is None:
            G, squares = F, [self.columns[j].norm ** 2 for j in starting]
        else:
            G = self.precondition(F)
            squares = dots(self.space, F, G)
        ended = False
        for j, square in zip(starting, squares, strict=True):
            ended = not self.columns[j].begin(square) or ended
        factors = [self.columns[j].inverse_beta for j in starting]
        for place, j in enumerate(starting):
            column_of(self.Y, j).copy_(column_of(F, place) * factors[place])
            if self.precondition is not None:
                column_of(self.Z, j).copy_(column_of(G, place) * factors[place])
            for tensor in (self.Y_old, self.W, self.W_old):
                column_of(tensor, j).zero_()
        if self.precondition is None:
            self.Z = self.Y
        if ended:
            self.leave()

    def advance(self, *, look: bool) -> None:
        """One product, one more column of the tridiagonal matrix, one rotation."""
        Q = self.problem.product(self.Z)
        if look:
            self.measure(self.Z, Q)
        # In this order the coefficients see the rounding of what is taken away before.
        Q = add_columns(Q, [-column.beta for column in self.columns], self.Y_old)
        alphas = dots(self.space, self.Z, Q)
        add_columns(Q, [-alpha for alpha in alphas], self.Y, out=Q)
        P = Q if self.precondition is None else self.precondition(Q)
        squares = dots(self.space, Q, P)
        for column, alpha, square in zip(self.columns, alphas, squares, strict=True):
            column.rotate(alpha, square)
        if any(column.may_be_kept(look=look) for column in self.columns):
            sizes = norms(self.space, self.X)
            self.keep_best(
                [
                    j
                    for j, c in enumerate(self.columns)
                    if c.may_be_kept(look=look) and c.is_kept(sizes[j])
                ]
            )
        suspects = [j for j, column in enumerate(self.columns) if column.is_suspect()]
        if suspects:
            self.look_for_inconsistency(suspects)
        columns = self.columns
        W = self.W_old
        add_columns(self.Z, [c.from_older for c in columns], W, out=W)
        add_columns(W, [c.from_last for c in columns], self.W, out=W)
        self.W_old, self.W = self.W, W
        add_columns(self.X, [c.length for c in columns], W, out=self.X)
        factors = [c.inverse_beta for c in columns]
        self.Y_old, self.Y = self.Y, scale_columns(Q, factors)
        self.Z = self.Y if self.precondition is None else scale_columns(P, factors)
        if self.precondition is None:
            now = [abs(c.phi) for c in columns]
        else:
            scale_columns(self.R, [c.keep for c in columns])
            add_columns(self.R, [c.take for c in columns], self.Y, out=self.R)
            now = norms(self.space, self.R)
        claims, ended = [], False
        for j, column in enumerate(columns):
            if column.status is None:
                column.advance(now[j])
                goal = max(column.target, column.level) if look else column.target
                if column.exhausted or column.norm <= goal:
                    claims.append(j)
            ended = ended or column.status is not None
        if claims:
            self.verify(claims)
        if claims or ended:
            self.leave()

    def verify(self, claims: list[int]) -> None:
        """The true residual ``r`` of the columns that claim to be done; ``A r`` where it counts."""
        whole = self.value.dim() == 1
        X = self.X if whole else take(self.X, claims)
        true = self.problem.residual(X, [self.columns[j].index for j in claims])
        sizes, stalled = norms(self.space, X), []
        for place, (j, norm) in enumerate(zip(claims, norms(self.space, true), strict=True)):
            column = self.columns[j]
            column.level = self.eps * (column.size * sizes[place] + column.b_norm)
            column.judge(norm)
            if column.restart and column.kept < norm:
                # The iterates have grown until their rounding is all there is: no start from here.
                column.restart, column.status = False, SolveStatus.stagnation
            if column.restart:
                column_of(self.R, j).copy_(column_of(true, place))
            if column.status is SolveStatus.stagnation:
                self.prefer_kept(j, norm)
                if column.saved_norm <= norm:
                    stalled.append(j)
        if stalled:
            self.look_for_inconsistency(stalled)

    def look_for_inconsistency(self, suspects: list[int]) -> None:
        """Whether ``A r = 0`` for the residual ``r`` that does not fall: there is no solution."""
        assert self.best is not None  # suspects have an iterate that was kept
        indices = [self.columns[j].index for j in suspects]
        X = self.best if self.best.dim() == 1 else take(self.best, indices)
        R = self.problem.residual(X, indices)
        # With a preconditioner it is r^H M r that is least where A M r = 0.
        S = R if self.precondition is None else self.precondition(R)
        tensors = (X, R, S, self.problem.product(S))
        found = zip(*(norms(self.space, T) for T in tensors), strict=True)
        for place, (j, (x, r, s, image)) in enumerate(zip(suspects, found, strict=True)):
            column = self.columns[j]
            size = column.size = max(column.size, image / s if s > 0 else 0.0)
            column.level = self.eps * (size * x + column.b_norm)
            if image <= 10 * math.sqrt(self.eps) * size * s and r > 100 * column.level:
                column.stay()
                column.status, column.residual = SolveStatus.inconsistent, None
                column.normal_residual = image / (size * s) if size else 0.0
                column_of(self.X, j).copy_(column_of(X, place))
                if self.precondition is None:
                    self.project(j, column_of(R, place))
            else:
                column.limit /= 100
                column.saved_step = column.steps

    def project(self, j: int, r: Tensor) -> None:
        """Take out of the iterate what it has along ``r``, of which ``A`` knows nothing."""
        x = column_of(self.X, j)
        moved = x
        if self.problem.x0 is not None:
            index = self.columns[j].index
            moved = x - column_of(self.problem.x0, index)
        along = self.space.inner(r, moved) / self.space.inner(r, r)
        x.sub_(along * r)

    def finish(self) -> None:
        """The limit of steps may have come while the residual of an inconsistent system stays."""
        suspects = [j for j, c in enumerate(self.columns) if 0.999 * c.saved_norm <= c.norm]
        if suspects:
            self.look_for_inconsistency(suspects)
        running = [j for j, c in enumerate(self.columns) if c.status is None and c.kept < math.inf]
        if running:
            X = self.X if self.X.dim() == 1 else take(self.X, running)
            true = self.problem.residual(X, [self.columns[j].index for j in running])
            for j, norm in zip(running, norms(self.space, true), strict=True):
                self.prefer_kept(j, norm)

    def prefer_kept(self, j: int, norm: float) -> None:
        """Go back to the iterate that was kept where this one has a larger residual."""
        column = self.columns[j]
        if column.kept < norm:
            assert self.best is not None
            column_of(self.X, j).copy_(column_of(self.best, column.index))
            column.residual = None
        else:
            column.residual = norm

    def outcome(self) -> Outcome:
        """With the certificate of least squares where a column is inconsistent."""
        columns = self.all_columns
        if any(c.status is SolveStatus.inconsistent for c in columns):
            self.info["normal_residual"] = [c.normal_residual for c in columns]
        return super().outcome()
