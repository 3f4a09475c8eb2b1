"""Richardson's iteration: rates of the theory, and the step that is found."""

from __future__ import annotations

import pytest
import torch
from tests.solvers.systems import N, definite, eye, function, random, solution_of, with_spectrum

from woodbury import Dense, Jacobi, Richardson, solve
from woodbury.decompositions import extreme_eigenvalues
from woodbury.errors import NotPositiveDefiniteError, TagError
from woodbury.solvers import SolveStatus

F64 = torch.float64


def spd(M: torch.Tensor):
    return function(M, {"positive_definite"})


def test_best_step_falls_by_the_same_factor_in_every_step() -> None:
    M = definite(condition=20)
    values, vectors = torch.linalg.eigh(M)
    low, high = float(values[0]), float(values[-1])
    factor = (high - low) / (high + low)
    b = vectors[:, 0] + vectors[:, -1]  # both ends are damped equally
    recipe = Richardson(step=2 / (low + high), rtol=1e-6)
    history = solve(spd(M), b, recipe, history=True).history
    want = factor ** torch.arange(len(history), dtype=F64)
    assert torch.allclose(history, want, rtol=1e-9)


def test_each_step_is_gradient_descent() -> None:
    M, b = definite(), random(N)
    x = torch.zeros(N, dtype=F64, requires_grad=True)
    for _ in range(7):
        value = 0.5 * x @ (M @ x) - b @ x
        (gradient,) = torch.autograd.grad(value, x)
        x = (x - 0.8 * gradient).detach().requires_grad_(True)
    found = solve(spd(M), b, Richardson(step=0.8, rtol=0.0, max_steps=7), throw=False).value
    assert torch.allclose(found, x.detach(), rtol=1e-12)


@pytest.mark.parametrize("condition", [1.5, 5.0, 100.0, 1e4])
def test_step_that_is_found_is_nearly_the_best(condition: float) -> None:
    M, b = definite(condition=condition), random(N)
    low, high = 1 / condition, 1.0
    found = solve(spd(M), b, Richardson(max_steps=200_000, rtol=1e-6))
    best = solve(spd(M), b, Richardson(max_steps=200_000, rtol=1e-6, step=2 / (low + high)))
    assert found.steps <= 1.15 * best.steps + 1
    assert 0 < found.info["step"] * high < 2
    assert found.products == found.steps + 10


def test_needs_fewer_steps_with_a_preconditioner() -> None:
    M = definite(condition=5)
    scales = torch.logspace(0, 3, N, dtype=F64)
    A, b = spd(scales[:, None] * M * scales), random(N)
    helped = solve(A, b, Richardson(preconditioner=Jacobi(), rtol=1e-8))
    assert helped.ok
    assert solve(A, b, Richardson(rtol=1e-8), throw=False).status is SolveStatus.max_steps


def test_bounds_of_the_preconditioned_spectrum() -> None:
    M, P = definite(condition=1e3), definite(condition=30, seed=3)
    A, preconditioner = spd(M), spd(P)
    exact = torch.linalg.eigvals(P @ M).real.sort().values
    found = extreme_eigenvalues(A, N, preconditioner=preconditioner)
    assert found.smallest == pytest.approx(float(exact[0]), rel=1e-8)
    assert found.largest == pytest.approx(float(exact[-1]), rel=1e-10)
    few = extreme_eigenvalues(A, 6, preconditioner=preconditioner)
    assert few.products == 6
    assert few.largest <= exact[-1] * (1 + 1e-12) <= few.radius * 1.001
    # Exhausted: a multiple of the identity has one eigenvalue.
    single = extreme_eigenvalues(spd(M), 6, preconditioner=spd(torch.linalg.inv(M)))
    assert single.smallest == pytest.approx(1.0, rel=1e-9)
    with pytest.raises(NotPositiveDefiniteError, match="x\\^H M x"):
        extreme_eigenvalues(A, 6, preconditioner=function(-eye(), {"hermitian"}))
    with pytest.raises(TagError, match="the preconditioner has tags"):
        extreme_eigenvalues(A, 6, preconditioner=function(eye(), set()))


def test_preconditioner_that_is_not_positive_definite() -> None:
    M, b = definite(), random(N)
    signs = torch.ones(N, dtype=F64)
    signs[::2] = -1
    P = function(torch.diag(signs), {"positive_definite"})  # a false promise
    solution = solve(spd(M), b, Richardson(step=0.1, preconditioner=P), throw=False)
    assert solution.status in (SolveStatus.indefinite_preconditioner, SolveStatus.diverged)
    with pytest.raises(NotPositiveDefiniteError):
        solve(spd(M), b, Richardson(preconditioner=P))


def test_nonsymmetric_with_a_step() -> None:
    M = 2 * eye() + 0.5 * random(N, N) / N**0.5
    b = random(N)
    solution = solve(Dense(M), b, Richardson(step=0.5, rtol=1e-10))
    assert torch.allclose(solution.value, solution_of(M, b), rtol=1e-8)


def test_indefinite_direction_diverges_slowly_and_is_found() -> None:
    spectrum = torch.linspace(0.5, 1.0, N, dtype=F64)
    spectrum[0] = -1e-2
    solution = solve(
        function(with_spectrum(spectrum), {"hermitian"}),
        random(N),
        Richardson(max_steps=10_000, rtol=1e-8),
        throw=False,
    )
    assert solution.status is SolveStatus.diverged
    assert solution.steps < 200
