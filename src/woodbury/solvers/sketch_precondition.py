"""Sketch-and-precondition least squares."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
from torch import Tensor

from woodbury.decompositions.sketches import SketchKind, random_sketch
from woodbury.decompositions.two_sided import default_rcond
from woodbury.errors import ArgumentError, NonFiniteError, StructureError
from woodbury.operators.base import LinearOperator
from woodbury.operators.sparse import Sparse
from woodbury.solvers.certified import normal_residuals
from woodbury.solvers.columns import norms, rounding_limit
from woodbury.solvers.lsmr import LSMR
from woodbury.solvers.preconditioned import Iterative
from woodbury.solvers.recipe import Outcome, Problem, State
from woodbury.solvers.solution import SolveStatus
from woodbury.solvers.whitening import Whitened, Whitener
from woodbury.spaces import Space

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SketchPrecondition", "SketchState"]

# Columns of A that are sketched at once: as many as fit into this.
_BLOCK_BYTES = 64 * 2**20
# Times the preconditioned iteration starts again from the residual that it left.
_STAGES = 3


@dataclass(frozen=True, eq=False)
class SketchState(State):
    r"""The sketch and its factor.

    Attributes:
        whitener: $N$, for which $A N$ (or $N^H A$, where ``A`` is wide) is nearly orthonormal.
        sketch: $S$; ``None`` where the sketch would be no shorter than ``A``.
        basis: the orthonormal factor of the sketch, in double precision.
        norm: the largest singular value of the sketch, about that of ``A``.
        condition: the ratio of its singular values that count, about the condition number of ``A``.
        wide: whether ``A`` has more columns than rows, so that its adjoint was sketched.
    """

    whitener: Whitener
    sketch: LinearOperator | None
    basis: Tensor
    norm: float
    condition: float
    wide: bool


@dataclass(frozen=True)
class SketchPrecondition(Iterative):
    r"""Least squares whose iterations do not depend on the condition number.

    A random sketch $S A = Q R$ of a few times ``n`` rows has nearly the singular values of ``A``,
    so that those of $A R^{-1}$ are within $1 \pm \sqrt{n/s}$: with ``s = 4 n`` the error falls by
    half or more in every step of LSMR on $\min_y \|b - A R^{-1} y\|$, whatever the condition number
    of ``A`` is. It starts from the solution of the sketched problem, $x_0 = R^{-1} Q^H S b$, whose
    residual is within a factor of about 1.3 of the least. When LSMR has converged the residual is
    computed anew and the iteration started again from it where it is not as small as was claimed;
    the start and the restarts are what makes the method backward stable.

    Where ``A`` is wide its adjoint is sketched, and the iteration is LSMR on
    $R^{-H} A x = R^{-H} b$, whose solution from ``x0 = 0`` is that of smallest norm. Where the
    sketch is singular its singular value decomposition $V \Sigma^{-1}$ takes the place of
    $R^{-1}$, and the solution of smallest norm is found, too.

    ``converged`` where the true $\|b - A x\|$ is within ``rtol`` $\|b\|$; ``least_squares`` where
    $\|(A R^{-1})^H r\|$ is within ``rtol`` $\|A R^{-1}\| \|r\|$. That is more than
    ``info["normal_residual"]`` $= \|A^H r\| / \|A\| \|r\|$ asks for: it bounds the relative
    distance of $\|r\|$ from the least one by about ``rtol``$^2$, at any condition number.
    ``info`` also holds ``whitened_residual``, that ratio; ``rank``; and ``condition``, an estimate
    of the condition number of ``A``.

    Args:
        rtol: tolerance of both tests.
        atol: also ``converged`` when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of the steps; default ``10 min(m, n)``.
        sketch: ``"sparse_sign"``, ``"gaussian"`` or ``"hadamard"``, see
            :func:`~woodbury.decompositions.random_sketch`.
        oversampling: rows of the sketch as a multiple of the shorter side of ``A``, above 1. Where
            they would not be fewer than those of ``A``, the matrix itself is factorised.
        nonzeros: in each column of the sparse sketch.
        rcond: singular values of the sketch up to ``rcond`` times the largest count as zero;
            default ``min(m, n)`` times the machine epsilon.
        seed: of the draw.

    Raises:
        ArgumentError: a tolerance or another argument makes no sense.
        StructureError: vectors have an inner product of their own, which a sketch does not keep.
        NonFiniteError: the sketch holds NaN or infinity.

    Cost: to prepare, the columns of ``A`` (its rows, where it is wide), in blocks of 64 MiB;
    they count as products, also where they are read off. Then $O(s n^2)$ multiplications and
    memory of two matrices ``[s, n]`` in double precision. A step is that of LSMR, and two
    triangular solves, $2 n^2$.

    Source: Rokhlin and Tygert (2008); Avron, Maymounkov and Toledo, "Blendenpik" (2010); Meng,
    Saunders and Mahoney, "LSRN" (2014) for rank-deficient and wide systems; Meier, Nakatsukasa,
    Townsend and Webb, "Are sketch-and-precondition least squares solvers numerically stable?"
    (2024), and Epperly, Meier and Nakatsukasa, "Fast randomized least-squares solvers can be just
    as accurate and stable as classical direct solvers" (2024) for start and restarts.

    Example:
        >>> import torch
        >>> from woodbury import Dense, SketchPrecondition, solve
        >>> generator = torch.Generator().manual_seed(0)
        >>> M = torch.randn(2000, 10, generator=generator, dtype=torch.float64)
        >>> A = Dense(M * torch.logspace(0, -10, 10))  # condition number 1e10
        >>> solution = solve(A, torch.ones(2000).double(), SketchPrecondition(rtol=1e-10))
        >>> solution.status.name, solution.steps < 40
        ('least_squares', True)
    """

    sketch: SketchKind = "sparse_sign"
    oversampling: float = 4.0
    nonzeros: int = 8
    rcond: float | None = None
    seed: int = 0

    rectangular: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sketch not in get_args(SketchKind):
            raise ArgumentError(
                f"sketch is {self.sketch!r}; it must be one of {get_args(SketchKind)}"
            )
        if not 1 < self.oversampling < math.inf:
            raise ArgumentError(f"oversampling is {self.oversampling}; it must be above 1")
        if self.nonzeros < 1:
            raise ArgumentError(f"nonzeros is {self.nonzeros}; it must be at least 1")
        if self.rcond is not None and not 0 <= self.rcond < 1:
            raise ArgumentError(f"rcond is {self.rcond}; it must be in [0, 1)")

    def limit(self, A: LinearOperator) -> int:
        """The number of steps after which to give up."""
        return 10 * min(A.shape) if self.max_steps is None else self.max_steps

    def check(self, A: LinearOperator) -> None:
        """Raise where a sketch would not keep lengths."""
        super().check(A)
        for space in (A.space, A.out_space):
            if type(space).inner is not Space.inner:
                raise StructureError(
                    f"{type(space).__name__} has an inner product of its own, which a sketch of "
                    "coordinates does not keep: use LSMR()"
                )

    def adjoint_state(self, A: LinearOperator, state: State) -> State:
        """The same factor: that of the longer side."""
        assert isinstance(state, SketchState)  # made by _prepare
        return replace(state, shape=A.H.shape, wide=not state.wide, products=0)

    def _prepare(self, A: LinearOperator) -> SketchState:
        wide = A.shape[1] > A.shape[0]
        B = A.H if wide else A
        m, n = B.shape
        rows = max(1, math.ceil(self.oversampling * n))
        S = None
        if rows < m:
            S = random_sketch(
                rows,
                m,
                self.sketch,
                nonzeros=self.nonzeros,
                dtype=A.dtype.to_real() if A.dtype.is_complex else _work(A.dtype),
                device=A.device,
                generator=torch.Generator(A.device).manual_seed(self.seed),
            )
        sketched = _sketched(S, B)
        if not bool(torch.isfinite(sketched).all()):
            raise NonFiniteError(f"the sketch of {type(A).__name__} holds NaN or infinity")
        Q, R = torch.linalg.qr(sketched)
        values = torch.linalg.svdvals(R)
        norm = values[0].item() if len(values) else 0.0
        rcond = default_rcond((n,), A.dtype) if self.rcond is None else self.rcond
        rank = int((values > rcond * norm).sum())
        triangular = rank == n
        if not triangular:
            U, s, Vh = torch.linalg.svd(R)
            Q, R = Q @ U[:, :rank], Vh.mH[:, :rank] / s[:rank]
        return SketchState.of(
            self,
            A,
            n,
            whitener=Whitener(R, triangular, _work(A.dtype), B.space),
            sketch=S,
            basis=Q,
            norm=norm,
            condition=norm / values[rank - 1].item() if rank else 1.0,
            wide=wide,
        )

    def _run(self, problem: Problem, state: SketchState) -> Outcome:
        return _Run(self, problem, state).run()


class _Run:
    """One solve: start, stages, verdict."""

    def __init__(self, recipe: SketchPrecondition, problem: Problem, state: SketchState) -> None:
        self.recipe, self.problem, self.state = recipe, problem, state
        self.rank = state.whitener.shape[1]
        self.allowed = problem.tolerances(recipe.rtol, recipe.atol)
        self.eps = torch.finfo(problem.A.dtype).eps
        self.whitened = [math.nan] * problem.width
        self.normal = [math.nan] * problem.width
        self.residuals = [math.nan] * problem.width

    def run(self) -> Outcome:
        problem, recipe = self.problem, self.recipe
        X, R = self.start()
        statuses = self.judge(X, R)
        steps, column_steps = 0, [0] * problem.width
        limit = recipe.limit(problem.A)
        for _ in range(_STAGES):
            if None not in statuses or steps >= limit:
                break
            before = list(self.whitened)
            Y, taken, each = self.stage(R, limit - steps)
            X = X + Y
            R = problem.residual(X)
            steps += taken
            column_steps = [a + b for a, b in zip(column_steps, each, strict=True)]
            statuses = self.judge(X, R)
            if not taken or not any(
                s is None and new < 0.5 * old
                for s, new, old in zip(statuses, self.whitened, before, strict=True)
            ):
                break
        rest = SolveStatus.max_steps if steps >= limit else SolveStatus.stagnation
        return Outcome(
            X,
            [rest if status is None else status for status in statuses],
            steps=steps,
            residuals=self.residuals,
            info={
                "column_steps": column_steps,
                "normal_residual": self.normal,
                "whitened_residual": self.whitened,
                "rank": self.rank,
                "condition": self.state.condition,
            },
        )

    def start(self) -> tuple[Tensor, Tensor]:
        """The first iterate, or the solution of the sketched problem where it is better."""
        problem, state = self.problem, self.state
        X, R = problem.start()
        found = norms(problem.A.out_space, R)
        done = all(r <= limit for r, limit in zip(found, self.allowed, strict=True))
        if state.wide or not self.rank or done:
            return X, R
        sketched = _apply(state.sketch, R)
        Y = state.basis.mH @ sketched.to(state.basis.dtype)
        trial = X + _apply(state.whitener, Y.to(X.dtype))
        trial_R = problem.residual(trial)
        pairs = (norms(problem.A.out_space, T) for T in (trial_R, R))
        better = [new < old for new, old in zip(*pairs, strict=True)]
        mask = torch.tensor(better, device=X.device)
        return torch.where(mask, trial, X), torch.where(mask, trial_R, R)

    def stage(self, R: Tensor, limit: int) -> tuple[Tensor, int, list[int]]:
        """The correction that LSMR finds for a residual, and its steps."""
        problem, recipe, N = self.problem, self.recipe, self.state.whitener
        whitened: LinearOperator
        if self.state.wide:
            whitened, right = Whitened(N, problem, left=True), _adjoint(N, R)
        else:
            whitened, right = Whitened(N, problem, left=False), R
        inner = Problem(whitened, right.contiguous(), scales=problem.scales)
        inner.progress, inner.history = problem.progress, problem.history
        if not self.state.wide:
            inner.b_norms = problem.b_norms  # so that tolerances are those of the system itself
        solver = LSMR(recipe.rtol, recipe.atol if not self.state.wide else 0.0, limit)
        outcome = solver._run(inner, solver._prepare(whitened))
        Y = outcome.value
        steps = outcome.info["column_steps"]
        return Y if self.state.wide else _apply(N, Y), outcome.steps, steps

    def judge(self, X: Tensor, R: Tensor) -> list[SolveStatus | None]:
        """What is proved of each column."""
        problem, N = self.problem, self.state.whitener
        A = problem.A
        G = problem.adjoint_product(R)
        self.residuals = norms(A.out_space, R)
        self.normal = normal_residuals(problem, R, G, self.state.norm)
        if self.state.wide:  # rows are whitened: N^H r is what has to vanish
            sizes = norms(N.space, _adjoint(N, R))
            scales = [max(size, 1e-300) for size in norms(N.space, _adjoint(N, problem.b))]
        else:
            sizes, scales = norms(N.space, _adjoint(N, G)), self.residuals
        self.whitened = [s / r if r > 0 else 0.0 for s, r in zip(sizes, scales, strict=True)]
        x_norms = norms(A.space, X)
        found: list[SolveStatus | None] = []
        for j, residual in enumerate(self.residuals):
            level = self.eps * (self.state.norm * x_norms[j] + problem.b_norms[j])
            if not (math.isfinite(residual) and math.isfinite(self.whitened[j])):
                found.append(SolveStatus.non_finite)
            elif residual <= self.allowed[j]:
                found.append(SolveStatus.converged)
            elif self.whitened[j] <= self.recipe.rtol and self.outside(j):
                found.append(SolveStatus.least_squares)
            elif residual <= rounding_limit(level, problem.b_norms[j], self.eps) or (
                not self.state.wide and self.whitened[j] * residual <= 8 * level
            ):
                found.append(SolveStatus.precision)
            else:
                found.append(None)
        return found

    def outside(self, j: int) -> bool:
        """Whether what is left is outside the range, where a wide operator's rows are whitened."""
        return not self.state.wide or self.normal[j] <= self.recipe.rtol


def _work(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else dtype


def _apply(operator: LinearOperator | None, X: Tensor) -> Tensor:
    """A product of a block or vector; a real operator acts on both parts of complex ones."""
    if operator is None:
        return X
    block = X.unsqueeze(1) if X.dim() == 1 else X
    return _product(operator, block).reshape(-1, *X.shape[1:])


def _adjoint(operator: LinearOperator, X: Tensor) -> Tensor:
    block = X.unsqueeze(1) if X.dim() == 1 else X
    return operator._rmatmat(block).reshape(-1, *X.shape[1:])


def _product(S: LinearOperator, block: Tensor) -> Tensor:
    if block.is_complex() and not S.dtype.is_complex:
        real, imaginary = (S._matmat(part.contiguous()) for part in (block.real, block.imag))
        return torch.complex(real, imaginary)
    return S._matmat(block)


def _sketched(S: LinearOperator | None, B: LinearOperator) -> Tensor:
    """``S B`` in double precision, by blocks of columns."""
    wide = torch.complex128 if B.dtype.is_complex else torch.float64
    if isinstance(S, Sparse) and isinstance(B, Sparse) and B.device.type == "cpu":
        found: Any = (S.to_scipy_sparse() @ B.to_scipy_sparse()).toarray()
        return torch.from_numpy(found).to(wide)
    m, n = B.shape
    chunk = max(1, _BLOCK_BYTES // max(1, m * B.dtype.itemsize))
    parts: Sequence[Tensor] = torch.arange(n, device=B.device).split(chunk)
    blocks = [_apply(S, B.columns(part).to(_work(B.dtype))).to(wide) for part in parts]
    return torch.cat(blocks, dim=1) if blocks else torch.zeros(m, 0, dtype=wide, device=B.device)
