"""The inner loss to second order from differences of gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.bilevel.linearization import Linearization
from woodbury.bilevel.parts import Parts
from woodbury.curvature.batches import Batch
from woodbury.operators import LinearOperator

if TYPE_CHECKING:
    from woodbury.bilevel.problem import Bilevel

__all__ = ["DifferenceLinearization"]


class DifferenceLinearization(Linearization):
    """Products by central differences: two gradients each, no second derivatives, no graph."""

    def __init__(self, problem: Bilevel, batch: Batch | None, radius: float | None) -> None:
        self.problem, self.batch = problem, batch
        self.value, self.gradient, _ = problem.gradient_parts("inner", batch)
        self.point = problem.params_vector()
        if radius is None:
            radius = torch.finfo(self.point.dtype).eps ** (1 / 3)
        self.length = radius * max(1.0, problem.space.norm(self.point).item())
        self.hessian = _DifferenceHessian(self)

    def difference(self, v: Tensor) -> tuple[Tensor, Parts]:
        """Derivatives of both gradients along ``v [p]``."""
        size = self.problem.space.norm(v).item()
        if size == 0:
            return torch.zeros_like(v), dict.fromkeys(self.problem.hyper)
        step = self.length / size
        sides = []
        for sign in (1, -1):
            moved = self.problem.at(self.point + sign * step * v)
            sides.append(moved.gradient_parts("inner", self.batch)[1:])
        (high, above), (low, below) = sides
        return (high - low) / (2 * step), {
            name: _quotient(above[name], below[name], 2 * step) for name in above
        }

    def mixed_parts(self, v: Tensor) -> Parts:
        """The mixed derivative times ``v [p]`` by name, ``None`` where there is none."""
        return self.difference(v)[1]


class _DifferenceHessian(LinearOperator):
    def __init__(self, point: DifferenceLinearization) -> None:
        space = point.problem.space
        super().__init__(
            (space.dim, space.dim),
            dtype=point.point.dtype,
            device=point.point.device,
            tags=frozenset({"symmetric"}),
            space=space,
        )
        self.linearization = point

    def _matvec(self, x: Tensor) -> Tensor:
        return self.linearization.difference(x)[0]

    def _matmat(self, X: Tensor) -> Tensor:
        return torch.stack([self._matvec(column) for column in X.unbind(1)], dim=1)


def _quotient(high: Tensor | None, low: Tensor | None, width: float) -> Tensor | None:
    return None if high is None or low is None else (high - low) / width
