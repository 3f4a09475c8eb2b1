from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance
from tests.curvature.reference import (
    apart,
    at,
    classification,
    cross_entropy,
    dense_hessian,
    flat_parameters,
    mlp,
    network,
    unequal,
)
from torch import nn

from woodbury import Hessian, Objective
from woodbury.errors import ArgumentError, GradientError, NonFiniteError

SIZES = (3, 4, 2)
TINY = (1, 2, 2)
F64 = torch.float64


def setting(rows: int = 9, sizes=SIZES):
    model = network(sizes)
    x, y = classification(rows, sizes[0], sizes[-1])
    return model, x, y, flat_parameters(model)


def dense(x, y, flat, weights=None, l2=0.0, sizes=SIZES):
    """The dense Hessian of a loss written by hand."""

    def loss(t: torch.Tensor) -> torch.Tensor:
        losses = cross_entropy(mlp(t, x, sizes, torch.tanh), y)
        w = torch.ones_like(losses) if weights is None else weights
        return (w * losses).sum() / len(x) + 0.5 * (l2 * t**2).sum()

    return dense_hessian(loss, flat)


class TestConformance(OperatorConformance):
    def make(self):
        model, x, y, flat = setting(6, TINY)
        weights, l2 = torch.rand(6, dtype=F64) - 0.2, torch.rand(len(flat), dtype=F64)
        data = [(x[:2], y[:2]), (x[2:], y[2:])]
        M = dense(x, y, flat, sizes=TINY)
        weighted = dense(x, y, flat, weights, l2, sizes=TINY)
        cases = [
            (Hessian(Objective(model, "cross_entropy", data), cache=None), M),
            (Hessian(Objective(model, "cross_entropy", data, weights=weights, l2=l2)), weighted),
        ]
        single = network(TINY).float()
        near = flat_parameters(single).double()
        H = Hessian(Objective(single, "cross_entropy", (x.float(), y)))
        cases.append((H, dense(x.float().double(), y, near, sizes=TINY)))
        return cases


@pytest.mark.parametrize("cache", ["auto", 10**9, 3000, 0, None, "off"])
def test_any_budget_gives_the_same(cache) -> None:
    model, x, y, flat = setting()
    H = Hessian(Objective(model, "cross_entropy", unequal(x, y), l2=0.1), cache=cache)
    M = dense(x, y, flat, l2=0.1)
    V = torch.randn(len(flat), 3, dtype=F64)
    for _ in range(2):
        assert apart(H @ V, M @ V) < 1e-12
        assert apart(H @ V[:, 0], M @ V[:, 0]) < 1e-12


def test_it_includes_the_regularizer() -> None:
    model, x, y, _ = setting()
    with_l2 = Hessian(Objective(model, "cross_entropy", (x, y), l2=0.5)).to_dense()
    without = Hessian(Objective(model, "cross_entropy", (x, y))).to_dense()
    assert apart(with_l2 - without, 0.5 * torch.eye(26, dtype=F64)) < 1e-12


def test_vectors_have_the_names_of_parameters() -> None:
    model, x, y, _ = setting()
    H = Hessian(Objective(model, "cross_entropy", (x, y)))
    views = H.space.unflatten(H @ torch.ones(26, dtype=F64))
    assert {name: tuple(v.shape) for name, v in views.items()} == {
        "0.weight": (4, 3),
        "0.bias": (4,),
        "2.weight": (2, 4),
        "2.bias": (2,),
    }
    assert H.tags == frozenset({"symmetric", "hermitian"})


def test_functional() -> None:
    _, x, y, flat = setting()

    def loss(params, batch):
        return cross_entropy(mlp(params["t"], batch[0], SIZES, torch.tanh), batch[1]).mean()

    H = Hessian(Objective.functional(loss, {"t": flat}, unequal(x, y)))
    assert apart(H.to_dense(), dense(x, y, flat)) < 1e-12


def test_a_scalar_parameter() -> None:
    H = Hessian(
        Objective.functional(
            lambda p, x: (p["s"] * x) ** 4, {"s": torch.tensor(2.0, dtype=F64)}, torch.ones(3)
        )
    )
    torch.testing.assert_close(H.to_dense(), torch.tensor([[48.0]], dtype=F64))


def test_parameters_in_which_the_loss_is_linear() -> None:
    start = {"a": torch.ones(2, dtype=F64), "b": torch.ones(1, dtype=F64)}
    x = torch.ones(3, 2, dtype=F64)
    H = Hessian(Objective.functional(lambda p, x: (x @ p["a"]) ** 2 + p["b"], start, x))
    expected = torch.tensor([[2.0, 2, 0], [2, 2, 0], [0, 0, 0]], dtype=F64)
    torch.testing.assert_close(H.to_dense(), expected)
    linear = Objective.functional(lambda p, x: x @ p["a"] + p["b"], start, x)
    assert Hessian(linear).to_dense().abs().max() == 0


def test_a_piecewise_linear_network() -> None:
    model = network(SIZES, nn.ReLU)
    x, y = classification(9, 3, 2)
    M = dense_hessian(
        lambda t: cross_entropy(mlp(t, x, SIZES, torch.relu), y).mean(), flat_parameters(model)
    )
    for inplace in (False, True):
        model[1].inplace = inplace
        assert apart(Hessian(Objective(model, "cross_entropy", (x, y))).to_dense(), M) < 1e-12


def test_a_subset_of_parameters() -> None:
    model, x, y, flat = setting()
    M = dense(x, y, flat)
    keep = torch.cat([torch.arange(12), torch.arange(24, 26)])
    H = Hessian(Objective(model, "cross_entropy", (x, y), params=["0.weight", "2.bias"]))
    assert apart(H.to_dense(), M[keep][:, keep]) < 1e-12


def test_replayed_dropout() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    x, y = classification(9, 3, 2)
    objective = Objective(model, "cross_entropy", unequal(x, y), mode="train")
    dense_form = Hessian(objective).to_dense()
    assert apart(dense_form, dense_form.T) < 1e-12
    assert apart(Hessian(objective, cache=0).to_dense(), dense_form) < 1e-12
    theta, v, eps = objective.params_vector(), torch.randn(len(dense_form), dtype=F64), 1e-5
    up, down = (objective.with_params(theta + s * eps * v).gradient() for s in (1, -1))
    assert apart(dense_form @ v, (up - down) / (2 * eps)) < 1e-7
    frozen = Hessian(Objective(model, "cross_entropy", unequal(x, y))).to_dense()
    assert apart(dense_form, frozen) > 1e-2


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_norm(mode: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[1].running_var.mul_(3)
    x, y = classification(12, 3, 2)
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    getattr(model, mode)()

    def loss(t: torch.Tensor) -> torch.Tensor:
        return sum(cross_entropy(at(model, t, a), b).sum() for a, b in data) / 12

    running = model[1].running_mean.clone()
    H = Hessian(Objective(model, "cross_entropy", data, mode=mode)).to_dense()
    assert torch.equal(model[1].running_mean, running)
    assert apart(H, dense_hessian(loss, flat_parameters(model))) < 1e-11


def test_products_can_be_differentiated() -> None:
    model, x, y, flat = setting()
    H = Hessian(Objective(model, "cross_entropy", (x, y)))
    v = torch.randn(26, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(0.5 * v @ (H @ v), v)
    assert apart(gradient, dense(x, y, flat) @ v.detach()) < 1e-12


class Wrong(torch.autograd.Function):
    """A square whose backward forgets that it depends on its input."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y, g * x.detach()


def test_a_wrong_second_derivative_is_noticed() -> None:
    start = {"a": torch.ones(3, dtype=F64), "b": torch.ones(3, dtype=F64)}
    objective = Objective.functional(
        lambda p, x: Wrong.apply(p["a"] * x, p["b"]).sum(1), start, torch.rand(4, 3, dtype=F64)
    )
    for cache in ("auto", 0):
        with pytest.raises(GradientError, match="not symmetric"):
            _ = Hessian(objective, cache=cache) @ torch.ones(6, dtype=F64)


class TestBadUse:
    @pytest.mark.parametrize("cache", [-1, 1.5, "all", True])
    def test_budgets(self, cache) -> None:
        model, x, y, _ = setting()
        with pytest.raises(ArgumentError, match="'auto', a number of bytes"):
            Hessian(Objective(model, "cross_entropy", (x, y)), cache=cache)

    @pytest.mark.parametrize("cache", ["auto", 0])
    def test_a_parameter_changed_in_place(self, cache) -> None:
        model, x, y, _ = setting()
        H = Hessian(Objective(model, "cross_entropy", (x, y)), cache=cache)
        v = torch.ones(26, dtype=F64)
        _ = H @ v
        with torch.no_grad():
            model[0].weight.mul_(2)
        with pytest.raises(GradientError, match="changed in place"):
            _ = H @ v

    @pytest.mark.parametrize("cache", ["auto", 0])
    def test_a_loss_that_is_not_finite(self, cache) -> None:
        model, x, y, _ = setting()
        x[6] = float("inf")
        H = Hessian(Objective(model, "cross_entropy", unequal(x, y)), cache=cache)
        for _ in range(2):
            with pytest.raises(NonFiniteError, match="batch 2"):
                _ = H @ torch.ones(26, dtype=F64)

    @pytest.mark.parametrize("cache", ["auto", 0])
    def test_a_parameter_without_influence(self, cache) -> None:
        start = {"a": torch.ones(2, dtype=F64), "b": torch.ones(1, dtype=F64)}

        def loss(p, x):
            return (x @ p["a"]) ** 2

        x = torch.ones(3, 2, dtype=F64)
        H = Hessian(Objective.functional(loss, start, x), cache=cache)
        for _ in range(2):
            with pytest.raises(GradientError, match="'b'"):
                _ = H @ torch.ones(3, dtype=F64)
        allowed = Hessian(Objective.functional(loss, start, x, allow_unused=True), cache=cache)
        assert (allowed @ torch.ones(3, dtype=F64)).tolist() == [4.0, 4.0, 0.0]
