"""SABA: SOBA with the variance of its directions reduced by a memory of each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from woodbury.bilevel.algorithm import OptimizerLike, StepReport
from woodbury.bilevel.problem import Bilevel
from woodbury.bilevel.soba import SOBA
from woodbury.curvature.batches import Batch
from woodbury.errors import ArgumentError

__all__ = ["SABA"]


class SABA(SOBA):
    r"""Single-loop bilevel descent with variance reduction in the manner of SAGA (SABA).

    The directions are those of :class:`SOBA`. For each batch $i$ of the data it remembers what was
    computed of it last, for $\nabla_w g_i$, $H_i z$, $J_i z$, $\nabla_w f_j$ and
    $\nabla_\lambda f_j$, and replaces an estimate $\phi_i$ by

    $$\phi_i - \bar\phi_i + \textstyle\sum_j s_j \bar\phi_j$$

    with the memories $\bar\phi$ and the shares $s_j$ of the rows. It is unbiased, and its variance
    vanishes as the iterates settle: constant steps converge. The first step fills the memories by
    a pass over the data.

    Args:
        problem: the :class:`Bilevel` problem, strongly convex in ``params``, whose data are lists
            of batches in memory (or one batch, or none): the batches are what is sampled, with
            probabilities in proportion to their rows.
        inner: optimizer of ``params``; a number is $\rho$.
        outer: optimizer of ``hyper``; a number is $\gamma$.
        adjoint_step: $\rho$ of $z$; default ``inner``, where that is a number.
        decay: exponents of $1/t$ in the steps; constant by default.
        project: puts the hyperparameters back into their domain.
        seed: of the draws.

    Attributes:
        z: the adjoint, which tends to $H^{-1} \nabla_w f$, ``[p]``; zero at first.
        memory: what is remembered, by name, ``[batches, p]`` or ``[batches, h]``, and the means.

    Raises:
        ArgumentError: a setting makes no sense, or a loss whose data cannot be remembered.
        NonFiniteError: at a step, a loss or a direction is NaN or infinite.

    Cost: a step takes what one of :class:`SOBA` does; the first, a pass over the data. Memory of
    $2p + h$ numbers for each inner batch and $p + h$ for each outer one.

    Source: Dagréou, Ablin, Vaiter and Moreau, "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms" (NeurIPS 2022), section 2.3.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import SABA, Bilevel
        >>> inner = lambda w, a, x: 0.5 * (w - a * x).square().mean()
        >>> outer = lambda w, a, x: 0.5 * (w - x).square().mean()
        >>> data = [torch.tensor([0.0, 1.0]), torch.tensor([2.0, 5.0]), torch.tensor([4.0])]
        >>> a = torch.zeros(1)
        >>> problem = Bilevel(inner, outer, torch.zeros(1), a, inner_data=data, outer_data=data)
        >>> reports = SABA(problem, inner=0.3, outer=0.02).run(1000)
        >>> a.round(decimals=4)  # w = a * mean(x) is the mean of x for a = 1
        tensor([1.])
    """

    keeps: ClassVar[tuple[str, ...]] = ("z", "memory")

    def __init__(
        self,
        problem: Bilevel,
        *,
        inner: OptimizerLike,
        outer: OptimizerLike,
        adjoint_step: float | None = None,
        decay: tuple[float, float] = (0.0, 0.0),
        project: Callable[[Any], object] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            problem,
            inner=inner,
            outer=outer,
            adjoint_step=adjoint_step,
            decay=decay,
            project=project,
            seed=seed,
        )
        for level, sampler in self.samplers.items():
            if sampler.count is None:
                raise ArgumentError(
                    f"the {level} data comes from a loader; SABA remembers something of each "
                    "batch, so give it a list of batches in memory, such as list(loader) with the "
                    "shuffling off"
                )
        self.memory: dict[str, Tensor] = {}

    def _step(self) -> StepReport:
        if not self.memory:
            self._fill()
        one, two = self.draw("inner"), self.draw("outer")
        inner = self.problem.joint(self.z, one)
        outer = self.problem.gradients("outer", two)
        of_w = self._corrected("inner_gradient", one, inner.gradient)
        product = self._corrected("hessian_product", one, inner.hessian_product)
        mixed = self._corrected("mixed_product", one, inner.mixed_product)
        of_params = self._corrected("outer_params", two, outer.params)
        of_hyper = self._corrected("outer_hyper", two, outer.hyper)
        return self._together(of_w, product - of_params, of_hyper - mixed, outer.value)

    def _corrected(self, name: str, batch: Batch | None, found: Tensor) -> Tensor:
        """The estimate with its memory taken into account, which is then renewed."""
        rows, mean = self.memory[name], self.memory[f"{name}_mean"]
        place = 0 if batch is None else batch.index
        change = found - rows[place]
        corrected = change + mean
        rows[place] = found
        level = "outer" if name.startswith("outer") else "inner"
        mean.add_(change, alpha=self._share(level, batch))
        return corrected

    def _share(self, level: str, batch: Batch | None) -> float:
        data = self.problem.data[level]
        return 1.0 if batch is None or data is None else batch.size / data.num_examples

    def _fill(self) -> None:
        names = {
            "inner": ("inner_gradient", "hessian_product", "mixed_product"),
            "outer": ("outer_params", "outer_hyper"),
        }
        rows: dict[str, list[Tensor]] = {name: [] for of in names.values() for name in of}
        shares: dict[str, list[float]] = {level: [] for level in names}
        for batch, share in self.problem.batches("inner"):
            joint = self.problem.joint(self.z, batch)
            parts = (joint.gradient, joint.hessian_product, joint.mixed_product)
            for name, part in zip(names["inner"], parts, strict=True):
                rows[name].append(part)
            shares["inner"].append(share)
        for batch, share in self.problem.batches("outer"):
            found = self.problem.gradients("outer", batch)
            for name, part in zip(names["outer"], (found.params, found.hyper), strict=True):
                rows[name].append(part)
            shares["outer"].append(share)
        for level, of in names.items():
            for name in of:
                stacked = torch.stack(rows[name])
                weights = torch.tensor(shares[level], dtype=torch.float64).to(stacked)
                self.memory[name] = stacked
                self.memory[f"{name}_mean"] = weights @ stacked
