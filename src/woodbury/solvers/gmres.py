"""GMRES, restarted, with a preconditioner on the right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.solvers.column import Column
from woodbury.solvers.columns import norms, take
from woodbury.solvers.hessenberg import Hessenberg
from woodbury.solvers.loop import Loop, column_of
from woodbury.solvers.preconditioned import KrylovState, Preconditioned
from woodbury.solvers.recipe import Outcome, Problem, Recipe
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["GMRES"]

# A cycle of steps that lowers the residual by less than this has not lowered it.
_PROGRESS = 1e-4
# A vector of which less than this is left is orthogonalised again: rounding is of the whole.
_AGAIN = 0.1
# Bases of more entries are multiplied one by one: they do not fit into the caches together.
_LARGE = 8192


@dataclass(frozen=True)
class GMRES(Preconditioned):
    r"""Generalised minimal residuals for any square operator, restarted every ``restart`` steps.

    Step $i$ of a cycle minimises $\|b - A x\|$ over $x_0 + M\mathcal{K}_i(AM, r_0)$, by Arnoldi's
    recurrence $A M V_i = V_{i+1} H_i$ (orthogonalised again where little is left) and a QR
    factorisation of $H_i$ that is extended by one rotation a step. The preconditioner stands on the
    right, so that the residual that is minimised is the true one; with ``flexible`` it may change
    from step to step.

    The columns of a block have each a Krylov space of their own, share each product, and leave the
    block as they converge. At the end of a cycle, and when a column claims to have converged, the
    true residual is computed. A cycle that does not lower it has the status ``stagnation``: the
    next one would do the same. Where the Krylov space cannot be extended, the solution lies in it,
    unless ``A`` is singular: status ``singular``.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps over all cycles; default ``10 n``.
        preconditioner: $M \approx A^{-1}$: an operator, or a recipe that prepares one. A gradient
            needs its adjoint.
        restart: steps in a cycle.
        flexible: allow a preconditioner that is another in each step, such as a recipe that is not
            a linear function of $b$ (``CG(rtol=0.1)``).

    Raises:
        ArgumentError: a tolerance or limit is negative or not a number, or ``restart`` is below 1.

    Cost: one product, and one with the preconditioner, per step, and one product (and one with the
    preconditioner, unless flexible) per cycle; $4 n i$ to $8 n i$ multiplications in step $i$ of a
    cycle. Memory of ``restart + 4`` vectors for each column, of ``2 restart + 4`` if flexible.

    Source: Saad and Schultz, "GMRES" (1986); Saad, "A flexible inner-outer preconditioned GMRES
    algorithm" (1993).

    Example:
        >>> import torch
        >>> from woodbury import GMRES, Dense, solve
        >>> A = Dense(torch.tensor([[2.0, 1.0], [-1.0, 2.0]]))
        >>> solution = solve(A, torch.tensor([3.0, 1.0]), GMRES())
        >>> torch.allclose(solution.value, torch.ones(2)), solution.steps
        (True, 2)
    """

    restart: int = 30
    flexible: bool = False

    hermitian_preconditioner: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart < 1:
            raise ArgumentError(f"restart is {self.restart}; it must be >= 1")

    def _approximate_inverse(self, A: LinearOperator, M: Recipe) -> tuple[LinearOperator, int]:
        if self.flexible and type(M)._apply is Recipe._apply:
            from woodbury.solvers.inverse import inverse

            inner = M.prepare(A)
            return inverse(A, M, on_failure="ignore", state=inner), inner.products
        return super()._approximate_inverse(A, M)

    def _run(self, problem: Problem, state: KrylovState) -> Outcome:
        limit = self.limit(problem.A)
        length = max(1, min(self.restart, problem.A.shape[0], limit))
        loop = _Loop(problem, state.preconditioner, problem.tolerances(self.rtol, self.atol))
        loop.cycle(length, flexible=self.flexible)
        return loop.run(limit)


class _Column(Column):
    """One right-hand side: whether its Krylov space has ended, and how the cycle began."""

    exhausted = singular = False
    begun = math.inf  # true residual at the start of the cycle

    def judge(self, true: float) -> None:
        """Take the true residual of a claim."""
        self.verify(true, math.inf if self.exhausted else abs(true - self.norm))
        if self.singular and self.status is SolveStatus.stagnation:
            self.status = SolveStatus.singular

    def close(self, true: float) -> None:
        """Take the true residual at the end of a cycle."""
        self.verify(true, math.inf)
        stalled = self.status in (SolveStatus.stagnation, SolveStatus.precision)
        reachable = self.tolerance >= 0.25 * self.level
        # Half the residual is asked of a claim that was false; of a whole cycle, anything.
        if stalled and reachable and true < (1 - _PROGRESS) * self.begun:
            self.status, self.restart, self.residual = None, True, None
            self.claimed = self.norm = true
            self.best = min(self.best, true)
        if math.isfinite(true):
            self.residual = true  # of the iterate, until the next step
        if self.singular and self.status is SolveStatus.stagnation:
            self.status = SolveStatus.singular


class _Loop(Loop[_Column]):
    """Arnoldi's vectors ``V``, one basis ``[length + 1, n]`` for each column of a block."""

    keeps_start: ClassVar[bool] = True

    def __init__(
        self, problem: Problem, M: LinearOperator | None, tolerances: Sequence[float]
    ) -> None:
        super().__init__(problem, M, tolerances, _Column)

    def cycle(self, length: int, *, flexible: bool) -> None:
        """Make room for cycles of so many steps."""
        lead = () if self.R.dim() == 1 else (len(self.columns),)
        n = self.R.shape[0]
        self.length, self.place = length, 0
        self.V = self.R.new_empty(*lead, length + 1, n)
        # What the solution is made of, where that is not M V.
        self.Z = self.R.new_empty(*lead, length, n) if flexible else None
        self.flexible = flexible and self.precondition is not None

    def turn(self) -> None:
        """The first vectors of a cycle, from the true residuals."""
        if self.place:
            return
        betas = [column.norm for column in self.columns]
        for column in self.columns:
            column.restart = column.exhausted = column.singular = False
            column.begun = column.norm
        if self.R.dim() == 1:
            torch.mul(self.R, 1 / betas[0], out=self.V[0])
        else:
            row = torch.tensor(betas, dtype=torch.float64).to(self.R.device)
            self.V[:, 0] = (self.R / row.to(self.R.dtype)).mT
        self.small = Hessenberg(self.length, betas, complex_=self.R.is_complex())

    def advance(self, *, look: bool) -> None:
        """One product, one more column of the Hessenberg matrices, one rotation of each."""
        i = self.place
        V = self.V[..., i, :]
        P = V if V.dim() == 1 else V.mT.contiguous()
        if self.precondition is not None:
            P = self.precondition(P)
            if self.flexible:
                assert self.Z is not None
                self.Z[..., i, :] = P if P.dim() == 1 else P.mT
        W = self.problem.product(P)
        if look or i == 0:
            for column, p, w in zip(
                self.columns, norms(self.space, P), norms(self.space, W), strict=True
            ):
                column.size = max(column.size, w / p if p > 0 else 0.0)
        W, H, rest = self.orthogonalise(W if W.dim() == 1 else W.mT, i + 1)
        now = self.small.extend(i, H, rest, eps=self.eps)
        self.place = i + 1
        claims, ended = [], False
        for j, column in enumerate(self.columns):
            column.advance(now[j])
            if column.status is not None:
                ended = True
                continue
            column.exhausted = bool(self.small.exhausted[j])
            column.singular = bool(self.small.singular[j])
            if column.norm <= column.target:
                claims.append(j)
        inverse = [1 / r if r > 0 else 0.0 for r in rest]
        if W.dim() == 1:
            torch.mul(W, inverse[0], out=self.V[i + 1])
        else:
            row = torch.tensor(inverse, dtype=torch.float64).to(W.device).to(W.dtype)
            torch.mul(W, row[:, None], out=self.V[:, i + 1])
        if claims:
            self.verify(claims)
        running = [column for column in self.columns if column.status is None]
        if self.place == self.length or any(c.restart or c.exhausted for c in running):
            self.end_cycle()
            ended = True
        if claims or ended:
            self.leave()

    def orthogonalise(self, W: Tensor, size: int) -> tuple[Tensor, Tensor, list[float]]:
        """``W`` without its parts along the first vectors of the basis, these parts, its norms."""
        W, H = self.project(W, size)
        rest = norms(self.space, W if W.dim() == 1 else W.mT)
        whole = torch.linalg.vector_norm(H, dim=-1)
        parts = [whole.item()] if whole.dim() == 0 else whole.tolist()
        if any(r < _AGAIN * h for r, h in zip(rest, parts, strict=True)):
            W, again = self.project(W, size)
            H = H + again
            rest = norms(self.space, W if W.dim() == 1 else W.mT)
        return W, H, rest

    def project(self, W: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """One pass of Gram and Schmidt."""
        V = self.V[..., :size, :]
        if W.dim() == 2 and size * V.shape[-1] > _LARGE:
            pairs = [self._project(v, w) for v, w in zip(V.unbind(), W.unbind(), strict=True)]
            return torch.stack([w for w, _ in pairs]), torch.stack([h for _, h in pairs])
        return self._project(V, W)

    def _project(self, V: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        basis, W = V.mT, W.unsqueeze(-1)
        H = self.space.gram(W, basis).mH  # the vector is conjugated, not the basis
        return (W - basis @ H).squeeze(-1), H.squeeze(-1)

    def update(self, columns: list[int], steps: int) -> Tensor:
        """What the cycle so far adds to the iterates of some columns."""
        Y = self.small.solve(steps, columns)
        coefficients = torch.from_numpy(Y).to(self.V.dtype).to(self.V.device)
        source = self.V if self.Z is None or not self.flexible else self.Z
        if source.dim() == 2:
            found = source[:steps].mT @ coefficients[0]
        else:
            basis = source[columns, :steps]
            found = (basis.mT @ coefficients.unsqueeze(-1)).squeeze(-1).mT.contiguous()
        if self.precondition is None or self.flexible:
            return found
        return self.precondition(found)

    def verify(self, claims: list[int]) -> None:
        """The true residuals of what the columns that claim to be done would return."""
        found = take(self.X, claims) if self.X.dim() == 2 else self.X
        found = found + self.update(claims, self.place)
        indices = [self.columns[j].index for j in claims]
        true = norms(self.space, self.problem.residual(found, indices))
        for place, (j, norm) in enumerate(zip(claims, true, strict=True)):
            column = self.columns[j]
            self.take_level(column, norms(self.space, column_of(found, place).contiguous())[0])
            column.judge(norm)
            if column.status is not None:
                column_of(self.X, j).copy_(column_of(found, place))

    def take_level(self, column: _Column, x: float) -> None:
        column.level = self.eps * (column.size * x + column.b_norm)

    def end_cycle(self) -> None:
        """Move to the iterates of the cycle, and take their true residuals."""
        self.place, place = 0, self.place
        running = [j for j, column in enumerate(self.columns) if column.status is None]
        if not running:
            return
        self.move(running, place)
        X = self.X if self.X.dim() == 1 else take(self.X, running)
        R = self.problem.residual(X, [self.columns[j].index for j in running])
        sizes, true = norms(self.space, X), norms(self.space, R)
        for place, j in enumerate(running):
            column = self.columns[j]
            self.take_level(column, sizes[place])
            column.close(true[place])
            column_of(self.R, j).copy_(column_of(R, place))

    def move(self, running: list[int], steps: int) -> None:
        """Add what the cycle found in so many steps to the iterates."""
        if not running or steps == 0:
            return
        found = self.update(running, steps)
        for place, j in enumerate(running):
            column_of(self.X, j).add_(column_of(found, place))

    def finish(self) -> None:
        """The iterates of a cycle that the limit of steps cut short."""
        self.move(list(range(len(self.columns))), self.place)

    def keep(self, columns: list[int]) -> None:
        """Drop the bases of the columns that have left."""
        if self.V.dim() == 3:
            index = torch.tensor(columns, device=self.V.device)
            self.V = self.V[index]
            if self.Z is not None:
                self.Z = self.Z[index]
        elif len(columns) < len(self.all_columns):  # pragma: no cover
            raise AssertionError
        self.small.keep(np.asarray(columns))
