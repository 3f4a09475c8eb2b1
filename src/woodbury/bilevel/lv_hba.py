"""LV-HBA: bilevel problems whose inner problem has constraints that couple it with the outer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.bilevel.algorithm import require_apart, require_positive
from woodbury.bilevel.parts import Tensors, named, or_zeros, write
from woodbury.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
from woodbury.spaces import Space

__all__ = ["LVHBA", "LVHBAStep"]


@dataclass(frozen=True)
class LVHBAStep:
    r"""What one step saw, at the point where it started.

    Attributes:
        outer_value: $F(x, y)$.
        gap: estimate of $f(x, y) - v(x, y, z)$, with the current $\theta$ and $\lambda$ for the
            saddle point; at a solution it is zero. See :meth:`LVHBA.gap` for the value itself.
        violation: the largest amount by which a constraint is violated at $(x, y)$.
        penalty: $c_k$.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import LVHBA
        >>> method = LVHBA(
        ...     inner=lambda y, x: 0.5 * (y - x).square().sum(),
        ...     outer=lambda y, x: 0.5 * y.square().sum(),
        ...     constraint=lambda y, x: y - 1,
        ...     params=torch.full((1,), 3.0), hyper=torch.zeros(1), project=lambda y, x: (y, x),
        ... )
        >>> first = method.step()
        >>> first.outer_value, first.violation
        (4.5, 2.0)
    """

    outer_value: float
    gap: float
    violation: float
    penalty: float


class LVHBA:
    r"""Single-loop, Hessian-free method for an inner problem with coupled constraints.

    $$\min_{x, y} F(x, y) \quad\text{s.t.}\quad
      y \in \arg\min_{y \in Y} \{f(x, y) : g(x, y) \le 0\}$$

    with $x$ ``hyper``, $y$ ``params``, $F$ ``outer``, $f$ ``inner``, convex in $y$ (its solution
    need not be unique), and $g$ ``constraint``. The inner problem is replaced by
    $f(x, y) - v(x, y, z) \le 0$ and $(x, y) \in C = \{g \le 0\}$, with the value of a proximal
    Lagrangian,

    $$v(x, y, z) = \min_{\theta \in Y} \max_{\lambda \ge 0}\; f(x, \theta) + \lambda^T g(x, \theta)
      + \frac{\|\theta - y\|^2}{2\gamma_1} - \frac{\|\lambda - z\|^2}{2\gamma_2},$$

    which is differentiable, and with $z \in Z = [0, r]^p$ the penalised problem
    $F / c_k + f - v$ is followed by projected gradients. One step:

    1. $\theta \leftarrow P_Y[\theta - \eta(\nabla_y f(x,\theta) + \nabla_y g(x,\theta)^T\lambda +
       (\theta - y)/\gamma_1)]$, then, with the new $\theta$,
       $\lambda \leftarrow P_+[\lambda + \eta(g(x,\theta) - (\lambda - z)/\gamma_2)]$;
    2. $d_x = \nabla_x F/c_k + \nabla_x f(x,y) - \nabla_x f(x,\theta) - \nabla_x g(x,\theta)^T
       \lambda$, $d_y = \nabla_y F/c_k + \nabla_y f(x,y) - (y-\theta)/\gamma_1$,
       $d_z = -(\lambda - z)/\gamma_2$;
    3. $(x, y) \leftarrow P_C[(x, y) - \alpha(d_x, d_y)]$, $z \leftarrow P_Z[z - \beta d_z]$,
       $c_k = c_0 (k+1)^q$.

    Equations instead of inequalities have free multipliers: $z \in [-r, r]$. The steps are
    projected gradients in the Euclidean metric, so no other optimizer can take their place.

    Args:
        inner: ``inner(params, hyper)``, $f$, a scalar.
        outer: ``outer(params, hyper)``, $F$, a scalar.
        constraint: ``constraint(params, hyper)``, $g$, a vector ``[p]``.
        params: $y$ where it starts, a tensor or a mapping of tensors; changed in place.
        hyper: $x$ where it starts, likewise, of the same dtype and device; changed in place.
        project: ``project(params, hyper) -> (params, hyper)``, the Euclidean projection onto $C$
            (and onto the domains of both), in the structure in which they were given.
        project_inner: ``project_inner(params) -> params``, the projection onto $Y$. It must not
            know of the coupled constraints: the multipliers would lose their meaning.
        equality: whether the constraints are equations, for all or as a mask ``[p]``.
        step: $\alpha$.
        multiplier_step: $\beta$.
        inner_step: $\eta$.
        gamma: $(\gamma_1, \gamma_2)$.
        penalty: $(c_0, q)$, with $0 \le q < 1/2$.
        bound: $r$.
        multiplier: where $\lambda$ and $z$ start, a number or ``[p]``.

    Attributes:
        params: the tensors of $y$ by name (``""`` for a single tensor).
        hyper: those of $x$.
        z: current $z$ ``[p]``.
        theta: current $\theta$, in the structure of ``params``.
        multiplier: current $\lambda$ ``[p]``.
        steps: number of steps done.

    Raises:
        ArgumentError: a setting makes no sense.
        DtypeError: ``params`` and ``hyper`` differ in dtype.
        ShapeError: the constraint is not a vector, a loss not a scalar, or a projection returns
            another shape.
        NonFiniteError: a loss, a gradient or a constraint became NaN or infinite; the state is that
            before the step.

    Cost: a step takes two gradients of ``f``, one of ``F``, two of ``g`` with one more value, and
    the projections; no second derivative. Memory of a few vectors.

    Source: Yao, Yu, Zeng and Zhang, "Constrained Bi-Level Optimization: Proximal Lagrangian Value
    Function Approach and Hessian-free Algorithm" (ICLR 2024), algorithm 1. $\lambda$ is updated
    with the new $\theta$, which is more stable than with the old one.

    Example:
        The inner solution $y = \max(x, 1)$ and the outer loss pull against each other:

        >>> import torch
        >>> from woodbury.bilevel import LVHBA
        >>> x, y = torch.zeros(1).double(), torch.zeros(1).double()
        >>> method = LVHBA(
        ...     inner=lambda y, x: 0.5 * (y - x).square().sum(),
        ...     outer=lambda y, x: 0.5 * (y - 3).square().sum() + 0.5 * (x - 1).square().sum(),
        ...     constraint=lambda y, x: 1 - y,
        ...     params=y, hyper=x, project=lambda y, x: (y.clamp(min=1), x),
        ...     step=0.2, inner_step=0.2, penalty=(5.0, 0.3),
        ... )
        >>> for _ in range(1000):
        ...     last = method.step()
        >>> [round(part.item(), 1) for part in (x, y)]  # both are 2
        [2.0, 2.0]
    """

    def __init__(
        self,
        inner: Callable[..., Tensor],
        outer: Callable[..., Tensor],
        constraint: Callable[..., Tensor],
        params: Tensors,
        hyper: Tensors,
        *,
        project: Callable[..., tuple[Tensors, Tensors]],
        project_inner: Callable[..., Tensors] | None = None,
        equality: bool | Tensor = False,
        step: float = 0.008,
        multiplier_step: float = 0.02,
        inner_step: float = 0.01,
        gamma: tuple[float, float] = (10.0, 10.0),
        penalty: tuple[float, float] = (2.0, 0.3),
        bound: float = 1000.0,
        multiplier: Tensor | float = 0.0,
    ) -> None:
        positive = {
            "step": step,
            "multiplier_step": multiplier_step,
            "inner_step": inner_step,
            "gamma[0]": gamma[0],
            "gamma[1]": gamma[1],
            "penalty[0]": penalty[0],
            "bound": bound,
        }
        for name, value in positive.items():
            require_positive(value, name)
        if not 0 <= penalty[1] < 0.5:
            raise ArgumentError(f"penalty[1] is {penalty[1]}; it must be in [0, 1/2)")
        self._inner, self._outer, self._constraint = inner, outer, constraint
        self._project, self._project_inner = project, project_inner
        self.hyper, self._x_named = named(hyper, "hyper")
        self.params, self._y_named = named(params, "params")
        require_apart(self.params, self.hyper)
        self._x_space, self._y_space = Space.of(self.hyper), Space.of(self.params)
        if self._x_space.dtype != self._y_space.dtype:
            raise DtypeError(
                f"params are {self._y_space.dtype} and hyper {self._x_space.dtype}; convert one"
            )
        self._x, self._y = self._joint(
            self._x_space.flatten(self.hyper).detach().clone(),
            self._y_space.flatten(self.params).detach().clone(),
        )
        self._theta = self._onto_inner(self._y.clone())
        values = self._values(self._x, self._y)
        self._gamma, self._penalty = gamma, penalty
        self._steps_of = (step, multiplier_step, inner_step)
        free = torch.as_tensor(equality, dtype=torch.bool, device=values.device)
        try:
            free = free.expand(values.shape)
            start = torch.as_tensor(multiplier, dtype=values.dtype, device=values.device)
            start = start.expand(values.shape)
        except RuntimeError as error:
            raise ShapeError(
                f"equality or multiplier does not broadcast to the {values.shape[0]} constraints"
            ) from error
        self._low = torch.where(free, -math.inf, torch.zeros_like(values))
        self._z_low, self._z_high = self._low.clamp_min(-bound), bound
        self._free = free
        self.multiplier = torch.maximum(start, self._low)
        self.z = self.multiplier.clamp(self._z_low, torch.full_like(self._z_low, bound))
        self.steps = 0
        self._write()

    @property
    def theta(self) -> Tensors:
        r"""$\theta$, a copy in the structure of ``params``."""
        return _given(self._y_space, self._theta.clone(), self._y_named)

    def step(self) -> LVHBAStep:
        """Take one step; returns what it saw where it started."""
        alpha, beta, _ = self._steps_of
        c = self._penalty[0] * (self.steps + 1) ** self._penalty[1]
        theta, lam = self._saddle_step(self._theta, self.multiplier)

        x, y = _leaf(self._x), _leaf(self._y)
        upper, lower = (
            self._loss(self._outer, x, y, "outer"),
            self._loss(self._inner, x, y, "inner"),
        )
        of_x, of_y = _gradient(upper / c + lower, x, y)
        value, (v_x, v_y, v_z) = self._value(theta, lam)
        d_x, d_y, d_z = of_x - v_x, of_y - v_y, -v_z
        for what, direction in (("hyper", d_x), ("params", d_y), ("z", d_z)):
            if not torch.isfinite(direction).all():
                raise NonFiniteError(
                    f"the direction of {what} is NaN or infinite after {self.steps} steps: reduce "
                    "the steps (step, multiplier_step, inner_step), or start nearer"
                )
        violations = self._values(self._x, self._y)
        violation = torch.where(self._free, violations.abs(), violations.clamp_min(0))
        seen = LVHBAStep(
            outer_value=upper.item(),
            gap=lower.item() - value.item(),
            violation=violation.max().item(),
            penalty=c,
        )
        self._x, self._y = self._joint(self._x - alpha * d_x, self._y - alpha * d_y)
        high = torch.full_like(self.z, self._z_high)
        self.z = (self.z - beta * d_z).clamp(self._z_low, high)
        self._theta, self.multiplier = theta, lam
        self.steps += 1
        self._write()
        return seen

    def gap(self, tol: float = 1e-8, max_steps: int = 100_000) -> float:
        r"""$f(x, y) - v(x, y, z)$, with the saddle point searched to ``tol``; no state changes.

        Args:
            tol: relative size of the last move of $\theta$ and $\lambda$.
            max_steps: limit of iterations of step 1.

        Raises:
            NonFiniteError: the saddle point was not found: reduce ``inner_step``.
        """
        theta, lam = self._theta, self.multiplier
        for _ in range(max_steps):
            new_theta, new_lam = self._saddle_step(theta, lam)
            moved = (new_theta - theta).norm() + (new_lam - lam).norm()
            theta, lam = new_theta, new_lam
            if bool(moved <= tol * self._steps_of[2] * (1 + theta.norm() + lam.norm())):
                value, _ = self._value(theta, lam)
                return self._loss(self._inner, self._x, self._y, "inner").item() - value.item()
        raise NonFiniteError(
            f"the saddle point was not found in {max_steps} iterations; reduce inner_step (now "
            f"{self._steps_of[2]:g}), raise max_steps or loosen tol"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step: tensors and one number."""
        return {
            "params": self._y.clone(),
            "hyper": self._x.clone(),
            "z": self.z.clone(),
            "theta": self._theta.clone(),
            "multiplier": self.multiplier.clone(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, exactly.

        Raises:
            ArgumentError: an entry is missing.
            ShapeError: a tensor has another shape.
        """
        own = self.state_dict()
        missing = [name for name in own if name not in state]
        if missing:
            raise ArgumentError(f"the state lacks {missing}")
        for name, tensor in own.items():
            if isinstance(tensor, Tensor) and state[name].shape != tensor.shape:
                raise ShapeError(
                    f"{name!r} of the state has shape {tuple(state[name].shape)}, expected "
                    f"{tuple(tensor.shape)}"
                )
        like = self._x
        self._y, self._x, self.z, self._theta, self.multiplier = (
            state[name].to(like, copy=True)
            for name in ("params", "hyper", "z", "theta", "multiplier")
        )
        self.steps = int(state["steps"])
        self._write()

    def _write(self) -> None:
        write(self._x_space, self.hyper, self._x)
        write(self._y_space, self.params, self._y)

    def _saddle_step(self, theta: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        eta = self._steps_of[2]
        leaf = _leaf(theta)
        lagrangian = self._loss(self._inner, self._x, leaf, "inner")
        lagrangian = lagrangian + lam @ self._values(self._x, leaf)
        (slope,) = _gradient(lagrangian, leaf)
        theta = theta - eta * (slope + (theta - self._y) / self._gamma[0])
        theta = self._onto_inner(theta)
        climb = self._values(self._x, theta) - (lam - self.z) / self._gamma[1]
        return theta, torch.maximum(lam + eta * climb, self._low)

    def _value(self, theta: Tensor, lam: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """``v`` and its gradients in ``x, y, z`` if ``(theta, lam)`` is the saddle point."""
        x = _leaf(self._x)
        lagrangian = self._loss(self._inner, x, theta, "inner") + lam @ self._values(x, theta)
        (of_x,) = _gradient(lagrangian, x)
        away, off = self._y - theta, lam - self.z
        near, far = away / self._gamma[0], off / self._gamma[1]
        return lagrangian.detach() + away @ near / 2 - off @ far / 2, (of_x, near, far)

    def _loss(self, loss: Callable[..., Tensor], x: Tensor, y: Tensor, which: str) -> Tensor:
        value = loss(*self._structured(x, y))
        if not isinstance(value, Tensor) or value.dim() != 0:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"the {which} loss returned {shape}; it must return a scalar tensor")
        return value

    def _values(self, x: Tensor, y: Tensor) -> Tensor:
        values = self._constraint(*self._structured(x, y))
        if not isinstance(values, Tensor) or values.dim() != 1 or not values.numel():
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ShapeError(f"the constraint returned {shape}; it must return a vector [p]")
        return values

    def _structured(self, x: Tensor, y: Tensor) -> tuple[Tensors, Tensors]:
        return _given(self._y_space, y, self._y_named), _given(self._x_space, x, self._x_named)

    def _joint(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found = self._project(*self._structured(x, y))
        if not isinstance(found, tuple) or len(found) != 2:
            raise ShapeError("project must return the pair (params, hyper)")
        return _flat(self._x_space, found[1]), _flat(self._y_space, found[0])

    def _onto_inner(self, y: Tensor) -> Tensor:
        if self._project_inner is None:
            return y
        return _flat(self._y_space, self._project_inner(_given(self._y_space, y, self._y_named)))


def _given(space: Space, flat: Tensor, named: bool) -> Tensors:
    parts = space.unflatten(flat)
    return parts if named else parts[""]


def _flat(space: Space, tensors: Tensors) -> Tensor:
    mapping = {"": tensors} if isinstance(tensors, Tensor) else dict(tensors)
    return space.flatten(mapping).detach()


def _leaf(flat: Tensor) -> Tensor:
    return flat.detach().requires_grad_()


def _gradient(value: Tensor, *leaves: Tensor) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    parts = torch.autograd.grad(value, leaves, allow_unused=True)
    return [or_zeros(part, leaf) for part, leaf in zip(parts, leaves, strict=True)]
