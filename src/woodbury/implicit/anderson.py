"""Anderson acceleration of a fixed-point iteration, for batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, NonFiniteError
from woodbury.implicit.condition import Condition
from woodbury.implicit.iteration import Found, InnerSolver, IterationStatus, Rows

__all__ = ["Anderson"]


@dataclass(frozen=True)
class Anderson(InnerSolver):
    r"""Anderson acceleration of $x \leftarrow T(x)$: the best mixture of the last iterates.

    With $r_i = T(x_i) - x_i$ of the last ``memory`` iterates, $\alpha$ minimises
    $\|\sum_i \alpha_i r_i\|^2 + \rho\,\bar r^2 \|\alpha\|^2$, $\sum_i\alpha_i = 1$, and
    $x^+ = \sum_i \alpha_i (x_i + \beta r_i)$; $\bar r^2$ is the mean square of the residuals, so
    that $\rho$ has no unit. Every row of a batch has its own mixture. For a linear map with
    unlimited memory and $\rho = 0$ it is GMRES.

    Args:
        tol: converged when $\|T(x) - x\| \le$ ``tol`` $\max(1, \|x\|)$.
        max_steps: limit of evaluations of the map.
        batched: ``T`` maps ``[B, ...]`` row by row.
        memory: how many iterates are mixed; 1 is the plain iteration.
        mixing: $\beta$ in $(0, 1]$.
        ridge: $\rho \ge 0$.

    Raises:
        ArgumentError: a setting makes no sense.

    Cost: one evaluation per step, memory of ``2 memory`` vectors.

    Source: Anderson, "Iterative procedures for nonlinear integral equations" (1965); Walker and Ni,
    "Anderson acceleration for fixed-point iterations" (2011).

    Example:
        >>> import torch
        >>> from woodbury.implicit import Anderson
        >>> found = Anderson(tol=1e-12).run(torch.cos, torch.ones(1).double())
        >>> found.steps < 12, found.value
        (True, tensor([0.7391], dtype=torch.float64))
    """

    memory: int = 5
    mixing: float = 1.0
    ridge: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ArgumentError(f"memory is {self.memory}; at least one iterate is kept")
        if not 0 < self.mixing <= 1:
            raise ArgumentError(f"mixing is {self.mixing}; it must be in (0, 1]")
        if not 0 <= self.ridge < math.inf:
            raise ArgumentError(f"ridge is {self.ridge}; it must be >= 0")

    def condition(self, function: Callable[..., Any]) -> Condition:
        """A fixed point."""
        return Condition.of(function, "fixed_point")

    def _run(
        self, rows: Rows, X: Tensor, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> Found:
        def residual(X: Tensor) -> Tensor:
            found = function(rows.unpack(X), *args)
            rows.unknown.flatten(found, "the value of T")  # says what is wrong with it
            return rows.pack(found) - X

        statuses: list[IterationStatus | None] = [None] * rows.count
        points: list[Tensor] = []
        residuals: list[Tensor] = []
        best, smallest = X, torch.full((rows.count,), math.inf, dtype=X.dtype, device=X.device)
        done = torch.zeros(rows.count, dtype=torch.bool, device=X.device)
        steps = 0
        while True:
            R = residual(X)
            norms = torch.linalg.vector_norm(R, dim=1)
            finite = torch.isfinite(norms)
            if steps == 0 and not bool(finite.all()):
                raise NonFiniteError("the map is NaN or infinite at the start x0")
            better = (norms < smallest) & ~done
            best = torch.where(better[:, None], X, best)
            smallest = torch.where(better, norms, smallest)
            scale = torch.linalg.vector_norm(X, dim=1).clamp_min(1.0)
            ended = (norms <= self.tol * scale) | ~finite
            for row in (ended & ~done).nonzero().flatten().tolist():
                ok = bool(finite[row])
                statuses[row] = IterationStatus.converged if ok else IterationStatus.diverged
            done |= ended
            if steps >= self.max_steps or None not in statuses:
                break
            steps += 1
            points, residuals = [*points, X][-self.memory :], [*residuals, R][-self.memory :]
            mixed = self._mixed(torch.stack(points, 1), torch.stack(residuals, 1))
            X = torch.where(done[:, None], best, mixed)
        named = [IterationStatus.max_steps if status is None else status for status in statuses]
        return rows.found(best, named, smallest, steps)

    def _mixed(self, P: Tensor, R: Tensor) -> Tensor:
        """The next iterate from points and residuals ``[B, m, n]``."""
        m = P.shape[1]
        if m == 1:
            return P[:, 0] + self.mixing * R[:, 0]
        R_safe = torch.nan_to_num(R)
        # Differences to the last residual: an unconstrained problem, better conditioned than the
        # one with the sum of one.
        D = R_safe[:, :-1] - R_safe[:, -1:]
        size = (R_safe**2).sum(2).mean(1)
        damping = (self.ridge * size).clamp_min(torch.finfo(P.dtype).tiny).sqrt()
        eye = torch.eye(m - 1, dtype=P.dtype, device=P.device)
        lower = damping[:, None, None] * eye
        system = torch.cat([D.mT, lower.expand(P.shape[0], -1, -1)], dim=1)
        right = torch.cat([-R_safe[:, -1], R.new_zeros(P.shape[0], m - 1)], dim=1)
        first = torch.linalg.lstsq(system, right.unsqueeze(2)).solution.squeeze(2)
        weights = torch.cat([first, 1 - first.sum(1, keepdim=True)], dim=1)
        return torch.einsum("bm,bmn->bn", weights, P + self.mixing * R_safe)
