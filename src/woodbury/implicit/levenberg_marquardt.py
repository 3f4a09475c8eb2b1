"""Nonlinear least squares: Gauss-Newton and Levenberg-Marquardt, for batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, GradientError, NonFiniteError
from woodbury.implicit.condition import Condition
from woodbury.implicit.iteration import Found, InnerSolver, IterationStatus, Rows

__all__ = ["LevenbergMarquardt"]


@dataclass(frozen=True)
class LevenbergMarquardt(InnerSolver):
    r"""Minimise $\tfrac12\|r(x, \theta)\|^2$ by steps that minimise a linear model of $r$.

    $\delta = \arg\min \|r + J\delta\|^2 + \lambda \|D\delta\|^2$, by a QR factorisation of the
    stacked matrix, so that no condition number is squared. $D$ holds the largest norms of the
    columns of $J$ so far, which makes the steps independent of the units of $x$. With the gain
    $\rho$ (actual over predicted decrease) a step is taken if $\rho > 0$; then $\lambda$ is
    multiplied by $\max(1/3, 1 - (2\rho - 1)^3)$, otherwise by 2, 4, 8, ... Every row of a batch has
    its own $\lambda$. ``damping=0`` is Gauss-Newton, which halves its step instead.

    Called ``run(r, x0, *args)``; the condition of its ``differentiable(r)`` is the minimum of the
    half sum of squares, so derivatives hold for large residuals as well (they use the full Hessian,
    not $J^T J$).

    Args:
        tol: converged when the cosine between ``r`` and every column of $J$ is at most ``tol``, or
            the Gauss-Newton step is below ``tol`` of ``x`` (both in units of $D$), or ``r`` is
            down to rounding.
        max_steps: limit of evaluations of ``r``.
        batched: ``r`` maps ``[B, ...]`` to ``[B, m]`` row by row.
        damping: first $\lambda$.

    Raises:
        ArgumentError: a setting makes no sense.

    Cost: an evaluation with its Jacobian, ``m`` backward passes taken at once, and a factorisation
    of ``[m + n, n]`` per step.

    Source: Moré, "The Levenberg-Marquardt algorithm" (1978); Nielsen, "Damping parameter in
    Marquardt's method" (1999), for $\lambda$.

    Example:
        >>> import torch
        >>> from woodbury.implicit import LevenbergMarquardt
        >>> x = torch.linspace(0, 1, 10).double()
        >>> y = 2 * torch.exp(-3 * x)
        >>> fit = LevenbergMarquardt()
        >>> fit.run(lambda b: b[0] * torch.exp(-b[1] * x) - y, torch.ones(2).double()).value
        tensor([2.0000, 3.0000], dtype=torch.float64)
    """

    damping: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping < math.inf:
            raise ArgumentError(f"damping is {self.damping}; it must be >= 0")

    def condition(self, function: Callable[..., Any]) -> Condition:
        """The minimum of the half sum of squares."""

        def half_squares(x: Any, *args: Any) -> Tensor:
            return 0.5 * (function(x, *args) ** 2).sum()

        half_squares.__wrapped__ = function  # type: ignore[attr-defined]
        half_squares.__name__ = getattr(function, "__name__", "r")
        return Condition.of(half_squares, "minimum")

    def _linearised(
        self, rows: Rows, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Residuals ``[B, m]`` and Jacobians ``[B, m, n]`` at rows."""

        def evaluate(X: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                at = X.detach().requires_grad_()
                r = function(rows.unpack(at), *args)
                if not isinstance(r, Tensor) or r.dim() != 1 + rows.batched:
                    shape = tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__
                    raise GradientError(
                        f"the residual is {shape}, expected {'[B, m]' if rows.batched else '[m]'}"
                    )
                r = r.reshape(rows.count, -1).to(X.dtype)
                if not r.requires_grad:
                    raise GradientError("the residual does not depend on x")
                m = r.shape[1]
                units = torch.eye(m, dtype=r.dtype, device=r.device)[:, None].expand(m, *r.shape)
                (J,) = torch.autograd.grad(r, at, units, is_grads_batched=True)
            return r.detach(), J.movedim(0, 1)

        return evaluate

    def _run(
        self, rows: Rows, X: Tensor, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> Found:
        evaluate = self._linearised(rows, function, args)
        r, J = evaluate(X)
        if not bool(torch.isfinite(r).all() and torch.isfinite(J).all()):
            raise NonFiniteError("the residual or its Jacobian is NaN or infinite at the start x0")
        tiny, eps = torch.finfo(X.dtype).tiny, torch.finfo(X.dtype).eps
        first = torch.linalg.vector_norm(r, dim=1)
        D = torch.linalg.vector_norm(J, dim=1)
        D = torch.where(D > 0, D, 1.0)
        lam = X.new_full((rows.count, 1), self.damping)
        growth = torch.full_like(lam, 2.0)
        length = torch.ones_like(lam)
        done = torch.zeros(rows.count, dtype=torch.bool, device=X.device)
        statuses: list[IterationStatus | None] = [None] * rows.count
        steps = 0
        while True:
            size = torch.linalg.vector_norm(r, dim=1)
            columns = torch.linalg.vector_norm(J, dim=1)
            slope = torch.einsum("bmn,bm->bn", J, r)
            cosines = (slope.abs() / (columns * size[:, None]).clamp_min(tiny)).amax(1)
            newton = _step(J, r, D, torch.zeros_like(lam))
            relative = torch.linalg.vector_norm(D * newton, dim=1)
            relative = relative / torch.linalg.vector_norm(D * X, dim=1).clamp_min(tiny)
            solved = (cosines <= self.tol) | (relative <= self.tol) | (size <= eps * first)
            stuck = (lam.squeeze(1) > 1e20) | (length.squeeze(1) < 1e-20)
            for row in ((solved | stuck) & ~done).nonzero().flatten().tolist():
                ok = bool(solved[row])
                statuses[row] = IterationStatus.converged if ok else IterationStatus.stagnation
                done[row] = True
            if steps >= self.max_steps or None not in statuses:
                break
            steps += 1
            move = length * (_step(J, r, D, lam) if self.damping > 0 else newton)
            trial = torch.where(done[:, None], X, X + move)
            new_r, new_J = evaluate(trial)
            # Differences of squares as products: they hold where the squares agree to rounding.
            along = torch.einsum("bmn,bn->bm", J, move)
            predicted = -(along * (2 * r + along)).sum(1)
            gain = ((r - new_r) * (r + new_r)).sum(1) / predicted.clamp_min(tiny)
            finite = torch.isfinite(new_r).all(1) & torch.isfinite(new_J).all(2).all(1)
            # Below rounding the gradient decides.
            new_slope = torch.einsum("bmn,bm->bn", new_J, new_r) / D
            flatter = torch.linalg.vector_norm(new_slope, dim=1) < torch.linalg.vector_norm(
                slope / D, dim=1
            )
            flat = predicted <= 100 * eps * size**2
            accepted = (finite & torch.where(flat, flatter, gain > 0) & ~done)[:, None]
            X = torch.where(accepted, trial, X)
            r, J = torch.where(accepted, new_r, r), torch.where(accepted[:, :, None], new_J, J)
            D = torch.maximum(D, torch.linalg.vector_norm(J, dim=1))
            if self.damping > 0:
                easier = (1 - (2 * gain[:, None] - 1) ** 3).clamp(1 / 3, 1.0)
                lam = torch.where(accepted, lam * easier, lam * growth)
                growth = torch.where(accepted, 2.0, 2 * growth)
            else:
                length = torch.where(accepted, 1.0, length / 2)
        named = [IterationStatus.max_steps if status is None else status for status in statuses]
        return rows.found(X, named, torch.minimum(cosines, relative), steps)


def _step(J: Tensor, r: Tensor, D: Tensor, lam: Tensor) -> Tensor:
    """The minimiser of ``|r + J s|^2 + lam |D s|^2``, of smallest norm in units of ``D``."""
    n = J.shape[2]
    scaled = J / D[:, None]
    damped = torch.diag_embed(lam.sqrt().expand(-1, n))
    matrix = torch.cat([scaled, damped], dim=1)
    right = torch.cat([-r, r.new_zeros(r.shape[0], n)], dim=1)
    Q, R = torch.linalg.qr(matrix)
    found = torch.linalg.solve_triangular(R, (Q.mT @ right[:, :, None]), upper=True).squeeze(2)
    bad = ~torch.isfinite(found).all(1)
    if bool(bad.any()):  # a Jacobian without full rank
        lesser = torch.linalg.pinv(matrix) @ right[:, :, None]
        found = torch.where(bad[:, None], lesser.squeeze(2), found)
    return found / D
