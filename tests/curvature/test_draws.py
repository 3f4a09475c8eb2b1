"""Numbers that belong to rows: their bits, their statistics, and that nothing else changes them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from woodbury.curvature.draws import Draws, absorb, make_seed

F64 = torch.float64
MASK = 2**64 - 1


def splitmix(state: int):
    """SplitMix64 in integers of any size."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        bits = state
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
        yield bits ^ (bits >> 31)


def test_an_axis_is_the_stream_of_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    published += [4593380528125082431, 16408922859458223821]  # of the seed 1234567
    assert list(itertools.islice(splitmix(1234567), 5)) == published
    mine = absorb(torch.tensor(1234567), torch.arange(5))
    assert [int(bits) & MASK for bits in mine] == published
    seeds = torch.randint(-(2**63), 2**63 - 1, (50,))
    mine = absorb(seeds[:, None], torch.arange(9))
    for seed, row in zip(seeds.tolist(), mine.tolist(), strict=True):
        assert [bits & MASK for bits in row] == list(itertools.islice(splitmix(seed & MASK), 9))


def test_a_number_is_that_of_its_place():
    """By hand from the definition: seed, sample, row, one index for each axis."""
    found = Draws(99, torch.tensor([5, 2**40]), 3).uniform((2, 4))
    assert found.shape == (2, 2, 4)
    assert found.dtype == F64
    for i, row in enumerate((5, 2**40)):
        for j, k in itertools.product(range(2), range(4)):
            state = 99
            for index in (3, row, j, k):
                start = (state + index * 0x9E3779B97F4A7C15) & MASK
                state = next(splitmix(start))
            assert float(found[i, j, k]) == ((state >> 12) + 0.5) / 2**52


def test_numbers_depend_on_seed_row_sample_and_place_only():
    whole = Draws(1, torch.arange(20), 2).uniform((5, 3))
    order = torch.randperm(20)
    assert torch.equal(Draws(1, order, 2).uniform((5, 3)), whole[order])
    assert torch.equal(Draws(1, torch.arange(7, 9), 2).uniform((2, 3)), whole[7:9, :2])
    assert torch.equal(Draws(1 + 2**64, torch.arange(20), 2).uniform((5, 3)), whole)
    for other in (Draws(2, torch.arange(20), 2), Draws(1, torch.arange(20), 1)):
        assert not bool((other.uniform((5, 3)) == whole).any())
    assert len(whole.unique()) == whole.numel()


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """How many standard deviations the statistic is from its mean."""
    freedom = counts.numel() - 1
    statistic = ((counts - expected).square() / expected).sum()
    return float((statistic - freedom) / math.sqrt(2 * freedom))


# 40,000 numbers along each way that numbers are taken in: along rows, samples, seeds and places.
ALONG = {
    "rows": lambda n, seed: Draws(seed, torch.arange(n)).uniform(),
    "samples": lambda n, seed: torch.cat(
        [Draws(seed, torch.arange(n // 100), s).uniform() for s in range(100)]
    ),
    "seeds": lambda n, seed: torch.cat(
        [Draws(seed + s, torch.arange(n // 100)).uniform() for s in range(100)]
    ),
    "places": lambda n, seed: Draws(seed, torch.arange(n // 100)).uniform((10, 10)).flatten(),
    "far rows": lambda n, seed: Draws(seed, 2**32 * torch.arange(n)).uniform(),
}


@pytest.mark.parametrize("seed", [0, 1, 2**61])
@pytest.mark.parametrize("along", ALONG)
def test_numbers_are_uniform_and_independent_of_their_neighbours(along, seed):
    n = 40_000
    u = ALONG[along](n, seed)
    assert u.shape == (n,)
    assert bool(((u > 0) & (u < 1)).all())
    for power in (1, 2, 3):  # the mean of u^k is 1 / (k + 1)
        deviation = math.sqrt((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / n)
        assert abs(float((u**power).mean()) - 1 / (power + 1)) < 4 * deviation
    cells = (u * 100).long().bincount(minlength=100).to(F64)
    assert abs(chi_square(cells, torch.full((100,), n / 100, dtype=F64))) < 4
    for lag in (1, 2, 10, 100, 400, 1000):  # pairs fill the square evenly
        pairs = (u[:-lag] * 10).long() * 10 + (u[lag:] * 10).long()
        counts = pairs.bincount(minlength=100).to(F64)
        expected = torch.full((100,), (n - lag) / 100, dtype=F64)
        assert abs(chi_square(counts, expected)) < 4.5, lag
        centred = u - 0.5
        correlation = float((centred[:-lag] * centred[lag:]).mean()) * 12
        assert abs(correlation) < 4.5 / math.sqrt(n - lag), lag


def test_every_bit_of_the_input_changes_half_of_the_bits():
    states = torch.randint(-(2**63), 2**63 - 1, (2000,))
    before = absorb(states, torch.tensor(0))
    for bit in range(64):
        flipped = states ^ (-(2**63) if bit == 63 else 2**bit)
        changed = before ^ absorb(flipped, torch.tensor(0))
        share = torch.stack([(changed >> b) & 1 for b in range(64)]).to(F64).mean(1)
        assert float((share - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(2000)


def test_normal_numbers_have_the_moments_of_the_normal_distribution():
    z = Draws(5, torch.arange(20_000)).normal((5,)).flatten()
    n = len(z)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((z**power).mean()) - mean) < 4 * math.sqrt(variance / n)
    edges = torch.special.ndtri(torch.linspace(0, 1, 51, dtype=F64)[1:-1])
    counts = torch.bucketize(z, edges).bincount(minlength=50).to(F64)
    assert abs(chi_square(counts, torch.full((50,), n / 50, dtype=F64))) < 4
    rows = z.view(-1, 5)
    assert float((rows.T @ rows / len(rows) - torch.eye(5, dtype=F64)).abs().max()) < 5 / 141


def test_classes_have_their_probabilities():
    p = torch.tensor([0.0, 0.5, 0.05, 0.0, 0.25, 0.2, 0.0], dtype=F64)
    n = 50_000
    y = Draws(2, torch.arange(n)).categorical(p.expand(n, 7))
    counts = y.bincount(minlength=7).to(F64)
    assert not bool(counts[p == 0].any())
    assert abs(chi_square(counts[p > 0], n * p[p > 0])) < 4
    both = Draws(2, torch.arange(n)).categorical(p.expand(n, 2, 7))
    table = torch.zeros(7, 7, dtype=F64).index_put_(
        (both[:, 0], both[:, 1]), torch.ones(n, dtype=F64), accumulate=True
    )
    joint = n * torch.outer(p, p)
    assert abs(chi_square(table[joint > 0], joint[joint > 0])) < 4


def test_a_class_is_the_inverse_of_the_cumulative_probability():
    p = torch.rand(30, 4, 9, dtype=F64)
    draws = Draws(3, torch.arange(30))
    u = draws.uniform((4,)) * p.sum(-1)  # probabilities need not add up to one
    wanted = (p.cumsum(-1) <= u.unsqueeze(-1)).sum(-1)
    assert torch.equal(draws.categorical(p), wanted)
    assert torch.equal(draws.categorical(p.float()), wanted)
    single = draws.categorical(torch.ones(30, 1))
    assert torch.equal(single, torch.zeros(30, dtype=torch.int64))


def test_many_classes_are_taken_in_parts(monkeypatch):
    p = torch.rand(12, 3, 8)
    whole = Draws(3, torch.arange(12)).categorical(p)
    monkeypatch.setattr("woodbury.curvature.draws._CHUNK_BYTES", 5 * 8 * 8)
    assert torch.equal(Draws(3, torch.arange(12)).categorical(p), whole)
    assert Draws(3, torch.arange(0)).categorical(p[:0]).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_bernoulli_numbers_have_their_probabilities(dtype):
    p = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=dtype)
    n = 20_000
    y = Draws(4, torch.arange(n)).bernoulli(p.expand(n, 5))
    assert y.dtype == dtype
    assert set(y.unique().tolist()) == {0.0, 1.0}
    mean, p = y.to(F64).mean(0), p.to(F64)
    assert bool(((mean - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all())


def test_seeds_follow_the_generator():
    generator = torch.Generator().manual_seed(3)
    first, second = make_seed(generator), make_seed(generator)
    assert first != second
    assert make_seed(generator.manual_seed(3)) == first
    assert all(0 <= make_seed(None) < 2**62 for _ in range(3))
