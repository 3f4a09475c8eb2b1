"""The scalars of conjugate gradients for one right-hand side, on the host in double precision."""

from __future__ import annotations

import math

from woodbury.solvers.solution import SolveStatus

__all__ = ["Column"]


class Column:
    """The scalar recurrences of one right-hand side."""

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
        self.rz = math.nan
        self.metric = math.nan  # <p, M^-1 p>
        # Rows of the tridiagonal matrix of Lanczos, whose eigenvalues are those of M A: by
        # Gershgorin the largest sum of a row bounds the largest eigenvalue found so far.
        self.alpha = self.row = self.above = 0.0
        self.top = 0.0
        self.beta = 0.0
        self.restart = True
        self.status: SolveStatus | None = None
        self.steps = 0
        self.residual: float | None = None  # true residual of what is returned

    def direct(self, rz: float) -> bool:
        """Take <r, z> of the new residual and find beta; returns whether that ends the column."""
        if not 0 < rz < math.inf:
            self.status = (
                SolveStatus.indefinite_preconditioner
                if math.isfinite(rz)
                else SolveStatus.non_finite
            )
            return True
        if self.restart:
            self.beta, self.metric, self.above, self.restart = 0.0, rz, 0.0, False
        else:
            beta = self.beta = rz / self.rz
            # r is orthogonal to the last p, so the norms of z and beta p in M^-1 add up.
            self.metric = rz + beta * beta * self.metric
            coupling = math.sqrt(beta) / self.alpha
            self.above = coupling + beta / self.alpha
            if self.row + coupling > self.top:
                self.top = self.row + coupling
        self.rz = rz
        return False

    def length(self, curvature: float) -> float:
        """The step length from <p, A p>; 0 with a status where there is none."""
        ratio = curvature / self.metric
        noise = self.eps * self.top
        if noise < ratio < math.inf:
            alpha = self.alpha = self.rz / curvature
            if 0 < alpha < math.inf:
                self.row = self.above + 1 / alpha
                return alpha
        if not math.isfinite(ratio):
            self.status = SolveStatus.non_finite
        elif ratio < -noise:
            self.status = SolveStatus.negative_curvature
        else:
            self.status = SolveStatus.breakdown
        return 0.0

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
        rounding = true <= min(8 * self.level, 0.1 * self.b_norm)
        if true <= self.tolerance:
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
