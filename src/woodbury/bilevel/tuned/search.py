"""Choose penalties: a shared one on a grid, then one for each feature by its hypergradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
import torch

from woodbury.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["InnerProblem", "Optimizer", "Penalties", "PenaltySearch"]

Optimizer = Literal["lbfgs", "adam"]
GRID = 13


class InnerProblem(Protocol):
    """Fits that depend on penalties, and what they are judged by."""

    def evaluate(self, alpha: Tensor) -> tuple[float, Tensor]:
        r"""The criterion and its gradient in $\log\alpha$ ``[d]``, at $\alpha$ ``[d]``."""


@dataclass(eq=False)
class Penalties:
    """What a search found.

    Attributes:
        alpha: one penalty per feature ``[d]``.
        criterion: what it reaches.
        shared: the best single penalty.
        shared_criterion: what that reaches.
        path: the criterion after each outer step, the first being that of the shared penalty.
    """

    alpha: Tensor
    criterion: float
    shared: float
    shared_criterion: float
    path: list[float] = field(default_factory=list)


class _Enough(Exception):  # noqa: N818 - no error: it ends SciPy's loop
    """The monitor saw no improvement for long enough."""


@dataclass(frozen=True)
class PenaltySearch:
    r"""Minimise $F(\alpha)/F(\alpha_0) + \rho\,\overline{(\log\alpha_j - \log\alpha_0)^2}$.

    $\alpha_0$ is the best shared penalty of a grid, where the search starts; $\rho$ is ``spread``.
    A path may be watched by a ``monitor``, the loss of rows that have no part in $F$: the search
    ends where it has not improved for ``patience`` steps, and takes the best point.
    """

    optimizer: Optimizer
    max_iter: int
    tol: float
    spread: float
    patience: int

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(Optimizer):
            raise ArgumentError(
                f"optimizer is {self.optimizer!r}; it must be one of {list(get_args(Optimizer))}"
            )
        if self.max_iter < 1:
            raise ArgumentError(f"max_iter is {self.max_iter}; at least one outer step is taken")
        if not 0 <= self.tol < math.inf or not 0 <= self.spread < math.inf:
            raise ArgumentError(f"tol is {self.tol}, spread {self.spread}; both must be >= 0")
        if self.patience < 1:
            raise ArgumentError(f"n_iter_no_change is {self.patience}; it must be at least 1")

    def run(
        self,
        problem: InnerProblem,
        features: int,
        bounds: tuple[float, float],
        monitor: Callable[[Tensor], float] | None = None,
    ) -> Penalties:
        """Search within ``bounds`` of each penalty."""
        low, high = bounds
        # From the largest down: each fit starts at the one before, and large penalties are easy.
        grid = torch.logspace(math.log10(high), math.log10(low), GRID, dtype=torch.float64)
        values = [problem.evaluate(a.expand(features))[0] for a in grid]
        best = min(range(GRID), key=values.__getitem__)
        shared, reference = grid[best].item(), values[best]
        walk = _Walk(self, problem, math.log(shared), reference, monitor)
        start = np.full(features, math.log(shared))
        logs = (math.log(low), math.log(high))
        try:
            walk.look(start)
            if self.optimizer == "lbfgs":
                self._lbfgs(walk, start, logs)
            else:
                self._adam(walk, start, logs)
        except _Enough:
            pass
        alpha = torch.from_numpy(np.exp(walk.best)).clamp(low, high)
        return Penalties(alpha, walk.best_criterion, shared, reference, walk.path)

    def _lbfgs(self, walk: _Walk, start: Any, logs: tuple[float, float]) -> None:
        import scipy.optimize

        scipy.optimize.minimize(
            walk.value,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=[logs] * len(start),
            callback=walk.look,
            options={"maxiter": self.max_iter, "ftol": self.tol, "gtol": 1e-12},
        )

    def _adam(self, walk: _Walk, start: Any, logs: tuple[float, float]) -> None:
        at = torch.from_numpy(start.copy()).requires_grad_()
        adam = torch.optim.Adam([at], lr=0.1)
        before = math.inf
        for _ in range(self.max_iter):
            value, gradient = walk.value(at.detach().numpy())
            if abs(before - value) <= self.tol * max(1.0, abs(value)):
                break
            before = value
            at.grad = torch.from_numpy(gradient)
            adam.step()
            with torch.no_grad():
                at.clamp_(*logs)
            walk.look(at.detach().numpy().copy())


class _Walk:
    """The outer objective, what it was on the way, and the best point for the monitor."""

    def __init__(
        self,
        search: PenaltySearch,
        problem: InnerProblem,
        centre: float,
        reference: float,
        monitor: Callable[[Tensor], float] | None,
    ) -> None:
        self.search, self.problem, self.centre, self.monitor = search, problem, centre, monitor
        self.scale = reference if reference > 0 else 1.0
        self.best = np.zeros(0)
        self.best_score, self.best_criterion = math.inf, math.nan
        self.path: list[float] = []
        self.waited = 0
        self.known: tuple[Any, float, Any] | None = None

    def criterion(self, logs: Any) -> tuple[float, Any]:
        if self.known is None or not np.array_equal(self.known[0], logs):
            value, gradient = self.problem.evaluate(torch.from_numpy(np.exp(logs)))
            self.known = (np.array(logs), value, gradient.numpy())
        return self.known[1], self.known[2]

    def value(self, logs: Any) -> tuple[float, Any]:
        value, gradient = self.criterion(logs)
        away, rho = logs - self.centre, self.search.spread
        total = value / self.scale + rho * float((away**2).mean())
        return total, gradient / self.scale + 2 * rho * away / len(logs)

    def look(self, logs: Any) -> None:
        """Take note of a point of the path."""
        criterion, _ = self.criterion(logs)
        self.path.append(criterion)
        if self.monitor is None:
            score = self.value(logs)[0]
        else:
            score = self.monitor(torch.from_numpy(np.exp(logs)))
        if score < self.best_score:
            self.best, self.best_score, self.waited = np.array(logs), score, 0
            self.best_criterion = criterion
        else:
            self.waited += 1
            if self.monitor is not None and self.waited >= self.search.patience:
                raise _Enough
