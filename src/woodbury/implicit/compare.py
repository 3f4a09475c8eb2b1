"""All modes beside finite differences, on the user's own problem."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from woodbury.errors import ArgumentError, DtypeError, GradientError
from woodbury.implicit.modes import Implicit, Mode, OneStep, Phantom, Truncated, Unrolled, mode_of
from woodbury.implicit.solver import ImplicitSolver
from woodbury.implicit.trees import Arguments
from woodbury.solvers import SolveReport

__all__ = ["ModeComparison", "ModeRow", "compare_modes"]

_ALL: tuple[Mode, ...] = (Implicit(), Unrolled(), Truncated(), OneStep(), Phantom())


@dataclass(frozen=True)
class ModeRow:
    """What one mode gave.

    Attributes:
        mode: the mode.
        value: derivative of the loss along the direction; NaN where there is none.
        relative_error: distance to the finite difference over its size.
        products: products of the linear solve, or steps differentiated; ``None`` where they are
            not counted.
        seconds: time of solution and derivative.
        failure: why there is no value, in words.

    Example:
        >>> from woodbury.implicit import Implicit
        >>> from woodbury.implicit.compare import ModeRow
        >>> ModeRow(Implicit(), 2.0, 1e-9, 3, 0.1, "").products
        3
    """

    mode: Mode
    value: float
    relative_error: float
    products: int | None
    seconds: float
    failure: str


@dataclass(frozen=True)
class ModeComparison:
    """A derivative by several modes beside finite differences; ``print`` it for the table.

    Attributes:
        rows: one per mode.
        finite_difference: the derivative by central differences, extrapolated.
        uncertainty: how much halving their step changed.

    Example:
        >>> import torch
        >>> from woodbury.implicit import compare_modes, fixed_point
        >>> T = lambda x, t: 0.5 * torch.cos(x) + t
        >>> def iterate(x, t):
        ...     for _ in range(60):
        ...         x = T(x, t)
        ...     return x
        >>> t = torch.zeros(3, dtype=torch.float64)
        >>> found = compare_modes(fixed_point(T, iterate), torch.zeros(3).double(), t)
        >>> bool(found["implicit"].relative_error < 1e-8)
        True
        >>> found["one_step"].relative_error > found["truncated"].relative_error
        True
    """

    rows: tuple[ModeRow, ...]
    finite_difference: float
    uncertainty: float

    def __getitem__(self, mode: str | Mode) -> ModeRow:
        """The row of a mode, or the first of a name."""
        wanted = mode_of(mode)
        for row in self.rows:
            same = type(row.mode) is type(wanted) if isinstance(mode, str) else row.mode == wanted
            if same:
                return row
        raise ArgumentError(f"{mode!r} was not compared")

    def __str__(self) -> str:
        lines = [f"{'mode':<44}{'value':>15}{'relative error':>16}{'products':>10}{'seconds':>10}"]
        for row in self.rows:
            name = repr(row.mode)
            name = name if len(name) <= 43 else name[:40] + "..."
            if row.failure:
                lines.append(f"{name:<44}{row.failure}")
                continue
            products = "-" if row.products is None else str(row.products)
            lines.append(
                f"{name:<44}{row.value:>+15.8e}{row.relative_error:>16.1e}{products:>10}"
                f"{row.seconds:>10.2g}"
            )
        lines.append(
            f"{'finite differences':<44}{self.finite_difference:>+15.8e}"
            f"   +- {self.uncertainty:.1e}"
        )
        return "\n".join(lines)


def compare_modes(
    solver: ImplicitSolver,
    x0: Any,
    *args: Any,
    loss: Callable[[Any], Tensor] | None = None,
    modes: Sequence[str | Mode] = _ALL,
    step: float = 1e-3,
    generator: torch.Generator | None = None,
    **options: Any,
) -> ModeComparison:
    r"""Differentiate a solution in every mode, and by finite differences of the solver itself.

    For a random unit direction $u$ in the space of all differentiated arguments, the derivative of
    $\ell(x(\theta))$ along $u$, beside $(\ell(x(\theta + hu)) - \ell(x(\theta - hu))) / 2h$ at $h$
    and $h/2$, extrapolated (error $O(h^4)$).

    Args:
        solver: made by :func:`root`, :func:`fixed_point` or :func:`minimize`; its own mode does not
            matter.
        x0: where it starts.
        *args: its arguments, in float64.
        loss: of the solution, a scalar. Default: the inner product with a random vector.
        modes: which to compare, by name or with their settings.
        step: $h$, relative to ``max(1, |theta|_inf)``.
        generator: source of the direction and the default loss; default seed 0.
        **options: for the solver.

    Returns:
        A :class:`ModeComparison`; a mode that fails (a solver that is not written in torch cannot
        be unrolled) has its reason in its row.

    Raises:
        DtypeError: a differentiated argument is not float64.
        GradientError: nothing is differentiated.
        ArgumentError: ``solver`` is something else, or ``step`` is not positive.

    Cost: four solutions, and one with its derivative for each mode.

    Example:
        >>> import torch
        >>> from woodbury.implicit import compare_modes, root
        >>> sqrt = root(lambda x, t: x**2 - t, lambda x0, t: t.sqrt())
        >>> found = compare_modes(
        ...     sqrt, None, torch.tensor([4.0]).double(), modes=["implicit", "unrolled"]
        ... )
        >>> [row.relative_error < 1e-9 for row in found.rows]
        [True, True]
    """
    if not isinstance(solver, ImplicitSolver):
        raise ArgumentError(
            f"solver is {type(solver).__name__}; make it with root, fixed_point or minimize"
        )
    if not 0 < step < float("inf"):
        raise ArgumentError(f"step is {step}; it must be positive")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    arguments = Arguments.of(args, solver.argnums)
    moving = [t.detach() for t, w in zip(arguments.tensors, arguments.wanted, strict=True) if w]
    if not moving:
        raise GradientError("there is no floating tensor among the arguments to differentiate")
    for t in moving:
        if t.dtype != torch.float64:
            raise DtypeError(
                f"an argument is {t.dtype}; differences need float64, convert with .double()"
            )
    direction = [
        torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in moving
    ]
    length = torch.linalg.vector_norm(torch.cat([d.reshape(-1) for d in direction]))
    direction = [d / length for d in direction]
    weights: list[Tensor] = []

    def measure(x: Any) -> Tensor:
        x = x[0] if solver.has_aux else x
        if loss is not None:
            return loss(x)
        leaves = tree_leaves(x)
        if not weights:
            weights.extend(
                torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device)
                for t in leaves
            )
        return torch.stack([(w * t).sum() for w, t in zip(weights, leaves, strict=True)]).sum()

    def at(solver: ImplicitSolver, tensors: Sequence[Tensor]) -> Tensor:
        given = iter(tensors)
        mixed = [
            next(given) if w else t
            for t, w in zip(arguments.tensors, arguments.wanted, strict=True)
        ]
        return measure(solver(x0, *arguments.filled(mixed), **options))

    plain = replace(solver, mode=Implicit(), report=None, warm=None)
    h = step * max(1.0, *(t.abs().max().item() for t in moving))

    def quotient(h: float) -> float:
        with torch.no_grad():
            high = at(plain, [t + h * d for t, d in zip(moving, direction, strict=True)])
            low = at(plain, [t - h * d for t, d in zip(moving, direction, strict=True)])
        return (high - low).item() / (2 * h)

    coarse, fine = quotient(h), quotient(h / 2)
    difference = (4 * fine - coarse) / 3
    rows = []
    for mode in map(mode_of, modes):
        report = SolveReport()
        variant = replace(solver, mode=mode, report=report, warm=None)
        leaves = [t.clone().requires_grad_() for t in moving]
        begin, failure, value = time.perf_counter(), "", float("nan")
        try:
            parts = torch.autograd.grad(at(variant, leaves), leaves, allow_unused=True)
        except (RuntimeError, ArithmeticError, ValueError, TypeError) as error:
            failure = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            if all(part is None for part in parts):
                failure = "no derivative: the solver cuts the graph"
            else:
                pairs = zip(parts, direction, strict=True)
                value = sum((p * d).sum().item() for p, d in pairs if p is not None)
        seconds = time.perf_counter() - begin
        products = report.products if isinstance(mode, Implicit) else getattr(mode, "count", None)
        relative = abs(value - difference) / max(abs(difference), 1e-300)
        rows.append(ModeRow(mode, value, relative, products, seconds, failure))
    return ModeComparison(tuple(rows), difference, abs(fine - coarse) / 3)
