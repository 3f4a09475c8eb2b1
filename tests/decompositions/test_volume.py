"""Determinantal and volume sampling against their distributions, by enumeration."""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch
from tests.solvers.systems import random

from woodbury.decompositions import sample_rows
from woodbury.errors import ArgumentError, NonFiniteError, RankError, ShapeError, SingularError

F64 = torch.float64


def problem(dtype: torch.dtype = F64) -> tuple[torch.Tensor, torch.Tensor]:
    return random(7, 3, dtype=dtype) * torch.logspace(0, -1, 7)[:, None], random(7, seed=4).to(
        dtype
    )


def test_volume_weighted_subsets_give_the_pseudo_inverse() -> None:
    # The identity that makes it unbiased, by all 35 subsets.
    X, y = problem()
    total, mean = 0.0, torch.zeros(3, dtype=F64)
    for S in map(list, combinations(range(7), 3)):
        volume = float(torch.linalg.det(X[S]) ** 2)
        total += volume
        mean += volume * torch.linalg.solve(X[S], y[S])
    assert torch.allclose(mean / total, torch.linalg.pinv(X) @ y)
    assert total == pytest.approx(float(torch.linalg.det(X.T @ X)))  # Cauchy and Binet


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_subsets_are_drawn_by_their_volume(dtype: torch.dtype) -> None:
    X, _ = problem(dtype)
    generator = torch.Generator().manual_seed(1)
    draws = 4000
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        S = tuple(sorted(sample_rows(X, 3, method="dpp", generator=generator).rows.tolist()))
        counts[S] = counts.get(S, 0) + 1
    gram = float(torch.linalg.det(X.mH @ X).real)
    chi, classes = 0.0, 0
    for S in combinations(range(7), 3):
        expected = draws * float(torch.linalg.det(X[list(S)]).abs() ** 2) / gram
        if expected > 5:
            chi += (counts.get(S, 0) - expected) ** 2 / expected
            classes += 1
    assert classes > 8
    assert chi < classes + 4 * math.sqrt(2 * classes)  # four standard deviations


@pytest.mark.parametrize(("method", "size"), [("dpp", 3), ("volume", 3), ("volume", 5)])
def test_solution_is_unbiased(method: str, size: int) -> None:
    X, y = problem()
    generator = torch.Generator().manual_seed(2)
    found = torch.stack(
        [sample_rows(X, size, method=method, generator=generator).solve(X, y) for _ in range(4000)]
    )
    spread = found.std(0) / math.sqrt(len(found))
    assert float(((found.mean(0) - torch.linalg.pinv(X) @ y).abs() / spread).max()) < 4


def test_independent_rows_are_biased() -> None:
    X, y = problem()
    generator = torch.Generator().manual_seed(2)
    found = torch.stack(
        [sample_rows(X, 5, method="leverage", generator=generator).solve(X, y) for _ in range(4000)]
    )
    deviation = (found.mean(0) - torch.linalg.pinv(X) @ y).abs()
    assert float((deviation / (found.std(0) / math.sqrt(len(found)))).max()) > 6


def test_volume_sampling_of_more_rows_has_its_distribution() -> None:
    # All ordered triples of four rows: det(sum w q q^H) times the product of the scores.
    Q, _ = torch.linalg.qr(random(4, 2))
    scores = Q.square().sum(1)
    expected = torch.zeros(4, 4, 4, dtype=F64)
    for S in product(range(4), repeat=3):
        rows = list(S)
        gram = (Q[rows] / scores[rows, None]).T @ Q[rows]
        expected[S] = torch.linalg.det(gram) * scores[rows].prod()
    expected /= expected.sum()
    generator, draws = torch.Generator().manual_seed(3), 6000
    counts = torch.zeros(4, 4, 4, dtype=F64)
    for _ in range(draws):
        counts[tuple(sample_rows(Q, 3, generator=generator).rows.tolist())] += 1
    seen = expected * draws > 5
    chi = float(((counts - draws * expected)[seen] ** 2 / (draws * expected[seen])).sum())
    classes = int(seen.sum())
    assert classes > 20
    assert chi < classes + 4 * math.sqrt(2 * classes)


def test_exact_where_the_system_is_consistent() -> None:
    X = random(50, 6)
    B = random(6, 2)
    for method, size in (("dpp", 6), ("volume", 12), ("leverage", 40)):
        sample = sample_rows(X, size, method=method)
        assert torch.allclose(sample.solve(X, X @ B), B)
        assert len(sample.rows) == size
    leverage = torch.linalg.qr(X)[0].square().sum(1)
    assert torch.allclose(sample.weights, 6 / leverage[sample.rows])


def test_draws_are_repeatable() -> None:
    X = random(50, 6)
    first, second = sample_rows(X, 9), sample_rows(X, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.rows, second.rows)
    other = sample_rows(X, 9, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(first.rows, other.rows)


def test_badly_conditioned_columns() -> None:
    X = torch.linspace(-1, 1, 60, dtype=F64)[:, None] ** torch.arange(14)
    rows = sample_rows(X, 14, method="dpp").rows
    assert len(set(rows.tolist())) == 14
    assert float(torch.linalg.svdvals(torch.linalg.qr(X)[0][rows])[-1]) > 1e-4


def test_what_is_refused() -> None:
    X = random(8, 3)
    with pytest.raises(RankError, match="size is 4; method 'dpp' for 3 columns needs 3"):
        sample_rows(X, 4, method="dpp")
    with pytest.raises(
        RankError, match="size is 2; method 'volume' for 3 columns needs at least 3"
    ):
        sample_rows(X, 2)
    with pytest.raises(ArgumentError, match="method is 'uniform'"):
        sample_rows(X, 3, method="uniform")
    with pytest.raises(ShapeError, match=r"X has shape \(3, 8\)"):
        sample_rows(X.T, 8)
    with pytest.raises(SingularError, match="not full column rank"):
        sample_rows(torch.cat([X, X[:, :1]], 1), 4)
    X[2, 1] = math.nan
    with pytest.raises(NonFiniteError):
        sample_rows(X, 3)
