"""BO-REP: normalised momentum, with the inner variables refreshed now and then."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from woodbury.bilevel.algorithm import (
    BilevelAlgorithm,
    OptimizerLike,
    StepReport,
    require_count,
    require_positive,
)
from woodbury.bilevel.problem import Bilevel
from woodbury.bilevel.rates import Rates
from woodbury.bilevel.sampling import BatchSize
from woodbury.errors import ArgumentError, NonFiniteError

__all__ = ["BOREP"]


class BOREP(BilevelAlgorithm):
    r"""Bilevel descent for outer losses of unbounded smoothness (BO-REP).

    Where the smoothness of $f$ grows with its gradient, as in recurrent networks, steps in
    proportion to the hypergradient blow up; here they have a fixed length, so that the inner
    solution moves a bounded way and needs to be followed only now and then. One outer step $t$:

    1. if $t$ is a multiple of ``period``: ``inner_steps`` inner steps on fresh batches, each
       followed by the projection onto the ball of ``radius`` around where they began; $w$ becomes
       their mean. Otherwise $w$ stays.
    2. $z \leftarrow z - \nu\,(H z - \nabla_w f)$, with $z$ the adjoint.
    3. $m \leftarrow \beta m + (1 - \beta)(\nabla_\lambda f - J z)$.
    4. $\lambda \leftarrow \lambda - \eta\,m / \|m\|$, the norm over all hyperparameters together.

    Before the first step, ``warm_epochs`` epochs refine $w$ in the same way: epoch $s = 0, 1,
    \dots$ makes $2^s$ ``warm_steps`` steps at $2^{-s}$ times the rate, in a ball of
    $2^{-s/2}$ ``warm_radius``, and starts from the mean of the last.

    Args:
        problem: the :class:`Bilevel` problem, strongly convex in ``params``.
        inner: optimizer of ``params``.
        outer: optimizer of ``hyper``, which is given $m / \|m\|$; a number is $\eta$, the length of
            every step.
        adjoint_step: $\nu$.
        momentum: $\beta$, in $[0, 1)$.
        period: outer steps from one refresh to the next.
        inner_steps: inner steps in a refresh.
        radius: of the ball of a refresh; by default none.
        warm_epochs: number of epochs before the first step.
        warm_steps: steps in the first of them.
        warm_radius: radius in the first of them; by default none.
        inner_batch_size: rows in a draw; see :class:`BilevelAlgorithm`, as for the rest.
        outer_batch_size: rows in a draw.
        project: puts the hyperparameters back into their domain.
        seed: of the draws.

    Attributes:
        z: the adjoint, which tends to $H^{-1} \nabla_w f$, ``[p]``; zero at first.
        m: the momentum, ``[h]``.

    Raises:
        ArgumentError: a setting makes no sense.
        NonFiniteError: at a step, a loss or a direction is NaN or infinite.

    Cost: a step takes one gradient of each loss, one product with the Hessian and one mixed
    product, and ``inner_steps / period`` inner gradients on average; memory of a few vectors.

    Source: Hao, Gong and Liu, "Bilevel optimization under unbounded smoothness: a new algorithm and
    convergence analysis" (ICLR 2024), algorithms 1 to 3. Defaults are those of the authors' code
    for data cleaning.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import BOREP, Bilevel
        >>> inner = lambda w, a: 0.5 * (w - a).square().sum()
        >>> outer = lambda w, a: 0.25 * (w - 3).pow(4).sum()
        >>> a = torch.tensor([30.0])  # the slope is 27^3 there
        >>> problem = Bilevel(inner, outer, torch.zeros(1), a)
        >>> method = BOREP(problem, inner=0.5, outer=0.1, adjoint_step=0.5)
        >>> reports = method.run(400)
        >>> bool((a - 3).abs() < 0.3)
        True
    """

    keeps: ClassVar[tuple[str, ...]] = ("z", "m")

    def __init__(
        self,
        problem: Bilevel,
        *,
        inner: OptimizerLike,
        outer: OptimizerLike,
        adjoint_step: float = 1e-2,
        momentum: float = 0.9,
        period: int = 2,
        inner_steps: int = 10,
        radius: float = math.inf,
        warm_epochs: int = 2,
        warm_steps: int = 10,
        warm_radius: float = math.inf,
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
        if not 0 <= momentum < 1:
            raise ArgumentError(f"momentum is {momentum}; it must be in [0, 1)")
        for name, value in (("radius", radius), ("warm_radius", warm_radius)):
            if not value > 0:
                raise ArgumentError(f"{name} is {value}; it must be positive")
        self.adjoint_step = require_positive(adjoint_step, "adjoint_step")
        self.momentum = momentum
        self.radius, self.warm_radius = radius, warm_radius
        self.period = require_count(period, "period", least=1)
        self.inner_steps = require_count(inner_steps, "inner_steps", least=1)
        self.warm_epochs = require_count(warm_epochs, "warm_epochs")
        self.warm_steps = require_count(warm_steps, "warm_steps", least=1)
        self.z = torch.zeros_like(problem.params_vector())
        self.m = torch.zeros_like(problem.hyper_vector())

    def _step(self) -> StepReport:
        if self.steps == 0:
            self._warm_up()
        if self.steps % self.period == 0:
            self._refresh(self.inner_steps, self.radius)
        outer = self.problem.gradients("outer", self.draw("outer"))
        here = self.problem.linearize(self.draw("inner"))
        self.z = self.z - self.adjoint_step * (here.hessian @ self.z - outer.params)
        mixed = self.problem.flat_hyper(here.mixed_parts(self.z))
        self.m = self.momentum * self.m + (1 - self.momentum) * (outer.hyper - mixed)
        length = self.problem.hyper_space.norm(self.m)
        if not torch.isfinite(length):
            raise NonFiniteError(
                f"the momentum has norm {length.item()} at step {self.steps + 1}: reduce "
                f"adjoint_step (now {self.adjoint_step:g})"
            )
        unit = self.m / length.clamp_min(torch.finfo(self.m.dtype).tiny)  # zero stays zero
        report = self.finish(unit, outer.value, here.gradient)
        return dataclasses.replace(report, hypergradient_norm=length.item())

    def _warm_up(self) -> None:
        assert self.inner_optimizer is not None  # inner was given
        rates = Rates(self.inner_optimizer)
        for epoch in range(self.warm_epochs):
            rates.scale(0.5**epoch)
            self._refresh(self.warm_steps * 2**epoch, self.warm_radius * 0.5 ** (epoch / 2))
        rates.scale(1.0)

    def _refresh(self, steps: int, radius: float) -> None:
        """Inner steps in a ball; the parameters become the mean of the iterates."""
        centre = self.problem.params_vector()
        total = torch.zeros_like(centre)
        for _ in range(steps):
            self.move_params(self.problem.params_gradient("inner", self.draw("inner")))
            total += self._into_ball(centre, radius)
        self.problem.set_params(total / steps)

    def _into_ball(self, centre: Tensor, radius: float) -> Tensor:
        now = self.problem.params_vector()
        away = now - centre
        length = self.problem.space.norm(away).item()
        if length > radius:
            now = centre + away * (radius / length)
            self.problem.set_params(now)
        return now
