"""Least squares through generalised Nystrom, CUR and UTV."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from tests.decompositions.test_meta import SHAPES, decaying, of_rank
from tests.solvers.systems import DTYPES, error_of, eye, function, random, residual_of, wide

from woodbury import CUR, LSMR, UTV, Dense, Diagonal, GeneralizedNystrom, Identity, inverse, solve
from woodbury.errors import ArgumentError, NonFiniteError, RankError
from woodbury.solvers import SolveStatus

F64 = torch.float64
RECIPES = {
    "generalized_nystrom": GeneralizedNystrom,
    "cur": CUR,
    "cur-intersection": lambda rank, **options: CUR(rank, core="intersection", **options),
    "utv": UTV,
}
EACH = pytest.mark.parametrize("name", RECIPES)


@EACH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank_that_suffices_gives_the_pseudo_inverse(name, shape, dtype: torch.dtype) -> None:
    M = of_rank(5, *shape, dtype)
    exact = torch.from_numpy(scipy.linalg.pinv(wide(M).numpy(), rtol=1e-4))
    double = dtype in (F64, torch.complex128)
    options = {} if double else {"rcond": 1e-4}
    for columns in ((), (3,)):
        outside = random(shape[0], *columns, dtype=dtype)
        inside = M @ random(shape[1], *columns, dtype=dtype, seed=4)
        A = function(M, set())
        for b, status in (
            (outside, SolveStatus.least_squares),
            (inside, SolveStatus.converged),
        ):
            solution = solve(A, b, RECIPES[name](8, **options), throw=False)
            assert error_of(solution.value, exact @ wide(b)) < (1e-11 if double else 3e-4)
            assert solution.status is status
            assert torch.allclose(
                solution.residual, residual_of(M, solution.value, b), atol=1e-12 if double else 1e-4
            )
            assert solution.info["rank"] == 5
            assert len(solution.info["normal_residual"]) == (columns[0] if columns else 1)


@EACH
def test_adjoint_is_that_of_the_pseudo_inverse(name: str) -> None:
    M = of_rank(5, 20, 14)
    pseudo_inverse = inverse(function(M, set()), RECIPES[name](7))
    exact = torch.linalg.pinv(M, rtol=1e-8)
    assert error_of(pseudo_inverse.to_dense(), exact) < 1e-10
    Y = random(14, 3)
    assert error_of(pseudo_inverse.rmatmat(Y), exact.T @ Y) < 1e-10
    assert pseudo_inverse.report.ok


@EACH
def test_an_approximate_inverse_does_not_claim_symmetry(name: str) -> None:
    A = Diagonal(torch.linspace(1, 2, 12, dtype=F64), tags={"positive_definite"})
    assert inverse(A, RECIPES[name](4)).tags == frozenset()
    recipe = RECIPES[name](12)
    assert (
        error_of(recipe.as_preconditioner(A, recipe.prepare(A)).to_dense(), A.inverse().to_dense())
        < 1e-9
    )


@EACH
def test_what_is_left_out_is_said(name: str) -> None:
    M = decaying(40, 25)
    b = M @ random(25)
    solution = solve(function(M, set()), b, RECIPES[name](6))
    assert solution.status is SolveStatus.completed
    assert 1e-6 < float(solution.residual) < 0.5
    better = solve(function(M, set()), b, RECIPES[name](20))
    assert float(better.residual) < 0.05 * float(solution.residual)


@EACH
def test_multiple_of_the_identity_and_one_by_one(name: str) -> None:
    b = random(9)
    solution = solve(3.0 * Identity(9, dtype=F64), b, RECIPES[name](9))
    assert error_of(solution.value, b / 3) < 1e-10
    assert solution.status is SolveStatus.converged
    one = solve(
        Dense(torch.full((1, 1), -2.0, dtype=F64)), torch.ones(1, dtype=F64), RECIPES[name](1)
    )
    assert torch.allclose(one.value, torch.tensor([-0.5], dtype=F64))


@EACH
def test_zero_operator_zero_right_hand_side_and_start(name: str) -> None:
    zero = solve(Dense(torch.zeros(6, 4, dtype=F64)), random(6), RECIPES[name](2))
    assert torch.equal(zero.value, torch.zeros(4, dtype=F64))
    assert zero.status is SolveStatus.least_squares
    M = of_rank(3, 10, 7)
    B = torch.stack([random(10), torch.zeros(10, dtype=F64)], 1)
    both = solve(Dense(M), B, RECIPES[name](4))
    assert torch.equal(both.value[:, 1], torch.zeros(7, dtype=F64))
    assert both.column_status == (SolveStatus.least_squares, SolveStatus.converged)
    x = torch.linalg.pinv(M, rtol=1e-8) @ B[:, 0]
    again = solve(Dense(M), B[:, 0], RECIPES[name](4), x0=x)
    assert error_of(again.value, x) < 1e-10


@EACH
def test_seed_and_state(name: str) -> None:
    A, b = function(decaying(30, 20), set()), random(30)
    first, second, other = (solve(A, b, RECIPES[name](5, seed=s)) for s in (0, 0, 7))
    assert torch.equal(first.value, second.value)
    assert not torch.equal(first.value, other.value) or name.startswith("cur")
    again = solve(A, 2 * b, state=first.state)
    assert torch.allclose(again.value, 2 * first.value)
    assert again.products == 2


@EACH
def test_what_is_refused(name: str) -> None:
    M = decaying(12, 8)
    with pytest.raises(RankError, match="rank is 9"):
        solve(Dense(M), random(12), RECIPES[name](9))
    with pytest.raises(RankError, match="rank is 0"):
        RECIPES[name](0)
    with pytest.raises(ArgumentError, match="rcond is 1"):
        RECIPES[name](2, rcond=1.0)
    M[3, 2] = math.nan
    with pytest.raises(NonFiniteError):
        solve(Dense(M), random(12), RECIPES[name](2))
    solution = solve(Dense(M), random(12), RECIPES[name](2), throw=False)
    assert solution.status is SolveStatus.non_finite


def test_options_are_looked_at_before_any_work() -> None:
    for recipe, options in (
        (GeneralizedNystrom, {"oversampling": -1}),
        (CUR, {"oversampling": -1}),
        (CUR, {"core": "best"}),
        (UTV, {"power": -1}),
    ):
        with pytest.raises(ArgumentError, match=f"{next(iter(options))} is"):
            recipe(3, **options)


def test_cur_says_which_rows_and_columns() -> None:
    M = torch.zeros(8, 6, dtype=F64)
    M[5, 1], M[2, 4] = 3.0, -1.0
    state = CUR(3).prepare(Dense(M))
    assert sorted(state.factor.rows.tolist()) == [2, 5]
    assert sorted(state.factor.columns.tolist()) == [1, 4]


def test_gradient_through_the_solve() -> None:
    M = of_rank(6, 10, 6)
    b = random(10).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: solve(Dense(M), b, UTV(6)).value, b)
    value = solve(Dense(M), b, GeneralizedNystrom(6)).value
    assert error_of(value.detach(), solve(Dense(M), b.detach(), LSMR(rtol=1e-12)).value) < 1e-9
    assert error_of(torch.linalg.pinv(M) @ M, eye(6)) < 1e-9


@EACH
def test_half_precision(name: str) -> None:
    M = random(200, 10)
    b = M @ torch.ones(10, dtype=F64)
    solution = solve(Dense(M.bfloat16()), b.bfloat16(), RECIPES[name](10))
    assert solution.value.dtype == torch.bfloat16
    assert error_of(solution.value, torch.ones(10, dtype=F64)) < 0.05
    assert solution.status is SolveStatus.converged
