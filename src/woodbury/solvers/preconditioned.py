"""What iterative recipes share: tolerances, the limit of steps, and the preconditioner."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from woodbury.errors import ArgumentError, DeviceError, DtypeError, ShapeError, TagError
from woodbury.operators.base import LinearOperator
from woodbury.solvers.recipe import Recipe, State

__all__ = ["Iterative", "KrylovState", "Preconditioned", "preconditioning"]


@dataclass(frozen=True, eq=False)
class KrylovState(State):
    r"""The preconditioner, ready to be multiplied by.

    Attributes:
        preconditioner: $M \approx A^{-1}$ as an operator, or ``None``.
    """

    preconditioner: LinearOperator | None


@dataclass(frozen=True)
class Iterative(Recipe):
    """Base of the recipes that aim at a tolerance, with an operator $M$ in their state.

    For Krylov recipes $M$ is the preconditioner; a stationary method is one.
    """

    rtol: float = 1e-6
    atol: float = 0.0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name, size in (("rtol", self.rtol), ("atol", self.atol)):
            if not 0 <= size < math.inf:
                raise ArgumentError(f"{name} is {size}; it must be a number >= 0")
        if self.max_steps is not None and self.max_steps < 0:
            raise ArgumentError(f"max_steps is {self.max_steps}; it must be >= 0")

    def limit(self, A: LinearOperator) -> int:
        """The number of steps after which to give up: ``max_steps``, by default ``10 n``."""
        return 10 * A.shape[1] if self.max_steps is None else self.max_steps

    def adjoint_state(self, A: LinearOperator, state: State) -> State:
        """The preconditioner of ``A.H`` is ``M.H``: nothing is prepared anew."""
        if "hermitian" in A.tags:
            return state
        assert isinstance(state, KrylovState)  # made by _prepare
        M = state.preconditioner
        return replace(state, shape=A.H.shape, preconditioner=None if M is None else M.H)


@dataclass(frozen=True)
class Preconditioned(Iterative):
    """Base of the recipes that aim at a tolerance and take a preconditioner.

    A subclass adds ``_run``; where the method needs no hermitian preconditioner it says so by
    ``hermitian_preconditioner = False``.
    """

    preconditioner: LinearOperator | Recipe | None = None

    hermitian_preconditioner: ClassVar[bool] = True

    def _prepare(self, A: LinearOperator) -> KrylovState:
        M = self.preconditioner
        products = 0
        if isinstance(M, Recipe):
            M, products = self._approximate_inverse(A, M)
        if M is not None:
            self._check_preconditioner(M, A)
        return KrylovState.of(self, A, products, preconditioner=M)

    def _approximate_inverse(self, A: LinearOperator, M: Recipe) -> tuple[LinearOperator, int]:
        """What a recipe stands for as an operator, and the products that took."""
        inner = M.prepare(A)
        return M.as_preconditioner(A, inner), inner.products

    def _check_preconditioner(self, M: LinearOperator, A: LinearOperator) -> None:
        wanted = (A.shape[1], A.shape[0])
        if M.shape != wanted:
            raise ShapeError(f"the preconditioner has shape {M.shape}, the operator {A.shape}")
        if M.dtype != A.dtype:
            raise DtypeError(f"the preconditioner is {M.dtype}, the operator {A.dtype}")
        if M.device != A.device:
            raise DeviceError(f"the preconditioner is on {M.device}, the operator on {A.device}")
        if self.hermitian_preconditioner and "hermitian" not in M.tags:
            raise TagError(
                f"the preconditioner {type(M).__name__} has tags {sorted(M.tags)}; "
                f"{type(self).__name__} needs one that is hermitian positive definite: promise "
                "'positive_definite' where it is made"
            )


def preconditioning(M: LinearOperator | None) -> Callable[[Tensor], Tensor] | None:
    """Products with the preconditioner of vectors in the dtype of the work; ``None`` for none."""
    if M is None:
        return None

    def apply(R: Tensor) -> Tensor:
        if R.dtype != M.dtype:
            return (M @ R.to(M.dtype)).to(R.dtype)
        # What the operator would check of a vector holds here.
        return M._matvec(R) if R.dim() == 1 else M._matmat(R)

    return apply
