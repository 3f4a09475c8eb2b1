"""Steady states of ordinary differential equations, in pseudo-time, for batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, GradientError, NonFiniteError
from woodbury.implicit.condition import Condition
from woodbury.implicit.iteration import Found, InnerSolver, IterationStatus, Rows
from woodbury.operators import FunctionOperator
from woodbury.solvers import Recipe, solve

__all__ = ["SteadyState"]

_SHRINK = 1e-12  # of the first time step: below it nothing moves
_DENSE = 1000  # up to as many unknowns stability is checked unasked


@dataclass(frozen=True)
class SteadyState(InnerSolver):
    r"""Find where $\dot x = f(x, \theta)$ rests: $f = 0$, followed from ``x0`` in pseudo-time.

    Implicit Euler steps $(I/\delta - J)\,\Delta = f(x)$, $J = \partial f/\partial x$, whose time
    step grows as the residual falls, $\delta \leftarrow \delta\max(1, \|f\|/\|f^+\|)$: close to
    the flow at first, Newton's method at the end (it doubles at least while the flow is as good as
    linear and slows down). So it ends where the flow does, if the first step is small enough, when
    Newton's method may end in any root. A step over which $f$ is far from linear,
    $\|f^+ - \Delta/\delta\| > \|f\|$, is taken again with a quarter of $\delta$.

    A steady state is stable where all eigenvalues of $J$ have negative real parts; one that is not
    ends with the status ``unstable``, which raises unless ``throw=False``. Derivatives are those of
    the root: they hold there too.

    Called ``run(f, x0, *args)`` with ``f(x, *args)`` like ``x``.

    Args:
        tol: converged when $\|f\| \le$ ``tol`` $\max(1, \|f(x_0)\|)$.
        max_steps: limit of evaluations of ``f``.
        batched: ``f`` maps ``[B, ...]`` row by row.
        step: first $\delta$, in the unit of time. None for $0.1/\|J\|$ at the start.
        recipe: how to solve the systems, by products with $J$; by default $J$ is formed and
            factorised in batches. For many unknowns, without a batch: ``GMRES(rtol=1e-3)``.
        stability: whether all eigenvalues of $J$ are computed at the end, which forms $J$; None up
            to 1,000 unknowns.

    Raises:
        ArgumentError: a setting makes no sense.

    Cost: per step an evaluation with its Jacobian, ``n`` backward passes taken at once, and a
    factorisation of ``[n, n]`` a row, or the products of the recipe; the eigenvalues at the end.

    Source: Kelley and Keyes, "Convergence analysis of pseudo-transient continuation" (1998).

    Example:
        Of the three roots, that which the start flows to:

        >>> import torch
        >>> from woodbury.implicit import SteadyState
        >>> rest = SteadyState().differentiable(lambda x, t: t * x - x**3)
        >>> t = torch.tensor(4.0).double()
        >>> rest(torch.tensor([0.1]).double(), t)
        tensor([2.0000], dtype=torch.float64)
        >>> torch.func.jacrev(rest, argnums=1)(torch.tensor([-0.1]).double(), t)
        tensor([-0.2500], dtype=torch.float64)
    """

    step: float | None = None
    recipe: Recipe | None = None
    stability: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step is not None and not 0 < self.step < math.inf:
            raise ArgumentError(f"step is {self.step}; it must be positive, or None")
        if self.recipe is not None and not isinstance(self.recipe, Recipe):
            raise ArgumentError(
                f"recipe is {type(self.recipe).__name__}; give a recipe such as GMRES(rtol=1e-3)"
            )
        if self.recipe is not None and self.batched:
            raise ArgumentError("a recipe solves one problem; leave it out, or batched=False")

    def condition(self, function: Callable[..., Any]) -> Condition:
        """A root."""
        return Condition.of(function, "root")

    def _run(
        self, rows: Rows, X: Tensor, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> Found:
        flow = _Flow(rows, function, args)
        F = flow.value(X)
        if not bool(torch.isfinite(F).all()):
            raise NonFiniteError("the right-hand side f is NaN or infinite at the start x0")
        norms = torch.linalg.vector_norm(F, dim=1)
        target = self.tol * norms.clamp_min(1.0)
        statuses: list[IterationStatus | None] = [None] * rows.count
        done = torch.zeros(rows.count, dtype=torch.bool, device=X.device)
        delta, least = torch.full_like(norms, math.nan), torch.zeros_like(norms)
        steps = 0
        while True:
            ended = (norms <= target) | (delta < least)
            for row in (ended & ~done).nonzero().flatten().tolist():
                ok = bool(norms[row] <= target[row])
                statuses[row] = IterationStatus.converged if ok else IterationStatus.stagnation
            done |= ended
            if steps >= self.max_steps or None not in statuses:
                break
            system = _System(flow, X, self.recipe)
            if steps == 0:
                delta = system.time() if self.step is None else torch.full_like(norms, self.step)
                least = _SHRINK * delta
            steps += 1
            move = system.solve(delta, F)
            trial = torch.where(done[:, None], X, X + move)
            new = flow.value(trial)
            size = torch.linalg.vector_norm(new, dim=1)
            bent = torch.linalg.vector_norm(new - move / delta[:, None], dim=1)
            fine = (bent <= norms) & ~done  # not where a number is none
            X, F = torch.where(fine[:, None], trial, X), torch.where(fine[:, None], new, F)
            gain = norms / size.clamp_min(torch.finfo(X.dtype).tiny)
            # Where the flow is as good as linear and comes to rest, time is not what limits a step.
            least_gain = torch.where((bent <= 0.1 * norms) & (gain >= 1), 2.0, 1.0)
            gain = torch.maximum(gain, least_gain).clamp(max=1e6)
            delta = torch.where(fine, delta * gain, delta / 4).clamp(max=1e30)
            norms = torch.where(fine, size, norms)
        named = [IterationStatus.max_steps if status is None else status for status in statuses]
        asked = X.shape[1] <= _DENSE if self.stability is None else self.stability
        if asked and any(status.ok for status in named):
            unstable = _System(flow, X, self.recipe).unstable()
            named = [
                IterationStatus.unstable if status.ok and bad else status
                for status, bad in zip(named, unstable, strict=True)
            ]
        return rows.found(X, named, norms, steps)


class _Flow:
    """The right-hand side on rows."""

    def __init__(self, rows: Rows, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.rows, self.function, self.args = rows, function, args

    def value(self, X: Tensor) -> Tensor:
        found = self.function(self.rows.unpack(X), *self.args)
        self.rows.unknown.flatten(found, "the value of f")  # says what is wrong with it
        return self.rows.pack(found)


class _System:
    """What is solved with at one point: ``I / delta - J``."""

    def __init__(self, flow: _Flow, X: Tensor, recipe: Recipe | None) -> None:
        self.recipe = recipe
        with torch.enable_grad():
            at = X.detach().requires_grad_()
            F = flow.value(at)
            if not F.requires_grad:
                raise GradientError("the right-hand side f does not depend on x")
            if recipe is None:
                count, n = X.shape
                units = torch.eye(n, dtype=X.dtype, device=X.device)[:, None].expand(n, count, n)
                (J,) = torch.autograd.grad(F, at, units, is_grads_batched=True)
                self.J = J.movedim(0, 1)
                return
        self.flow, self.at, self.F = flow, at, F
        self.J = torch.empty(0)

    def product(self, V: Tensor) -> Tensor:
        """``J V [n, k]``."""

        def along(x: Tensor) -> Tensor:
            return self.flow.value(x[None])[0]

        x = self.at.detach()[0]
        columns = [torch.func.jvp(along, (x,), (v,))[1] for v in V.T]
        return torch.stack(columns, 1)

    def adjoint(self, V: Tensor) -> Tensor:
        """``J^T V [n, k]``."""
        columns = [
            torch.autograd.grad(self.F, self.at, v[None], retain_graph=True)[0][0] for v in V.T
        ]
        return torch.stack(columns, 1)

    def operator(self, shift: float = 0.0, sign: float = 1.0) -> FunctionOperator:
        """``shift I + sign J``."""
        n = self.at.shape[1]
        return FunctionOperator(
            lambda V: shift * V + sign * self.product(V),
            (n, n),
            lambda V: shift * V + sign * self.adjoint(V),
            dtype=self.at.dtype,
            device=self.at.device,
        )

    def time(self) -> Tensor:
        """A time in which the flow does not change much, for each row."""
        if self.recipe is None:
            size = torch.linalg.matrix_norm(self.J)
        else:  # along the flow
            direction = self.F.detach()[0] / torch.linalg.vector_norm(self.F.detach())
            size = torch.linalg.vector_norm(self.product(direction[:, None]))[None]
        return 0.1 / size.clamp_min(torch.finfo(size.dtype).eps)

    def solve(self, delta: Tensor, F: Tensor) -> Tensor:
        if self.recipe is None:
            eye = torch.eye(F.shape[1], dtype=F.dtype, device=F.device)
            matrix = eye / delta[:, None, None] - self.J
            return torch.linalg.solve_ex(matrix, F.unsqueeze(-1))[0].squeeze(-1)
        A = self.operator(1 / delta.item(), -1.0)
        # A rough direction will do: the residual of the flow decides on it.
        return solve(A, F[0], self.recipe, throw=False).value[None]

    def unstable(self) -> list[bool]:
        """Whether an eigenvalue of ``J`` has no negative real part, for each row."""
        if self.recipe is None:
            finite = torch.where(torch.isfinite(self.J), self.J, 0.0)
            return (torch.linalg.eigvals(finite).real.amax(1) >= 0).tolist()
        return [bool(torch.linalg.eigvals(self.operator().to_dense()).real.amax() >= 0)]
