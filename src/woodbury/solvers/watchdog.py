"""Looks on while an iteration runs and ends it where it is not worth its products."""

from __future__ import annotations

import math

from woodbury.solvers.recipe import Progress

__all__ = ["AbandonedError", "Watchdog"]

# Steps from one word on the rate to the next.
_EVERY = 4


class AbandonedError(Exception):
    """An iteration was left; the message says why."""


class Watchdog:
    """Called after each step, like any ``progress``; raises :class:`AbandonedError`.

    Args:
        rtol: what the iteration aims at.
        limit: products after which it ends in any case, for one column.
        hopeless: products that it must not look like needing beyond those taken.
        patience: steps before anything is said of that.
        cost: products in a step, for one column.
        then: called afterwards with the same arguments.
    """

    def __init__(
        self,
        rtol: float,
        limit: int | None,
        hopeless: int | None,
        *,
        patience: int = 12,
        cost: int = 1,
        then: Progress | None = None,
    ) -> None:
        self.rtol, self.limit, self.hopeless = rtol, limit, hopeless
        self.patience, self.cost, self.then = patience, cost, then
        self.smallest: list[float] = []  # residual so far, by step

    def __call__(self, step: int, relative: float) -> None:
        """Take the largest relative residual after a step."""
        known = self.smallest[-1] if self.smallest else math.inf
        self.smallest.append(min(known, relative))
        if self.then is not None:
            self.then(step, relative)
        if relative <= self.rtol:
            return
        taken = self.cost * step
        if self.limit is not None and taken >= self.limit:
            raise AbandonedError(f"not done after {taken} products of one column")
        if self.hopeless is None or step < self.patience or step % _EVERY:
            return
        needed = self.cost * self.remaining()
        if needed > self.hopeless:
            raise AbandonedError(
                f"after {taken} products the relative residual is {self.smallest[-1]:.2g}: at this "
                f"rate about {needed:.0f} more would be needed"
            )

    def remaining(self) -> float:
        """Steps to the tolerance at the rate of the later half of those taken."""
        last = len(self.smallest) - 1
        if last < 1 or not self.smallest[-1] > 0:
            return math.inf if last < 1 else 0.0
        half = last // 2
        drop = math.log(self.smallest[half] / self.smallest[-1])
        missing = math.log(self.smallest[-1] / self.rtol) if self.rtol > 0 else math.inf
        return max(missing, 0.0) * (last - half) / drop if drop > 0 else math.inf
