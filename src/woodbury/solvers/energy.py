"""What conjugate gradients know of their error when they have ended."""

from __future__ import annotations

import math

from woodbury.errors import ArgumentError
from woodbury.solvers.certificate import (
    EnergyHistory,
    ErrorBound,
    Guarantee,
    energy_history,
    smallest_ritz_value,
)
from woodbury.solvers.cg_column import CGColumn
from woodbury.solvers.recipe import Problem
from woodbury.solvers.solution import SolveStatus
from woodbury.solvers.spectrum_bounds import smallest_eigenvalue_bound

__all__ = ["EnergyBounds"]

# An estimate of the smallest eigenvalue stays below the smallest Ritz value by this factor.
_CAUTION = 0.5
# How far rounding takes a Ritz value below the smallest eigenvalue.
_ROUNDING = 1e-6


class EnergyBounds:
    r"""Bounds on $\|x - A^{-1}b\|_A$ for the columns of a block.

    The recurrence's residual $r$ and the true one differ by rounding, $d$: to the bound of
    quadrature, which is of $A^{-1} r$, comes $\|d\| / \sqrt\mu$. And $\|b - A x\| / \sqrt\mu$ with
    the true residual is a bound as well; the smaller one is taken.

    Args:
        problem: the block.
        smallest: $\mu \le \lambda_{min}(A)$, or ``None``.
        preconditioned: whether the scalars are those of ``M A``, whose eigenvalues a bound on those
            of ``A`` does not bound.
    """

    def __init__(self, problem: Problem, smallest: float | None, *, preconditioned: bool) -> None:
        self.problem = problem
        self.given = smallest
        self.preconditioned = preconditioned
        self.known = smallest_eigenvalue_bound(problem.A) if smallest is None else smallest
        self.histories: list[EnergyHistory | None] = []

    def of(self, column: CGColumn) -> ErrorBound:
        """The bound or estimate of one column, for the value that is returned."""
        scale = self.problem.scales[column.index]
        residual = math.nan if column.residual is None else column.residual * scale
        trace = column.trace or []
        lengths = [length for length, _ in trace]
        squares = [square * scale**2 for _, square in trace]
        if not self.preconditioned and column.norm > 0 and column.status is not _BROKEN:
            squares.append((column.norm * scale) ** 2)
        bound = None if self.known is None else residual / math.sqrt(self.known)
        if not lengths:
            self.histories.append(None)
            if bound is not None:
                return self._bound(bound, math.nan)
            return ErrorBound(math.nan, Guarantee.estimate, "energy", math.nan)
        ritz = smallest_ritz_value(lengths, squares)
        if not self.preconditioned:
            self._check(ritz)
        quadrature = self.known is not None and not self.preconditioned
        mu = self.known if quadrature and self.known is not None else _CAUTION * ritz
        history = energy_history(lengths, squares, mu)
        self.histories.append(history)
        start = self.problem.x0 is None and not column.restarted
        size = history.energy if start else math.nan
        ended_here = column.status not in (_BROKEN, SolveStatus.non_finite)
        gap = column.gap if column.status is not None and column.status.ok else None
        if bound is not None:
            if quadrature and ended_here and gap is not None:
                bound = min(bound, history.last + gap * scale / math.sqrt(mu))
            return self._bound(bound, size)
        value = history.last + (gap or 0.0) * scale / math.sqrt(mu)
        return ErrorBound(value, Guarantee.estimate, "energy", mu, value / size)

    def _bound(self, value: float, size: float) -> ErrorBound:
        assert self.known is not None
        return ErrorBound(value, Guarantee.bound, "energy", self.known, value / size)

    def _check(self, ritz: float) -> None:
        """A Ritz value is never below the smallest eigenvalue."""
        if self.given is not None and self.given > ritz * (1 + _ROUNDING):
            raise ArgumentError(
                f"error_bound is {self.given:.6g}, but the operator has an eigenvalue of at most "
                f"{ritz:.6g}: give a lower bound on the smallest eigenvalue, or True"
            )


_BROKEN = SolveStatus.breakdown
