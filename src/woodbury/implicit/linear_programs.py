"""Linear programs as a layer: smoothed, so that they have derivatives."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.implicit.programs import QuadraticProgram, solve_program

__all__ = ["linear_program"]

Smoothing = Literal["barrier", "quadratic"]


def linear_program(
    c: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    *,
    smoothing: float,
    kind: Smoothing = "barrier",
    tol: float = 1e-9,
    max_steps: int = 100,
    throw: bool = True,
) -> QuadraticProgram:
    r"""Minimise $c^T z$ subject to $A z = b$ and $G z \le h$, smoothed by $\mu$; a batch at once.

    A linear program is solved by a vertex, which stays where it is when $c$ moves a little and then
    jumps: its derivative in $c$ is zero or does not exist. Two smoothed problems have derivatives:

    - ``"barrier"``: $c^T z - \mu\sum_i\log(h_i - g_i^T z)$, the point of the central path where
      every slack times its multiplier is $\mu$. Analytic in all data; the duality gap is
      exactly $c^T z + b^T\nu + h^T\lambda = m\mu$ for ``m`` inequalities, a bound of how far the
      objective is from the least. As $\mu\to 0$ it goes to the vertex (to the centre of the
      optimal face), its derivative in $b$ and $h$ to that of the vertex, that in $c$ to zero.
    - ``"quadratic"``: $c^T z + \frac\mu2\|z\|^2$. For $\mu$ below a threshold its solution *is* a
      solution of the linear program, that of least norm (Mangasarian), and it has its derivative,
      zero in $c$: choose $\mu$ larger than that where a gradient in $c$ is what you are after.

    Derivatives are those of :func:`quadratic_program`, of any order; $\mu$ is a constant.

    Args:
        c: ``[..., n]``.
        A: equations ``[..., p, n]``, or ``None``.
        b: ``[..., p]``, with ``A``.
        G: inequalities ``[..., m, n]``; needed for the barrier.
        h: ``[..., m]``, with ``G``.
        smoothing: $\mu > 0$, in units of $c^T z$ for the barrier.
        kind: ``"barrier"`` or ``"quadratic"``.
        tol: bound of the relative violation of each optimality condition.
        max_steps: interior-point steps.
        throw: raise where a problem of the batch is not solved.

    Returns:
        A :class:`QuadraticProgram`: value, multipliers, status; leading dimensions are broadcast.

    Raises:
        ArgumentError: a setting makes no sense; with ``throw``, a problem is infeasible or
            unbounded.
        DtypeError: an argument is not real, or dtypes differ.
        NonFiniteError: an argument is NaN or infinite; with ``throw``, the tolerance was not
            reached (of the barrier also where the constraints leave no interior).
        ShapeError: shapes do not fit.
        SingularError: in the backward pass, the equations depend on each other.

    Cost: as :func:`quadratic_program`.

    Source: Nocedal and Wright, "Numerical Optimization" (2nd ed.), 14.1, for the central path;
    Mangasarian and Meyer, "Nonlinear perturbation of linear programs" (1979).

    Example:
        The cheapest point of the simplex, softly:

        >>> import torch
        >>> from woodbury.implicit import linear_program
        >>> cost = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> A, b = torch.ones(1, 3), torch.ones(1)
        >>> found = linear_program(cost, A, b, -torch.eye(3), torch.zeros(3), smoothing=0.1)
        >>> found.value.detach().round(decimals=3)
        tensor([0.8630, 0.0900, 0.0470])
        >>> found.value[0].backward()
        >>> bool((cost.grad[0] < 0) & (cost.grad[1:] > 0).all())
        True
    """
    if kind not in get_args(Smoothing):
        raise ArgumentError(f"kind is {kind!r}; it must be one of {list(get_args(Smoothing))}")
    if not 0 < smoothing < math.inf:
        raise ArgumentError(
            f"smoothing is {smoothing}; it must be positive: a linear program as it is has no "
            "derivative in c (quadratic_program with P = 0 solves it)"
        )
    if kind == "barrier" and G is None:
        raise ArgumentError("the barrier is one of inequalities: give G and h, or kind='quadratic'")
    n = c.shape[-1] if isinstance(c, Tensor) and c.dim() else 0
    like = c if isinstance(c, Tensor) and c.is_floating_point() else torch.zeros(0)
    P = torch.zeros(n, n, dtype=like.dtype, device=like.device)
    barrier = smoothing if kind == "barrier" else 0.0
    if kind == "quadratic":
        P = P + smoothing * torch.eye(n, dtype=like.dtype, device=like.device)
    return solve_program(
        P, c, A, b, G, h, tol=tol, max_steps=max_steps, throw=throw, barrier=barrier
    )
