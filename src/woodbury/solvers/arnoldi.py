"""The inverse on a Krylov space of leading eigenvectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from woodbury.decompositions.arnoldi import KrylovFactor, arnoldi
from woodbury.errors import ArgumentError, RankError
from woodbury.solvers.nystrom import split_shift
from woodbury.solvers.recipe import Outcome, Problem, Recipe, State
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.decompositions.partial import PartialEigen
    from woodbury.operators.base import LinearOperator

__all__ = ["Arnoldi", "ArnoldiState"]


@dataclass(frozen=True, eq=False)
class ArnoldiState(State):
    r"""The Ritz pairs.

    Attributes:
        factor: of $H$, where $A = H + \mu I$.
        shift: $\mu$.
    """

    factor: KrylovFactor
    shift: float


@dataclass(frozen=True)
class Arnoldi(Recipe):
    r"""$x = U (\Theta + \mu + \rho)^{-1} U^H b$ for $A = H + \mu I$, with Ritz pairs of $H$.

    The ``rank`` Ritz pairs of largest magnitude of one Krylov space. Outside of them the answer is
    zero (``outside="zero"``, what the source does: directions of small curvature are left out), or
    $b / (\mu + \rho)$ (``"damped"``, the inverse of the approximation itself). A multiple of the
    identity in a sum is recognised and serves as $\mu$; ``damping`` $\rho$ is added on top, while
    the residual stays that of $A x = b$. The status is ``completed``: how good it is, the residual
    says. Indefinite operators are taken.

    As a preconditioner it is the deflation of what was found,
    $(\theta + \mu + \rho)\,U(\Theta + \mu + \rho)^{-1}U^H + I - UU^H$ with the smallest $\theta$
    that was kept, and all of $\Theta + \mu + \rho$ must be positive.

    Args:
        rank: pairs that are kept, 1 to ``n``.
        steps: dimension of the Krylov space; default ``2 * rank``, at most ``n``.
        damping: $\rho \ge 0$.
        outside: ``"damped"`` or ``"zero"``.
        seed: of the start.

    Raises:
        RankError: ``rank`` is not between 1 and ``n``.
        ArgumentError: ``steps``, ``damping`` or ``outside`` makes no sense.
        SingularError: an eigenvalue that is to be inverted is zero to working precision.
        TagError: the operator is not tagged hermitian.
        NotPositiveDefiniteError: as a preconditioner, an eigenvalue is not positive.

    Cost: ``steps`` products to prepare and memory of ``steps`` vectors, of which ``rank`` are kept;
    then $4 n r$ multiplications and one product a column.

    Source: Schioppa, Zablotskaia, Vilar and Sokolov, "Scaling up influence functions" (AAAI 2022).

    Example:
        >>> import torch
        >>> from woodbury import Arnoldi, Dense, solve
        >>> A = Dense(torch.diag(torch.tensor([4.0, 1.0, 0.0])).double(), tags={"symmetric"})
        >>> b = torch.tensor([9.0, 3.0, 0.0]).double()
        >>> solve(A, b, Arnoldi(rank=2, steps=3, damping=0.5)).value[:2]
        tensor([2.0000, 2.0000], dtype=torch.float64)
    """

    rank: int
    steps: int | None = None
    damping: float = 0.0
    outside: Literal["damped", "zero"] = "damped"
    seed: int = 0

    needs: ClassVar[tuple[str, ...]] = ("hermitian",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RankError(f"rank is {self.rank}; it must be 1 to the size of the operator")
        if self.steps is not None and self.steps < self.rank:
            raise ArgumentError(f"steps is {self.steps}; a rank of {self.rank} takes as many")
        if not self.damping >= 0:
            raise ArgumentError(f"damping is {self.damping}; it must be >= 0")
        if self.outside not in ("damped", "zero"):
            raise ArgumentError(f"outside is {self.outside!r}; use 'damped' or 'zero'")

    def _prepare(self, A: LinearOperator) -> ArnoldiState:
        H, shift = split_shift(A)
        generator = torch.Generator(A.device).manual_seed(self.seed)
        factor = arnoldi(H, self.rank, steps=self.steps, generator=generator)
        return ArnoldiState.of(self, A, factor.products, factor=factor, shift=shift)

    def as_preconditioner(self, A: LinearOperator, state: State) -> PartialEigen:
        """The deflation of the pairs, the identity elsewhere."""
        assert isinstance(state, ArnoldiState)  # made by _prepare
        return state.factor.preconditioner(split_shift(A)[1] + self.damping)

    def _apply(self, A: LinearOperator, state: ArnoldiState, B: Tensor) -> Tensor:
        damping = split_shift(A)[1] + self.damping
        inverse = state.factor.inverse(damping, outside=self.outside == "damped")
        return inverse @ B.to(inverse.dtype)

    def _run(self, problem: Problem, state: ArnoldiState) -> Outcome:
        X, R = problem.start()
        X = X + self._apply(problem.A, state, R).to(X.dtype)
        errors = state.factor.errors
        info = {
            "rank": state.factor.basis.shape[1],
            "ritz_error": errors.amax().item() if errors.numel() else 0.0,
        }
        return Outcome(X, [SolveStatus.completed] * problem.width, info=info)
