from __future__ import annotations

import pytest
import torch

from woodbury import Influence, Objective
from woodbury.errors import ArgumentError, ShapeError
from woodbury.influence import Scores
from woodbury.influence.evaluation import (
    counterfactual_removal,
    leave_one_out_retraining,
    removal_effects,
)

F64 = torch.float64
X = torch.tensor([1.0, -2.0, 4.0, 8.0, 0.5, -3.0], dtype=F64)


def total(rows, seed):
    return X[rows].sum() * (1 + seed)


def measure(model):
    return torch.stack([model, -model])


def test_effects_are_differences_of_one_seed():
    groups = [[0, 2], [3], []]
    effects = removal_effects(total, measure, groups, 6, seeds=[0, 1])
    lost = torch.tensor([5.0, 8.0, 0.0], dtype=F64)
    assert torch.equal(effects.changes[:, 0, 0], -lost)
    assert torch.equal(effects.changes[:, 1, 0], -2 * lost)
    assert torch.equal(effects.means()[:, 1], 1.5 * lost)
    torch.testing.assert_close(effects.standard_errors()[:, 0], lost / 2)
    assert torch.equal(
        effects.full, torch.stack([measure(total(torch.arange(6), s)) for s in (0, 1)])
    )


def test_leaving_out_one_row_of_a_ridge_regression_is_what_influence_predicts():
    torch.manual_seed(0)
    x, l2 = torch.randn(40, 3, dtype=F64), 0.3
    y = x @ torch.tensor([[1.0], [0.0], [-1.0]], dtype=F64) + torch.randn(40, 1, dtype=F64)
    asked = torch.randn(5, 3, dtype=F64), torch.randn(5, 1, dtype=F64)

    def train(rows, seed):
        """The minimiser of the objective without the rows that are missing: the mean is over 40."""
        gram = 2 * x[rows].T @ x[rows] / 40 + l2 * torch.eye(3, dtype=F64)
        return torch.linalg.solve(gram, 2 * x[rows].T @ y[rows] / 40)

    def losses(theta):
        return (asked[0] @ theta - asked[1]).square().squeeze(1)

    model = torch.nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(train(torch.arange(40), 0).T)
    scores = Influence(Objective(model, "mse", (x, y), l2=l2), damping=0.0).scores(asked)
    effects = leave_one_out_retraining(train, losses, 40, rows=range(0, 40, 2))
    found = effects.agreement(scores, resamples=100)
    assert found.pearson.min() > 0.97
    assert found.mean_pearson.value > 0.99
    # Also in size: the sign and the 1/N are those of leaving out.
    predicted = -scores.values[:, ::2]
    slope = (predicted * effects.means().T).sum() / predicted.square().sum()
    assert slope == pytest.approx(1.0, abs=0.2)  # to first order


def test_agreement_takes_weights_and_knows_constants():
    effects = leave_one_out_retraining(total, measure, 6)
    weights = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 1.0], dtype=F64)
    scores = torch.stack([X, -X]) / weights
    found = effects.agreement(scores, weights=weights, resamples=50)
    torch.testing.assert_close(found.pearson, torch.ones(2, dtype=F64))
    assert found.mean_spearman.value == pytest.approx(1.0)
    unweighted = effects.agreement(scores, resamples=50)
    assert unweighted.mean_pearson.value < 1 - 1e-6
    assert effects.agreement(torch.zeros(2, 6), resamples=50).pearson.isnan().all()


def test_counterfactuals_remove_what_scores_name():
    values = torch.stack([X, -X])
    found = counterfactual_removal(
        Scores(values, torch.arange(6), support=1), total, measure, [1, 2], draws=3
    )
    # Query 0 is supported by 8 and 4, query 1 (minus the sum) by -3 and -2.
    want = torch.tensor([[-8.0, -12.0], [-3.0, -5.0]], dtype=F64)
    assert torch.equal(found.changes, want)
    opposed = counterfactual_removal(
        Scores(values, torch.arange(6), support=1), total, measure, [1], side="oppose"
    )
    assert torch.equal(opposed.changes[:, 0], torch.tensor([3.0, 8.0], dtype=F64))
    # Where a loss is measured, support is what lowers it.
    loss = counterfactual_removal(Scores(values, torch.arange(6), support=-1), total, measure, [1])
    assert torch.equal(loss.changes, opposed.changes)
    # Random rows change both queries by the same amount with opposite signs.
    assert torch.equal(found.random[0], -found.random[1])
    assert (found.changes.abs() >= found.random.abs()).all()
    assert found.mean_change[0].value == pytest.approx(-5.5)
    assert found.mean_change[0].low <= -5.5 <= found.mean_change[0].high


def test_retrained_models_are_kept_for_the_next_question(tmp_path):
    calls = []

    def train(rows, seed):
        calls.append(len(rows))
        return total(rows, seed)

    scores = Scores(torch.stack([X, -X]), torch.arange(6), support=1)
    for _ in range(2):
        counterfactual_removal(scores, train, measure, [1], folder=tmp_path)
    assert len(calls) == 4


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="group 1 names rows"):
        removal_effects(total, measure, [[0], [6]], 6)
    with pytest.raises(ArgumentError, match="nothing is left"):
        removal_effects(total, measure, [list(range(6))], 6)
    effects = leave_one_out_retraining(total, measure, 6)
    with pytest.raises(ShapeError, match="2 queries"):
        effects.agreement(torch.zeros(3, 6))
    with pytest.raises(ShapeError, match="weights"):
        effects.agreement(torch.zeros(2, 6), weights=torch.ones(5))
    with pytest.raises(ArgumentError, match="3 at least"):
        leave_one_out_retraining(total, measure, 6, rows=[0, 1]).agreement(torch.zeros(2, 6))
    scores = torch.stack([X, -X])
    for sizes in ([0], [6], []):
        with pytest.raises(ArgumentError, match="sizes"):
            counterfactual_removal(scores, total, measure, sizes)
    with pytest.raises(ArgumentError, match="draws"):
        counterfactual_removal(scores, total, measure, [1], draws=0)
    with pytest.raises(ArgumentError, match="some rows"):
        counterfactual_removal(Scores(scores, torch.arange(1, 7), support=1), total, measure, [1])
    with pytest.raises(ShapeError, match="were measured"):
        counterfactual_removal(scores[:1], total, measure, [1])


@pytest.mark.parametrize("name", ["share", "sedes"])
def test_only_settings_that_make_all_models_are_handed_on(name):
    with pytest.raises(TypeError, match=f"no setting '{name}'.*seeds"):
        leave_one_out_retraining(total, measure, 6, **{name: (0, 2)})
