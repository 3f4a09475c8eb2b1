"""Where LAPACK in float64 is at its limit: the answer in 60 digits, by mpmath."""

from __future__ import annotations

import mpmath
import pytest
import torch

from woodbury import (
    CG,
    GMRES,
    LDL,
    LSMR,
    LSQR,
    MINRES,
    QR,
    Cholesky,
    Dense,
    Eigh,
    IncompleteCholesky,
    Sparse,
    SparseLU,
    solve,
)
from woodbury.solvers import LU, Recipe
from woodbury.solvers.certificate import error_bound

EPS = torch.finfo(torch.float64).eps


def hilbert(n: int) -> torch.Tensor:
    i = torch.arange(n, dtype=torch.float64)
    return 1 / (i[:, None] + i + 1)


def exactly(matrix: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The solution with the very entries that are in the tensors, and the condition number."""
    with mpmath.workdps(60):
        A, rhs = mpmath.matrix(matrix.tolist()), mpmath.matrix(b.tolist())
        x = mpmath.lu_solve(A, rhs)
        values = mpmath.eigsy(A, eigvals_only=True)
        condition = float(max(values) / min(values))
        return torch.tensor([float(entry) for entry in x], dtype=torch.float64), condition


@pytest.mark.parametrize("recipe", [Cholesky(), Eigh(), LDL(), LU(), QR()], ids=repr)
@pytest.mark.parametrize("n", [4, 8, 10])
def test_factorisations_are_backward_stable(recipe: Recipe, n: int) -> None:
    matrix, b = hilbert(n), torch.ones(n, dtype=torch.float64)
    exact, condition = exactly(matrix, b)
    A = Dense(matrix, tags={"positive_definite"})
    solution = solve(A, b, recipe)
    error = (solution.value - exact).norm() / exact.norm()
    assert error <= 10 * n * EPS * condition
    # The residual of the certificate is that of the value in exact arithmetic, up to rounding.
    with mpmath.workdps(60):
        rest = mpmath.matrix(b.tolist()) - mpmath.matrix(matrix.tolist()) * mpmath.matrix(
            solution.value.tolist()
        )
        true = float(mpmath.norm(rest)) / b.norm().item()
    rounding = n * EPS * (matrix.norm() * solution.value.norm() / b.norm()).item()
    assert abs(solution.residual.item() - true) <= rounding


@pytest.mark.parametrize(
    "recipe", [CG(1e-10), MINRES(1e-10), GMRES(1e-10), LSMR(1e-10), LSQR(1e-10)], ids=repr
)
def test_krylov_methods_to_a_residual_that_condition_allows(recipe: Recipe) -> None:
    matrix, b = hilbert(5), torch.ones(5, dtype=torch.float64)
    exact, condition = exactly(matrix, b)
    A = Dense(matrix, tags={"positive_definite"})
    solution = solve(A, b, recipe)
    assert (solution.value - exact).norm() / exact.norm() <= condition * solution.residual + EPS
    smallest = matrix.norm().item() / (condition * 2)  # below the smallest singular value
    (bound,) = error_bound(A, b, solution, smallest=smallest)
    assert (solution.value - exact).norm() <= bound.value


def test_sparse_factorisation_of_a_graded_matrix() -> None:
    n = 30
    grades = torch.logspace(0, -12, n, dtype=torch.float64)
    matrix = torch.diag(grades)
    matrix += torch.diag(0.3 * (grades[1:] * grades[:-1]).sqrt(), 1)
    matrix += torch.diag(0.3 * (grades[1:] * grades[:-1]).sqrt(), -1)
    b = torch.ones(n, dtype=torch.float64)
    exact, _ = exactly(matrix, b)
    A = Sparse(matrix.to_sparse_coo(), tags={"positive_definite"})
    # Graded matrices are solved to full relative accuracy in every entry.
    for recipe in (SparseLU(), CG(1e-14, preconditioner=IncompleteCholesky(drop=None))):
        value = solve(A, b, recipe).value
        assert ((value - exact) / exact).abs().max() < 1e-11
