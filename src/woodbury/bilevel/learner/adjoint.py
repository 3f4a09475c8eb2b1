"""The linear solve of a hypergradient in a training loop, at the least number of products."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from woodbury.bilevel.learner.weight_decay import WeightDecay
from woodbury.bilevel.linearization import BatchLinearization
from woodbury.bilevel.parts import Parts
from woodbury.bilevel.problem import Bilevel
from woodbury.curvature.batches import Batch
from woodbury.errors import ArgumentError, GradientError, NonFiniteError, SolveError
from woodbury.operators import Diagonal, LinearOperator
from woodbury.solvers import Neumann, Recipe, Solution, SolveStatus, solve
from woodbury.solvers.neumann import NeumannState
from woodbury.solvers.solve import SolveWarning
from woodbury.spaces import Space

__all__ = ["Adjoint", "with_rates"]

# A relative residual beyond which a series diverges, rounding allowed for.
_GROWTH = 1.01


class Adjoint:
    r"""$H q = a$ and $J q$ at one point, $H$ with the penalties of weight decay in closed form.

    Args:
        problem: the losses without those penalties.
        batch: of the training.
        decays: the penalties by name.
        entering: hyperparameters that are differentiated through the graph.
        on_failure: what to do about a solve that failed.
        warned: failures that were warned of before; one of each kind is enough in a loop.

    Attributes:
        value: the training loss of this process, without penalties.
        gradient: the gradient ``[p]`` of the training loss with penalties.
        hessian: its Hessian.
    """

    def __init__(
        self,
        problem: Bilevel,
        batch: Batch,
        decays: Mapping[str, WeightDecay],
        entering: Sequence[str],
        on_failure: Literal["raise", "warn", "ignore"],
        warned: set[SolveStatus],
    ) -> None:
        self.problem, self.decays, self.entering = problem, decays, entering
        self.on_failure, self.warned = on_failure, warned
        self.local = BatchLinearization(problem, batch)
        self.weights = {name: p.detach() for name, p in problem.params.items()}
        self.value, self.gradient = self.local.value, self.local.gradient
        self.hessian: LinearOperator = self.local.hessian
        if decays:
            self.gradient = _penalised(self.gradient, self.weights, problem.space, decays.values())
            self.hessian = _Penalised(self.local.hessian, tuple(decays.values()))

    def solve(
        self, slope: Tensor, recipe: Recipe, *, certify: bool
    ) -> tuple[Solution, dict[str, Tensor]]:
        """The solution, and the mixed products by name of the hyperparameter."""
        found = self._series(slope, recipe, certify) if isinstance(recipe, Neumann) else None
        if found is None:
            solution = solve(self.hessian, slope, recipe, throw=False)
            self._judge(solution)
            mixed = self.local.mixed_parts(solution.value) if self.entering else {}
        else:
            solution, mixed = found
        parts = self._entering(mixed)
        q = self.problem.space.unflatten(solution.value)
        for name, decay in self.decays.items():
            parts[f"{name}.log_decay"] = decay.mixed(self.weights, q)
        return solution, parts

    def _series(
        self, slope: Tensor, recipe: Neumann, certify: bool
    ) -> tuple[Solution, Parts] | None:
        """K products; the residual comes with the mixed product. ``None`` where it diverges."""
        space = self.problem.space
        with torch.no_grad():
            state = recipe.prepare(self.hessian)
            assert isinstance(state, NeumannState)  # made by the recipe
            q = recipe._apply(self.hessian, state, slope)  # one vector, and no copy as a block
            mixed: Parts = {}
            product, products, residual = None, recipe.terms, math.nan
            if self.entering:
                product, mixed = self.local.joint_parts(q)
                product = _penalised(product, space.unflatten(q), space, self.decays.values())
            elif certify:
                product = self.hessian @ q
            if product is not None:
                products += 1
                norm = space.norm(slope).item()
                residual = space.norm(slope - product).item() / (norm or 1.0)
                if not residual <= _GROWTH:
                    return None
        solution = Solution(
            value=q,
            status=SolveStatus.completed,
            residual=torch.tensor(residual, dtype=torch.float64),
            steps=recipe.terms + 1,
            products=products + state.products,
            recipe=recipe,
            state=state,
        )
        return solution, mixed

    def _judge(self, solution: Solution) -> None:
        if solution.status is SolveStatus.non_finite:
            raise NonFiniteError(f"nothing was changed. {solution.message()}")
        if solution.ok or self.on_failure == "ignore":
            return
        if self.on_failure == "raise":
            raise SolveError(solution.message(), solution)
        if solution.status not in self.warned:
            self.warned.add(solution.status)
            warnings.warn(solution.message(), SolveWarning, stacklevel=6)

    def _entering(self, found: Parts) -> dict[str, Tensor]:
        """The parts of the hyperparameters that enter through the graph, seen to be there."""
        parts = {name: found[name] for name in self.entering}
        unused = [name for name, part in parts.items() if part is None]
        if unused:
            raise GradientError(
                f"the training loss does not depend on the hyperparameters {unused} together with "
                "the weights, so nothing can be learned about them; leave them out"
            )
        return {name: part for name, part in parts.items() if part is not None}


class _Penalised(LinearOperator):
    """A Hessian plus the diagonal ones of weight decays, added in place to its products."""

    def __init__(self, hessian: LinearOperator, decays: Sequence[WeightDecay]) -> None:
        super().__init__(
            hessian.shape,
            dtype=hessian.dtype,
            device=hessian.device,
            tags=hessian.tags,
            space=hessian.space,
        )
        self.hessian, self.decays = hessian, decays

    def _matvec(self, x: Tensor) -> Tensor:
        parts = self.space.unflatten(x.contiguous())
        return _penalised(self.hessian._matvec(x), parts, self.space, self.decays)

    def _matmat(self, X: Tensor) -> Tensor:
        return torch.stack([self._matvec(column) for column in X.unbind(1)], dim=1)


def _penalised(
    flat: Tensor, x: Mapping[str, Tensor], space: Space, decays: Iterable[WeightDecay]
) -> Tensor:
    """``flat`` plus the penalties' ``e^lambda x``; in place where ``flat`` is nobody else's."""
    if len(space.shapes) == 1:  # the vector of a single tensor is that of the graph
        flat = flat.clone()
    out = space.unflatten(flat)
    for decay in decays:
        decay.add_gradient(x, out)
    return flat


def with_rates(recipe: Recipe, optimizer: Optimizer | None, params: Mapping[str, Tensor]) -> Recipe:
    """A Neumann series without a step, with the learning rates of the training for it.

    Raises:
        ArgumentError: there is no optimizer, it does not train some of ``params``, or it has
            several learning rates and the series a preconditioner.
    """
    if not isinstance(recipe, Neumann) or recipe.step is not None:
        return recipe
    if optimizer is None:
        raise ArgumentError(
            "the Neumann series takes the learning rate of the training for its step; give "
            "optimizer=..., or recipe=Neumann(terms, step)"
        )
    rates = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    missing = [name for name, p in params.items() if id(p) not in rates]
    if missing:
        raise ArgumentError(
            f"the optimizer does not train the parameters {missing}; leave them out with "
            "params=..., or give recipe=Neumann(terms, step)"
        )
    each = [rates[id(p)] for p in params.values()]
    if len(set(each)) == 1:
        return replace(recipe, step=each[0])
    if recipe.preconditioner is not None:
        raise ArgumentError(
            "the parameter groups have several learning rates, which precondition the series; "
            "leave the preconditioner out, or give recipe=Neumann(terms, step, preconditioner)"
        )
    pairs = zip(params.values(), each, strict=True)
    flat = torch.cat([p.detach().new_full((p.numel(),), rate) for p, rate in pairs])
    return Neumann(recipe.terms, 1.0, Diagonal(flat))
