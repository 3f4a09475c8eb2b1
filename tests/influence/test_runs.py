"""A folder of finished pieces is of one model, data, measurement and matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from woodbury import CG, EKFAC, Influence, Objective
from woodbury.errors import DataError
from woodbury.influence import GradientStore

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(12) % 3
ASKED = X[:2], Y[:2]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    return model.double().eval()


def last_layer(model: nn.Module, **settings: object) -> Objective:
    return Objective(
        model, "cross_entropy", (X, Y), params=["3.weight", "3.bias"], **{"l2": 0.1, **settings}
    )


def frozen_layer_changed() -> Objective:
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(3)
    return last_layer(model)


def statistics_changed() -> Objective:
    model = network()
    model[1].running_var.mul_(10)
    return last_layer(model)


OTHERS = {
    "frozen parameters": frozen_layer_changed,
    "buffers": statistics_changed,
    "weights": lambda: last_layer(network(), weights=torch.arange(12).double()),
    "l2": lambda: last_layer(network(), l2=10.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_parameter_and_no_data_belongs_to_the_run_too(name, tmp_path):
    here, other = last_layer(network()), OTHERS[name]()
    one = Influence(here, recipe=CG(), damping=0.1).scores(ASKED, folder=tmp_path / "scores")
    again = Influence(last_layer(copy.deepcopy(network())), recipe=CG(), damping=0.1)
    assert torch.equal(again.scores(ASKED, folder=tmp_path / "scores").values, one.values)
    with pytest.raises(DataError, match="model_and_data"):
        Influence(other, recipe=CG(), damping=0.1).scores(ASKED, folder=tmp_path / "scores")
    GradientStore(here, tmp_path / "store").write()
    with pytest.raises(DataError, match="model_and_data"):
        GradientStore(other, tmp_path / "store")


def test_another_criterion_is_another_run(tmp_path):
    model, targets = network(), torch.randn(12, 3).double()
    data = X, targets
    for number, (one, other) in enumerate(
        [
            (nn.MSELoss(), nn.MSELoss(reduction="sum")),
            (nn.HuberLoss(), nn.HuberLoss(delta=0.1)),
            (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
        ]
    ):
        folder = tmp_path / str(number)
        Influence(Objective(model, one, data), matrix="identity").scores(folder=folder)
        Influence(Objective(model, one, data), matrix="identity").scores(folder=folder)
        with pytest.raises(DataError, match="model_and_data"):
            Influence(Objective(model, other, data), matrix="identity").scores(folder=folder)


def test_another_function_that_measures_is_another_run(tmp_path):
    objective = last_layer(network())

    def scores(k: int) -> torch.Tensor:
        influence = Influence(objective, lambda outputs, batch: outputs[:, k], damping=0.1)
        return influence.scores(ASKED, folder=tmp_path).values

    one = scores(0)
    assert torch.equal(scores(0), one)
    with pytest.raises(DataError, match="what is measured of the queries"):
        scores(1)


def test_another_matrix_of_the_same_type_is_another_run(tmp_path):
    objective = last_layer(network())

    def scores(kind: str) -> torch.Tensor:
        influence = Influence(objective, matrix=lambda o: EKFAC(o, kind), damping=0.1)
        return influence.scores(ASKED, folder=tmp_path).values

    one = scores("exact")
    assert torch.equal(scores("exact"), one)
    with pytest.raises(DataError, match="products with the matrix"):
        scores("empirical")
