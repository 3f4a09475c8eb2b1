from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tests.solvers.systems import DTYPES, eye, function, random, wide, with_spectrum
from tests.solvers.test_cg import Weighted

from woodbury import Diagonal, Identity
from woodbury.decompositions import nystrom
from woodbury.errors import ArgumentError, NonFiniteError, RankError, TagError

F64 = torch.float64
METHODS = pytest.mark.parametrize("method", ["gaussian", "column"])


def psd(M: torch.Tensor):
    return function(M, {"positive_semidefinite"})


def decaying(n: int = 24, dtype: torch.dtype = F64) -> torch.Tensor:
    return with_spectrum(torch.logspace(0, -6, n, dtype=F64), dtype=dtype)


@METHODS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factor_is_the_defining_formula(method, dtype: torch.dtype) -> None:
    M = decaying(dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    found = nystrom(psd(M), 7, method=method, generator=generator)
    generator.manual_seed(4)
    if method == "gaussian":
        omega = torch.randn(24, 7, dtype=dtype, generator=generator)
    else:
        omega = torch.eye(24, dtype=dtype)[:, torch.randperm(24, generator=generator)[:7]]
    Y, omega = wide(M) @ wide(omega), wide(omega)
    expected = Y @ torch.linalg.pinv(omega.mH @ Y, hermitian=True) @ Y.mH
    double = dtype in (F64, torch.complex128)
    U = wide(found.basis)
    approximation = (U * wide(found.eigenvalues)) @ U.mH
    assert torch.allclose(approximation, expected, atol=1e-12 if double else 2e-4)
    assert torch.allclose(U.mH @ U, torch.eye(U.shape[1]).to(U.dtype), atol=1e-5)
    assert torch.equal(found.eigenvalues, found.eigenvalues.sort(descending=True).values)
    assert found.eigenvalues.dtype == (dtype.to_real() if dtype.is_complex else dtype)
    assert found.products == 7
    assert torch.allclose(wide(found.operator().to_dense()), approximation, atol=1e-5)


@METHODS
def test_approximation_is_below_the_operator(method) -> None:
    M = decaying()
    found = nystrom(psd(M), 8, method=method).operator().to_dense()
    assert float(torch.linalg.eigvalsh(M - found).min()) > -1e-13


@hypothesis.given(
    spectrum=st.lists(st.floats(0, 10), min_size=1, max_size=12),
    rank=st.integers(1, 12),
    method=st.sampled_from(["gaussian", "column"]),
    seed=st.integers(0, 50),
)
@hypothesis.settings(max_examples=60)
def test_any_spectrum_and_rank(spectrum, rank: int, method, seed: int) -> None:
    n = len(spectrum)
    M = with_spectrum(torch.tensor(spectrum, dtype=F64), seed=seed)
    rank = min(rank, n)
    generator = torch.Generator().manual_seed(seed)
    found = nystrom(psd(M), rank, method=method, generator=generator)
    dense = found.operator().to_dense()
    scale = max(1e-300, max(spectrum))
    assert found.basis.shape[1] <= rank
    assert bool((found.eigenvalues > 0).all())
    assert float(torch.linalg.eigvalsh(M - dense).min()) > -1e-7 * scale
    if rank == n:
        assert torch.allclose(dense, M, atol=1e-7 * scale)
    damped = found.inverse(0.5 * scale).to_dense()
    assert torch.allclose(damped @ (dense + 0.5 * scale * eye(n)), eye(n), atol=1e-9)


@METHODS
def test_zero_operator(method) -> None:
    found = nystrom(0.0 * Identity(6, dtype=F64), 3, method=method)
    assert found.basis.shape == (6, 0)
    assert torch.allclose(found.inverse(0.5).to_dense(), 2 * eye(6))
    assert torch.allclose(found.preconditioner(0.5).to_dense(), eye(6))


def test_average_error_is_within_the_theorem() -> None:
    # Tropp et al. 2017, theorem 4.1: E |A - A_hat|_1 <= (1 + r / (k - r - 1)) sum_{i > r} lambda_i.
    spectrum = torch.logspace(0, -4, 60, dtype=F64)
    A = Diagonal(spectrum, tags={"positive_semidefinite"})
    k, r = 12, 8
    generator = torch.Generator().manual_seed(0)
    errors = [
        float(spectrum.sum() - nystrom(A, k, generator=generator).eigenvalues.sum())
        for _ in range(30)
    ]
    bound = (1 + r / (k - r - 1)) * float(spectrum[r:].sum())
    assert float(spectrum[k:].sum()) <= sum(errors) / 30 <= bound


def test_inner_product_of_the_space() -> None:
    weights = torch.logspace(-1, 1, 24, dtype=F64)
    M = decaying() / weights[:, None]
    A = function(M, {"positive_semidefinite"})
    A.space = A.out_space = Weighted(weights)
    found = nystrom(A, 24)
    assert torch.allclose(A.space.gram(found.basis, found.basis), eye(found.basis.shape[1]))
    assert torch.allclose(found.operator().to_dense(), M, atol=1e-9)
    inverse = found.inverse(0.1).to_dense()
    assert torch.allclose(inverse @ (M + 0.1 * eye()), eye(), atol=1e-8)


def test_bfloat16_products() -> None:
    A = psd((random(40, 3) @ random(40, 3).T).bfloat16())
    found = nystrom(A, 6)
    assert found.basis.dtype == torch.float32
    dense = A.to_dense().float()
    assert (found.operator().to_dense() - dense).norm() < 0.1 * dense.norm()


def test_what_is_refused() -> None:
    A = psd(decaying())
    with pytest.raises(RankError, match="rank is 25, the operator has size 24"):
        nystrom(A, 25)
    with pytest.raises(TagError, match="nystrom needs the tag 'hermitian'"):
        nystrom(function(decaying(), set()), 3)
    with pytest.raises(ArgumentError, match="method is 'rows'"):
        nystrom(A, 3, method="rows")
    with pytest.raises(ArgumentError, match="chunk is 0"):
        nystrom(A, 3, chunk=0)
    for method in ("gaussian", "column"):
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            nystrom(psd(math.nan * decaying()), 3, method=method)
