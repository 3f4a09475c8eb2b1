from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from woodbury import Influence, Objective
from woodbury.errors import ArgumentError, DataError, ShapeError
from woodbury.influence import Scores
from woodbury.influence.evaluation import half_subsets, linear_datamodeling_score, retrain
from woodbury.influence.evaluation.retraining import Retrained

F64 = torch.float64


def linear(values, subsets, noise=0.0):
    """Measurements that are sums of ``values [Q, N]`` over the subset, and noise."""
    generator = torch.Generator().manual_seed(0)

    def measure(rows):
        clean = values[:, rows].sum(1)
        return clean + noise * torch.randn(len(clean), generator=generator, dtype=F64)

    return retrain(lambda rows, seed: rows, measure, subsets, seeds=[0, 1])


def test_the_truth_scores_one_and_its_negative_minus_one():
    values = torch.randn(3, 20, dtype=F64)
    truth = linear(values, half_subsets(20, 30))
    for scores, want in [(values, 1.0), (5 * values, 1.0), (-values, -1.0)]:
        found = linear_datamodeling_score(scores, truth)
        assert found.mean.value == pytest.approx(want, abs=1e-12)
        assert (found.per_query - want).abs().max() < 1e-12
        assert found.undefined == 0


def test_it_is_the_mean_of_scipys_rank_correlations():
    values, other = torch.randn(2, 4, 20, dtype=F64)
    truth = linear(values, half_subsets(20, 25), noise=2.0)
    found = linear_datamodeling_score(values + other, truth)
    want = []
    for q in range(4):
        predicted = [float((values + other)[q, subset].sum()) for subset in truth.subsets]
        want.append(scipy.stats.spearmanr(predicted, truth.means()[:, q]).statistic)
    torch.testing.assert_close(found.per_query, torch.tensor(want, dtype=F64))
    assert found.mean.value == pytest.approx(sum(want) / 4)
    assert found.mean.low < found.mean.value < found.mean.high


def test_columns_are_found_by_their_row_numbers():
    values = torch.randn(2, 6, dtype=F64)
    subsets = [torch.tensor(rows) for rows in ([1, 3], [5, 3], [1, 5, 4], [4, 3, 1])]
    truth = linear(values, subsets)
    rows = torch.tensor([1, 3, 4, 5])
    scores = Scores(values[:, rows], rows, support=-1)
    assert linear_datamodeling_score(scores, truth).mean.value == pytest.approx(1.0)
    with pytest.raises(ArgumentError, match="subset 0"):
        linear_datamodeling_score(Scores(values[:, 2:], torch.arange(2, 6), support=1), truth)
    with pytest.raises(ArgumentError, match="subset 1"):
        linear_datamodeling_score(values[:, :5], truth)


def test_influence_of_a_linear_model_predicts_halves():
    """Sign and order end to end: ridge regression, where half of the rows is a small step."""
    torch.manual_seed(3)
    x = torch.randn(60, 3, dtype=F64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=F64) + torch.randn(60, 1, dtype=F64)
    queries = torch.randn(8, 3, dtype=F64), torch.randn(8, 1, dtype=F64)
    l2 = 0.5

    def train(rows, seed):
        gram = 2 * x[rows].T @ x[rows] / len(rows) + l2 * torch.eye(3, dtype=F64)
        return torch.linalg.solve(gram, 2 * x[rows].T @ y[rows] / len(rows))

    def losses(theta):
        return (queries[0] @ theta - queries[1]).square().squeeze(1)

    model = torch.nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(train(torch.arange(60), 0).T)
    truth = retrain(train, losses, half_subsets(60, 50))
    scores = Influence(Objective(model, "mse", (x, y), l2=l2), damping=0.0).scores(queries)
    found = linear_datamodeling_score(scores, truth)
    assert found.mean.value > 0.9
    assert found.mean.low > 0.8


def test_queries_that_do_not_move_are_counted_and_left_out():
    values = torch.randn(3, 10, dtype=F64)
    values[1] = 0
    found = linear_datamodeling_score(values, linear(values, half_subsets(10, 9)))
    assert found.undefined == 1
    assert math.isnan(found.per_query[1])
    assert found.mean.value == pytest.approx(1.0)


def test_more_subsets_narrow_the_interval():
    values = torch.randn(20, 30, dtype=F64)
    widths = []
    for count in (10, 160):
        truth = linear(values, half_subsets(30, count), noise=3.0)
        found = linear_datamodeling_score(values, truth, resamples=200).mean
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 1.5


def test_what_does_not_fit_is_refused():
    values = torch.randn(2, 10, dtype=F64)
    truth = linear(values, half_subsets(10, 4))
    with pytest.raises(ShapeError, match="2 queries"):
        linear_datamodeling_score(values[:1], truth)
    with pytest.raises(ArgumentError, match="3 at least"):
        linear_datamodeling_score(values, linear(values, half_subsets(10, 2)))
    missing = Retrained(truth.subsets, torch.full_like(truth.values, torch.nan), truth.seeds)
    with pytest.raises(DataError, match="other shares"):
        linear_datamodeling_score(values, missing)
    with pytest.raises(ArgumentError, match="level"):
        linear_datamodeling_score(values, truth, level=1.0)
