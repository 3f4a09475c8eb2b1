"""Groups left out, and the filter by shared tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from woodbury import Influence, Objective
from woodbury.errors import ArgumentError, DataError, ShapeError
from woodbury.implicit import newton_cg
from woodbury.influence import Scores, TfIdf, leave_group_out


def test_one_model_gives_the_spread_in_the_group() -> None:
    gen = torch.Generator().manual_seed(0)
    values = torch.randn(3, 50, generator=gen, dtype=torch.float64)
    weights = torch.rand(50, generator=gen, dtype=torch.float64)
    groups = torch.randint(4, (50,), generator=gen)
    found = leave_group_out(Scores(values, torch.arange(50)), groups, weights=weights)
    for g in range(4):
        own = (values * weights)[:, groups == g]
        torch.testing.assert_close(found.values[:, g], -own.sum(1))
        spread = math.sqrt(own.shape[1]) * own.std(1)
        torch.testing.assert_close(found.standard_error[:, g], spread)
        assert found.sizes[g] == own.shape[1]
    assert found.models == 1


def test_the_standard_error_of_one_model_covers_other_draws() -> None:
    # Groups of 30 drawn from one population: the spread of their sums is what is claimed.
    gen = torch.Generator().manual_seed(0)
    values = torch.randn(1, 30 * 400, generator=gen, dtype=torch.float64).exp()
    groups = torch.arange(400).repeat_interleave(30)
    found = leave_group_out(Scores(values, torch.arange(30 * 400)), groups)
    claimed = found.standard_error.square().mean().sqrt().item()
    assert claimed == pytest.approx(found.values.std().item(), rel=0.15)


def test_several_models_give_the_error_of_their_mean() -> None:
    gen = torch.Generator().manual_seed(0)
    models = [torch.randn(2, 6, generator=gen, dtype=torch.float64) for _ in range(5)]
    rows = torch.tensor([3, 4, 7, 8, 9, 10])
    found = leave_group_out([Scores(v, rows) for v in models], [[3, 7], [10], [3, 4, 7, 8, 9, 10]])
    sums = torch.stack([-v[:, [0, 2]].sum(1) for v in models])
    torch.testing.assert_close(found.values[:, 0], sums.mean(0))
    torch.testing.assert_close(found.standard_error[:, 0], sums.std(0) / math.sqrt(5))
    assert found.models == 5
    assert bool(torch.isfinite(found.standard_error).all())


def test_a_small_group_left_out_changes_the_loss_as_estimated() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=gen, dtype=torch.float64)
    y = (x[:, 0] + torch.randn(400, generator=gen, dtype=torch.float64) > 0).long()
    query = torch.randn(5, 3, generator=gen, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    objective = Objective(nn.Linear(3, 2, bias=False).double(), "cross_entropy", (x, y), l2=1e-2)
    objective = objective.with_params(newton_cg(objective, gtol=1e-12))
    before = objective.with_data(query).per_example_losses()
    effects = leave_group_out(Influence(objective).scores(query), [range(10)])
    weights = torch.ones(400, dtype=torch.float64)
    weights[:10] = 0
    refit = objective.with_params(newton_cg(objective.with_weights(weights), gtol=1e-12))
    change = refit.with_data(query).per_example_losses() - before
    torch.testing.assert_close(effects.values[:, 0], change, rtol=0.15, atol=1e-4)


def test_what_cannot_be_grouped() -> None:
    scores = Scores(torch.zeros(2, 3), torch.arange(3))
    with pytest.raises(ArgumentError, match="no scores"):
        leave_group_out([], [[0]])
    with pytest.raises(ShapeError, match="asked the same"):
        leave_group_out([scores, Scores(torch.zeros(2, 3), torch.arange(1, 4))], [[1]])
    with pytest.raises(ShapeError, match=r"expected \[3\]"):
        leave_group_out(scores, [[0]], weights=torch.ones(2))


def test_the_filter_is_the_formula() -> None:
    documents = [[1, 2, 2, 3], [2, 4], [5], [3, 3, 3, 1, 1]]
    query = [2, 3, 3, 9]
    idf = {2: math.log(2.5 / 2.5 + 1), 3: math.log(2.5 / 2.5 + 1)}  # both in two of four
    once = TfIdf(documents).scores(query)
    truth = [idf[2] + 2 * idf[3], idf[2], 0.0, 2 * idf[3]]
    torch.testing.assert_close(once, torch.tensor(truth, dtype=torch.float64))
    counted = TfIdf(documents, k1=1.5, counts=True).scores(query)
    part = {f: 2.5 * f / (1.5 + f) for f in (1, 2, 3)}
    truth = [part[2] * idf[2] + 2 * idf[3], idf[2], 0.0, 2 * part[3] * idf[3]]
    torch.testing.assert_close(counted, torch.tensor(truth, dtype=torch.float64))
    assert TfIdf(documents).top(query).tolist() == [0, 3, 1]  # what shares nothing is left out
    assert TfIdf(documents).top(torch.tensor(query), 1).tolist() == [0]
    assert TfIdf([torch.tensor(d) for d in documents]).top(query).tolist() == [0, 3, 1]
    assert TfIdf(documents).idf(9) == pytest.approx(math.log(4.5 / 0.5 + 1))
    assert TfIdf(documents).top([9]).tolist() == []
    with pytest.raises(ArgumentError, match="k is 0"):
        TfIdf(documents).top(query, 0)
    with pytest.raises(ArgumentError, match="k1 is -1"):
        TfIdf(documents, k1=-1)
    with pytest.raises(DataError, match="no documents"):
        TfIdf([])
