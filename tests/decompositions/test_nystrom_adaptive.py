"""Nystrom to a target error, from Krylov spaces and within a memory."""

from __future__ import annotations

import pytest
import torch
from tests.solvers.systems import DTYPES, eye, function, random, wide, with_spectrum

from woodbury import Diagonal, Identity
from woodbury.decompositions import nystrom
from woodbury.errors import ArgumentError, BudgetError, NonFiniteError, RankError

F64 = torch.float64


def psd(M: torch.Tensor):
    return function(M, {"positive_semidefinite"})


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow(n: int = 200) -> torch.Tensor:
    """Eigenvalues 1 / i, which a plain sketch approximates badly."""
    return 1 / torch.arange(1, n + 1, dtype=F64)


# -------------------------------------------------------------- block Krylov


def test_depth_one_is_the_gaussian_method() -> None:
    A = psd(with_spectrum(slow(30)))
    plain = nystrom(A, 6, generator=seeded(2))
    krylov = nystrom(A, 6, method="block_krylov", depth=1, generator=seeded(2))
    assert torch.equal(plain.basis, krylov.basis)
    assert torch.equal(plain.eigenvalues, krylov.eigenvalues)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_krylov_form_is_the_defining_formula(depth: int, dtype: torch.dtype) -> None:
    M = with_spectrum(slow(40), dtype=dtype)
    found = nystrom(psd(M), 5, method="block_krylov", depth=depth, generator=seeded(4))
    G, A = wide(torch.randn(40, 5, dtype=dtype, generator=seeded(4))), wide(M)
    Q, _ = torch.linalg.qr(torch.cat([torch.matrix_power(A, p) @ G for p in range(depth)], 1))
    whole = A @ Q @ torch.linalg.inv(Q.mH @ A @ Q) @ Q.mH @ A
    values, vectors = torch.linalg.eigh((whole + whole.mH) / 2)
    expected = (vectors[:, -5:] * values[-5:]) @ vectors[:, -5:].mH
    double = dtype in (F64, torch.complex128)
    got = (wide(found.basis) * found.eigenvalues) @ wide(found.basis).mH
    assert torch.allclose(got, expected, atol=1e-11 if double else 5e-5)
    assert found.basis.shape == (40, 5)
    assert found.products == 5 * depth


def test_krylov_space_reaches_the_best_approximation() -> None:
    spectrum = slow()
    A = Diagonal(spectrum, tags={"positive_semidefinite"})
    best = float(spectrum[20])

    def error(method: str) -> float:
        found = nystrom(A, 20, method=method, depth=5, generator=seeded(0)).operator().to_dense()
        return float(torch.linalg.matrix_norm(torch.diag(spectrum) - found, 2))

    # Tropp and Webber 2023: with depth of order log(n) the error is within a constant of the best.
    assert best <= error("block_krylov") < 1.05 * best
    assert error("gaussian") > 1.5 * best


@pytest.mark.parametrize("rank", [2, 3, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_krylov_space_that_is_exhausted(rank: int, dtype: torch.dtype) -> None:
    U = random(30, 4, dtype=dtype)
    M = U @ U.mH
    found = nystrom(psd(M), rank, method="block_krylov", depth=4)
    assert found.basis.shape == (30, min(rank, 4))
    exact = torch.linalg.eigvalsh(wide(M)).flip(0)[: min(rank, 4)]
    double = dtype in (F64, torch.complex128)
    assert torch.allclose(found.eigenvalues.double(), exact, rtol=1e-10 if double else 1e-4)
    assert found.products <= 4 * rank


def test_krylov_space_of_the_whole_space() -> None:
    M = with_spectrum(torch.logspace(0, -3, 12, dtype=F64))
    found = nystrom(psd(M), 12, method="block_krylov", depth=3)
    assert torch.allclose(found.operator().to_dense(), M, atol=1e-12)
    assert found.products == 12  # there is no second block
    one = nystrom(3.0 * Identity(1, dtype=F64), 1, method="block_krylov")
    assert torch.allclose(one.operator().to_dense(), 3 * eye(1))


# ----------------------------------------------------------- target of the error


@pytest.mark.parametrize("method", ["gaussian", "column", "block_krylov"])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3])
def test_rank_grows_until_the_error_is_met(method: str, tolerance: float) -> None:
    M = with_spectrum(torch.logspace(0, -8, 80, dtype=F64))
    found = nystrom(psd(M), 4, method=method, tolerance=tolerance)
    true = float(torch.linalg.matrix_norm(M - found.operator().to_dense(), 2))
    assert found.error is not None
    assert true <= found.error <= tolerance
    assert found.error < 3 * true + 1e-12
    rank = found.basis.shape[1]
    half = nystrom(psd(M), rank // 2, method=method, generator=seeded(0))
    left = float(torch.linalg.matrix_norm(M - half.operator().to_dense(), 2))
    assert rank == 4 or left > 0.3 * tolerance  # not much more than was needed


def test_what_was_multiplied_is_kept() -> None:
    M = with_spectrum(torch.logspace(0, -8, 64, dtype=F64))
    A, widths = psd(M), []

    def product(X: torch.Tensor) -> torch.Tensor:
        widths.append(X.shape[1])
        return M @ X

    A._forward = product
    found = nystrom(A, 4, tolerance=1e-2)
    levels = [width for width in widths if width > 1]
    assert levels == [4, 4, 8, 16][: len(levels)]
    assert len(levels) > 1
    assert found.basis.shape[1] == sum(levels)
    assert found.products == sum(widths) == sum(levels) + 10 * len(levels)


def test_grown_sketch_is_the_formula_for_all_of_its_columns() -> None:
    M = with_spectrum(torch.logspace(0, -4, 40, dtype=F64))
    found = nystrom(psd(M), 3, tolerance=1e-2, max_rank=9, generator=seeded(5))
    generator = seeded(5)
    parts = []
    for width in (3, 3, 3):
        parts.append(torch.randn(40, width, dtype=F64, generator=generator))
        torch.randn(40, 1, dtype=F64, generator=generator)  # the start of the estimate
    G = torch.cat(parts, 1)
    expected = M @ G @ torch.linalg.inv(G.T @ M @ G) @ G.T @ M
    assert torch.allclose(found.operator().to_dense(), expected, atol=1e-11)
    assert found.error > 1e-2  # said, not hidden


def test_draws_are_repeatable() -> None:
    A = psd(with_spectrum(torch.logspace(0, -8, 50, dtype=F64)))
    for options in ({"tolerance": 1e-3}, {"method": "block_krylov"}):
        first, second, other = (
            nystrom(A, 4, generator=g, **options) for g in (None, seeded(0), seeded(1))
        )
        assert torch.equal(first.basis, second.basis)
        assert first.basis.shape != other.basis.shape or not torch.equal(first.basis, other.basis)


@pytest.mark.parametrize("method", ["gaussian", "column", "block_krylov"])
def test_zero_operator_is_met_at_once(method: str) -> None:
    found = nystrom(0.0 * Identity(6, dtype=F64), 2, method=method, tolerance=0.0)
    assert found.basis.shape == (6, 0)
    assert found.error == 0.0


def test_single_precision() -> None:
    M = with_spectrum(torch.logspace(0, -8, 80, dtype=F64))
    found = nystrom(psd(M.float()), 4, tolerance=1e-3)
    true = float(torch.linalg.matrix_norm(M - wide(found.operator().to_dense()), 2))
    assert true <= 1.01 * found.error <= 1.01e-3
    # A tolerance below rounding ends at the whole space, with what was reached.
    whole = nystrom(psd(M.float()), 40, tolerance=1e-12)
    assert 1e-12 < whole.error < 1e-5


def test_condition_number_of_the_preconditioned_operator() -> None:
    # Frangella, Tropp and Udell 2023, proposition 5.3, for A + mu I:
    # kappa <= (lambda_r + mu + |A - A_hat|) / mu.
    M, mu = with_spectrum(torch.logspace(0, -6, 60, dtype=F64)), 1e-3
    found = nystrom(psd(M), 4, tolerance=mu)
    root = torch.linalg.cholesky(found.preconditioner(mu).to_dense())
    values = torch.linalg.eigvalsh(root.T @ (M + mu * eye(60)) @ root)
    error = float(torch.linalg.matrix_norm(M - found.operator().to_dense(), 2))
    last = float(found.eigenvalues[-1])
    assert float(values[-1] / values[0]) <= 1.0001 * (last + mu + error) / mu < 4


# ------------------------------------------------------------------- memory, refusals


def test_memory_bounds_the_rank() -> None:
    M = with_spectrum(slow(50))
    column = 50 * 8
    assert nystrom(psd(M), 7, memory=3 * 7 * column).basis.shape == (50, 7)
    with pytest.raises(BudgetError, match="the blocks of rank 7 .* or a rank up to 6"):
        nystrom(psd(M), 7, memory=3 * 7 * column - 1)
    with pytest.raises(BudgetError, match="or a rank up to 3"):
        nystrom(psd(M), 7, method="block_krylov", memory=3 * 7 * column)
    grown = nystrom(psd(M), 4, tolerance=1e-9, memory=5 * 11 * column)
    assert grown.basis.shape == (50, 11)
    assert grown.error > 1e-9


def test_what_is_refused() -> None:
    A = psd(with_spectrum(slow(20)))
    for options in ({"tolerance": -1.0}, {"tolerance": float("nan")}, {"depth": 0}, {"memory": 0}):
        with pytest.raises(ArgumentError, match=f"{next(iter(options))} is"):
            nystrom(A, 3, **options)
    with pytest.raises(ArgumentError, match="max_rank is 5, but without tolerance"):
        nystrom(A, 3, max_rank=5)
    with pytest.raises(RankError, match="max_rank is 2, below the first rank 3"):
        nystrom(A, 3, tolerance=0.1, max_rank=2)
    broken = psd(float("nan") * with_spectrum(slow(20)))
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        nystrom(broken, 3, method="block_krylov")
