from __future__ import annotations

import pytest
import torch
from tests.curvature.reference import classification, network
from torch import nn

from woodbury import CG, GaussNewton, Hessian, Influence, Objective
from woodbury.errors import ArgumentError, DtypeError, StructureError
from woodbury.influence.evaluation import bregman_response

F64 = torch.float64


def setting(weights=None, l2=0.0, batches=False):
    model = network((3, 5, 2))
    x, y = classification(12, 3, 2)
    data = [(x[:5], y[:5]), (x[5:], y[5:])] if batches else (x, y)
    return Objective(model, "cross_entropy", data, weights=weights, l2=l2)


QUERIES = torch.tensor([[0.3, -1.0, 0.5], [1.0, 0.2, -0.4]], dtype=F64), torch.tensor([0, 1])


@pytest.mark.parametrize("case", ["plain", "weights", "l2", "batches", "margin"])
def test_its_derivative_is_influence_with_gauss_newton(case):
    """At random parameters, far from any minimum: that is its point."""
    weights = torch.linspace(0.5, 2, 12, dtype=F64) if case == "weights" else None
    l2 = torch.linspace(0.1, 1, 32, dtype=F64) if case == "l2" else 0.0
    objective = setting(weights, l2, case == "batches")
    measurement = "margin" if case == "margin" else "loss"
    truth = bregman_response(
        objective, QUERIES, damping=0.05, measurement=measurement, epsilon=1e-6, tol=1e-9
    )
    assert truth.converged.all()
    scores = Influence(objective, measurement, damping=0.05).scores(QUERIES)
    torch.testing.assert_close(truth.scores.values, scores.values, rtol=1e-4, atol=1e-7)
    assert truth.scores.support == scores.support
    # The Hessian is another matrix here, and would give other scores.
    other = Influence(objective, measurement, CG(), matrix=Hessian(objective), damping=2.0)
    assert (other.scores(QUERIES).values - scores.values).norm() > 0.1 * scores.values.norm()


def test_the_error_of_the_derivative_falls_with_epsilon():
    objective = setting()
    exact = Influence(objective, damping=0.05).scores(QUERIES).values
    gaps = []
    for epsilon in (1e-2, 1e-3, 1e-4):
        found = bregman_response(objective, QUERIES, damping=0.05, epsilon=epsilon, tol=1e-9)
        gaps.append(float((found.scores.values - exact).norm()))
    assert gaps[1] < gaps[0] / 5
    assert gaps[2] < gaps[1] / 5


def test_it_is_exact_where_the_model_is_linear_and_the_loss_squared():
    """Everything is quadratic then, so the minimiser has a closed form at any epsilon."""
    torch.manual_seed(0)
    x, y = torch.randn(7, 3, dtype=F64), torch.randn(7, 1, dtype=F64)
    model = nn.Linear(3, 1, bias=False).double()
    objective = Objective(model, "mse", (x, y), l2=0.1)
    found = bregman_response(objective, damping=0.2, epsilon=0.3, rows=torch.tensor([4]), tol=1e-11)
    start = objective.params_vector()
    G = GaussNewton(objective).to_dense() + 0.2 * torch.eye(3, dtype=F64)
    row = x[4]
    H = G + 0.3 * 2 * torch.outer(row, row)
    moved = start - torch.linalg.solve(H, 0.3 * 2 * (row @ start - y[4]) * row)
    want = ((x @ moved)[:, None] - y).square() - ((x @ start)[:, None] - y).square()
    torch.testing.assert_close(found.scores.values, want / (0.3 * 7), rtol=1e-8, atol=1e-9)
    assert found.scores.rows.tolist() == [4]


def test_blocks_and_rows_give_the_same_columns():
    objective = setting()
    whole = bregman_response(objective, QUERIES, damping=0.1)
    assert whole.epsilon == pytest.approx(1 / 12)
    for block in (1, 5):
        parts = bregman_response(objective, QUERIES, damping=0.1, block=block)
        torch.testing.assert_close(parts.scores.values, whole.scores.values, rtol=1e-4, atol=1e-7)
    some = bregman_response(objective, QUERIES, damping=0.1, rows=torch.tensor([7, 2]))
    assert some.scores.rows.tolist() == [2, 7]
    want = whole.scores.values[:, [2, 7]]
    torch.testing.assert_close(some.scores.values, want, rtol=1e-4, atol=1e-7)
    none = bregman_response(objective, QUERIES, damping=0.1, rows=torch.tensor([]).long())
    assert none.scores.values.shape == (2, 0)
    seen = []
    bregman_response(
        objective, QUERIES, damping=0.1, block=5, progress=lambda what, f: seen.append(f)
    )
    assert seen[-1] == 1.0


def test_too_few_steps_are_reported():
    found = bregman_response(setting(), QUERIES, damping=0.01, max_steps=2)
    assert not found.converged.any()
    assert (found.gradient_norms > 1e-7).all()


def test_bad_arguments_are_refused():
    objective = setting()
    for change in ({"damping": -1.0}, {"damping": 0.0}, {"damping": float("inf")}):
        with pytest.raises(ArgumentError, match="damping"):
            bregman_response(objective, **change)
    for epsilon in (0.0, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="epsilon"):
            bregman_response(objective, damping=0.1, epsilon=epsilon)
    with pytest.raises(ArgumentError, match="block"):
        bregman_response(objective, damping=0.1, block=0)
    x, y = classification(12, 3, 2)
    single = Objective(network((3, 5, 2)).float(), "cross_entropy", (x.float(), y))
    with pytest.raises(DtypeError, match="float64"):
        bregman_response(single, damping=0.1)
    train = Objective(network((3, 5, 2)), "cross_entropy", (x, y), mode="train")
    with pytest.raises(StructureError, match="eval"):
        bregman_response(train, damping=0.1)
