"""Sparse quadratic programs: the same steps on sparse factors, gradients on the stored entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError, SingularError
from woodbury.implicit.interior_point import Problem, Solver, follow
from woodbury.operators import Sparse
from woodbury.operators.superlu import has_positive_pivots, superlu
from woodbury.solvers import SparseLU, solve

__all__ = ["sparse_program"]

_RIDGE = 1e-12  # makes the matrix quasi-definite, which has a factor with pivots on the diagonal
_PIVOT = 1e-3  # where such a pivot is smaller than that part of its column, another row is taken
_REFINEMENTS = 10


def sparse_program(
    P: Any,
    q: Tensor,
    A: Any,
    b: Tensor | None,
    G: Any,
    h: Tensor | None,
    *,
    tol: float,
    max_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """``z``, multipliers ``nu`` and ``lam``, the report ``[3]`` of the search, and its steps."""
    matrices, vectors = _checked(P, q, A, b, G, h)
    values = [t for pair in zip((M.values for M in matrices), vectors, strict=True) for t in pair]
    with torch.no_grad():
        problem = _SparseProblem(matrices, vectors)
        found, steps = follow(problem, tol, max_steps)
    n, p, m = (len(v) for v in vectors)
    z, nu, lam, report = found[0].split([n, p, m, 3])
    z, nu, lam = _Attached.apply(z, nu, lam, _Pattern(matrices), *(v.double() for v in values))
    return z, nu, lam, report, steps


def _checked(
    P: Any, q: Tensor, A: Any, b: Tensor | None, G: Any, h: Tensor | None
) -> tuple[list[Sparse], list[Tensor]]:
    """The matrices and vectors, empty ones for what is missing."""
    if not isinstance(q, Tensor) or not q.is_floating_point():
        kind = q.dtype if isinstance(q, Tensor) else type(q).__name__
        raise DtypeError(f"q is {kind}; a real floating-point tensor is needed")
    if q.dim() != 1 or not len(q):
        raise ShapeError(f"q has shape {tuple(q.shape)}; a sparse program is one problem, q [n]")
    n = len(q)
    empty = torch.sparse_coo_tensor(
        torch.zeros(2, 0, dtype=torch.long), q.new_zeros(0), (0, n), check_invariants=True
    )
    none = q.new_zeros(0)
    A, b = (Sparse(empty), none) if A is None or b is None else (A, b)
    G, h = (Sparse(empty), none) if G is None or h is None else (G, h)
    pairs = (("P", P, "q", q), ("A", A, "b", b), ("G", G, "h", h))
    for name, M, other, v in pairs:
        if not isinstance(M, Sparse):
            raise DtypeError(
                f"{name} is {type(M).__name__} where another matrix is Sparse; give all as Sparse"
            )
        if M.device.type != "cpu" or v.device.type != "cpu":
            raise ArgumentError(f"{name} is on {M.device}; sparse factorisations run on the CPU")
        if M.dtype != q.dtype or v.dtype != q.dtype:
            raise DtypeError(f"{name} is {M.dtype}, {other} {v.dtype} and q {q.dtype}; convert")
        if M.shape[1] != n or v.shape != (M.shape[0],):
            raise ShapeError(
                f"{name} has shape {M.shape} and {other} {tuple(v.shape)}, n is {n}: a sparse "
                "program is one problem"
            )
        for what, t in ((name, M.values), (other, v)):
            if not bool(torch.isfinite(t).all()):
                raise NonFiniteError(f"{what} has an entry that is NaN or infinite")
    _check_convex(P)
    return [P, A, G], [q, b, h]


def _check_convex(P: Sparse) -> None:
    import scipy.sparse

    matrix = P.to_scipy_sparse().astype("float64")
    n, size = P.shape[0], float(abs(matrix).max()) if P.nnz else 0.0
    if abs(matrix - matrix.T).max() > 1e-6 * size:
        raise ArgumentError("P is not symmetric; use (P + P.T) / 2, with both triangles stored")
    if size:
        shift = 1e3 * torch.finfo(P.dtype).eps * size * n
        factor = superlu(matrix + shift * scipy.sparse.eye_array(n), symmetric=True)
        if not has_positive_pivots(factor):
            raise ArgumentError("P has a negative eigenvalue: not convex; add a ridge")


class _SparseProblem(Problem):
    """One problem with sparse matrices; vectors are rows ``[1, n]`` as in a batch."""

    def __init__(self, matrices: list[Sparse], vectors: list[Tensor]) -> None:
        self.barrier = 0.0
        self.q, self.b, self.h = (v.detach().double().unsqueeze(0) for v in vectors)
        self.n, self.p, self.m = (len(v) for v in vectors)
        forms = [M.to_scipy_sparse().astype("float64").tocsr() for M in matrices]
        self.matrices = forms
        self.transposed = [M.T.tocsr() for M in forms]

    def P_times(self, z: Tensor) -> Tensor:
        return _product(self.matrices[0], z)

    def A_times(self, z: Tensor, *, transposed: bool = False) -> Tensor:
        return _product((self.transposed if transposed else self.matrices)[1], z)

    def G_times(self, z: Tensor, *, transposed: bool = False) -> Tensor:
        return _product((self.transposed if transposed else self.matrices)[2], z)

    def factorised(self, weights: Tensor) -> Solver:
        """The matrix itself is factorised, which keeps it sparse."""
        import scipy.sparse

        P, A, G = self.matrices
        _, At, Gt = self.transposed
        corner = scipy.sparse.diags_array(-1 / weights[0].numpy()) if self.m else None
        blocks = [[P, At, Gt], [A, None, None], [G, None, corner]]
        sizes = [self.n, self.p, self.m]
        used = [i for i, size in enumerate(sizes) if size]
        K = scipy.sparse.block_array([[blocks[i][j] for j in used] for i in used]).tocsr()
        sign = torch.cat([torch.ones(self.n), -torch.ones(self.p + self.m)]).double().numpy()
        try:
            factor = superlu(
                K + scipy.sparse.diags_array(_RIDGE * sign),
                symmetric=False,
                ordering="MMD_AT_PLUS_A",
                pivot_threshold=_PIVOT,
            )
        except SingularError:  # numbers left their range: the step is refused
            factor = None

        def solve(first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            right = torch.cat([first, second, third], -1)[0].numpy()
            if factor is None:
                nothing = (torch.full_like(t, torch.nan) for t in (first, second, third))
                return next(nothing), next(nothing), next(nothing)
            x = factor.solve(right)
            least = best = None
            for _ in range(_REFINEMENTS):
                rest = right - K @ x
                size = float(abs(rest).max())
                if least is None or size < least:
                    least, best = size, x
                else:
                    break
                x = x + factor.solve(rest)
            parts = torch.from_numpy(best).unsqueeze(0).split(sizes, -1)
            return parts[0], parts[1], parts[2]

        return solve


def _product(M: Any, z: Tensor) -> Tensor:
    return torch.from_numpy(M @ z[0].numpy()).unsqueeze(0)


class _Pattern:
    """Where the entries of the matrices go in the transposed Karush-Kuhn-Tucker matrix."""

    def __init__(self, matrices: list[Sparse]) -> None:
        P, A, G = ((M.rows, M.column_indices) for M in matrices)
        n, p, m = (M.shape[0] for M in matrices)
        self.P, self.A, self.G = P, A, G
        self.size = n + p + m
        diagonal = torch.arange(n + p, self.size)
        # Of K = [[P, A', G'], [A, 0, 0], [lam G, 0, Gz - h]]: rows and columns of each part.
        rows = [P[0], A[1], G[1], n + A[0], n + p + G[0], diagonal]
        columns = [P[1], n + A[0], n + p + G[0], A[1], G[1], diagonal]
        keys = torch.cat(columns) * self.size + torch.cat(rows)  # transposed
        self.order = torch.argsort(keys)
        self.rows = keys[self.order] // self.size
        self.columns = keys[self.order] % self.size

    def transposed_matrix(
        self, z: Tensor, lam: Tensor, P: Tensor, A: Tensor, G: Tensor, h: Tensor
    ) -> Sparse:
        """``K^T`` as a function of the entries, differentiable in all."""
        slack = torch.zeros_like(h).index_add(0, self.G[0], G * z[self.G[1]]) - h
        values = torch.cat([P, A, G, A, lam[self.G[0]] * G, slack])
        result = Sparse.__new__(Sparse)
        result._init(self.rows, self.columns, values[self.order], (self.size, self.size), (), None)
        return result


class _Attached(torch.autograd.Function):
    """A solution with the derivatives of one, in operations that can be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, nu: Tensor, lam: Tensor, pattern: _Pattern, *data: Tensor
    ) -> tuple[Tensor, ...]:
        found = z.clone(), nu.clone(), lam.clone()
        ctx.pattern = pattern
        ctx.save_for_backward(*found, *data)
        return found

    @staticmethod
    def backward(ctx: Any, gz: Tensor, gnu: Tensor, glam: Tensor) -> tuple[Any, ...]:
        z, nu, lam, P, _, A, _, G, h = ctx.saved_tensors
        pattern: _Pattern = ctx.pattern
        K = pattern.transposed_matrix(z, lam, P, A, G, h)
        try:
            found = solve(K, torch.cat([gz, gnu, glam]), SparseLU()).value
        except SingularError as error:
            raise SingularError(
                "the Karush-Kuhn-Tucker matrix is singular: constraints depend on each other, or a "
                "constraint and its multiplier are both zero, so the solution has no derivative; "
                f"add a small ridge to P, or look at margin ({error})"
            ) from error
        dz, dnu, dlam = found.split([len(z), len(nu), len(lam)])
        weighted = lam * dlam
        (pr, pc), (ar, ac), (gr, gc) = pattern.P, pattern.A, pattern.G
        return (
            *(None,) * 4,
            -dz[pr] * z[pc],
            -dz,
            -nu[ar] * dz[ac] - dnu[ar] * z[ac],
            dnu,
            -lam[gr] * dz[gc] - weighted[gr] * z[gc],
            weighted,
        )
