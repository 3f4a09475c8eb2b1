"""A solver whose solutions can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, GradientError
from woodbury.implicit.condition import Condition, FlatCondition
from woodbury.implicit.link import Link, WarmStart, attach_flat
from woodbury.implicit.modes import Implicit, Mode, Steps, Unrolled, mode_of
from woodbury.implicit.run import Checks, Run, tensors_that_require_grad
from woodbury.implicit.trees import Arguments, checked_argnums
from woodbury.solvers import SolveReport

__all__ = ["ImplicitSolver"]


@dataclass(frozen=True, eq=False)
class ImplicitSolver:
    """A solver whose solutions can be differentiated; made by ``root`` and its relatives.

    Called as the solver is, ``solve(x0, *args, **options)``. Under ``torch.compile`` the call is
    outside the graph: a clear break, since a solver may be anything.

    Attributes:
        condition: what holds at a solution.
        solver: ``solver(x0, *args, **options)``.
        mode: how it is differentiated.
        argnums: which of ``args`` are differentiated; ``None`` for all floating tensors in them.
        has_aux: whether the solver returns ``(solution, auxiliary output)``.
        report: receives the linear solves.
        warm: where linear solves start.
        strong_convexity: for the bound of the error of a solution that is not stationary.
        stationary_rtol: relative residual beyond which a solution is warned of.

    Example:
        >>> import torch
        >>> from woodbury.implicit import root
        >>> sqrt = root(lambda x, t: x**2 - t, lambda x0, t: t.sqrt())
        >>> torch.func.grad(lambda t: sqrt(None, t))(torch.tensor(4.0))
        tensor(0.2500)
        >>> sqrt.with_mode("one_step").mode
        OneStep(step=None)
    """

    condition: Condition
    solver: Callable[..., Any]
    mode: Mode
    argnums: int | Sequence[int] | None = None
    has_aux: bool = False
    report: SolveReport | None = None
    warm: WarmStart | None = None
    strong_convexity: float | None = None
    stationary_rtol: float = 1e-3

    def __post_init__(self) -> None:
        if not callable(self.solver):
            raise ArgumentError(f"the solver is {type(self.solver).__name__}, not a function")
        if self.strong_convexity is not None and not self.strong_convexity > 0:
            raise ArgumentError(
                f"strong_convexity is {self.strong_convexity}; it must be positive, or None"
            )
        if not self.stationary_rtol >= 0:
            raise ArgumentError(
                f"stationary_rtol is {self.stationary_rtol}; it must be >= 0 (math.inf for no "
                "warnings)"
            )

        _OutsideGraphs.make()

    def with_mode(self, mode: str | Mode) -> ImplicitSolver:
        """The same solver, differentiated in another way."""
        return replace(self, mode=mode_of(mode))

    def __call__(self, x0: Any, *args: Any, **options: Any) -> Any:
        """The solution, connected to the arguments; with its auxiliary output if there is one.

        Args:
            x0: where the solver starts; the solution does not depend on it, so it gets no gradient.
            *args: what the solver and the condition depend on, pytrees of tensors and anything
                else.
            **options: for the solver only; no tensor in them may require a gradient.

        Raises:
            GradientError: a derivative would be lost: of a closed-over tensor, of an option, of an
                argument that has none.
            ShapeError, DtypeError: the condition does not return what is like the solution.
            NonFiniteError: the solution or its residual is NaN or infinite.
        """
        return _OutsideGraphs.call(self, x0, args, options)

    def _call(self, x0: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if torch.is_grad_enabled() and tensors_that_require_grad(options):
            raise GradientError(
                f"a tensor among the options {sorted(options)} requires a gradient, which would be "
                "lost: pass it as a positional argument"
            )
        if isinstance(self.mode, Unrolled):
            return self._unrolled(x0, args, options)
        steps = self.mode if isinstance(self.mode, Steps) else None
        inside = torch._C._are_functorch_transforms_active()
        closures = torch.is_grad_enabled() or inside
        run = Run(
            self.condition,
            self.solver,
            options,
            Arguments.of((x0,), None),
            Arguments.of(args, self.argnums),
            self.has_aux,
            Checks(self.stationary_rtol, self.strong_convexity, closures, inside),
            steps,
        )
        flat, x, aux, length = run()
        tensors = run.arguments.tensors
        if isinstance(self.mode, Implicit):
            link = Link(
                flat, self.mode.recipe, self.mode.on_failure, self.report, self.warm, run.witness
            )
            x = attach_flat(link, x, tensors)
        elif steps is not None:
            x = _stepped(flat, x, tensors, steps, length)
        found = flat.unknown.unflatten(x, work=False)
        return (found, aux) if self.has_aux else found

    def _unrolled(self, x0: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The solver as it is; what is not asked for is cut off."""
        chosen = checked_argnums(self.argnums, len(args))
        arguments = Arguments.of(args, self.argnums)
        tensors = list(arguments.tensors)
        if chosen is not None:
            wanted = arguments.wanted
            tensors = [t if w else t.detach() for t, w in zip(tensors, wanted, strict=True)]
        start = Arguments.of((x0,), None)
        (x0,) = start.filled([t.detach() for t in start.tensors])
        return self.solver(x0, *arguments.filled(tensors), **options)


def _stepped(
    flat: FlatCondition, x: Tensor, tensors: Sequence[Tensor], steps: Steps, length: Any
) -> Tensor:
    """``x`` with the derivative of a few steps from it."""
    wanted = flat.arguments.wanted
    cut = [t if w else t.detach() for t, w in zip(tensors, wanted, strict=True)]
    step = length * getattr(steps, "damping", 1.0)
    z = x
    for _ in range(steps.count):
        z = z - step * flat(z, cut)
    return x + (z - z.detach())


def _eager(solver: ImplicitSolver, x0: Any, args: Any, options: Any) -> Any:
    return solver._call(x0, args, options)


class _OutsideGraphs:
    """The call with ``torch.compile`` switched off in it, made with the first solver.

    Not with the module: it loads the compiler, which takes a second.
    """

    call: Callable[..., Any] = staticmethod(_eager)
    made = False

    @classmethod
    def make(cls) -> None:
        if not cls.made:
            reason = "woodbury.implicit calls any solver, so its call is outside the graph"
            cls.call = staticmethod(torch.compiler.disable(_eager, reason=reason))
            cls.made = True
