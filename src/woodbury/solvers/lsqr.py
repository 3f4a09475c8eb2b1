"""LSQR: least squares with a residual that never rises."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from woodbury.solvers.columns import add_columns
from woodbury.solvers.golub_kahan import Bidiagonalization, Column
from woodbury.solvers.least_squares import LeastSquares, LeastSquaresState
from woodbury.solvers.recipe import Outcome, Problem

__all__ = ["LSQR"]

# Steps over which the error is estimated.
_DELAY = 5


@dataclass(frozen=True)
class LSQR(LeastSquares):
    r"""Least squares for any operator ``[m, n]``, by conjugate gradients on the normal equations.

    $\min_x \|b - A x\|^2 + \lambda^2 \|x\|^2$ with $\lambda$ = ``damping``: the same
    bidiagonalisation, tests, statuses and ``info`` as :class:`~woodbury.LSMR`, but step $i$
    minimises $\|r_i\|$ instead of $\|A^H r_i\|$: $x = x + (\phi / \rho)\, w$, $w = v - (\theta /
    \rho)\, w$ with the entries $\rho, \theta$ of the QR factorisation of ``B``. Where the residual
    is what counts it is ahead by a little; where $\|A^H r\|$ is, LSMR stops earlier.

    ``info["local_error"]`` is, for each column, $\|A (x_i - x_{i-5})\| / \|b\|$ (of the damped
    operator, if it is damped): at no cost, a lower bound of $\|A (x^* - x_{i-5})\| / \|b\|$.

    Args:
        rtol: tolerance of both tests, of $\|b - A x\| / \|b\|$ and of
            $\|A^H r - \lambda^2 x\| / (\|A\| \|r\|)$.
        atol: also ``converged`` when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 min(m, n)``.
        preconditioner: ``M`` ``[n, n]`` on the right, $x = M y$; see :class:`~woodbury.LSMR`.
        damping: $\lambda \ge 0$, in units of ``A``.

    Raises:
        ArgumentError: a tolerance, limit or the damping is negative or not a number.
        ShapeError: the preconditioner is not ``[n, n]``.

    Cost: one product with ``A`` and one with ``A.H`` per step, and one more of each for each claim
    of convergence. Memory of 4 vectors ``[n]`` and 2 of ``[m]`` for each column.

    Source: Paige and Saunders, "LSQR: an algorithm for sparse linear equations and sparse least
    squares" (1982).

    Example:
        >>> import torch
        >>> from woodbury import Dense, LSQR, solve
        >>> A = Dense(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
        >>> solution = solve(A, torch.tensor([1.0, 2.0]), LSQR())
        >>> solution.value.abs().round(decimals=4), solution.status.name
        (tensor([0., 1., 1.]), 'converged')
    """

    def _run(self, problem: Problem, state: LeastSquaresState) -> Outcome:
        loop = _Loop(problem, state, self)
        outcome = loop.run(self.limit(problem.A))
        columns: list[_Column] = loop.all_columns  # type: ignore[assignment]
        outcome.info["local_error"] = [
            math.hypot(*column.recent) / b_norm
            for column, b_norm in zip(columns, problem.b_norms, strict=True)
        ]
        return outcome


class _Column(Column):
    """The QR factorisation of ``B``."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.recent: deque[float] = deque(maxlen=_DELAY)

    def begin(self, beta: float, alpha: float) -> None:
        super().begin(beta, alpha)
        self.rho_bar, self.phi_bar = alpha, beta
        self.of_x = self.of_w = 0.0

    def advance(self, beta: float, alpha: float) -> None:
        self.alpha, self.beta = alpha, beta
        rho = math.hypot(self.rho_bar, beta)
        if rho == 0:  # K v = 0: there is no such direction in the range of K^H
            self.of_x = self.of_w = self.gradient = 0.0
            return
        c, s = self.rho_bar / rho, beta / rho
        theta = s * alpha
        self.rho_bar = -c * alpha
        phi = c * self.phi_bar
        self.phi_bar *= s
        self.of_x, self.of_w = phi / rho, -theta / rho
        self.recent.append(phi)
        self.residual = abs(self.phi_bar)
        self.gradient = abs(self.phi_bar * alpha * c)


class _Loop(Bidiagonalization):
    column = _Column

    def reset(self, columns: Sequence[int]) -> None:
        if not self.aux:
            self.aux = [self.V.clone()]
            return
        (w,) = self.aux
        for j in columns:
            if w.dim() == 1:
                w.copy_(self.V)
            else:
                w[:, j] = self.V[:, j]

    def update(self) -> None:
        columns: list[_Column] = self.columns  # type: ignore[assignment]
        (w,) = self.aux
        add_columns(self.Y, [column.of_x for column in columns], w, out=self.Y)
        add_columns(self.V, [column.of_w for column in columns], w, out=w)
