from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import scipy.linalg
import scipy.sparse
import torch
from tests.decompositions.test_meta import of_rank
from tests.solvers.systems import DTYPES, error_of, function, random, residual_of, wide
from tests.solvers.test_cg import Weighted

from woodbury import LSMR, Dense, Identity, SketchPrecondition, Sparse, inverse, solve
from woodbury.errors import ArgumentError, NonFiniteError, StructureError
from woodbury.solvers import SolveStatus

F64 = torch.float64
SKETCHES = pytest.mark.parametrize("sketch", ["sparse_sign", "gaussian", "hadamard"])


def tall(
    m: int = 400, n: int = 20, condition: float = 10.0, dtype: torch.dtype = F64, seed: int = 2
) -> torch.Tensor:
    drawn = torch.complex128 if dtype.is_complex else F64
    U, _ = torch.linalg.qr(random(m, n, dtype=drawn, seed=seed))
    V, _ = torch.linalg.qr(random(n, n, dtype=drawn, seed=seed + 1))
    return ((U * torch.logspace(0, -math.log10(condition), n, dtype=F64)) @ V.mH).to(dtype)


def least(M: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The least-squares solution of smallest norm, by LAPACK's SVD."""
    found = scipy.linalg.lstsq(wide(M).numpy(), wide(b).numpy(), lapack_driver="gelsd")[0]
    return torch.from_numpy(found)


@SKETCHES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(400, 20), (20, 400), (60, 40), (40, 60), (30, 30)], ids=str)
def test_least_squares_and_smallest_norm(sketch: str, dtype: torch.dtype, shape) -> None:
    m, n = shape
    M = tall(max(shape), min(shape), dtype=dtype)
    M = M if m >= n else M.mH.contiguous()
    double = dtype in (F64, torch.complex128)
    rtol = 1e-11 if double else 1e-5
    inside = M @ random(n, 2, dtype=dtype, seed=5)
    cases = [(inside, SolveStatus.converged)]
    if m > n:
        cases.append((random(m, 2, dtype=dtype, seed=6), SolveStatus.least_squares))
    for b, status in cases:
        for column in (b, b[:, 0]):
            solution = solve(Dense(M), column, SketchPrecondition(rtol=rtol, sketch=sketch))
            assert solution.status is status
            assert error_of(solution.value, least(M, column)) < 20 * rtol
            true = residual_of(M, solution.value, column)
            assert torch.allclose(solution.residual, true, atol=1e-12 if double else 1e-5)
            r = wide(column) - wide(M) @ wide(solution.value)
            gradient = torch.linalg.vector_norm(wide(M).mH @ r, dim=0)
            if status is SolveStatus.least_squares:
                assert bool((gradient <= 10 * rtol * torch.linalg.vector_norm(r, dim=0)).all())


@SKETCHES
def test_iterations_do_not_depend_on_the_condition_number(sketch: str) -> None:
    # 4 rows of the sketch a column: the error falls by sqrt(n / s) = 1 / 2 a step, about.
    steps = {}
    for condition in (1e0, 1e5, 1e10):
        M = tall(1000, 40, condition)
        x = random(40, seed=8)
        b = M @ x + 1e-6 * random(1000, seed=9)
        solution = solve(Dense(M), b, SketchPrecondition(rtol=1e-6, sketch=sketch))
        assert solution.status is SolveStatus.least_squares
        exact = least(M, b)
        least_residual = float((b - M @ exact).norm())
        assert float((b - M @ solution.value).norm()) <= least_residual * (1 + 1e-9)
        assert 0.3 * condition < solution.info["condition"] < 5 * max(condition, 1.0)
        steps[condition] = solution.steps
    assert max(steps.values()) <= 30
    assert max(steps.values()) - min(steps.values()) <= 6
    plain = solve(Dense(M), b, LSMR(rtol=1e-12, max_steps=1000), throw=False)
    assert plain.steps > 5 * max(steps.values())


def test_forward_error_of_a_backward_stable_method() -> None:
    # kappa eps |x|, with kappa^2 eps |r| / |A| far below: Wedin's bound for what rounding allows.
    condition, eps = 1e10, torch.finfo(F64).eps
    M = tall(1000, 40, condition)
    b = M @ random(40, seed=8) + 1e-12 * random(1000, seed=9)
    solution = solve(Dense(M), b, SketchPrecondition(rtol=1e-14), throw=False)
    assert solution.status is SolveStatus.precision
    assert error_of(solution.value, least(M, b)) < condition * eps
    plain = solve(Dense(M), b, LSMR(rtol=1e-14, max_steps=400), throw=False)
    assert error_of(plain.value, least(M, b)) > 1e3 * condition * eps


def test_error_falls_as_the_theory_says() -> None:
    M, b = tall(2000, 50, 1e6), random(2000, seed=4)
    ratio = {}
    for oversampling in (2.0, 4.0, 16.0):
        solution = solve(
            Dense(M),
            b,
            SketchPrecondition(rtol=1e-10, sketch="gaussian", oversampling=oversampling),
        )
        ratio[oversampling] = 1e-10 ** (1 / solution.steps)
        # sqrt(n / s), Meng, Saunders and Mahoney 2014, theorem 4.2.
        assert ratio[oversampling] < 1.15 * math.sqrt(1 / oversampling)
    assert ratio[16.0] < ratio[4.0] < ratio[2.0]


def test_sketch_as_long_as_the_matrix_is_its_factorisation() -> None:
    M, b = tall(60, 20, 1e8), random(60)
    recipe = SketchPrecondition(rtol=1e-6, oversampling=3.0)
    assert recipe.prepare(Dense(M)).sketch is None
    solution = solve(Dense(M), b, recipe)
    assert solution.status is SolveStatus.least_squares
    assert solution.steps <= 1  # the start is the solution
    assert error_of(solution.value, least(M, b)) < 1e-6


@pytest.mark.parametrize("shape", [(300, 30), (30, 300), (50, 45)], ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.complex128], ids=str)
def test_rank_deficient(shape, dtype: torch.dtype) -> None:
    M = of_rank(6, *shape, dtype)
    double = dtype != torch.float32
    rtol = 1e-10 if double else 1e-4
    recipe = SketchPrecondition(rtol=rtol, rcond=1e-5)
    exact = torch.from_numpy(scipy.linalg.pinv(wide(M).numpy(), rtol=1e-5))
    for b, status in (
        (random(shape[0], dtype=dtype), SolveStatus.least_squares),
        (M @ random(shape[1], dtype=dtype, seed=3), SolveStatus.converged),
    ):
        solution = solve(Dense(M), b, recipe)
        assert solution.status is status
        assert solution.info["rank"] == 6
        assert error_of(solution.value, exact @ wide(b)) < 10 * rtol


def test_sparse_operators_and_functions_agree() -> None:
    matrix = scipy.sparse.random_array((300, 20), density=0.2, rng=3) + scipy.sparse.eye_array(
        300, 20
    )
    M, b = torch.from_numpy(matrix.toarray()), random(300)
    found = [
        solve(A, b, SketchPrecondition(rtol=1e-11))
        for A in (Dense(M), Sparse(matrix), function(M, set()))
    ]
    for solution in found:
        assert solution.status is SolveStatus.least_squares
        assert error_of(solution.value, least(M, b)) < 1e-9
    assert found[0].products == found[1].products == found[2].products


def test_counts_its_products() -> None:
    M, b, counted = tall(200, 10), random(200), []
    A = function(M, set())
    forward, backward = A._matmat, A._rmatmat

    def count(product, X: torch.Tensor) -> torch.Tensor:
        counted.append(X.shape[1])
        return product(X)

    A._matmat = lambda X: count(forward, X)
    A._rmatmat = lambda Y: count(backward, Y)
    solution = solve(A, b, SketchPrecondition(rtol=1e-8))
    assert solution.products == sum(counted)
    again = solve(A, b, state=solution.state)
    assert again.products == solution.products - 10


def test_state_serves_other_right_hand_sides() -> None:
    M = tall(condition=1e6)
    first = solve(Dense(M), random(400), SketchPrecondition())
    B = random(400, 3, seed=7)
    again = solve(Dense(M), B, SketchPrecondition(rtol=1e-10), state=first.state)
    assert again.status is SolveStatus.least_squares
    assert error_of(again.value, least(M, B)) < 1e-4


def test_pseudo_inverse_and_its_adjoint() -> None:
    M = tall(60, 12)
    pseudo_inverse = inverse(Dense(M), SketchPrecondition(rtol=1e-12))
    exact = torch.linalg.pinv(M)
    assert error_of(pseudo_inverse.to_dense(), exact) < 1e-9
    assert error_of(pseudo_inverse.rmatmat(random(12, 2)), exact.T @ random(12, 2)) < 1e-9


def test_gradient_with_respect_to_the_right_hand_side() -> None:
    M, b = tall(30, 5), random(30).requires_grad_()
    recipe = SketchPrecondition(rtol=1e-13, oversampling=2.0)
    assert torch.autograd.gradcheck(
        lambda b: solve(Dense(M), b, recipe, throw=False).value, b, rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(12, 4), (4, 12)], ids=str)
def test_derivatives_with_respect_to_the_matrix(shape) -> None:
    M, b = random(*shape).requires_grad_(), random(shape[0]).requires_grad_()
    recipe = SketchPrecondition(rtol=1e-14, oversampling=2.0)

    def value(M: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return solve(Dense(M), b, recipe, throw=False).value

    assert torch.autograd.gradcheck(value, (M, b), rtol=1e-4)
    assert torch.autograd.gradgradcheck(value, (M, b), rtol=1e-4)


def test_vmap_over_right_hand_sides() -> None:
    M = tall(60, 8)
    B = random(5, 60)
    found = torch.vmap(lambda b: solve(Dense(M), b, SketchPrecondition(rtol=1e-12)).value)(B)
    assert error_of(found.T, least(M, B.T)) < 1e-9


# ------------------------------------------------------------- any shape and spectrum


@hypothesis.given(
    m=st.integers(1, 30),
    n=st.integers(1, 30),
    rank=st.integers(1, 30),
    decades=st.floats(0, 6),
    seed=st.integers(0, 1000),
    inside=st.booleans(),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_shape_rank_and_spectrum(m, n, rank, decades: float, seed: int, inside: bool) -> None:
    rank = min(m, n, rank)
    U, _ = torch.linalg.qr(random(m, rank, seed=seed))
    V, _ = torch.linalg.qr(random(n, rank, seed=seed + 1))
    values = torch.logspace(0, -decades, rank, dtype=F64)
    M, x = (U * values) @ V.T, random(n, seed=seed + 2)
    b = M @ x if inside else random(m, seed=seed + 3)
    recipe = SketchPrecondition(rtol=1e-9, rcond=1e-9, oversampling=2.0, seed=seed)
    solution = solve(Dense(M), b, recipe, throw=False)
    assert solution.status.ok
    exact = (V / values) @ (U.T @ b)
    reached = float((b - M @ solution.value).norm())
    assert reached <= float((b - M @ exact).norm()) + 1e-8 * float(b.norm())
    assert solution.info["rank"] == rank
    # Forward error: what the residual allows at this condition number.
    scale = float(exact.norm()) + float(b.norm())
    assert float((solution.value - exact).norm()) <= 1e-7 * 10**decades * scale


# ------------------------------------------------------------------- edge cases


def test_columns_that_end_at_different_times() -> None:
    M = tall(condition=1e3)
    x = random(20)
    B = torch.stack([M @ x, torch.zeros(400, dtype=F64), random(400, seed=3)], 1)
    X0 = torch.zeros(20, 3, dtype=F64)
    X0[:, 0] = x
    solution = solve(Dense(M), B, SketchPrecondition(rtol=1e-9), x0=X0, history=True)
    assert solution.column_status == (
        SolveStatus.converged,
        SolveStatus.converged,
        SolveStatus.least_squares,
    )
    assert solution.info["column_steps"][:2] == [0, 0]
    assert solution.info["column_steps"][2] == solution.steps > 5
    assert torch.equal(solution.value[:, 1], torch.zeros(20, dtype=F64))
    assert len(solution.history) >= solution.steps


@pytest.mark.parametrize("shape", [(40, 10), (10, 40)], ids=str)
def test_zero_operator_and_zero_rows(shape) -> None:
    zero = solve(Dense(torch.zeros(shape, dtype=F64)), random(shape[0]), SketchPrecondition())
    assert torch.equal(zero.value, torch.zeros(shape[1], dtype=F64))
    assert zero.status is SolveStatus.least_squares
    M = random(*shape)
    M[3] = 0
    b = random(shape[0])
    solution = solve(Dense(M), b, SketchPrecondition(rtol=1e-11))
    assert solution.status is SolveStatus.least_squares
    assert error_of(solution.value, least(M, b)) < 1e-9


def test_multiple_of_the_identity_indefinite_and_one_by_one() -> None:
    b = random(12)
    for A, M in (
        (3.0 * Identity(12, dtype=F64), 3 * torch.eye(12, dtype=F64)),
        (Dense(torch.diag(torch.linspace(-1, 2, 12, dtype=F64))), None),
    ):
        M = A.to_dense() if M is None else M
        solution = solve(A, b, SketchPrecondition(rtol=1e-12))
        assert solution.status is SolveStatus.converged
        assert error_of(solution.value, torch.linalg.solve(M, b)) < 1e-10
    one = solve(
        Dense(torch.full((1, 1), -2.0, dtype=F64)), torch.ones(1, dtype=F64), SketchPrecondition()
    )
    assert torch.allclose(one.value, torch.tensor([-0.5], dtype=F64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    M = random(400, 200)
    b = M @ torch.ones(200, dtype=F64)
    solution = solve(Dense(M.to(dtype)), b.to(dtype), SketchPrecondition(rtol=3e-2))
    assert solution.status is SolveStatus.converged
    assert solution.info["rank"] == 200
    assert error_of(solution.value, torch.ones(200, dtype=F64)) < 0.2


@pytest.mark.parametrize("scale", [1e-300, 1e200])
def test_entries_whose_squares_leave_the_range(scale: float) -> None:
    M = scale * random(90, 4)
    solution = solve(Dense(M), M @ torch.ones(4, dtype=F64), SketchPrecondition(rtol=1e-10))
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, torch.ones(4, dtype=F64)) < 1e-9


def test_already_solved() -> None:
    M, x = tall(condition=1e3), random(20)
    A = function(M, set())
    recipe = SketchPrecondition(rtol=1e-9)
    solution = solve(A, M @ x, recipe, x0=x, state=recipe.prepare(A))
    assert (solution.status, solution.steps) == (SolveStatus.converged, 0)
    assert torch.equal(solution.value, x)
    assert solution.products == 2  # the residual, and that of the normal equations


def test_budget_of_zero_steps() -> None:
    M, b = tall(condition=1e3), random(400)
    solution = solve(Dense(M), b, SketchPrecondition(rtol=1e-12, max_steps=0), throw=False)
    assert solution.status is SolveStatus.max_steps
    assert solution.steps == 0
    best = float((b - M @ least(M, b)).norm() / b.norm())
    assert best < float(solution.residual) < 1.4 * best  # that of the sketched problem
    some = solve(Dense(M), b, SketchPrecondition(rtol=1e-14, max_steps=4), throw=False)
    assert some.status is SolveStatus.max_steps
    assert some.steps == 4


def test_seed_decides() -> None:
    A, b = Dense(tall()), random(400)
    first, second, other = (solve(A, b, SketchPrecondition(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first.value, second.value)
    assert not torch.equal(first.value, other.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite(bad: float) -> None:
    M, b = tall(), random(400)
    broken = M.clone()
    broken[7, 3] = bad
    with pytest.raises(NonFiniteError, match="sketch of Dense holds NaN or infinity"):
        solve(Dense(broken), b, SketchPrecondition())
    status = solve(Dense(broken), b, SketchPrecondition(), throw=False).status
    assert status is SolveStatus.non_finite
    b[5] = bad
    with pytest.raises(NonFiniteError, match="b are NaN or infinite"):
        solve(Dense(M), b, SketchPrecondition())


def test_what_is_refused() -> None:
    for options in (
        {"sketch": "rows"},
        {"oversampling": 1.0},
        {"nonzeros": 0},
        {"rcond": -0.1},
        {"rtol": -1.0},
        {"max_steps": -1},
    ):
        with pytest.raises(ArgumentError, match=f"{next(iter(options))} is"):
            SketchPrecondition(**options)
    A = function(tall(30, 5), set())
    A.out_space = Weighted(torch.ones(30, dtype=F64))
    with pytest.raises(StructureError, match="Weighted has an inner product of its own"):
        solve(A, random(30), SketchPrecondition())
