"""The loop of LSMR and LSQR: Golub-Kahan bidiagonalisation of a block, column by column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.linalg.lapack import dstebz
from torch import Tensor

from woodbury.solvers.columns import add_columns, rounding_limit, take
from woodbury.solvers.least_squares import LeastSquares, LeastSquaresState, StackedSystem, View
from woodbury.solvers.recipe import Outcome, Problem
from woodbury.solvers.solution import SolveStatus

__all__ = ["Bidiagonalization", "Column"]


class Column:
    """The scalars of one right-hand side; a method adds its recurrences.

    ``residual`` and ``gradient`` are norms of the residual of ``K`` and of ``K^H`` times it, as
    the recurrences have them; ``entries`` are those of the bidiagonal matrix, one row of it after
    the other.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.status: SolveStatus | None = None
        self.steps = 0
        self.seen = False  # whether its value is stored
        self.alpha = self.beta = 0.0
        self.residual = self.gradient = 0.0
        self.first = 0.0  # the first residual of K
        self.entries: list[float] = []
        self.largest, self.smallest = 0.0, math.inf  # singular values of the bidiagonal matrices
        # What the recurrences have to reach: the residual, or the gradient relative to both norms.
        self.target = self.relative = 0.0
        self.last = (math.inf, math.inf)  # true residual and gradient at the last restart
        self.true_residual = self.normal_residual = math.nan

    def begin(self, beta: float, alpha: float) -> None:
        """The first vectors: ``beta u = r`` and ``alpha v = K^H u``."""
        self.measure()
        self.entries = [alpha]
        self.alpha, self.beta = alpha, beta
        self.residual, self.gradient = beta, alpha * beta

    def step(self, beta: float, alpha: float) -> None:
        """The entries of the bidiagonal matrix that a step gave."""
        self.steps += 1
        self.entries += (beta, alpha)
        self.advance(beta, alpha)

    def advance(self, beta: float, alpha: float) -> None:
        """What a method makes of the entries."""
        raise NotImplementedError

    def claims(self, norm: float) -> bool:
        """Whether the recurrences say that it is done, ``norm`` being that of ``K``."""
        return self.residual <= self.target or self.gradient <= self.relative * norm * self.residual

    def ask(self, factor: float, eps: float) -> None:
        """Ask more of the recurrences; what is smaller than rounding is zero to them."""
        self.target = max(factor * self.target, eps / 4 * self.first)
        self.relative = max(factor * self.relative, eps / 4)

    def measure(self) -> None:
        """Take the extreme singular values of the bidiagonal matrix into account."""
        off = self.entries[:-1]  # the last alpha is of the next step
        if not off or not all(map(math.isfinite, off)):
            return
        # Beside a zero they are the eigenvalues >= 0 of the tridiagonal matrix with these entries
        # beside a diagonal of zeros, which squares nothing.
        k = len(off) // 2
        zeros = np.zeros(2 * k + 1)
        # LAPACK itself: SciPy's function around it takes longer than the work.
        values = [dstebz(zeros, off, 2, 0.0, 1.0, j, j, 0.0, "E")[1][0] for j in (k + 2, 2 * k + 1)]
        self.smallest = min(self.smallest, float(values[0]))
        self.largest = max(self.largest, float(values[1]))


class Bidiagonalization:
    """``K V = U B``: tensors hold the running columns only; a method adds ``update``."""

    column: type[Column] = Column

    def __init__(self, problem: Problem, state: LeastSquaresState, recipe: LeastSquares) -> None:
        self.problem, self.recipe = problem, recipe
        self.system = StackedSystem(problem, state, recipe.damping)
        self.rtol = recipe.rtol
        self.tolerances = problem.tolerances(recipe.rtol, recipe.atol)
        self.eps = torch.finfo(problem.A.dtype).eps
        self.all_columns = [self.column(j) for j in range(problem.width)]
        self.columns = list(self.all_columns)
        self.norm = 0.0  # of K, from below
        self.base = self.system.start()
        # With a preconditioner on the right the steps are summed up before it is applied.
        self.Y = torch.zeros_like(self.base) if self.system.right else self.base
        shape = (problem.A.shape[1], *problem.b.shape[1:])
        self.value = problem.b.new_zeros(shape)
        view = self.system.look(self.base, None, first=True)
        # Copies: what an operator returns is not to be written on.
        self.U, self.V = view.U.clone(), view.V.clone()
        self.aux: list[Tensor] = []
        for j, column in enumerate(self.columns):
            column.first = view.u_norms[j]
            column.relative = self.rtol
            if self.system.left:
                column.target = self.rtol * column.first
            elif not recipe.damping:
                column.target = self.tolerances[j]
            column.ask(1.0, self.eps)
            self._begin(j, view, j)
            self._judge(column, view, j, first=True)
            if column.status is not None:
                self._store(column, self.base, j)
        _divide(self.U, [c.beta for c in self.columns])
        _divide(self.V, [c.alpha * c.beta for c in self.columns])

    # ------------------------------------------------------------ what a method adds

    def reset(self, columns: Sequence[int]) -> None:
        """Set the auxiliary vectors of some columns from the new ``V``."""
        raise NotImplementedError

    def update(self) -> None:
        """Move the iterates ``Y`` along, by the scalars of the columns and the new ``V``."""
        raise NotImplementedError

    # ---------------------------------------------------------------------- the loop

    def run(self, limit: int) -> Outcome:
        """At most ``limit`` steps."""
        step = 0
        self._note(step)
        self._leave()
        if self.columns:
            self.reset(range(len(self.columns)))
        while self.columns and step < limit:
            step += 1
            self._advance()
            self._note(step)
        if self.columns:
            self._look(list(range(len(self.columns))), final=True)
            self._leave()
        return self._outcome()

    def _advance(self) -> None:
        system, columns = self.system, self.columns
        add_columns(system.forward(self.V), [-c.alpha for c in columns], self.U, out=self.U)
        betas = system.u_norms(self.U)
        _divide(self.U, betas)
        add_columns(system.backward(self.U), [-beta for beta in betas], self.V, out=self.V)
        alphas = system.v_norms(self.V)
        _divide(self.V, alphas)
        ended = False
        for column, beta, alpha in zip(columns, betas, alphas, strict=True):
            if not alpha + beta < math.inf:
                column.status, ended = SolveStatus.non_finite, True
                continue
            # A v = alpha u + beta u': the norm of a column of the bidiagonal matrix.
            self.norm = max(self.norm, math.hypot(column.alpha, beta))
            column.step(beta, alpha)
        if ended:
            self._leave()
            if not self.columns:
                return
        self.update()
        claims = [j for j, column in enumerate(self.columns) if column.claims(self.norm)]
        if claims:
            self._look(claims)
            self._leave()

    def _iterates(self, columns: Sequence[int]) -> Tensor:
        """The iterates of some running columns, as a block or vector of their own."""
        one = self.Y.dim() == 1
        Y = self.Y if one else take(self.Y, columns)
        if not self.system.right:
            return Y
        step = self.system.precondition(Y)
        if not bool(torch.isfinite(step).all()):  # a start that is finite is worth more
            step = torch.where(torch.isfinite(step).all(dim=0), step, 0)
        return (self.base if one else take(self.base, columns)) + step

    def _look(self, claims: list[int], *, final: bool = False) -> None:
        """Compute the true quantities of some columns and end them, start anew, or go on."""
        X = self._iterates(claims)
        view = self.system.look(X, [self.columns[j].index for j in claims])
        restart = []
        for place, j in enumerate(claims):
            column = self.columns[j]
            drifted = (
                abs(view.u_norms[place] - column.residual) > 0.1 * column.residual
                or abs(view.v_norms[place] - column.gradient) > 0.5 * column.gradient
            )
            self._judge(column, view, place, first=False)
            if column.status is None and final:
                column.status = SolveStatus.max_steps
            elif column.status is None and not (drifted or 0.0 in (column.alpha, column.beta)):
                column.ask(self._tighter(column), self.eps)
            elif column.status is None:
                now = (view.stacked[place], view.gradients[place])
                if now[0] > 0.5 * column.last[0] and now[1] > 0.5 * column.last[1]:
                    column.status = SolveStatus.stagnation
                else:
                    column.last = now
                    restart.append((j, place))
            if column.status is not None:
                self._store(column, X, place)
        for j, place in restart:
            self._begin(j, view, place)
            for own, seen in ((self.U, view.U), (self.V, view.V), (self.base, X)):
                _column(own, j).copy_(_column(seen, place))
            if self.system.right:
                _column(self.Y, j).zero_()
        if restart:
            places = [j for j, _ in restart]
            for j in places:
                _column(self.U, j).mul_(_reciprocal(self.columns[j].beta))
                product = self.columns[j].alpha * self.columns[j].beta
                _column(self.V, j).mul_(_reciprocal(product))
            self.reset(places)

    def _norm_of_A(self) -> float:
        """The norm of ``A`` with its damping, from below."""
        return max(self.system.norm, self.norm) if self.system.M is None else self.system.norm

    def _judge(self, column: Column, view: View, place: int, *, first: bool) -> None:
        """The status that the true quantities give a column, if any."""
        norm = self._norm_of_A()
        residual, stacked = view.residuals[place], view.stacked[place]
        gradient = view.gradients[place]
        column.true_residual = residual
        column.normal_residual = gradient / (norm * stacked) if norm * stacked > 0 else 0.0
        if not (math.isfinite(residual) and math.isfinite(gradient)):
            column.status = SolveStatus.non_finite
            return
        damped = self.recipe.damping > 0
        scale = self.norm * view.u_norms[place]
        b_norm = self.problem.b_norms[column.index]
        if not damped and residual <= self.tolerances[column.index]:
            column.status = SolveStatus.converged
        elif column.normal_residual <= self.rtol:
            column.status = SolveStatus.least_squares
        elif self.system.left and not damped and view.v_norms[place] <= self.rtol * scale:
            # The adjoint of a preconditioned problem minimises the preconditioned residual.
            column.normal_residual = view.v_norms[place] / scale
            column.status = SolveStatus.least_squares
        elif not first:
            level = self.eps * (norm * view.x_norms[place] + b_norm)
            reachable = self.tolerances[column.index] >= level
            rounding = not (damped or reachable) and residual <= rounding_limit(
                level, b_norm, self.eps
            )
            flat = self.rtol * stacked < level and gradient <= 8 * norm * level
            if rounding or (flat and column.normal_residual <= math.sqrt(self.eps)):
                column.status = SolveStatus.precision

    def _tighter(self, column: Column) -> float:
        """How much more to ask of the recurrences after their claim was not borne out."""
        tolerance = self.tolerances[column.index]
        by_residual = 0.0 if self.recipe.damping else tolerance / column.true_residual
        return min(0.9, max(1e-2, 0.9 * by_residual, 0.5 * self.rtol / column.normal_residual))

    def _begin(self, j: int, view: View, place: int) -> None:
        beta, product = view.u_norms[place], view.v_norms[place]
        alpha = product / beta if beta > 0 else 0.0
        self.norm = max(self.norm, alpha)
        self.columns[j].begin(beta, alpha)

    def _store(self, column: Column, X: Tensor, place: int) -> None:
        column.seen = True
        source = _column(X, place)[: self.problem.A.shape[1]]
        _column(self.value, column.index).copy_(source)

    def _leave(self) -> None:
        """Take the columns that have a status out of the block."""
        keep = [j for j, column in enumerate(self.columns) if column.status is None]
        if len(keep) == len(self.columns):
            return
        gone = [j for j, column in enumerate(self.columns) if column.status is not None]
        # Those that ended on the way have the iterate of the step before, not looked at yet.
        unseen = [j for j in gone if not self.columns[j].seen]
        if unseen:
            X = self._iterates(unseen)
            view = self.system.look(X, [self.columns[j].index for j in unseen])
            for place, j in enumerate(unseen):
                self._judge(self.columns[j], view, place, first=True)
                self.columns[j].status = SolveStatus.non_finite
                self._store(self.columns[j], X, place)
        self.columns = [self.columns[j] for j in keep]
        if keep:
            own = self.Y is self.base
            self.U, self.V, self.base = (take(T, keep) for T in (self.U, self.V, self.base))
            self.Y = self.base if own else take(self.Y, keep)
            self.aux = [take(T, keep) for T in self.aux]

    def _note(self, step: int) -> None:
        if not self.problem.silent:
            self.problem.note(step, [column.residual for column in self.all_columns])

    def _outcome(self) -> Outcome:
        columns = self.all_columns
        for column in columns:
            column.measure()
        info: dict[str, Any] = {
            "column_steps": [column.steps for column in columns],
            "normal_residual": [column.normal_residual for column in columns],
            "norm": self._norm_of_A(),
            "condition": _ratio(
                max(column.largest for column in columns),
                min(column.smallest for column in columns),
            ),
        }
        return Outcome(
            self.value,
            [column.status or SolveStatus.max_steps for column in columns],
            steps=max(column.steps for column in columns),
            residuals=[column.true_residual for column in columns],
            info=info,
        )


def _ratio(largest: float, smallest: float) -> float:
    if largest == 0:
        return 1.0
    return largest / smallest if smallest > 0 else math.inf


def _reciprocal(number: float) -> float:
    return 1 / number if number > 0 else 0.0


def _divide(X: Tensor, norms: Sequence[float]) -> None:
    """Divide the columns of ``X`` by their norms; zero columns stay what they are."""
    if X.dim() == 1:
        X.mul_(_reciprocal(norms[0]))
    else:
        factors = torch.tensor([_reciprocal(norm) for norm in norms], dtype=torch.float64)
        X.mul_(factors.to(X.dtype).to(X.device))


def _column(X: Tensor, j: int) -> Tensor:
    """A view of one column."""
    return X if X.dim() == 1 else X[:, j]
