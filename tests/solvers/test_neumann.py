from __future__ import annotations

import math

import pytest
import torch
from tests.solvers.systems import (
    N,
    definite,
    error_of,
    eye,
    function,
    random,
    solution_of,
    with_spectrum,
)

from woodbury import CG, Dense, Diagonal, GaussSeidel, Identity, Jacobi, Neumann, inverse, solve
from woodbury.errors import ArgumentError, NonFiniteError, SolveError, TagError
from woodbury.solvers import SolveStatus

F64 = torch.float64


def spd(M: torch.Tensor):
    return function(M, {"positive_definite"})


def powers(M: torch.Tensor, b: torch.Tensor, terms: int, step: float) -> torch.Tensor:
    """The K + 1 summands, each power formed."""
    G = torch.eye(M.shape[0], dtype=M.dtype) - step * M
    return step * sum(torch.linalg.matrix_power(G, j) @ b for j in range(terms + 1))


@pytest.mark.parametrize("terms", [0, 1, 2, 7, 30])
def test_k_terms_are_k_plus_one_summands_times_the_step(terms: int) -> None:
    M, B = definite(), random(N, 2)
    solution = solve(spd(M), B, Neumann(terms, step=0.7))
    assert error_of(solution.value, powers(M, B, terms, 0.7)) < 1e-12
    assert solution.status is SolveStatus.completed
    assert solution.products == 2 * (terms + 1)
    assert solution.steps == terms


@pytest.mark.parametrize("terms", [0, 1, 5, 40])
def test_error_is_bounded_by_the_power_of_the_norm(terms: int) -> None:
    M, b = definite(condition=10), random(N)
    step = 0.9
    exact = solution_of(M, b)
    norm = float(torch.linalg.matrix_norm(eye(N) - step * M, 2))
    error = error_of(solve(spd(M), b, Neumann(terms, step=step)).value, exact)
    assert error <= norm ** (terms + 1) * (1 + 1e-10) + 1e-14
    # The bound is sharp along the slowest eigenvector.
    slow = torch.linalg.eigh(M).eigenvectors[:, 0]
    found = solve(spd(M), slow, Neumann(terms, step=step)).value
    assert error_of(found, solution_of(M, slow)) == pytest.approx(norm ** (terms + 1), rel=1e-6)


def test_many_terms_equal_conjugate_gradients() -> None:
    M, b = definite(condition=10), random(N)
    series = solve(spd(M), b, Neumann(terms=300))
    assert error_of(series.value, solve(spd(M), b, CG(rtol=1e-13)).value) < 1e-10
    assert series.residual < 1e-11


def test_equals_unrolled_gradient_descent_at_the_solution() -> None:
    # Unrolling K steps from w* and differentiating gives the terms j = 0 .. K - 1.
    M, a = definite(8), random(8)
    K, step = 6, 0.5
    shift = torch.zeros(8, dtype=F64, requires_grad=True)
    w = torch.zeros(8, dtype=F64)
    for _ in range(K):
        w = w - step * (M @ w + shift)
    (unrolled,) = torch.autograd.grad(w @ a, shift)
    assert error_of(-unrolled, solve(spd(M), a, Neumann(K - 1, step=step)).value) < 1e-12


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_step_is_found_for_any_scale(scale: float) -> None:
    M, b = scale * definite(condition=5), random(N)
    solution = solve(spd(M), b, Neumann(terms=80))
    largest = scale
    # Below two over the largest eigenvalue there is convergence; one over it is the classic step.
    assert 0.5 / largest < solution.info["step"] <= 1.0001 / largest
    assert solution.residual < 1e-5
    assert solution.state.products == 10
    assert solution.products == 10 + 80 + 1


def test_history_is_the_residual_of_the_partial_sums() -> None:
    M, b = definite(), random(N)
    solution = solve(spd(M), b, Neumann(terms=4, step=0.8), history=True)
    expected = [1.0] + [float((b - M @ powers(M, b, k, 0.8)).norm() / b.norm()) for k in range(5)]
    assert solution.history.tolist() == pytest.approx(expected)


# ----------------------------------------------------------------- divergence


def test_step_too_large_is_found_and_the_best_sum_returned() -> None:
    M, B = definite(condition=10), random(N, 2)
    A = spd(M)
    solution = solve(A, B, Neumann(terms=500, step=2.5), throw=False)
    assert solution.column_status == (SolveStatus.diverged,) * 2
    assert torch.isfinite(solution.value).all()
    best = [
        min(float((B[:, j] - M @ powers(M, B[:, j], k, 2.5)).norm()) for k in range(30))
        for j in range(2)
    ]
    found = (B - M @ solution.value).norm(dim=0)
    for j in range(2):
        assert float(found[j]) <= 1.02 * min(best[j], float(B[:, j].norm()))
    assert torch.allclose(solution.residual, found / B.norm(dim=0))
    with pytest.raises(SolveError, match="the series diverges.*lower the step"):
        solve(A, B, Neumann(terms=500, step=2.5))


def test_negative_eigenvalue_is_found_when_it_takes_over() -> None:
    M = with_spectrum(torch.linspace(-0.1, 1, N, dtype=F64))
    A, b = function(M, {"hermitian"}), random(N)
    few = solve(A, b, Neumann(terms=3))
    assert few.status is SolveStatus.completed
    assert error_of(few.value, powers(M, b, 3, few.info["step"])) < 1e-12
    assert solve(A, b, Neumann(terms=200), throw=False).status is SolveStatus.diverged


def test_one_column_diverges_and_the_other_does_not() -> None:
    A = Diagonal(torch.tensor([1.0, 5.0], dtype=F64))
    B = eye(2)
    solution = solve(A, B, Neumann(terms=400, step=0.5), throw=False)
    assert solution.column_status == (SolveStatus.completed, SolveStatus.diverged)
    assert torch.allclose(solution.value[:, 0], torch.tensor([1.0, 0.0], dtype=F64))
    assert solution.residual[1] <= 1


def test_powers_that_grow_before_they_fall() -> None:
    M = eye(10) + 3 * torch.diag(torch.ones(9, dtype=F64), 1)
    A, b = function(M, set()), random(10)
    solution = solve(A, b, Neumann(terms=9, step=1.0), history=True)
    # The shift is nilpotent: ten summands are the inverse.
    assert error_of(solution.value, solution_of(M, b)) < 1e-10
    assert solution.history.max() > 10
    diverging = solve(A, b, Neumann(terms=2000, step=2.2), throw=False)
    assert diverging.status is SolveStatus.diverged
    assert torch.isfinite(diverging.value).all()


def test_converged_to_rounding_is_not_taken_for_divergence() -> None:
    for dtype in (F64, torch.float32):
        M, b = definite(condition=3, dtype=dtype), random(N, dtype=dtype)
        solution = solve(spd(M), b, Neumann(terms=400))
        assert solution.status is SolveStatus.completed
        assert solution.residual < 50 * torch.finfo(dtype).eps


# ------------------------------------------------------------- what is refused


def test_step_is_needed_where_it_cannot_be_found() -> None:
    A = function(definite() + torch.triu(random(N, N), 1), set())
    with pytest.raises(TagError, match=r"hermitian operators only.*give step"):
        solve(A, random(N), Neumann(terms=3))


def test_zero_operator() -> None:
    solution = solve(0.0 * Identity(N, dtype=F64), random(N), Neumann(terms=3))
    assert torch.allclose(solution.value, 4 * random(N))  # the step is 1
    assert solution.residual == 1


@pytest.mark.parametrize(
    "options",
    [{"terms": -1}, {"terms": 1, "step": 0.0}, {"terms": 1, "step": math.nan}],
    ids=str,
)
def test_arguments_out_of_range(options) -> None:
    with pytest.raises(ArgumentError, match="it must be"):
        Neumann(**options)


def test_largest_eigenvalue_out_of_range() -> None:
    with pytest.raises(NonFiniteError):
        solve(spd(torch.full((3, 3), math.inf, dtype=F64)), random(3), Neumann(terms=1))
    tiny = Diagonal(torch.full((3,), 1e-310, dtype=F64), tags={"positive_definite"})
    with pytest.raises(NonFiniteError, match="there is no step"):
        solve(tiny, random(3), Neumann(terms=1))


# ------------------------------------------------------------ with a preconditioner


@pytest.mark.parametrize("terms", [0, 1, 2, 7])
def test_preconditioned_series_is_its_summands(terms: int) -> None:
    M, B, P = definite(), random(N, 2), definite(condition=5, seed=7)
    G = eye(N) - 0.7 * P @ M
    want = 0.7 * sum(torch.linalg.matrix_power(G, j) @ P @ B for j in range(terms + 1))
    for b in (B, B[:, 0].contiguous()):
        solution = solve(spd(M), b, Neumann(terms, step=0.7, preconditioner=spd(P)))
        assert error_of(solution.value, want if b.dim() == 2 else want[:, 0]) < 1e-12
        assert solution.status is SolveStatus.completed
    recipe = Neumann(terms, step=0.7, preconditioner=spd(P))
    operator = recipe.as_preconditioner(spd(M), recipe.prepare(spd(M)))
    assert error_of(operator @ B, want) < 1e-12
    assert error_of(operator.to_dense(), operator.to_dense().mT) < 1e-12


def test_preconditioner_finds_its_step_and_saves_terms() -> None:
    scales = torch.logspace(0, 3, N, dtype=F64)
    M = scales[:, None] * definite(condition=5) * scales
    A, b = spd(M), random(N)
    helped = solve(A, b, Neumann(terms=60, preconditioner=Jacobi()))
    assert helped.residual < 1e-4 < solve(A, b, Neumann(terms=60)).residual
    jacobi = M / M.diagonal()[:, None]
    top = float(torch.linalg.eigvals(jacobi).real.max())
    assert helped.info["step"] == pytest.approx(1 / top, rel=0.05)
    assert error_of(solve(A, b, CG(preconditioner=Neumann(2, None, Jacobi()))).value, b) > 0


def test_preconditioned_series_of_a_nonsymmetric_matrix_and_its_adjoint() -> None:
    M = 3 * eye(N) + 0.3 * random(N, N)
    A, c = Dense(M), random(N)
    recipe = Neumann(terms=5, step=0.9, preconditioner=GaussSeidel())
    backward = inverse(A, recipe).rmatmat(c)
    forward = inverse(A, recipe).to_dense()
    assert error_of(backward, forward.T @ c) < 1e-12
    b = random(N).requires_grad_(True)
    (gradient,) = torch.autograd.grad(solve(A, b, recipe).value @ c, b)
    assert error_of(gradient, forward.T @ c) < 1e-12


def test_preconditioned_series_that_diverges() -> None:
    A, b = spd(definite()), random(N)
    solution = solve(A, b, Neumann(500, step=50.0, preconditioner=Jacobi()), throw=False)
    assert solution.status is SolveStatus.diverged
    assert torch.isfinite(solution.value).all()
