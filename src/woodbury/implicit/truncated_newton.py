"""Newton's method with conjugate gradients, for batches of problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, GradientError
from woodbury.implicit.condition import Condition
from woodbury.implicit.descent import Descent
from woodbury.implicit.iteration import Rows
from woodbury.operators import FunctionOperator, LinearOperator
from woodbury.solvers import CG, Recipe, solve

__all__ = ["NewtonCG"]

# Of the forcing terms.
_ORDER = (1 + 5**0.5) / 2
_LARGEST = 0.5

Preconditioner = LinearOperator | Recipe | Callable[..., LinearOperator]


@dataclass(frozen=True)
class NewtonCG(Descent):
    r"""Line-search Newton: $D \approx -(\nabla^2 f)^{-1} G$ by conjugate gradients.

    The residual of each system is at most $\eta\,\|G\|$ with the forcing term of Eisenstat and
    Walker, $\eta = 0.9\,(\|G\|/\|G_{old}\|)^{1.618}$ between safeguards and at most a half:
    superlinear convergence, no matter how ``f`` is scaled. No system is solved beyond what the
    tolerance asks for. Where conjugate gradients meet negative curvature the best
    iterate before it is taken, or $-G$ where there is none. The gradient is linearised once for
    each step; a product is one backward pass through it. The rows of a batch are one block diagonal
    system: their products are shared, their line searches, halving from 1, are their own.

    Args:
        tol: converged when $\|\nabla f\| \le$ ``tol`` $\max(1, \|\nabla f(x_0)\|)$.
        max_steps: limit of gradient evaluations.
        batched: ``f`` returns ``[B]``, one value for each row of ``x [B, ...]``.
        max_products: limit of Hessian products per step.
        preconditioner: $M \approx (\nabla^2 f)^{-1}$ on the flat vector ``[n]`` (of a batch, its
            rows end to end, ``[B n]``), positive definite: an operator, a recipe that prepares one,
            or a function ``(x, *args)`` that returns one for the Hessian at ``x``, called anew for
            each step.
        gradient: ``(x, *args)`` to $\nabla f$, like ``x``, where it is known in closed form: the
            products differentiate it, which costs less than to differentiate a gradient that torch
            derived. Compared with that at the start.

    Raises:
        ArgumentError: a setting makes no sense.
        GradientError: ``gradient`` is not the gradient of ``f`` at the start.

    Cost: one gradient and its graph per evaluation, one backward pass per product.

    Source: Nocedal and Wright, "Numerical Optimization" (2nd ed.), algorithm 7.1; Eisenstat and
    Walker, "Choosing the forcing terms in an inexact Newton method" (1996), choice 2.

    Example:
        >>> import torch
        >>> from woodbury.implicit import NewtonCG
        >>> soft = lambda x, t: torch.nn.functional.softplus(x).sum() - (t * x).sum()
        >>> logit = NewtonCG(tol=1e-10).differentiable(soft)
        >>> t = torch.tensor([0.25, 0.5]).double()
        >>> logit(torch.zeros(2).double(), t)
        tensor([-1.0986,  0.0000], dtype=torch.float64)
        >>> torch.func.jacrev(logit, argnums=1)(torch.zeros(2).double(), t).diagonal()
        tensor([5.3333, 4.0000], dtype=torch.float64)
    """

    max_products: int = 200
    preconditioner: Preconditioner | None = field(default=None, repr=False)
    gradient: Callable[..., Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_products < 1:
            raise ArgumentError(f"max_products is {self.max_products}; at least one is needed")
        M = self.preconditioner
        if M is not None and not isinstance(M, (LinearOperator, Recipe)) and not callable(M):
            raise ArgumentError(
                f"preconditioner is {type(M).__name__}; give an operator, a recipe, or a function "
                "(x, *args) that returns an operator"
            )
        if self.gradient is not None and not callable(self.gradient):
            raise ArgumentError(f"gradient is {type(self.gradient).__name__}, not a function")

    def condition(self, function: Callable[..., Any]) -> Condition:
        """A minimum; the gradient where it is given."""
        if self.gradient is None:
            return super().condition(function)
        return Condition(self.gradient, "root", symmetric=True, definite=True)

    def _evaluation(
        self, rows: Rows, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> _Linearised:
        return _Linearised(rows, function, args, self.gradient)

    def _memory(self, X: Tensor, evaluate: _Linearised) -> _Linearised:
        return evaluate

    def _first(self, G: Tensor) -> Tensor:
        return torch.ones_like(G[:, :1])

    def _start(self, memory: _Linearised, X: Tensor, G: Tensor, target: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(G, dim=1)
        memory.target, memory.norms = target, norms
        memory.forcing = torch.full_like(norms, _LARGEST)
        return self._direction(memory, X, G, norms > target)

    def _turn(
        self, memory: _Linearised, G: Tensor, moved: Tensor, X: Tensor, old: Tensor
    ) -> Tensor:
        norms = torch.linalg.vector_norm(G, dim=1)
        forcing = 0.9 * (norms / memory.norms) ** _ORDER
        safeguard = 0.9 * memory.forcing**_ORDER
        forcing = torch.where(safeguard > 0.1, torch.maximum(forcing, safeguard), forcing)
        memory.forcing = torch.where(moved, forcing.clamp_max(_LARGEST), memory.forcing)
        memory.norms = torch.where(moved, norms, memory.norms)
        return self._direction(memory, X, G, moved & (norms > memory.target))

    def _direction(self, memory: _Linearised, X: Tensor, G: Tensor, wanted: Tensor) -> Tensor:
        """Newton's directions for the rows that want one."""
        if not bool(wanted.any()):
            return -G
        # No row is left with more than it asks for, and none is solved beyond the tolerance.
        allowed = torch.maximum(memory.forcing * memory.norms, 0.6 * memory.target)
        least = allowed[wanted].min().item()
        b = torch.where(wanted[:, None], -G, 0.0).reshape(-1)
        H = memory.hessian()
        M = self.preconditioner
        if M is not None and not isinstance(M, (LinearOperator, Recipe)):
            M = M(memory.rows.unpack(X), *memory.args)
        recipe = CG(rtol=0.0, atol=least, max_steps=self.max_products, preconditioner=M)
        D = solve(H, b, recipe, throw=False).value.reshape(X.shape)
        return torch.where(torch.isfinite(D), D, 0.0)


class _Linearised:
    """Values and gradients of rows, and the Hessian where they were evaluated last."""

    # Of each row: what ends it, the norm of its gradient, and the forcing term of its system.
    target: Tensor
    norms: Tensor
    forcing: Tensor

    def __init__(
        self,
        rows: Rows,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        gradient: Callable[..., Any] | None,
    ) -> None:
        self.rows, self.function, self.args, self.gradient = rows, function, args, gradient
        self.compared = gradient is None

    def __call__(self, X: Tensor) -> tuple[Tensor, Tensor]:
        self.at = X.detach().requires_grad_()
        if self.compared and self.gradient is not None:
            with torch.no_grad():
                values = self.rows.values(self.function, self.args, self.at)
            self.G = self._given()
        else:
            with torch.enable_grad():
                values = self.rows.values(self.function, self.args, self.at)
                (self.G,) = torch.autograd.grad(values.sum(), self.at, create_graph=True)
            if self.gradient is not None:
                self._compare(self._given(), self.G)
        return values.detach().reshape(self.rows.count).double(), self.G.detach()

    def _given(self) -> Tensor:
        """The gradient in closed form, with its graph."""
        assert self.gradient is not None
        with torch.enable_grad():
            found = self.gradient(self.rows.unpack(self.at), *self.args)
            return self.rows.pack(found)

    def _compare(self, given: Tensor, derived: Tensor) -> None:
        """At the start, which may be where the gradient vanishes."""
        self.compared = True
        off = torch.linalg.vector_norm(given - derived).item()
        size = torch.linalg.vector_norm(derived).item()
        if off > torch.finfo(given.dtype).eps ** 0.5 * max(1.0, size):
            raise GradientError(
                f"gradient(x0) differs from the gradient of the objective there by {off:.3g}, of "
                f"{size:.3g}: it has to be the gradient in x of the same function"
            )
        self.G = given

    def hessian(self) -> LinearOperator:
        """Block diagonal, on the rows end to end."""
        at, G = self.at, self.G
        n = at.numel()

        def product(v: Tensor) -> Tensor:
            if not G.requires_grad:
                return torch.zeros_like(v)  # a linear objective
            (found,) = torch.autograd.grad(
                G, at, v.view_as(G), retain_graph=True, allow_unused=True
            )
            return torch.zeros_like(v) if found is None else found.reshape(-1)

        return FunctionOperator(
            product,
            (n, n),
            tags={"positive_definite"},
            dtype=at.dtype,
            device=at.device,
            vectorized=False,
        )
