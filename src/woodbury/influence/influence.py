"""``Influence``: what every training example does to what is measured of a query."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature import KFAC, Objective
from woodbury.curvature.damping import Damping
from woodbury.curvature.promotion import promoted
from woodbury.errors import ArgumentError, StructureError
from woodbury.influence.chunks import chosen_rows, digest_of_rows, modules_of
from woodbury.influence.forecast import (
    Forecast,
    Plan,
    gradient_seconds,
    layered_forecast,
    make_plan,
    solve_bytes,
)
from woodbury.influence.layered import Layered, layered_self_scores
from woodbury.influence.low_rank import LowRank
from woodbury.influence.measurements import Measurement, measured, support
from woodbury.influence.pairwise import Pairwise, self_scores
from woodbury.influence.runs import Run, run_of
from woodbury.influence.scores import Scores
from woodbury.influence.self_influence import SelfInfluence
from woodbury.influence.systems import (
    Matrix,
    System,
    base_operator,
    choose_recipe,
    products_at_most,
)
from woodbury.solvers import Recipe

__all__ = ["Influence"]

ProgressCallback = Callable[[str, float], object]

# Passes over the training examples that make a matrix, where it is not one of products.
_FITS = {"kfac": 1, "ekfac": 2, "diagonal": 1}


class Influence:
    r"""First-order influence of training examples on measurements.

    With the mean objective $F = \frac1N \sum_i w_i \ell_i + \frac12\theta^T\Lambda\theta$ at its
    minimiser $\hat\theta$, adding an example with weight $1/N$ moves the minimiser by
    $-\frac1N A^{-1}\nabla\ell_i$, and what is measured of query $q$ by

    $$ s_{qi} = -\frac1N \nabla m_q^T A^{-1} \nabla\ell_i , \qquad
       A \approx \nabla^2 F + \rho I. $$

    The score has the unit of the measurement. It is **negative where the example lowers the
    measurement**: with a loss measured, examples with negative scores speak for the prediction.
    Leaving example $i$ out changes the measurement by $-w_i s_{qi}$, to first order. Gradients of
    the regulariser are no part of $\nabla\ell_i$. Other libraries leave the minus sign or the
    $1/N$ away: theirs is $-N s$.

    Args:
        objective: of the training data, in mode ``"eval"``.
        measurement: ``"loss"``: of the query, by the criterion of the objective. ``"margin"``:
            $\log p_y/(1-p_y)$ of its label (mean over the counted elements). Or a function
            ``(outputs, batch)`` that returns one number for each query, ``[B]``; ``outputs`` are
            ``[B, ...]``.
        recipe: how to apply $A^{-1}$, any recipe of :mod:`woodbury.solvers`. Default: the
            structural inverse where the matrix has one, Cholesky to 3,000 parameters, CG beyond.
        matrix: $A$ without the damping: ``"gauss_newton"`` (default), ``"hessian"``, ``"fisher"``,
            ``"empirical_fisher"``; ``"kfac"`` and ``"ekfac"``, with labels drawn from the model
            (scores then go layer by layer in the eigenbasis, where no recipe is given);
            ``"diagonal"`` (of the empirical Fisher matrix); ``"identity"`` (scores are then
            products of gradients); a :class:`~woodbury.LinearOperator` ``[n, n]`` of the
            parameters; or a function that makes one of the objective.
        damping: $\rho \ge 0$, in the unit of the matrix; for K-FAC and EK-FAC also one number for
            each layer, or :class:`~woodbury.curvature.RelativeDamping`. Default: 0 where the matrix
            is positive definite by its tags (all of ``l2`` is positive) or not known to be
            semidefinite; else 0.1 of its mean eigenvalue, for K-FAC and EK-FAC of that of each
            layer. It is in ``scores.settings``.
        tolerance: relative error in the Frobenius norm over all scores that a separable form of
            the inverse spectrum may cost where scores go layer by layer; it is measured on a
            sample of exact scores, and the certificate has its upper limit. Queries with small
            scores may have a larger error of their own. 0 for exact scores.
        memory: bytes that scores, solves, gradients and linearised curvature may take together,
            beside the model and the data. Default half of what is free.
        throw: raise where a solve fails; otherwise its status is in ``scores.solves``.
        progress: called as ``progress(stage, fraction)``.

    Raises:
        ArgumentError: a measurement, matrix, damping or memory that makes no sense.
        StructureError: the examples depend on each other (mode ``"train"``).
        ShapeError: the matrix is not of the parameters.
        BudgetError: at use, the memory does not hold the scores and one query.
        DataError: at use, a loader that shuffles without row numbers, a loss without one value per
            example, or a folder of another run.
        NonFiniteError: at use, a gradient that is NaN or infinite, with its rows.
        SolveError: at use, as the recipe raises, where ``throw``.

    Cost: a solve for each query, in blocks, and one pass over the gradients of the training
    examples for each block. Memory as planned; see :meth:`forecast`.

    Source: Cook and Weisberg, "Residuals and influence in regression" (1982); Koh and Liang,
    "Understanding black-box predictions via influence functions" (ICML 2017); Gauss-Newton in the
    place of the Hessian: Grosse et al., "Studying large language model generalization with
    influence functions" (2023), section 2.

    Example:
        Least squares through the origin, one query that is the second row:

        >>> import torch
        >>> from woodbury import Influence, Objective
        >>> x, y = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[1.0], [1.0]]).double()
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(3 / 5)
        >>> influence = Influence(Objective(model, "mse", (x, y)), damping=0.0)
        >>> influence.scores((x[1:], y[1:])).values
        tensor([[ 0.0640, -0.0640]], dtype=torch.float64)
    """

    def __init__(
        self,
        objective: Objective,
        measurement: Measurement = "loss",
        recipe: Recipe | None = None,
        *,
        matrix: Matrix = "gauss_newton",
        damping: Damping | None = None,
        tolerance: float = 0.01,
        memory: int | None = None,
        throw: bool = True,
        progress: ProgressCallback | None = None,
    ) -> None:
        if objective.replayed:
            raise StructureError(
                "in mode 'train' the loss of an example depends on its batch, so its influence is "
                "not defined by this formula; use Objective(..., mode='eval')"
            )
        if isinstance(damping, int | float) and not 0 <= damping < float("inf"):
            raise ArgumentError(f"damping is {damping}; it must be a number >= 0")
        if isinstance(measurement, str) and measurement not in ("loss", "margin"):
            raise ArgumentError(
                f"measurement is {measurement!r}; use 'loss', 'margin' or a function"
            )
        if memory is not None and memory < 1:
            raise ArgumentError(f"memory is {memory}; give a positive number of bytes")
        if not 0 <= tolerance < 1:
            raise ArgumentError(f"tolerance is {tolerance}; it must be in [0, 1)")
        self.objective = promoted(objective)
        self.tolerance = tolerance
        self._note = (
            "" if self.objective is objective else f"float32, the model is {objective.dtype}"
        )
        self.measurement = measurement
        self._given = recipe, matrix, damping
        self._memory, self._throw, self._progress = memory, throw, progress
        self._system: System | None = None

    @property
    def system(self) -> System:
        """The matrix with its damping and its recipe, prepared at the first use."""
        return self._prepared(None)

    def _prepared(self, plan: Plan | None) -> System:
        if self._system is None:
            recipe, matrix, damping = self._given
            cache = None if plan is None or self._memory is None else plan.cache
            self._system = System(self.objective, matrix, recipe, damping, self._throw, cache)
        return self._system

    def scores(
        self,
        queries: Any = None,
        *,
        rows: Tensor | None = None,
        modules: bool = False,
        query_rank: int | None = None,
        folder: str | Path | None = None,
    ) -> Scores:
        r"""The score of every training example for every query.

        Args:
            queries: data in a form that :class:`~woodbury.Objective` takes; by default the training
                data themselves.
            rows: numbers of the training examples to score, ``[N']``; by default all.
            modules: give the parts of the modules of the model, too: the sums over their
                parameters.
            query_rank: keep $A^{-1}\nabla m_q$ of each layer as a matrix of this rank (32 in the
                source), where that takes less memory than what is exact: for K-FAC and EK-FAC
                without a recipe. ``error()`` is then a bound for every score, and the error over
                all is measured and in the certificate. ``tolerance`` has no part in it.
            folder: where finished pieces go. A run that was killed goes on there with the same
                result; another model, other data or other settings are refused.

        Returns:
            :class:`Scores` ``[Q, N']``, columns in ascending order of rows.
        """
        objective = self.objective
        self._require_rank(query_rank)
        asked = self._asked(queries)
        chosen = chosen_rows(objective, rows)
        names, owner = modules_of(objective)
        plan = make_plan(
            objective, self._memory, asked.num_examples, len(chosen), len(names) * modules
        )
        system = self._prepared(plan)
        if system.inverses is not None:
            return self._layered(asked, chosen, modules, query_rank, folder)
        self._require_rank(query_rank, system)
        words = {"kind": "scores", "modules": modules, "rows": digest_of_rows(chosen)}
        run = self._run(folder, words, system, asked)
        pairwise = Pairwise(
            objective, system, plan, run, chosen, owner if modules else [], self._say
        )
        values, error, parts = pairwise.scores(asked)
        return Scores(
            values=values,
            rows=chosen,
            support=support(self.measurement),
            solve_error=error,
            gradient_norms=pairwise.norms / objective.num_examples,
            proven=system.proven,
            modules=parts,
            module_names=names if modules else (),
            settings=self._settings(system),
            solves=system.certificate(),
        )

    def _layered(
        self, asked: Objective, chosen: Tensor, modules: bool, rank: int | None, folder: Any
    ) -> Scores:
        """By layers, in the eigenbasis of the matrix."""
        objective, system = self.objective, self.system
        assert system.inverses is not None  # seen by the caller
        count = len(system.inverses) if modules else 0
        plan = make_plan(objective, self._memory, asked.num_examples, len(chosen), count)
        words = {"kind": "scores", "modules": modules, "rows": digest_of_rows(chosen)}
        words.update({"tolerance": self.tolerance} if rank is None else {"query_rank": rank})
        run = self._run(folder, words, system, asked)
        left = chosen, run, modules, self._say
        if rank is None:
            layered = Layered(objective, system.inverses, self.tolerance, *left)
        else:
            memory = plan.budget - plan.scores
            layered = LowRank(objective, system.inverses, rank, memory, *left)
        values, parts, truncation = layered.scores(asked)
        errors = layered.errors(len(values), truncation)
        return Scores(
            values=values,
            rows=chosen,
            support=support(self.measurement),
            solve_error=errors,
            gradient_norms=layered.norms / objective.num_examples,
            proven=errors is not None,
            modules=parts,
            module_names=layered.names,
            settings=self._settings(system),
            solves={"ok": True, **layered.words(truncation)},
        )

    def self_influence(self, *, folder: str | Path | None = None) -> SelfInfluence:
        r"""$s_{ii} = -\frac1N \nabla\ell_i^T A^{-1}\nabla\ell_i$ of every training example.

        What adding an example once more does to its own loss; never positive where $A$ is positive
        definite. Examples with large values are those that the model fits on their own account:
        wrong labels, outliers.

        Args:
            folder: as for :meth:`scores`.

        Returns:
            :class:`SelfInfluence`, ``[N]``.
        """
        objective = self.objective
        objective.require_numbers()
        plan = make_plan(objective, self._memory, 1, objective.num_examples, 0)
        # Here every example is a right-hand side.
        plan = replace(plan, columns=max(1, plan.cache // solve_bytes(objective)))
        system = self._prepared(plan)
        if system.inverses is not None:
            run = self._run(folder, {"kind": "self influence"}, system, None)
            found = layered_self_scores(objective, system.inverses, run, self._say)
            nothing = torch.zeros(len(found), dtype=torch.float64)
            return SelfInfluence(found, nothing, True, self._settings(system), {"ok": True})
        run = self._run(folder, {"kind": "self influence"}, system, None)
        values, error = self_scores(objective, system, plan, run, self._say)
        return SelfInfluence(
            values, error, system.proven, self._settings(system), system.certificate()
        )

    def forecast(
        self, queries: Any = None, *, rows: Tensor | None = None, query_rank: int | None = None
    ) -> Forecast:
        """Memory, disk and time of :meth:`scores`, before it runs.

        Args:
            queries: as for :meth:`scores`.
            rows: as for :meth:`scores`.
            query_rank: as for :meth:`scores`.

        Raises:
            BudgetError: it would not fit into the memory.

        Cost: the gradients of some 100 examples and, where the recipe multiplies, two products
        with the matrix; nothing is kept, and no matrix is fitted. (A function that makes the matrix
        is called.) K-FAC and EK-FAC count with the passes that fit them.
        """
        objective = self.objective
        self._require_rank(query_rank)
        asked = self._asked(queries)
        chosen = chosen_rows(objective, rows)
        count = asked.num_examples
        plan = make_plan(objective, self._memory, count, len(chosen), 0)
        recipe, matrix, _ = self._given
        vector = objective.space.dim * torch.finfo(objective.dtype).bits // 8
        fits = _FITS.get(matrix, 0) if isinstance(matrix, str) else 0
        if recipe is None and (isinstance(matrix, KFAC) or matrix in ("kfac", "ekfac")):
            return layered_forecast(objective, asked, plan, len(chosen), fits, query_rank)
        gradients = gradient_seconds(objective, plan.chunk, len(chosen))
        product, products = self._products(plan, count) if not fits else (0.0, 0)
        passes = fits - (-count // plan.columns)
        disk = count * vector + 2 * plan.scores + passes * len(chosen) * 8
        memory = min(plan.budget, plan.peak(objective))
        return Forecast(memory, disk, passes, gradients, product, products, plan)

    def _products(self, plan: Plan, queries: int) -> tuple[float, int | None]:
        """Seconds of a product with the matrix, and how many the recipe may take."""
        recipe, matrix, _ = self._given
        base, _ = base_operator(
            self.objective, matrix, None if self._memory is None else plan.cache
        )
        if base.has_inverse:
            return 0.0, 0
        n = base.shape[0]
        probe = torch.ones(n, dtype=base.dtype, device=base.device)
        base @ probe  # the first product also linearises
        start = time.perf_counter()
        base @ probe
        seconds = time.perf_counter() - start
        recipe = choose_recipe(base) if recipe is None else recipe
        return seconds, products_at_most(recipe, n, queries)

    def _require_rank(self, rank: int | None, system: System | None = None) -> None:
        recipe, matrix, _ = self._given
        if rank is None:
            return
        if rank < 1:
            raise ArgumentError(f"query_rank is {rank}; give a positive number, for example 32")
        other = isinstance(matrix, str) and matrix not in ("kfac", "ekfac")
        if recipe is not None or other or system is not None:
            raise ArgumentError(
                "query_rank is for scores layer by layer: give matrix='kfac' or 'ekfac' and no "
                f"recipe (here the matrix is {matrix!r} and the recipe {recipe!r})"
            )

    def _asked(self, queries: Any) -> Objective:
        if queries is None:
            queries = self.objective.data
        return measured(self.objective, self.measurement, queries)

    def _say(self, stage: str, fraction: float) -> None:
        if self._progress is not None:
            self._progress(stage, min(1.0, fraction))

    def _settings(self, system: System) -> dict[str, Any]:
        name = self.measurement if isinstance(self.measurement, str) else "function"
        return {
            "measurement": name,
            "matrix": system.words,
            "damping": system.damping,
            "damping_chosen": system.chosen,
            "recipe": repr(system.recipe),
            "examples_in_the_mean": self.objective.num_examples,
            **({"computed_in": self._note} if self._note else {}),
        }

    def _run(
        self, folder: str | Path | None, words: dict[str, Any], system: System, asked: Any
    ) -> Run:
        given = None if isinstance(self._given[1], str) else system.matrix
        words = {**words, **self._settings(system)}
        return run_of(folder, words, self.objective, asked, given)
