from __future__ import annotations

import math

import pytest
import torch
from tests.solvers.systems import (
    definite,
    eye,
    function,
    random,
    wide,
    with_spectrum,
)
from tests.solvers.test_cg import Weighted

from woodbury import Diagonal, Identity
from woodbury.decompositions import extreme_eigenvalues, lanczos
from woodbury.errors import ArgumentError, NonFiniteError, ShapeError, TagError

F64 = torch.float64


def tridiagonal(found) -> torch.Tensor:
    off = found.off_diagonal
    return torch.diag(found.diagonal) + torch.diag(off, 1) + torch.diag(off, -1)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 10, 30])
def test_defining_identity(dtype: torch.dtype, steps: int) -> None:
    M = with_spectrum(torch.logspace(0, -2, 30, dtype=F64), dtype=dtype)
    found = lanczos(function(M, {"hermitian"}), steps)
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    Q, T = wide(found.basis), tridiagonal(found).to(wide(M).dtype)
    assert found.products == steps == Q.shape[1]
    assert torch.allclose(Q.mH @ Q, torch.eye(steps).to(Q.dtype), atol=bound)
    R = wide(M) @ Q - Q @ T
    assert float(R[:, :-1].abs().amax(dim=(0, 1)) if steps > 1 else 0) < bound
    assert float(R[:, -1].norm()) == pytest.approx(found.remainder, abs=bound)
    assert torch.allclose((Q.mH @ R[:, -1]).abs(), torch.zeros(steps).double(), atol=bound)


def test_ritz_values_have_an_eigenvalue_within_their_error() -> None:
    M = definite(60, condition=1e3)
    eigenvalues = torch.linalg.eigvalsh(M)
    values, vectors, errors = lanczos(function(M, {"hermitian"}), 12).ritz()
    assert torch.allclose(vectors.T @ vectors, eye(12))
    for value, error in zip(values, errors, strict=True):
        assert float((eigenvalues - value).abs().min()) <= float(error) + 1e-12


def test_exhausted_space_ends_early_with_exact_values() -> None:
    A = Diagonal(torch.tensor([1.0, 1.0, 3.0, 3.0, 3.0], dtype=F64))
    found = lanczos(A, 5)
    assert (found.products, found.remainder) == (2, 0.0)
    assert torch.allclose(found.ritz()[0], torch.tensor([1.0, 3.0], dtype=F64))
    assert lanczos(2.0 * Identity(7, dtype=F64), 3).products == 1
    assert lanczos(0.0 * Identity(7, dtype=F64), 3).ritz()[0].tolist() == [0.0]


def test_start_and_generator() -> None:
    M = definite(20)
    A, v = function(M, {"hermitian"}), random(20)
    assert torch.allclose(lanczos(A, 3, start=v).basis[:, 0], v / v.norm())
    first = [lanczos(A, 2, generator=torch.Generator().manual_seed(s)).basis for s in (1, 1, 2)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert torch.equal(lanczos(A, 2).basis, lanczos(A, 2).basis)


def test_inner_product_of_the_space() -> None:
    weights = torch.logspace(-1, 1, 20, dtype=F64)
    A = function(definite(20) / weights[:, None], {"hermitian"})
    A.space = A.out_space = Weighted(weights)
    found = lanczos(A, 20)
    assert torch.allclose(A.space.gram(found.basis, found.basis), eye(20), atol=1e-10)
    exact = torch.linalg.eigvals(A.to_dense()).real.sort().values
    assert torch.allclose(found.ritz()[0], exact, atol=1e-10)


def test_bfloat16_products() -> None:
    A = Diagonal(torch.linspace(1, 2, 50).bfloat16())
    found = lanczos(A, 8)
    assert found.basis.dtype == torch.float32
    assert found.ritz()[0][-1] == pytest.approx(2.0, abs=0.05)


def test_what_is_refused() -> None:
    A = function(definite(), {"hermitian"})
    with pytest.raises(TagError, match="lanczos needs the tag 'hermitian'"):
        lanczos(function(definite(), set()), 3)
    with pytest.raises(ArgumentError, match="steps is 0"):
        lanczos(A, 0)
    with pytest.raises(ArgumentError, match="start has norm 0.0"):
        lanczos(A, 3, start=torch.zeros(24, dtype=F64))
    with pytest.raises(ShapeError, match=r"start has shape \(3,\), expected \[24\]"):
        lanczos(A, 3, start=torch.ones(3, dtype=F64))
    with pytest.raises(NonFiniteError, match="the product of step 1 with FunctionOperator"):
        lanczos(function(math.nan * definite(), {"hermitian"}), 3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decay", [0, -3])
def test_ends_of_the_spectrum(seed: int, decay: int) -> None:
    spectrum = torch.logspace(0, decay, 200, dtype=F64) * torch.linspace(1, 2, 200).double()
    spectrum[0] = -0.5
    A = function(with_spectrum(spectrum), {"hermitian"})
    found = extreme_eigenvalues(A, 10, generator=torch.Generator().manual_seed(seed))
    low, high = float(spectrum.min()), float(spectrum.max())
    assert found.products == 10
    # Ritz values are inside the spectrum; with their errors added they bound it.
    assert low <= found.smallest + 1e-12
    assert found.largest <= high + 1e-12
    assert found.largest + found.largest_error >= high
    assert high <= found.radius < 1.5 * high
    assert found.largest > 0.9 * high


def test_radius_of_a_negative_operator() -> None:
    A = function(-definite(30), {"hermitian"})
    assert 1.0 <= extreme_eigenvalues(A, 12).radius < 1.1
