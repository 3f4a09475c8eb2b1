from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.solvers.systems import (
    DTYPES,
    KINDS,
    N,
    error_of,
    function,
    random,
    residual_of,
    solution_of,
    wide,
    with_spectrum,
)

from woodbury import LDL, Dense, inverse, solve
from woodbury.errors import BudgetError, NonFiniteError, SingularError, TagError
from woodbury.solvers import SolveStatus

F64 = torch.float64


def indefinite(n: int = N, *, negative: int = 9, dtype=F64, seed: int = 0) -> torch.Tensor:
    values = torch.linspace(0.2, 2, n, dtype=F64)
    values[:negative] *= -1
    return with_spectrum(values, dtype=dtype, seed=seed)


def hermitian(M: torch.Tensor):
    return function(M, {"hermitian"})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [(), (1,), (4,)])
def test_indefinite(dtype: torch.dtype, columns) -> None:
    M, b = indefinite(dtype=dtype), random(N, *columns, dtype=dtype)
    solution = solve(hermitian(M), b, LDL())
    precise = dtype in (F64, torch.complex128)
    assert solution.status is SolveStatus.converged
    assert solution.info["inertia"] == (N - 9, 9, 0)
    assert error_of(solution.value, solution_of(M, b)) < (1e-13 if precise else 2e-6)
    assert torch.allclose(
        solution.residual, residual_of(M, solution.value, b), atol=1e-14 if precise else 1e-6
    )
    inverse_norm = torch.linalg.matrix_norm(torch.linalg.inv(wide(M)), 1)
    condition = float(torch.linalg.matrix_norm(wide(M), 1) * inverse_norm)
    assert condition / 3 <= solution.info["condition"] <= condition * (1 + 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_operators(kind: str, dtype: torch.dtype) -> None:
    A, b = KINDS[kind](dtype), random(N, 2, dtype=dtype)
    solution = solve(A, b, LDL())
    assert solution.status is SolveStatus.converged
    assert solution.info["inertia"] == (N, 0, 0)
    exact = solution_of(A.to_dense(), b)
    assert error_of(solution.value, exact) < (1e-12 if dtype in DTYPES[::2] else 1e-4)


def test_blocks_of_two_rows() -> None:
    """A zero diagonal leaves no single pivot."""
    M = torch.zeros(6, 6, dtype=F64)
    for i in range(0, 6, 2):
        M[i, i + 1] = M[i + 1, i] = i + 1.0
    state = LDL().prepare(hermitian(M))
    assert (state.pivots < 0).all()
    assert state.inertia == (3, 3, 0)
    b = random(6)
    assert error_of(solve(hermitian(M), b, LDL(), state=state).value, solution_of(M, b)) < 1e-15


def test_saddle_point() -> None:
    """[[H, B^T], [B, 0]] has as many negative eigenvalues as constraints (Gould 1985)."""
    B = random(4, 10)
    H = with_spectrum(torch.linspace(1, 3, 10, dtype=F64))
    M = torch.cat([torch.cat([H, B.T], 1), torch.cat([B, torch.zeros(4, 4, dtype=F64)], 1)])
    solution = solve(hermitian(M), random(14), LDL())
    assert solution.info["inertia"] == (10, 4, 0)
    assert error_of(solution.value, solution_of(M, random(14))) < 1e-12


@pytest.mark.parametrize("smallest", [0.0, 1e-17, -1e-17])
def test_singular(smallest: float) -> None:
    spectrum = torch.linspace(-1, 3, 30, dtype=F64)
    spectrum[7] = smallest
    M = with_spectrum(spectrum)
    with pytest.raises(SingularError, match=r"reciprocal condition number is \S+e-\d+, .*Eigh"):
        solve(hermitian(M), random(30), LDL())
    assert solve(hermitian(M), random(30), LDL(), throw=False).status is SolveStatus.singular
    zero = hermitian(torch.zeros(3, 3, dtype=F64))
    with pytest.raises(SingularError, match="0 positive, 0 negative and 3 zero"):
        LDL().prepare(zero)


def test_edges() -> None:
    b = random(5)
    for c in (-2.0, 3.0):
        solution = solve(Dense(c * torch.eye(5, dtype=F64), tags={"symmetric"}), b, LDL())
        assert error_of(solution.value, b / c) < 1e-15
        assert solution.info["inertia"] == ((5, 0, 0) if c > 0 else (0, 5, 0))
        assert solution.info["condition"] == pytest.approx(1)
    one = solve(Dense(torch.tensor([[-4.0]]), tags={"symmetric"}), torch.tensor([2.0]), LDL())
    assert one.value.item() == -0.5
    M = indefinite()
    for scale in (1e-150, 1e150):
        scaled = solve(hermitian(scale * M), random(N), LDL())
        assert error_of(scaled.value * scale, solution_of(M, random(N))) < 1e-12
    with pytest.raises(TagError, match="needs the tag 'hermitian'"):
        solve(function(M, set()), random(N), LDL())
    with pytest.raises(BudgetError, match="MINRES"):
        solve(hermitian(M), random(N), LDL(budget_bytes=1000))
    M[3, 3] = math.nan
    with pytest.raises(NonFiniteError, match="24 of 576 entries"):
        solve(hermitian(M), random(N), LDL())


def test_inverse_and_gradient() -> None:
    for dtype in (F64, torch.complex128):
        A = hermitian(indefinite(8, negative=3, dtype=dtype))
        exact = torch.linalg.inv(A.to_dense())
        assert error_of(inverse(A, LDL()).to_dense(), exact) < 1e-13
        b = random(8, 2, dtype=dtype).requires_grad_()
        assert torch.autograd.gradcheck(lambda b, A=A: solve(A, b, LDL()).value, b)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_spectra(data) -> None:
    n = data.draw(st.integers(1, 20))
    signs = data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=n, max_size=n))
    sizes = data.draw(st.lists(st.floats(-3, 0), min_size=n, max_size=n))
    seed = data.draw(st.integers(0, 10**6))
    dtype = data.draw(st.sampled_from([F64, torch.complex128]))
    spectrum = torch.tensor(signs, dtype=F64) * 10 ** torch.tensor(sizes, dtype=F64)
    M, b = with_spectrum(spectrum, dtype=dtype, seed=seed), random(n, dtype=dtype, seed=seed + 1)
    solution = solve(hermitian(M), b, LDL())
    assert solution.status is SolveStatus.converged
    positive = sum(sign > 0 for sign in signs)
    assert solution.info["inertia"] == (positive, n - positive, 0)
    assert error_of(solution.value, solution_of(M, b)) < 1e-9
