from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import scipy.sparse.linalg
import torch
from tests.solvers.systems import (
    DTYPES,
    N,
    definite,
    error_of,
    random,
    residual_of,
    solution_of,
    with_spectrum,
)
from tests.solvers.test_gmres import general, plain

from woodbury import GMRES, BiCGSTAB, Dense, Diagonal, solve
from woodbury.errors import ShapeError, SolveError
from woodbury.solvers import LU, Recipe, SolveReport, SolveStatus

F64 = torch.float64


# ---------------------------------------------------- mathematics of the method


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_general_systems(dtype) -> None:
    M, b = general(dtype=dtype), random(N, 3, dtype=dtype)
    rtol = 1e-10 if dtype in (F64, torch.complex128) else 1e-5
    solution = solve(plain(M), b, BiCGSTAB(rtol=rtol))
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, solution_of(M, b)) < 20 * rtol
    assert solution.products <= 2 * sum(solution.info["column_steps"]) + 6


def test_the_textbook_step_by_step() -> None:
    M, b = general(), random(N)
    x, r = torch.zeros(N, dtype=F64), b.clone()
    shadow, p = b.clone(), b.clone()
    for step in range(1, 6):
        v = M @ p
        alpha = (shadow @ r) / (shadow @ v)
        s = r - alpha * v
        t = M @ s
        omega = (t @ s) / (t @ t)
        x = x + alpha * p + omega * s
        new = s - omega * t
        p = new + (shadow @ new) / (shadow @ r) * alpha / omega * (p - omega * v)
        r = new
        found = solve(plain(M), b, BiCGSTAB(rtol=0.0, max_steps=step), throw=False, history=True)
        assert error_of(found.value, x) < 1e-11
        assert float(found.history[-1]) == pytest.approx(float(r.norm() / b.norm()), rel=1e-9)


def test_each_step_minimises_along_its_second_direction() -> None:
    # With one step x = alpha p + omega s, and omega makes the residual orthogonal to t = A s.
    M, b = general(), random(N)
    found = solve(plain(M), b, BiCGSTAB(rtol=0.0, max_steps=1), throw=False)
    v = M @ b
    s = b - (b @ b) / (b @ v) * v
    r = b - M @ found.value
    assert abs(float(r @ (M @ s))) < 1e-12 * float(r.norm() * (M @ s).norm()) + 1e-13


def test_as_many_steps_as_the_degree_of_the_minimal_polynomial() -> None:
    M = torch.diag(torch.tensor([1.0] * 9 + [4.0] * 8 + [9.0] * 7, dtype=F64))
    solution = solve(plain(M), random(N), BiCGSTAB(rtol=1e-10))
    assert solution.steps == 3


def test_same_steps_as_scipy() -> None:
    theirs = ours = 0
    for seed in range(6):
        M = general(100, seed=seed) + torch.diag(torch.linspace(0, 5, 100, dtype=F64))
        b = random(100, seed=seed + 1)
        count: list[int] = []
        scipy.sparse.linalg.bicgstab(
            M.numpy(), b.numpy(), rtol=1e-8, callback=lambda x: count.append(1)
        )
        theirs += len(count)
        ours += solve(plain(M), b, BiCGSTAB(rtol=1e-8)).steps
    # Where the first half of a step does it, SciPy does not count the step.
    assert theirs - 6 <= ours <= theirs + 6


@hypothesis.given(n=st.integers(1, 12), seed=st.integers(0, 1000), columns=st.integers(1, 3))
@hypothesis.settings(max_examples=60, deadline=None)
def test_random_systems(n: int, seed: int, columns: int) -> None:
    M, b = general(n, seed=seed), random(n, columns, seed=seed + 1)
    condition = float(torch.linalg.cond(M))
    hypothesis.assume(condition < 30)
    solution = solve(plain(M), b, BiCGSTAB(rtol=1e-9, max_steps=500))
    assert solution.status is SolveStatus.converged
    assert (residual_of(M, solution.value, b) <= 1.001e-9).all()


# ------------------------------------------------------------- preconditioner


def test_exact_inverse_takes_one_step() -> None:
    M, b = general(), random(N, 2)
    solution = solve(plain(M), b, BiCGSTAB(rtol=1e-10, preconditioner=LU()))
    assert solution.info["column_steps"] == [1, 1]
    assert (residual_of(M, solution.value, b) < 1e-10).all()


def test_preconditioned_equals_the_product_by_hand() -> None:
    M, b, P = general(), random(N), torch.linalg.inv(general(seed=5))
    recipe = BiCGSTAB(rtol=0.0, max_steps=4, preconditioner=Dense(P))
    left = solve(plain(M), b, recipe, throw=False)
    right = solve(plain(M @ P), b, BiCGSTAB(rtol=0.0, max_steps=4), throw=False)
    assert error_of(left.value, P @ right.value) < 1e-10


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_the_transposed_solve_has_the_adjoint_of_the_preconditioner(dtype) -> None:
    M = general(dtype=dtype)
    b, weights = random(N, dtype=dtype).requires_grad_(), random(N, dtype=dtype, seed=3)
    report = SolveReport()
    recipe = BiCGSTAB(rtol=1e-10, preconditioner=Dense(torch.linalg.inv(M)))
    value = solve(plain(M), b, recipe, report=report).value
    torch.vdot(weights, value).real.backward()
    assert report.last.steps == 1
    assert error_of(b.grad, solution_of(M.mH, weights)) < 1e-9


def test_unfit_preconditioner_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"shape \(3, 3\)"):
        solve(
            plain(general()), random(N), BiCGSTAB(preconditioner=Diagonal(torch.ones(3, dtype=F64)))
        )


# --------------------------------------------------------- what may go wrong


def test_a_breakdown_of_the_first_kind_is_overcome_by_another_shadow() -> None:
    # <r, A r> = 0 for the first residual, so that alpha does not exist.
    M = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 2.0]], dtype=F64)
    b = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    solution = solve(plain(M), b, BiCGSTAB(rtol=1e-10))
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, solution_of(M, b)) < 1e-9


def test_a_breakdown_that_stays_is_a_status() -> None:
    # <t, s> = 0 for every s, as A is skew: there is no second half of a step.
    M = random(N, N)
    M = M - M.T
    b = random(N, 2)
    solution = solve(plain(M), b, BiCGSTAB(), throw=False)
    assert solution.column_status == (SolveStatus.breakdown,) * 2
    assert (solution.residual <= 1).all()
    assert torch.isfinite(solution.value).all()
    with pytest.raises(SolveError, match="breakdown in 2 of 2"):
        solve(plain(M), b, BiCGSTAB())


def test_the_best_iterate_is_returned() -> None:
    M, b = definite(60, condition=1e8), random(60, 2)
    solution = solve(plain(M), b, BiCGSTAB(rtol=1e-12, max_steps=40), throw=False, history=True)
    assert solution.status is SolveStatus.max_steps
    assert torch.allclose(solution.residual, solution.history.amin(dim=0), rtol=1e-3)
    assert (solution.history[-1] > solution.residual * 1.01).any(), "the last was best: no test"


def test_drift_of_the_recurrence_is_found() -> None:
    M, b = general(60), random(60)
    solution = solve(plain(M), b, BiCGSTAB(rtol=1e-11), x0=1e9 * random(60, seed=3))
    assert solution.status is SolveStatus.converged
    assert float(residual_of(M, solution.value, b)) <= 1.001e-11


def test_stagnation_where_the_product_is_too_rough() -> None:
    M = general(60)
    A = plain(M)
    A._forward = lambda X: (M @ X).float().double()  # errors far above those of float64
    solution = solve(A, random(60), BiCGSTAB(rtol=1e-13), throw=False)
    assert solution.status in (SolveStatus.stagnation, SolveStatus.breakdown)
    assert 1e-13 < solution.residual < 1e-5


def test_preconditioner_with_nan_is_found() -> None:
    P = plain(torch.full((N, N), math.nan, dtype=F64))
    solution = solve(plain(general()), random(N), BiCGSTAB(preconditioner=P), throw=False)
    assert solution.status is SolveStatus.non_finite
    assert not solution.value.any()


@pytest.mark.parametrize("recipe", [BiCGSTAB(), GMRES(), GMRES(restart=3)], ids=repr)
def test_what_a_failure_returns_is_no_worse_than_the_start(recipe: Recipe) -> None:
    """Singular and symmetric, not consistent: coefficients of the size of 1 / eps arise."""
    for seed in range(40):
        spectrum = 0.2 + random(6, seed=seed).abs()
        spectrum[0], spectrum[1] = 0.0, -spectrum[1]
        A, b = Dense(with_spectrum(spectrum, seed=seed)), random(6, seed=seed + 1000)
        far = 1e3 * random(6, seed=seed + 2000)
        for x0 in (None, far):
            solution = solve(A, b, recipe, x0=x0, throw=False)
            start = 1.0 if x0 is None else float((b - A @ far).norm() / b.norm())
            found = float((b - A @ solution.value).norm() / b.norm())
            # GMRES may take the system for one whose condition number is 1 / eps.
            assert not solution.ok or solution.status is SolveStatus.precision
            assert found <= start * (1 + 1e-12), (seed, solution)
            assert float(solution.residual) == pytest.approx(found, rel=1e-6)


def test_badly_scaled_entries_do_not_overflow_a_scalar() -> None:
    """Squares of scalar products may leave the range of floats although the products do not."""
    A = Dense(torch.diag(torch.logspace(-150, 150, 6, dtype=F64)))
    for seed in range(20):
        b = random(6, 3, seed=seed)
        for steps in (1, 7, None):
            solution = solve(A, b, BiCGSTAB(max_steps=steps), throw=False)
            assert bool((solution.residual <= 1 + 1e-12).all()), (seed, solution)
