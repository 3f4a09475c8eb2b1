"""The randomised Kaczmarz method."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar

from woodbury.solvers.preconditioned import Iterative
from woodbury.solvers.projections import Projections, ProjectState, Sampling
from woodbury.solvers.sketch_project import SketchProject

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator
    from woodbury.solvers.recipe import Outcome, Problem, State

__all__ = ["Kaczmarz"]


@dataclass(frozen=True)
class Kaczmarz(Iterative):
    r"""Random rows of the system, each solved by the nearest point.

    $x \leftarrow x + \frac{b_i - \langle a_i, x\rangle}{\|a_i\|^2}\, a_i$ for a row $a_i$ drawn
    with probability $\|a_i\|^2 / \|A\|_F^2$, or $x \leftarrow x + A_\tau^+ (b_\tau - A_\tau x)$ for
    a block $\tau$ of rows. In the mean
    $E\|x_k - x_*\|^2 \le (1 - \sigma_{min}^2 / \|A\|_F^2)^k \|x_0 - x_*\|^2$ for single rows, where
    $\sigma_{min}$ is the smallest singular value that is not zero. It is
    ``SketchProject(metric="identity", sketch="coordinate")``, which says more.

    For systems that have a solution: from ``x0 = 0`` it converges to that of smallest norm. Where
    there is none the iterates wander about; when the residual has stopped falling LSMR is asked
    once, and where it proves that there is no solution the status is ``inconsistent`` and the value
    the least-squares solution.

    Args:
        rtol: converged when the true $\|b - A x\| \le$ ``rtol`` $\|b\|$; looked at once a sweep.
        atol: or when it is within ``atol``.
        max_steps: limit of the steps; default 200 sweeps.
        block: rows of a step.
        sampling: ``"norms"``, with probabilities proportional to the squared norms of rows, or
            ``"uniform"``.
        seed: of the draws; every solve draws the same.

    Raises:
        ArgumentError: an argument makes no sense.
        StructureError: vectors have an inner product of their own.
        NonFiniteError: the matrix holds NaN or infinity.

    Cost: the matrix is formed, ``n`` products (a sparse one stays sparse); a step takes $4 n k$
    operations for a block of ``k`` right-hand sides (and $n\,|\tau|^2$ for a block of rows), and a
    sweep one product.

    Source: Strohmer and Vershynin, "A randomized Kaczmarz algorithm with exponential convergence"
    (2009); Needell and Tropp, "Paved with good intentions: analysis of a randomized block Kaczmarz
    method" (2014).

    Example:
        >>> import torch
        >>> from woodbury import Dense, Kaczmarz, solve
        >>> M = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
        >>> solution = solve(Dense(M), torch.tensor([1.0, 2.0, 2.0]).double(), Kaczmarz())
        >>> solution.value.round(decimals=4), solution.status.name
        (tensor([1., 1.], dtype=torch.float64), 'converged')
        >>> solve(Dense(M), torch.ones(3).double(), Kaczmarz(), throw=False).status.name
        'inconsistent'
    """

    block: int = 1
    sampling: Sampling = "norms"
    seed: int = 0

    rectangular: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._projections()  # looks at the arguments

    def _projections(self) -> SketchProject:
        return SketchProject(**{field.name: getattr(self, field.name) for field in fields(self)})

    def limit(self, A: LinearOperator) -> int:
        """The number of steps after which to give up."""
        return self._projections().limit(A)

    def check(self, A: LinearOperator) -> None:
        """Raise where the projections would not be those of the method."""
        super().check(A)
        self._projections().check(A)

    def adjoint_state(self, A: LinearOperator, state: State) -> State:
        """What the adjoint needs, columns where this takes rows."""
        found = self._projections().adjoint_state(A, state)
        return replace(found, recipe=self)

    def _prepare(self, A: LinearOperator) -> ProjectState:
        return replace(self._projections()._prepare(A), recipe=self)

    def _run(self, problem: Problem, state: ProjectState) -> Outcome:
        return Projections(self._projections(), problem, state).run()
