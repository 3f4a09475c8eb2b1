from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance
from tests.curvature.reference import (
    apart,
    classification,
    cross_entropy,
    dense_gauss_newton,
    dense_hessian,
    flat_parameters,
    mlp,
    network,
    unequal,
)
from torch import nn

from woodbury import GaussNewton, Hessian, Objective
from woodbury.errors import GradientError, NonFiniteError, StructureError

F64 = torch.float64
# The second is wide enough for signals, the third a single layer.
NETWORKS = [(3, 4, 2), (3, 36, 33, 2), (3, 2)]


def setting(sizes, rows: int = 9):
    model = network(sizes)
    x, y = classification(rows, sizes[0], sizes[-1])
    return model, x, y, flat_parameters(model)


def dense(sizes, x, y, flat, weights=None, l2=0.0):
    """``J^T H J`` formed from a network and a loss written by hand."""
    w = torch.ones(len(x), dtype=F64) if weights is None else weights
    M = dense_gauss_newton(
        lambda t: mlp(t, x, sizes, torch.tanh),
        lambda z: (w * cross_entropy(z, y)).sum() / len(x),
        flat,
    )
    return M + torch.diag(torch.as_tensor(l2, dtype=F64).expand(len(flat)))


class TestConformance(OperatorConformance):
    def make(self):
        cases = []
        for sizes, cache in [((1, 2, 2), None), ((3, 2), "auto")]:
            model, x, y, flat = setting(sizes, 6)
            objective = Objective(model, "cross_entropy", [(x[:2], y[:2]), (x[2:], y[2:])])
            cases.append((GaussNewton(objective, cache=cache), dense(sizes, x, y, flat)))
        sizes = (1, 2, 2)
        model, x, y, flat = setting(sizes, 6)
        weights, l2 = torch.rand(6, dtype=F64), torch.rand(len(flat), dtype=F64)
        objective = Objective(model, "cross_entropy", (x, y), weights=weights, l2=l2)
        cases.append((GaussNewton(objective), dense(sizes, x, y, flat, weights, l2)))
        single, x32 = network(sizes).float(), x.float()
        G = GaussNewton(Objective(single, "cross_entropy", (x32, y)))
        cases.append((G, dense(sizes, x32.double(), y, flat_parameters(single).double())))
        return cases


@pytest.mark.parametrize("sizes", NETWORKS)
@pytest.mark.parametrize("cache", ["auto", 30_000, 5000, 0])
def test_any_budget_gives_the_same(sizes, cache) -> None:
    model, x, y, flat = setting(sizes)
    weights = torch.rand(9, dtype=F64)
    objective = Objective(model, "cross_entropy", unequal(x, y), weights=weights, l2=0.1)
    G = GaussNewton(objective, cache=cache)
    M = dense(sizes, x, y, flat, weights, 0.1)
    V = torch.randn(len(flat), 3, dtype=F64)
    for _ in range(2):
        assert apart(G @ V, M @ V) < 1e-12
        assert apart(G @ V[:, 0], M @ V[:, 0]) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("cache", ["auto", 0])
def test_squared_errors(reduction: str, cache) -> None:
    sizes = (3, 5, 2)
    model, x, _, flat = setting(sizes)
    y = torch.randn(9, 2, dtype=F64)
    objective = Objective(model, nn.MSELoss(reduction=reduction), unequal(x, y))

    def loss(z: torch.Tensor) -> torch.Tensor:
        return ((z - y) ** 2).sum() / 9 / (2 if reduction == "mean" else 1)

    M = dense_gauss_newton(lambda t: mlp(t, x, sizes, torch.tanh), loss, flat)
    assert apart(GaussNewton(objective, cache=cache).to_dense(), M) < 1e-12


@pytest.mark.parametrize("cache", ["auto", 0])
def test_a_criterion_of_ones_own(cache) -> None:
    sizes = (3, 5, 2)
    model, x, _, flat = setting(sizes)
    y = torch.randn(9, 2, dtype=F64)
    objective = Objective(model, lambda z, y: ((z - y) ** 4).sum(1), unequal(x, y))
    M = dense_gauss_newton(
        lambda t: mlp(t, x, sizes, torch.tanh), lambda z: ((z - y) ** 4).sum() / 9, flat
    )
    G = GaussNewton(objective, cache=cache)
    assert apart(G.to_dense(), M) < 1e-12
    assert G.tags == frozenset({"symmetric", "hermitian"})  # convexity is not known


def test_it_is_the_hessian_of_a_linear_model() -> None:
    model, x, y, _ = setting((3, 2))
    objective = Objective(model, "cross_entropy", unequal(x, y), l2=0.2)
    assert apart(GaussNewton(objective).to_dense(), Hessian(objective).to_dense()) < 1e-12


def test_it_is_not_the_hessian_of_a_network() -> None:
    sizes = (3, 4, 2)
    model, x, y, flat = setting(sizes)
    objective = Objective(model, "cross_entropy", (x, y))
    H = dense_hessian(lambda t: cross_entropy(mlp(t, x, sizes, torch.tanh), y).mean(), flat)
    assert apart(GaussNewton(objective).to_dense(), H) > 1e-2


def test_tags() -> None:
    model, x, y, flat = setting((3, 2))
    semidefinite = {"positive_semidefinite", "symmetric", "hermitian"}
    symmetric = {"symmetric", "hermitian"}

    def tags(weights=None, l2=0.0, criterion="cross_entropy"):
        objective = Objective(model, criterion, (x, y), weights=weights, l2=l2)
        return set(GaussNewton(objective).tags)

    ones = torch.ones(9, dtype=F64)
    assert tags() == semidefinite
    assert tags(weights=ones) == semidefinite
    assert tags(l2=0.1) == semidefinite | {"positive_definite"}
    some = torch.ones(len(flat), dtype=F64)
    assert tags(l2=some) == semidefinite | {"positive_definite"}
    some[2] = 0
    assert tags(l2=some) == semidefinite
    assert tags(l2=-0.1) == symmetric
    assert tags(weights=ones - 1.5) == symmetric
    assert tags(criterion=lambda z, y: cross_entropy(z, y)) == symmetric


def test_functional() -> None:
    sizes = (3, 4, 2)
    _, x, y, flat = setting(sizes)
    objective = Objective.functional(
        None,
        {"t": flat},
        unequal(x, y),
        predict=lambda p, batch: mlp(p["t"], batch[0], sizes, torch.tanh),
        criterion="cross_entropy",
    )
    assert apart(GaussNewton(objective).to_dense(), dense(sizes, x, y, flat)) < 1e-12


class TestBadUse:
    def test_a_loss_without_outputs(self) -> None:
        objective = Objective.functional(
            lambda p, x: p["w"] * x, {"w": torch.ones(1)}, torch.ones(2)
        )
        with pytest.raises(StructureError, match="predict=..., criterion=..."):
            GaussNewton(objective)

    def test_a_criterion_linear_in_the_outputs(self) -> None:
        model, x, y, flat = setting((3, 2))
        G = GaussNewton(Objective(nn.Sequential(model, nn.LogSoftmax(1)), nn.NLLLoss(), (x, y)))
        with pytest.raises(StructureError, match="cross_entropy on logits"):
            _ = G @ flat

    @pytest.mark.parametrize("cache", ["auto", 0])
    def test_outputs_that_are_not_finite(self, cache) -> None:
        model, x, y, flat = setting((3, 4, 2))
        x[6] = float("nan")
        G = GaussNewton(Objective(model, "cross_entropy", unequal(x, y)), cache=cache)
        with pytest.raises(NonFiniteError, match="outputs of batch 2"):
            _ = G @ flat

    @pytest.mark.parametrize("cache", ["auto", 0])
    def test_a_parameter_without_influence(self, cache) -> None:
        start = {"a": torch.ones(2, dtype=F64), "b": torch.ones(1, dtype=F64)}
        arguments = {
            "predict": lambda p, x: x * p["a"],
            "criterion": lambda z, x: (z**2).sum(1),
        }
        x = torch.ones(3, 2, dtype=F64)
        G = GaussNewton(Objective.functional(None, start, x, **arguments), cache=cache)
        with pytest.raises(GradientError, match="'b'"):
            _ = G @ torch.ones(3, dtype=F64)
        allowed = Objective.functional(None, start, x, allow_unused=True, **arguments)
        product = GaussNewton(allowed, cache=cache) @ torch.ones(3, dtype=F64)
        assert product.tolist() == [2.0, 2.0, 0.0]

    def test_a_parameter_changed_in_place(self) -> None:
        model, x, y, flat = setting((3, 2))
        G = GaussNewton(Objective(model, "cross_entropy", (x, y)))
        with torch.no_grad():
            model[0].bias.zero_()
        with pytest.raises(GradientError, match="changed in place"):
            _ = G @ flat
