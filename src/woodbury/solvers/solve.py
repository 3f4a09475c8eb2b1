"""``solve(A, b, recipe)``: checks, the recipe's work, the certificate, the failure policy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from woodbury.errors import (
    NonFiniteError,
    NotPositiveDefiniteError,
    SingularError,
    SolveError,
)
from woodbury.operators.base import LinearOperator
from woodbury.solvers.certificate import ErrorBound, Guarantee
from woodbury.solvers.checks import check_state, check_system, largest_entries
from woodbury.solvers.columns import norms
from woodbury.solvers.default import default_recipe
from woodbury.solvers.differentiate import Related, System
from woodbury.solvers.pullback import Watch
from woodbury.solvers.recipe import Outcome, Problem, Progress, Recipe, State, work_dtype
from woodbury.solvers.solution import Solution, SolveReport, SolveStatus

__all__ = ["OnFailure", "SolveWarning", "solve", "solve_with_policy"]

OnFailure = Literal["raise", "warn", "nan", "ignore"]

_FACTORISATION_FAILURES: dict[type[Exception], SolveStatus] = {
    NotPositiveDefiniteError: SolveStatus.not_positive_definite,
    SingularError: SolveStatus.singular,
    NonFiniteError: SolveStatus.non_finite,
}


# What recipes say of each column, and its value for a column of zeros, which they are not given.
_OF_A_ZERO_COLUMN: dict[str, Any] = {
    "column_steps": 0,
    "normal_residual": 0.0,
    "local_error": 0.0,
    "error_bound": ErrorBound(0.0, Guarantee.bound, "energy", math.nan, 0.0),
    "energy": None,
}


class SolveWarning(RuntimeWarning):
    """A solve failed and its caller had asked to be warned only."""


def solve(
    A: LinearOperator,
    b: Tensor,
    recipe: Recipe | None = None,
    *,
    x0: Tensor | None = None,
    state: State | None = None,
    throw: bool = True,
    history: bool = False,
    progress: Progress | None = None,
    report: SolveReport | None = None,
) -> Solution:
    r"""Solve $A x = b$ and say how well: $\|b - A x\| / \|b\|$ is recomputed for every answer.

    The value is differentiable with respect to ``b`` and to all tensors that ``A`` is made of or
    closes over, to any order: a backward pass solves once with ``A.H``, by the same recipe and
    state (twice more for least squares), and a failure there raises (``throw=True``) or warns. So
    it is in ``torch.func`` (``grad``, ``jacrev``, ``jvp``, ``jacfwd``, ``hessian``; not in forward
    mode twice, which torch cannot). Under ``vmap`` right-hand sides become columns of one block;
    where tensors of ``A`` are batched, each sample is solved for itself. The status is then the
    worst of the batch. The gradient is that of the exact solution: of a recipe that only comes near
    it, as ``Nystrom`` of low rank or ``Neumann``, it is as near. Products of curvature operators
    are constant in the parameters of the model.

    A recipe for least squares (``LSMR``, ``LSQR``, ``QR``) returns the minimiser of
    $\|b - A x\|$ of smallest norm, which is what was asked of it: the status is ``converged`` where
    the residual vanishes to the tolerance and ``least_squares`` where it does not. A recipe for
    square systems says ``inconsistent``, a failure, where a singular one has no solution.

    Args:
        A: operator ``[m, n]``; square unless the recipe solves least squares.
        b: right-hand side ``[m]``, or a block of them ``[m, k]``, of the operator's dtype and
            device.
        recipe: how to solve. By default the operator's own inverse where its structure has one;
            then up to 2,000 rows :class:`Cholesky`, :class:`Eigh` or :class:`LU`, as the tags
            allow; beyond, :class:`CG` for positive (semi)definite operators and :class:`Auto` for
            others. For least squares :class:`QR` up to 4 million entries, :class:`LSMR` beyond.
        x0: first iterate ``[n]`` or ``[n, k]``; zero by default.
        state: what ``recipe.prepare`` or an earlier ``solution.state`` holds; made if not given.
            Its factor, sketch or preconditioner is used as it is.
        throw: raise if the solve fails; otherwise the best iterate is returned with its status.
        history: keep the residual after each step.
        progress: called after each step with its number and the largest relative residual.
        report: receives the solution, and those of backward passes.

    Returns:
        A :class:`Solution`: value, status, residual, cost.

    Raises:
        SolveError: the recipe did not reach what it promises, and ``throw`` is true; the error
            holds the solution.
        NotPositiveDefiniteError: a factorisation needs it, and ``throw`` is true.
        SingularError: the recipe cannot do with a singular operator, and ``throw`` is true.
        NonFiniteError: ``b`` or ``x0`` holds NaN or infinity.
        ShapeError: shapes do not match.
        DtypeError: dtypes do not match; nothing is promoted.
        DeviceError: devices do not match.
        TagError: the recipe relies on a tag that the operator does not have.
        GradientError: a gradient is asked for that does not exist (with respect to ``x0``), or
            that cannot be had: products use tensors with a gradient in a custom
            ``autograd.Function``, or in a graph made before.

    Cost: that of the recipe, and one product for the residual where the recipe has not taken it.

    Example:
        >>> import torch
        >>> from woodbury import CG, Dense, solve
        >>> A = Dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), tags={"positive_definite"})
        >>> solve(A, torch.tensor([1.0, 2.0]), CG(rtol=1e-6))
        Solution(converged, residual=..., steps=2, products=3, value=[2] torch.float32,
        recipe=CG(rtol=1e-06, atol=0.0, max_steps=None, preconditioner=None))
    """
    return solve_with_policy(
        A,
        b,
        recipe,
        x0=x0,
        state=state,
        on_failure="raise" if throw else "ignore",
        backward="raise" if throw else "warn",
        history=history,
        progress=progress,
        report=report,
    )


def solve_with_policy(
    A: LinearOperator,
    b: Tensor,
    recipe: Recipe | None,
    *,
    on_failure: OnFailure,
    backward: OnFailure,
    x0: Tensor | None = None,
    state: State | None = None,
    history: bool = False,
    progress: Progress | None = None,
    report: SolveReport | None = None,
    related: Related | None = None,
) -> Solution:
    """:func:`solve`, with one policy for its own failure and one for those of backward passes."""
    check_system(A, b, x0)
    if recipe is None:
        recipe = default_recipe(A) if state is None else state.recipe
    recipe.check(A)
    if state is not None:
        check_state(state, recipe, A)

    def run(
        A: LinearOperator,
        b: Tensor,
        recipe: Recipe,
        x0: Tensor | None,
        state: State | None,
        watch: Watch | None,
    ) -> Solution:
        asked = _Asked(watch, history, progress)
        with torch.no_grad():
            solution = _solve_block(A, b, recipe, x0, state, on_failure, asked)
        if report is not None:
            report.add(solution)
        return _apply_policy(solution, on_failure)

    def again(A: LinearOperator, b: Tensor, recipe: Recipe, related: Related) -> Tensor:
        # With grad mode on inside a backward pass (create_graph) this is differentiable too.
        return solve_with_policy(
            A, b, recipe, on_failure=backward, backward=backward, report=report, related=related
        ).value

    return System(A, recipe, run, again, state=state, related=related).solve(b, x0)


class _Asked:
    """What a solve is asked to do besides solving."""

    def __init__(self, watch: Watch | None, history: bool, progress: Progress | None) -> None:
        self.watch, self.history, self.progress = watch, history, progress


def _solve_block(
    A: LinearOperator,
    b: Tensor,
    recipe: Recipe,
    x0: Tensor | None,
    state: State | None,
    on_failure: OnFailure,
    asked: _Asked,
) -> Solution:
    block = b.dim() == 2
    B = b if block else b.unsqueeze(1)
    X0 = x0 if x0 is None or block else x0.unsqueeze(1)
    k = B.shape[1]
    largest = largest_entries(B, "b")
    if X0 is not None:
        largest_entries(X0, "x0")
    active = [j for j, size in enumerate(largest) if size > 0]
    prepared = 0
    work = work_dtype(A.dtype)
    value = torch.zeros(A.shape[1], k, dtype=work, device=B.device)
    statuses = [SolveStatus.converged] * k
    residual = torch.zeros(k, dtype=torch.float64)
    outcome = Outcome(value, statuses)
    products, history = 0, None
    if active:
        problem = _problem(A, B, X0, active, largest, work, asked)
        try:
            if state is None:
                state = recipe.prepare(A)
                prepared = state.products
            outcome = recipe._run(problem, state)
        except tuple(_FACTORISATION_FAILURES) as error:
            if on_failure == "raise":
                raise
            return _without_value(A, b, recipe, _FACTORISATION_FAILURES[type(error)])
        X = outcome.value if outcome.value.dim() == 2 else outcome.value.unsqueeze(1)
        if any(scale != 1 for scale in problem.scales):
            X = X * torch.tensor(problem.scales, dtype=work, device=B.device)
            _mark_overflow(X, outcome)
        value = X if len(active) == k else value.index_copy(1, _index(active, B.device), X)
        found = _true_residuals(problem, outcome)
        for j, r, status in zip(active, found, outcome.statuses, strict=True):
            known = math.isfinite(r) or not status.ok
            statuses[j] = status if known else SolveStatus.non_finite
        if len(active) == k:
            residual = torch.tensor(found, dtype=torch.float64)
        else:
            residual[active] = torch.tensor(found, dtype=torch.float64)
        products = problem.products
        state = outcome.state or state
        history = _history(problem, active, k)
    elif asked.history:
        history = torch.zeros(1, k, dtype=torch.float64)
    value = value.to(A.dtype)
    if history is not None and not block:
        history = history.squeeze(1)
    return Solution(
        value=value if block else value.squeeze(1),
        status=SolveStatus.worst(statuses),
        residual=residual if block else residual[0],
        steps=outcome.steps,
        products=products + prepared,
        recipe=recipe,
        state=state,
        column_status=tuple(statuses) if block else None,
        history=history,
        info=_of_all_columns(outcome.info, active, k),
    )


def _of_all_columns(info: dict[str, Any], active: Sequence[int], k: int) -> dict[str, Any]:
    """What a recipe says of the columns it was given, for the columns that the caller gave."""
    if len(active) == k:
        return info
    found = dict(info)
    for name, nothing in _OF_A_ZERO_COLUMN.items():
        if name in info:
            found[name] = [nothing] * k
            for j, number in zip(active, info[name], strict=True):
                found[name][j] = number
    if "column" in info:
        found["column"] = active[info["column"]]
    return found


def _problem(
    A: LinearOperator,
    B: Tensor,
    X0: Tensor | None,
    active: Sequence[int],
    largest: Sequence[float],
    work: torch.dtype,
    asked: _Asked,
) -> Problem:
    """The columns that are not zero, scaled where their squares would leave the dtype's range."""
    if len(active) < B.shape[1]:
        B = B[:, list(active)]
        X0 = None if X0 is None else X0[:, list(active)]
    limit = math.sqrt(torch.finfo(work).max) ** 0.5
    sizes = [largest[j] for j in active]
    safe = [1 / limit <= size <= limit for size in sizes]
    # Powers of two, so that scaling rounds nothing.
    scales = [1.0 if ok else 2.0 ** round(math.log2(s)) for ok, s in zip(safe, sizes, strict=True)]
    B = B.to(work)
    X0 = None if X0 is None else X0.to(work)
    if not all(safe):
        factors = torch.tensor(scales, dtype=torch.float64, device=B.device)
        B = (B.to(_wide(work)) / factors).to(work)
        X0 = None if X0 is None else (X0.to(_wide(work)) / factors).to(work)
    if len(active) == 1:
        B = B.squeeze(1)
        X0 = None if X0 is None else X0.squeeze(1)
    return Problem(
        A,
        B.contiguous(),
        None if X0 is None else X0.contiguous(),
        scales=scales,
        watch=asked.watch,
        progress=asked.progress,
        history=[] if asked.history else None,
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _mark_overflow(X: Tensor, outcome: Outcome) -> None:
    """A solution may leave the range of the dtype although its scaled version was in it."""
    for j, finite in enumerate(torch.isfinite(X).all(dim=0).tolist()):
        if not finite:
            outcome.statuses[j] = SolveStatus.non_finite


def _index(columns: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(columns), device=device)


def _true_residuals(problem: Problem, outcome: Outcome) -> list[float]:
    found = outcome.residuals
    # The residual is that of the value as it is returned, rounded to the operator's dtype.
    rounded = outcome.value.to(problem.A.dtype).to(outcome.value.dtype)
    if found is None or rounded.dtype != problem.A.dtype:
        found = norms(problem.A.out_space, problem.residual(rounded))
    pairs = zip(found, problem.b_norms, strict=True)
    return [r / norm for r, norm in pairs]


def _history(problem: Problem, active: Sequence[int], k: int) -> Tensor | None:
    if problem.history is None:
        return None
    found = torch.zeros(len(problem.history), k, dtype=torch.float64)
    if problem.history:
        found[:, list(active)] = torch.tensor(problem.history, dtype=torch.float64)
    return found


def _without_value(A: LinearOperator, b: Tensor, recipe: Recipe, status: SolveStatus) -> Solution:
    """A factorisation failed: there is no value, and zeros would look like one."""
    block = b.dim() == 2
    nan = torch.full(b.shape[1:], math.nan, dtype=torch.float64)
    return Solution(
        value=b.new_full(A.shape[1:] + b.shape[1:], math.nan),
        status=status,
        residual=nan,
        steps=0,
        products=0,
        recipe=recipe,
        column_status=(status,) * b.shape[1] if block else None,
    )


def _apply_policy(solution: Solution, on_failure: OnFailure) -> Solution:
    if solution.ok or on_failure == "ignore":
        return solution
    if on_failure == "raise":
        raise SolveError(solution.message(), solution)
    if on_failure == "warn":
        warnings.warn(solution.message(), SolveWarning, stacklevel=8)
        return solution
    bad = (
        torch.ones((), dtype=torch.bool)
        if solution.column_status is None
        else torch.tensor([not status.ok for status in solution.column_status])
    ).to(solution.value.device)
    return replace(solution, value=solution.value.masked_fill(bad, math.nan))
