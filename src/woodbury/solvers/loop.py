"""The loop that Krylov methods share: columns of a block that leave it one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from woodbury.solvers.column import Column
from woodbury.solvers.columns import norms, take
from woodbury.solvers.preconditioned import preconditioning
from woodbury.solvers.recipe import Outcome, Problem
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator
    from woodbury.spaces import Space

__all__ = ["Loop", "column_of"]

# Steps from one look at the size of rounding to the next.
LOOK = 50

C = TypeVar("C", bound=Column)


class Loop(Generic[C]):
    """Iterates ``X`` and residuals ``R`` of the running columns, and the values of those done.

    A subclass names in ``blocks`` the tensors that lose the columns which leave, and gives
    ``advance``. One column runs on plain vectors ``[n]``.
    """

    blocks: ClassVar[tuple[str, ...]] = ("X", "R")
    # Whether the start is returned where a failure has left a larger residual than it had: not
    # where the method minimises something else on its way, as CG does the energy.
    keeps_start: ClassVar[bool] = False

    def __init__(
        self,
        problem: Problem,
        M: LinearOperator | None,
        tolerances: Sequence[float],
        column: Callable[[int, float, float, float, float], C],
    ) -> None:
        self.problem = problem
        self.space: Space = problem.A.space
        self.precondition = preconditioning(M)
        self.X, self.R = problem.start()
        self.eps = torch.finfo(self.X.dtype).eps
        known = problem.b_norms if problem.x0 is None else norms(self.space, self.R)
        self.columns = [
            column(j, tolerance, norm, b_norm, self.eps)
            for j, (tolerance, norm, b_norm) in enumerate(
                zip(tolerances, known, problem.b_norms, strict=True)
            )
        ]
        self.all_columns = list(self.columns)
        self.begun = list(known)
        self.value = self.X if self.X.dim() == 1 else torch.zeros_like(self.X)
        self.best: Tensor | None = None
        self.silent = problem.silent
        self.info: dict[str, Any] = {}

    def run(self, limit: int) -> Outcome:
        """Up to ``limit`` steps."""
        step = 0
        self.note(step)
        self.leave()
        while self.columns and step < limit:
            self.turn()
            if not self.columns:
                break
            step += 1
            self.advance(look=step % LOOK == 0 or step == 1)
            if not self.silent:
                self.note(step)
        self.finish()
        for column in self.columns:
            column.status = column.status or SolveStatus.max_steps
        self.leave()
        return self.outcome()

    def finish(self) -> None:
        """Bring the iterates up to date where the limit of steps has come."""

    def turn(self) -> None:
        """What comes before a step and may end columns."""

    def advance(self, *, look: bool) -> None:
        """One step; every now and then with a look at the size of rounding."""
        raise NotImplementedError

    def prefers_best(self, column: C) -> bool:
        """Whether the iterate of smallest residual is returned where the last one is worse."""
        return False

    def keep_best(self, rising: Sequence[int]) -> None:
        """Keep the iterate of smallest residual, in case it does not come back."""
        if self.best is None:
            self.best = torch.empty_like(self.value)
        if self.value.dim() == 1:
            self.best.copy_(self.X)
        else:
            self.best[:, [self.columns[j].index for j in rising]] = take(self.X, rising)

    def measure(self, P: Tensor, Q: Tensor) -> None:
        """How large rounding in ``A`` and ``x`` makes the residual: eps (|A| |x| + |b|).

        ``|A|`` is known from below by the products ``Q = A P`` seen so far.
        """
        sizes = zip(*(norms(self.space, T) for T in (self.X, P, Q)), strict=True)
        for column, (x, p, q) in zip(self.columns, sizes, strict=True):
            column.size = max(column.size, q / p if p > 0 else 0.0)
            column.level = self.eps * (column.size * x + column.b_norm)

    def verify(self, claims: list[int]) -> None:
        """Compute the true residual of the columns that claim to have converged."""
        if self.value.dim() == 1:
            true = self.problem.residual(self.X)
            gap = true - self.R
        else:
            true = self.problem.residual(
                take(self.X, claims), [self.columns[j].index for j in claims]
            )
            gap = true - take(self.R, claims)
        found = zip(norms(self.space, true), norms(self.space, gap), strict=True)
        for position, (j, (norm, distance)) in enumerate(zip(claims, found, strict=True)):
            column = self.columns[j]
            column.verify(norm, distance)
            if column.restart:
                column_of(self.R, j).copy_(column_of(true, position))

    def leave(self) -> list[int]:
        """Take the columns that have a status out of the block; returns those kept."""
        keep = [j for j, column in enumerate(self.columns) if column.status is None]
        if len(keep) == len(self.columns):
            return keep
        for j, column in enumerate(self.columns):
            if column.status is None:
                continue
            source = column_of(self.X, j)
            if column.best < column.norm and self.prefers_best(column):
                assert self.best is not None  # kept when the residual rose
                source, column.residual = column_of(self.best, column.index), None
            if source is not self.value:
                column_of(self.value, column.index).copy_(source)
        self.columns = [self.columns[j] for j in keep]
        if keep:
            for name in self.blocks:
                setattr(self, name, take(getattr(self, name), keep))
            self.keep(keep)
        return keep

    def keep(self, columns: list[int]) -> None:
        """Drop all but some columns of what else there is."""

    def note(self, step: int) -> None:
        """Tell those who listen."""
        if not self.silent:
            self.problem.note(step, [column.norm for column in self.all_columns])

    def outcome(self) -> Outcome:
        """The value with true residuals, computed for the columns where it is not known yet."""
        columns = self.all_columns
        unknown = [c.index for c in columns if c.residual is None]
        if unknown:
            X = self.value if self.value.dim() == 1 else take(self.value, unknown)
            found = norms(self.space, self.problem.residual(X, unknown))
            for j, norm in zip(unknown, found, strict=True):
                columns[j].residual = norm
        if self.keeps_start:
            self.back_to_start()
        self.info["column_steps"] = [column.steps for column in columns]
        return Outcome(
            self.value,
            [column.status or SolveStatus.max_steps for column in columns],
            steps=max(column.steps for column in columns),
            residuals=[math.nan if c.residual is None else c.residual for c in columns],
            info=self.info,
        )

    def back_to_start(self) -> None:
        """Return the start, not an iterate that failed and has a larger residual, or none."""
        for column in self.all_columns:
            before, now = self.begun[column.index], column.residual
            if column.status is None or column.status.ok or not math.isfinite(before):
                continue
            if now is not None and now <= before:
                continue
            target = column_of(self.value, column.index)
            if self.problem.x0 is None:
                target.zero_()
            else:
                target.copy_(column_of(self.problem.x0, column.index))
            column.residual = before


def column_of(X: Tensor, j: int) -> Tensor:
    """A view of one column."""
    return X if X.dim() == 1 else X[:, j]
