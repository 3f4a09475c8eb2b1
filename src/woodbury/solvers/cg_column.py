"""The scalars of conjugate gradients for one right-hand side, on the host in double precision."""

from __future__ import annotations

import math

from woodbury.solvers.column import Column
from woodbury.solvers.solution import SolveStatus

__all__ = ["CGColumn"]


class CGColumn(Column):
    """The scalar recurrences of one right-hand side."""

    def __init__(
        self, index: int, tolerance: float, norm: float, b_norm: float, eps: float
    ) -> None:
        super().__init__(index, tolerance, norm, b_norm, eps)
        self.rz = math.nan
        self.metric = math.nan  # <p, M^-1 p>
        # Rows of the tridiagonal matrix of Lanczos, whose eigenvalues are those of M A: by
        # Gershgorin the largest sum of a row bounds the largest eigenvalue found so far.
        self.alpha = self.row = self.above = 0.0
        self.top = 0.0
        self.beta = 0.0
        # For bounds on the error, where asked for: alpha and <r, z> of the steps since the start.
        self.trace: list[tuple[float, float]] | None = None
        self.gap: float | None = None  # between the true residual and that of the recurrence
        self.restarted = False

    def verify(self, true: float, gap: float) -> None:
        """Take the true residual; a new start begins a new Krylov space."""
        super().verify(true, gap)
        self.gap = gap
        if self.restart and self.trace is not None:
            self.trace.clear()
            self.restarted, self.gap = True, None

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
                if self.trace is not None:
                    self.trace.append((alpha, self.rz))
                return alpha
        if not math.isfinite(ratio):
            self.status = SolveStatus.non_finite
        elif ratio < -noise:
            self.status = SolveStatus.negative_curvature
        else:
            self.status = SolveStatus.breakdown
        return 0.0
