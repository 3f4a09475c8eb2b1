"""The Nystrom approximation as a solver and as a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from woodbury.decompositions.nystrom import (
    NystromFactor,
    NystromMethod,
    check_options,
    nystrom,
)
from woodbury.errors import ArgumentError, RankError
from woodbury.operators.identity import multiple_of_identity
from woodbury.operators.low_rank_update import LowRankUpdate
from woodbury.operators.shifted_kronecker import ShiftedKronecker
from woodbury.operators.sum import Sum
from woodbury.solvers.recipe import Outcome, Problem, Recipe, State
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.decompositions.partial import PartialEigen
    from woodbury.operators.base import LinearOperator

__all__ = ["Nystrom", "NystromState"]


@dataclass(frozen=True, eq=False)
class NystromState(State):
    r"""The sketch.

    Attributes:
        factor: eigenpairs of the approximation of $H$, where $A = H + \mu I$.
        shift: $\mu$.
    """

    factor: NystromFactor
    shift: float


@dataclass(frozen=True)
class Nystrom(Recipe):
    r"""$x = (\hat H + (\mu + \rho) I)^{-1} b$ for $A = H + \mu I$, with $\hat H$ of low rank.

    A multiple of the identity in a sum (``H + mu * Identity(n)``) is recognised, and the sketch is
    of ``H`` alone. Elsewhere $\mu = 0$; sparse and block diagonal operators, for example, take the
    multiple in. ``damping`` $\rho$ is added on top, so that an operator given without damping has
    an inverse: the answer then approximates $(A + \rho I)^{-1}b$, while the residual stays that of
    $A x = b$ itself. To have the residual of the damped system, solve with
    ``A + rho * Identity(n)``. The status is ``completed``: how good it is, the residual says.

    As ``CG(preconditioner=Nystrom(rank))`` it stands for
    $(\lambda_r + \mu + \rho)\,U(\Lambda + \mu + \rho)^{-1}U^H + I - UU^H$, and the answer is that
    of CG: exact to its tolerance.

    The sketch is drawn with ``seed``, kept in the state, and may be used again for other right-hand
    sides, other shifts and nearby operators: ``solve(A, b, state=solution.state)``.

    Args:
        rank: columns of the sketch, 1 to ``n``; with a ``tolerance``, of the first one.
        damping: $\rho \ge 0$.
        method: ``"gaussian"`` (stabilised), ``"block_krylov"`` (a better approximation for
            ``depth`` times the products), both for positive semidefinite ``H``, or ``"column"``
            (columns drawn uniformly; ``H`` may be indefinite).
        seed: of the draw.
        chunk: columns in one product; by default as many as fit into 256 MiB.
        depth: blocks of the Krylov space, for ``"block_krylov"``.
        tolerance: double the rank until $\|H - \hat H\|$ is estimated to be within it: absolute,
            in the unit of ``H``. As a preconditioner, a few times $\mu + \rho$ are enough.
        max_rank: where the doubling ends, by default at ``n``. The error reached is in
            ``info["error"]`` and ``state.factor.error``, also where it is above the tolerance.
        memory: bytes that the blocks may take at the peak; the doubling ends there, too.

    Raises:
        RankError: ``rank`` is not between 1 and ``n``, or ``max_rank`` is below it.
        SingularError: there is no damping, and the rank of the approximation is below ``n``.
        NotPositiveDefiniteError: the Gaussian method met negative curvature.
        TagError: the operator is not tagged hermitian.
        BudgetError: ``memory`` does not hold the blocks of the rank.
        ArgumentError: ``damping`` or ``tolerance`` is negative, or another argument makes no sense.

    Cost: ``rank`` products (times ``depth``) and $O(n r^2)$ multiplications to prepare, memory of
    one block ``[n, rank]`` (three at the peak, times ``depth``); with a tolerance ten products more
    for each rank tried, and five blocks. Then $4 n r$ multiplications and one product a column.

    Source: Hataya and Yamada, "Nystrom method for accurate and scalable implicit differentiation"
    (2023), equation 6; Frangella, Tropp and Udell, "Randomized Nystrom preconditioning" (2023),
    equation 1.3 and algorithm E.2; for the block Krylov form Tropp and Webber, "Randomized
    algorithms for low-rank matrix approximation" (2023).

    Example:
        >>> import torch
        >>> from woodbury import Identity, LowRank, Nystrom, solve
        >>> H = LowRank(torch.tensor([[1.0], [2.0], [2.0]]))
        >>> solve(H + 0.5 * Identity(3), torch.ones(3), Nystrom(rank=1)).residual < 1e-5
        tensor(True)
    """

    rank: int
    damping: float = 0.0
    method: NystromMethod = "gaussian"
    seed: int = 0
    chunk: int | None = None
    depth: int = 2
    tolerance: float | None = None
    max_rank: int | None = None
    memory: int | None = None

    needs: ClassVar[tuple[str, ...]] = ("hermitian",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RankError(f"rank is {self.rank}; it must be 1 to the size of the operator")
        if not self.damping >= 0:
            raise ArgumentError(f"damping is {self.damping}; it must be >= 0")
        check_options(
            self.rank,
            self.method,
            self.depth,
            self.tolerance,
            self.max_rank,
            self.memory,
            self.chunk,
        )

    def _prepare(self, A: LinearOperator) -> NystromState:
        H, shift = split_shift(A)
        generator = torch.Generator(A.device).manual_seed(self.seed)
        factor = nystrom(
            H,
            self.rank,
            method=self.method,
            depth=self.depth,
            tolerance=self.tolerance,
            max_rank=self.max_rank,
            memory=self.memory,
            chunk=self.chunk,
            generator=generator,
        )
        return NystromState.of(self, A, factor.products, factor=factor, shift=shift)

    def as_preconditioner(self, A: LinearOperator, state: State) -> PartialEigen:
        """The approximate inverse, scaled to be the identity where nothing is known."""
        assert isinstance(state, NystromState)  # made by _prepare
        return state.factor.preconditioner(_shift(A, state) + self.damping)

    def _apply(self, A: LinearOperator, state: NystromState, B: Tensor) -> Tensor:
        inverse = state.factor.inverse(_shift(A, state) + self.damping)
        return inverse @ B

    def _run(self, problem: Problem, state: NystromState) -> Outcome:
        X, R = problem.start()
        X = X + self._apply(problem.A, state, R)
        info = {"rank": state.factor.basis.shape[1], "error": state.factor.error}
        return Outcome(X, [SolveStatus.completed] * problem.width, info=info)


def _shift(A: LinearOperator, state: NystromState) -> float:
    """The shift of the operator at hand, which may differ from that of the one prepared for."""
    return split_shift(A)[1]


def split_shift(A: LinearOperator) -> tuple[LinearOperator, float]:
    r"""$H$ and $\mu$ where ``A`` was made as $H + \mu I$ and shows it; otherwise ``A`` and 0."""
    if isinstance(A, LowRankUpdate):
        shift = _real_multiple(A.base)
        return (A, 0.0) if shift is None else (A.low_rank, shift)
    if isinstance(A, ShiftedKronecker):
        shift = _real(A.shift)
        return (A, 0.0) if shift is None else (A.kronecker, shift)
    if not isinstance(A, Sum):
        return A, 0.0
    shifts = [_real_multiple(term) for term in A.terms]
    rest = [term for term, shift in zip(A.terms, shifts, strict=True) if shift is None]
    if not rest or len(rest) == len(A.terms):
        return A, 0.0
    H = rest[0] if len(rest) == 1 else Sum(rest)
    return H, sum(shift for shift in shifts if shift is not None)


def _real_multiple(operator: LinearOperator) -> float | None:
    """``c`` where the operator is ``c * I`` with a real ``c``."""
    factor = multiple_of_identity(operator)
    return None if factor is None else _real(factor)


def _real(factor: complex | Tensor) -> float | None:
    value = complex(factor)
    return None if value.imag else value.real
