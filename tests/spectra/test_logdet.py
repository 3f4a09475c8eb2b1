from __future__ import annotations

import math

import pytest
import torch
from tests.solvers.systems import definite, function, random
from tests.spectra.problems import DTYPES, F64, SPECTRA, coverage, hidden, seeded

from woodbury import Dense, Diagonal, Identity, Kernel, Kronecker, Sparse
from woodbury.errors import (
    ArgumentError,
    NonFiniteError,
    NotPositiveDefiniteError,
    RankError,
    ShapeError,
    TagError,
)
from woodbury.spectra import SLQ, Exact, effective_dimension, logdet

METHOD = SLQ(probes=12, steps=24)
N = 300


def positive(dtype: torch.dtype = F64, floor: float = 1e-2):
    return hidden(SPECTRA["1/i"](N) + floor, dtype=dtype, tags=("positive_definite",))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [0, 40])
@pytest.mark.parametrize("kind", ["full", "selective", "none"])
def test_within_five_standard_errors(dtype: torch.dtype, rank: int, kind: str) -> None:
    A, M = positive(dtype)
    found = logdet(A, SLQ(12, 24, kind), rank=rank, generator=seeded(1))
    truth = torch.linalg.slogdet(M).logabsdet
    assert found.products == 288 + rank
    assert abs(found.value - truth) < 5 * found.standard_error + found.bias
    assert found.standard_error < 0.02 * abs(truth)


def test_nystrom_reduces_the_variance() -> None:
    spectrum = torch.cat([torch.logspace(4, 0, 30), torch.ones(N - 30)]).to(F64)
    A, M = hidden(spectrum, tags=("positive_definite",))
    plain = logdet(A, METHOD, generator=seeded(3))
    helped = logdet(A, METHOD, rank=40, generator=seeded(3))
    truth = torch.linalg.slogdet(M).logabsdet
    assert helped.standard_error < 0.2 * plain.standard_error
    assert abs(helped.value - truth) < 5 * helped.standard_error + helped.bias


def test_lower_bound_encloses_the_truth() -> None:
    """On a diagonal matrix signs have no variance, and what is left is the quadrature."""
    values = torch.logspace(-4, 0, N, dtype=F64)
    A, truth = Diagonal(values, tags={"positive_definite"}), float(values.log().sum())
    for steps in (4, 8, 16, 24):
        bounded = logdet(A, SLQ(12, steps), lower=0.9e-4)
        assert float(bounded.standard_error) < 1e-9 * abs(truth)
        assert bounded.info["enclosed"]
        assert abs(float(bounded.value) - truth) <= float(bounded.bias)
        extrapolated = logdet(A, SLQ(12, steps))
        assert not extrapolated.info["enclosed"]
        error = abs(float(extrapolated.value) - truth)
        assert error <= float(extrapolated.bias) <= 20 * error


def test_error_unknown_of_very_short_rules() -> None:
    A, _ = positive()
    assert logdet(A, SLQ(5, 2)).bias == math.inf
    assert logdet(2.0 * Identity(400, dtype=F64), SLQ(5, 1)).bias < 1e-9


def test_structure_and_small_operators() -> None:
    M = definite(6)
    K = Kronecker(Dense(M, tags={"positive_definite"}), Dense(M, tags={"positive_definite"}))
    found = logdet(K)
    assert (found.method, found.products) == (Exact(), 0)
    assert float(found.value) == pytest.approx(12 * float(torch.logdet(M)))
    assert float(logdet(Dense(M)).value) == pytest.approx(float(torch.logdet(M)))
    sparse = Sparse(M.to_sparse_coo(), tags={"positive_definite"})
    assert float(logdet(sparse).value) == pytest.approx(float(torch.logdet(M)))
    found = logdet(function(M, {"positive_definite"}))
    assert (found.products, float(found.standard_error)) == (6, 0.0)
    assert abs(float(found.value) - float(torch.logdet(M))) <= float(found.bias)
    x = random(300, 3)
    blind = Kernel(x, kernel=lambda a, b: torch.exp(-torch.cdist(a, b)), tags={"symmetric"})
    assert logdet(blind + 0.1 * Identity(300, dtype=F64)).method == SLQ()


def test_what_is_refused() -> None:
    A, M = positive()
    with pytest.raises(ShapeError, match="square"):
        logdet(Dense(random(3, 4)))
    with pytest.raises(TagError, match="needs the tag 'hermitian'"):
        logdet(function(M, set()))
    for rank in (-1, N + 1):
        with pytest.raises(RankError, match=f"rank is {rank}"):
            logdet(A, METHOD, rank=rank)
    for lower in (0.0, -1.0):
        with pytest.raises(ArgumentError, match="lower is"):
            logdet(A, METHOD, lower=lower)
    with pytest.raises(ArgumentError, match="no lower bound of the spectrum"):
        logdet(A, METHOD, lower=0.5)
    indefinite = function(M - 0.1 * torch.eye(N, dtype=F64), {"hermitian"})
    with pytest.raises(NotPositiveDefiniteError, match="add damping"):
        logdet(indefinite, METHOD)
    with pytest.raises(NotPositiveDefiniteError, match="add damping"):
        logdet(function(-M[:5, :5], {"hermitian"}))
    with pytest.raises(NonFiniteError):
        logdet(function(math.nan * M, {"hermitian"}), METHOD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_effective_dimension(dtype: torch.dtype, damping: float) -> None:
    spectrum = SPECTRA["1/i"](N)
    A, _ = hidden(spectrum, dtype=dtype, tags=("positive_semidefinite",))
    found = effective_dimension(A, damping, METHOD, generator=seeded(1))
    truth = float((spectrum / (spectrum + damping)).sum())
    assert abs(float(found.value) - truth) < 5 * found.standard_error + found.bias
    assert found.standard_error < 0.2 * truth
    assert found.products == 288


def test_effective_dimension_limits() -> None:
    rank = torch.cat([torch.linspace(1, 2, 20), torch.zeros(N - 20)]).to(F64)
    A = Diagonal(rank, tags={"positive_semidefinite"})
    assert float(effective_dimension(A, 1e-6, METHOD).value) == pytest.approx(20, abs=1e-4)
    assert float(effective_dimension(A, 1e9, METHOD).value) == pytest.approx(0, abs=1e-4)
    many = effective_dimension(A, 0.5, SLQ(12, 3))
    truth = float((rank / (rank + 0.5)).sum())
    assert abs(float(many.value) - truth) <= float(many.bias)
    small = effective_dimension(function(definite(5), {"positive_semidefinite"}), 0.3)
    assert small.products == 5
    exact = torch.linalg.eigvalsh(definite(5))
    assert float(small.value) == pytest.approx(float((exact / (exact + 0.3)).sum()))


def test_effective_dimension_refuses() -> None:
    A, M = positive()
    for damping in (0.0, -1.0, math.nan):
        with pytest.raises(ArgumentError, match="damping is"):
            effective_dimension(A, damping)
    with pytest.raises(TagError, match="positive_semidefinite"):
        effective_dimension(function(M, {"hermitian"}), 1.0)
    wrong = function(M - 0.5 * torch.eye(N, dtype=F64), {"positive_semidefinite"})
    with pytest.raises(NotPositiveDefiniteError, match="means nothing"):
        effective_dimension(wrong, 1.0, METHOD)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1/i", "flat", "step", "exponential"])
@pytest.mark.parametrize("job", ["plain", "rank", "lower", "dimension"])
def test_intervals_cover_the_truth(job: str, name: str) -> None:
    spectrum = SPECTRA[name](400) + 1e-2
    A, _M = hidden(spectrum, tags=("positive_definite",))
    method = SLQ(probes=20, steps=19)
    truth = spectrum.log().sum()
    if job == "dimension":
        truth = (spectrum / (spectrum + 0.1)).sum()

    def estimate(generator: torch.Generator):
        if job == "dimension":
            return effective_dimension(A, 0.1, method, generator=generator)
        words = {"plain": {}, "rank": {"rank": 40}, "lower": {"lower": 0.9e-2}}[job]
        return logdet(A, method, generator=generator, **words)

    share = coverage(estimate, truth, 200)
    assert 0.90 <= share <= 0.99
