"""Descent along directions, every row of a batch at its own pace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.implicit.condition import Condition
from woodbury.implicit.iteration import Found, InnerSolver, IterationStatus, Rows, require_finite

__all__ = ["Descent", "GradientDescent"]


@dataclass(frozen=True)
class Descent(InnerSolver):
    """Base of the methods that go along a direction until the objective has fallen enough.

    Each evaluation tries one step in every row: rows that accept it turn, the others halve it.
    """

    def condition(self, function: Callable[..., Any]) -> Condition:
        """A minimum."""
        return self._minimum(function)

    def _evaluation(
        self, rows: Rows, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Values ``[B]`` and gradients ``[B, n]`` at rows."""
        return rows.objective(function, args)

    def _memory(self, X: Tensor, evaluate: Any) -> Any:
        """What the directions are made from."""
        return None

    def _start(self, memory: Any, X: Tensor, G: Tensor, target: Tensor) -> Tensor:
        """The first directions."""
        return -G

    def _turn(self, memory: Any, G: Tensor, moved: Tensor, X: Tensor, old: Tensor) -> Tensor:
        """New directions for the rows that moved from ``old = (X, G)``."""
        return -G

    def _first(self, G: Tensor) -> Tensor:
        """Lengths ``[B, 1]`` of the first steps."""
        return 1 / torch.linalg.vector_norm(G, dim=1, keepdim=True).clamp_min(1.0)

    def _next(self, lengths: Tensor) -> Tensor:
        """Lengths to be tried after ``lengths`` were accepted."""
        return torch.ones_like(lengths)

    def _fixed(self) -> float | None:
        """A length that is never doubted."""
        return None

    def _run(
        self, rows: Rows, X: Tensor, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> Found:
        evaluate = self._evaluation(rows, function, args)
        values, G = evaluate(X)
        require_finite(values, G)
        norms = torch.linalg.vector_norm(G, dim=1)
        target = self.tol * norms.clamp_min(1.0)
        fixed = self._fixed()
        lengths = self._first(G) if fixed is None else torch.full_like(X[:, :1], fixed)
        memory = self._memory(X, evaluate)
        done = norms <= target
        D = -G if bool(done.all()) else self._start(memory, X, G, target)
        statuses = [IterationStatus.converged if d else None for d in done.tolist()]
        steps = 0
        while steps < self.max_steps and None in statuses:
            steps += 1
            slope = (G * D).sum(1, keepdim=True)
            D = torch.where(slope < 0, D, -G)  # rounding may spoil a direction
            slope = torch.where(slope < 0, slope, -(G * G).sum(1, keepdim=True))
            trial = torch.where(done[:, None], X, X + lengths * D)
            new_values, new_G = evaluate(trial)
            new_norms = torch.linalg.vector_norm(new_G, dim=1)
            finite = torch.isfinite(new_values) & torch.isfinite(new_norms)
            if fixed is None:
                change = (lengths * slope).squeeze(1).double()
                enough = new_values <= values + 1e-4 * change
                # Near the minimum the decrease is below rounding: then the gradient decides.
                eps = torch.finfo(X.dtype).eps
                flat = change.abs() <= 1e3 * eps * values.abs()
                accepted = finite & torch.where(flat, new_norms < norms, enough) & ~done
            else:
                accepted = finite & ~done
            mask = accepted[:, None]
            old = torch.stack([X, G])
            X, G = torch.where(mask, trial, X), torch.where(mask, new_G, G)
            values = torch.where(accepted, new_values, values)
            norms = torch.where(accepted, new_norms, norms)
            turned = self._turn(memory, G, accepted, X, old)
            D = torch.where(mask, turned, D)
            if fixed is None:
                lengths = torch.where(mask, self._next(lengths), lengths / 2)
            stuck = (lengths.squeeze(1) < 1e-20) if fixed is None else ~finite
            for row in ((norms <= target) | stuck).nonzero().flatten().tolist():
                if statuses[row] is None:
                    if norms[row] <= target[row]:
                        statuses[row] = IterationStatus.converged
                    elif fixed is None:
                        statuses[row] = IterationStatus.stagnation
                    else:
                        statuses[row] = IterationStatus.diverged
                    done[row] = True
        ended = [IterationStatus.max_steps if status is None else status for status in statuses]
        return rows.found(X, ended, norms, steps)


@dataclass(frozen=True)
class GradientDescent(Descent):
    r"""Gradient descent, $x \leftarrow x - t \nabla f(x)$, by default with a line search.

    $t$ is halved until $f(x - t g) \le f(x) - 10^{-4}\, t \|g\|^2$ and doubled after a success;
    each row of a batch has its own.

    Args:
        tol: converged when $\|\nabla f\| \le$ ``tol`` $\max(1, \|\nabla f(x_0)\|)$.
        max_steps: limit of gradient evaluations.
        batched: ``f`` returns ``[B]``, one value for each row of ``x [B, ...]``.
        step: $t$, not doubted; ``None`` for the line search.

    Raises:
        ArgumentError: a setting makes no sense.

    Cost: one gradient per step.

    Source: Nocedal and Wright, "Numerical Optimization" (2nd ed.), algorithm 3.1.

    Example:
        >>> import torch
        >>> from woodbury.implicit import GradientDescent
        >>> shrink = GradientDescent().differentiable(
        ...     lambda x, t: ((x - t) ** 2).sum() + (x**2).sum()
        ... )
        >>> torch.func.jacrev(shrink, argnums=1)(torch.zeros(2).double(), torch.ones(2).double())
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """

    step: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step is not None and not 0 < self.step < math.inf:
            raise ArgumentError(f"step is {self.step}; it must be positive, or None")

    def _next(self, lengths: Tensor) -> Tensor:
        return 2 * lengths

    def _fixed(self) -> float | None:
        return self.step
