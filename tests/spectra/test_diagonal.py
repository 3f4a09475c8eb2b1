from __future__ import annotations

import math

import pytest
import torch
from tests.solvers.systems import function, random, wide
from tests.spectra.problems import DTYPES, F64, coverage, general, seeded, semidefinite

from woodbury import Dense, Identity, LowRank
from woodbury.errors import ArgumentError, NonFiniteError, ShapeError, StructureError
from woodbury.operators import FunctionOperator
from woodbury.spectra import Exact, Hutchinson, Method, XDiag, XTrace, diagonal

N = 120
METHODS: list[Method] = [Hutchinson(40), XDiag(40)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("symmetric", [True, False])
def test_errors_are_of_the_size_stated(method: Method, dtype: torch.dtype, symmetric: bool) -> None:
    A, M = semidefinite("1/i", N, dtype) if symmetric else general(N, dtype)
    found = diagonal(A, method, generator=seeded(1))
    assert found.products == 40
    assert found.value.shape == found.standard_error.shape == (N,)
    assert found.value.dtype == (dtype.to_real() if symmetric and dtype.is_complex else dtype)
    z = (wide(found.value) - torch.diagonal(M)).abs() / found.standard_error
    assert z.square().mean().sqrt() < 2
    assert z.max() < 8
    assert found.standard_error.max() < 0.6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_where_the_rank_is_below_the_sketch(dtype: torch.dtype) -> None:
    U, V = random(N, 6, dtype=dtype), random(N, 6, dtype=dtype, seed=5)
    M = U @ V.mH
    found = diagonal(function(M, set()), XDiag(30))
    bound = 1e-3 if torch.finfo(dtype).eps > 1e-10 else 1e-11
    assert (wide(found.value) - torch.diagonal(wide(M))).abs().max() < bound
    assert found.standard_error.max() < bound


def test_signs_see_diagonal_matrices_exactly() -> None:
    d = random(N)
    found = diagonal(function(d.diag(), {"hermitian"}), Hutchinson(5))
    assert torch.allclose(found.value, d, atol=1e-12)
    assert found.standard_error.max() < 1e-12


def test_xdiag_beats_hutchinson_on_decaying_spectra() -> None:
    A, M = semidefinite("1/i^2", 300)
    error = [(diagonal(A, m).value - M.diagonal()).norm() for m in (XDiag(60), Hutchinson(60))]
    assert error[1] > 10 * error[0]


def test_structure_and_small_operators() -> None:
    M = random(7, 7)
    for A in (Dense(M), LowRank(random(7, 2)) + Identity(7, dtype=F64)):
        found = diagonal(A)
        assert (found.products, found.method) == (0, Exact())
        assert torch.allclose(found.value, A.to_dense().diagonal())
    found = diagonal(function(M, set()))
    assert (found.products, found.method) == (7, XDiag())
    assert torch.allclose(found.value, M.diagonal())
    assert found.standard_error.max() == 0
    assert float(diagonal(function(M[:1, :1], set())).value) == float(M[0, 0])


def test_reproducible() -> None:
    A, _ = semidefinite("1/i", N)
    for method in METHODS:
        first, same, other = (diagonal(A, method, generator=seeded(s)).value for s in (1, 1, 2))
        assert torch.equal(first, same)
        assert not torch.equal(first, other)


def test_what_is_refused() -> None:
    A, _ = semidefinite("1/i", N)
    with pytest.raises(ShapeError, match="square"):
        diagonal(Dense(random(3, 4)))
    with pytest.raises(ArgumentError, match="XTrace does not estimate diagonals"):
        diagonal(A, XTrace())
    with pytest.raises(ArgumentError, match="products is 3; XDiag needs at least 4"):
        XDiag(3)
    M = random(N, N)
    one_way = FunctionOperator(lambda X: M @ X, (N, N), dtype=F64)
    with pytest.raises(StructureError, match="no adjoint product"):
        diagonal(one_way, XDiag())
    M[0, 0] = math.nan
    for method in METHODS:
        with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
            diagonal(function(M, set()), method)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1/i^2", "1/i", "flat", "exponential"])
@pytest.mark.parametrize("method", [Hutchinson(60), XDiag(60), XDiag(20)], ids=repr)
def test_intervals_cover_the_truth(method: Method, name: str) -> None:
    A, M = semidefinite(name, 200)
    share = coverage(lambda g: diagonal(A, method, generator=g), M.diagonal(), 200)
    assert 0.90 <= share <= 0.99
