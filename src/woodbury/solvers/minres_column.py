"""The scalars of MINRES for one right-hand side, on the host in double precision."""

from __future__ import annotations

import math

from woodbury.solvers.column import Column
from woodbury.solvers.solution import SolveStatus

__all__ = ["MINRESColumn"]


class MINRESColumn(Column):
    """The tridiagonal matrix of Lanczos and the rotations that make it triangular."""

    def __init__(
        self, index: int, tolerance: float, norm: float, b_norm: float, eps: float
    ) -> None:
        super().__init__(index, tolerance, norm, b_norm, eps)
        self.scale = 0.0  # largest norm of a column of the tridiagonal matrix: from below, |M A|
        self.normal_residual = math.nan
        # |A r| / |A| |r| now, and at the iterate that may turn out to minimise |r|.
        self.ratio = self.saved_ratio = math.inf
        self.saved_norm = self.saved_phi = math.inf
        self.phi_before = math.inf  # residual in the norm of M before this step
        self.saved_step = 0
        self.kept = math.inf  # residual of the iterate that is kept
        self.kept_size = math.inf  # and its norm, where it was kept for its ratio
        self.limit = eps**0.6  # of the ratio, below which to look at once
        self.exhausted = False

    def begin(self, square: float) -> bool:
        """Start from a residual with <r, M r> = ``square``; returns whether there is a start."""
        self.restart = self.exhausted = False
        if not 0 < square < math.inf:
            finite = math.isfinite(square)
            self.status = (
                SolveStatus.indefinite_preconditioner if finite else SolveStatus.non_finite
            )
            self.inverse_beta = 0.0
            return False
        self.phi = math.sqrt(square)  # residual in the norm of M, with a sign
        self.inverse_beta = 1 / self.phi
        self.beta = 0.0  # couples this Lanczos vector to the one before
        self.c = self.c_old = 1.0
        self.s = self.s_old = 0.0
        self.gamma = self.gamma_old = 1.0  # diagonal of the triangular factor
        return True

    def rotate(self, alpha: float, square: float) -> None:
        """Take <z, A z> and <q, M q> of what is left of ``A z``; find lengths and the residual."""
        self.stay()
        self.phi_before = abs(self.phi)
        if not (math.isfinite(alpha) and math.isfinite(square)):
            self.status = SolveStatus.non_finite
            self.inverse_beta = 0.0
            return
        scale = max(self.scale, math.hypot(alpha, self.beta))
        if square < -((10 * self.eps * scale) ** 2):
            self.status = SolveStatus.indefinite_preconditioner
            self.inverse_beta = 0.0
            return
        beta = math.sqrt(max(square, 0.0))
        self.scale = scale = max(scale, math.hypot(alpha, self.beta, beta))
        passed = self.c_old * self.beta
        epsilon, delta = self.s_old * self.beta, self.c * passed + self.s * alpha
        diagonal = self.c * alpha - self.s * passed
        noise = 20 * self.eps * scale
        self.exhausted = beta <= noise
        self.inverse_beta = 1 / beta if beta > 0 else 0.0
        # Of the residual before this step.
        self.ratio = math.hypot(diagonal, self.c * beta) / scale if scale else 0.0
        gamma = math.hypot(diagonal, beta)
        if gamma <= noise:
            return
        self.from_last, self.from_older = -delta / self.gamma, -epsilon / self.gamma_old
        self.c_old, self.s_old = self.c, self.s
        self.c, self.s = diagonal / gamma, beta / gamma
        self.length = self.c * self.phi / gamma
        self.phi *= -self.s
        self.keep, self.take = self.s * self.s, self.c * self.phi
        self.gamma_old, self.gamma, self.beta = self.gamma, gamma, beta

    def stay(self) -> None:
        """Take this step back."""
        self.length = self.from_last = self.from_older = self.take = 0.0
        self.keep = 1.0

    def may_be_kept(self, *, look: bool) -> bool:
        """Whether ``A r`` is small and smaller than before: see ``is_suspect``.

        Every now and then an iterate is kept in any case: where there is no solution, the next ones
        may grow without bound.
        """
        if self.ratio <= min(math.sqrt(self.eps), 0.5 * self.saved_ratio):
            return True
        return look and self.saved_ratio == math.inf

    def is_kept(self, size: float) -> bool:
        """Take the norm of the iterate: one that has grown, and nothing else, is not kept."""
        if size > 10 * self.kept_size and self.norm > 0.5 * self.kept:
            return False
        if self.ratio <= math.sqrt(self.eps):
            self.saved_ratio, self.saved_norm, self.saved_step = self.ratio, self.norm, self.steps
            self.saved_phi = self.phi_before
            self.kept_size = size
        self.kept = self.norm
        return True

    def is_suspect(self) -> bool:
        r"""Whether the iterate that was kept is likely to be the least-squares solution.

        A solution would be at least $|r|^2 / |A r|$ away, and rounding of a vector of that size
        leave more of a residual than the tolerance; or a tenth more steps did not lower it.
        """
        if self.saved_ratio > math.sqrt(self.eps) or self.phi_before < 0.999 * self.saved_phi:
            return False
        least = max(self.tolerance, self.eps**0.75 * self.b_norm)
        out_of_reach = self.eps * self.saved_norm >= least * self.saved_ratio
        if self.saved_ratio <= self.limit and out_of_reach:
            return True
        return self.steps >= self.saved_step + max(3, 0.1 * self.saved_step)

    def judge(self, true: float) -> None:
        """Take the true residual; without the residual vector the drift is that of its norm."""
        self.verify(true, math.inf if self.exhausted else abs(true - self.norm))
