"""What iterative solvers share: rows of independent problems, statuses, results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from woodbury.errors import ArgumentError, GradientError, NonFiniteError, ShapeError, SolveError
from woodbury.implicit.condition import Condition
from woodbury.implicit.modes import Mode, mode_of
from woodbury.implicit.solver import ImplicitSolver
from woodbury.implicit.trees import Unknown

__all__ = ["Found", "InnerSolver", "IterationStatus", "Rows"]


class IterationStatus(Enum):
    """How an iteration ended, from best to worst; the value of a member says what to do next.

    Example:
        >>> from woodbury.implicit import IterationStatus
        >>> print(IterationStatus.max_steps.value)
        the step limit came before the tolerance: raise max_steps or loosen tol
    """

    converged = "the residual is within the tolerance"
    max_steps = "the step limit came before the tolerance: raise max_steps or loosen tol"
    stagnation = (
        "no step lowers the objective any more, above the tolerance: use float64, loosen tol, or "
        "check that the objective is differentiable there"
    )
    unstable = (
        "a steady state was found that small disturbances leave: start elsewhere, or say "
        "stability=False where it is meant"
    )
    diverged = (
        "the iterates left the range of numbers: lower the step, or check that there is a solution"
    )

    @property
    def ok(self) -> bool:
        """Whether the tolerance was reached."""
        return self is IterationStatus.converged


_ORDER = list(IterationStatus)


@dataclass(frozen=True, eq=False)
class Found:
    """What an iteration found, with its certificate.

    Attributes:
        value: the last iterate, a pytree like the start; where rows diverged, the last finite one.
        status: how it ended; the worst of the rows of a batch.
        residual: norm of the gradient, or of the step of the map: a scalar, or ``[B]``; float64.
        steps: evaluations of the gradient, or of the map, of the row that took most.
        row_status: status of each row of a batch; ``None`` for one problem.

    Example:
        >>> import torch
        >>> from woodbury.implicit import LBFGS
        >>> found = LBFGS().run(lambda x: ((x - 1) ** 2).sum(), torch.zeros(3).double())
        >>> found.ok, found.value
        (True, tensor([1., 1., 1.], dtype=torch.float64))
    """

    value: Any
    status: IterationStatus
    residual: Tensor
    steps: int
    row_status: tuple[IterationStatus, ...] | None = None

    @property
    def ok(self) -> bool:
        """Whether every row reached the tolerance."""
        return self.status.ok

    def message(self, name: str) -> str:
        """One sentence: what happened, with the values, and what to do."""
        where = ""
        if self.row_status is not None:
            bad = sum(not status.ok for status in self.row_status)
            where = f" in {bad} of {len(self.row_status)} problems"
        largest = self.residual.max().item()
        return (
            f"{name}: {self.status.name}{where} after {self.steps} steps, residual {largest:.3g}: "
            f"{self.status.value}"
        )


class Rows:
    """A pytree as rows ``[B, n]`` of independent problems; one row where there is no batch."""

    def __init__(self, x0: Any, batched: bool) -> None:
        self.unknown = Unknown.of(x0, "x0")
        self.batched = batched
        self.count = 1
        if batched:
            sizes = {shape[0] if len(shape) else -1 for shape in self.unknown.shapes}
            if len(sizes) != 1 or -1 in sizes:
                shapes = [tuple(shape) for shape in self.unknown.shapes]
                raise ShapeError(f"a batch has one first dimension [B, ...], x0 has {shapes}")
            self.count = sizes.pop()

    def pack(self, tree: Any) -> Tensor:
        """The rows of a tree."""
        leaves, _ = tree_flatten(tree)
        dtype = self.unknown.dtype
        return torch.cat([leaf.reshape(self.count, -1).to(dtype) for leaf in leaves], dim=1)

    def unpack(self, X: Tensor) -> Any:
        """The tree of rows ``[B, n]``, in the dtypes of the start."""
        sizes = [math.prod(shape) // max(1, self.count) for shape in self.unknown.shapes]
        pairs = zip(X.split(sizes, dim=1), self.unknown.shapes, self.unknown.dtypes, strict=True)
        leaves = [part.reshape(shape).to(dtype) for part, shape, dtype in pairs]
        return tree_unflatten(leaves, self.unknown.spec)

    def values(self, f: Callable[..., Tensor], args: tuple[Any, ...], at: Tensor) -> Tensor:
        """What ``f`` returns for rows that require a gradient: a scalar, or ``[B]``."""
        values = f(self.unpack(at), *args)
        wanted = (self.count,) if self.batched else ()
        if not isinstance(values, Tensor) or values.shape != wanted:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values)
            raise GradientError(
                f"the objective returned {shape}, expected {wanted}: "
                + ("one value for each problem" if self.batched else "a scalar")
            )
        if torch.is_grad_enabled() and not values.requires_grad:
            raise GradientError("the objective does not depend on x")
        return values

    def objective(
        self, f: Callable[..., Tensor], args: tuple[Any, ...]
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The values ``[B]`` and gradients ``[B, n]`` of ``f`` at rows."""

        def evaluate(X: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                at = X.detach().requires_grad_()
                values = self.values(f, args, at)
                (G,) = torch.autograd.grad(values.sum(), at)
            return values.detach().reshape(self.count).double(), G

        return evaluate

    def found(
        self, X: Tensor, statuses: list[IterationStatus], residual: Tensor, steps: int
    ) -> Found:
        """The result."""
        worst = max(statuses, key=_ORDER.index, default=IterationStatus.converged)
        residual = residual.double().cpu()
        return Found(
            self.unpack(X),
            worst,
            residual if self.batched else residual[0],
            steps,
            tuple(statuses) if self.batched else None,
        )


@dataclass(frozen=True)
class InnerSolver:
    """Base of the iterative solvers: frozen descriptions that hold no data.

    Attributes:
        tol: the tolerance; of what is said by each.
        max_steps: limit of evaluations.
        batched: the first dimension of ``x`` counts independent problems; each stops for itself.

    Example:
        >>> from woodbury.implicit import LBFGS, InnerSolver
        >>> isinstance(LBFGS(tol=1e-6, batched=True), InnerSolver)
        True
    """

    tol: float = 1e-8
    max_steps: int = 1000
    batched: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.tol < math.inf:
            raise ArgumentError(f"tol is {self.tol}; it must be a number >= 0")
        if self.max_steps < 0:
            raise ArgumentError(f"max_steps is {self.max_steps}; it must be >= 0")

    def run(self, function: Callable[..., Any], x0: Any, *args: Any, throw: bool = True) -> Found:
        """Solve, without derivatives.

        Args:
            function: what the class says, called as ``function(x, *args)``.
            x0: start, a pytree of tensors; with ``batched``, of tensors ``[B, ...]``.
            *args: what the function takes beside it.
            throw: raise if the tolerance is not reached; otherwise the status says so.

        Returns:
            A :class:`Found`.

        Raises:
            SolveError: the tolerance was not reached, and ``throw`` is true; it holds the result.
            NonFiniteError: the function is NaN or infinite at the start.
            GradientError: the function does not return what it should.
        """
        rows = Rows(x0, self.batched)
        with torch.no_grad():
            found = self._run(rows, rows.pack(x0).detach().clone(), function, args)
        if throw and not found.ok:
            raise SolveError(found.message(type(self).__name__), found)  # type: ignore[arg-type]
        return found

    def differentiable(
        self,
        function: Callable[..., Any],
        *,
        mode: str | Mode = "implicit",
        throw: bool = True,
        **settings: Any,
    ) -> ImplicitSolver:
        """The solver of one function as an :class:`ImplicitSolver`, called ``(x0, *args)``.

        Args:
            function: what the class says.
            mode: how it is differentiated; it cannot be unrolled.
            throw: raise if the tolerance is not reached; otherwise warn.
            **settings: as for :func:`root`; with ``has_aux=True`` the :class:`Found` is handed out
                beside the solution.
        """
        has_aux = settings.get("has_aux", False)

        def solve(x0: Any, *args: Any) -> Any:
            found = self.run(function, x0, *args, throw=throw)
            aux = {"residual": found.residual, "steps": found.steps, "ok": found.ok}
            return (found.value, aux) if has_aux else found.value

        return ImplicitSolver(self.condition(function), solve, mode_of(mode), **settings)

    def condition(self, function: Callable[..., Any]) -> Condition:
        """What holds at its solutions."""
        raise NotImplementedError

    def _run(
        self, rows: Rows, X: Tensor, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> Found:
        raise NotImplementedError

    def _minimum(self, f: Callable[..., Tensor]) -> Condition:
        """That the gradient of ``f``, of the sum over a batch, is zero."""
        if not self.batched:
            return Condition.of(f, "minimum")

        def total(x: Any, *args: Any) -> Tensor:
            return f(x, *args).sum()

        total.__wrapped__ = f  # type: ignore[attr-defined]
        total.__name__ = getattr(f, "__name__", "f")
        return Condition.of(total, "minimum")


def require_finite(values: Tensor, G: Tensor) -> None:
    """Raise where the start is no start."""
    if not bool(torch.isfinite(values).all() and torch.isfinite(G).all()):
        raise NonFiniteError("the function or its gradient is NaN or infinite at the start x0")
