from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
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
    with_spectrum,
)

from woodbury import CG, MINRES, Dense, Diagonal, Nystrom, solve
from woodbury.errors import DtypeError, ShapeError, SolveError, TagError
from woodbury.solvers import SolveStatus

F64 = torch.float64


def hermitian(M: torch.Tensor):
    return function(M, {"hermitian"})


def signed(n: int = N, *, low: float = 0.2) -> torch.Tensor:
    """Eigenvalues of both signs, moduli from ``low`` to 1."""
    return torch.linspace(low, 1, n, dtype=F64) * (-1) ** torch.arange(n)


def singular(dtype: torch.dtype = F64, *, condition: float = 5.0) -> torch.Tensor:
    """Three eigenvalues are zero, the others of both signs."""
    moduli = torch.logspace(-math.log10(condition), 0, N - 3, dtype=F64)
    return with_spectrum(
        torch.cat([torch.zeros(3, dtype=F64), moduli * (-1) ** torch.arange(N - 3)]), dtype=dtype
    )


def pseudo_inverse(M: torch.Tensor) -> torch.Tensor:
    return torch.linalg.pinv(wide(M), hermitian=True, rtol=1e-6)


# ---------------------------------------------------- mathematics of the method


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_each_iterate_minimises_the_residual_in_its_krylov_space(dtype) -> None:
    M, b = with_spectrum(signed(12), dtype=dtype), random(12, dtype=dtype)
    krylov = [b]
    for step in range(1, 7):
        basis, _ = torch.linalg.qr(torch.stack(krylov, dim=1))
        best = basis @ torch.linalg.lstsq(M @ basis, b.unsqueeze(1)).solution.squeeze(1)
        found = solve(hermitian(M), b, MINRES(rtol=0.0, max_steps=step), throw=False, history=True)
        assert found.status is SolveStatus.max_steps
        assert error_of(found.value, best) < 1e-9
        assert float(found.history[-1]) == pytest.approx(float(found.residual), rel=1e-9)
        krylov.append(M @ krylov[-1])


def test_preconditioned_iterates_minimise_in_the_norm_of_the_preconditioner() -> None:
    M, b, P = with_spectrum(signed(12)), random(12), definite(12, condition=20, seed=3)
    root = torch.linalg.cholesky(P)
    recipe = MINRES(rtol=0.0, max_steps=5, preconditioner=Dense(P, tags={"positive_definite"}))
    left = solve(hermitian(M), b, recipe, throw=False, history=True)
    # P = L L^H: the same as plain MINRES for L^H M L, with x = L y.
    scaled = root.mH @ M @ root
    right = solve(
        hermitian((scaled + scaled.mH) / 2), root.mH @ b, MINRES(rtol=0.0, max_steps=5), throw=False
    )
    assert error_of(left.value, root @ right.value) < 1e-9
    # The residual that is carried along is the true one.
    assert float(left.history[-1]) == pytest.approx(float(left.residual), rel=1e-8)


def test_residuals_never_rise() -> None:
    solution = solve(
        hermitian(with_spectrum(signed())), random(N), MINRES(rtol=1e-10), history=True
    )
    assert (solution.history[1:] <= solution.history[:-1] * (1 + 1e-12)).all()


def test_as_many_steps_as_distinct_eigenvalues() -> None:
    spectrum = torch.tensor([1.0] * 20 + [-4.0] * 15 + [9.0] * 5, dtype=F64)
    solution = solve(hermitian(with_spectrum(spectrum)), random(40), MINRES(rtol=1e-11))
    assert solution.steps == 3
    assert solution.products == 4


def test_no_more_steps_than_conjugate_gradients() -> None:
    # CG minimises another norm; in that of the residual MINRES is ahead in every step.
    M, b = definite(200, condition=1e3), random(200)
    A = function(M, {"positive_definite"})
    slow, fast = (solve(A, b, kind(rtol=1e-8)) for kind in (CG, MINRES))
    assert fast.steps <= slow.steps
    assert fast.steps > 0.8 * slow.steps


@hypothesis.given(
    moduli=st.lists(st.floats(1e-2, 1e2), min_size=1, max_size=12),
    signs=st.integers(0, 4095),
    seed=st.integers(0, 1000),
    columns=st.integers(1, 3),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_random_spectra(moduli: list[float], signs: int, seed: int, columns: int) -> None:
    n = len(moduli)
    bits = torch.tensor([-1.0 if signs >> j & 1 else 1.0 for j in range(n)], dtype=F64)
    M = with_spectrum(torch.tensor(moduli, dtype=F64) * bits, seed=seed)
    b = random(n, columns, seed=seed + 1)
    solution = solve(hermitian(M), b, MINRES(rtol=1e-8, max_steps=500))
    assert solution.status is SolveStatus.converged
    assert (residual_of(M, solution.value, b) <= 1.001e-8).all()
    assert error_of(solution.value, solution_of(M, b)) < 1e-8 * 1e4 * 10


# ------------------------------------------------------------ singular systems


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_singular_and_consistent_gives_the_solution_of_smallest_norm(dtype) -> None:
    M = singular(dtype)
    b = M @ random(N, 2, dtype=dtype)
    rtol = 1e-10 if dtype in (F64, torch.complex128) else 1e-4
    solution = solve(hermitian(M), b, MINRES(rtol=rtol))
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, pseudo_inverse(M) @ wide(b)) < 30 * rtol
    assert "normal_residual" not in solution.info


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inconsistent_is_found_and_solved_by_the_pseudo_inverse(dtype) -> None:
    M, b = singular(dtype), random(N, 2, dtype=dtype)
    exact = pseudo_inverse(M) @ wide(b)
    solution = solve(hermitian(M), b, MINRES(), throw=False)
    double = dtype in (F64, torch.complex128)
    assert solution.column_status == (SolveStatus.inconsistent,) * 2
    assert error_of(solution.value, exact) < (1e-8 if double else 1e-3)
    assert torch.allclose(solution.residual, residual_of(M, exact, b), rtol=1e-5)
    assert max(solution.info["normal_residual"]) < (1e-9 if double else 1e-3)
    assert solution.steps < 3 * N
    with pytest.raises(SolveError, match="inconsistent in 2 of 2 columns"):
        solve(hermitian(M), b, MINRES())


def test_inconsistent_beside_consistent_columns() -> None:
    M, b = singular(), random(N, 3)
    b[:, 1] = M @ b[:, 1]
    b[:, 2] = 0
    solution = solve(hermitian(M), b, MINRES(rtol=1e-9), throw=False)
    names = [status.name for status in solution.column_status]
    assert names == ["inconsistent", "converged", "converged"]
    assert error_of(solution.value, pseudo_inverse(M) @ b) < 1e-7
    normal = solution.info["normal_residual"]
    assert normal[0] < 1e-9
    assert math.isnan(normal[1])
    assert normal[2] == 0


def test_inconsistent_from_a_start_keeps_what_the_start_has_in_the_null_space() -> None:
    M, b = singular(), random(N)
    start = random(N, seed=7)
    null = torch.linalg.eigh(M)
    null = null.eigenvectors[:, null.eigenvalues.abs() < 1e-10]
    solution = solve(hermitian(M), b, MINRES(), x0=start, throw=False)
    assert solution.status is SolveStatus.inconsistent
    exact = pseudo_inverse(M) @ b + null @ (null.T @ start)
    assert error_of(solution.value, exact) < 1e-7


def test_inconsistent_with_a_preconditioner_minimises_its_norm() -> None:
    M, b, P = singular(), random(N), definite(condition=10, seed=3)
    recipe = MINRES(preconditioner=Dense(P, tags={"positive_definite"}))
    solution = solve(hermitian(M), b, recipe, throw=False)
    assert solution.status is SolveStatus.inconsistent
    r = b - M @ solution.value
    assert (M @ (P @ r)).norm() < 1e-6 * r.norm()
    assert solution.info["normal_residual"][0] < 1e-6


def test_badly_conditioned_is_not_taken_for_singular() -> None:
    M = with_spectrum(torch.logspace(-8, 0, 60, dtype=F64) * (-1) ** torch.arange(60))
    b = M @ random(60)
    solution = solve(hermitian(M), b, MINRES(rtol=1e-10, max_steps=4000))
    assert solution.status is SolveStatus.converged
    assert float(residual_of(M, solution.value, b)) <= 1.001e-10


# -------------------------------------------------------------- preconditioner


def test_exact_inverse_of_the_modulus_takes_two_steps() -> None:
    M, b = with_spectrum(signed(low=1e-3)), random(N)
    eigenvalues, vectors = torch.linalg.eigh(M)
    P = (vectors / eigenvalues.abs()) @ vectors.T
    P = Dense((P + P.T) / 2, tags={"positive_definite"})
    solution = solve(hermitian(M), b, MINRES(rtol=1e-9, preconditioner=P))
    assert solution.steps == 2  # the preconditioned eigenvalues are 1 and -1
    assert float(residual_of(M, solution.value, b)) <= 1.001e-9


def test_preconditioner_that_is_not_definite_is_found() -> None:
    P = Diagonal(torch.cat([torch.ones(N - 1, dtype=F64), torch.tensor([-9.0], dtype=F64)]))
    b = torch.zeros(N, 2, dtype=F64)
    b[-1, 0] = 1  # at the start
    b[:, 1] = 1  # on the way
    solution = solve(hermitian(definite()), b, MINRES(preconditioner=P), throw=False)
    assert solution.column_status == (SolveStatus.indefinite_preconditioner,) * 2
    assert torch.isfinite(solution.value).all()
    assert (solution.residual <= 1).all()


def test_preconditioner_with_nan_is_found() -> None:
    P = function(torch.full((N, N), math.nan, dtype=F64), {"positive_definite"})
    solution = solve(hermitian(definite()), random(N), MINRES(preconditioner=P), throw=False)
    assert solution.status is SolveStatus.non_finite
    assert not solution.value.any()


@pytest.mark.parametrize(
    ("preconditioner", "error", "message"),
    [
        (function(definite(), set()), TagError, "MINRES needs one that is hermitian"),
        (Diagonal(torch.ones(3, dtype=F64)), ShapeError, r"shape \(3, 3\)"),
        (Diagonal(torch.ones(N)), DtypeError, "float32, the operator torch.float64"),
        (MINRES(), TagError, "MINRES is not a fixed linear function"),
    ],
)
def test_unfit_preconditioner_is_refused(preconditioner, error, message) -> None:
    with pytest.raises(error, match=message):
        solve(hermitian(definite()), random(N), MINRES(preconditioner=preconditioner))


def test_needs_a_hermitian_operator() -> None:
    with pytest.raises(TagError, match="MINRES needs the tag 'hermitian'"):
        solve(function(definite(), set()), random(N), MINRES())


# --------------------------------------------------------- what may go wrong


def test_stagnation_where_the_product_is_too_rough() -> None:
    M = definite(60, condition=100)
    A = hermitian(M)
    A._forward = lambda X: (M @ X).float().double()  # errors far above those of float64
    solution = solve(A, random(60), MINRES(rtol=1e-12), throw=False)
    assert solution.status is SolveStatus.stagnation
    assert 1e-12 < solution.residual < 1e-5


def test_drift_of_the_recurrence_is_found() -> None:
    M, b = definite(60, condition=100), random(60)
    solution = solve(hermitian(M), b, MINRES(rtol=1e-11), x0=1e9 * random(60, seed=3))
    assert solution.status is SolveStatus.converged
    assert float(residual_of(M, solution.value, b)) <= 1.001e-11


def test_gradient_carries_the_preconditioner_along() -> None:
    M, b = definite(200, condition=1e6), random(200).requires_grad_()
    A = function(M, {"hermitian", "positive_definite"})
    recipe = MINRES(rtol=1e-9, preconditioner=Nystrom(rank=200))
    solution = solve(A, b, recipe)
    weights = random(200, seed=4)
    (solution.value @ weights).backward()
    assert error_of(b.grad, solution_of(M, weights)) < 1e-2
    assert error_of(M @ b.grad, weights) < 1e-7


def test_what_a_failure_returns_is_no_worse_than_the_start() -> None:
    """The matrix of Hilbert: an iterate of stagnation was 1e8 times b away."""
    places = torch.arange(12, dtype=torch.float64)
    M = 1 / (places[:, None] + places + 1)
    A = Dense(M, tags={"positive_definite"})
    for seed in range(20):
        b = random(12, seed=seed)
        solution = solve(A, b, MINRES(), throw=False)
        found = float((b - M @ solution.value).norm() / b.norm())
        assert found <= 1 + 1e-12, (seed, solution)
        assert float(solution.residual) == pytest.approx(found, rel=1e-4, abs=1e-6)
