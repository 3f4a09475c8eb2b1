"""Proximal gradient with acceleration and restarts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.implicit.condition import Condition
from woodbury.implicit.conditions import proximal_gradient
from woodbury.implicit.iteration import Found, InnerSolver, IterationStatus, Rows, require_finite

__all__ = ["AcceleratedProximalGradient"]


@dataclass(frozen=True)
class AcceleratedProximalGradient(InnerSolver):
    r"""Minimise $f(x, \theta) + h(x, c)$ by FISTA with backtracking and adaptive restarts.

    $x^+ = \operatorname{prox}_{t h}(y - t\nabla f(y))$,
    $y^+ = x^+ + \frac{k - 1}{k + 2}(x^+ - x)$, where $t$ is halved until
    $f(x^+) \le f(y) + \langle\nabla f(y), x^+ - y\rangle + \|x^+ - y\|^2/2t$. Momentum starts again
    in a row of the batch where it points uphill, $\langle y - x^+, x^+ - x\rangle > 0$; $t$ is
    shared by the rows.

    Called ``run(f, x0, theta, *c)``, with ``f(x, theta)``, as :func:`proximal_gradient` has it, the
    condition of its ``differentiable(f)``.

    Args:
        tol: converged when $\|x^+ - y\|/t \le$ ``tol`` times the larger of 1 and that of the first
            step.
        max_steps: limit of steps.
        batched: ``f`` returns ``[B]``, and the prox works row by row.
        prox: ``prox(y, *c, step=t)``, such as :func:`prox_l1`.
        step: first $t$, also that of the condition.

    Raises:
        ArgumentError: a setting makes no sense.

    Cost: one gradient, one prox and one value per step, and a value more per halving.

    Source: Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm" (2009);
    O'Donoghue and Candes, "Adaptive restart for accelerated gradient schemes" (2015).

    Example:
        >>> import torch
        >>> from woodbury.implicit import AcceleratedProximalGradient, prox_l1
        >>> lasso = AcceleratedProximalGradient(prox=prox_l1).differentiable(
        ...     lambda x, t: 0.5 * ((x - t) ** 2).sum()
        ... )
        >>> t, penalty = torch.tensor([3.0, 0.5]).double(), torch.tensor(1.0).double()
        >>> lasso(torch.zeros(2).double(), t, penalty)
        tensor([2., 0.], dtype=torch.float64)
        >>> torch.func.jacrev(lasso, argnums=2)(torch.zeros(2).double(), t, penalty)
        tensor([-1.,  0.], dtype=torch.float64)
    """

    prox: Callable[..., Any] | None = None
    step: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.prox):
            raise ArgumentError(f"prox is {self.prox!r}; give a function such as prox_l1")
        if not 0 < self.step < math.inf:
            raise ArgumentError(f"step is {self.step}; it must be positive")

    def condition(self, function: Callable[..., Any]) -> Condition:
        """That a proximal gradient step does not move."""
        total = self._minimum(function).function
        assert self.prox is not None  # checked when it was made
        return Condition.of(proximal_gradient(total, self.prox, self.step), "root")

    def _run(
        self, rows: Rows, X: Tensor, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> Found:
        theta, parameters = args[:1], args[1:]
        evaluate = rows.objective(function, theta)
        assert self.prox is not None  # checked when it was made

        def proximal(Z: Tensor, t: float) -> Tensor:
            return rows.pack(self.prox(rows.unpack(Z), *parameters, step=t))  # type: ignore[misc]

        t, Y = self.step, X
        age = X.new_ones(rows.count, 1)
        statuses: list[IterationStatus | None] = [None] * rows.count
        done = torch.zeros(rows.count, dtype=torch.bool, device=X.device)
        residual = torch.zeros(rows.count, dtype=X.dtype, device=X.device)
        target = residual
        steps = 0
        require_finite(*evaluate(X))
        while steps < self.max_steps and None in statuses:
            steps += 1
            value, G = evaluate(Y)
            while True:
                new = proximal(Y - t * G, t)
                move = new - Y
                bound = value + ((G * move).sum(1) + (move**2).sum(1) / (2 * t)).double()
                slack = 10 * torch.finfo(X.dtype).eps * value.abs()
                good = (evaluate(new)[0] <= bound + slack) | done
                if bool(good.all()) or t < 1e-20:
                    break
                t /= 2
            norms = torch.linalg.vector_norm(move, dim=1) / t
            if steps == 1:
                target = self.tol * norms.clamp_min(1.0)
            uphill = ((Y - new) * (new - X)).sum(1, keepdim=True) > 0
            age = torch.where(uphill, torch.ones_like(age), age + 1)
            keep = done[:, None]
            Y = torch.where(keep, X, new + (age - 1) / (age + 2) * (new - X))
            X = torch.where(keep, X, new)
            residual = torch.where(done, residual, norms)
            finite = torch.isfinite(norms)
            ended = ((norms <= target) | ~finite) & ~done
            for row in ended.nonzero().flatten().tolist():
                ok = bool(finite[row])
                statuses[row] = IterationStatus.converged if ok else IterationStatus.diverged
            done |= ended
        named = [IterationStatus.max_steps if status is None else status for status in statuses]
        return rows.found(X, named, residual, steps)
