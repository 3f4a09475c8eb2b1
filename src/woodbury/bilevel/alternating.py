"""Alternating descent: some inner steps, one hypergradient, one outer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from woodbury.bilevel.algorithm import (
    BilevelAlgorithm,
    OptimizerLike,
    StepReport,
    by_name,
    require_count,
)
from woodbury.bilevel.estimate import estimate_hypergradient
from woodbury.bilevel.estimators import Estimator, HypergradientState, as_mode
from woodbury.bilevel.problem import Bilevel
from woodbury.bilevel.sampling import BatchSize
from woodbury.decompositions.nystrom import NystromMethod
from woodbury.implicit.modes import Implicit
from woodbury.solvers import Neumann, Nystrom

__all__ = ["AlternatingIFT", "AlternatingNystrom"]


class AlternatingIFT(BilevelAlgorithm):
    r"""Joint training with the implicit function theorem (IFT-Neumann).

    One outer step is ``inner_steps`` steps of the inner optimizer on fresh batches, one
    hypergradient

    $$d - J q, \qquad q = \alpha \sum_{j=0}^{K} (I - \alpha H)^j a, \quad
    a = \nabla_w f,\ d = \nabla_\lambda f,$$

    on one more batch of each loss where the parameters are then (they need not be at a minimum),
    and one step of the outer optimizer. ``K`` terms are ``K + 1`` summands, and the direct part
    $d$ comes with a plus.

    Args:
        problem: the :class:`Bilevel` problem, of millions of hyperparameters if need be.
        estimator: any recipe or mode, as for :func:`estimate_hypergradient`. Default
            ``Implicit(Neumann(terms=20), on_failure="warn")``; the paper takes the inner learning
            rate for the step, ``Neumann(terms=K, step=lr)``, and ``K = 0`` where it is cheap.
        inner: optimizer of the parameters.
        outer: optimizer of the hyperparameters.
        inner_steps: inner steps before each outer one.
        restart: put the parameters (and the inner optimizer) back to where they began before the
            inner steps, instead of going on from the last ones.
        state: a :class:`HypergradientState`; by default a new one.
        inner_batch_size: rows in a draw; see :class:`BilevelAlgorithm`, as for the rest.
        outer_batch_size: rows in a draw.
        project: puts the hyperparameters back into their domain.
        seed: of the draws.

    Raises:
        ArgumentError: ``inner_steps`` is negative; what :class:`BilevelAlgorithm` refuses.
        GradientError, NonFiniteError, SolveError: at a step, as :func:`estimate_hypergradient`.

    Cost: a step takes ``inner_steps + 2`` gradients, ``K`` products with the Hessian of one batch
    and one mixed product; memory of a few vectors and the graph of one gradient.

    Source: Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit
    differentiation" (AISTATS 2020), algorithms 1 to 3.

    Example:
        >>> import torch
        >>> from woodbury import Neumann
        >>> from woodbury.bilevel import AlternatingIFT, Bilevel
        >>> inner = lambda w, a: 0.5 * (w - a).square().sum()
        >>> outer = lambda w, a: 0.5 * (w - 3).square().sum()
        >>> a = torch.zeros(2)
        >>> problem = Bilevel(inner, outer, torch.zeros(2), a)
        >>> algorithm = AlternatingIFT(problem, Neumann(5, step=0.5), inner=0.5, outer=0.5)
        >>> reports = algorithm.run(60)
        >>> a
        tensor([3., 3.])
        >>> reports[0].status.name
        'completed'
    """

    keeps: ClassVar[tuple[str, ...]] = ("state",)

    def __init__(
        self,
        problem: Bilevel,
        estimator: Estimator | None = None,
        *,
        inner: OptimizerLike,
        outer: OptimizerLike,
        inner_steps: int = 1,
        restart: bool = False,
        state: HypergradientState | None = None,
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
        if estimator is None:
            estimator = Implicit(Neumann(terms=20), on_failure="warn")
        as_mode(estimator)  # refuses what is none
        self.estimator: Estimator = estimator
        self.inner_steps = require_count(inner_steps, "inner_steps")
        self.state = HypergradientState() if state is None else state
        self._origin = problem.params_vector() if restart else None

    def _step(self) -> StepReport:
        if self._origin is not None:
            self.problem.set_params(self._origin)
            if self.inner_optimizer is not None:
                self.inner_optimizer.state.clear()
        self.descend(self.inner_steps)
        found = estimate_hypergradient(
            self.problem,
            self._estimator(),
            state=self.state,
            inner_batch=self.draw("inner"),
            outer_batch=self.draw("outer"),
        )
        gradient = by_name(found.value)
        self.move_hyper(gradient)
        norms = torch.stack([part.norm() for part in gradient.values()])
        solution = found.solution
        return StepReport(
            step=0,
            hypergradient_norm=norms.norm().item(),
            outer_value=found.outer_value,
            stationarity=found.stationarity,
            status=None if solution is None else solution.status,
            residual=None if solution is None else float(solution.residual),
            refreshed=found.refreshed,
        )

    def _estimator(self) -> Estimator:
        return self.estimator


class AlternatingNystrom(AlternatingIFT):
    r""":class:`AlternatingIFT` with the inverse of a Nystrom approximation of the Hessian.

    $q = (H_k + \rho I)^{-1} a$ with $H_k = C M^{-1} C^T$ from $k$ columns $C$ of $H$ that are drawn
    uniformly, anew at each outer step: no step length to tune, and no iteration.

    Args:
        problem: the :class:`Bilevel` problem.
        rank: $k$.
        damping: $\rho$.
        inner: optimizer of the parameters.
        outer: optimizer of the hyperparameters.
        inner_steps: inner steps before each outer one.
        restart: begin each time from the same parameters, as the examples of the source do.
        method: ``"column"`` as in the source, or ``"gaussian"``: the stabilised sketch, better for
            its rank where $H$ is positive semidefinite.
        keep: keep one sketch across outer steps, until its residual has risen to ``refresh`` times
            what it was (see :class:`HypergradientState`); the report says when it is made anew.
        refresh: that factor.
        inner_batch_size: rows in a draw; see :class:`BilevelAlgorithm`, as for the rest.
        outer_batch_size: rows in a draw.
        project: puts the hyperparameters back into their domain.
        seed: of the draws and of the columns.

    Raises:
        RankError: at a step, ``rank`` is above the number of parameters.
        ArgumentError, GradientError, NonFiniteError: as for :class:`AlternatingIFT`.

    Cost: ``rank`` products and $O(p k^2)$ multiplications a step (with ``keep`` at a refresh only),
    one product for the residual; memory of $k$ vectors.

    What a Nystrom inverse leaves out has length $1/\rho$: lower $\rho$ tenfold, and hypergradients
    get up to ten times as long. Set the outer rate together with it.

    Source: Hataya and Yamada, "Nystrom method for accurate and scalable implicit differentiation"
    (AISTATS 2023), equation 6; ``rank`` and ``damping`` are those of its examples.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import AlternatingNystrom, Bilevel
        >>> inner = lambda w, a: 0.5 * (w - a).square().sum()
        >>> outer = lambda w, a: 0.5 * (w - 3).square().sum()
        >>> a = torch.zeros(2)
        >>> problem = Bilevel(inner, outer, torch.zeros(2), a)
        >>> algorithm = AlternatingNystrom(problem, rank=2, inner=0.5, outer=0.5, inner_steps=5)
        >>> _ = algorithm.run(60)
        >>> a
        tensor([3., 3.])
    """

    def __init__(
        self,
        problem: Bilevel,
        *,
        rank: int = 5,
        damping: float = 0.1,
        inner: OptimizerLike,
        outer: OptimizerLike,
        inner_steps: int = 100,
        restart: bool = False,
        method: NystromMethod = "column",
        keep: bool = False,
        refresh: float = 2.0,
        inner_batch_size: BatchSize = None,
        outer_batch_size: BatchSize = None,
        project: Callable[[Any], object] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            problem,
            Nystrom(rank=rank, damping=damping, method=method, seed=seed),
            inner=inner,
            outer=outer,
            inner_steps=inner_steps,
            restart=restart,
            state=HypergradientState(refresh=refresh),
            inner_batch_size=inner_batch_size,
            outer_batch_size=outer_batch_size,
            project=project,
            seed=seed,
        )
        self.rank, self.damping, self.method = rank, damping, method
        self.seed, self.keep = seed, keep

    def _estimator(self) -> Estimator:
        if self.keep:
            return self.estimator
        # Another seed is another recipe, for which the state has nothing prepared.
        return Nystrom(self.rank, self.damping, method=self.method, seed=self.seed + self.steps)
