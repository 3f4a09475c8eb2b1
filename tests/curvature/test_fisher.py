from __future__ import annotations

import itertools

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

from woodbury import Fisher, GaussNewton, Objective
from woodbury.errors import ArgumentError, DataError, StructureError

F64 = torch.float64
SIZES = (3, 5, 3)


def setting(sizes=SIZES, rows: int = 9):
    model = network(sizes)
    x, y = classification(rows, sizes[0], sizes[-1])
    return model, x, y, flat_parameters(model)


def by_enumeration(x, flat, sizes=SIZES, weights=None):
    """The expectation over all labels, one gradient per row and label."""
    w = torch.ones(len(x), dtype=F64) if weights is None else weights
    total = torch.zeros(len(flat), len(flat), dtype=F64)
    p = mlp(flat, x, sizes, torch.tanh).softmax(1)
    for label in range(sizes[-1]):
        y = torch.full((len(x),), label)
        g = dense_jacobian(lambda t, y=y: cross_entropy(mlp(t, x, sizes, torch.tanh), y), flat)
        total += g.T @ ((w * p[:, label])[:, None] * g) / len(x)
    return total


def empirical(x, y, flat, sizes=SIZES, weights=None):
    g = dense_jacobian(lambda t: cross_entropy(mlp(t, x, sizes, torch.tanh), y), flat)
    w = torch.ones(len(x), dtype=F64) if weights is None else weights
    return g.T @ (w[:, None] * g) / len(x)


class TestConformance(OperatorConformance):
    def make(self):
        sizes = (1, 2, 2)
        model, x, y, flat = setting(sizes, 6)
        data, weights = [(x[:2], y[:2]), (x[2:], y[2:])], torch.rand(6, dtype=F64)
        eye = torch.eye(len(flat), dtype=F64)
        plain = Objective(model, "cross_entropy", data)
        weighted = Objective(model, "cross_entropy", data, weights=weights, l2=0.3)
        return [
            (Fisher(plain), by_enumeration(x, flat, sizes)),
            (Fisher(weighted), by_enumeration(x, flat, sizes, weights) + 0.3 * eye),
            (Fisher(plain, "empirical"), empirical(x, y, flat, sizes)),
        ]


@pytest.mark.parametrize("sizes", [(3, 5, 3), (2, 33, 32, 2), (3, 3)])
@pytest.mark.parametrize("cache", ["auto", 20_000, 0])
class TestBudgets:
    def test_exact(self, sizes, cache) -> None:
        model, x, y, flat = setting(sizes)
        F = Fisher(Objective(model, "cross_entropy", unequal(x, y)), cache=cache)
        M = by_enumeration(x, flat, sizes)
        V = torch.randn(len(flat), 3, dtype=F64)
        for _ in range(2):
            assert apart(F @ V, M @ V) < 1e-12
            assert apart(F @ V[:, 0], M @ V[:, 0]) < 1e-12

    def test_empirical(self, sizes, cache) -> None:
        model, x, y, flat = setting(sizes)
        weights = torch.rand(9, dtype=F64)
        objective = Objective(model, "cross_entropy", unequal(x, y), weights=weights)
        F = Fisher(objective, "empirical", cache=cache)
        M = empirical(x, y, flat, sizes, weights)
        V = torch.randn(len(flat), 3, dtype=F64)
        for _ in range(2):
            assert apart(F @ V, M @ V) < 1e-12
            assert apart(F @ V[:, 0], M @ V[:, 0]) < 1e-12

    def test_sampled(self, sizes, cache) -> None:
        model, x, y, flat = setting(sizes)
        objective = Objective(model, "cross_entropy", unequal(x, y), l2=0.1)
        generator = torch.Generator().manual_seed(7)
        F = Fisher(objective, "sampled", samples=2, generator=generator, cache=cache)
        generator.manual_seed(7)
        other = Fisher(objective, "sampled", samples=2, generator=generator)
        V = torch.randn(len(flat), 3, dtype=F64)
        for _ in range(2):
            assert apart(F @ V, other @ V) < 1e-12
            assert apart(F @ V[:, 0], other @ V[:, 0]) < 1e-12


def test_exact_is_gauss_newton() -> None:
    model, x, _y, _ = setting()
    tokens = torch.randint(0, 3, (9,))
    for criterion in (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 2.0], dtype=F64)),
        nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1),
    ):
        objective = Objective(model, criterion, unequal(x, tokens))
        assert apart(Fisher(objective).to_dense(), GaussNewton(objective).to_dense()) < 1e-13
    objective = Objective(model, "mse", unequal(x, torch.randn(9, 3, dtype=F64)))
    assert apart(Fisher(objective).to_dense(), GaussNewton(objective).to_dense()) < 1e-13


@pytest.mark.parametrize("criterion", ["cross_entropy", "mse", "binary"])
def test_sampled_converges_to_exact(criterion: str) -> None:
    """The error of the mean of independent matrices is within its own standard error."""
    model, x, y, _flat = setting((2, 3), rows=6)
    given = {
        "cross_entropy": (nn.CrossEntropyLoss(), y),
        "mse": (nn.MSELoss(), torch.randn(6, 3, dtype=F64)),
        "binary": (nn.BCEWithLogitsLoss(), torch.ones(6, 3, dtype=F64)),
    }
    loss, target = given[criterion]
    objective = Objective(model, loss, (x, target))
    exact = Fisher(objective).to_dense()
    generator = torch.Generator().manual_seed(3)
    matrices = torch.stack(
        [
            Fisher(objective, "sampled", samples=4, generator=generator).to_dense()
            for _ in range(150)
        ]
    )
    error = (matrices.mean(0) - exact).norm()
    standard = (matrices.var(0).sum() / len(matrices)).sqrt()
    assert error < 3 * standard
    assert standard < 0.1 * exact.norm()


def test_more_samples_are_an_average() -> None:
    model, x, y, _ = setting((2, 3), rows=40)
    objective = Objective(model, "cross_entropy", (x, y))
    exact = Fisher(objective).to_dense()
    errors = {
        samples: torch.stack(
            [
                (Fisher(objective, "sampled", samples=samples).to_dense() - exact).square().sum()
                for _ in range(40)
            ]
        ).mean()
        for samples in (1, 16)
    }
    assert 8 < errors[1] / errors[16] < 32  # the variance falls as one over the samples


def test_sampled_needs_no_labels_of_the_data_and_is_reproducible() -> None:
    model, x, y, _ = setting()
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(38, dtype=F64)
    products = []
    for labels, seed in ((y, 1), ((y + 1) % 3, 1), (y, 2)):
        objective = Objective(model, "cross_entropy", unequal(x, labels))
        F = Fisher(objective, "sampled", generator=generator.manual_seed(seed))
        assert torch.equal(F @ v, F @ v)
        products.append(F @ v)
    assert torch.equal(products[0], products[1])
    assert not torch.equal(products[0], products[2])


def test_elements_are_independent() -> None:
    """For a mean over tokens the sampled matrix has the exact one as its mean, too."""
    model = nn.Linear(2, 3, dtype=F64)
    x = torch.randn(4, 2, 2, dtype=F64)
    y = torch.tensor([[0, 1], [2, -100], [1, 1], [-100, -100]])

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x).mT

    objective = Objective(Tokens(), "cross_entropy", (x, y))
    J = dense_jacobian(lambda t: x @ t[:6].view(3, 2).T + t[6:], flat_parameters(model)).view(
        4, 2, 3, 9
    )
    p = model(x).softmax(-1).detach()
    exact = torch.zeros(9, 9, dtype=F64)
    for i, t in itertools.product(range(4), range(2)):
        if y[i, t] >= 0:
            share = 1 / (y[i] >= 0).sum()
            cov = torch.diag(p[i, t]) - torch.outer(p[i, t], p[i, t])
            exact += share * J[i, t].T @ cov @ J[i, t] / 4
    assert apart(Fisher(objective).to_dense(), exact) < 1e-12
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            Fisher(objective, "sampled", samples=8, generator=generator).to_dense()
            for _ in range(100)
        ]
    )
    assert (draws.mean(0) - exact).norm() < 3 * (draws.var(0).sum() / 100).sqrt()


def test_empirical_works_with_any_criterion() -> None:
    x = torch.randn(6, 2, dtype=F64)
    w = torch.ones(2, dtype=F64)
    objective = Objective.functional(lambda p, x: (x @ p["w"]).abs() ** 3, {"w": w}, x)
    g = (3 * (x @ w).abs() * (x @ w))[:, None] * x
    F = Fisher(objective, "empirical")
    assert apart(F.to_dense(), g.T @ g / 6) < 1e-12
    assert "positive_semidefinite" in F.tags


class TestBadUse:
    def test_arguments(self) -> None:
        model, x, y, _ = setting()
        objective = Objective(model, "cross_entropy", (x, y))
        with pytest.raises(ArgumentError, match="'true'"):
            Fisher(objective, "true")
        with pytest.raises(ArgumentError, match="samples is 0"):
            Fisher(objective, "sampled", samples=0)

    @pytest.mark.parametrize("kind", ["exact", "sampled"])
    def test_a_criterion_that_is_no_likelihood(self, kind: str) -> None:
        model, x, y, _ = setting()
        with pytest.raises(StructureError, match="kind='empirical'"):
            Fisher(Objective(model, nn.MultiMarginLoss(), (x, y)), kind)

    def test_a_loss_without_outputs(self) -> None:
        objective = Objective.functional(
            lambda p, x: p["w"] * x, {"w": torch.ones(1)}, torch.ones(2)
        )
        with pytest.raises(StructureError, match="predict=..., criterion=..."):
            Fisher(objective)

    def test_empirical_without_losses_per_example(self) -> None:
        objective = Objective.functional(
            lambda p, x: (p["w"] * x).mean(), {"w": torch.ones(1)}, torch.ones(2)
        )
        with pytest.raises(DataError, match="one loss per example"):
            _ = Fisher(objective, "empirical") @ torch.ones(1)
