"""Conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.solvers.cg_column import CGColumn
from woodbury.solvers.columns import add_columns, dots, norms, take
from woodbury.solvers.energy import EnergyBounds
from woodbury.solvers.loop import Loop
from woodbury.solvers.preconditioned import KrylovState, Preconditioned
from woodbury.solvers.recipe import Outcome, Problem
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["CG"]


@dataclass(frozen=True)
class CG(Preconditioned):
    r"""Conjugate gradients for a hermitian positive definite operator.

    Step $i$ minimises the error $\|x_i - A^{-1}b\|_A$ over $x_0 + \mathcal{K}_i(MA, M r_0)$:
    $\alpha = \langle r, z\rangle / \langle p, Ap\rangle$, $x \mathrel{+}= \alpha p$,
    $r \mathrel{-}= \alpha A p$, $z = M r$, $\beta = \langle r, z\rangle_{new} / \langle r,
    z\rangle_{old}$, $p = z + \beta p$.

    The columns of a block share each product and leave the block as they converge. When the
    recurrence claims convergence the true residual is computed; where rounding has let the two
    drift apart the iteration goes on, or starts again from the iterate it has. It ends with the
    status ``precision`` where the residual is down to what rounding of ``A`` and ``x`` alone makes
    it, $\epsilon\,(\|A\|\|x\| + \|b\|)$, and the tolerance is out of reach. If it fails, the
    last iterate is returned: it is the best in the norm that the method minimises,
    $\|x - A^{-1}b\|_A$ (and lowers $\tfrac12 x^H A x - \Re\, b^H x$ from step to step even where
    ``A`` turns out indefinite), while its residual may be larger than one met before. After a
    breakdown, where that norm means nothing, it is the iterate with the smallest residual.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 n``.
        preconditioner: $M \approx A^{-1}$, hermitian positive definite: an operator, or a recipe
            that prepares one (``Nystrom(rank=20)``).
        error_bound: whether ``info["error_bound"]`` tells, for each column, how large $\|x -
            A^{-1}b\|_A$ is at most, as an :class:`~woodbury.solvers.ErrorBound`, and
            ``info["energy"]`` how it fell from step to step. It is a bound where a lower bound of
            the smallest eigenvalue of ``A`` is known: the number given here (in the unit of ``A``),
            or with ``True`` what the structure proves (a multiple of the identity beside
            semidefinite terms, diagonals, Gershgorin's circles). Elsewhere it is marked as an
            estimate, from half the smallest Ritz value.

    Raises:
        TagError: the operator or the preconditioner is not known to be hermitian. Whether they are
            positive definite is found out on the way, and is a status.
        ArgumentError: a tolerance or limit is negative or not a number.

    Cost: one product, and one with the preconditioner, per step; one more product to start from
    ``x0`` and one for the true residual. Memory of 5 vectors for one column; of 7 blocks for more.

    Source: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems"
    (1952); van der Vorst and Ye, "Residual replacement strategies" (2000) for the drift.

    Example:
        >>> import torch
        >>> from woodbury import CG, Diagonal, solve
        >>> A = Diagonal(torch.linspace(1.0, 10.0, 100), tags={"positive_definite"})
        >>> solution = solve(A, torch.ones(100), CG(rtol=1e-5), history=True)
        >>> solution.ok, bool(solution.residual <= 1e-5)
        (True, True)
        >>> len(solution.history) == solution.steps + 1
        True
    """

    error_bound: bool | float = field(default=False, repr=False)

    needs: ClassVar[tuple[str, ...]] = ("hermitian",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.error_bound is not True and not 0 <= self.error_bound < math.inf:
            raise ArgumentError(
                f"error_bound is {self.error_bound}; it must be True, False or a positive lower "
                "bound on the smallest eigenvalue"
            )

    def _run(self, problem: Problem, state: KrylovState) -> Outcome:
        loop = _Loop(problem, state.preconditioner, problem.tolerances(self.rtol, self.atol))
        if self.error_bound is False:
            return loop.run(self.limit(problem.A))
        for column in loop.columns:
            column.trace = []
        outcome = loop.run(self.limit(problem.A))
        given = None if self.error_bound is True else float(self.error_bound)
        bounds = EnergyBounds(problem, given, preconditioned=state.preconditioner is not None)
        outcome.info["error_bound"] = [bounds.of(column) for column in loop.all_columns]
        outcome.info["energy"] = bounds.histories
        return outcome


class _Loop(Loop[CGColumn]):
    """The block recurrences: tensors hold the running columns only."""

    blocks: ClassVar[tuple[str, ...]] = ("X", "R", "P")

    def __init__(
        self, problem: Problem, M: LinearOperator | None, tolerances: Sequence[float]
    ) -> None:
        super().__init__(problem, M, tolerances, CGColumn)
        self.P = self.X  # replaced by the first direction

    def turn(self) -> None:
        """New directions from the residuals."""
        if self.precondition is None:
            Z, rz = self.R, [column.norm**2 for column in self.columns]
        else:
            Z = self.precondition(self.R)
            rz = dots(self.space, self.R, Z)
        fresh = self.columns[0].restart and all(column.restart for column in self.columns)
        ended = False
        for j, column in enumerate(self.columns):
            ended = column.direct(rz[j]) or ended
        if fresh:
            self.P = Z.clone() if Z is self.R else Z
        else:
            betas = [column.beta for column in self.columns]
            self.P = add_columns(Z, betas, self.P, out=self.P)
        if ended:
            self.leave()

    def advance(self, *, look: bool) -> None:
        """One product, one step along each direction, and what is to be done about its result."""
        Q = self.problem.product(self.P)
        curvatures = dots(self.space, self.P, Q)
        lengths = [c.length(curvatures[j]) for j, c in enumerate(self.columns)]
        if 0.0 in lengths:
            self.note_curvature(curvatures)
            keep = self.leave()
            if not self.columns:
                return
            Q, lengths = take(Q, keep), [lengths[j] for j in keep]
        add_columns(self.R, [-length for length in lengths], Q, out=self.R)
        now = norms(self.space, self.R)
        rising, claims, ended = [], [], False
        for j, column in enumerate(self.columns):
            if column.advance(now[j]):
                rising.append(j)
            elif column.norm <= column.target:
                claims.append(j)
            if column.status is not None:
                ended, lengths[j] = True, 0.0  # the iterate stays what it was
        if rising:
            self.keep_best(rising)
        add_columns(self.X, lengths, self.P, out=self.X)
        if claims or look:
            self.measure(self.P, Q)
        if look:
            claims = [
                j
                for j, c in enumerate(self.columns)
                if c.status is None and c.norm <= max(c.target, c.level)
            ]
        if claims:
            self.verify(claims)
        if claims or ended:
            self.leave()

    def measure(self, P: Tensor, Q: Tensor) -> None:
        """Beside the products, the tridiagonal matrix of Lanczos knows the norm of ``A``."""
        if self.precondition is None:
            for column in self.columns:
                column.size = max(column.size, column.row, column.top)
        super().measure(P, Q)

    def prefers_best(self, column: CGColumn) -> bool:
        """After a breakdown the norm that the method minimises means nothing."""
        return column.status is SolveStatus.breakdown

    def note_curvature(self, curvatures: Sequence[float]) -> None:
        """Keep the first direction of negative curvature, normalised."""
        for j, column in enumerate(self.columns):
            if column.status is SolveStatus.negative_curvature and "column" not in self.info:
                p = self.P if self.P.dim() == 1 else self.P[:, j].contiguous()
                norm = norms(self.space, p)[0]
                self.info["column"] = column.index
                self.info["curvature"] = curvatures[j] / norm**2
                self.info["direction"] = p / norm
