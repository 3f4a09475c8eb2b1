"""Mirror descent on simplices, for batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.implicit.condition import Condition
from woodbury.implicit.conditions import mirror_descent
from woodbury.implicit.iteration import Found, InnerSolver, IterationStatus, Rows, require_finite

__all__ = ["MirrorDescent"]


@dataclass(frozen=True)
class MirrorDescent(InnerSolver):
    r"""Minimise over a product of simplices by exponentiated gradients.

    $x^+ \propto x \odot e^{-t\nabla f(x)}$ along the last dimension, which holds probabilities;
    $t$ is halved until
    $f(x^+) \le f(x) + \langle\nabla f(x), x^+ - x\rangle + \mathrm{KL}(x^+, x)/t$, and grows by a
    quarter after each step. Every row of a batch has its own.

    Called ``run(f, x0, theta)`` with ``f(x, theta)`` and ``x0 > 0``; its ``differentiable(f)`` has
    the condition :func:`mirror_descent`.

    Args:
        tol: converged when $\|x^+ - x\| \le$ ``tol`` for the step $t = 1 /\max(1, |\nabla f|)$.
        max_steps: limit of gradient evaluations.
        batched: ``f`` returns ``[B]``, one value for each row of ``x [B, ...]``.
        step: first $t$.

    Raises:
        ArgumentError: a setting makes no sense, or the start is not inside of the simplices.

    Cost: one gradient per step.

    Source: Beck and Teboulle, "Mirror descent and nonlinear projected subgradient methods" (2003).

    Example:
        >>> import torch
        >>> from woodbury.implicit import MirrorDescent
        >>> entropic = MirrorDescent().differentiable(
        ...     lambda x, t: (x * (x.log() - t)).sum()  # its minimum is softmax(t)
        ... )
        >>> t = torch.tensor([0.0, 1.0]).double()
        >>> entropic(torch.full((2,), 0.5).double(), t)
        tensor([0.2689, 0.7311], dtype=torch.float64)
    """

    step: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.step < math.inf:
            raise ArgumentError(f"step is {self.step}; it must be positive")

    def condition(self, function: Callable[..., Any]) -> Condition:
        """That a step of mirror descent does not move."""
        return Condition.of(mirror_descent(self._minimum(function).function), "root")

    def _run(
        self, rows: Rows, X: Tensor, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> Found:
        evaluate = rows.objective(function, args)
        shapes = rows.unknown.shapes
        if any(len(shape) < 1 + rows.batched for shape in shapes):
            raise ArgumentError("x0 holds a number where it should hold probabilities [..., n]")
        widths = [
            shape[-1] for shape in shapes for _ in range(math.prod(shape[int(rows.batched) : -1]))
        ]
        groups = torch.repeat_interleave(
            torch.arange(len(widths), device=X.device), torch.tensor(widths, device=X.device)
        ).expand_as(X)

        def summed(Z: Tensor) -> Tensor:
            return Z.new_zeros(Z.shape[0], len(widths)).scatter_add(1, groups, Z).gather(1, groups)

        def stepped(X: Tensor, G: Tensor, t: Tensor) -> Tensor:
            low = G.new_full((G.shape[0], len(widths)), math.inf)
            low = low.scatter_reduce(1, groups, G, "amin").gather(1, groups)
            Z = X * torch.exp(-t * (G - low))
            return Z / summed(Z)

        if not bool((X > 0).all()) or bool(((summed(X) - 1).abs() > 1e-3).any()):
            raise ArgumentError(
                "x0 must hold positive probabilities that sum to one in the last dimension, for "
                "example torch.full((n,), 1 / n)"
            )
        values, G = evaluate(X)
        require_finite(values, G)
        t = X.new_full((rows.count, 1), self.step)
        done = torch.zeros(rows.count, dtype=torch.bool, device=X.device)
        statuses: list[IterationStatus | None] = [None] * rows.count
        steps = 0
        while True:
            unit = 1 / G.abs().amax(1, keepdim=True).clamp_min(1.0)
            norms = torch.linalg.vector_norm(stepped(X, G, unit) - X, dim=1)
            stuck = t.squeeze(1) < 1e-20
            for row in (((norms <= self.tol) | stuck) & ~done).nonzero().flatten().tolist():
                ok = bool(norms[row] <= self.tol)
                statuses[row] = IterationStatus.converged if ok else IterationStatus.stagnation
                done[row] = True
            if steps >= self.max_steps or None not in statuses:
                break
            steps += 1
            trial = torch.where(done[:, None], X, stepped(X, G, t))
            new_values, new_G = evaluate(trial)
            move = trial - X
            divergence = torch.special.xlogy(trial, trial / X).sum(1)
            bound = values + ((G * move).sum(1) + divergence / t.squeeze(1)).double()
            slack = 10 * torch.finfo(X.dtype).eps * values.abs()
            finite = torch.isfinite(new_values) & torch.isfinite(new_G).all(1)
            accepted = finite & (new_values <= bound + slack) & ~done
            mask = accepted[:, None]
            X, G = torch.where(mask, trial, X), torch.where(mask, new_G, G)
            values = torch.where(accepted, new_values, values)
            t = torch.where(mask, 1.25 * t, t / 2)
        named = [IterationStatus.max_steps if status is None else status for status in statuses]
        return rows.found(X, named, norms, steps)
