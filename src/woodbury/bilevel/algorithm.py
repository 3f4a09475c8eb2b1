"""What every bilevel algorithm is: ``step()``, a report, exact resume."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from woodbury.bilevel.oracles import OracleCounts
from woodbury.bilevel.parts import Tensors
from woodbury.bilevel.problem import Bilevel, Level
from woodbury.bilevel.sampling import BatchSize
from woodbury.curvature.batches import Batch
from woodbury.errors import ArgumentError, GradientError, NonFiniteError
from woodbury.solvers.solution import SolveStatus

__all__ = ["BilevelAlgorithm", "OptimizerLike", "StepReport"]

OptimizerLike = float | Optimizer | Callable[[list[Tensor]], Optimizer]


@dataclass(frozen=True)
class StepReport:
    r"""What one outer step found; ``None`` for what the method does not compute.

    Attributes:
        step: how many outer steps are done, this one included.
        hypergradient_norm: norm of the direction that the outer variables were moved along, before
            the outer optimizer.
        outer_value: the outer loss before the step, on the batch that was drawn.
        stationarity: $\|\nabla_w g\|$ where the hypergradient was taken, on the batch drawn.
        products: ``counts.total`` of the problem so far: what to compare algorithms at.
        status: how the linear solve ended.
        residual: its true relative residual.
        refreshed: why a sketch that was kept was made anew; empty where it was not.

    Example:
        >>> from woodbury.bilevel import StepReport
        >>> StepReport(step=1, hypergradient_norm=0.5).outer_value is None
        True
    """

    step: int
    hypergradient_norm: float
    outer_value: float | None = None
    stationarity: float | None = None
    products: int = 0
    status: SolveStatus | None = None
    residual: float | None = None
    refreshed: str = ""


class BilevelAlgorithm:
    r"""Base of the algorithms: it holds the problem, optimizers and samplers, and resumes exactly.

    An algorithm changes the tensors of the problem in place, one outer step a call of
    :meth:`step`. A subclass gives ``_step()``, which uses

    - ``draw(level)``: the next batch of a loss,
    - ``move_params(g)``, ``move_hyper(g)``: one step of an optimizer along a flat ``[p]`` or
      ``[h]`` gradient (or one by name),
    - ``descend(steps)``: that many inner steps on fresh batches,
    - ``finish(direction, outer_value, inner_gradient)``: ``move_hyper`` with a report,
    - the oracles of ``self.problem``,

    and returns the :class:`StepReport` without ``step`` and ``products``, which are filled in. It
    names in ``keeps`` the attributes that are its state (tensors, numbers, lists and mappings of
    them, or objects with a ``state_dict``), which are then saved and restored.

    Args:
        problem: the :class:`Bilevel` problem.
        outer: optimizer of ``hyper``: a learning rate (plain SGD), a factory such as
            ``lambda tensors: torch.optim.Adam(tensors, lr=1e-3)``, or an optimizer that was made
            with exactly those tensors.
        inner: the same for ``params``; ``None`` where the method moves them itself.
        inner_batch_size: rows in a draw of the inner loss; see :class:`Sampler`.
        outer_batch_size: likewise of the outer loss.
        project: called after each outer step with ``hyper`` (in the structure of the problem) to
            put it back into its domain in place, for instance ``lambda h: h.clamp_(min=1e-8)``.
        seed: of all that is drawn.

    Attributes:
        problem: the problem.
        inner_optimizer: the optimizer of ``params``, or ``None``.
        outer_optimizer: the optimizer of ``hyper``.
        generator: source of what the method itself draws.
        steps: outer steps done.

    Raises:
        ArgumentError: an optimizer of other tensors, or one that needs a closure (``LBFGS``).
        GradientError: ``params`` or ``hyper`` hold a tensor that is no leaf, or share memory.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import Bilevel, BilevelAlgorithm, StepReport
        >>> class OneStep(BilevelAlgorithm):
        ...     "Descent on the outer loss through one inner step of length 1."
        ...     def _step(self):
        ...         self.descend(1)
        ...         a = self.problem.params_gradient("outer", self.draw("outer"))
        ...         d = -self.problem.mixed_product(a, self.draw("inner"))
        ...         self.move_hyper(d)
        ...         return StepReport(0, d.norm().item())
        >>> inner = lambda w, a: 0.5 * (w - a).square().sum()
        >>> outer = lambda w, a: 0.5 * (w - 3).square().sum()
        >>> a = torch.zeros(1)
        >>> algorithm = OneStep(Bilevel(inner, outer, torch.zeros(1), a), inner=1.0, outer=0.5)
        >>> reports = algorithm.run(20)
        >>> a
        tensor([3.0000])
        >>> reports[-1].step, reports[0].products
        (20, 4)
    """

    keeps: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        problem: Bilevel,
        *,
        outer: OptimizerLike,
        inner: OptimizerLike | None = None,
        inner_batch_size: BatchSize = None,
        outer_batch_size: BatchSize = None,
        project: Callable[[Any], object] | None = None,
        seed: int = 0,
    ) -> None:
        require_apart(problem.params, problem.hyper)
        self.problem = problem
        self.outer_optimizer = as_optimizer(outer, problem.hyper, "outer")
        self.inner_optimizer = (
            None if inner is None else as_optimizer(inner, problem.params, "inner")
        )
        sizes: dict[Level, BatchSize] = {"inner": inner_batch_size, "outer": outer_batch_size}
        self.samplers = {
            level: problem.sampler(level, size, torch.Generator().manual_seed(seed + place))
            for place, (level, size) in enumerate(sizes.items())
        }
        self.generator = torch.Generator().manual_seed(seed + len(sizes))
        self.project = project
        self.steps = 0

    # --------------------------------------------------------------------------------- for users

    def step(self) -> StepReport:
        """One outer step, with what it takes of inner ones."""
        found = self._step()
        self.steps += 1
        return dataclasses.replace(found, step=self.steps, products=self.problem.counts.total)

    def run(
        self, steps: int, progress: Callable[[StepReport], object] | None = None
    ) -> list[StepReport]:
        """``steps`` outer steps; ``progress`` is called after each."""
        reports = []
        for _ in range(steps):
            reports.append(self.step())
            if progress is not None:
                progress(reports[-1])
        return reports

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next steps: tensors, optimizers, draws, the method's own.

        Copies, so that it stays what it is while the algorithm goes on.
        """
        inner = self.inner_optimizer
        return {
            "steps": self.steps,
            "params": _copied(dict(self.problem.params)),
            "hyper": _copied(dict(self.problem.hyper)),
            "inner_optimizer": None if inner is None else copy.deepcopy(inner.state_dict()),
            "outer_optimizer": copy.deepcopy(self.outer_optimizer.state_dict()),
            "samplers": {level: s.state_dict() for level, s in self.samplers.items()},
            "generator": self.generator.get_state(),
            "counts": dataclasses.asdict(self.problem.counts),
            "own": {name: _copied(_saved(getattr(self, name))) for name in self.keeps},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, of an algorithm made with the same arguments, with equal results.

        Raises:
            ArgumentError: ``state`` is of another problem or method.
        """
        tensors = {"params": self.problem.params, "hyper": self.problem.hyper}
        for which, ours in tensors.items():
            shapes = {name: tensor.shape for name, tensor in ours.items()}
            theirs = {name: tensor.shape for name, tensor in state[which].items()}
            if shapes != theirs:
                raise ArgumentError(f"the state is of {which} {theirs}, not of {shapes}")
        if set(state["own"]) != set(self.keeps):
            raise ArgumentError(
                f"the state holds {sorted(state['own'])}, {type(self).__name__} keeps "
                f"{sorted(self.keeps)}: it is of another method"
            )
        if (state["inner_optimizer"] is None) != (self.inner_optimizer is None):
            raise ArgumentError(
                "one of the state and this algorithm has an inner optimizer, the other has none"
            )
        with torch.no_grad():
            for which, ours in tensors.items():
                for name, tensor in ours.items():
                    tensor.copy_(state[which][name])
        self.steps = state["steps"]
        if self.inner_optimizer is not None:
            self.inner_optimizer.load_state_dict(copy.deepcopy(state["inner_optimizer"]))
        self.outer_optimizer.load_state_dict(copy.deepcopy(state["outer_optimizer"]))
        for level, sampler in self.samplers.items():
            sampler.load_state_dict(state["samplers"][level])
        self.generator.set_state(state["generator"])
        for name, value in state["counts"].items():
            setattr(self.problem.counts, name, value)
        for name in self.keeps:
            kept, mine = _copied(state["own"][name]), getattr(self, name)
            if hasattr(mine, "load_state_dict"):
                mine.load_state_dict(kept)
            else:
                setattr(self, name, kept)

    @property
    def counts(self) -> OracleCounts:
        """What the oracles of the problem were asked so far."""
        return self.problem.counts

    # ---------------------------------------------------------------------------- for subclasses

    def _step(self) -> StepReport:
        raise NotImplementedError(f"{type(self).__name__} does not define _step")

    def draw(self, level: Level) -> Batch | None:
        """The next batch of a loss; ``None`` for all of its data."""
        return self.samplers[level].draw()

    def descend(self, steps: int) -> float:
        """Inner steps on fresh batches; the norm of the first gradient (0 for no step)."""
        norm = 0.0
        for index in range(steps):
            gradient = self.problem.params_gradient("inner", self.draw("inner"))
            if index == 0:
                norm = self.problem.space.norm(gradient).item()
            self.move_params(gradient)
        return norm

    def finish(
        self, direction: Tensor, outer_value: float | None, inner_gradient: Tensor | None
    ) -> StepReport:
        """Move the hyperparameters along a flat ``[h]`` direction, and report.

        Raises:
            NonFiniteError: the direction holds NaN or infinity; nothing is moved then.
        """
        norm = self.problem.hyper_space.norm(direction).item()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the direction of the hyperparameters has norm {norm} at step {self.steps + 1}: a "
                "step of the method is too long for the curvature; lower it"
            )
        self.move_hyper(direction)
        stationarity = (
            None if inner_gradient is None else self.problem.space.norm(inner_gradient).item()
        )
        return StepReport(0, norm, outer_value, stationarity)

    def move_params(self, gradient: Tensor | Mapping[str, Tensor]) -> None:
        """One step of the inner optimizer along a flat ``[p]`` gradient, or one by name."""
        if self.inner_optimizer is None:
            raise ArgumentError(f"{type(self).__name__} has no inner optimizer: give inner=...")
        if isinstance(gradient, Tensor):
            gradient = self.problem.space.unflatten(gradient)
        advance(self.inner_optimizer, self.problem.params, gradient)

    def move_hyper(self, gradient: Tensor | Mapping[str, Tensor]) -> None:
        """One step of the outer optimizer along a flat ``[h]`` gradient, or one by name."""
        if isinstance(gradient, Tensor):
            gradient = self.problem.hyper_space.unflatten(gradient)
        advance(self.outer_optimizer, self.problem.hyper, gradient)
        self.project_hyper()

    def project_hyper(self) -> None:
        """Put the hyperparameters back into their domain, where one was given."""
        if self.project is not None:
            with torch.no_grad():
                hyper = {name: tensor.detach() for name, tensor in self.problem.hyper.items()}
                self.project(self.problem.structured("hyper", hyper))


def by_name(hyper: Tensors) -> dict[str, Tensor]:
    """A tensor or a mapping as a mapping."""
    return {"": hyper} if isinstance(hyper, Tensor) else dict(hyper)


def require_count(count: int, what: str, *, least: int = 0) -> int:
    """``count``, seen to be an integer of at least ``least``."""
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ArgumentError(f"{what} is {count!r}; it must be an integer >= {least}")
    return count


def require_positive(value: float, what: str) -> float:
    """``value``, seen to be positive and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ArgumentError(f"{what} is {value!r}; it must be positive and finite")
    return value


def require_apart(params: Mapping[str, Tensor], hyper: Mapping[str, Tensor]) -> None:
    """Raise unless all tensors can be changed in place, each by itself."""
    seen: dict[int, str] = {}
    for which, tensors in (("params", params), ("hyper", hyper)):
        for name, tensor in tensors.items():
            if not tensor.is_leaf:
                raise GradientError(
                    f"{which}[{name!r}] was computed from other tensors, so changing it in place "
                    "would not change those; pass the leaf (.detach().clone() makes one)"
                )
            if tensor.numel() and tensor.data_ptr() in seen:
                raise GradientError(
                    f"{which}[{name!r}] shares memory with {seen[tensor.data_ptr()]}; each tensor "
                    "must be given once (of tied weights, one)"
                )
            seen[tensor.data_ptr()] = f"{which}[{name!r}]"


def as_optimizer(given: OptimizerLike, tensors: Mapping[str, Tensor], what: str) -> Optimizer:
    mine = list(tensors.values())
    if isinstance(given, bool) or not (
        isinstance(given, int | float | Optimizer) or callable(given)
    ):
        raise ArgumentError(
            f"{what} is {given!r}; give a learning rate, a factory of an optimizer, or an optimizer"
        )
    if isinstance(given, int | float):
        if not given > 0:
            raise ArgumentError(f"the learning rate {what} is {given}; it must be positive")
        return SGD(mine, lr=given)
    made = given if isinstance(given, Optimizer) else given(mine)
    if isinstance(made, LBFGS):
        raise ArgumentError(
            f"{what} is LBFGS, which evaluates a closure of its own; give an optimizer that takes "
            "one gradient a step"
        )
    held = {id(tensor) for group in made.param_groups for tensor in group["params"]}
    if held != {id(tensor) for tensor in mine}:
        raise ArgumentError(
            f"the {what} optimizer holds {len(held)} tensors that are not the {len(mine)} of the "
            "problem; make it with those that were given to Bilevel, or give a factory"
        )
    return made


def advance(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], gradient: Mapping[str, Tensor]
) -> None:
    """One step along ``gradient``; ``.grad`` is afterwards what it was."""
    before = {name: tensor.grad for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        tensor.grad = gradient[name].detach().to(tensor.dtype)
    optimizer.step()
    for name, tensor in tensors.items():
        tensor.grad = before[name]


def _saved(value: Any) -> Any:
    return value.state_dict() if hasattr(value, "state_dict") else value


def _copied(value: Any) -> Any:
    """A copy of tensors in mappings and sequences; other objects as they are."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {name: _copied(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return type(value)(_copied(part) for part in value)  # type: ignore[call-arg]
    return value
