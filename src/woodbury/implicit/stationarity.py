"""Whether a solution satisfies its condition, and how far it may be from one that does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.decompositions import extreme_eigenvalues
from woodbury.errors import ArgumentError, NonFiniteError, WoodburyError
from woodbury.implicit.condition import Condition, FlatCondition, Kind
from woodbury.implicit.jacobian import ConditionJacobian
from woodbury.implicit.trees import Arguments, Unknown

__all__ = ["Stationarity", "StationarityWarning", "assess", "stationarity"]

# Up to this size the smallest singular value is computed from the matrix.
_DENSE = 256


class StationarityWarning(RuntimeWarning):
    """What was returned as a solution does not satisfy its condition."""


@dataclass(frozen=True)
class Stationarity:
    r"""How well $F(x, \theta) = 0$ holds.

    Attributes:
        residual: $\|F(x, \theta)\|$.
        relative: ``residual`` over the larger of $\|F(x_0, \theta)\|$ (where a start is known) and
            $\|A x\|$, what a change of $x$ by its own size does to $F$ (for a fixed point
            $\|x\|$). Entries below $\sqrt\epsilon$ count as large as that.
        error_bound: bound of $\|x - x^*\|$; NaN where there is none.
        bound: where the bound comes from, in words.
        ok: whether ``relative`` is within the tolerance.

    Example:
        >>> import torch
        >>> from woodbury.implicit import stationarity
        >>> found = stationarity(lambda x: 2 * (x - 1), torch.tensor([1.5]))
        >>> found.residual, found.error_bound
        (1.0, 0.5)
    """

    residual: float
    relative: float
    error_bound: float
    bound: str
    ok: bool

    def message(self) -> str:
        """One sentence with the values and what to do."""
        distance = (
            f"|x - x*| <= {self.error_bound:.3g} ({self.bound})"
            if math.isfinite(self.error_bound)
            else f"no bound of |x - x*| ({self.bound})"
        )
        return (
            f"the solution does not satisfy its condition: |F(x)| = {self.residual:.3g}, relative "
            f"{self.relative:.3g}; {distance}. Derivatives are those of an exact solution and are "
            "off by the order of that error: let the solver run longer, or raise stationary_rtol "
            "if this is meant"
        )


def stationarity(
    function: Callable[..., Any],
    x: Any,
    *args: Any,
    kind: Kind = "root",
    symmetric: bool | None = None,
    strong_convexity: float | None = None,
    rtol: float = 1e-3,
) -> Stationarity:
    r"""Measure how well a solution satisfies its condition, and bound its error.

    $\|x - x^*\| \le \|F(x)\| / \sigma$, where $\sigma$ is the strong convexity if it is known (then
    the bound is rigorous), else $\sigma_{min}(A)$ at $x$ (to first order): from the matrix up to
    256 unknowns, beyond that by Lanczos for symmetric conditions.

    Args:
        function: $F$, $T$ or $f$, as ``kind`` says.
        x: the solution, a pytree of tensors.
        *args: what the function takes beside it.
        kind: ``"root"``, ``"fixed_point"`` or ``"minimum"``.
        symmetric: whether $\partial F/\partial x$ is; by default as the kind or the function's flag
            ``symmetric`` says.
        strong_convexity: $\mu > 0$ with $\langle F(x) - F(y), x - y\rangle \ge \mu \|x - y\|^2$.
        rtol: the relative residual that counts as solved.

    Returns:
        A :class:`Stationarity`.

    Raises:
        NonFiniteError: ``x`` or the residual holds NaN or infinity.
        ArgumentError: ``strong_convexity`` is not positive.

    Cost: up to 256 unknowns as many products as unknowns; beyond that 40, or none.

    Example:
        >>> import torch
        >>> from woodbury.implicit import stationarity
        >>> f = lambda x, t: ((x - t) ** 2).sum()
        >>> t = torch.tensor([1.0, 2.0])
        >>> stationarity(f, t.clone(), t, kind="minimum").ok
        True
    """
    condition = Condition.of(function, kind, symmetric)
    arguments = Arguments.of(args, None)
    flat = FlatCondition(condition, Unknown.of(x), arguments)
    tensors = [t.detach() for t in arguments.tensors]
    with torch.no_grad():
        point = flat.unknown.flatten(x, "x").detach()
        residual = flat(point, tensors)
    return assess(flat, point, tensors, residual, None, rtol, strong_convexity, always_bound=True)


def assess(
    flat: FlatCondition,
    x: Tensor,
    tensors: list[Tensor],
    residual: Tensor,
    start: Tensor | None,
    rtol: float,
    strong_convexity: float | None,
    *,
    always_bound: bool = False,
) -> Stationarity:
    """Judge a residual of plain tensors; the error is bounded where it is not small."""
    if strong_convexity is not None and not strong_convexity > 0:
        raise ArgumentError(f"strong_convexity is {strong_convexity}; it must be positive")
    for what, vector in (("solution", x), ("condition at the solution", residual)):
        finite = torch.isfinite(vector)
        if not bool(finite.all()):
            raise NonFiniteError(
                f"{int((~finite).sum())} of {vector.numel()} entries of the {what} are NaN or "
                "infinite: the solver diverged, or the arguments hold such numbers (the mean of an "
                "empty batch is one)"
            )
    size = torch.linalg.vector_norm(residual).item()
    if size == 0 and not always_bound:
        return Stationarity(0.0, 0.0, 0.0, "the residual is zero", True)
    A = ConditionJacobian(flat, x, tensors)
    scale = 0.0
    with torch.no_grad():
        least = torch.finfo(x.dtype).eps ** 0.5
        sized = torch.where(x.abs() < least, least, x)  # a solution may be zero
        if flat.condition.kind == "fixed_point":
            scale = torch.linalg.vector_norm(sized).item()
        elif start is not None:
            scale = torch.linalg.vector_norm(flat(start, tensors)).item()
            scale = scale if math.isfinite(scale) else 0.0
        if not size <= rtol * scale:
            scale = max(scale, torch.linalg.vector_norm(A @ sized).item())
        relative = 0.0 if size == 0 else (size / scale if scale > 0 else math.inf)
        ok = relative <= rtol
        if ok and not always_bound:
            return Stationarity(size, relative, math.nan, "not needed", True)
        sigma, bound = _smallest(A, strong_convexity)
    return Stationarity(size, relative, size / sigma if sigma > 0 else math.nan, bound, ok)


def _smallest(A: ConditionJacobian, strong_convexity: float | None) -> tuple[float, str]:
    """A lower bound or estimate of the smallest singular value, and its source."""
    if strong_convexity is not None:
        return strong_convexity, f"strong convexity {strong_convexity:.3g}"
    try:
        if A.shape[0] <= _DENSE:
            values = torch.linalg.svdvals(A.to_dense().double())
            sigma = values[-1].item()
            if sigma <= values[0].item() * A.shape[0] * torch.finfo(A.dtype).eps:
                return 0.0, "the Jacobian is singular there"
            return sigma, f"smallest singular value {sigma:.3g}, to first order"
        if "hermitian" in A.tags:
            found = extreme_eigenvalues(A, 40)
            sigma = found.smallest - found.smallest_error
            if sigma > 0:
                return sigma, f"estimate {sigma:.3g} of the smallest eigenvalue, to first order"
            return 0.0, "the Jacobian may be indefinite there"
    except (WoodburyError, RuntimeError) as error:
        return 0.0, f"none could be computed: {error}"
    return 0.0, "give strong_convexity for one"
