"""The recipe that chooses a recipe, looks on, and changes its mind where it must."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from woodbury.errors import ArgumentError
from woodbury.solvers.attempts import Attempts, AutoState, Choice
from woodbury.solvers.cg import CG
from woodbury.solvers.cholesky import Cholesky
from woodbury.solvers.eigh import Eigh
from woodbury.solvers.gmres import GMRES
from woodbury.solvers.lsmr import LSMR
from woodbury.solvers.lu import LU
from woodbury.solvers.minres import MINRES
from woodbury.solvers.nystrom import Nystrom, split_shift
from woodbury.solvers.qr import QR
from woodbury.solvers.recipe import Outcome, Problem, Recipe, State
from woodbury.solvers.structural import Structural
from woodbury.solvers.watchdog import Watchdog

if TYPE_CHECKING:
    from torch import Tensor

    from woodbury.operators.base import LinearOperator

__all__ = ["Auto", "AutoState", "Choice"]


@dataclass(frozen=True)
class Auto(Recipe):
    r"""Chooses method, preconditioner and rank by tags, structure, size, and what the method finds.

    The plan is a list of recipes. First what the structure inverts; then the Krylov method that the
    tags allow, whose first steps are also the look at the spectrum: with its residuals it goes on
    as long as it is likely to be done before the matrix could be formed (``n`` products) and
    factorised, or before a Nystrom preconditioner would pay. Otherwise it is left for the next of
    the plan: Nystrom-preconditioned conjugate gradients where the operator shows a shift, then a
    factorisation where the memory allows it. What fails (negative curvature, a singular factor,
    stagnation) is left in the same way, and ``info["tried"]`` tells each recipe, its end and its
    products. The answer has the true residual, like that of any recipe; of an inconsistent or
    rectangular system it is the least-squares solution of smallest norm.

    The state holds the recipe that worked, with what it had prepared, for the next solve.

    Args:
        rtol: tolerance of the relative residual; of least squares, that of the normal equations.
        atol: absolute tolerance.
        products: limit of products over all recipes; the best iterate comes back with the status
            ``max_steps`` where it is met.
        memory: bytes that factorisations, sketches and Krylov bases may take.

    Raises:
        ArgumentError: a tolerance or the budget is negative or not a number.

    Cost: in products at most about twice that of the better of the Krylov method and the
    factorisation.

    Example:
        >>> import torch
        >>> from woodbury import Auto, Dense, FunctionOperator, solve
        >>> M = torch.diag(torch.linspace(1.0, 3.0, 100))
        >>> A = FunctionOperator(lambda X: M @ X, (100, 100), tags={"positive_definite"})
        >>> solution = solve(A, torch.ones(100), Auto(rtol=1e-5))
        >>> type(solution.state.chosen).__name__, solution.status.name
        ('CG', 'converged')
        >>> print(Auto().explain(Dense(M)))
        Dense [100, 100], no tags.
        1. Structural(): the structure has an inverse of its own, at no product.
        ...
    """

    rtol: float = 1e-6
    atol: float = 0.0
    products: int | None = None
    memory: int = 2 * 2**30

    rectangular: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, size in (("rtol", self.rtol), ("atol", self.atol)):
            if not 0 <= size < math.inf:
                raise ArgumentError(f"{name} is {size}; it must be a number >= 0")
        if self.products is not None and self.products < 0:
            raise ArgumentError(f"products is {self.products}; it must be >= 0")
        if self.memory < 0:
            raise ArgumentError(f"memory is {self.memory}; it must be >= 0")

    # ------------------------------------------------------------------ the plan

    def plan(self, A: LinearOperator, columns: int = 1) -> list[Choice]:
        """The recipes that would be tried, in their order; nothing is multiplied.

        Args:
            A: the operator.
            columns: right-hand sides: the matrix is formed once for all of them.
        """
        found = list(self._plan(A, columns))
        return [choice for choice in found if choice.steps is None or choice.steps >= _WORTH]

    def _plan(self, A: LinearOperator, columns: int) -> Iterator[Choice]:
        m, n = A.shape
        tolerances: dict[str, Any] = {"rtol": self.rtol, "atol": self.atol}
        fits = 4 * 8 * m * n <= self.memory
        # Left early enough that forming the matrix on top stays below twice its own products.
        steps = int(0.9 * n / columns) if fits else None
        # Krylov methods get faster on the way, so the rate of the first steps may be twice too low.
        hopeless = int(2 * n / columns) if fits else None
        patience = max(12, n // (8 * columns))
        formed = f"{n} products form the matrix, which fits into memory"
        if not A.is_square:
            yield Choice(
                LSMR(**tolerances),
                "least squares of any shape by products with A and A.H",
                steps,  # its rate does not show: the residual of least squares stays
            )
            if fits:
                yield Choice(QR(), f"LSMR is slow here; {formed}")
            yield Choice(LSMR(**tolerances), "nothing else fits into memory")
            return
        if A.has_inverse:
            yield Choice(Structural(), "the structure has an inverse of its own, at no product")
        if "positive_semidefinite" in A.tags:
            first = (steps, hopeless, patience)
            yield from self._definite(A, tolerances, first, formed, fits=fits)
        elif "hermitian" in A.tags:
            yield Choice(
                MINRES(**tolerances),
                "hermitian, perhaps indefinite or singular: residuals fall in three vectors",
                steps,
                hopeless,
                patience,
            )
            if fits:
                yield Choice(Eigh(), f"MINRES is slow here; {formed}, of any inertia and rank")
            yield Choice(LSMR(**tolerances), "the last resort: it needs nothing of A")
        else:
            width_of = max(20, self.memory // max(1, 4 * 16 * n))
            restart = int(min(n, width_of, 2000))
            yield Choice(
                GMRES(restart=restart, **tolerances),
                f"no symmetry is promised; {restart} vectors of the Krylov space fit into memory",
                steps,
                hopeless,
                patience,
            )
            if fits:
                yield Choice(LU(), f"GMRES is slow here; {formed}")
                yield Choice(QR(), "LU fails where the matrix is singular; QR finds least squares")
            yield Choice(LSMR(**tolerances), "the last resort: it needs nothing of A but A.H")

    def _definite(
        self,
        A: LinearOperator,
        tolerances: dict[str, Any],
        first: tuple[int | None, int | None, int],
        formed: str,
        *,
        fits: bool,
    ) -> Iterator[Choice]:
        n = A.shape[0]
        steps, hopeless, patience = first
        H, shift = split_shift(A)
        sketch = H is not A and shift > 0 and "positive_semidefinite" in H.tags
        if "positive_definite" in A.tags:
            yield Choice(
                CG(**tolerances),
                "positive definite by its tags: the shortest recurrence",
                steps,
                _NYSTROM_PAYS if sketch else hopeless,
                25 if sketch else patience,
            )
        else:
            yield Choice(
                MINRES(**tolerances),
                "positive semidefinite by its tags, so perhaps singular, which MINRES can do with",
                steps,
                hopeless,
                patience,
            )
        if sketch:
            rank = min(_FIRST_RANK, n)
            largest = max(rank, min(n // 3, self.memory // max(1, 4 * 8 * n)))
            nystrom = Nystrom(rank=rank, tolerance=5 * shift, max_rank=largest)
            yield Choice(
                CG(preconditioner=nystrom, **tolerances),
                f"CG is slow here, and A = H + {shift:.3g} I: a sketch takes what H has above "
                f"five times the shift, with a rank doubled up to {largest}",
                None if steps is None else 2 * steps,
                hopeless,
                patience,
            )
        if fits:
            if "positive_definite" in A.tags:
                yield Choice(Cholesky(), f"CG is slow here; {formed}")
            yield Choice(Eigh(), f"{formed}; of any inertia and rank")
        else:
            yield Choice(CG(**tolerances), "nothing else fits into memory")
            yield Choice(MINRES(**tolerances), "perhaps not positive definite after all")
            yield Choice(LSMR(**tolerances), "the last resort: it needs nothing of A")

    def explain(self, A: LinearOperator, b: Tensor | None = None) -> str:
        """What would be tried and why, in words; with ``b`` also what ten steps of it show.

        Cost: no products, or with ``b`` about ten for each recipe that starts with steps.
        """
        from woodbury.solvers.solve import solve

        tags = ", ".join(sorted(A.tags)) if A.tags else "no tags"
        lines = [f"{type(A).__name__} {list(A.shape)}, {tags}."]
        choices = self.plan(A)
        for number, choice in enumerate(choices, 1):
            limit = "" if choice.steps is None else f" (left after {choice.steps} products at most)"
            lines.append(f"{number}. {choice.recipe}: {choice.why}{limit}.")
        if b is not None and isinstance(choices[0].recipe, (CG, MINRES, GMRES, LSMR)):
            short = replace(choices[0].recipe, max_steps=10)
            with torch.no_grad():
                look = solve(A, b, short, throw=False, history=True)
            assert look.history is not None
            worst = look.history.reshape(len(look.history), -1).amax(1).tolist()
            dog = Watchdog(self.rtol, None, None)
            for step, relative in enumerate(worst):
                dog(step, relative)
            more = dog.remaining()
            guess = "is done" if worst[-1] <= self.rtol else f"would need about {more:.0f} more"
            lines.append(
                f"After {look.steps} steps the relative residual is {worst[-1]:.2g}: at this rate "
                f"the first one {guess}."
            )
        return "\n".join(lines)

    # ------------------------------------------------------------------- the work

    def adjoint_state(self, A: LinearOperator, state: State) -> State:
        """What worked for ``A`` is what is tried first for ``A.H``."""
        assert isinstance(state, AutoState)  # made by _prepare
        if state.chosen is None or state.inner is None:
            return state
        inner = state.chosen.adjoint_state(A, state.inner)
        return replace(state, shape=A.H.shape, inner=inner)

    def _prepare(self, A: LinearOperator) -> AutoState:
        return AutoState.of(self, A)

    def _run(self, problem: Problem, state: AutoState) -> Outcome:
        return Attempts(self, problem, state).run()


# Below this many further steps plain conjugate gradients are not worth a sketch.
_NYSTROM_PAYS = 150
_FIRST_RANK = 10
# Fewer steps than these would only delay what comes after.
_WORTH = 10
