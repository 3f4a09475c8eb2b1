"""Successive over-relaxation against Young's theory on the Laplacian of a line."""

from __future__ import annotations

import math

import pytest
import scipy.sparse
import torch
from tests.solvers.systems import N, definite, error_of, eye, random

from woodbury import SOR, SSOR, GaussSeidel, Jacobi, Sparse, solve
from woodbury.solvers import Recipe
from woodbury.solvers.triangular import parts_of

F64 = torch.float64
SIZE = 40
MU = math.cos(math.pi / (SIZE + 1))  # spectral radius of Jacobi's method
BEST = 2 / (1 + math.sqrt(1 - MU**2))


def line() -> Sparse:
    matrix = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(SIZE, SIZE))
    return Sparse(matrix, tags={"positive_definite"})


def spectral_radius(recipe: Recipe) -> float:
    A = line()
    step = recipe.as_preconditioner(A, recipe.prepare(A)).to_dense()
    iteration = torch.eye(SIZE, dtype=F64) - step @ A.to_dense()
    return float(torch.linalg.eigvals(iteration).abs().max())


def young(omega: float) -> float:
    """The spectral radius that Young's theorem gives for a consistently ordered matrix."""
    if omega >= BEST:
        return omega - 1
    root = omega * MU + math.sqrt((omega * MU) ** 2 - 4 * (omega - 1))
    return root**2 / 4


def observed(recipe: Recipe) -> float:
    """The factor by which the residual falls per step in the end."""
    history = solve(line(), random(SIZE), recipe, throw=False, history=True).history
    return float((history[-1] / history[-21]) ** (1 / 20))


@pytest.mark.parametrize("sweep", ["forward", "backward"])
@pytest.mark.parametrize("omega", [0.5, 1.0, 1.3, 1.6, BEST, 1.9, 1.99])
def test_spectral_radius_is_that_of_youngs_theorem(omega: float, sweep: str) -> None:
    # At the best omega eigenvalues meet in a Jordan block, which rounding splits.
    allowed = 1e-3 if omega == BEST else 1e-9
    assert abs(spectral_radius(SOR(omega=omega, sweep=sweep)) - young(omega)) < allowed


def test_jacobi_and_gauss_seidel() -> None:
    assert abs(spectral_radius(Jacobi()) - MU) < 1e-12
    assert abs(spectral_radius(GaussSeidel()) - MU**2) < 1e-12


@pytest.mark.parametrize(
    ("recipe", "rate"),
    [
        (Jacobi(omega=0.9, rtol=1e-10, max_steps=20_000), 0.1 + 0.9 * MU),
        (GaussSeidel(rtol=1e-10, max_steps=20_000), MU**2),
        (SOR(omega=1.3, rtol=1e-10, max_steps=20_000), young(1.3)),
    ],
    ids=["jacobi", "gauss-seidel", "sor"],
)
def test_residuals_fall_at_the_rate_of_the_theory(recipe: Recipe, rate: float) -> None:
    assert abs(observed(recipe) - rate) < 1e-6


def test_the_best_omega_takes_fewest_steps() -> None:
    A, b = line(), random(SIZE)
    steps = {
        omega: solve(A, b, SOR(omega=omega, rtol=1e-8, max_steps=20_000)).steps
        for omega in (1.0, 1.5, BEST, 1.97)
    }
    assert min(steps, key=steps.__getitem__) == BEST
    assert steps[BEST] < steps[1.0] / 10  # of order n instead of n^2


@pytest.mark.parametrize("omega", [0.3, 1.0, 1.5, 1.9])
def test_eigenvalues_of_ssor_lie_between_0_and_1(omega: float) -> None:
    A = line()
    M = SSOR(omega=omega).as_preconditioner(A, SSOR(omega=omega).prepare(A)).to_dense()
    values = torch.linalg.eigvals(M @ A.to_dense())
    assert values.imag.abs().max() < 1e-12
    assert values.real.min() > 0
    assert values.real.max() <= 1 + 1e-12


def test_symmetric_sweep_is_one_forward_and_one_backward() -> None:
    A, b = line(), random(SIZE)
    for omega in (1.0, 1.4):
        forward, backward, both = (
            recipe.as_preconditioner(A, recipe.prepare(A))
            for recipe in (SOR(omega=omega), SOR(omega=omega, sweep="backward"), SSOR(omega=omega))
        )
        first = forward @ b
        assert error_of(both @ b, first + backward @ (b - A @ first)) < 1e-13


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_parts_add_up(dtype: torch.dtype) -> None:
    M = definite(dtype=dtype) + 0.2 * random(N, N, dtype=dtype) + 2 * eye().to(dtype)
    for A in (Sparse(scipy.sparse.csr_array(M.numpy())), line()):
        matrix = A.to_dense()
        n = A.shape[0]
        parts = parts_of(A, "test")
        B = random(n, 3, dtype=A.dtype)
        D = torch.diag(parts.diagonal)
        for omega in (1.0, 1.7):
            lower = torch.tril(matrix, -1) + D / omega
            upper = torch.triu(matrix, 1) + D / omega
            assert error_of(lower @ parts.lower(omega).solve(B, adjoint=False), B) < 1e-12
            assert error_of(lower.mH @ parts.lower(omega).solve(B, adjoint=True), B) < 1e-12
            assert (
                error_of(upper.mH @ parts.upper_adjoint(omega).solve(B, adjoint=False), B) < 1e-12
            )
            assert error_of(upper @ parts.upper_adjoint(omega).solve(B, adjoint=True), B) < 1e-12
