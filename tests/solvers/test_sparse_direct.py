"""SparseLU and SparseCholesky against LAPACK."""

from __future__ import annotations

import importlib.util
import math
import sys
import types

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.solvers.systems import DTYPES, error_of, random, residual_of, solution_of

from woodbury import Dense, Identity, Sparse, SparseCholesky, SparseLU, inverse, solve
from woodbury.errors import (
    ArgumentError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    SingularError,
    StructureError,
    TagError,
)
from woodbury.solvers import SolveStatus

F64 = torch.float64
HAS_CHOLMOD = importlib.util.find_spec("sksparse") is not None


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype


def general(n: int = 40, *, dtype=F64, seed: int = 0, density: float = 0.1):
    """A sparse matrix that needs row exchanges: its largest entries are off the diagonal."""
    rng = np.random.default_rng(seed)
    A = scipy.sparse.random_array((n, n), density=density, rng=rng)
    if dtype.is_complex:
        A = A + 1j * scipy.sparse.random_array((n, n), density=density, rng=rng)
    shift = scipy.sparse.coo_array((np.full(n, 2.0), (np.arange(n), rng.permutation(n))))
    return (A + shift).astype(numpy_dtype(dtype))


def definite(n: int = 40, *, dtype=F64, seed: int = 0):
    A = general(n, dtype=dtype, seed=seed)
    return (A @ A.conj().T + 0.1 * scipy.sparse.eye_array(n)).astype(numpy_dtype(dtype))


def dense(matrix) -> torch.Tensor:
    return torch.from_numpy(matrix.toarray())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [(), (1,), (4,)])
@pytest.mark.parametrize("recipe", [SparseLU(), SparseLU(ordering="NATURAL", pivot_threshold=0.1)])
def test_general(recipe, dtype: torch.dtype, columns) -> None:
    matrix = general(dtype=dtype)
    A, b = Sparse(matrix), random(40, *columns, dtype=dtype)
    solution = solve(A, b, recipe)
    M = dense(matrix)
    precise = dtype in (F64, torch.complex128)
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, solution_of(M, b)) < (1e-13 if precise else 1e-5)
    assert torch.allclose(
        solution.residual, residual_of(M, solution.value, b), atol=1e-14 if precise else 1e-6
    )
    wide = M.to(torch.complex128 if M.is_complex() else F64)
    inverse_norm = torch.linalg.matrix_norm(torch.linalg.inv(wide), 1)
    condition = float(torch.linalg.matrix_norm(wide, 1) * inverse_norm)
    assert condition / 3 <= solution.info["condition"] <= condition * (1 + 1e-9)
    assert solution.info["fill"] >= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposes_reuse_the_factors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = general(dtype=dtype)
    A, b, recipe = Sparse(matrix), random(40, 2, dtype=dtype), SparseLU()
    M = dense(matrix)
    bound = 1e-12 if dtype in (F64, torch.complex128) else 1e-5
    states = {"N": recipe.prepare(A), "T": recipe.prepare(A.T), "H": recipe.prepare(A.H)}
    monkeypatch.setattr(SparseLU, "_prepare", None)  # from here on nothing is factorised
    for operator, exact, state in (
        (A, M, states["N"]),
        (A.T, M.T, states["T"]),
        (A.H, M.mH, states["H"]),
        (A.H, M.mH, recipe.adjoint_state(A, states["N"])),
        (A.T.H, M.conj(), recipe.adjoint_state(A.T, states["T"])),
        (A, M, recipe.adjoint_state(A.H, states["H"])),
    ):
        solution = solve(operator, b, recipe, state=state)
        assert solution.status is SolveStatus.converged
        assert error_of(solution.value, solution_of(exact.resolve_conj(), b)) < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cholesky(dtype: torch.dtype) -> None:
    matrix = definite(dtype=dtype)
    A, b = Sparse(matrix, tags={"hermitian", "positive_definite"}), random(40, 3, dtype=dtype)
    solution = solve(A, b, SparseCholesky(backend="superlu"))
    assert solution.status is SolveStatus.converged
    assert solution.info["backend"] == "superlu"
    bound = 1e-11 if dtype in (F64, torch.complex128) else 1e-4
    assert error_of(solution.value, solution_of(dense(matrix), b)) < bound
    other = solve(A.T, b, SparseCholesky())
    assert error_of(other.value, solution_of(dense(matrix).T, b)) < bound
    lu = solve(A, b, SparseLU())
    assert lu.info["condition"] == pytest.approx(solution.info["condition"])
    with pytest.raises(TagError, match="needs the tag 'hermitian'"):
        solve(Sparse(matrix), b, SparseCholesky())


def test_indefinite_has_no_cholesky_factor() -> None:
    swap = scipy.sparse.csr_array(np.array([[0.0, 1.0], [1.0, 0.0]]))  # pivots 1, 1 after a swap
    shifted = definite() - 1.0 * scipy.sparse.eye_array(40)
    assert np.linalg.eigvalsh(shifted.toarray())[0] < -0.1
    for matrix in (swap, shifted, -scipy.sparse.eye_array(3).tocsr()):
        A, b = Sparse(matrix, tags={"symmetric"}), random(matrix.shape[0])
        with pytest.raises(NotPositiveDefiniteError, match=r"no Cholesky factor.*MINRES"):
            solve(A, b, SparseCholesky())
        failed = solve(A, b, SparseCholesky(), throw=False)
        assert failed.status is SolveStatus.not_positive_definite
        assert solve(A, b, SparseLU()).status is SolveStatus.converged
        with pytest.raises(NotPositiveDefiniteError, match="pivot that is not positive"):
            Sparse(matrix, tags={"positive_definite"}).inverse()


@pytest.mark.parametrize("recipe", [SparseLU(), SparseCholesky()])
@pytest.mark.parametrize("smallest", [0.0, 1e-17])
def test_singular(recipe, smallest: float) -> None:
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(12, 12)).tolil()
    line[0, 0] = line[11, 11] = 1.0 + smallest  # the constant vector is in the null space
    A = Sparse(line.tocsr(), tags={"positive_semidefinite"})
    # The last pivot is rounding of either sign.
    with pytest.raises((SingularError, NotPositiveDefiniteError), match="add a multiple"):
        solve(A, random(12), recipe)
    assert not solve(A, random(12), recipe, throw=False).ok
    assert solve(A + 1e-3 * Identity(12, dtype=F64), random(12), recipe).ok


def test_structurally_singular() -> None:
    matrix = general().tolil()
    matrix[:, 5] = 0
    with pytest.raises(SingularError, match="singular"):
        solve(Sparse(matrix.tocsr()), random(40), SparseLU())


@pytest.mark.parametrize("recipe", [SparseLU(), SparseCholesky()])
def test_edges(recipe) -> None:
    tags = {"positive_definite"}
    for matrix, exact in (
        (3 * scipy.sparse.eye_array(5), random(5) / 3),
        (
            scipy.sparse.diags_array(np.array([1e-3, 1.0, 20.0])),
            random(3) * torch.tensor([1e3, 1, 0.05], dtype=F64),
        ),
        (scipy.sparse.csr_array(np.array([[4.0]])), random(1) / 4),
    ):
        solution = solve(Sparse(matrix, tags=tags), random(matrix.shape[0]), recipe)
        assert error_of(solution.value, exact) < 1e-15
    A = Sparse(definite(), tags=tags)
    assert (solve(A, torch.zeros(40, dtype=F64), recipe).value == 0).all()
    b = random(40, 2)
    b[:, 0] = 0
    block = solve(A, b, recipe, x0=random(40, 2, seed=7))
    assert (block.value[:, 0] == 0).all()
    assert error_of(block.value[:, 1], solution_of(dense(definite()), b[:, 1])) < 1e-11
    with pytest.raises(StructureError, match=r"factorises Sparse operators, this one is Dense"):
        solve(Dense(dense(definite()), tags=tags), random(40), recipe)
    rectangle = scipy.sparse.random_array((4, 3), density=0.9)
    with pytest.raises((ShapeError, TagError), match="square"):
        solve(Sparse(rectangle), random(4), recipe)
    bad = definite()
    bad.data[3] = math.nan
    with pytest.raises(NonFiniteError, match="1 non-finite"):
        recipe.prepare(Sparse(bad, tags=tags) if isinstance(recipe, SparseLU) else _unverified(bad))


def _unverified(matrix) -> Sparse:
    """A matrix whose values went wrong after its tags had been verified."""
    A = Sparse(definite(), tags={"positive_definite"})
    A.values[3] = math.nan
    return A


def test_wrong_arguments() -> None:
    with pytest.raises(ArgumentError, match="ordering is 'AMD'; it must be one of"):
        SparseLU(ordering="AMD")
    with pytest.raises(ArgumentError, match="pivot_threshold is 2"):
        SparseLU(pivot_threshold=2.0)
    with pytest.raises(ArgumentError, match="backend is 'mumps'"):
        SparseCholesky(backend="mumps")


def test_refinement_in_the_dtype_of_the_operator() -> None:
    """A float32 operator of condition 1e6: the factors are not what limits the answer."""
    n = 400
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n))
    A = Sparse(line.astype("float32"), tags={"positive_definite"})
    x = torch.ones(n)
    solution = solve(A, A @ x, SparseLU())
    assert solution.info["condition"] > 5e4
    assert error_of(solution.value, torch.ones(n, dtype=F64)) < 1e-6


@pytest.mark.parametrize("recipe", [SparseLU(), SparseCholesky()])
@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_inverse_and_gradient(recipe, dtype: torch.dtype) -> None:
    matrix = definite(12, dtype=dtype)
    A = Sparse(matrix, tags={"hermitian", "positive_definite"})
    exact = torch.linalg.inv(dense(matrix))
    inverse_A = inverse(A, recipe)
    assert error_of(inverse_A.to_dense(), exact) < 1e-11
    Y = random(12, 2, dtype=dtype)
    assert error_of(inverse_A.rmatmat(Y), exact.mH @ Y) < 1e-11
    b = random(12, 2, dtype=dtype).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: solve(A, b, recipe).value, b, rtol=1e-5)


def test_cholmod_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sksparse", None)
    monkeypatch.setitem(sys.modules, "sksparse.cholmod", None)
    A = Sparse(definite(), tags={"positive_definite"})
    with pytest.raises(
        StructureError, match=r"needs scikit-sparse.*backend='superlu' does without"
    ):
        SparseCholesky(backend="cholmod").prepare(A)
    assert SparseCholesky().prepare(A).backend == "superlu"


class _Factor:
    """What scikit-sparse returns, by LAPACK: with ``D`` of both signs, as its L D L^H has it."""

    def __init__(self, matrix) -> None:
        self.matrix = matrix.toarray()

    def __call__(self, B):
        return np.linalg.solve(self.matrix, B)

    solve = __call__

    def D(self):
        return np.linalg.eigvalsh(self.matrix)


class _NotDefiniteError(Exception):
    pass


def _strict(matrix) -> _Factor:
    if np.linalg.eigvalsh(matrix.toarray())[0] <= 0:
        raise _NotDefiniteError("matrix is not positive definite (row 3)")
    return _Factor(matrix)


@pytest.mark.parametrize("interface", [{"cholesky": _Factor}, {"cho_factor": _strict}])
def test_both_interfaces_of_scikit_sparse(interface, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.4 has ``cholesky`` and factors that are called, 0.5 ``cho_factor`` and ``solve``."""
    cholmod = types.ModuleType("sksparse.cholmod")
    cholmod.CholmodNotPositiveDefiniteError = _NotDefiniteError
    for name, function in interface.items():
        setattr(cholmod, name, function)
    package = types.ModuleType("sksparse")
    package.cholmod = cholmod
    monkeypatch.setitem(sys.modules, "sksparse", package)
    monkeypatch.setitem(sys.modules, "sksparse.cholmod", cholmod)
    check_cholmod()


@pytest.mark.skipif(not HAS_CHOLMOD, reason="scikit-sparse is not installed")
def test_cholmod() -> None:
    check_cholmod()


def check_cholmod() -> None:
    for dtype in (F64, torch.complex128):
        matrix = definite(dtype=dtype)
        A = Sparse(matrix, tags={"hermitian", "positive_definite"})
        for columns in ((), (3,)):
            b = random(40, *columns, dtype=dtype)
            solution = solve(A, b, SparseCholesky())
            assert solution.info["backend"] == "cholmod"
            assert solution.status is SolveStatus.converged
            assert error_of(solution.value, solution_of(dense(matrix), b)) < 1e-11
    shifted = Sparse(definite() - scipy.sparse.eye_array(40), tags={"symmetric"})
    with pytest.raises(NotPositiveDefiniteError, match="no Cholesky factor"):
        SparseCholesky().prepare(shifted)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_patterns(data) -> None:
    n, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 10**6))
    dtype = data.draw(st.sampled_from([F64, torch.complex128]))
    matrix = general(n, dtype=dtype, seed=seed, density=data.draw(st.floats(0, 0.3)))
    condition = np.linalg.cond(matrix.toarray(), 1)
    ordering = data.draw(st.sampled_from([None, "COLAMD", "MMD_AT_PLUS_A", "MMD_ATA", "NATURAL"]))
    if condition < 1e8:
        b = random(n, 2, dtype=dtype, seed=seed)
        solution = solve(Sparse(matrix), b, SparseLU(ordering=ordering))
        assert solution.status is SolveStatus.converged
        assert error_of(solution.value, solution_of(dense(matrix), b)) < 1e-15 * max(condition, 100)
