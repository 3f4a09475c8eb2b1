"""Every estimator beside its formula, written out with dense matrices."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.curvature.reference import classification, network
from torch import nn

from woodbury import Influence, Objective
from woodbury.errors import (
    ArgumentError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    SingularError,
    StructureError,
)
from woodbury.influence import rivals

F64 = torch.float64
SIZES = (3, 4, 2)
QUERIES = torch.tensor([[0.3, -1.0, 0.5], [1.0, 0.2, -0.4]], dtype=F64), torch.tensor([0, 1])


class Setting:
    """A network, its objective, and gradients of losses and margins by a loop."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = network(SIZES)
        self.x, self.y = classification(11, 3, 2)
        batches = [(self.x[:4], self.y[:4]), (self.x[4:], self.y[4:])]
        self.objective = Objective(self.model, "cross_entropy", batches)

    def gradients(self, x, y, margin: bool = False) -> torch.Tensor:
        rows = []
        for row, label in zip(x, y, strict=True):
            logits = self.model(row)
            p = logits.softmax(0)[label]
            value = torch.log(p / (1 - p)) if margin else -torch.log(p)
            parts = torch.autograd.grad(value, list(self.model.parameters()))
            rows.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(rows)

    @property
    def train(self) -> torch.Tensor:
        return self.gradients(self.x, self.y)

    def query(self, margin: bool = False) -> torch.Tensor:
        return self.gradients(*QUERIES, margin)


@pytest.mark.parametrize("measurement", ["loss", "margin"])
def test_products_and_cosines_of_gradients(measurement):
    setting = Setting()
    G, V = setting.train, setting.query(measurement == "margin")
    dot = rivals.grad_dot(setting.objective, QUERIES, measurement=measurement)
    torch.testing.assert_close(dot.values, -V @ G.T / 11)
    cos = rivals.grad_cos(setting.objective, QUERIES, measurement=measurement)
    want = -torch.nn.functional.cosine_similarity(V[:, None], G[None], dim=2)
    torch.testing.assert_close(cos.values, want)
    assert dot.support == cos.support == (-1 if measurement == "loss" else 1)
    assert dot.rows.tolist() == list(range(11))
    # The identity for a matrix, by the other way.
    other = Influence(setting.objective, measurement, matrix="identity", damping=0.0)
    torch.testing.assert_close(dot.values, other.scores(QUERIES).values)


def test_cosines_of_a_zero_gradient_are_zero():
    x = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=F64)
    model = nn.Linear(2, 1, bias=False).double()
    scores = rivals.grad_cos(Objective(model, "mse", (x, torch.ones(2, 1, dtype=F64))))
    assert scores.values[:, 1].abs().max() == 0
    assert scores.values[0, 0] == pytest.approx(-1.0)


def test_tracin_sums_over_checkpoints():
    setting = Setting()
    one = setting.objective.params_vector()
    two = one + 0.3 * torch.randn_like(one)
    found = rivals.trac_in(setting.objective, [one, two], QUERIES, rates=[0.1, 0.5])
    want = torch.zeros(2, 11, dtype=F64)
    for theta, rate in [(one, 0.1), (two, 0.5)]:
        nn.utils.vector_to_parameters(theta.clone(), setting.model.parameters())
        want -= rate * setting.query() @ setting.train.T / 11
    torch.testing.assert_close(found.values, want)
    again = rivals.trac_in(setting.objective, [one], QUERIES, rates=2.0)
    dot = rivals.grad_dot(setting.objective.with_params(one), QUERIES)
    torch.testing.assert_close(again.values, 2 * dot.values)


def test_tracin_is_what_a_small_step_of_gradient_descent_does():
    """To first order: the change of the query's loss is the sum of the scores of all examples."""
    setting = Setting()
    objective, rate = setting.objective, 1e-5
    theta = objective.params_vector()
    scores = rivals.trac_in(objective, [theta], QUERIES, rates=rate)
    asked = objective.with_data(QUERIES)
    moved = asked.with_params(theta - rate * objective.gradient())
    change = moved.per_example_losses() - asked.per_example_losses()
    torch.testing.assert_close(scores.values.sum(1), change, rtol=1e-3, atol=1e-10)


def test_representer_points_add_up_to_the_output():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 5), nn.Tanh()).double()
    model = nn.Sequential(body, nn.Linear(5, 2).double())
    x, y = classification(11, 3, 2)
    weights = torch.linspace(0.5, 2, 11, dtype=F64)
    objective = Objective(
        model, "cross_entropy", (x, y), params=["1.weight", "1.bias"], l2=0.05, weights=weights
    )
    output = 0
    found = rivals.representer_points(
        objective, QUERIES, measurement=lambda z, batch: z[:, output], gtol=1e-12
    )
    assert found.settings["stationarity"] < 1e-9
    # The fit by another way: the layer alone, by L-BFGS.
    features = torch.cat([body(x), torch.ones(11, 1)], 1).detach()
    W = torch.zeros(2, 6, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [W],
        max_iter=500,
        tolerance_grad=1e-13,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def loss():
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(features @ W.T, y, reduction="none")
        total = (weights * losses).mean() + 0.025 * W.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    W = W.detach()
    asked = torch.cat([body(QUERIES[0]), torch.ones(2, 1)], 1).detach()
    torch.testing.assert_close(
        (found.values * weights).sum(1), asked @ W[output], rtol=1e-6, atol=1e-7
    )
    p = (features @ W.T).softmax(1)
    alpha = -(p - nn.functional.one_hot(y, 2)) / (0.05 * 11)
    want = (asked @ features.T) * alpha[:, output]
    torch.testing.assert_close(found.values, want, rtol=1e-6, atol=1e-7)


def test_representer_points_of_a_margin_and_without_a_fit():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = classification(11, 3, 2)
    objective = Objective(model, "cross_entropy", (x, y), l2=0.2)
    plain = rivals.representer_points(objective, QUERIES, fit=False)
    dot = rivals.grad_dot(objective, QUERIES)
    torch.testing.assert_close(plain.values, dot.values / 0.2)


def test_representer_points_need_a_linear_layer_and_a_penalty():
    setting = Setting()
    data = setting.x, setting.y
    with pytest.raises(StructureError, match="not linear"):
        rivals.representer_points(Objective(setting.model, "cross_entropy", data, l2=0.1))
    last = list(dict(setting.model.named_parameters()))[-2:]
    with pytest.raises(ArgumentError, match="l2"):
        rivals.representer_points(Objective(setting.model, "cross_entropy", data, params=last))


@pytest.mark.parametrize("measurement", ["margin", "loss"])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_trak_is_its_formula(measurement, damping):
    models = [Setting(seed) for seed in (0, 1)]
    for other in models[1:]:
        other.x, other.y = models[0].x, models[0].y
    x, y = models[0].x, models[0].y
    objectives = [Objective(m.model, "cross_entropy", (x, y)) for m in models]
    found = rivals.trak(
        objectives, QUERIES, dim=4, damping=damping, measurement=measurement, seed=3
    )
    n = objectives[0].space.dim
    generator = torch.Generator().manual_seed(3)
    total, doubt = 0, 0
    for m in models:
        P = torch.randn(n, 4, generator=generator, dtype=F64) / n**0.5
        Phi = m.gradients(x, y, margin=True) @ P
        phi = m.query(measurement == "margin") @ P
        core = torch.linalg.inv(Phi.T @ Phi + damping * torch.eye(4, dtype=F64))
        total = total + phi @ core @ Phi.T / 2
        p = m.model(x).softmax(1)[torch.arange(11), y].detach()
        doubt = doubt + (1 - p) / 2
    torch.testing.assert_close(found.values, total * doubt, rtol=1e-8, atol=1e-10)
    assert found.support == (1 if measurement == "margin" else -1)


def test_trak_with_a_square_projection_does_not_depend_on_it():
    """With as many columns as parameters (and full rank) the projection cancels."""
    torch.manual_seed(0)
    x, y = classification(30, 3, 2)
    model = nn.Linear(3, 1, bias=False).double()
    binary = Objective(model, nn.BCEWithLogitsLoss(), (x, y[:, None].double()))
    asked = QUERIES[0], QUERIES[1][:, None].double()
    one, two = (rivals.trak(binary, asked, dim=3, seed=seed) for seed in (0, 1))
    torch.testing.assert_close(one.values, two.values, rtol=1e-8, atol=1e-10)


def test_trak_refuses_what_it_cannot_do():
    setting = Setting()
    with pytest.raises(ArgumentError, match="11 examples"):
        rivals.trak(setting.objective, dim=20)
    same = Objective(setting.model, "cross_entropy", (setting.x[:1].repeat(9, 1), setting.y[:9]))
    with pytest.raises((SingularError, NotPositiveDefiniteError)):
        rivals.trak(same, dim=5)
    with pytest.raises(ArgumentError, match="no models"):
        rivals.trak([])
    for options in ({"dim": 0}, {"damping": -1.0}, {"damping": math.inf}):
        with pytest.raises(ArgumentError, match="dim"):
            rivals.trak(setting.objective, **options)
    x, y = classification(5, 3, 2)
    other = Objective(network(SIZES), "cross_entropy", (x, y))
    with pytest.raises(ShapeError, match="give equals"):
        rivals.trak([setting.objective, other])
    squared = Objective(nn.Linear(3, 1).double(), "mse", (x, y[:, None].double()))
    with pytest.raises(StructureError, match="margin"):
        rivals.trak(squared, dim=2)


@pytest.mark.parametrize("damping", [None, 0.05])
def test_datainf_is_the_mean_of_inverses(damping):
    setting = Setting()
    found = rivals.data_inf(setting.objective, QUERIES, damping=damping)
    G, V = setting.train, setting.query()
    want = torch.zeros(2, 11, dtype=F64)
    ends = [0, 16, 26]  # weight and bias of each layer
    for start, stop in itertools.pairwise(ends):
        g, v = G[:, start:stop], V[:, start:stop]
        n = stop - start
        rho = 0.1 * float(g.square().sum()) / (11 * n) if damping is None else damping
        inverses = [
            torch.linalg.inv(torch.outer(row, row) + rho * torch.eye(n, dtype=F64)) for row in g
        ]
        want -= v @ torch.stack(inverses).mean(0) @ g.T / 11
    torch.testing.assert_close(found.values, want, rtol=1e-9, atol=1e-11)


def test_datainf_with_one_example_is_exact():
    """The mean of one inverse is the inverse of the mean."""
    x, y = classification(1, 3, 2)
    objective = Objective(nn.Linear(3, 2).double(), "cross_entropy", (x, y))
    found = rivals.data_inf(objective, QUERIES, damping=0.1)
    want = Influence(objective, matrix="empirical_fisher", damping=0.1).scores(QUERIES)
    torch.testing.assert_close(found.values, want.values, rtol=1e-8, atol=1e-11)
    with pytest.raises(ArgumentError, match="damping"):
        rivals.data_inf(objective, damping=0.0)


@pytest.mark.parametrize("name", ["grad_dot", "grad_cos", "trak", "data_inf"])
def test_rows_that_depend_on_their_batch_are_refused(name):
    x, y = classification(5, 3, 2)
    train = Objective(network(SIZES), "cross_entropy", (x, y), mode="train")
    settings = {"dim": 2} if name == "trak" else {}
    with pytest.raises(StructureError, match="eval"):
        getattr(rivals, name)(train, **settings)


def test_gradients_that_are_not_finite_are_named():
    x, y = classification(5, 3, 2)
    x[3, 1] = math.inf
    objective = Objective(network(SIZES), "cross_entropy", [(x[:2], y[:2]), (x[2:], y[2:])])
    with pytest.raises(NonFiniteError, match="batch 1|rows 3"):
        rivals.grad_dot(objective, QUERIES)


def test_wrong_checkpoints_are_refused():
    objective = Setting().objective
    with pytest.raises(ArgumentError, match="no checkpoints"):
        rivals.trac_in(objective, [])
    theta = objective.params_vector()
    with pytest.raises(ArgumentError, match="2 rates and 1"):
        rivals.trac_in(objective, [theta], rates=[0.1, 0.2])
    with pytest.raises(ShapeError):
        rivals.trac_in(objective, [theta[:-1]])
