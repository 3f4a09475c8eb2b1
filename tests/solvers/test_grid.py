"""Every recipe on every kind of positive definite operator, block and dtype."""

from __future__ import annotations

import pytest
import torch
from tests.solvers.systems import (
    DTYPES,
    KINDS,
    N,
    error_of,
    random,
    residual_of,
    solution_of,
    wide,
)

from woodbury import CG, Cholesky, Eigh, Neumann, Nystrom, inverse, solve
from woodbury.errors import StructureError
from woodbury.solvers import LU, Recipe, SolveStatus, Structural

EXACT = {
    "default": None,
    "structural": Structural(),
    "cholesky": Cholesky(),
    "eigh": Eigh(),
    "lu": LU(),
    "nystrom": Nystrom(rank=N),
    "nystrom-column": Nystrom(rank=N, method="column"),
    "nystrom-chunks": Nystrom(rank=N, chunk=7),
}
ITERATIVE = {
    "cg": lambda rtol: CG(rtol=rtol),
    "cg-nystrom": lambda rtol: CG(rtol=rtol, preconditioner=Nystrom(rank=8)),
    "cg-cholesky": lambda rtol: CG(rtol=rtol, preconditioner=Cholesky()),
    "cg-neumann": lambda rtol: CG(rtol=rtol, preconditioner=Neumann(terms=2)),
}
SHAPES = [(N,), (N, 1), (N, 4)]


def precision(dtype: torch.dtype) -> float:
    return 1e-10 if dtype in (torch.float64, torch.complex128) else 2e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXACT)
def test_recipes_without_a_tolerance(name: str, kind: str, dtype: torch.dtype) -> None:
    A, recipe = KINDS[kind](dtype), EXACT[name]
    if name == "structural" and not A.has_inverse:
        with pytest.raises(StructureError, match="no structural inverse"):
            solve(A, random(N, dtype=dtype), recipe)
        return
    M = wide(A.to_dense())
    for shape in SHAPES:
        b = random(*shape, dtype=dtype)
        solution = solve(A, b, recipe)
        assert solution.value.shape == b.shape
        assert solution.value.dtype == dtype
        assert error_of(solution.value, solution_of(M, b)) < precision(dtype)
        assert_certificate(solution, M, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ITERATIVE)
def test_recipes_with_a_tolerance(name: str, kind: str, dtype: torch.dtype) -> None:
    A = KINDS[kind](dtype)
    rtol = 1e-9 if dtype in (torch.float64, torch.complex128) else 1e-4
    M = wide(A.to_dense())
    for shape in SHAPES:
        b = random(*shape, dtype=dtype)
        solution = solve(A, b, ITERATIVE[name](rtol))
        assert solution.status is SolveStatus.converged
        assert (residual_of(M, solution.value, b) <= 1.01 * rtol).all()
        assert error_of(solution.value, solution_of(M, b)) < 60 * rtol
        assert_certificate(solution, M, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "recipe", [Cholesky(), Eigh(), LU(), CG(rtol=1e-12), Structural()], ids=str
)
def test_inverse_operator(recipe: Recipe, dtype: torch.dtype) -> None:
    A = KINDS["dense"](dtype)
    M = wide(A.to_dense())
    inverse_A = inverse(A, recipe, on_failure="ignore")
    dense = torch.linalg.inv(M)
    assert inverse_A.tags == A.tags
    assert error_of(inverse_A.to_dense(), dense) < 10 * precision(dtype)
    Y = random(N, 2, dtype=dtype)
    assert error_of(inverse_A.rmatmat(Y), dense.mH @ wide(Y)) < 10 * precision(dtype)


def assert_certificate(solution, M: torch.Tensor, b: torch.Tensor) -> None:
    """What the solution says of itself is true."""
    true = residual_of(M, solution.value, b)
    rounding = 2e-4 if b.dtype in (torch.float32, torch.complex64) else 1e-11
    assert solution.residual.shape == b.shape[1:]
    assert torch.allclose(solution.residual, true, rtol=0.05, atol=rounding)
    assert solution.ok
    assert solution.history is None
    if b.dim() == 1:
        assert solution.column_status is None
    else:
        assert solution.column_status == (solution.status,) * b.shape[1]
    report = solution.certificate()
    assert report["ok"] is True
    assert report["residual"] == pytest.approx(float(solution.residual.max()))
    assert report["products"] == solution.products
