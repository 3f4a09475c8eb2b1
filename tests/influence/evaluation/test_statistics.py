from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from woodbury.errors import ArgumentError, ShapeError
from woodbury.influence.evaluation.statistics import bootstrap, pearson, ranks, spearman


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_ranks_are_those_of_scipy_with_ties(values):
    want = scipy.stats.rankdata(values)
    assert ranks(torch.tensor(values)).tolist() == want.tolist()


@given(st.integers(0, 50), st.booleans())
def test_correlations_are_those_of_scipy(seed, ties):
    generator = torch.Generator().manual_seed(seed)
    X, Y = torch.randn(2, 4, 9, generator=generator).double()
    if ties:
        X, Y = X.round(), (2 * Y).round()
    for row in range(4):
        if X[row].unique().numel() == 1 or Y[row].unique().numel() == 1:
            continue
        want = scipy.stats.pearsonr(X[row], Y[row]).statistic
        assert float(pearson(X, Y)[row]) == pytest.approx(want, abs=1e-12)
        want = scipy.stats.spearmanr(X[row], Y[row]).statistic
        assert float(spearman(X, Y)[row]) == pytest.approx(want, abs=1e-12)


def test_a_constant_has_no_correlation():
    X = torch.stack([torch.full((5,), 0.1), torch.arange(5.0)])
    assert pearson(X, torch.arange(10.0).view(2, 5)).isnan().tolist() == [True, False]
    assert spearman(torch.arange(5.0), torch.zeros(5)).isnan()
    with pytest.raises(ShapeError, match="shapes"):
        pearson(X, torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="shapes"):
        spearman(X, torch.zeros(2, 4))


def test_an_interval_covers_the_mean_as_often_as_it_says():
    """Of 200 samples of a known mean, 90 % intervals hold it in about 90 %."""
    generator = torch.Generator().manual_seed(1)
    held = 0
    for _ in range(200):
        sample = 3 + torch.randn(40, generator=generator)
        found = bootstrap(
            lambda index, sample=sample: float(sample[index].mean()),
            (40,),
            level=0.9,
            resamples=200,
            generator=generator,
        )
        held += found.low <= 3 <= found.high
        assert found.low <= found.value <= found.high
    assert 165 <= held <= 195


def test_two_kinds_of_units_are_drawn_and_draws_repeat():
    table = torch.arange(12.0).view(3, 4)
    found = [
        bootstrap(
            lambda i, j: float(table[i][:, j].mean()),
            (3, 4),
            level=0.5,
            resamples=50,
            generator=None,
        )
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert found[0].value == 5.5
    nothing = bootstrap(lambda i: math.nan, (3,), level=0.5, resamples=5, generator=None)
    assert math.isnan(nothing.low)
    for level, resamples in [(0.0, 10), (1.0, 10), (0.5, 1)]:
        with pytest.raises(ArgumentError):
            bootstrap(lambda i: 0.0, (3,), level=level, resamples=resamples, generator=None)
