"""Triangles that are solved with: the operators of the relaxation methods and of the factors."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from tests.conformance import OperatorConformance
from tests.solvers.systems import DTYPES, N, definite, error_of, random, wide

from woodbury import SOR, SSOR, Dense, GaussSeidel, IncompleteCholesky, Sparse
from woodbury.errors import NonFiniteError, SingularError
from woodbury.solvers.triangular import SparseTriangle, parts_of

RECIPES = {
    "forward": SOR(omega=1.3),
    "backward": SOR(omega=0.7, sweep="backward"),
    "symmetric": SSOR(omega=1.4),
    "gauss-seidel": GaussSeidel(sweep="symmetric"),
}


def reference(name: str, M: torch.Tensor) -> torch.Tensor:
    D, L, U = torch.diag(M.diagonal()), torch.tril(M, -1), torch.triu(M, 1)
    if name == "forward":
        return torch.linalg.inv(D / 1.3 + L)
    if name == "backward":
        return torch.linalg.inv(D / 0.7 + U)
    omega = 1.4 if name == "symmetric" else 1.0
    factor = (2 - omega) / omega
    return factor * torch.linalg.inv(D / omega + U) @ D @ torch.linalg.inv(D / omega + L)


def cases(symmetric: bool):
    for dtype in DTYPES:
        M = definite(dtype=dtype) + torch.eye(N).to(dtype)
        if not symmetric:
            M = M + 0.1 * random(N, N, dtype=dtype)
        tags = {"positive_definite"} if symmetric else set()
        for A in (Dense(M, tags=tags), Sparse(scipy.sparse.csr_array(M.numpy()), tags=tags)):
            for name, recipe in RECIPES.items():
                yield recipe.prepare(A).preconditioner, reference(name, wide(M))


class TestTriangularInverse(OperatorConformance):
    differentiable_in_x = False  # SuperLU's substitution; what preconditions runs without gradients

    def make(self):
        return [*cases(symmetric=True), *cases(symmetric=False)]


class TestIncompleteInverse(OperatorConformance):
    differentiable_in_x = False

    def make(self):
        found = []
        for dtype in DTYPES:
            M = definite(dtype=dtype) + torch.eye(N).to(dtype)
            A = Dense(M, tags={"positive_definite"})
            recipe = IncompleteCholesky(drop=1e-13)  # complete, in another order
            found.append((recipe.prepare(A).preconditioner, torch.linalg.inv(wide(M))))
        return found


@pytest.mark.parametrize("density", [0.05, 0.6])  # stored by columns, and by rows
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.complex64, np.complex128])
def test_sparse_triangle(kind: type, density: float) -> None:
    rng = np.random.default_rng(0)
    matrix = scipy.sparse.random_array((40, 40), density=density, rng=rng).astype(kind)
    if np.dtype(kind).kind == "c":
        matrix.data = matrix.data * np.exp(1j * 6 * rng.random(len(matrix.data))).astype(kind)
    T = scipy.sparse.csr_array(scipy.sparse.tril(matrix, -1) / 10 + scipy.sparse.eye_array(40))
    triangle = SparseTriangle(T.astype(kind))
    assert triangle.by_rows == (density == 0.6)
    dense = wide(torch.from_numpy(T.toarray()))
    B = random(40, 3, dtype=torch.from_numpy(np.zeros(1, kind)).dtype)
    rounding = 1e-5 if kind in (np.float32, np.complex64) else 1e-13
    for b in (B, B[:, 1], B.T.contiguous().T):
        for adjoint, M in ((False, dense), (True, dense.mH)):
            found = triangle.solve(b, adjoint=adjoint)
            assert found.dtype == b.dtype
            assert error_of(M @ wide(found), wide(b)) < rounding


def test_what_cannot_be_divided_by() -> None:
    M = definite()
    M[4, 4] = 0.0
    for A in (Dense(M), Sparse(scipy.sparse.csr_array(M.numpy()))):
        with pytest.raises(SingularError, match="entry 4 is 0 "):
            parts_of(A, "test")
    M[4, 4] = 1e-320  # its reciprocal overflows
    with pytest.raises(SingularError, match="entry 4"):
        parts_of(Dense(M), "test")
    M[4, 4] = float("inf")
    with pytest.raises(NonFiniteError):
        parts_of(Dense(M), "test")
