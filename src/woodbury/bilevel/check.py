"""A checker users run on their own bilevel problem: implicit gradient against differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.bilevel.estimate import (
    Hypergradient,
    estimate_hypergradient,
    implicit_hypergradient,
)
from woodbury.bilevel.estimators import UnrolledDescent
from woodbury.bilevel.parts import Tensors
from woodbury.bilevel.problem import Bilevel, Loss
from woodbury.errors import DataError, DtypeError
from woodbury.implicit.modes import Implicit
from woodbury.implicit.newton import newton_cg
from woodbury.solvers import Recipe

__all__ = ["HypergradientCheck", "check_hypergradient", "unrolled_hypergradient"]


@dataclass(frozen=True)
class HypergradientCheck:
    """Directional derivatives of the outer loss along random directions of the hyperparameters.

    Attributes:
        implicit: ``<dF/dlambda, u>`` from :func:`hypergradient`, ``[directions]``.
        finite_difference: central differences of the re-solved problem, extrapolated.
        uncertainty: difference between two step sizes: what the differences themselves are worth.
        unrolled: the same from differentiating gradient descent, where asked for.
        tolerance: relative error allowed.
        hypergradient: the implicit result, with its certificate.

    Example:
        >>> import torch
        >>> from woodbury import Cholesky, check_hypergradient
        >>> inner = lambda w, a: ((w - a) ** 2 + 0.1 * w**4).sum()
        >>> outer = lambda w, a: (w**2).sum()
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> check = check_hypergradient(inner, outer, one, one, Cholesky(), directions=1)
        >>> check.ok, bool(check.error.max() < 1e-6)
        (True, True)
    """

    implicit: Tensor
    finite_difference: Tensor
    uncertainty: Tensor
    unrolled: Tensor | None
    tolerance: float
    hypergradient: Hypergradient

    @property
    def error(self) -> Tensor:
        """``|implicit - finite_difference|`` relative to the largest difference quotient."""
        scale = self.finite_difference.abs().max().clamp_min(torch.finfo(self.implicit.dtype).tiny)
        return (self.implicit - self.finite_difference).abs() / scale

    @property
    def ok(self) -> bool:
        """Whether every direction agrees within the tolerance and the differences' own error."""
        scale = self.finite_difference.abs().max()
        allowed = self.tolerance * scale + self.uncertainty
        return bool(((self.implicit - self.finite_difference).abs() <= allowed).all())

    def __str__(self) -> str:
        lines = ["direction   implicit        difference      +-          relative error"]
        columns = (self.implicit, self.finite_difference, self.uncertainty, self.error)
        for index, row in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            lines.append(
                f"{index:9d}   {row[0]:+.6e}   {row[1]:+.6e}   {row[2]:.1e}     {row[3]:.1e}"
            )
        if self.unrolled is not None:
            values = ", ".join(f"{value:+.6e}" for value in self.unrolled.tolist())
            lines.append(f"unrolled: {values}")
        verdict = "agrees" if self.ok else "DISAGREES"
        lines.append(f"The implicit hypergradient {verdict} at tolerance {self.tolerance:g}.")
        if not self.ok:
            lines.append(
                "Look first at the certificate (is the inner problem solved? did the linear solve "
                f"converge?): {self.hypergradient.certificate()}"
            )
        return "\n".join(lines)


def check_hypergradient(
    inner: Loss,
    outer: Loss,
    params: Tensors,
    hyper: Tensors,
    recipe: Recipe | None = None,
    *,
    inner_data: Iterable[Any] | None = None,
    outer_data: Iterable[Any] | None = None,
    solve_inner: Callable[[Tensors], Tensors] | None = None,
    directions: int = 3,
    step: float = 1e-3,
    tolerance: float = 1e-4,
    unroll: int = 0,
    generator: torch.Generator | None = None,
) -> HypergradientCheck:
    r"""Compare the implicit hypergradient with finite differences of the re-solved problem.

    For random unit directions $u$ it computes
    $(F(\lambda + h u) - F(\lambda - h u)) / 2h$ at $h$ and $h/2$, extrapolates (error $O(h^4)$)
    and compares with $\langle dF/d\lambda, u\rangle$. Every evaluation solves the inner problem
    anew, from ``params``.

    Args:
        inner: ``inner(params, hyper, batch)``, as in :func:`hypergradient`.
        outer: ``outer(params, hyper, batch)``, likewise.
        params: where the inner solver starts, a tensor or a mapping; float64, since differences of
            float32 losses say little.
        hyper: hyperparameters, a tensor or a mapping.
        recipe: how to solve with the Hessian; the recipe that is being checked.
        inner_data: batches of the inner loss.
        outer_data: batches of the outer loss.
        solve_inner: ``solve_inner(hyper) -> params`` minimises the inner loss. Default: damped
            Newton with conjugate gradients to a gradient norm of 1e-10 relative to its start.
        directions: number of random directions.
        step: $h$, relative to ``max(1, |lambda|_inf)``.
        tolerance: relative error that still counts as agreement.
        unroll: where positive, also differentiate through this many steps of gradient descent
            from the solution (see :func:`unrolled_hypergradient`).
        generator: source of the directions; default seed 0.

    Returns:
        A :class:`HypergradientCheck`; ``print`` it for the table and the verdict.

    Raises:
        DtypeError: params or hyper are not float64.
        GradientError: as :func:`hypergradient`.

    Cost: ``4 * directions + 1`` solutions of the inner problem.

    Example:
        >>> import torch
        >>> from woodbury import Cholesky, check_hypergradient
        >>> x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None] ** torch.arange(4)
        >>> y = torch.sin(3 * x[:, 1])
        >>> def inner(w, decay):
        ...     return ((x[::2] @ w - y[::2]) ** 2).mean() + (decay.exp() * w**2).sum()
        >>> def outer(w, decay):
        ...     return ((x[1::2] @ w - y[1::2]) ** 2).mean()
        >>> w, decay = torch.zeros(4).double(), torch.full((4,), -3.0).double()
        >>> check_hypergradient(inner, outer, w, decay, Cholesky()).ok
        True
    """
    if directions < 1:
        raise DataError(f"directions is {directions}; at least one is needed")
    problem = Bilevel(inner, outer, params, hyper, inner_data=inner_data, outer_data=outer_data)
    for what, tensors in (("params", problem.params), ("hyper", problem.hyper)):
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float64:
                raise DtypeError(
                    f"{what}[{name!r}] is {tensor.dtype}; differences need float64, convert with "
                    ".double()"
                )
    hyper_space, centre = problem.hyper_space, problem.hyper_vector()

    def at(flat: Tensor) -> Bilevel:
        shifted = problem.at(hyper=flat)
        if solve_inner is None:
            return shifted.at(newton_cg(shifted.inner_objective(), gtol=1e-10))
        solution = solve_inner(shifted.structured("hyper", shifted.hyper))
        return shifted.at(problem.space.flatten(_mapping(solution)))

    solved = at(centre)
    result = implicit_hypergradient(solved, Implicit(recipe))
    flat = hyper_space.flatten(_mapping(result.value))

    generator = torch.Generator().manual_seed(0) if generator is None else generator
    random = torch.randn(centre.numel(), directions, generator=generator, dtype=centre.dtype)
    units = (random / random.norm(dim=0)).to(centre.device)
    width = step * max(1.0, centre.abs().max().item())

    def quotient(u: Tensor, h: float) -> float:
        high, low = at(centre + h * u).value("outer"), at(centre - h * u).value("outer")
        return (high - low) / (2 * h)

    coarse = torch.tensor([quotient(u, width) for u in units.T], dtype=centre.dtype)
    fine = torch.tensor([quotient(u, width / 2) for u in units.T], dtype=centre.dtype)
    unrolled = None
    if unroll:
        descent = estimate_hypergradient(solved, UnrolledDescent(unroll)).value
        unrolled = (hyper_space.flatten(_mapping(descent)) @ units).cpu()
    return HypergradientCheck(
        implicit=(flat @ units).cpu(),
        finite_difference=(4 * fine - coarse) / 3,
        uncertainty=(fine - coarse).abs() / 3,
        unrolled=unrolled,
        tolerance=tolerance,
        hypergradient=result,
    )


def unrolled_hypergradient(
    inner: Loss,
    outer: Loss,
    params: Tensors,
    hyper: Tensors,
    *,
    steps: int,
    step_size: float | None = None,
    inner_data: Iterable[Any] | None = None,
    outer_data: Iterable[Any] | None = None,
) -> Tensors:
    r"""Gradient of $f(w_K(\lambda), \lambda)$, $w_K$ after ``steps`` steps of gradient descent.

    $w_{j+1} = w_j - \alpha \nabla_w g(w_j, \lambda)$ from ``params``, held fixed. Started at the
    inner solution it equals the implicit hypergradient with the first ``steps`` terms of the
    Neumann series in exact arithmetic.

    Args:
        inner: ``inner(params, hyper, batch)``, as in :func:`hypergradient`.
        outer: ``outer(params, hyper, batch)``, likewise.
        params: where the descent starts, a tensor or a mapping.
        hyper: hyperparameters, a tensor or a mapping.
        steps: number $K$ of steps.
        step_size: $\alpha$; default ``1 / lambda_max`` of the inner Hessian.
        inner_data: batches of the inner loss.
        outer_data: batches of the outer loss.

    Returns:
        The gradient in the structure of ``hyper``.

    Cost: ``2 steps + 1`` gradients in time, and the graph of all steps in memory: this is for
    checking, not for use at scale.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import unrolled_hypergradient
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> inner = lambda w, a: 0.5 * (w - a).square().sum()
        >>> unrolled_hypergradient(inner, lambda w, a: w.sum(), one, one, steps=1, step_size=0.5)
        tensor([0.5000], dtype=torch.float64)
    """
    problem = Bilevel(inner, outer, params, hyper, inner_data=inner_data, outer_data=outer_data)
    return estimate_hypergradient(problem, UnrolledDescent(steps, step_size)).value


def _mapping(tensors: Tensors) -> dict[str, Tensor]:
    return {"": tensors} if isinstance(tensors, Tensor) else dict(tensors)
