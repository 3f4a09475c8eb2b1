from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from woodbury import GaussNewton, Influence, Objective
from woodbury.errors import ArgumentError, ShapeError, StructureError
from woodbury.influence.rivals import InputMoments, function_space_distance, laftr

F64 = torch.float64


def setting(sizes=(4, 6, 5, 3), seed=0):
    torch.manual_seed(seed)
    layers = []
    for m, n in itertools.pairwise(sizes):
        layers += [nn.Linear(m, n), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    x = torch.randn(200, sizes[0], dtype=F64) @ torch.randn(sizes[0], sizes[0], dtype=F64) + 0.5
    moved = {name: p.detach() + 0.3 * torch.randn_like(p) for name, p in model.named_parameters()}
    return model, x, moved


def test_the_same_parameters_have_distance_zero():
    model, x, _ = setting()
    moments = InputMoments.of(model, x)
    assert float(function_space_distance(model, {}, moments)) == pytest.approx(0.0, abs=1e-12)
    same = {name: p.detach() for name, p in model.named_parameters()}
    assert float(function_space_distance(model, same, moments)) == pytest.approx(0.0, abs=1e-12)


def test_a_linear_network_is_exact():
    """Without gates the distance is that of the data, whose first two moments are all it needs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    x = torch.randn(50, 4, dtype=F64) ** 3
    moved = {name: p.detach() + torch.randn_like(p) for name, p in model.named_parameters()}
    found = function_space_distance(model, moved, InputMoments.of(model, x))
    gap = torch.func.functional_call(model, moved, (x,)) - model(x)
    torch.testing.assert_close(found, 0.5 * gap.square().sum(1).mean())


def test_open_gates_are_a_linear_network():
    model, x, moved = setting()
    moments = InputMoments.of(model, x)
    opened = InputMoments(
        moments.mean, moments.covariance, tuple(torch.ones_like(g) for g in moments.gates)
    )
    found = function_space_distance(model, moved, opened)
    linear = nn.Sequential(*[layer for layer in model if isinstance(layer, nn.Linear)])
    names = dict(
        zip(
            [n for n, _ in model.named_parameters()],
            [n for n, _ in linear.named_parameters()],
            strict=True,
        )
    )
    other = {names[name]: value for name, value in moved.items()}
    gap = torch.func.functional_call(linear, other, (x,)) - linear(x)
    torch.testing.assert_close(found, 0.5 * gap.square().sum(1).mean())


def test_the_recursion_is_the_mean_of_draws():
    model, x, moved = setting()
    moments = InputMoments.of(model, x)
    exact = float(function_space_distance(model, moved, moments))
    draws = torch.tensor(
        [
            float(
                function_space_distance(
                    model,
                    moved,
                    moments,
                    method="sampled",
                    samples=4000,
                    generator=torch.Generator().manual_seed(seed),
                )
            )
            for seed in range(20)
        ]
    )
    error = draws.std() / 20**0.5
    assert abs(draws.mean() - exact) < 3 * error
    assert error < 0.02 * exact


def test_gates_are_shares_of_the_data():
    model, x, _ = setting()
    moments = InputMoments.of(model, x)
    first = (model[0](x) > 0).double().mean(0)
    torch.testing.assert_close(moments.gates[0], first)
    second = (model[:3](x) > 0).double().mean(0)
    torch.testing.assert_close(moments.gates[1], second)
    torch.testing.assert_close(moments.covariance, torch.cov(x.T, correction=0))


def test_gradients_of_the_distance():
    model, x, moved = setting((2, 3, 2))
    moments = InputMoments.of(model, x)
    names = list(moved)

    def distance(*values):
        return function_space_distance(model, dict(zip(names, values, strict=True)), moments)

    inputs = tuple(moved[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(distance, inputs)


def test_scores_of_a_linear_model_are_those_of_its_gauss_newton_matrix():
    """For squared error the matrix of the distance is half of the Gauss-Newton matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2)).double()
    x, y = torch.randn(20, 3, dtype=F64), torch.randn(20, 2, dtype=F64)
    objective = Objective(model, nn.MSELoss(reduction="sum"), (x, y))
    queries = torch.randn(4, 3, dtype=F64), torch.randn(4, 2, dtype=F64)
    found = laftr(objective, model, InputMoments.of(model, x), queries, damping=0.1)
    want = Influence(objective, matrix=0.5 * GaussNewton(objective), damping=0.1).scores(queries)
    torch.testing.assert_close(found.values, want.values, rtol=1e-4, atol=1e-7)


def test_scores_are_a_dense_solve_with_the_hessian_of_the_distance():
    model, x, _ = setting((3, 4, 2))
    y = torch.arange(200) % 2
    objective = Objective(model, "cross_entropy", (x[:, :3], y))
    moments = InputMoments.of(model, x[:, :3])
    queries = x[:5, :3], y[:5]
    found = laftr(objective, model, moments, queries, damping=0.05)
    theta = objective.params_vector()

    def distance(flat):
        return function_space_distance(model, objective.space.unflatten(flat), moments)

    F = torch.autograd.functional.hessian(distance, theta)
    assert torch.linalg.eigvalsh(F).min() > -1e-10
    G = torch.cat([g for _, g in objective.per_example_gradients()])
    V = torch.cat([g for _, g in objective.with_data(queries).per_example_gradients()])
    want = -V @ torch.linalg.solve(F + 0.05 * torch.eye(len(F), dtype=F64), G.T) / 200
    torch.testing.assert_close(found.values, want, rtol=1e-4, atol=1e-7)


def test_other_networks_and_moments_are_refused():
    model, x, moved = setting()
    moments = InputMoments.of(model, x)
    with pytest.raises(StructureError, match="Tanh"):
        InputMoments.of(nn.Sequential(nn.Linear(4, 2), nn.Tanh()).double(), x)
    narrow = InputMoments(moments.mean[:3], moments.covariance[:3, :3], moments.gates)
    with pytest.raises(ShapeError, match="4 inputs, the moments have 3"):
        function_space_distance(model, moved, narrow)
    with pytest.raises(ShapeError, match="no gate"):
        function_space_distance(
            model, moved, InputMoments(moments.mean, moments.covariance, moments.gates[1:])
        )
    for options in ({"method": "guess"}, {"samples": 0}):
        with pytest.raises(ArgumentError):
            function_space_distance(model, moved, moments, **options)
    objective = Objective(model, "cross_entropy", (x, torch.arange(200) % 3))
    with pytest.raises(ArgumentError, match="damping"):
        laftr(objective, model, moments, damping=0.0)
    with pytest.raises(ArgumentError, match="no parameters"):
        laftr(objective, nn.Sequential(nn.Linear(4, 2)), moments, damping=1.0)
