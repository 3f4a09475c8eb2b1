"""stocBiO: the Neumann series with a fresh batch for each factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from woodbury.bilevel.algorithm import (
    BilevelAlgorithm,
    OptimizerLike,
    StepReport,
    require_count,
    require_positive,
)
from woodbury.bilevel.problem import Bilevel
from woodbury.bilevel.sampling import BatchSize

__all__ = ["StocBiO"]


class StocBiO(BilevelAlgorithm):
    r"""Stochastic bilevel optimisation by sampled Neumann factors.

    One outer step is ``inner_steps`` steps of the inner optimizer on fresh batches, warm-started,
    and one step of the outer optimizer along

    $$\nabla_\lambda f(\mathcal D_F) - J(\mathcal D_G)\, v, \qquad
    v = \eta \sum_{q=0}^{Q} r_q, \quad r_0 = \nabla_w f(\mathcal D_F), \quad
    r_{q+1} = (I - \eta H(\mathcal B_q))\, r_q,$$

    with independent batches $\mathcal D_F, \mathcal D_G, \mathcal B_0, \ldots$, so that its
    expectation is the truncated series of the mean Hessian. On all of the data it is
    :class:`AlternatingIFT` with ``Neumann(terms=Q, step=eta)``. The sizes of the batches
    $\mathcal B_q$ are equal here; the theory has them shrink geometrically.

    Args:
        problem: the :class:`Bilevel` problem.
        inner: optimizer of the parameters.
        outer: optimizer of the hyperparameters.
        step: $\eta$, below $2 / \lambda_{max}$ of the Hessian of every batch.
        terms: $Q \ge 0$.
        inner_steps: inner steps before each outer one.
        inner_batch_size: rows in a draw; see :class:`BilevelAlgorithm`, as for the rest.
        outer_batch_size: rows in a draw.
        project: puts the hyperparameters back into their domain.
        seed: of the draws.

    Raises:
        ArgumentError: ``step`` is not positive, or a count is negative.
        GradientError, NonFiniteError: at a step: what the oracles refuse; a series that diverges
            ends in a direction that is not finite, and nothing is moved.

    Cost: ``inner_steps + 1`` gradients, ``Q`` products with Hessians of batches and one mixed
    product a step.

    Source: Ji, Yang and Liang, "Bilevel optimization: convergence analysis and enhanced design"
    (ICML 2021), algorithm 2 and equation 5.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import Bilevel, StocBiO
        >>> inner = lambda w, a: 0.5 * (w - a).square().sum()
        >>> outer = lambda w, a: 0.5 * (w - 3).square().sum()
        >>> a = torch.zeros(2)
        >>> problem = Bilevel(inner, outer, torch.zeros(2), a)
        >>> _ = StocBiO(problem, inner=0.5, outer=0.5, step=0.5, inner_steps=3).run(60)
        >>> a
        tensor([3., 3.])
    """

    def __init__(
        self,
        problem: Bilevel,
        *,
        inner: OptimizerLike,
        outer: OptimizerLike,
        step: float,
        terms: int = 3,
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
        self.inner_steps = require_count(inner_steps, "inner_steps")
        self.terms = require_count(terms, "terms")
        self.series_step = require_positive(step, "step")

    def _step(self) -> StepReport:
        self.descend(self.inner_steps)
        outer = self.problem.gradients("outer", self.draw("outer"))
        r = total = outer.params
        for _ in range(self.terms):
            r = r - self.series_step * self.problem.hessian_product(r, self.draw("inner"))
            total = total + r
        joint = self.problem.joint(self.series_step * total, self.draw("inner"))
        return self.finish(outer.hyper - joint.mixed_product, outer.value, joint.gradient)
