"""Broyden's method for fixed points, for batches."""

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

__all__ = ["Broyden"]


@dataclass(frozen=True)
class Broyden(InnerSolver):
    r"""Broyden's "good" method for $g(x) = T(x) - x = 0$, with an inverse of low rank.

    $s = -B\,g(x)$, $x^+ = x + s$, $y = g(x^+) - g(x)$,
    $B^+ = B + \frac{(s - B y)\, s^T B}{s^T B y}$, from $B = -I$, for which the first step is
    $T(x)$. After ``memory`` updates $B$ starts again. Every row of a batch has its own. For a
    linear map it ends after at most $2n$ steps.

    Args:
        tol: converged when $\|T(x) - x\| \le$ ``tol`` $\max(1, \|x\|)$.
        max_steps: limit of evaluations of the map.
        batched: ``T`` maps ``[B, ...]`` row by row.
        memory: updates before $B$ starts again.

    Raises:
        ArgumentError: a setting makes no sense.

    Cost: one evaluation per step, memory of ``2 memory`` vectors.

    Source: Broyden, "A class of methods for solving nonlinear simultaneous equations" (1965); in
    deep equilibrium models: Bai, Kolter and Koltun (2019), appendix.

    Example:
        >>> import torch
        >>> from woodbury.implicit import Broyden
        >>> Broyden(tol=1e-10).run(torch.cos, torch.ones(1).double()).value
        tensor([0.7391], dtype=torch.float64)
    """

    memory: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ArgumentError(f"memory is {self.memory}; at least one update is kept")

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

        g = residual(X)
        if not bool(torch.isfinite(g).all()):
            raise NonFiniteError("the map is NaN or infinite at the start x0")
        statuses: list[IterationStatus | None] = [None] * rows.count
        done = torch.zeros(rows.count, dtype=torch.bool, device=X.device)
        best, smallest = X, torch.full_like(X[:, 0], math.inf)
        left: list[Tensor] = []
        right: list[Tensor] = []
        steps = 0
        while True:
            norms = torch.linalg.vector_norm(g, dim=1)
            finite = torch.isfinite(norms)
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
            if len(left) == self.memory:
                left, right = [], []
            s = torch.where(done[:, None], 0.0, -_times(g, left, right))
            X = torch.where(done[:, None], best, X + s)
            new = residual(X)
            By = _times(new - g, left, right)
            sB = _times(s, right, left)
            pivot = (s * By).sum(1, keepdim=True)
            # Rows without a pivot, and those that have ended, keep the inverse they have.
            sound = (pivot.abs() > torch.finfo(X.dtype).eps * (s**2).sum(1, keepdim=True)) & (
                torch.isfinite(pivot) & ~done[:, None]
            )
            left.append(torch.where(sound, (s - By) / torch.where(sound, pivot, 1.0), 0.0))
            right.append(torch.where(sound, sB, 0.0))
            g = new
        named = [IterationStatus.max_steps if status is None else status for status in statuses]
        return rows.found(best, named, smallest, steps)


def _times(V: Tensor, left: list[Tensor], right: list[Tensor]) -> Tensor:
    """``-V + sum_i left_i <right_i, V>``, row by row."""
    if not left:
        return -V
    weights = torch.einsum("mbn,bn->mb", torch.stack(right), V)
    return torch.einsum("mbn,mb->bn", torch.stack(left), weights) - V
