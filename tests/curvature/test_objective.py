from __future__ import annotations

import pytest
import torch
from tests.curvature.reference import (
    all_gradients,
    apart,
    classification,
    classifier,
    cross_entropy,
    gradient_of,
    mlp,
)
from torch import nn

from woodbury import Objective
from woodbury.errors import (
    ArgumentError,
    DataError,
    DtypeError,
    ShapeError,
    StructureError,
)

SIZES = (3, 4, 2)
F64 = torch.float64


def test_value_and_gradient_of_unequal_batches() -> None:
    model, data, losses, flat = classifier()
    objective = Objective(model, "cross_entropy", data)
    assert apart(objective.value(), losses(flat).mean()) < 1e-14
    assert apart(objective.gradient(), gradient_of(lambda t: losses(t).mean(), flat)) < 1e-12
    assert apart(objective.per_example_losses(), losses(flat)) < 1e-14
    assert objective.num_examples == 9
    assert torch.equal(objective.params_vector(), flat)


@pytest.mark.parametrize("vector", [True, False])
def test_weights_and_regularizer(vector: bool) -> None:
    model, data, losses, flat = classifier()
    weights = torch.rand(9, dtype=F64) - 0.3
    l2 = torch.rand(len(flat), dtype=F64) if vector else 0.7

    def total(t: torch.Tensor) -> torch.Tensor:
        return (weights * losses(t)).sum() / 9 + 0.5 * (l2 * t**2).sum()

    objective = Objective(model, nn.CrossEntropyLoss(), data, weights=weights, l2=l2)
    assert apart(objective.value(), total(flat)) < 1e-13
    assert apart(objective.gradient(), gradient_of(total, flat)) < 1e-12
    assert apart(objective.per_example_losses(), losses(flat)) < 1e-14
    plain = objective.with_weights(None)
    assert plain.weights is None
    assert apart(plain.value(), losses(flat).mean() + 0.5 * (l2 * flat**2).sum()) < 1e-13
    assert torch.equal(objective.weights, weights)


def test_reductions_do_not_change_the_mean_over_examples() -> None:
    model, data, _, _ = classifier()
    values = [
        Objective(model, nn.CrossEntropyLoss(reduction=r), data).value()
        for r in ("mean", "sum", "none")
    ]
    values.append(Objective(model, nn.functional.cross_entropy, data).value())
    values.append(Objective(model, lambda z, y: cross_entropy(z, y), data).value())
    values.append(Objective(model, lambda z, y: cross_entropy(z, y).mean(), data).value())
    assert max(apart(value, values[0]) for value in values) < 1e-14


def test_predict() -> None:
    model, data, _, _ = classifier()
    objective = Objective(model, "cross_entropy", data)
    x = torch.cat([x for x, _ in data])
    torch.testing.assert_close(objective.predict(), model(x).detach())


def test_at_other_parameters() -> None:
    model, data, losses, flat = classifier()
    objective = Objective(model, "cross_entropy", data)
    other = flat + torch.randn_like(flat)
    moved = objective.with_params(other)
    assert apart(moved.value(), losses(other).mean()) < 1e-13
    other.zero_()  # a copy was taken
    assert moved.params_vector().abs().max() > 0
    assert apart(objective.value(), losses(flat).mean()) < 1e-13
    with pytest.raises(ShapeError, match="expected"):
        objective.with_params(flat[1:])
    with pytest.raises(ShapeError, match=r"expected \[26\]"):
        objective.with_params(flat[:, None])
    with pytest.raises(DtypeError):
        objective.with_params(flat.float())


def test_an_objective_follows_its_model() -> None:
    model, data, losses, flat = classifier()
    objective = Objective(model, "cross_entropy", data)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert apart(objective.value(), losses(flat + 0.1).mean()) < 1e-13


class TestPerExampleGradients:
    @pytest.mark.parametrize("rows", [None, 1, 2, 3])
    def test_gradients(self, rows: int | None) -> None:
        model, data, losses, flat = classifier()
        chunks = list(Objective(model, "cross_entropy", data).per_example_gradients(rows))
        assert all(len(places) == len(chunk) <= (rows or 9) for places, chunk in chunks)
        assert torch.cat([places for places, _ in chunks]).tolist() == list(range(9))
        assert apart(torch.cat([g for _, g in chunks]), gradient_of(losses, flat)) < 1e-12

    def test_mappings(self) -> None:
        model, data, losses, flat = classifier()
        batches = [{"input": x, "labels": y} for x, y in data]
        gradients = all_gradients(Objective(model, "cross_entropy", batches))
        assert apart(gradients, gradient_of(losses, flat)) < 1e-12

    def test_a_model_that_vmap_cannot_do(self) -> None:
        class Stubborn(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.ones(3, dtype=F64))

            def forward(self, x):
                assert float(x.abs().sum()) >= 0  # reads a number, which vmap refuses
                return x @ self.w

        x, y = torch.randn(5, 3, dtype=F64), torch.randn(5, dtype=F64)
        gradients = all_gradients(Objective(Stubborn(), "mse", (x, y)), 2)
        expected = 2 * (x.sum(1) - y)[:, None] * x
        assert apart(gradients, expected) < 1e-13

    def test_examples_that_depend_on_their_batch(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
        x, y = classification(6, 3, 2)
        objective = Objective(model, "cross_entropy", (x, y), mode="train")
        mean = all_gradients(objective, 4).mean(0)
        assert apart(mean, objective.gradient()) < 1e-12

    def test_refusals(self) -> None:
        model, data, _, _ = classifier()
        with pytest.raises(ArgumentError, match="rows is 0"):
            Objective(model, "cross_entropy", data).per_example_gradients(0)
        objective = Objective(model, lambda z, y: cross_entropy(z, y).mean(), data)
        with pytest.raises(DataError, match="one loss per example"):
            list(objective.per_example_gradients())


class TestFunctional:
    def test_losses_per_example(self) -> None:
        _, data, losses, flat = classifier()

        def loss(params, batch):
            return cross_entropy(mlp(params["t"], batch[0], SIZES, torch.tanh), batch[1])

        objective = Objective.functional(loss, {"t": flat}, data, l2=0.1)
        assert apart(objective.value(), losses(flat).mean() + 0.05 * (flat**2).sum()) < 1e-13
        assert apart(objective.per_example_losses(), losses(flat)) < 1e-13
        gradients = all_gradients(objective)
        assert apart(gradients, gradient_of(losses, flat)) < 1e-12
        mean = Objective.functional(lambda p, b: loss(p, b).mean(), {"t": flat}, data, l2=0.1)
        assert apart(mean.gradient(), objective.gradient()) < 1e-13

    def test_outputs_and_criterion(self) -> None:
        _, data, losses, flat = classifier()

        def predict(params, batch):
            return mlp(params["t"], batch[0], SIZES, torch.tanh)

        objective = Objective.functional(
            None, {"t": flat}, data, predict=predict, criterion="cross_entropy"
        )
        assert apart(objective.value(), losses(flat).mean()) < 1e-13
        assert objective.predict().shape == (9, 2)

    def test_a_criterion_without_targets_sees_the_batch(self) -> None:
        x = torch.randn(5, 2, dtype=F64)
        objective = Objective.functional(
            None,
            {"w": torch.ones(2, dtype=F64)},
            x,
            predict=lambda p, x: x * p["w"],
            criterion=lambda z, x: ((z - 2 * x) ** 2).sum(1),
        )
        assert apart(objective.value(), (x**2).sum(1).mean()) < 1e-13

    def test_refusals(self) -> None:
        w = {"w": torch.ones(2)}
        with pytest.raises(ArgumentError, match="give a loss"):
            Objective.functional(None, w, [torch.ones(2)])
        with pytest.raises(ArgumentError, match="belong together"):
            Objective.functional(None, w, [torch.ones(2)], predict=lambda p, b: b)
        with pytest.raises(ArgumentError, match="at least one"):
            Objective.functional(lambda p, b: b.sum(), {}, [torch.ones(2)])
        objective = Objective.functional(lambda p, x: (x * p["w"]).sum(), w, [torch.ones(2)])
        with pytest.raises(StructureError, match="predict=..., criterion=..."):
            objective.predict()
        with pytest.raises(DataError, match="one loss per example"):
            objective.per_example_losses()

    def test_loss_and_criterion_that_differ_are_noticed(self) -> None:
        objective = Objective.functional(
            lambda p, x: ((x * p["w"]) ** 2).sum(1) + p["w"].sum(),
            {"w": torch.ones(2)},
            torch.ones(3, 2),
            predict=lambda p, x: x * p["w"],
            criterion=lambda z, x: (z**2).sum(1),
        )
        with pytest.raises(DataError, match=r"12\.0 and 6\.0; leave loss out"):
            objective.value()
