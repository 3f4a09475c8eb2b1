from __future__ import annotations

import math

import pytest
import torch
from tests.solvers.systems import function, random, wide
from tests.spectra.problems import DTYPES, F64, coverage, seeded, semidefinite

from woodbury import Dense, Diagonal, FunctionOperator
from woodbury.errors import ArgumentError, NonFiniteError, StructureError
from woodbury.spectra import Exact, Hutchinson, Method, XDiag, XNysTrace, XTrace, frobenius_norm

METHODS: list[Method] = [Hutchinson(60), Hutchinson(60, "sphere"), XTrace(60), XNysTrace(40)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("shape", [(150, 150), (90, 150), (150, 90)])
def test_within_five_standard_errors(
    method: Method, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    M = random(*shape, dtype=dtype)
    found = frobenius_norm(function(M, set()), method, generator=seeded(1))
    truth = wide(M).norm()
    assert abs(found.value - truth) < 5 * found.standard_error + found.bias
    assert 0 < found.standard_error < 0.05 * truth
    assert (
        found.products == {"Hutchinson": 60, "XTrace": 120, "XNysTrace": 80}[type(method).__name__]
    )


def test_low_rank_is_exact_by_the_range() -> None:
    M = random(150, 5) @ random(5, 120, seed=4)
    found = frobenius_norm(function(M, set()), XNysTrace(20))
    assert float(found.value) == pytest.approx(float(M.norm()), rel=1e-12)
    assert found.standard_error < 1e-8 * M.norm()


def test_structure_small_and_zero() -> None:
    M = random(5, 3)
    found = frobenius_norm(Dense(M))
    assert (found.method, found.products) == (Exact(), 0)
    assert float(found.value) == pytest.approx(float(M.norm()), rel=1e-14)
    assert float(frobenius_norm(Diagonal(M[:, 0])).value) == pytest.approx(float(M[:, 0].norm()))
    found = frobenius_norm(function(M, set()))
    assert found.products == 3
    assert float(found.value) == pytest.approx(float(M.norm()), rel=1e-14)
    zero = frobenius_norm(function(torch.zeros(100, 100, dtype=F64), set()))
    assert (float(zero.value), float(zero.standard_error)) == (0.0, 0.0)


def test_what_is_refused() -> None:
    M = random(100, 100)
    with pytest.raises(ArgumentError, match="XDiag does not estimate traces"):
        frobenius_norm(function(M, set()), XDiag())
    one_way = FunctionOperator(lambda X: M @ X, (100, 100), dtype=F64)
    assert frobenius_norm(one_way).products == 60
    with pytest.raises(StructureError, match="adjoint"):
        frobenius_norm(one_way, XTrace())
    M[2, 1] = math.inf
    with pytest.raises(NonFiniteError):
        frobenius_norm(function(M, set()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1/i^2", "1/i", "flat", "exponential"])
@pytest.mark.parametrize("method", [Hutchinson(60), XNysTrace(30)], ids=repr)
def test_intervals_cover_the_truth(method: Method, name: str) -> None:
    A, M = semidefinite(name, 300)
    share = coverage(lambda g: frobenius_norm(A, method, generator=g), M.norm(), 200)
    assert 0.90 <= share <= 0.99
