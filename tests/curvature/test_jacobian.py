from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance
from tests.curvature.reference import (
    apart,
    classification,
    cross_entropy,
    dense_jacobian,
    flat_parameters,
    mlp,
    network,
    unequal,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from woodbury import Jacobian, Objective
from woodbury.errors import ArgumentError, DataError, NonFiniteError, ShapeError

F64 = torch.float64
NETWORKS = [(3, 4, 2), (3, 36, 33, 2), (3, 2)]


def setting(sizes, rows: int = 9):
    model = network(sizes)
    x, y = classification(rows, sizes[0], sizes[-1])
    return model, x, y, flat_parameters(model)


def dense(sizes, x, flat):
    return dense_jacobian(lambda t: mlp(t, x, sizes, torch.tanh), flat)


class TestConformance(OperatorConformance):
    def make(self):
        cases = []
        for sizes, cache in [((1, 2, 2), "auto"), ((1, 2, 2), None), ((2, 2), "auto")]:
            model, x, y, flat = setting(sizes, 4)
            objective = Objective(model, "cross_entropy", [(x[:1], y[:1]), (x[1:], y[1:])], l2=3.0)
            cases.append((Jacobian(objective, cache=cache), dense(sizes, x, flat)))
        return cases


@pytest.mark.parametrize("sizes", NETWORKS)
@pytest.mark.parametrize("cache", ["auto", 30_000, 5000, 0])
def test_any_budget_gives_the_same(sizes, cache) -> None:
    model, x, y, flat = setting(sizes)
    J = Jacobian(Objective(model, "cross_entropy", unequal(x, y)), cache=cache)
    M = dense(sizes, x, flat)
    V, U = torch.randn(len(flat), 3, dtype=F64), torch.randn(len(M), 3, dtype=F64)
    for _ in range(2):
        assert apart(J @ V, M @ V) < 1e-12
        assert apart(J @ V[:, 0], M @ V[:, 0]) < 1e-12
        assert apart(J.T @ U, M.T @ U) < 1e-12
        assert apart(J.T @ U[:, 0], M.T @ U[:, 0]) < 1e-12


def test_rows_are_the_predictions_in_memory_order() -> None:
    model = nn.Conv1d(2, 3, 2, dtype=F64)
    x = torch.randn(4, 2, 5, dtype=F64)
    objective = Objective(model, "mse", (x, torch.zeros(4, 3, 4, dtype=F64)))
    J, theta = Jacobian(objective), objective.params_vector()
    assert J.shape == (4 * 3 * 4, 15)
    # the model is linear in its parameters
    torch.testing.assert_close(J @ theta, objective.predict().flatten())


@pytest.mark.parametrize("cache", ["auto", 0])
def test_of_losses(cache) -> None:
    sizes = (3, 4, 2)
    model, x, y, flat = setting(sizes)
    M = dense_jacobian(lambda t: cross_entropy(mlp(t, x, sizes, torch.tanh), y), flat)
    objective = Objective(model, "cross_entropy", unequal(x, y), weights=torch.rand(9, dtype=F64))
    J = Jacobian(objective, "losses", cache=cache)
    assert J.shape == (9, 26)
    assert apart(J.to_dense(), M) < 1e-12
    assert apart(J.T.to_dense(), M.T) < 1e-12


def test_shuffled_rows_with_indices() -> None:
    sizes = (3, 4, 2)
    model, x, y, flat = setting(sizes)
    loader = DataLoader(TensorDataset(x, y, torch.arange(9)), batch_size=4, shuffle=True)
    J = Jacobian(Objective(model, "cross_entropy", loader))
    M = dense(sizes, x, flat)
    assert apart(J.to_dense(), M) < 1e-12
    assert apart(J.T.to_dense(), M.T) < 1e-12
    unknown = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    with pytest.raises(DataError, match="shuffle=False"):
        Jacobian(Objective(model, "cross_entropy", unknown))


def test_derivatives_of_products() -> None:
    model, x, y, flat = setting((3, 4, 2))
    J = Jacobian(Objective(model, "cross_entropy", (x, y)))
    M = dense((3, 4, 2), x, flat)
    v = torch.randn(26, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad((J @ v).square().sum() / 2, v)
    assert apart(gradient, M.T @ M @ v.detach()) < 1e-12


class TestBadUse:
    def test_arguments(self) -> None:
        model, x, y, _ = setting((3, 2))
        with pytest.raises(ArgumentError, match="'logits'"):
            Jacobian(Objective(model, "cross_entropy", (x, y)), "logits")

    def test_outputs_of_several_shapes(self) -> None:
        model = nn.Linear(2, 2)
        data = [(torch.ones(3, n, 2), torch.ones(3, n, 2)) for n in (4, 5)]
        with pytest.raises(ShapeError, match=r"batch 1 have shape \(3, 5, 2\).*\[B, 4, 2\]"):
            _ = Jacobian(Objective(model, "mse", data)) @ torch.ones(6)

    def test_outputs_that_are_not_finite(self) -> None:
        model, x, y, flat = setting((3, 2))
        x[8] = float("nan")
        with pytest.raises(NonFiniteError, match="batch 2"):
            _ = Jacobian(Objective(model, "cross_entropy", unequal(x, y))) @ flat
