from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conformance import OperatorConformance
from tests.solvers.systems import DTYPES, KINDS, N, error_of, random, residual_of, solution_of, wide
from tests.solvers.test_least_squares import function, least_squares, matrix

from woodbury import QR, Dense, inverse, solve
from woodbury.errors import ArgumentError, BudgetError, NonFiniteError
from woodbury.solvers import SolveStatus, qr

F64 = torch.float64
SHAPES = {"tall": (40, 15), "wide": (15, 40), "square": (20, 20)}


def precise(dtype: torch.dtype) -> bool:
    return dtype in (F64, torch.complex128)


@pytest.fixture(params=["columns", "singular values"])
def way(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of the factorisation; the second is that of devices without column pivoting."""
    if request.param == "singular values":
        monkeypatch.setattr(qr, "_by_columns", qr._by_singular_values)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [15, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_minimises(way: str, dtype: torch.dtype, rank: int, shape: str) -> None:
    m, n = SHAPES[shape]
    M = matrix(m, n, rank, dtype=dtype)
    A, recipe = function(M), QR(rcond=1e-4)
    for columns in ((), (1,), (4,)):
        b = random(m, *columns, dtype=dtype)
        solution = solve(A, b, recipe)
        wanted = SolveStatus.converged if rank == m else SolveStatus.least_squares
        assert solution.status is wanted
        assert solution.info["rank"] == rank
        assert error_of(solution.value, least_squares(M, b)) < (1e-12 if precise(dtype) else 2e-5)
        true = residual_of(M, solution.value, b)
        assert torch.allclose(
            solution.residual, true, rtol=1e-4, atol=1e-12 if precise(dtype) else 1e-5
        )
        if rank < m:
            assert max(solution.info["normal_residual"]) < (1e-13 if precise(dtype) else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_operators(kind: str, dtype: torch.dtype) -> None:
    A, b = KINDS[kind](dtype), random(N, 2, dtype=dtype)
    solution = solve(A, b, QR())
    assert solution.status is SolveStatus.converged
    exact = solution_of(A.to_dense(), b)
    assert error_of(solution.value, exact) < (1e-12 if precise(dtype) else 1e-4)


class TestPseudoInverse(OperatorConformance):
    def make(self):
        cases = []
        for m, n, rank in ((6, 4, 4), (4, 6, 4), (6, 5, 3), (5, 5, 5), (4, 3, 0)):
            for dtype in (F64, torch.complex128):
                M = matrix(m, n, rank, dtype=dtype) if rank else torch.zeros(m, n, dtype=dtype)
                cases.append((inverse(Dense(M), QR()), torch.linalg.pinv(M, rtol=1e-8)))
        return cases


def test_penrose_equations(way: str) -> None:
    M = matrix(30, 22, 9, dtype=torch.complex128)
    P = inverse(Dense(M), QR()).to_dense()
    for product, wanted in ((M @ P @ M, M), (P @ M @ P, P), ((M @ P).mH, M @ P)):
        assert error_of(product, wanted) < 1e-13
    assert error_of((P @ M).mH, P @ M) < 1e-13


def test_nothing_is_factorised_again_for_the_adjoint(way: str) -> None:
    A = Dense(matrix(20, 12, 12))
    state = QR().prepare(A)
    adjoint = QR().adjoint_state(A, state)
    assert adjoint.left is state.left
    assert (adjoint.shape, adjoint.products) == ((12, 20), 0)
    g = random(12, 3)
    solution = solve(A.H, g, QR(), state=adjoint)
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, torch.linalg.pinv(A.matrix.T) @ g) < 1e-13
    assert not QR().adjoint_state(A.H, adjoint).adjoint


@pytest.mark.parametrize("rank", [12, 5])
def test_gradient_of_the_right_hand_side(rank: int) -> None:
    A, b = Dense(matrix(20, 12, rank)), random(20, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: solve(A, b, QR()).value, b)
    assert torch.autograd.gradgradcheck(lambda b: solve(A, b, QR()).value.pow(3), b)


def test_rank_is_where_rcond_says() -> None:
    U, _ = torch.linalg.qr(random(30, 20))
    V, _ = torch.linalg.qr(random(20, 20, seed=2))
    M = (U * torch.logspace(0, -19, 20, dtype=F64)) @ V.T
    for rcond in (1e-3, 1e-6, 1e-9):
        solution = solve(Dense(M), random(30), QR(rcond=rcond))
        assert abs(solution.info["rank"] + math.log10(rcond)) <= 1.5
        # What was left out is in the residual of the normal equations, and no more than that.
        assert 1e-2 * rcond < solution.info["normal_residual"][0] <= 2 * rcond
    assert solve(Dense(M), random(30), QR()).info["rank"] in (14, 15, 16)
    assert solve(Dense(M.float()), random(30).float(), QR()).info["rank"] in (5, 6, 7)


def test_badly_conditioned_but_of_full_rank() -> None:
    """Where the normal equations would have lost every digit."""
    M = matrix(50, 20, 20, condition=1e9)
    x = random(20)
    b = M @ x
    solution = solve(Dense(M), b, QR())
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, x) < 1e-6
    noisy = solve(Dense(M), b + 1e-3 * random(50, seed=5), QR())
    assert noisy.status is SolveStatus.least_squares
    theirs = np.linalg.lstsq(M.numpy(), (b + 1e-3 * random(50, seed=5)).numpy(), rcond=None)[0]
    assert error_of(noisy.value, torch.from_numpy(theirs)) < 1e-5


def test_refinement_by_the_products_of_the_operator() -> None:
    """A state of a similar operator: the answer is refined, and judged by the operator's own."""
    M = matrix(30, 12, 12)
    A, near = Dense(M), Dense(M + 1e-9 * random(30, 12))
    b = M @ random(12)
    state = QR().prepare(near)
    solution = solve(A, b, QR(), state=state)
    assert solution.status is SolveStatus.converged
    assert solution.residual < 1e-15
    far = QR().prepare(Dense(random(30, 12, seed=9)))
    wrong = solve(A, b, QR(), state=far, throw=False)
    assert wrong.status is SolveStatus.stagnation


def test_edges(way: str) -> None:
    for shape in ((5, 3), (3, 5), (1, 1)):
        zero = solve(Dense(torch.zeros(shape, dtype=F64)), random(shape[0]), QR())
        assert (zero.status, zero.info["rank"]) == (SolveStatus.least_squares, 0)
        assert (zero.value == 0).all()
        assert zero.residual == 1
    one = solve(Dense(torch.tensor([[4.0]])), torch.tensor([2.0]), QR())
    assert one.value.item() == 0.5
    scaled = solve(Dense(-3 * torch.eye(6, dtype=F64)), random(6), QR())
    assert error_of(scaled.value, random(6) / -3) < 1e-15
    for scale in (1e-200, 1e200):
        M, b = matrix(9, 5, 5), random(9, 2)
        b[:, 1] = 0
        solution = solve(Dense(scale * M), b, QR())
        assert solution.column_status[0] is SolveStatus.least_squares
        assert error_of(solution.value[:, 0] * scale, least_squares(M, b[:, 0])) < 1e-12
        assert (solution.value[:, 1] == 0).all()
    x0 = random(8)
    nearest = solve(Dense(matrix(5, 8, 5)), random(5), QR(), x0=x0).value
    M = matrix(5, 8, 5)
    assert error_of(nearest, x0 + torch.linalg.pinv(M) @ (random(5) - M @ x0)) < 1e-13


def test_wrong_arguments() -> None:
    for rcond in (-1.0, 1.0, math.nan):
        with pytest.raises(ArgumentError, match="rcond is"):
            QR(rcond=rcond)
    M = matrix(6, 4, 4)
    with pytest.raises(BudgetError, match=r"768 bytes.*use LSMR\(\)"):
        solve(Dense(M), random(6), QR(budget_bytes=767))
    M[2, 1] = math.inf
    with pytest.raises(NonFiniteError, match="1 of 24 entries"):
        solve(Dense(M), random(6), QR())


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_random_shapes_and_ranks(data) -> None:
    m, n = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 25))
    rank = data.draw(st.integers(0, min(m, n)))
    seed = data.draw(st.integers(0, 10**6))
    dtype = data.draw(st.sampled_from([F64, torch.complex128]))
    M = torch.zeros(m, n, dtype=dtype)
    if rank:
        M = matrix(m, n, rank, condition=100, dtype=dtype, seed=seed)
    b = random(m, 2, dtype=dtype, seed=seed + 2)
    solution = solve(Dense(M), b, QR())
    assert solution.info["rank"] == rank
    exact = torch.from_numpy(np.linalg.lstsq(wide(M).numpy(), b.numpy(), rcond=1e-10)[0])
    assert torch.allclose(solution.value, exact, atol=1e-10, rtol=1e-10)
    wanted = SolveStatus.converged if rank == m else SolveStatus.least_squares
    assert solution.column_status == (wanted, wanted)
