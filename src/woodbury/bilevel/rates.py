"""Learning rates of an optimizer that a method scales."""

from __future__ import annotations

from torch.optim import Optimizer

__all__ = ["Rates"]


class Rates:
    """The rates that an optimizer was made with, and multiples of them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.first = [group["lr"] for group in optimizer.param_groups]

    def scale(self, factor: float) -> None:
        """Set every rate to ``factor`` times what it was at first."""
        for group, rate in zip(self.optimizer.param_groups, self.first, strict=True):
            group["lr"] = rate * factor
