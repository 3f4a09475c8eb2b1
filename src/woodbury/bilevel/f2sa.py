"""F2SA: a penalty takes the place of second derivatives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from woodbury.bilevel.algorithm import (
    BilevelAlgorithm,
    OptimizerLike,
    StepReport,
    require_count,
)
from woodbury.bilevel.problem import Bilevel
from woodbury.bilevel.sampling import BatchSize
from woodbury.bilevel.soba import step_of
from woodbury.errors import ArgumentError, NonFiniteError

__all__ = ["F2SA"]


class F2SA(BilevelAlgorithm):
    r"""Fully first-order stochastic approximation (F2SA): gradients only.

    With the minimiser $y_\sigma(\lambda)$ of $g + f / \sigma$ beside that of $g$, the
    hypergradient is the limit of

    $$\nabla_\lambda f(y_\sigma) + \sigma\,(\nabla_\lambda g(y_\sigma) - \nabla_\lambda g(w^*))
      = \frac{dF}{d\lambda} + O(1/\sigma).$$

    One outer step is ``inner_steps`` times

    $w \leftarrow w - \alpha \nabla_w g(w), \qquad
    y \leftarrow y - \alpha' (\nabla_w g(y) + \nabla_w f(y) / \sigma_k)$

    on fresh batches, and one step of the outer optimizer along the difference above, and
    $\sigma_k = \sigma_0 (k + 1)^q$ grows. ``params`` are $w$. Both variables see the same batches
    of $g$, and both gradients in $\lambda$ the same one: where their steps are equal, too, their
    noise cancels in the difference, which $\sigma$ multiplies. (In the paper each is drawn by
    itself.)

    Args:
        problem: the :class:`Bilevel` problem, strongly convex in ``params``.
        inner: optimizer of ``params``; a number is $\alpha$.
        outer: optimizer of ``hyper``.
        penalty: $(\sigma_0, q)$; $\sigma_0$ has to be large against the curvature of $f$ over that
            of $g$. The theory takes $q = 1/7$ with noise in both losses, $1/5$ in $f$ alone, $1/3$
            without.
        penalised_step: $\alpha'$; default ``inner``, where that is a number.
        inner_steps: steps of $w$ and $y$ before each outer one.
        inner_batch_size: rows in a draw; see :class:`BilevelAlgorithm`, as for the rest.
        outer_batch_size: rows in a draw.
        project: puts the hyperparameters back into their domain.
        seed: of the draws.

    Attributes:
        y: the penalised variable, flat ``[p]``; it starts where ``params`` do.

    Raises:
        ArgumentError: a setting makes no sense.
        NonFiniteError: at a step, a loss or a direction is NaN or infinite.

    Cost: a step takes ``2 inner_steps + 2`` gradients of $g$ and ``inner_steps + 1`` of $f$; memory
    of one more copy of ``params``.

    Source: Kwon, Kwon, Wright and Nowak, "A fully first-order method for stochastic bilevel
    optimization" (ICML 2023), algorithm 1, with $\alpha_k = \alpha' / \sigma_k$, which keeps the
    steps of $y$ stable as the penalty grows, and the outer step on the hypergradient's own scale.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import F2SA, Bilevel
        >>> inner = lambda w, a: 0.5 * (w - a).square().sum()
        >>> outer = lambda w, a: 0.5 * (w - 3).square().sum()
        >>> a = torch.zeros(2)
        >>> problem = Bilevel(inner, outer, torch.zeros(2), a)
        >>> reports = F2SA(problem, inner=0.5, outer=0.3).run(100)
        >>> a.round(decimals=3)
        tensor([3., 3.])
    """

    keeps: ClassVar[tuple[str, ...]] = ("y",)

    def __init__(
        self,
        problem: Bilevel,
        *,
        inner: OptimizerLike,
        outer: OptimizerLike,
        penalty: tuple[float, float] = (10.0, 1 / 7),
        penalised_step: float | None = None,
        inner_steps: int = 10,
        inner_batch_size: BatchSize = None,
        outer_batch_size: BatchSize = None,
        project: Callable[[Any], object] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            problem,
            inner=inner,
            outer=outer,
            inner_batch_size=inner_batch_size,
            outer_batch_size=outer_batch_size,
            project=project,
            seed=seed,
        )
        if len(penalty) != 2 or not (0 < penalty[0] < math.inf and 0 <= penalty[1] < math.inf):
            raise ArgumentError(f"penalty is {penalty}; it needs a positive start and a power >= 0")
        self.penalty = penalty
        self.penalised_step = step_of(penalised_step, inner, "penalised_step")
        self.inner_steps = require_count(inner_steps, "inner_steps", least=1)
        self.y = problem.params_vector()

    def _step(self) -> StepReport:
        sigma = self.penalty[0] * (self.steps + 1) ** self.penalty[1]
        stationarity = 0.0
        for index in range(self.inner_steps):
            batch = self.draw("inner")
            there = self.problem.at(params=self.y)
            slope = there.params_gradient("inner", batch)
            slope = slope + there.params_gradient("outer", self.draw("outer")) / sigma
            self.y = self.y - self.penalised_step * slope
            gradient = self.problem.params_gradient("inner", batch)
            if index == 0:
                stationarity = self.problem.space.norm(gradient).item()
            self.move_params(gradient)
        if not torch.isfinite(self.y).all():
            raise NonFiniteError(
                f"the penalised variable is NaN or infinite after {self.steps} steps: reduce "
                f"penalised_step (now {self.penalised_step:g})"
            )
        batch = self.draw("inner")
        there = self.problem.at(params=self.y)
        outer = there.gradients("outer", self.draw("outer"))
        change = (
            there.gradients("inner", batch).hyper - self.problem.gradients("inner", batch).hyper
        )
        report = self.finish(outer.hyper + sigma * change, outer.value, None)
        return dataclasses.replace(report, stationarity=stationarity)
