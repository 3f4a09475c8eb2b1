"""What an iteration knows of one right-hand side, on the host in double precision."""

from __future__ import annotations

import math

from woodbury.solvers.columns import rounding_limit
from woodbury.solvers.solution import SolveStatus

__all__ = ["Column"]


class Column:
    """Norms, tolerance and status of one right-hand side; methods add their recurrences."""

    def __init__(
        self, index: int, tolerance: float, norm: float, b_norm: float, eps: float
    ) -> None:
        self.index = index
        self.b_norm = b_norm
        self.size = 0.0  # largest |A p| / |p| seen: from below, the norm of A
        self.level = 0.0  # what rounding of A and x makes of the residual
        self.tolerance = tolerance
        self.target = tolerance  # what the norm of the recurrence has to reach
        self.norm = self.best = norm  # of the residual by the recurrence: now, and the smallest
        self.claimed = math.inf  # true residual at the last restart
        self.eps = eps
        self.restart = True
        self.status: SolveStatus | None = None
        self.steps = 0
        self.residual: float | None = norm  # true residual of what is returned; true at the start
        if not math.isfinite(norm):
            self.status = SolveStatus.non_finite
        elif norm <= tolerance:
            self.status = SolveStatus.converged

    def advance(self, norm: float) -> bool:
        """Take the norm of the new residual; returns whether it rises from the smallest so far."""
        if not norm < math.inf:
            self.status, self.residual = SolveStatus.non_finite, None
            return False
        rising = self.norm == self.best < norm
        self.steps += 1
        self.norm, self.residual = norm, None
        if norm < self.best:
            self.best = norm
        return rising

    def verify(self, true: float, gap: float) -> None:
        """Take the true residual and its distance from that of the recurrence."""
        rounding = true <= rounding_limit(self.level, self.b_norm, self.eps)
        if not math.isfinite(true):
            self.status = SolveStatus.non_finite
        elif true <= self.tolerance:
            self.status = SolveStatus.converged
        elif rounding and self.tolerance < 0.25 * self.level:
            self.status = SolveStatus.precision  # to start again would not help
        elif gap < 0.9 * self.tolerance:
            self.target = self.tolerance - gap  # a few steps more will do
        elif true > 0.5 * self.claimed:
            self.status = SolveStatus.precision if rounding else SolveStatus.stagnation
        else:
            self.claimed = self.best = self.norm = true
            self.target, self.restart = self.tolerance, True
        self.residual = true if self.status else None
