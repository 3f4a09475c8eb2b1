"""Block coordinate descent with proximal steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.implicit.condition import Condition
from woodbury.implicit.conditions import block_proximal
from woodbury.implicit.iteration import Found, InnerSolver, IterationStatus, Rows, require_finite

__all__ = ["BlockCoordinateDescent"]


@dataclass(frozen=True)
class BlockCoordinateDescent(InnerSolver):
    r"""Minimise $f(x, \theta) + \sum_j h_j(x_j, c_j)$, one block after the other.

    $x_j \leftarrow \operatorname{prox}_{t_j h_j}(x_j - t_j \nabla_j f(x))$ with the newest values
    of the other blocks; $t_j$ is halved until the quadratic bound of $f$ along the step holds, and
    kept for the next round. The blocks are the entries of the tuple ``x``.

    Called ``run(f, x0, theta, *c)``, as :func:`block_proximal` has it, the condition of its
    ``differentiable(f)``.

    Args:
        tol: converged when $\sum_j \|\Delta x_j\|^2/t_j^2$ of a round is at most the square of
            ``tol`` times the larger of 1 and that of the first round.
        max_steps: limit of rounds.
        batched: ``f`` returns ``[B]`` and the proxes work row by row; lengths $t_j$ are shared.
        proxes: one ``prox(y, *c, step=t)`` for each block.
        step: first $t_j$.

    Raises:
        ArgumentError: a setting makes no sense, or ``x0`` is not a tuple of as many blocks.

    Cost: a gradient and two values per block and round.

    Source: Xu and Yin, "A block coordinate descent method for regularized multiconvex optimization"
    (2013).

    Example:
        >>> import torch
        >>> from woodbury.implicit import BlockCoordinateDescent, prox_l1, prox_ridge
        >>> solver = BlockCoordinateDescent(proxes=(prox_l1, prox_ridge))
        >>> f = lambda x, t: 0.5 * ((x[0] + x[1] - t) ** 2).sum()
        >>> start = torch.zeros(1).double(), torch.zeros(1).double()
        >>> one = torch.ones(1).double()
        >>> solver.run(f, start, 3 * one, one, one).value
        (tensor([1.0000], dtype=torch.float64), tensor([1.0000], dtype=torch.float64))
    """

    proxes: Sequence[Callable[..., Any]] = ()
    step: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.proxes or not all(callable(prox) for prox in self.proxes):
            raise ArgumentError("proxes must hold one function for each block, such as prox_l1")
        if not 0 < self.step < math.inf:
            raise ArgumentError(f"step is {self.step}; it must be positive")

    def condition(self, function: Callable[..., Any]) -> Condition:
        """That no block moves."""
        total = self._minimum(function).function
        return Condition.of(block_proximal(total, self.proxes, self.step), "root")

    def _run(
        self, rows: Rows, X: Tensor, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> Found:
        x = rows.unpack(X)
        count = len(self.proxes)
        if not isinstance(x, tuple) or len(x) != count:
            raise ArgumentError(f"x0 must be a tuple of {count} blocks, one for each prox")
        theta, parameters = args[:1], args[1:]
        if parameters and len(parameters) != count:
            raise ArgumentError(f"{len(parameters)} parameters for {count} proxes")
        evaluate = rows.objective(function, theta)
        parts = [Rows(block, self.batched) for block in x]
        places = [part.pack(block).shape[1] for part, block in zip(parts, x, strict=True)]
        bounds = [sum(places[:j]) for j in range(count + 1)]
        t = [self.step] * count
        statuses: list[IterationStatus | None] = [None] * rows.count
        done = torch.zeros(rows.count, dtype=torch.bool, device=X.device)
        residual = torch.zeros(rows.count, dtype=X.dtype, device=X.device)
        target = residual
        require_finite(*evaluate(X))
        steps = 0
        while steps < self.max_steps and None in statuses:
            steps += 1
            moves = torch.zeros_like(residual)
            for j in range(count):
                here = slice(bounds[j], bounds[j + 1])
                own = parameters[j] if parameters else ()
                own = own if isinstance(own, (tuple, list)) else (own,)
                value, G = evaluate(X)
                while True:
                    block = parts[j].unpack(X[:, here] - t[j] * G[:, here])
                    new = parts[j].pack(self.proxes[j](block, *own, step=t[j]))
                    move = torch.where(done[:, None], 0.0, new - X[:, here])
                    trial = X.clone()
                    trial[:, here] += move
                    change = (G[:, here] * move).sum(1) + (move**2).sum(1) / (2 * t[j])
                    slack = 10 * torch.finfo(X.dtype).eps * value.abs()
                    good = evaluate(trial)[0] <= value + change.double() + slack
                    if bool(good.all()) or t[j] < 1e-20:
                        break
                    t[j] /= 2
                X = trial
                moves += (move**2).sum(1) / t[j] ** 2
            norms = moves.sqrt()
            if steps == 1:
                target = self.tol * norms.clamp_min(1.0)
            residual = torch.where(done, residual, norms)
            finite = torch.isfinite(norms)
            ended = ((norms <= target) | ~finite) & ~done
            for row in ended.nonzero().flatten().tolist():
                ok = bool(finite[row])
                statuses[row] = IterationStatus.converged if ok else IterationStatus.diverged
            done |= ended
        named = [IterationStatus.max_steps if status is None else status for status in statuses]
        return rows.found(X, named, residual, steps)
