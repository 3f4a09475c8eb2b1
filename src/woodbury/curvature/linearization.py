"""Linearisations of batches, kept while a memory budget lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from woodbury.curvature.batches import Batch
from woodbury.curvature.graphs import Linearized, Room
from woodbury.curvature.problem import Problem
from woodbury.errors import ArgumentError, GradientError
from woodbury.operators.memory import available_bytes, in_words

__all__ = ["Cache", "CacheReport", "Linearizations", "checked_budget"]

# Of the memory that is available at the first product, what cache="auto" may take.
_AUTO_FRACTION = 0.5

Cache = int | str | None


def checked_budget(cache: Cache) -> int | None:
    """Bytes that may be kept; ``None`` for ``"auto"``.

    Raises:
        ArgumentError: it is no budget.
    """
    if cache == "auto":
        return None
    if cache in (None, "off"):
        return 0
    if isinstance(cache, bool) or not isinstance(cache, int) or cache < 0:
        raise ArgumentError(
            f"cache is {cache!r}; give 'auto', a number of bytes, or None, 0 or 'off'"
        )
    return cache


@dataclass(frozen=True)
class CacheReport:
    """What an operator keeps between products, and why. ``str(report)`` says it in words.

    Attributes:
        cached: batches whose linearisation is kept.
        streamed: batches that are linearised again at every product; ``None`` before the first.
        nbytes: what the kept linearisations take.
        budget: what they may take.
        method: how a batch is linearised.
        reason: why the rest is not kept; empty where there is no rest.
        budget_reason: where the budget comes from.
    """

    cached: int
    streamed: int | None
    nbytes: int
    budget: int
    method: str
    reason: str
    budget_reason: str

    def __str__(self) -> str:
        budget = f"{in_words(self.budget)} ({self.budget_reason})"
        if self.streamed is None:
            return f"Nothing is linearised before the first product. Budget: {budget}."
        total = self.cached + self.streamed
        kept = (
            f"{self.cached} of {total} batches are kept linearised, in {in_words(self.nbytes)} of "
            f"a budget of {budget}."
        )
        rest = (
            f" {self.streamed} are recomputed at every product: {self.reason}."
            if self.streamed
            else ""
        )
        return f"{kept}{rest} Products {self.method}."


class Linearizations:
    """Gives the linearisation of every batch in turn, remembering those that fit.

    Args:
        problem: what is linearised.
        linearize: makes the linearisation of a batch, given the room for it and the number of
            columns of the product it is made for.
        cache: budget, ``"auto"``, a number of bytes, or ``None``, 0 or ``"off"``.

    Raises:
        ArgumentError: a budget of another kind.
    """

    def __init__(
        self,
        problem: Problem,
        linearize: Callable[[Batch, Room, int], Linearized],
        cache: Cache,
    ) -> None:
        self.problem = problem
        self.linearize = linearize
        self.versions = problem.versions()
        self.kept: list[Linearized] = []
        self.count: int | None = None
        self.nbytes = 0
        self.full = False
        self.reason = "nothing may be kept (cache is off)"
        self.used: set[str] = set()
        self._budget, self.budget_reason = self._checked(cache)

    def _checked(self, cache: Cache) -> tuple[int | None, str]:
        budget = checked_budget(cache)
        if budget is None:
            return None, "half of the memory available at the first product"
        self.full = budget == 0
        return budget, "cache is off" if budget == 0 else "as asked"

    @property
    def budget(self) -> int:
        """Bytes that may be kept, fixed the first time they are needed."""
        if self._budget is None:
            available = available_bytes(self.problem.device)
            self._budget = int(_AUTO_FRACTION * available)
            self.budget_reason = f"half of the {in_words(available)} available at the first product"
        return self._budget

    def passes(self, what: str, columns: int) -> Iterator[Linearized]:
        """One pass over the batches, linearised, for a product with ``columns`` vectors."""
        if self.problem.versions() != self.versions:
            raise GradientError(
                "a parameter was changed in place since this operator was made; operators stand "
                "for one point: make a new one"
            )
        yield from self.kept
        if self.count == len(self.kept):
            return
        index = len(self.kept) - 1
        for batch in self.problem.batches(what, start=len(self.kept)):
            index = batch.index
            linearized = self._linearized(batch, columns)
            yield linearized
            self.used |= linearized.used  # forward mode knows after the product
        self.problem.require_used(self.used)
        self.count = index + 1

    def _linearized(self, batch: Batch, columns: int) -> Linearized:
        left = 0 if self.full else self.budget - self.nbytes
        if not self.full and left <= 0:
            self.full, self.reason = True, "the budget is used up"
        room = Room(left, 0 if self.full else int(self.budget * self.problem.share(batch)))
        # Solvers multiply under no_grad; a linearisation is a graph all the same.
        with torch.enable_grad():
            linearized = self.linearize(batch, room, columns)
        linearized.rows = batch.rows
        if self.full:
            return linearized
        if linearized.nbytes <= left:
            self.kept.append(linearized)
            self.nbytes += linearized.nbytes
        else:
            self.full = True
            self.reason = (
                f"batch {batch.index} takes {in_words(linearized.nbytes)}, and "
                f"{in_words(left)} of the budget were left"
            )
        return linearized

    def report(self, method: str) -> CacheReport:
        """What is kept now."""
        started = self.count is not None
        return CacheReport(
            cached=len(self.kept),
            streamed=None if self.count is None else self.count - len(self.kept),
            nbytes=self.nbytes,
            budget=self.budget if started or self._budget is not None else 0,
            method=method,
            reason=self.reason,
            budget_reason=self.budget_reason,
        )
