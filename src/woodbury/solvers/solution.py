"""What a solve returns: the value, what happened, and the certificate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from woodbury.solvers.recipe import Recipe, State

__all__ = ["Solution", "SolveReport", "SolveStatus"]


class SolveStatus(Enum):
    """How a solve ended, from best to worst; the value of a member says what to do next.

    Example:
        >>> from woodbury import SolveStatus
        >>> SolveStatus.max_steps.ok
        False
        >>> print(SolveStatus.max_steps.value)
        the step limit came before the tolerance: raise max_steps, loosen rtol ...
    """

    converged = "the true residual is within the tolerance"
    least_squares = (
        "the value minimises ||b - A x||, together with the damping if there is one, to the "
        "tolerance; b - A x does not vanish, and info['normal_residual'] certifies the minimum"
    )
    precision = (
        "the residual is above the tolerance, but as small as rounding in this dtype lets it be at "
        "this condition number: for a smaller one use float64 or add damping"
    )
    completed = (
        "the fixed work of this recipe is done; it aims at no tolerance, so read the residual "
        "before trusting the value"
    )
    max_steps = (
        "the step limit came before the tolerance: raise max_steps, loosen rtol or give a "
        "preconditioner, for example Nystrom(rank=20)"
    )
    stagnation = (
        "the true residual stopped falling above the tolerance: loosen rtol, use float64, add "
        "damping or give a better preconditioner"
    )
    inconsistent = (
        "b is not in the range of A, so A x = b has no solution: the value is the "
        "least-squares solution of smallest norm; add damping or accept it with throw=False"
    )
    diverged = (
        "the series diverges because I - step * A (with what preconditions it) has an eigenvalue "
        "beyond 1: lower the step or omega, raise the upper bound, add damping if A has negative "
        "eigenvalues, or use CG"
    )
    breakdown = (
        "the method has no next step: in CG a search direction has no curvature to working "
        "precision, so A is singular or indefinite, in BiCGSTAB a coefficient vanished: add "
        "damping, for example A + 1e-6 * Identity(n), or use MINRES(), GMRES() or Eigh()"
    )
    negative_curvature = (
        "A is not positive definite, info['direction'] shows where: add more damping than the "
        "curvature is negative, use a Gauss-Newton matrix instead of the Hessian, or Eigh()"
    )
    indefinite_preconditioner = (
        "the preconditioner is not positive definite: drop it or give one that is (damping "
        "makes it so)"
    )
    not_positive_definite = (
        "A is not positive definite, so it has no Cholesky factor: add damping or use Eigh()"
    )
    singular = "A is singular to working precision: add damping or use Eigh(), a pseudo-inverse"
    non_finite = (
        "a product with A or its preconditioner holds NaN or infinity: look for it in the data "
        "and parameters of the operator, or for overflow of its dtype"
    )

    @property
    def ok(self) -> bool:
        """Whether the recipe did what it promises."""
        return _ORDER[self] <= _ORDER[SolveStatus.completed]

    @staticmethod
    def worst(statuses: Iterable[SolveStatus]) -> SolveStatus:
        """The status furthest down the list; ``converged`` if there is none."""
        return max(statuses, key=_ORDER.__getitem__, default=SolveStatus.converged)


_ORDER = {status: position for position, status in enumerate(SolveStatus)}


@dataclass(frozen=True, eq=False, repr=False)
class Solution:
    r"""An answer to $A x = b$ with its certificate.

    Attributes:
        value: the best iterate found, ``[n]`` or ``[n, k]`` as ``b`` is ``[m]`` or ``[m, k]``.
        status: how the solve ended; the worst of the columns.
        residual: true relative residual $\|b - A x\| / \|b\|$ of ``value``, recomputed with a
            product of its own: a scalar, or ``[k]`` for a block; float64. It is 0 where b is 0.
        steps: steps taken; the most of any column.
        products: columns that ``A`` or ``A.H`` was multiplied by, residual and preparation
            included. Forming the matrix counts as ``n``, also where the structure made it cheaper.
        recipe: the recipe that was used.
        state: what was prepared, to be passed to the next solve with a similar operator.
        column_status: status of each column of a block; ``None`` for one vector.
        history: relative residual after each step, ``[steps + 1]`` or ``[steps + 1, k]``, where it
            was asked for; as the recurrence of the method has it.
        info: what the method found beside: for CG ``column_steps`` and, at negative curvature,
            ``direction``, ``curvature`` and ``column``; for Neumann and Richardson the ``step``;
            for Chebyshev the ``bounds``; for Deflation how many vectors are ``recycled``; for least
            squares ``normal_residual``, $\|A^H r\| / (\|A\| \|r\|)$ of each column with
            $r = b - A x$ recomputed.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal, CG, solve
        >>> A = Diagonal(torch.tensor([1.0, 4.0]), tags={"positive_definite"})
        >>> solution = solve(A, torch.tensor([1.0, 2.0]), CG())
        >>> solution.value
        tensor([1.0000, 0.5000])
        >>> solution.ok, solution.steps, solution.status.name
        (True, 2, 'converged')
    """

    value: Tensor
    status: SolveStatus
    residual: Tensor
    steps: int
    products: int
    recipe: Recipe
    state: State | None = None
    column_status: tuple[SolveStatus, ...] | None = None
    history: Tensor | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every column ended well."""
        return self.status.ok

    def certificate(self) -> dict[str, Any]:
        """What a reader needs to trust the value, in plain numbers and words (for reports)."""
        found: dict[str, Any] = {
            "ok": self.ok,
            "status": self.status.name,
            "meaning": self.status.value,
            "residual": _largest(self.residual),
            "steps": self.steps,
            "products": self.products,
            "recipe": repr(self.recipe),
        }
        if "error_bound" in self.info:
            worst = max(self.info["error_bound"], key=lambda error: error.value)
            found["error"] = worst.value
            found["error_norm"] = worst.norm
            found["error_guarantee"] = worst.guarantee.name
        if self.column_status is not None:
            found["columns"] = len(self.column_status)
            found["failed_columns"] = sum(not status.ok for status in self.column_status)
        return found

    def message(self) -> str:
        """One sentence: what happened, with the values, and what to do."""
        where = ""
        if self.column_status is not None and not self.ok:
            bad = [j for j, status in enumerate(self.column_status) if not status.ok]
            listing = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            where = f" in {len(bad)} of {len(self.column_status)} columns ({listing})"
        curvature = ""
        if self.status is SolveStatus.negative_curvature:
            curvature = f" (x^H A x / x^H x = {self.info['curvature']:.3g} was found)"
        return (
            f"{type(self.recipe).__name__}: {self.status.name}{where} after {self.steps} steps, "
            f"{self.products} products, relative residual {_largest(self.residual):.3g}: "
            f"{self.status.value}{curvature}"
        )

    def __repr__(self) -> str:
        size = ", ".join(map(str, self.value.shape))
        return (
            f"Solution({self.status.name}, residual={_largest(self.residual):.3g}, "
            f"steps={self.steps}, products={self.products}, value=[{size}] {self.value.dtype}, "
            f"recipe={self.recipe!r})"
        )


class SolveReport:
    """Receives every solve of an inverse operator or of a backward pass.

    Example:
        >>> import torch
        >>> from woodbury import CG, Dense, inverse
        >>> from woodbury.solvers import SolveReport
        >>> report = SolveReport()
        >>> A = Dense(torch.diag(torch.tensor([1.0, 2.0])), tags={"positive_definite"})
        >>> inverse(A, CG(), report=report) @ torch.ones(2)
        tensor([1.0000, 0.5000])
        >>> report.calls, report.ok, report.last.status.name
        (1, True, 'converged')
    """

    def __init__(self) -> None:
        self.calls = 0
        self.failures = 0
        self.products = 0
        self.residual = 0.0
        self.last: Solution | None = None

    def add(self, solution: Solution) -> None:
        """Take note of one solve; only the last solution is kept whole."""
        self.calls += 1
        self.failures += not solution.ok
        self.products += solution.products
        residual = _largest(solution.residual)
        if not residual <= self.residual and self.residual == self.residual:  # NaN is kept
            self.residual = residual
        self.last = solution

    @property
    def ok(self) -> bool:
        """Whether every solve so far ended well."""
        return self.failures == 0

    def certificate(self) -> dict[str, Any]:
        """The certificate of the last solve, with the totals and the worst residual of all."""
        found: dict[str, Any] = {} if self.last is None else self.last.certificate()
        found.update(
            ok=self.ok,
            calls=self.calls,
            failures=self.failures,
            products=self.products,
            residual=self.residual,
        )
        return found

    def __repr__(self) -> str:
        return (
            f"SolveReport(calls={self.calls}, failures={self.failures}, "
            f"products={self.products}, residual={self.residual:.3g})"
        )


def _largest(residual: Tensor) -> float:
    if residual.numel() == 0:
        return 0.0
    return float(torch.amax(residual))
