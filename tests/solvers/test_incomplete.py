"""Incomplete factorisations: what they are equal to, what they save, and how they fail."""

from __future__ import annotations

import gzip
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.io
import scipy.sparse
import scipy.sparse.linalg
import torch
from tests.solvers.systems import (
    DTYPES,
    N,
    definite,
    error_of,
    function,
    random,
    residual_of,
    solution_of,
    wide,
)

from woodbury import CG, IncompleteCholesky, IncompleteLU, Jacobi, Sparse, solve
from woodbury.errors import NotPositiveDefiniteError, SingularError
from woodbury.solvers import SolveStatus
from woodbury.solvers.level_zero import LevelZero

F64 = torch.float64


def grid(m: int) -> scipy.sparse.csr_array:
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(m, m))
    return scipy.sparse.csr_array(scipy.sparse.kronsum(line, line))


def scattered(n: int, dtype: torch.dtype = F64, seed: int = 0) -> scipy.sparse.csr_array:
    """Hermitian, diagonally dominant, with a random pattern."""
    rng = np.random.default_rng(seed)
    kind = np.complex128 if dtype.is_complex else np.float64
    lower = scipy.sparse.random_array((n, n), density=0.15, rng=rng).astype(kind)
    if dtype.is_complex:
        lower.data = lower.data * np.exp(2j * np.pi * rng.random(len(lower.data)))
    lower = scipy.sparse.tril(lower, -1)
    matrix = lower + lower.conj().T
    rows = np.asarray(abs(matrix).sum(1)).ravel()
    return scipy.sparse.csr_array(matrix + scipy.sparse.diags_array((rows + 0.1).astype(kind)))


def textbook_level_zero(M: np.ndarray) -> np.ndarray:
    """Incomplete Cholesky entry by entry, as in Saad's algorithm 10.4 without fill."""
    n, pattern, L = len(M), M != 0, np.tril(M).astype(M.dtype)
    for k in range(n):
        L[k, k] = np.sqrt(L[k, k].real)
        for i in range(k + 1, n):
            if pattern[i, k]:
                L[i, k] /= L[k, k]
        for j in range(k + 1, n):
            for i in range(j, n):
                if pattern[i, j]:
                    L[i, j] -= L[i, k] * L[j, k].conj()
    return np.tril(L)


# --------------------------------------------------------------- level zero


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_level_zero_is_the_textbooks_factor(dtype: torch.dtype) -> None:
    for matrix in (scattered(40, dtype), scattered(17, dtype, seed=3), grid(6)):
        factor, failure = LevelZero(matrix).factorize(0.0)
        assert failure is None
        assert abs(factor.toarray() - textbook_level_zero(matrix.toarray())).max() < 1e-13
        shifted, _ = LevelZero(matrix).factorize(0.2)
        whole = matrix.toarray() + 0.2 * np.diag(matrix.diagonal())
        assert abs(shifted.toarray() - textbook_level_zero(whole)).max() < 1e-13


def test_level_zero_equals_the_matrix_on_its_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = scattered(60)
    whole, _ = LevelZero(matrix).factorize(0.0)
    product = (whole @ whole.conj().T).toarray()
    pattern = matrix.toarray() != 0
    assert abs((product - matrix.toarray())[pattern]).max() < 1e-13
    assert abs(product[~pattern]).max() > 1e-3  # it is incomplete
    monkeypatch.setattr("woodbury.solvers.level_zero._PAIRS", 7)  # updates listed in many parts
    parts, _ = LevelZero(matrix).factorize(0.0)
    assert (parts != whole).nnz == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_complete_where_there_is_no_fill(dtype: torch.dtype) -> None:
    off = -1.0 if not dtype.is_complex else -0.6 - 0.8j
    matrix = scipy.sparse.diags_array(
        [np.conj(off), 2.5, off], offsets=[-1, 0, 1], shape=(N, N), dtype=complex
    )
    matrix = matrix if dtype.is_complex else matrix.real
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    A = Sparse(matrix.astype(kind), tags={"positive_definite"})
    b = random(N, 3, dtype=dtype)
    rtol = 1e-5 if dtype.to_real() == torch.float32 or dtype == torch.float32 else 1e-12
    for drop in (None, 1e-12):
        solution = solve(A, b, IncompleteCholesky(drop=drop, rtol=rtol))
        assert solution.steps == 1
        assert error_of(solution.value, solution_of(wide(A.to_dense()), b)) < 20 * rtol
        assert solution.state.shift == 0.0
    assert solve(A, b, IncompleteLU(drop=0.0, rtol=rtol)).steps == 1


# ------------------------------------------------------------- as preconditioners


@pytest.mark.parametrize("drop", [None, 1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_is_positive_definite_as_it_says(dtype: torch.dtype, drop: float | None) -> None:
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    A = Sparse(scattered(50, dtype).astype(kind), tags={"positive_definite"})
    recipe = IncompleteCholesky(drop=drop)
    M = recipe.as_preconditioner(A, recipe.prepare(A))
    dense = wide(M.to_dense())
    rounding = 1e-5 if dtype in (torch.float32, torch.complex64) else 1e-13
    assert error_of(dense, dense.mH) < rounding
    assert torch.linalg.eigvalsh(dense)[0] > 0
    assert {"positive_definite", "hermitian"} <= M.tags
    B = random(50, 4, dtype=dtype)
    assert error_of(M @ B, dense @ wide(B)) < 10 * rounding
    assert error_of(M.rmatmat(B), dense @ wide(B)) < 10 * rounding
    assert error_of(M @ B[:, 0], dense @ wide(B[:, 0])) < 10 * rounding
    exact = torch.linalg.inv(wide(A.to_dense()))
    assert error_of(dense, exact) < {None: 1.0, 1e-1: 0.5, 1e-2: 0.1, 1e-3: 0.01}[drop]


def test_steps_of_conjugate_gradients_on_a_grid() -> None:
    A, b = Sparse(grid(40), tags={"positive_definite"}), random(1600)
    M = A.to_dense()
    steps = {}
    for name, recipe in {
        "none": None,
        "level 0": IncompleteCholesky(drop=None),
        "0.01": IncompleteCholesky(drop=1e-2),
        "0.001": IncompleteCholesky(),
    }.items():
        solution = solve(A, b, CG(rtol=1e-8, preconditioner=recipe))
        assert residual_of(M, solution.value, b) <= 1.01e-8
        steps[name] = solution.steps
    assert steps["level 0"] < steps["none"] / 2
    assert steps["0.01"] < steps["level 0"] / 2
    assert steps["0.001"] < steps["0.01"]


def load(folder: Path, name: str) -> scipy.sparse.csr_array:
    with gzip.open(folder / "matrices" / f"{name}.triplets.gz") as lines:
        rows, columns, values = np.loadtxt(lines).T
    half = scipy.sparse.coo_array((values, (rows.astype(int), columns.astype(int))))
    return (half + half.T - scipy.sparse.diags_array(half.diagonal())).tocsr()


def test_stiffness_matrices_with_and_without_a_shift(data_folder: Path) -> None:
    for name in ("bcsstk01", "bcsstk16"):
        matrix = load(data_folder, name)
        A = Sparse(matrix, tags={"positive_definite"})
        b = A @ random(A.shape[0])
        jacobi = solve(A, b, CG(rtol=1e-8, preconditioner=Jacobi())).steps
        for recipe, limit in ((IncompleteCholesky(drop=None), 2.5), (IncompleteCholesky(), 7)):
            assert solve(A, b, CG(rtol=1e-8, preconditioner=recipe)).steps < jacobi / limit
    path = data_folder / "matrices" / "bcsstk13.mtx.gz"
    matrix = scipy.sparse.csr_array(scipy.io.mmread(path, spmatrix=False))
    A = Sparse(matrix, tags={"positive_definite"})
    state = IncompleteCholesky(drop=None).prepare(A)
    assert state.shift == 0.256  # the matrix is definite, its level-0 factor does not exist
    b = A @ random(A.shape[0])
    solution = solve(A, b, CG(rtol=1e-8, preconditioner=IncompleteCholesky(drop=None)))
    assert solution.ok
    assert solution.steps < 600  # with Jacobi about 1,250


def test_incomplete_lu_for_a_nonsymmetric_matrix() -> None:
    n = 400
    wind = scipy.sparse.diags_array([-1.4, 3.0, -0.6], offsets=[-1, 0, 1], shape=(n, n))
    matrix = scipy.sparse.csr_array(
        wind + scipy.sparse.diags_array([-0.4, -0.4], offsets=[-20, 20], shape=(n, n))
    )
    A = Sparse(matrix)
    M = A.to_dense()
    b = random(n, 2)
    recipe = IncompleteLU(drop=0.05, rtol=1e-10)
    solution = solve(A, b, recipe)
    assert (residual_of(M, solution.value, b) <= 1.01e-10).all()
    assert 2 < solution.steps < 60
    P = recipe.as_preconditioner(A, solution.state)
    dense = P.to_dense()
    assert error_of(P.rmatmat(b), dense.T @ b) < 1e-12
    # The same factors as SciPy's, applied by its own class.
    peer = scipy.sparse.linalg.spilu(matrix.tocsc(), drop_tol=0.05, fill_factor=10.0)
    assert error_of(P @ b, torch.from_numpy(peer.solve(b.numpy()))) < 1e-13


def test_operators_that_are_not_sparse_are_formed() -> None:
    M, b = definite(), random(N)
    A = function(M, {"positive_definite"})
    for recipe in (IncompleteCholesky(), IncompleteLU()):
        solution = solve(A, b, recipe)
        assert solution.ok
        assert solution.products == N + solution.steps
        assert error_of(solution.value, solution_of(M, b)) < 1e-4


@hypothesis.given(
    n=st.integers(1, 30),
    seed=st.integers(0, 10_000),
    complex_entries=st.booleans(),
    drop=st.sampled_from([None, 1e-1, 1e-3]),
    slack=st.sampled_from([0.0, 0.3]),
)
@hypothesis.settings(max_examples=80)
def test_random_patterns(
    n: int, seed: int, complex_entries: bool, drop: float | None, slack: float
) -> None:
    dtype = torch.complex128 if complex_entries else F64
    matrix = scattered(n, dtype, seed=seed)
    # Less diagonal than dominance asks for: a shift may be needed.
    matrix = scipy.sparse.csr_array(matrix - slack * scipy.sparse.diags_array(matrix.diagonal()))
    A = Sparse(matrix, tags={"hermitian"})
    recipe = IncompleteCholesky(drop=drop)
    state = recipe.prepare(A)
    dense = recipe.as_preconditioner(A, state).to_dense()
    assert torch.linalg.eigvalsh((dense + dense.mH) / 2)[0] > 0
    assert state.shift == 0 or slack > 0
    if drop is None:
        factor, _ = LevelZero(matrix).factorize(state.shift)
        whole = torch.from_numpy((factor @ factor.conj().T).toarray())
        assert error_of(torch.linalg.inv(whole), dense * 1.0) < 1e-8


# ------------------------------------------------------------------- failures


def needs_a_shift() -> scipy.sparse.csr_array:
    """Definite, but without a factor of level 0 (Kershaw's example)."""
    return scipy.sparse.csr_array(
        np.array([[3.0, -2, 0, 2], [-2, 3.0, -2, 0], [0, -2, 3.0, -2], [2, 0, -2, 3.0]])
    )


def test_shift_is_the_first_of_the_sequence_that_works() -> None:
    matrix = needs_a_shift()
    assert np.linalg.eigvalsh(matrix.toarray())[0] > 0.1
    A = Sparse(matrix, tags={"positive_definite"})
    state = IncompleteCholesky(drop=None).prepare(A)
    unit = matrix / 3.0
    tried = [0.0] + [1e-3 * 2**i for i in range(20)]
    fits = []
    for shift in tried:
        try:
            with np.errstate(invalid="raise"):
                factor = textbook_level_zero(unit.toarray() + shift * np.eye(4))
            fits.append(np.isfinite(factor).all())
        except FloatingPointError:
            fits.append(False)
    assert not fits[0]
    assert state.shift == tried[fits.index(True)]
    assert solve(A, random(4), CG(preconditioner=IncompleteCholesky(drop=None))).ok
    with pytest.raises(NotPositiveDefiniteError, match="the pivot of row 3 is"):
        IncompleteCholesky(drop=None, shift=0.0).prepare(A)
    assert IncompleteCholesky(drop=None, shift=0.7).prepare(A).shift == 0.7


def test_a_diagonal_that_is_not_positive_is_named() -> None:
    matrix = grid(4).tolil()
    matrix[5, 5] = -1.0
    A = Sparse(scipy.sparse.csr_array(matrix), tags={"hermitian"})
    for drop in (None, 1e-2):
        with pytest.raises(NotPositiveDefiniteError, match="row 5 has the diagonal entry -1"):
            IncompleteCholesky(drop=drop).prepare(A)
        found = solve(A, random(16), IncompleteCholesky(drop=drop), throw=False)
        assert found.status is SolveStatus.not_positive_definite


def test_indefinite_matrices_with_a_positive_diagonal_get_a_definite_preconditioner() -> None:
    matrix = scipy.sparse.csr_array(np.array([[1.0, 2.0], [2.0, 1.0]]))
    A = Sparse(matrix, tags={"hermitian"})
    for drop in (None, 1e-2):
        recipe = IncompleteCholesky(drop=drop)
        state = recipe.prepare(A)
        assert state.shift >= 1.0
        assert torch.linalg.eigvalsh(recipe.as_preconditioner(A, state).to_dense())[0] > 0
    with pytest.raises(NotPositiveDefiniteError, match="the pivot of row . is -"):
        IncompleteCholesky(drop=1e-2, shift=0.5).prepare(A)


def test_singular_matrices() -> None:
    A = Sparse(scipy.sparse.csr_array(np.array([[1.0, 2.0], [0.0, 0.0]])))
    with pytest.raises(SingularError, match="lower drop, or add damping"):
        IncompleteLU().prepare(A)
    assert solve(A, random(2), IncompleteLU(), throw=False).status is SolveStatus.singular


def test_recipes_compare() -> None:
    assert IncompleteCholesky(drop=1e-2) == IncompleteCholesky(drop=1e-2)
    assert hash(IncompleteLU()) == hash(IncompleteLU())
