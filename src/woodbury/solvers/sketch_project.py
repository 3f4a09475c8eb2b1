"""Sketch-and-project: one recipe for Kaczmarz, coordinate descent and their Gaussian kin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from woodbury.errors import ArgumentError, StructureError, TagError
from woodbury.solvers.preconditioned import Iterative
from woodbury.solvers.projections import (
    SWEEPS,
    Metric,
    Projections,
    ProjectState,
    Sampling,
    prepared,
)
from woodbury.spaces import Space

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator
    from woodbury.solvers.recipe import Outcome, Problem, State

__all__ = ["SketchProject"]


@dataclass(frozen=True)
class SketchProject(Iterative):
    r"""Random sketches of the equations, each solved by the nearest point.

    $x \leftarrow \arg\min \|x' - x\|_B$ subject to $S^H A x' = S^H b$, that is
    $x \leftarrow x + B^{-1} A^H S\,(S^H A B^{-1} A^H S)^{+} S^H (b - A x)$, with a new random $S$
    of ``block`` columns at each step. What the metric $B$ and the sketch are gives the method:

    | metric | ``"coordinate"`` | ``"gaussian"`` |
    | --- | --- | --- |
    | ``"identity"``, $B = I$ | randomised (block) Kaczmarz | Gaussian Kaczmarz |
    | ``"energy"``, $B = A \succ 0$ | randomised coordinate descent | Gaussian pursuit |
    | ``"normal"``, $B = A^H A$, $S = A S'$ | coordinate descent for least squares | Gaussian |

    In the mean $\|x - x_*\|_B^2$ falls by $1 - \lambda_{min}(B^{-1/2} E[Z] B^{-1/2})$ a step, where
    $Z = A^H S (S^H A B^{-1} A^H S)^+ S^H A$: for Kaczmarz with rows drawn by their norms by
    $1 - \sigma_{min}^2 / \|A\|_F^2$, for coordinate descent by $1 - \lambda_{min} / \mathrm{tr} A$.

    The true residual is computed once a sweep (as many steps as there are rows, by ``block``). The
    normal metric minimises $\|b - A x\|$ and ends with ``least_squares`` where $\|A^H r\|$ is
    within ``rtol`` $\|A\| \|r\|$. The others need a system that has a solution; where the
    residual has stopped falling LSMR is asked once whether there is one, and where it proves that
    there is none the status is ``inconsistent`` and the value the least-squares solution. From
    ``x0 = 0`` and with the metric ``"identity"`` the limit is the solution of smallest norm; with
    the others it depends on the draws where it is not unique.

    Args:
        rtol: converged when the true $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when it is within ``atol``.
        max_steps: limit of the steps; default 200 sweeps.
        metric: ``"identity"``, ``"energy"`` (needs a positive semidefinite ``A``) or ``"normal"``.
        sketch: ``"coordinate"`` or ``"gaussian"``, which only multiplies: one product with
            ``block`` columns a step.
        block: columns of $S$; coordinates are different ones.
        sampling: how coordinates are drawn: by ``"norms"``, with probabilities proportional to the
            squared norms of rows or columns, or to the diagonal (energy), or ``"uniform"``.
        seed: of the draws; every solve draws the same.

    Raises:
        ArgumentError: an argument makes no sense.
        TagError: the energy metric needs a positive semidefinite operator.
        StructureError: vectors have an inner product of their own.
        NonFiniteError: the matrix holds NaN or infinity.

    Cost: the coordinate sketches form the matrix, ``n`` products (a sparse one stays sparse), and a
    step then takes $O(n k)$ operations for a block of ``k``; one product a sweep, two for the
    normal metric. Steps are cheap and many: to high accuracy CG or LSMR need fewer operations,
    unless the condition number is small or there are far more rows than needed.

    Source: Gower and Richtarik, "Randomized iterative methods for linear systems" (2015), sections
    2 and 3; Strohmer and Vershynin (2009); Leventhal and Lewis (2010); Hong et al.,
    "Constrained optimization via exact augmented Lagrangian and randomized iterative sketching"
    (2023) for its use in Newton's method.

    Example:
        >>> import torch
        >>> from woodbury import Dense, SketchProject, solve
        >>> M = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> A = Dense(M, tags={"positive_definite"})
        >>> solution = solve(A, torch.tensor([3.0, 4.0]).double(), SketchProject(metric="energy"))
        >>> solution.value.round(decimals=4), solution.status.name
        (tensor([1., 1.], dtype=torch.float64), 'converged')
    """

    metric: Metric = "identity"
    sketch: Literal["coordinate", "gaussian"] = "coordinate"
    block: int = 1
    sampling: Sampling = "norms"
    seed: int = 0

    rectangular: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (
            ("metric", self.metric, get_args(Metric)),
            ("sketch", self.sketch, ("coordinate", "gaussian")),
            ("sampling", self.sampling, get_args(Sampling)),
        ):
            if value not in known:
                raise ArgumentError(f"{name} is {value!r}; it must be one of {known}")
        if self.block < 1:
            raise ArgumentError(f"block is {self.block}; it must be at least 1")

    def sweep(self, A: LinearOperator, metric: Metric | None = None) -> int:
        """Steps from one look at the residual to the next."""
        size = A.shape[1] if (metric or self.metric) == "normal" else A.shape[0]
        return max(1, -(-size // self.block))

    def limit(self, A: LinearOperator) -> int:
        """The number of steps after which to give up."""
        return SWEEPS * self.sweep(A) if self.max_steps is None else self.max_steps

    def check(self, A: LinearOperator) -> None:
        """Raise where the projections would not be those of the method."""
        super().check(A)
        name = type(self).__name__
        if self.metric == "energy" and "positive_semidefinite" not in A.tags:
            raise TagError(
                f"{name}(metric='energy') needs the tag 'positive_semidefinite', "
                f"{type(A).__name__} has {sorted(A.tags)}: use metric='identity' or 'normal'"
            )
        for space in (A.space, A.out_space):
            if type(space).inner is not Space.inner:
                raise StructureError(
                    f"{type(space).__name__} has an inner product of its own, and {name} projects "
                    "in the plain one: use CG() or LSMR()"
                )

    def adjoint_state(self, A: LinearOperator, state: State) -> State:
        """What the adjoint needs: prepared anew unless ``A`` is hermitian.

        The adjoint of the solution of smallest norm is that of least squares, and the other way
        about: so the metric changes.
        """
        if "hermitian" in A.tags:
            return state
        assert isinstance(state, ProjectState)  # made by _prepare
        return prepared(self, A.H, "identity" if state.metric == "normal" else "normal")

    def _prepare(self, A: LinearOperator) -> ProjectState:
        return prepared(self, A, self.metric)

    def _run(self, problem: Problem, state: ProjectState) -> Outcome:
        return Projections(self, problem, state).run()
