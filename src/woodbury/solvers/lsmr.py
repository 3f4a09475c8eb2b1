"""LSMR: least squares with a residual of the normal equations that never rises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from woodbury.solvers.columns import add_columns
from woodbury.solvers.golub_kahan import Bidiagonalization, Column
from woodbury.solvers.least_squares import LeastSquares, LeastSquaresState
from woodbury.solvers.recipe import Outcome, Problem

__all__ = ["LSMR"]


@dataclass(frozen=True)
class LSMR(LeastSquares):
    r"""Least squares for any operator ``[m, n]``, by MINRES on the normal equations.

    $\min_x \|b - A x\|^2 + \lambda^2 \|x\|^2$ with $\lambda$ = ``damping``. Golub-Kahan
    bidiagonalisation, $\beta_1 u_1 = b$, $\alpha_1 v_1 = A^H u_1$, $\beta_{i+1} u_{i+1} = A v_i -
    \alpha_i u_i$, $\alpha_{i+1} v_{i+1} = A^H u_{i+1} - \beta_{i+1} v_i$, turns $A$ into a
    bidiagonal $B$; step $i$ minimises $\|A^H r_i\|$ over $x_i \in \mathrm{span}(v_1 \dots v_i)$ by
    two short QR factorisations. $\|A^H r_i\|$ and $\|r_i\|$ both fall from step to step, so the
    last iterate is the best. From $x_0 = 0$ it is the solution of smallest norm, of rank-deficient
    and of underdetermined systems too; from another ``x0`` the solution nearest to it.

    The status is ``converged`` where the true $\|b - Ax\|$ is within ``rtol`` $\|b\|$, and
    ``least_squares`` where the true $\|A^H r - \lambda^2 x\|$ is within ``rtol`` $\|A\| \|r\|$,
    with the damping counted in the norms: then $x$ solves the problem exactly for an operator that
    differs from ``A`` by a relative ``rtol``. The two are recomputed with products of their own
    when the recurrences claim either; where rounding has made them drift, the iteration starts
    again from the iterate it has. As $\|A\|$ serves an estimate from below. The columns of a block
    share each product and leave the block as they converge.

    ``info`` holds ``normal_residual`` and ``column_steps`` of each column, ``norm`` ($\|A\|$ from
    below) and ``condition``, the ratio of the extreme singular values of ``A`` met so far (with the
    preconditioner: of $AM$; with damping: of the damped operator), an estimate from below that gets
    sharp as the iteration converges.

    Args:
        rtol: tolerance of both tests.
        atol: also ``converged`` when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 min(m, n)``.
        preconditioner: ``M`` ``[n, n]`` on the right, $x = M y$, so that the iteration sees $A M$:
            ``Diagonal(1 / norms_of_columns)`` scales columns, ``R^-1`` of a sketch
            makes $A M$ nearly orthonormal, and for square systems $M \approx A^{-1}$. An operator,
            or a recipe that prepares one. Where the solution is not unique, the one of smallest
            $\|y\|$ is found; damping acts on $x$.
        damping: $\lambda \ge 0$, in units of ``A``; $\lambda^2$ is added to the eigenvalues of
            $A^H A$.

    Raises:
        ArgumentError: a tolerance, limit or the damping is negative or not a number.
        ShapeError: the preconditioner is not ``[n, n]``.

    Cost: one product with ``A`` and one with ``A.H`` per step, and one more of each for each claim
    of convergence (mostly one). Memory of 5 vectors ``[n]`` and 2 of ``[m]`` for each column.

    Source: Fong and Saunders, "LSMR: an iterative algorithm for sparse least-squares problems"
    (2011), algorithm and sections 3 and 5; Paige and Saunders (1982) for the bidiagonalisation.

    Example:
        >>> import torch
        >>> from woodbury import Dense, LSMR, solve
        >>> A = Dense(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]))
        >>> line = solve(A, torch.tensor([1.0, 1.0, 4.0]), LSMR())
        >>> line.value, line.status.name
        (tensor([0.5000, 1.5000]), 'least_squares')
        >>> line.info["normal_residual"][0] < 1e-6
        True
    """

    def _run(self, problem: Problem, state: LeastSquaresState) -> Outcome:
        return _Loop(problem, state, self).run(self.limit(problem.A))


class _Column(Column):
    """The two QR factorisations: of ``B`` to ``R``, and of ``R^H`` to a second bidiagonal one."""

    def begin(self, beta: float, alpha: float) -> None:
        super().begin(beta, alpha)
        self.alpha_bar = alpha
        self.rho = self.rho_bar = self.c_bar = 1.0
        self.s_bar = self.zeta = 0.0
        self.zeta_bar = alpha * beta
        # For the norm of the residual: the rotated right-hand side, and the last rows of a
        # triangular solve with the second factor.
        self.beta_dd, self.beta_d = beta, 0.0
        self.rho_d, self.theta_tilde, self.tau = 1.0, 0.0, 0.0
        # Factors of the updates of the vectors.
        self.of_h_bar = self.of_x = self.of_h = 0.0

    def advance(self, beta: float, alpha: float) -> None:
        self.alpha, self.beta = alpha, beta
        rho_before, rho_bar_before, zeta_before = self.rho, self.rho_bar, self.zeta
        self.rho = math.hypot(self.alpha_bar, beta)
        if self.rho == 0:  # K v = 0: there is no such direction in the range of K^H
            self.of_h_bar = self.of_x = self.of_h = self.gradient = 0.0
            return
        c, s = self.alpha_bar / self.rho, beta / self.rho
        theta = s * alpha
        self.alpha_bar = c * alpha
        theta_bar, reduced = self.s_bar * self.rho, self.c_bar * self.rho
        self.rho_bar = math.hypot(reduced, theta)
        self.c_bar, self.s_bar = reduced / self.rho_bar, theta / self.rho_bar
        self.zeta = self.c_bar * self.zeta_bar
        self.zeta_bar *= -self.s_bar
        self.of_h_bar = -theta_bar * self.rho / (rho_before * rho_bar_before)
        self.of_x = self.zeta / (self.rho * self.rho_bar)
        self.of_h = -theta / self.rho
        self.gradient = abs(self.zeta_bar)
        self._residual(c, s, theta_bar, zeta_before)

    def _residual(self, c: float, s: float, theta_bar: float, zeta_before: float) -> None:
        """``||b - A x||`` by one more rotation, without the vector."""
        beta_hat, self.beta_dd = c * self.beta_dd, -s * self.beta_dd
        theta_before = self.theta_tilde
        rho_tilde = math.hypot(self.rho_d, theta_bar)
        c_tilde, s_tilde = self.rho_d / rho_tilde, theta_bar / rho_tilde
        self.theta_tilde = s_tilde * self.rho_bar
        self.rho_d = c_tilde * self.rho_bar
        self.beta_d = c_tilde * beta_hat - s_tilde * self.beta_d
        self.tau = (zeta_before - theta_before * self.tau) / rho_tilde
        tau_d = (self.zeta - self.theta_tilde * self.tau) / self.rho_d
        self.residual = math.hypot(self.beta_d - tau_d, self.beta_dd)


class _Loop(Bidiagonalization):
    column = _Column

    def reset(self, columns: Sequence[int]) -> None:
        if not self.aux:
            self.aux = [self.V.clone(), torch.zeros_like(self.V)]
            return
        h, h_bar = self.aux
        for j in columns:
            if h.dim() == 1:
                h.copy_(self.V)
                h_bar.zero_()
            else:
                h[:, j] = self.V[:, j]
                h_bar[:, j] = 0

    def update(self) -> None:
        columns: list[_Column] = self.columns  # type: ignore[assignment]
        h, h_bar = self.aux
        add_columns(h, [column.of_h_bar for column in columns], h_bar, out=h_bar)
        add_columns(self.Y, [column.of_x for column in columns], h_bar, out=self.Y)
        add_columns(self.V, [column.of_h for column in columns], h, out=h)
