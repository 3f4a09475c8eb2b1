"""Chebyshev's iteration against the polynomial itself."""

from __future__ import annotations

import math

import pytest
import scipy.sparse
import torch
from tests.solvers.systems import N, definite, error_of, function, random, with_spectrum

from woodbury import CG, SSOR, Chebyshev, Diagonal, Jacobi, Sparse, solve
from woodbury.solvers import SolveStatus

F64 = torch.float64


def spd(M: torch.Tensor):
    return function(M, {"positive_definite"})


def polynomial(k: int, x: float) -> float:
    """``T_k(x)``."""
    return math.cosh(k * math.acosh(x)) if x > 1 else math.cos(k * math.acos(max(x, -1.0)))


@pytest.mark.parametrize("condition", [1.0 + 1e-9, 10.0, 1e3])
def test_residual_is_the_shifted_chebyshev_polynomial(condition: float) -> None:
    M, b = definite(condition=condition), random(N)
    values, vectors = torch.linalg.eigh(M)
    low, high = float(values[0]), float(values[-1])
    theta, delta = (high + low) / 2, (high - low) / 2
    for k in (1, 2, 3, 10, 25):
        factors = [
            polynomial(k, float((theta - value) / delta)) / polynomial(k, theta / delta)
            for value in values
        ]
        want = vectors @ (torch.tensor(factors, dtype=F64) * (vectors.T @ b))
        recipe = Chebyshev(bounds=(low, high), degree=k - 1)
        A = spd(M)
        x = recipe.as_preconditioner(A, recipe.prepare(A)) @ b
        assert float((b - M @ x - want).norm()) < 1e-9 * float(b.norm())


def test_bound_on_the_laplacian_of_a_line() -> None:
    n = 100
    matrix = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n))
    A = Sparse(matrix, tags={"positive_definite"})
    low, high = (2 - 2 * math.cos(k * math.pi / (n + 1)) for k in (1, n))
    ratio = (high + low) / (high - low)
    history = solve(
        A, random(n), Chebyshev(bounds=(low, high), rtol=1e-8, max_steps=3000), history=True
    ).history
    bounds = torch.tensor([1 / polynomial(k, ratio) for k in range(3000)], dtype=F64)
    assert (history <= bounds[: len(history)] * (1 + 1e-9)).all()
    # The bound is reached along the eigenvector of an end of the spectrum.
    slow = torch.sin(math.pi / (n + 1) * torch.arange(1, n + 1, dtype=F64))
    history = solve(
        A, slow, Chebyshev(bounds=(low, high), rtol=1e-8, max_steps=3000), history=True
    ).history
    assert torch.allclose(history, bounds[: len(history)], rtol=1e-6)
    # As many steps as conjugate gradients are promised.
    rate = (math.sqrt(high / low) - 1) / (math.sqrt(high / low) + 1)
    assert len(history) - 1 <= math.ceil(math.log(1e-8 / 2) / math.log(rate))


def test_bounds_that_are_found_hold_the_top_of_the_spectrum() -> None:
    for condition in (2.0, 100.0, 1e4):
        M, b = definite(100, condition=condition), random(100)
        solution = solve(spd(M), b, Chebyshev(rtol=1e-6, max_steps=20_000))
        low, high = solution.info["bounds"]
        assert 0 < low < high
        assert high >= 1.0
        assert solution.products == solution.steps + 20
        exact = solve(spd(M), b, Chebyshev(rtol=1e-6, max_steps=20_000, bounds=(1 / condition, 1)))
        assert solution.steps <= 2 * exact.steps


def test_far_fewer_steps_than_richardson_would_need() -> None:
    M, b = definite(condition=1e4), random(N)
    solution = solve(spd(M), b, Chebyshev(bounds=(1e-4, 1.0), rtol=1e-6, max_steps=2000))
    assert solution.ok
    assert solution.steps < 900  # Richardson: about 1e4 ln(1e6) / 2 = 70,000


def test_eigenvalue_beyond_the_bounds_diverges() -> None:
    A = Diagonal(torch.linspace(1.0, 10.0, 50, dtype=F64), tags={"positive_definite"})
    solution = solve(A, random(50), Chebyshev(bounds=(1.0, 8.0), max_steps=1000), throw=False)
    assert solution.status is SolveStatus.diverged
    assert float(solution.residual) <= 1
    below = solve(A, random(50), Chebyshev(bounds=(2.0, 10.0), rtol=1e-8))
    assert below.ok  # an eigenvalue below the lower bound costs time only


@pytest.mark.parametrize("M", [None, Jacobi(), SSOR(omega=1.2)], ids=str)
def test_as_a_preconditioner_it_saves_steps_in_proportion_to_its_degree(M) -> None:
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(40, 40))
    A = Sparse(scipy.sparse.kronsum(line, line), tags={"positive_definite"})
    b = random(1600)
    plain = solve(A, b, CG(rtol=1e-8, preconditioner=M)).steps
    steps = [
        solve(A, b, CG(rtol=1e-8, preconditioner=Chebyshev(preconditioner=M, degree=d))).steps
        for d in (1, 3, 7)
    ]
    assert plain > steps[0] > steps[1] > steps[2]


def test_equal_bounds_are_richardson() -> None:
    A = Diagonal(torch.full((5,), 4.0, dtype=F64), tags={"positive_definite"})
    b = random(5)
    solution = solve(A, b, Chebyshev(bounds=(4.0, 4.0)))
    assert solution.steps == 1
    assert error_of(solution.value, b / 4) < 1e-15


def test_complex_hermitian() -> None:
    M = with_spectrum(torch.linspace(1, 9, N, dtype=F64), dtype=torch.complex128)
    b = random(N, dtype=torch.complex128)
    history = solve(spd(M), b, Chebyshev(bounds=(1.0, 9.0), rtol=1e-9), history=True).history
    bounds = torch.tensor([1 / polynomial(k, 1.25) for k in range(len(history))], dtype=F64)
    assert (history <= bounds * (1 + 1e-9)).all()
