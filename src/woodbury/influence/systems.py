"""The matrix that is inverted: which one, with how much damping, and by which recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from woodbury.curvature import (
    EKFAC,
    KFAC,
    Fisher,
    GaussNewton,
    Hessian,
    Objective,
    RelativeDamping,
    diagonal_curvature,
)
from woodbury.curvature.damping import Damping
from woodbury.curvature.layer_matrix import LayerMatrix
from woodbury.errors import ArgumentError, NotPositiveDefiniteError, ShapeError
from woodbury.influence.eigenbasis import EigenBlock, VectorInverse
from woodbury.influence.kronecker import layer_inverses
from woodbury.operators import Dense, Diagonal, Identity, LinearOperator
from woodbury.solvers import (
    CG,
    LU,
    Cholesky,
    Eigh,
    Neumann,
    Nystrom,
    Recipe,
    Solution,
    error_bound,
    smallest_singular_value_bound,
    solve,
)
from woodbury.solvers.default import default_recipe
from woodbury.solvers.recipe import State
from woodbury.solvers.solution import SolveReport
from woodbury.spectra import XTrace, trace

__all__ = [
    "DENSE_LIMIT",
    "Matrix",
    "Solved",
    "System",
    "base_operator",
    "choose_recipe",
    "formed",
    "products_at_most",
]

_Name = Literal[
    "gauss_newton",
    "hessian",
    "fisher",
    "empirical_fisher",
    "kfac",
    "ekfac",
    "diagonal",
    "identity",
]
Matrix = _Name | LinearOperator | Callable[[Objective], LinearOperator]

# Up to this many parameters the curvature is formed and factorised where no recipe is given.
DENSE_LIMIT = 3000
# Of the mean eigenvalue, where no damping is given: Grosse et al. 2023, section 3.
_SHARE = 0.1


def choose_recipe(operator: LinearOperator) -> Recipe:
    """Cholesky to 3,000 parameters, conjugate gradients beyond, the structure's own before both."""
    if operator.has_inverse or "positive_semidefinite" not in operator.tags:
        return default_recipe(operator)
    return Cholesky() if operator.shape[0] <= DENSE_LIMIT else CG()


def formed(operator: LinearOperator, recipe: Recipe) -> LinearOperator:
    """The operator, as a matrix where the recipe forms it anyway.

    The residuals of many solves are then products with it instead of passes over the data.
    """
    if isinstance(recipe, Cholesky | Eigh):
        return Dense(operator.to_dense(), tags=operator.tags)
    return operator


def products_at_most(recipe: Recipe, n: int, queries: int) -> int | None:
    """Products with the matrix that a recipe may take, where it is known beforehand."""
    if isinstance(recipe, Cholesky | Eigh | LU):
        return n
    if isinstance(recipe, Neumann):
        return 10 * (recipe.step is None) + (recipe.terms + 1) * queries
    if isinstance(recipe, Nystrom):
        return None if recipe.tolerance is not None else recipe.rank + queries
    steps = getattr(recipe, "max_steps", None)
    return None if steps is None else (steps + 1) * queries


@dataclass(frozen=True, eq=False)
class Solved:
    r"""$X \approx A^{-1} B$ of a block, and how far each column may be off.

    Attributes:
        value: ``[n, k]``.
        residual: true relative residuals ``[k]``, float64.
        error: bounds (or estimates) of $\|x - A^{-1} b\|$, ``[k]``, float64.
        proven: whether they are bounds.
    """

    value: Tensor
    residual: Tensor
    error: Tensor
    proven: bool


class System:
    """A damped matrix with a recipe, prepared once and used for all blocks.

    Args:
        objective: whose curvature it is.
        matrix: see :class:`woodbury.Influence`.
        recipe: ``None`` chooses.
        damping: ``None`` chooses.
        on_failure: ``"raise"`` or ``"ignore"``.
    """

    def __init__(
        self,
        objective: Objective,
        matrix: Matrix,
        recipe: Recipe | None,
        damping: Damping | None,
        throw: bool,
        cache: int | None = None,
    ) -> None:
        base, self.words = base_operator(objective, matrix, cache)
        self.matrix = base  # without the damping
        n = objective.space.dim
        if base.shape != (n, n):
            raise ShapeError(f"the matrix is {base.shape}, the objective has {n} parameters")
        self.chosen = damping is None
        self.inverses: dict[str, EigenBlock | VectorInverse] | None = None
        operator, self.damping = _damped(base, damping)
        if isinstance(base, KFAC) and isinstance(operator, LayerMatrix) and recipe is None:
            self.inverses = layer_inverses(base, operator)
        self.recipe = choose_recipe(operator) if recipe is None else recipe
        self.operator = formed(operator, self.recipe)
        self.throw = throw
        self.report = SolveReport()
        self.smallest = _least_eigenvalue(objective, base, operator, self.damping)
        self.proven = self.smallest is not None
        self._state: State | None = None
        self._earlier: dict[str, Any] = {}

    def solve(self, B: Tensor) -> Solved:
        """Solve for the columns of ``B [n, k]``."""
        solution = solve(
            self.operator, B, self.recipe, state=self._state, throw=self.throw, report=self.report
        )
        self._state = self._state or solution.state
        return Solved(solution.value, solution.residual, self._errors(B, solution), self.proven)

    def restored(self, words: dict[str, Any]) -> None:
        """Take over what an earlier process found out before it was killed."""
        self.proven = bool(words["proven"])
        self._earlier = dict(words["certificate"])

    def certificate(self) -> dict[str, Any]:
        """Of all solves, those of an earlier process included."""
        found = self.report.certificate()
        if not self.report.calls:
            return self._earlier or found
        for key in ("calls", "failures", "products"):
            found[key] += self._earlier.get(key, 0)
        found["residual"] = max(found["residual"], self._earlier.get("residual", 0.0))
        found["ok"] = found["ok"] and self._earlier.get("ok", True)
        return found

    def _errors(self, B: Tensor, solution: Solution) -> Tensor:
        bounds = error_bound(self.operator, B, solution, smallest=self.smallest)
        if self.smallest is None and bounds[0].smallest > 0:
            self.smallest = bounds[0].smallest  # found once, by products
            self.proven = bounds[0].guarantee.name == "bound"
        return torch.tensor([bound.value for bound in bounds], dtype=torch.float64)


def base_operator(
    objective: Objective, matrix: Matrix, cache: int | None
) -> tuple[LinearOperator, str]:
    """The matrix without damping, and its name."""
    given: int | str = "auto" if cache is None else cache
    if isinstance(matrix, LinearOperator):
        return matrix, type(matrix).__name__
    if callable(matrix):
        operator = matrix(objective)
        if not isinstance(operator, LinearOperator):
            raise ArgumentError(
                f"matrix returned {type(operator).__name__}; it must return a LinearOperator"
            )
        return operator, type(operator).__name__
    if matrix == "gauss_newton":
        return GaussNewton(objective, given), "Gauss-Newton"
    if matrix == "hessian":
        return Hessian(objective, given), "Hessian"
    if matrix == "fisher":
        return Fisher(objective, cache=given), "Fisher"
    if matrix == "empirical_fisher":
        return Fisher(objective, "empirical", cache=given), "empirical Fisher"
    if matrix in ("kfac", "ekfac"):
        generator = torch.Generator().manual_seed(0)
        if matrix == "kfac":
            return KFAC(objective, generator=generator), "K-FAC"
        # What a fit keeps between its passes is not in the forecast of the memory.
        return EKFAC(objective, generator=generator, cache="off"), "EK-FAC"
    if matrix == "identity":
        n = objective.space.dim
        return Identity(
            n, dtype=objective.dtype, device=objective.device, space=objective.space
        ), "identity"
    if matrix == "diagonal":
        return _diagonal(objective), "diagonal of the empirical Fisher"
    raise ArgumentError(
        f"matrix is {matrix!r}; give one of {', '.join(map(repr, get_args(_Name)))}, a "
        "LinearOperator, or a function that makes one of the objective"
    )


def _diagonal(objective: Objective) -> Diagonal:
    """Definite by its tags where the regulariser makes it so.

    That every square happened to be positive says nothing of how small they are: without damping
    scores would be ruled by the parameters that hardly any example moves.
    """
    found = diagonal_curvature(objective, "empirical_fisher")
    if "positive_definite" not in found.tags or bool((torch.as_tensor(objective.l2) > 0).all()):
        return found
    return Diagonal(found.values, tags={"positive_semidefinite"}, space=objective.space)


def _damped(
    base: LinearOperator, damping: Damping | None
) -> tuple[LinearOperator, float | dict[str, float]]:
    """The matrix with damping, and how much that is."""
    if isinstance(base, KFAC):
        damped = base.damped(RelativeDamping(_SHARE) if damping is None else damping)
        return damped, damped.damping
    if damping is not None and not isinstance(damping, int | float):
        raise ArgumentError(
            f"damping is {damping!r}; one for each layer is for matrices 'kfac' and 'ekfac', give "
            "a number"
        )
    value = _default_damping(base) if damping is None else float(damping)
    if not value:
        return base, 0.0
    identity = Identity(base.shape[0], dtype=base.dtype, device=base.device, space=base.space)
    return base + value * identity, value


def _default_damping(base: LinearOperator) -> float:
    """None for what is definite or no curvature; else a share of the mean eigenvalue."""
    if "positive_definite" in base.tags or "positive_semidefinite" not in base.tags:
        return 0.0
    try:
        found = trace(base)
    except NotPositiveDefiniteError:  # by rounding: few examples make a matrix of low rank
        found = trace(base, XTrace())
    return _SHARE * float(found.value) / base.shape[0]


def _least_eigenvalue(
    objective: Objective,
    base: LinearOperator,
    operator: LinearOperator,
    damping: float | dict[str, float],
) -> float | None:
    """What is proven to be below the spectrum: by structure, or the damping and the regulariser."""
    floor = smallest_singular_value_bound(operator) or 0.0
    known = isinstance(base, GaussNewton | Fisher) and "positive_semidefinite" in base.tags
    if known and isinstance(damping, float):
        floor = max(
            floor, damping + float(torch.as_tensor(objective.l2, dtype=torch.float64).amin())
        )
    return floor or None
