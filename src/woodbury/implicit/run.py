"""One run of somebody's solver on plain tensors, whatever transforms are around it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from woodbury.decompositions import extreme_eigenvalues
from woodbury.errors import ArgumentError, ShapeError
from woodbury.implicit.closures import Witness, explained, from_outer_world, refuse_closed_over
from woodbury.implicit.condition import Condition, FlatCondition
from woodbury.implicit.jacobian import ConditionJacobian
from woodbury.implicit.modes import Steps
from woodbury.implicit.stationarity import StationarityWarning, assess
from woodbury.implicit.trees import Arguments, Unknown
from woodbury.operators.parts import from_outside

__all__ = ["Checks", "Run", "examined"]


@dataclass(frozen=True)
class Checks:
    """What is checked of every solution.

    Attributes:
        rtol: the relative residual beyond which a warning is given.
        strong_convexity: known or not.
        closures: whether tensors that the condition closes over may not require gradients.
        inside: whether the call is inside a transform of ``torch.func``.
    """

    rtol: float
    strong_convexity: float | None
    closures: bool
    inside: bool = False


def examined(
    flat: FlatCondition, x: Tensor, tensors: list[Tensor], start: Tensor | None, checks: Checks
) -> Witness:
    """Check a solution of plain tensors and warn; returns what watches the closed-over ones."""
    with torch.no_grad(), explained(flat.condition.function):
        residual, outside = from_outside(lambda: flat(x, tensors), [x, *tensors])
    outside = from_outer_world(outside, [x, *tensors], inside=checks.inside)
    if checks.closures:
        refuse_closed_over(outside, flat.condition.function)
    found = assess(flat, x, tensors, residual, start, checks.rtol, checks.strong_convexity)
    if not found.ok:
        warnings.warn(found.message(), StationarityWarning, stacklevel=_outside())
    return Witness(outside, flat.condition.function)


def _outside() -> int:
    """The stack level, as :func:`warnings.warn` counts it, of the first caller outside."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("woodbury.", "torch.")
    ):
        frame, level = frame.f_back, level + 1
    return level


@dataclass(eq=False)
class Run:
    """One call of a solver: where it starts, its arguments, and how its output is laid out.

    ``unknown``, ``witness`` and the structure of the auxiliary output are known after the run.
    """

    condition: Condition
    solver: Callable[..., Any]
    options: dict[str, Any]
    start: Arguments
    arguments: Arguments
    has_aux: bool
    checks: Checks
    steps: Steps | None
    unknown: Unknown | None = None
    witness: Witness | None = None
    aux_spec: TreeSpec | None = None
    aux_leaves: list[Any] = field(default_factory=list)

    def __call__(self) -> tuple[FlatCondition, Tensor, Any, Tensor | float]:
        """The condition, the flat solution, the auxiliary output and the length of a step."""
        tensors = (*self.start.tensors, *self.arguments.tensors)
        # Outside transforms the solver runs here and now, where its own errors are easiest to read.
        x, length, *aux = _Run.apply(self, *tensors) if self.checks.inside else self.on(tensors)
        given = iter(aux)
        leaves = [next(given) if leaf is None else leaf[0] for leaf in self.aux_leaves]
        found = tree_unflatten(leaves, self.aux_spec) if self.aux_spec is not None else None
        return self.flat, x, found, length

    @property
    def flat(self) -> FlatCondition:
        """The condition in the layout of the solution."""
        assert self.unknown is not None  # after the run
        return FlatCondition(self.condition, self.unknown, self.arguments)

    def on(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the solver on plain tensors: flat solution, step, tensors of the auxiliary output."""
        plain = [t.detach() for t in tensors]
        count = len(self.start.tensors)
        mine = plain[count:]
        (x0,), args = self.start.filled(plain[:count]), self.arguments.filled(mine)
        with torch.enable_grad(), explained(self.solver):  # a training loop calls backward()
            found = self.solver(x0, *args, **self.options)
        if self.has_aux:
            if not isinstance(found, tuple) or len(found) != 2:
                raise ArgumentError(
                    f"has_aux is true, but the solver returned {type(found).__name__}; it must "
                    "return the pair (solution, auxiliary output)"
                )
            found, aux = found
        else:
            aux = None
        unknown = Unknown.of(found, "the solution")
        if self.unknown is not None and self.unknown.shapes != unknown.shapes:
            raise ShapeError("the solver returned other shapes for another sample of the batch")
        self.unknown = unknown
        flat = self.flat
        with torch.no_grad(), torch.autocast(unknown.device.type, enabled=False):
            x = unknown.flatten(found, "the solution").detach().clone()
            self.witness = examined(flat, x, mine, self._flat_start(x0), self.checks)
            return x, self._length(flat, x, mine), *self._auxiliary(aux)

    def _flat_start(self, x0: Any) -> Tensor | None:
        """The start as a vector, where it is one of the same kind as the solution."""
        assert self.unknown is not None
        try:
            return self.unknown.flatten(x0, "x0").detach()
        except (ShapeError, TypeError):
            return None

    def _length(self, flat: FlatCondition, x: Tensor, tensors: list[Tensor]) -> Tensor:
        """The step of the modes that differentiate a few steps."""
        length = None if self.steps is None else self.steps.length
        if length is None and self.steps is not None and flat.condition.kind != "fixed_point":
            if not flat.condition.symmetric:
                raise ArgumentError(
                    f"{type(self.steps).__name__} of a root differentiates z - step * F(z): give "
                    "step (for a symmetric Jacobian it is found), or use fixed_point"
                )
            length = 1 / extreme_eigenvalues(ConditionJacobian(flat, x, tensors)).radius
        return torch.tensor(1.0 if length is None else length, dtype=x.dtype, device=x.device)

    def _auxiliary(self, aux: Any) -> list[Tensor]:
        """The tensors of the auxiliary output; the rest is kept here."""
        leaves, spec = tree_flatten(aux)
        if self.checks.inside:  # numbers of several samples are stacked like tensors
            leaves = [
                torch.as_tensor(v) if isinstance(v, (bool, int, float)) else v for v in leaves
            ]
        kept = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        if self.aux_spec is not None and (spec != self.aux_spec or kept != self.aux_leaves):
            raise ArgumentError(
                "the auxiliary output of two samples differs in structure or in what is neither "
                "tensor nor number, and cannot be batched: return tensors"
            )
        self.aux_spec, self.aux_leaves = spec, kept
        return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]


class _Run(torch.autograd.Function):
    """A run inside ``torch.func`` transforms: it has no derivative, and batches are looped over."""

    @staticmethod
    def forward(run: Run, *tensors: Tensor) -> Any:
        return run.on(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.count = len(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return (None,) * ctx.count

    @staticmethod
    def vmap(info: Any, in_dims: Any, run: Run, *tensors: Tensor) -> Any:
        samples = [
            [t] * info.batch_size if dim is None else t.unbind(dim)
            for t, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        found = (
            [_Run.apply(run, *sample) for sample in zip(*samples, strict=True)]
            if samples
            else [_Run.apply(run) for _ in range(info.batch_size)]
        )
        stacked = tuple(torch.stack(parts) for parts in zip(*found, strict=True))
        return stacked, (0,) * len(stacked)


def tensors_that_require_grad(tree: Any) -> list[Tensor]:
    """Leaves with a gradient to come."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.requires_grad]
