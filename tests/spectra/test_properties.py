"""Random spectra: what must hold whatever the eigenvalues are."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.spectra.problems import F64, hidden, seeded

from woodbury.spectra import (
    SLQ,
    Hutchinson,
    HutchPlusPlus,
    ThickRestartLanczos,
    XNysTrace,
    XTrace,
    density,
    effective_dimension,
    eigenpairs,
    logdet,
    trace,
)

N = 130
# Squares of what is smaller underflow.
NUMBERS = st.floats(-1e3, 1e3).map(lambda x: x if abs(x) > 1e-100 else 0.0)
SPECTRA = st.lists(NUMBERS, min_size=1, max_size=12)


def spread(values: list[float]) -> torch.Tensor:
    """The values, repeated up to size N: multiple eigenvalues are the rule."""
    repeated = torch.tensor(values, dtype=F64).repeat(math.ceil(N / len(values)))
    return repeated[:N].sort().values


@settings(max_examples=30)
@given(SPECTRA, st.integers(0, 99))
def test_traces(values: list[float], seed: int) -> None:
    spectrum = spread(values)
    A, M = hidden(spectrum)
    scale = float(spectrum.abs().max())
    for method in (Hutchinson(20), HutchPlusPlus(18), XTrace(20)):
        found = trace(A, method, generator=seeded(seed))
        error = abs(float(found.value - torch.trace(M)))
        # Seven standard errors of what may be the sample of a skewed distribution.
        assert error <= 7 * float(found.standard_error) + float(found.bias) + 1e-9 * scale
    B, K = hidden(spectrum.abs(), tags=("positive_semidefinite",))
    found = trace(B, XNysTrace(20), generator=seeded(seed))
    error = abs(float(found.value - torch.trace(K)))
    assert error <= 7 * float(found.standard_error) + float(found.bias) + 1e-9 * scale


@settings(max_examples=30)
@given(SPECTRA, st.integers(1, 4), st.sampled_from(["largest", "smallest", "magnitude", "both"]))
def test_eigenpairs(values: list[float], k: int, which: str) -> None:
    spectrum = spread(values)
    A, M = hidden(spectrum)
    exact = torch.linalg.eigvalsh(M)
    scale = float(exact.abs().max())
    found = eigenpairs(A, k, which, ThickRestartLanczos(1e-7))
    assert found.ok
    if which == "largest":
        expected = exact.flip(0)[:k]
    elif which == "smallest":
        expected = exact[:k]
    elif which == "both":
        low = (k + 1) // 2
        expected = torch.cat([exact[:low], exact[N - (k - low) :]])
    else:
        expected = exact.abs().sort(descending=True).values[:k]
        found_values = found.values.abs()
        assert torch.allclose(found_values, expected, atol=1e-6 * scale + 1e-12)
        return
    assert torch.allclose(found.values, expected, atol=1e-6 * scale + 1e-12)


@settings(max_examples=30)
@given(SPECTRA, st.sampled_from(["full", "selective", "none"]), st.integers(0, 99))
def test_quadrature(values: list[float], kind: str, seed: int) -> None:
    """A few distinct eigenvalues exhaust the Krylov space, and nodes are eigenvalues."""
    spectrum = spread(values)
    scale = float(spectrum.abs().max())
    A, _ = hidden(spectrum)
    found = density(A, SLQ(5, 25, kind), generator=seeded(seed))
    assert torch.allclose(found.weights.sum(1), torch.ones(5, dtype=F64))
    low, high = found.support
    assert low <= float(spectrum[0]) + 1e-6 * scale + 1e-12
    assert high >= float(spectrum[-1]) - 1e-6 * scale - 1e-12
    heavy = found.nodes[found.weights > 1e-6]
    gaps = (heavy[:, None] - spectrum).abs().min(1).values
    assert float(gaps.max()) <= 1e-6 * scale + 1e-12


@settings(max_examples=30)
@given(SPECTRA, st.floats(1e-3, 10), st.integers(0, 99))
def test_functions(values: list[float], damping: float, seed: int) -> None:
    spectrum = spread(values).abs() + damping
    A, _ = hidden(spectrum, tags=("positive_definite",))
    found = logdet(A, SLQ(5, 25), lower=damping * 0.999, generator=seeded(seed))
    truth = float(spectrum.log().sum())
    size = float(spectrum.log().abs().sum())
    error = abs(float(found.value) - truth)
    assert error <= 12 * float(found.standard_error) + float(found.bias) + 1e-8 * size
    found = effective_dimension(A, damping, SLQ(5, 25), generator=seeded(seed))
    truth = float((spectrum / (spectrum + damping)).sum())
    error = abs(float(found.value) - truth)
    assert error <= 12 * float(found.standard_error) + float(found.bias) + 1e-8 * N
    assert 0 <= float(found.value) <= 2 * N
