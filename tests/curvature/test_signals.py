from __future__ import annotations

import pytest
import torch
from tests.curvature.reference import apart, classification, network, unequal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from woodbury import Fisher, GaussNewton, Jacobian, Objective
from woodbury.curvature.graphs import GraphJacobian
from woodbury.curvature.signals import SignalJacobian

F64 = torch.float64


def kept(operator) -> list[object]:
    _ = operator @ torch.ones(operator.shape[1], dtype=operator.dtype)
    return operator._linearizations.kept


def way(operator) -> type:
    (kind,) = {type(linearized) for linearized in kept(operator)}
    return kind


def generic(model, data, criterion="cross_entropy") -> GaussNewton:
    """Gauss-Newton by graphs, which any model allows."""
    operator = GaussNewton(Objective(model, criterion, data))
    operator._outputs.try_signals = False
    return operator


def objective_of(model: nn.Module, *, mode: str = "eval", **options) -> Objective:
    x, y = classification(9, 3, 2)
    return Objective(model, "cross_entropy", unequal(x, y), mode=mode, **options)


WIDE = (3, 34, 35, 2)


def test_where_signals_are_used() -> None:
    assert way(GaussNewton(objective_of(network(WIDE)))) is SignalJacobian
    assert way(GaussNewton(objective_of(network(WIDE, nn.ReLU)))) is SignalJacobian
    assert way(GaussNewton(objective_of(network((3, 2))))) is SignalJacobian
    assert way(Jacobian(objective_of(network(WIDE)))) is SignalJacobian
    assert way(Fisher(objective_of(network((3, 4, 2))), "empirical")) is SignalJacobian
    # the way through a narrow layer is cheaper than signals
    assert way(GaussNewton(objective_of(network((3, 4, 2))))) is GraphJacobian


def test_operations_in_place_behind_a_layer() -> None:
    model = network(WIDE, lambda: nn.ReLU(inplace=True))
    x, y = classification(9, 3, 2)
    fast = GaussNewton(Objective(model, "cross_entropy", (x, y)))
    assert way(fast) is SignalJacobian
    V = torch.randn(fast.shape[0], 3, dtype=F64)
    assert apart(fast @ V, generic(model, [(x, y)]) @ V) < 1e-12


class Elsewhere(nn.Module):
    """Uses a layer's weight a second time, where no layer is called."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(WIDE)

    def forward(self, x):
        return self.net(x) + 1e-3 * self.net[2].weight.sum()


class Mixing(nn.Module):
    """Examples depend on one another."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(WIDE)

    def forward(self, x):
        z = self.net(x)
        return z + 0.1 * z.mean(0)


class Extra(nn.Module):
    """Has a parameter beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.shift = network(WIDE), nn.Parameter(torch.zeros(2, dtype=F64))

    def forward(self, x):
        return self.net(x) + self.shift


class Reshaped(nn.Module):
    """Calls its layers with examples on another axis than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(WIDE)

    def forward(self, x):
        return self.net(x.unsqueeze(0)).squeeze(0)


@pytest.mark.parametrize("kind", [Elsewhere, Mixing, Extra, Reshaped])
def test_models_that_signals_cannot_describe_are_noticed(kind: type[nn.Module]) -> None:
    model = kind()
    x, y = classification(9, 3, 2)
    operator = GaussNewton(Objective(model, "cross_entropy", (x, y)))
    assert way(operator) is GraphJacobian
    v = torch.randn(operator.shape[0], dtype=F64)
    assert apart(operator @ v, generic(model, (x, y)) @ v) < 1e-13


def test_batch_norm_in_training_is_noticed() -> None:
    model = network(WIDE)
    model.insert(1, nn.BatchNorm1d(34, affine=False, dtype=F64))
    data = classification(9, 3, 2)
    frozen = Objective(model, "cross_entropy", data)
    trained = Objective(model, "cross_entropy", data, mode="train")
    assert way(GaussNewton(frozen)) is SignalJacobian
    assert way(GaussNewton(trained)) is GraphJacobian


def test_replayed_dropout_is_a_fixed_network() -> None:
    model = network(WIDE)
    model.insert(2, nn.Dropout(0.5))
    objective = objective_of(model, mode="train")
    fast, slow = GaussNewton(objective), GaussNewton(objective, cache=0)
    assert way(fast) is SignalJacobian
    v = torch.randn(fast.shape[0], dtype=F64)
    assert apart(fast @ v, slow @ v) < 1e-12


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [GaussNewton, lambda o: Fisher(o, "empirical")])
def test_layers_of_tokens(tokens: int, bias: bool, kind) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 34, bias=bias, dtype=F64)
            self.b = nn.Linear(34, 35, bias=bias, dtype=F64)
            self.c = nn.Linear(35, 2, dtype=F64)

        def forward(self, x):
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))).mean(1))

    x, y = torch.randn(5, tokens, 3, dtype=F64), torch.randint(0, 2, (5,))
    objective = Objective(Pooled(), "cross_entropy", [(x[:2], y[:2]), (x[2:], y[2:])])
    fast, slow = kind(objective), kind(objective)
    slow._outputs.try_signals = False
    assert way(fast) is SignalJacobian
    V = torch.randn(fast.shape[0], 4, dtype=F64)
    assert apart(fast @ V, slow @ V) < 1e-12


@pytest.mark.parametrize("params", [["0.weight"], ["0.bias"], ["0.weight", "4.weight"]])
def test_subsets_of_parameters(params: list[str]) -> None:
    x, y = classification(9, 3, 2)
    objective = Objective(network(WIDE), "cross_entropy", (x, y), params=params)
    fast, slow = Fisher(objective, "empirical"), Fisher(objective, "empirical")
    slow._outputs.try_signals = False
    assert way(fast) is SignalJacobian
    V = torch.randn(fast.shape[0], 2, dtype=F64)
    assert apart(fast @ V, slow @ V) < 1e-12


def test_wide_blocks_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = classification(9, 3, 2)
    objective = Objective(network(WIDE), "cross_entropy", unequal(x, y))
    V = torch.randn(objective.space.dim, 7, dtype=F64)
    whole = GaussNewton(objective) @ V
    monkeypatch.setattr("woodbury.curvature.signals._CACHE_BYTES", 9 * 35 * 8)
    parts = GaussNewton(objective)
    assert apart(parts @ V, whole) < 1e-13
    assert {linearized.step for linearized in kept(parts)} == {2, 9}


def test_signals_do_not_cost_other_batches_their_place() -> None:
    """Where signals of all batches do not fit, all are kept as graphs, which are smaller."""
    model, (x, y) = network((3, 64, 65, 66, 4)), classification(40, 3, 4)
    data = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)]
    objective = Objective(model, "cross_entropy", data)
    objective_of_loader = Objective(model, "cross_entropy", DataLoader(TensorDataset(x, y), 8))
    v = torch.randn(objective.space.dim, dtype=F64)
    whole = GaussNewton(objective)
    expected = whole @ v
    needed = whole.cache_report().nbytes
    for given in (objective, objective_of_loader):
        operator = GaussNewton(given, cache=int(0.7 * needed))
        assert apart(operator @ v, expected) < 1e-12
        assert operator.cache_report().cached == 5
        assert way(operator) is GraphJacobian
        assert way(GaussNewton(given, cache=2 * needed)) is SignalJacobian


def test_half_precision_has_no_signals() -> None:
    model = network(WIDE).bfloat16()
    x, y = classification(9, 3, 2)
    assert way(GaussNewton(Objective(model, "cross_entropy", (x.bfloat16(), y)))) is GraphJacobian
