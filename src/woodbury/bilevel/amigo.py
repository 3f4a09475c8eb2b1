"""AmIGO: both the inner variables and the adjoint go on from where they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from woodbury.bilevel.algorithm import (
    BilevelAlgorithm,
    OptimizerLike,
    StepReport,
    require_count,
    require_positive,
)
from woodbury.bilevel.problem import Bilevel
from woodbury.bilevel.sampling import BatchSize

__all__ = ["AmIGO"]


class AmIGO(BilevelAlgorithm):
    r"""Amortised implicit gradient: warm starts of the parameters and of the adjoint.

    One outer step is ``inner_steps`` steps of the inner optimizer on fresh batches, then
    ``adjoint_steps`` steps of stochastic descent on $\frac12 z^T H z - a^T z$,

    $$z \leftarrow z - \beta\,(H(\mathcal B) z - a), \qquad a = \nabla_w f(\mathcal D),$$

    from the last $z$, with a fresh batch $\mathcal B$ each, and one step of the outer optimizer
    along $\nabla_\lambda f(\mathcal D) - J z$. With few steps of each the errors of both shrink
    along the outer steps, and the rate is that of a method that solves both. Its variant with
    conjugate gradients is ``AlternatingIFT(problem, Implicit(CG(max_steps=N),
    on_failure="ignore"))``, which keeps its adjoint, too.

    Args:
        problem: the :class:`Bilevel` problem.
        inner: optimizer of the parameters.
        outer: optimizer of the hyperparameters.
        adjoint_step: $\beta$, below $2 / \lambda_{max}$ of the Hessian of every batch.
        adjoint_steps: steps on the adjoint, at least 1.
        inner_steps: inner steps before each outer one.
        inner_batch_size: rows in a draw; see :class:`BilevelAlgorithm`, as for the rest.
        outer_batch_size: rows in a draw.
        project: puts the hyperparameters back into their domain.
        seed: of the draws.

    Attributes:
        z: the adjoint, which tends to $H^{-1} a$, ``[p]``; zero at first.

    Raises:
        ArgumentError: ``adjoint_step`` is not positive, or a count makes no sense.
        GradientError, NonFiniteError: at a step: what the oracles refuse; an adjoint that diverges
            ends in a direction that is not finite, and nothing is moved.

    Cost: ``inner_steps + 1`` gradients, ``adjoint_steps`` products with Hessians of batches and one
    mixed product a step.

    Source: Arbel and Mairal, "Amortized implicit differentiation for stochastic bilevel
    optimization" (ICLR 2022), algorithms 1 to 3.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import AmIGO, Bilevel
        >>> inner = lambda w, a: 0.5 * (w - a).square().sum()
        >>> outer = lambda w, a: 0.5 * (w - 3).square().sum()
        >>> a = torch.zeros(2)
        >>> problem = Bilevel(inner, outer, torch.zeros(2), a)
        >>> _ = AmIGO(problem, inner=0.5, outer=0.5, adjoint_step=0.5, adjoint_steps=2).run(60)
        >>> a
        tensor([3.0000, 3.0000])
    """

    keeps: ClassVar[tuple[str, ...]] = ("z",)

    def __init__(
        self,
        problem: Bilevel,
        *,
        inner: OptimizerLike,
        outer: OptimizerLike,
        adjoint_step: float,
        adjoint_steps: int = 10,
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
        self.adjoint_steps = require_count(adjoint_steps, "adjoint_steps", least=1)
        self.adjoint_step = require_positive(adjoint_step, "adjoint_step")
        self.z = torch.zeros_like(problem.params_vector())

    def _step(self) -> StepReport:
        self.descend(self.inner_steps)
        outer = self.problem.gradients("outer", self.draw("outer"))
        for _ in range(self.adjoint_steps):
            residual = self.problem.hessian_product(self.z, self.draw("inner")) - outer.params
            self.z = self.z - self.adjoint_step * residual
        joint = self.problem.joint(self.z, self.draw("inner"))
        return self.finish(outer.hyper - joint.mixed_product, outer.value, joint.gradient)
