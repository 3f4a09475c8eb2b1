"""SOBA: inner variables, adjoint and hyperparameters move together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from woodbury.bilevel.algorithm import (
    BilevelAlgorithm,
    OptimizerLike,
    StepReport,
    require_positive,
)
from woodbury.bilevel.problem import Bilevel
from woodbury.bilevel.rates import Rates
from woodbury.bilevel.sampling import BatchSize
from woodbury.errors import ArgumentError, NonFiniteError

__all__ = ["SOBA"]


class SOBA(BilevelAlgorithm):
    r"""Stochastic bilevel descent in a single loop (SOBA).

    With $w$ ``params``, $\lambda$ ``hyper`` and the adjoint $z$, which tends to
    $H^{-1} \nabla_w f$, all three move at once along unbiased estimates of

    $$D_w = \nabla_w g, \qquad D_z = H z - \nabla_w f, \qquad
      D_\lambda = \nabla_\lambda f - J z,$$

    on one batch of each loss: $w \leftarrow w - \rho_t D_w$, $z \leftarrow z - \rho_t D_z$,
    $\lambda \leftarrow \lambda - \gamma_t D_\lambda$ with $\rho_t = \rho\,t^{-2/5}$,
    $\gamma_t = \gamma\,t^{-3/5}$, $t = 1, 2, \dots$ Where all three are zero, $\lambda$ is
    stationary. (The $v$ of the paper is $-z$.)

    Args:
        problem: the :class:`Bilevel` problem, strongly convex in ``params``.
        inner: optimizer of ``params``; a number is $\rho$.
        outer: optimizer of ``hyper``; a number is $\gamma$.
        adjoint_step: $\rho$ of $z$; default ``inner``, where that is a number.
        decay: exponents of $1/t$ in $\rho_t$ and $\gamma_t$, which multiply the rates of the
            optimizers; with ``(0, 0)`` they are left alone, for a scheduler of your own.
        inner_batch_size: rows in a draw; see :class:`BilevelAlgorithm`, as for the rest.
        outer_batch_size: rows in a draw.
        project: puts the hyperparameters back into their domain.
        seed: of the draws.

    Attributes:
        z: the adjoint, which tends to $H^{-1} \nabla_w f$, ``[p]``; zero at first.

    Raises:
        ArgumentError: a setting makes no sense.
        NonFiniteError: at a step, a loss or a direction is NaN or infinite.

    Cost: a step takes one gradient of each loss, one product with the Hessian and one mixed
    product, of one batch each; memory of a few vectors.

    Source: Dagréou, Ablin, Vaiter and Moreau, "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms" (NeurIPS 2022), algorithm 1 and section
    3.2 for the steps.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import SOBA, Bilevel
        >>> inner = lambda w, a: 0.5 * (w - a).square().sum()
        >>> outer = lambda w, a: 0.5 * (w - 3).square().sum()
        >>> a = torch.zeros(2)
        >>> problem = Bilevel(inner, outer, torch.zeros(2), a)
        >>> reports = SOBA(problem, inner=0.5, outer=0.3, decay=(0.0, 0.0)).run(300)
        >>> a.round(decimals=3)
        tensor([3., 3.])
    """

    keeps: ClassVar[tuple[str, ...]] = ("z",)

    def __init__(
        self,
        problem: Bilevel,
        *,
        inner: OptimizerLike,
        outer: OptimizerLike,
        adjoint_step: float | None = None,
        decay: tuple[float, float] = (0.4, 0.6),
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
        if len(decay) != 2 or not all(0 <= power < math.inf for power in decay):
            raise ArgumentError(f"decay is {decay}; it must be two exponents >= 0")
        self.adjoint_step = step_of(adjoint_step, inner, "adjoint_step")
        self.decay = decay
        assert self.inner_optimizer is not None  # inner was given
        self._rates = (Rates(self.inner_optimizer), Rates(self.outer_optimizer))
        self.z = torch.zeros_like(problem.params_vector())

    def _step(self) -> StepReport:
        inner = self.problem.joint(self.z, self.draw("inner"))
        outer = self.problem.gradients("outer", self.draw("outer"))
        return self._together(
            inner.gradient,
            inner.hessian_product - outer.params,
            outer.hyper - inner.mixed_product,
            outer.value,
        )

    def _together(self, of_w: Tensor, of_z: Tensor, of_hyper: Tensor, value: float) -> StepReport:
        """Move all three along their directions."""
        if not torch.isfinite(of_z).all():
            raise NonFiniteError(
                f"the direction of the adjoint is NaN or infinite after {self.steps} steps: reduce "
                f"adjoint_step (now {self.adjoint_step:g})"
            )
        factors = [(self.steps + 1) ** -power for power in self.decay]
        for rates, power, factor in zip(self._rates, self.decay, factors, strict=True):
            if power:
                rates.scale(factor)
        report = self.finish(of_hyper, value, of_w)
        self.z = self.z - factors[0] * self.adjoint_step * of_z
        self.move_params(of_w)
        return report


def step_of(given: float | None, inner: OptimizerLike, what: str) -> float:
    """A step of the method's own: as given, or the inner learning rate.

    Raises:
        ArgumentError: it is not positive, or not given where ``inner`` is no number.
    """
    if given is None:
        if isinstance(inner, bool) or not isinstance(inner, int | float):
            raise ArgumentError(f"give {what}: it follows inner only where that is a learning rate")
        given = float(inner)
    return require_positive(given, what)
