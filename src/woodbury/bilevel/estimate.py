"""The hypergradient at one point, by any estimator."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.bilevel.differences import DifferenceLinearization
from woodbury.bilevel.estimators import (
    Estimator,
    FiniteDifference,
    HypergradientState,
    UnrolledDescent,
    as_mode,
    default_recipe,
    solve_adjoint,
)
from woodbury.bilevel.linearization import Linearization
from woodbury.bilevel.parts import Parts, Tensors, leaves, or_zeros
from woodbury.bilevel.problem import Bilevel
from woodbury.curvature import Hessian
from woodbury.curvature.batches import Batch
from woodbury.decompositions import extreme_eigenvalues
from woodbury.errors import ArgumentError, GradientError
from woodbury.implicit.modes import Implicit
from woodbury.implicit.stationarity import Stationarity, StationarityWarning
from woodbury.solvers import Solution, solve
from woodbury.solvers.recipe import State

__all__ = ["Hypergradient", "estimate_hypergradient"]


@dataclass(frozen=True)
class Hypergradient:
    r"""A hypergradient and what is known about its error.

    Attributes:
        value: $dF/d\lambda$, in the structure (tensor or mapping) of ``hyper``.
        direct: the part $\partial f/\partial\lambda$.
        outer_value: $f(w, \lambda)$.
        stationarity: $\|\nabla_w g\|$; zero where the inner problem is solved.
        outer_error: $\langle q, \nabla_w g\rangle$ with $q = H^{-1}\nabla_w f$: to first order how
            far $f(w)$ is from $f(w^*)$ because the inner problem is not solved. It costs nothing.
        solution: the linear solve $H q = \nabla_w f$, with its status and true residual; ``None``
            where nothing was solved (unrolling), and ``outer_error`` is then NaN.
        refreshed: why what a state kept was prepared anew in this step; empty where it was not.

    Example:
        >>> import torch
        >>> from woodbury import CG, hypergradient
        >>> inner = lambda w, a: 0.5 * (w - a).square().sum()
        >>> outer = lambda w, a: w.sum()
        >>> w, a = torch.tensor([0.9]), torch.ones(1)
        >>> result = hypergradient(inner, outer, w, a, CG(), stationary_rtol=None)
        >>> result.value
        tensor([1.])
        >>> round(result.outer_error, 3)  # w is 0.9, not 1: the outer loss is off by that
        -0.1
        >>> result.certificate()["solve_status"]
        'the true residual is within the tolerance'
    """

    value: Tensors
    direct: Tensors
    outer_value: float
    stationarity: float
    outer_error: float
    solution: Solution | None
    refreshed: str = ""

    def certificate(self) -> dict[str, Any]:
        """What a reader needs to trust the value: plain numbers and sentences."""
        found: dict[str, Any] = {
            "inner_stationarity": self.stationarity,
            "outer_error_from_inner": self.outer_error,
        }
        if self.solution is None:
            return found
        found.update(
            solve_residual=torch.as_tensor(self.solution.residual).max().item(),
            solve_status=self.solution.status.value,
            products=self.solution.products,
        )
        if self.refreshed:
            found["refreshed"] = self.refreshed
        return found


def estimate_hypergradient(
    problem: Bilevel,
    estimator: Estimator | None = None,
    *,
    state: HypergradientState | None = None,
    inner_batch: Batch | None = None,
    outer_batch: Batch | None = None,
    cache: int | str | None = "auto",
) -> Hypergradient:
    r"""The hypergradient of a :class:`Bilevel` problem where its tensors are now.

    | estimator | what stands for $H^{-1}$ | bias |
    | --- | --- | --- |
    | ``CG()``, ``Cholesky()``, any exact recipe | $H^{-1}$ to a tolerance | none |
    | ``Neumann(terms=K, step=a)``, ``Truncated(K + 1, a)`` | $a \sum_{j \le K} (I - aH)^j$ |
    $\|I - aH\|^{K+1}$ |
    | ``Neumann(terms=0, step=a)``, ``OneStep(a)`` | $a I$ | $\|I - aH\|$ |
    | ``Nystrom(rank=k, damping=r)`` | $(H_k + r I)^{-1}$ | that of $H_k$, and the damping |
    | ``FiniteDifference(recipe)`` | the same, by differences of gradients | $O(\epsilon^2)$ |
    | ``UnrolledDescent(K, a)`` | nothing; descent is differentiated | $\|I - aH\|^K$ |

    Args:
        problem: losses, tensors and data.
        estimator: a recipe, or a mode: :class:`~woodbury.implicit.Implicit` with a recipe and a
            policy for failure, :class:`~woodbury.implicit.Truncated`,
            :class:`~woodbury.implicit.OneStep`, :class:`~woodbury.implicit.Phantom`,
            :class:`UnrolledDescent`, :class:`FiniteDifference`. Default ``CG()``.
        state: a :class:`HypergradientState` that goes from one outer step to the next.
        inner_batch: batch of the inner loss that a sampler has drawn; all of the data by default.
        outer_batch: likewise of the outer loss.
        cache: memory for the linearisation over all of the data; see :class:`woodbury.Hessian`.

    Returns:
        A :class:`Hypergradient`. Nobody is warned of an inner problem that is not solved: in the
        middle of training it never is; ``stationarity`` says how far it is.

    Raises:
        GradientError: a hyperparameter enters neither loss, the outer loss does not depend on the
            parameters, or the inner loss not on one of them.
        NonFiniteError: a loss or its gradient is NaN or infinite.
        SolveError, NotPositiveDefiniteError, SingularError: the solve failed, unless the mode says
            otherwise.
        ArgumentError: ``estimator`` is none.

    Cost: one gradient of each loss, the products of the solve, one mixed product.

    Source: as for :func:`hypergradient`.

    Example:
        >>> import torch
        >>> from woodbury import Neumann
        >>> from woodbury.bilevel import Bilevel, UnrolledDescent, estimate_hypergradient
        >>> inner = lambda w, a: 0.5 * (a * w.square()).sum() - w.sum()
        >>> w, a = torch.tensor([1.0, 0.5]), torch.tensor([1.0, 2.0])
        >>> problem = Bilevel(inner, lambda w, a: 0.5 * w.square().sum(), w, a)
        >>> estimate_hypergradient(problem).value
        tensor([-1.0000, -0.1250])
        >>> estimate_hypergradient(problem, Neumann(terms=2, step=0.4)).value
        tensor([-0.7840, -0.1240])
        >>> estimate_hypergradient(problem, UnrolledDescent(steps=3, step=0.4)).value
        tensor([-0.7840, -0.1240])
    """
    mode = as_mode(estimator)
    if isinstance(mode, UnrolledDescent):
        return _unrolled(problem, mode, inner_batch, outer_batch)
    if not isinstance(mode, Implicit | FiniteDifference):
        raise ArgumentError(f"{mode!r} is no estimator of a hypergradient")
    return implicit_hypergradient(
        problem,
        mode,
        state=state,
        inner_batch=inner_batch,
        outer_batch=outer_batch,
        cache=cache,
    )


def implicit_hypergradient(
    problem: Bilevel,
    mode: Implicit | FiniteDifference,
    *,
    state: HypergradientState | None = None,
    inner_batch: Batch | None = None,
    outer_batch: Batch | None = None,
    cache: int | str | None = "auto",
    x0: Tensor | None = None,
    prepared: State | None = None,
    stationary_rtol: float | None = None,
) -> Hypergradient:
    """$d - J q$ with $H q = a$; warns beyond a relative gradient, where one is given."""
    outer_value, outer_gradient, direct = problem.gradient_parts("outer", outer_batch)
    point: Linearization
    if isinstance(mode, FiniteDifference):
        point = DifferenceLinearization(problem, inner_batch, mode.radius)
    else:
        point = problem.linearize(inner_batch, cache=cache)
    solution, refreshed = solve_adjoint(point.hessian, outer_gradient, mode, state, x0, prepared)
    q = solution.value.detach()
    value, filled = _assembled(problem, direct, point.mixed_parts(q))
    found = Hypergradient(
        value=problem.structured("hyper", value),
        direct=problem.structured("hyper", filled),
        outer_value=outer_value,
        stationarity=problem.space.norm(point.gradient).item(),
        outer_error=problem.space.inner(q, point.gradient).item(),
        solution=solution,
        refreshed=refreshed,
    )
    if stationary_rtol is not None:
        _warn_unless_stationary(problem, point, mode, found, stationary_rtol)
    return found


def _assembled(
    problem: Bilevel, direct: Parts, indirect: Parts
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``direct - indirect`` and ``direct``, with zeros where a part is ``None``."""
    unused = [name for name in problem.hyper if direct[name] is None and indirect[name] is None]
    if unused:
        names = ", ".join(map(repr, unused)) if problem.hyper_named else "hyper"
        raise GradientError(
            f"{names}: neither loss depends on it; use the hyper given to the losses as their "
            "second argument, not a tensor from outside"
        )
    filled = {name: or_zeros(direct[name], like) for name, like in problem.hyper.items()}
    value = {n: filled[n] - or_zeros(indirect[n], like) for n, like in problem.hyper.items()}
    return value, filled


def _warn_unless_stationary(
    problem: Bilevel,
    point: Linearization,
    mode: Implicit | FiniteDifference,
    found: Hypergradient,
    rtol: float,
) -> None:
    if found.stationarity == 0:
        return
    w = problem.params_vector()
    least = torch.finfo(w.dtype).eps ** 0.5
    sized = torch.where(w.abs() < least, least, w)  # a solution may be zero
    with torch.no_grad():
        scale = problem.space.norm(point.hessian @ sized).item()
    relative = found.stationarity / scale if scale > 0 else math.inf
    if relative <= rtol:
        return
    assert found.solution is not None  # an implicit one
    newton = solve(
        point.hessian,
        point.gradient,
        default_recipe(mode),
        state=found.solution.state,
        throw=False,
    )
    distance = problem.space.norm(newton.value).item() if newton.ok else math.nan
    source = f"a Newton step, residual {float(newton.residual):.1g}, to first order"
    message = Stationarity(found.stationarity, relative, distance, source, False).message()
    warnings.warn(
        f"{message}. To first order the outer loss is off by {found.outer_error:.3g}",
        StationarityWarning,
        stacklevel=4,
    )


def _unrolled(
    problem: Bilevel, mode: UnrolledDescent, inner_batch: Batch | None, outer_batch: Batch | None
) -> Hypergradient:
    step = mode.step
    if step is None:
        step = 1 / extreme_eigenvalues(Hessian(problem.inner_objective())).radius
    weights, hyper = leaves(problem.params), leaves(problem.hyper)
    norm = 0.0
    with torch.enable_grad():
        for index in range(mode.steps):
            value = problem.mean("inner", weights, hyper, inner_batch)
            slopes = torch.autograd.grad(value, list(weights.values()), create_graph=True)
            if index == 0:
                norm = math.hypot(*(slope.norm().item() for slope in slopes))
            weights = {
                name: w - step * slope
                for (name, w), slope in zip(weights.items(), slopes, strict=True)
            }
        value = problem.mean("outer", weights, hyper, outer_batch)
    moved = problem.at(problem.space.flatten({n: w.detach() for n, w in weights.items()}))
    _, _, direct = moved.gradient_parts("outer", outer_batch)
    parts = torch.autograd.grad(value, list(hyper.values()), allow_unused=True)
    total: Parts = dict(zip(hyper, parts, strict=True))
    nothing: Parts = dict.fromkeys(problem.hyper)
    whole, _ = _assembled(problem, total, nothing)
    filled = {name: or_zeros(direct[name], like) for name, like in problem.hyper.items()}
    return Hypergradient(
        value=problem.structured("hyper", whole),
        direct=problem.structured("hyper", filled),
        outer_value=value.item(),
        stationarity=norm,
        outer_error=math.nan,
        solution=None,
    )
