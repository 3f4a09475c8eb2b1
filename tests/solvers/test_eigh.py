from __future__ import annotations

import math

import pytest
import torch
from tests.solvers.systems import REAL, error_of, function, random, solution_of, wide, with_spectrum

from woodbury import Diagonal, Eigh, solve
from woodbury.errors import ArgumentError, SolveError
from woodbury.solvers import SolveStatus

F64 = torch.float64


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.complex128], ids=str)
def test_indefinite(dtype: torch.dtype) -> None:
    M = with_spectrum(torch.linspace(-1.5, 2, 20, dtype=F64), dtype=dtype)
    b = random(20, 2, dtype=dtype)
    solution = solve(function(M, {"hermitian"}), b, Eigh())
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, solution_of(M, b)) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_singular_and_consistent_gives_the_smallest_solution(dtype: torch.dtype) -> None:
    spectrum = torch.cat([torch.zeros(3, dtype=F64), torch.linspace(-2, 3, 12, dtype=F64)])
    M = with_spectrum(spectrum, dtype=dtype)
    b = (wide(M) @ random(15)).to(dtype)
    solution = solve(function(M, {"hermitian"}), b, Eigh())
    assert solution.status is SolveStatus.converged
    assert solution.state.rank == 12
    expected = torch.linalg.pinv(wide(M), hermitian=True, rtol=1e-5) @ wide(b)
    assert error_of(solution.value, expected) < (1e-4 if dtype == torch.float32 else 1e-12)


def test_singular_and_inconsistent_says_so_per_column() -> None:
    spectrum = torch.cat([torch.zeros(2, dtype=F64), torch.linspace(1, 3, 8, dtype=F64)])
    M = with_spectrum(spectrum)
    B = torch.stack([M @ random(10), random(10, seed=5)], dim=1)
    A = function(M, {"hermitian"})
    solution = solve(A, B, Eigh(), throw=False)
    assert solution.column_status == (SolveStatus.converged, SolveStatus.inconsistent)
    pseudo_inverse = torch.linalg.pinv(M, hermitian=True)
    assert error_of(solution.value, pseudo_inverse @ B) < 1e-12
    outside = B[:, 1] - M @ pseudo_inverse @ B[:, 1]
    assert float(solution.residual[1]) == pytest.approx(float(outside.norm() / B[:, 1].norm()))
    with pytest.raises(SolveError, match=r"inconsistent in 1 of 2 columns \(1\).*least-squares"):
        solve(A, B, Eigh())


def test_zero_operator() -> None:
    A = Diagonal(torch.zeros(4, dtype=F64))
    solution = solve(A, torch.ones(4, dtype=F64), Eigh(), throw=False)
    assert solution.status is SolveStatus.inconsistent
    assert torch.equal(solution.value, torch.zeros(4, dtype=F64))
    assert solution.residual == 1


def test_rcond_decides_what_counts_as_zero() -> None:
    A = Diagonal(torch.tensor([1e-6, 1.0, 2.0], dtype=F64))
    b = torch.tensor([1e-6, 1.0, 2.0], dtype=F64)
    assert torch.allclose(solve(A, b, Eigh()).value, torch.ones(3, dtype=F64))
    cut = solve(A, b, Eigh(rcond=1e-5), throw=False)
    assert cut.state.rank == 2
    assert torch.allclose(cut.value, torch.tensor([0.0, 1.0, 1.0], dtype=F64))
    for rcond in (-1e-3, 1.0, math.nan):
        with pytest.raises(ArgumentError, match="rcond is"):
            Eigh(rcond=rcond)
