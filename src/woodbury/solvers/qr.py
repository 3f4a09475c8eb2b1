"""Least squares by a complete orthogonal decomposition."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.solvers.columns import norms
from woodbury.solvers.direct import FactorState, Forming
from woodbury.solvers.recipe import Outcome, Problem, State
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["QR", "QRState"]


@dataclass(frozen=True, eq=False)
class QRState(FactorState):
    """``A = left core right^H`` in double precision, or ``A.H``.

    Attributes:
        left: orthonormal columns ``[m, r]``.
        core: triangular ``[r, r]``, upper unless ``lower``.
        lower: whether ``core`` is lower triangular.
        right: orthonormal columns ``[n, r]``, or ``None`` where they are a permutation.
        order: that permutation ``[n]``; empty otherwise.
        rank: ``r``; what was left out is zero to ``rcond``.
        left_out: norm of what was left out, relative to ``norm``.
        adjoint: whether the state is for the adjoint of what was factorised.
    """

    left: Tensor
    core: Tensor
    lower: bool
    right: Tensor | None
    order: Tensor
    rank: int
    left_out: float
    adjoint: bool = False


@dataclass(frozen=True)
class QR(Forming):
    r"""Least squares by $A P = Q R$ with column pivoting, for operators ``[m, n]`` in memory.

    The minimiser of $\|b - A x\|$ of smallest norm, $x = A^+ b$. Pivoting makes the diagonal of
    $R$ fall in modulus and shows the rank $r$; where it is less than ``n`` the first ``r`` rows of
    $R$ are factorised once more from the right, $R_{1:r} = S^H Z^H$, so that $A^+ = P Z S^{-H}
    Q_{1:r}^H$ (a complete orthogonal decomposition). Off the CPU, where there is no pivoting, it is
    the singular value decomposition instead.

    The status is ``converged`` where $\|b - A x\|$ is within the square root of the machine epsilon
    of $\|b\|$, and ``least_squares`` where it is not and $\|A^H r\|$ is within that of
    $\|A\| \|r\|$ (or within what ``rcond`` left out of $A$), of which
    ``info["normal_residual"]`` is the ratio, with the largest norm of a column of ``A`` for
    $\|A\|$. ``info["rank"]`` is the rank.

    Args:
        rcond: diagonal entries of $R$ (singular values) up to ``rcond`` times the largest count as
            zero; default ``max(m, n)`` times the machine epsilon of the operator's dtype.
        budget_bytes: memory that the preparation may take at the peak; default is what the system
            says is available.

    Raises:
        BudgetError: the matrix and its factors do not fit; nothing was allocated.
        NonFiniteError: the matrix holds NaN or infinity.
        ArgumentError: ``rcond`` is not between 0 and 1.

    Cost: ``n`` products to form the matrix, about $4 m n \min(m, n)$ multiplications, 32 $m n$
    bytes at the peak and 16 $m n$ kept at most; then one product with ``A`` and one with ``A.H``
    per column, or two.

    Source: Golub and Van Loan, "Matrix Computations" (4th ed.), 5.4.2, 5.4.7 and 5.5.

    Example:
        >>> import torch
        >>> from woodbury import Dense, QR, solve
        >>> A = Dense(torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]))
        >>> solution = solve(A, torch.tensor([1.0, 2.0, 3.0]), QR())
        >>> solution.value, solution.status.name, solution.info["rank"]
        (tensor([1., 1.]), 'least_squares', 1)
    """

    rcond: float | None = None

    rectangular: ClassVar[bool] = True
    peak: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rcond is not None and not 0 <= self.rcond < 1:
            raise ArgumentError(f"rcond is {self.rcond}; it must be in [0, 1)")

    def _instead(self, A: LinearOperator) -> str:
        return "use LSMR(), which only multiplies"

    def _prepare(self, A: LinearOperator) -> QRState:
        dense = self._form(A)
        rcond = max(A.shape) * torch.finfo(A.dtype).eps if self.rcond is None else self.rcond
        lengths = torch.linalg.vector_norm(dense, dim=0)
        norm = lengths.amax().item() if lengths.numel() and A.shape[0] else 0.0
        factor = _by_columns if dense.device.type == "cpu" else _by_singular_values
        left, core, lower, right, order, left_out = factor(dense, rcond)
        return QRState.of(
            self,
            A,
            A.shape[1],
            norm=norm,
            left=left,
            core=core,
            lower=lower,
            right=right,
            order=order,
            rank=core.shape[0],
            left_out=left_out / norm if norm > 0 else 0.0,
        )

    def adjoint_state(self, A: LinearOperator, state: State) -> State:
        """The same factors, to be used for ``A.H``."""
        assert isinstance(state, QRState)  # made by _prepare
        return replace(state, shape=A.H.shape, products=0, adjoint=not state.adjoint)

    def _apply(self, A: LinearOperator, state: QRState, B: Tensor) -> Tensor:
        block = (B.unsqueeze(1) if B.dim() == 1 else B).to(state.left.dtype)
        right, order = state.right, state.order
        if state.adjoint:
            inner = block[order] if right is None else right.mH @ block
            core = state.core.mH
            X = state.left @ torch.linalg.solve_triangular(core, inner, upper=state.lower)
        else:
            inner = torch.linalg.solve_triangular(
                state.core, state.left.mH @ block, upper=not state.lower
            )
            X = (
                torch.empty_like(inner).index_copy_(0, order, inner)
                if right is None
                else (right @ inner)
            )
        X = X.to(B.dtype)
        return X.squeeze(1) if B.dim() == 1 else X

    def _run(self, problem: Problem, state: Any) -> Outcome:
        A = problem.A
        X, R = problem.start()
        X = X + self._apply(A, state, R)
        R = problem.residual(X)
        G = problem.adjoint_product(R)
        if not all(self._judged(problem, state, X, R, G)):
            # What rounding left, once more by the same factors.
            trial = X + self._apply(A, state, R)
            trial_R = problem.residual(trial)
            trial_G = problem.adjoint_product(trial_R)
            sizes = (norms(A.space, T / (state.norm or 1.0)) for T in (trial_G, G))
            better = [new < old for new, old in zip(*sizes, strict=True)]
            mask = torch.tensor(better, device=X.device)
            X, R, G = (
                torch.where(mask, new, old) for new, old in ((trial, X), (trial_R, R), (trial_G, G))
            )
        found = norms(A.out_space, R)
        normal = self._normal(problem, state, found, G)
        return Outcome(
            X,
            self._statuses(problem, state, X, found, normal),
            residuals=found,
            info={"normal_residual": normal, "rank": state.rank},
        )

    def _judged(
        self, problem: Problem, state: QRState, X: Tensor, R: Tensor, G: Tensor
    ) -> list[bool]:
        """Whether each column is as good as rounding lets it be."""
        found = norms(problem.A.out_space, R)
        good = 16 * math.sqrt(max(problem.A.shape)) * torch.finfo(problem.A.dtype).eps
        normal = self._normal(problem, state, found, G)
        return [
            r <= good * b or n <= good
            for r, b, n in zip(found, problem.b_norms, normal, strict=True)
        ]

    def _normal(
        self, problem: Problem, state: QRState, found: list[float], G: Tensor
    ) -> list[float]:
        """``||A^H r|| / (||A|| ||r||)``."""
        if state.norm == 0:
            return [0.0] * len(found)
        # Divided first: the squares of a large or small operator are out of range.
        pairs = zip(norms(problem.A.space, G / state.norm), found, strict=True)
        return [g / r if r > 0 else 0.0 for g, r in pairs]

    def _statuses(
        self,
        problem: Problem,
        state: QRState,
        X: Tensor,
        found: list[float],
        normal: list[float],
    ) -> list[SolveStatus]:
        eps = torch.finfo(problem.A.dtype).eps
        room = 10 * eps * math.sqrt(max(problem.A.shape))
        statuses = []
        numbers = zip(found, problem.b_norms, normal, norms(problem.A.space, X), strict=True)
        for r, b, n, size in numbers:
            if not (math.isfinite(r) and math.isfinite(n)):
                statuses.append(SolveStatus.non_finite)
            elif r <= math.sqrt(eps) * b:
                statuses.append(SolveStatus.converged)
            elif n <= max(math.sqrt(eps), 2 * state.left_out):
                statuses.append(SolveStatus.least_squares)
            elif n * r <= room * (state.norm * size + b):
                statuses.append(SolveStatus.precision)
            else:
                statuses.append(SolveStatus.stagnation)
        return statuses


Factors = tuple[Tensor, Tensor, bool, Tensor | None, Tensor, float]


def _by_columns(dense: Tensor, rcond: float) -> Factors:
    """By LAPACK's QR factorisation with column pivoting."""
    from scipy.linalg import qr

    m, n = dense.shape
    if m == 0 or n == 0:
        return _nothing(dense)
    Q, R, order = qr(
        dense.numpy(), mode="economic", pivoting=True, overwrite_a=True, check_finite=False
    )
    left, upper = torch.from_numpy(Q), torch.from_numpy(R)
    places = torch.from_numpy(order.astype("int64"))
    diagonal = torch.diagonal(upper).abs()
    rank = int((diagonal > rcond * diagonal[0]).sum())
    if rank == 0:
        return _nothing(dense)
    left = left[:, :rank]
    left_out = torch.linalg.matrix_norm(upper[rank:, rank:]).item()
    if rank == n:
        return left, upper, False, None, places, 0.0
    # R_{1:r} P^H = S^H (P Z)^H, with the rows of R^H as columns of another QR factorisation.
    Z, S = torch.linalg.qr(upper[:rank].mH)
    right = torch.empty_like(Z).index_copy_(0, places, Z)
    return left, S.mH.resolve_conj().contiguous(), True, right, places[:0], left_out


def _by_singular_values(dense: Tensor, rcond: float) -> Factors:
    """By the singular value decomposition, whose core is diagonal."""
    if 0 in dense.shape:
        return _nothing(dense)
    U, values, Vh = torch.linalg.svd(dense, full_matrices=False)
    rank = int((values > rcond * values[0]).sum())
    if rank == 0:
        return _nothing(dense)
    core = torch.diag(values[:rank]).to(dense.dtype)
    right = Vh[:rank].mH.resolve_conj().contiguous()
    order = torch.empty(0, dtype=torch.int64, device=dense.device)
    left_out = values[rank].item() if rank < len(values) else 0.0
    return U[:, :rank], core, False, right, order, left_out


def _nothing(dense: Tensor) -> Factors:
    """A zero matrix."""
    m, n = dense.shape
    empty = torch.empty(0, dtype=torch.int64, device=dense.device)
    return dense.new_zeros(m, 0), dense.new_zeros(0, 0), False, dense.new_zeros(n, 0), empty, 0.0
