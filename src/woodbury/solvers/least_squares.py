"""The least-squares problem as the bidiagonalisation meets it: damped, preconditioned, or both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from woodbury.operators.base import LinearOperator
from woodbury.solvers.columns import norms
from woodbury.solvers.preconditioned import KrylovState, Preconditioned
from woodbury.solvers.recipe import Problem, State
from woodbury.spaces import Space

__all__ = ["LeastSquares", "LeastSquaresState", "StackedSystem", "View"]

# Below this the sum of squares of a vector has lost digits to underflow.
_TINY = {
    dtype: math.sqrt(torch.finfo(dtype).tiny) / torch.finfo(dtype).eps
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128)
}


@dataclass(frozen=True, eq=False)
class LeastSquaresState(KrylovState):
    """The preconditioner, and on which side it goes.

    Attributes:
        left: whether it multiplies the residual instead of ``x``: so it is in the adjoint of a
            solve with a preconditioner on the right.
    """

    left: bool = False


@dataclass(frozen=True)
class LeastSquares(Preconditioned):
    """Base of the recipes that minimise ``||b - A x||^2 + damping^2 ||x||^2`` by bidiagonalisation.

    Their preconditioner ``M`` is ``[n, n]``: ``x = M y``, and the iteration sees ``A M``.
    """

    damping: float = 0.0

    rectangular: ClassVar[bool] = True
    hermitian_preconditioner: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping < math.inf:
            raise ArgumentError(f"damping is {self.damping}; it must be a number >= 0")

    def limit(self, A: LinearOperator) -> int:
        """The number of steps after which to give up: ``max_steps``, or 10 times the short side."""
        return 10 * min(A.shape) if self.max_steps is None else self.max_steps

    def adjoint_state(self, A: LinearOperator, state: State) -> State:
        """The adjoint of ``M (A M)^+`` is ``((A M)^H)^+ M^H``: the preconditioner changes sides."""
        assert isinstance(state, LeastSquaresState)  # made by _prepare
        M = state.preconditioner
        H = A.H
        return replace(
            state,
            shape=H.shape,
            preconditioner=None if M is None else M.H,
            left=M is not None and not state.left,
        )

    def _prepare(self, A: LinearOperator) -> LeastSquaresState:
        found = super()._prepare(A)
        return LeastSquaresState.of(self, A, found.products, preconditioner=found.preconditioner)

    def _check_preconditioner(self, M: LinearOperator, A: LinearOperator) -> None:
        n = A.shape[1]
        if M.shape != (n, n):
            raise ShapeError(
                f"the preconditioner has shape {M.shape}; for an operator {A.shape} it must be "
                f"{(n, n)}, since x = M y"
            )
        if M.dtype != A.dtype:
            raise DtypeError(f"the preconditioner is {M.dtype}, the operator {A.dtype}")
        if M.device != A.device:
            raise DeviceError(f"the preconditioner is on {M.device}, the operator on {A.device}")


class StackedSystem:
    r"""$K = \begin{pmatrix} A \\ \lambda I \end{pmatrix} M$, or the adjoint of such a one.

    A damped problem is the plain one with ``A`` stacked on a multiple of the identity, which holds
    whatever the preconditioner and the first iterate are. In the adjoint of a preconditioned
    problem (``left``) ``K`` is $M\,(A \;\; \lambda I)$, and the answer is the upper part of
    what is solved for. Vectors ``u`` of the range of ``K`` and ``v`` of its domain are stacked,
    too.
    """

    def __init__(self, problem: Problem, state: LeastSquaresState, damping: float) -> None:
        A = self.A = problem.A
        self.problem, self.damping, self.left = problem, damping, state.left
        self.M = state.preconditioner
        second = damping > 0
        self.right = self.M is not None and not self.left
        self.plain = self.M is None and not second
        self.u_parts: list[Space] = [A.out_space]
        self.v_parts: list[Space] = [A.space]
        if second:
            (self.v_parts if self.left else self.u_parts).append(
                A.out_space if self.left else A.space
            )
        self.norm = 0.0  # of A with its damping, from below

    def u_norms(self, U: Tensor) -> list[float]:
        """Norms of vectors of the range of ``K``."""
        return _stacked_norms(self.u_parts, U)

    def v_norms(self, V: Tensor) -> list[float]:
        """Norms of vectors of the domain of ``K``."""
        return _stacked_norms(self.v_parts, V)

    def precondition(self, V: Tensor) -> Tensor:
        """``M V``."""
        M = self.M
        return V if M is None else (M @ V.to(M.dtype)).to(V.dtype)

    def _adjoint_precondition(self, V: Tensor) -> Tensor:
        M = self.M
        return V if M is None else M.rmatmat(V.to(M.dtype)).to(V.dtype)

    def forward(self, V: Tensor) -> Tensor:
        """``K V``."""
        if self.plain:
            return self.problem.product(V)
        if self.left:
            n = self.A.shape[1]
            U = self.problem.product(V[:n])
            return self.precondition(U + self.damping * V[n:] if self.damping else U)
        P = self.precondition(V)
        U = self.problem.product(P)
        if self.damping:
            U = torch.cat([U, self.damping * P])
        if self.M is not None:
            self.see(self.u_norms(U), self.v_norms(P))
        return U

    def backward(self, U: Tensor) -> Tensor:
        """``K^H U``."""
        if self.plain:
            return self.problem.adjoint_product(U)
        if self.left:
            W = self._adjoint_precondition(U)
            V = self.problem.adjoint_product(W)
            self.see(_stacked_norms([self.A.space], V), self.u_norms(W))
            return torch.cat([V, self.damping * W]) if self.damping else V
        m = self.A.shape[0]
        V = self.problem.adjoint_product(U[:m])
        return self._adjoint_precondition(V + self.damping * U[m:] if self.damping else V)

    def see(self, images: Sequence[float], vectors: Sequence[float]) -> None:
        """Learn from the norms of vectors and of what ``A`` or its adjoint makes of them."""
        for image, vector in zip(images, vectors, strict=True):
            if vector > 0 and image / vector > self.norm:
                self.norm = image / vector

    def start(self) -> Tensor:
        """The first iterate, to be changed freely."""
        problem = self.problem
        n = sum(part.dim for part in self.v_parts)
        X = problem.b.new_zeros((n, *problem.b.shape[1:]))
        # A start would change which solution is the damped one where the answer is stacked.
        if problem.x0 is not None and len(self.v_parts) == 1:
            X.copy_(problem.x0)
        return X

    def look(self, X: Tensor, columns: Sequence[int] | None, *, first: bool = False) -> View:
        """The true quantities of iterates ``X`` of the columns listed."""
        problem, n = self.problem, self.A.shape[1]
        x = X[:n]
        x_norms = norms(self.A.space, x)
        if first and not any(x_norms):
            r = problem.b
        else:
            r = problem.residual(x, columns)
            if first:
                self.see(norms(self.A.out_space, problem.b - r), x_norms)
        residuals = norms(self.A.out_space, r)
        gradient = problem.adjoint_product(r)
        if self.left:
            U = self.precondition(r - self.damping * X[n:] if self.damping else r)
        else:
            U = torch.cat([r, -self.damping * x]) if self.damping else r
        self.see(norms(self.A.space, gradient), residuals)
        if self.damping:
            gradient = gradient - self.damping**2 * x
        V = self.backward(U) if self.left else self._adjoint_precondition(gradient)
        stacked = [math.hypot(r, self.damping * x) for r, x in zip(residuals, x_norms, strict=True)]
        return View(
            U=U,
            V=V,
            u_norms=self.u_norms(U),
            v_norms=self.v_norms(V),
            residuals=residuals,
            stacked=stacked,
            gradients=_stacked_norms([self.A.space], gradient),
            x_norms=x_norms,
        )


@dataclass(eq=False)
class View:
    """True quantities of some iterates, each list with one number a column.

    ``U`` is the residual of ``K`` and ``V`` is ``K^H U``; ``residuals`` are norms of ``b - A x``,
    ``stacked`` those with the damping, ``gradients`` norms of ``A^H (b - A x) - damping^2 x``.
    """

    U: Tensor
    V: Tensor
    u_norms: list[float]
    v_norms: list[float]
    residuals: list[float]
    stacked: list[float]
    gradients: list[float]
    x_norms: list[float]


def _stacked_norms(parts: Sequence[Space], X: Tensor) -> list[float]:
    """Norms of stacked columns, also where the squares of small entries would vanish."""
    if len(parts) == 1:
        found = norms(parts[0], X)
    else:
        found = [math.hypot(*pair) for pair in _split_norms(parts, X)]
    tiny = _TINY[X.dtype]
    for j, norm in enumerate(found):
        if norm < tiny:
            found[j] = _scaled_norm(parts, X if X.dim() == 1 else X[:, j])
    return found


def _split_norms(parts: Sequence[Space], X: Tensor) -> Iterable[tuple[float, float]]:
    split = parts[0].dim
    return zip(norms(parts[0], X[:split]), norms(parts[1], X[split:]), strict=True)


def _scaled_norm(parts: Sequence[Space], x: Tensor) -> float:
    largest = x.abs().amax().item() if x.numel() else 0.0
    if largest == 0:
        return 0.0
    x = x / largest
    inside = norms(parts[0], x) if len(parts) == 1 else next(iter(_split_norms(parts, x)))
    return math.hypot(*inside) * largest
