"""LV-HBA against closed forms, an independent saddle point and finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from woodbury.bilevel import LVHBA
from woodbury.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError

DOUBLE = {"dtype": torch.float64}


class Quadratic:
    """f = |y - Bx|^2/2 + y'Qy/2, g = Gx x + Gy y - h: convex, with several constraints."""

    def __init__(self, n: int = 3, m: int = 4, p: int = 5) -> None:
        gen = torch.Generator().manual_seed(3)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen, **DOUBLE)

        self.B, root, self.Gx, self.Gy = randn(m, n), randn(m, m), randn(p, n), randn(p, m)
        self.Q, self.h = root @ root.T / m, 0.2 * randn(p)
        self.x, self.y, self.z = randn(n), randn(m), randn(p).abs()

    def inner(self, y: Tensor, x: Tensor) -> Tensor:
        return 0.5 * (y - self.B @ x).square().sum() + 0.5 * y @ self.Q @ y

    def constraint(self, y: Tensor, x: Tensor) -> Tensor:
        return self.Gx @ x + self.Gy @ y - self.h

    def saddle(
        self, x: Tensor, y: Tensor, z: Tensor, gamma: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value and saddle point by Newton on theta; the maximum over lambda in closed form."""
        theta = y.clone()
        eye = torch.eye(y.numel(), **DOUBLE)
        for _ in range(200):
            lam = (z + gamma[1] * self.constraint(theta, x)).clamp_min(0)
            slope = theta - self.B @ x + self.Q @ theta + self.Gy.T @ lam + (theta - y) / gamma[0]
            active = self.Gy[lam > 0]
            curvature = eye * (1 + 1 / gamma[0]) + self.Q + gamma[1] * active.T @ active
            theta = theta - torch.linalg.solve(curvature, slope)
            if slope.norm() < 1e-13:
                break
        lam = (z + gamma[1] * self.constraint(theta, x)).clamp_min(0)
        value = (
            self.inner(theta, x)
            + lam @ self.constraint(theta, x)
            + (theta - y).square().sum() / (2 * gamma[0])
            - (lam - z).square().sum() / (2 * gamma[1])
        )
        return value, theta, lam

    def method(self, gamma: tuple[float, float], **options: Any) -> LVHBA:
        return LVHBA(
            self.inner,
            lambda y, x: 0 * x.sum(),
            self.constraint,
            self.y.clone(),
            self.x.clone(),
            project=lambda y, x: (y, x),
            gamma=gamma,
            **options,
        )


@pytest.mark.parametrize("gamma", [(10.0, 10.0), (0.5, 2.0)])
def test_directions_are_the_gradients_of_the_value_function(gamma: tuple[float, float]) -> None:
    problem = Quadratic()
    _, theta, lam = problem.saddle(problem.x, problem.y, problem.z, gamma)
    assert 0 < int((lam > 0).sum()) < lam.numel()  # some constraints act and some do not
    method = problem.method(gamma, step=1.0, multiplier_step=1.0, bound=1e6)
    state = method.state_dict()
    method.load_state_dict({**state, "theta": theta, "multiplier": lam, "z": problem.z})
    method.step()  # at the saddle point theta and lambda stay
    torch.testing.assert_close(method.theta, theta, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(method.multiplier, lam, rtol=1e-11, atol=1e-11)

    def value(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return problem.saddle(x, y, z, gamma)[0]

    point = (problem.x, problem.y, problem.z)
    differences = []
    for index, part in enumerate(point):
        slopes = torch.zeros_like(part)
        for i in range(part.numel()):
            ends = []
            for sign in (1, -1):
                moved = [t.clone() for t in point]
                moved[index][i] += sign * 1e-5
                ends.append(value(*moved))
            slopes[i] = (ends[0] - ends[1]) / 2e-5
        differences.append(slopes)
    of_x = -problem.B.T @ (problem.y - problem.B @ problem.x)
    of_y = problem.y - problem.B @ problem.x + problem.Q @ problem.y
    torch.testing.assert_close(
        of_x - (problem.x - method.hyper[""]), differences[0], rtol=1e-7, atol=1e-8
    )
    torch.testing.assert_close(
        of_y - (problem.y - method.params[""]), differences[1], rtol=1e-7, atol=1e-8
    )
    moved = (problem.z + differences[2]).clamp_min(0)
    torch.testing.assert_close(method.z, moved, rtol=1e-7, atol=1e-8)


def test_gap_is_that_of_an_accurate_saddle_point() -> None:
    problem = Quadratic()
    gamma = (2.0, 3.0)
    method = problem.method(gamma, inner_step=0.02)
    method.load_state_dict({**method.state_dict(), "z": problem.z})
    value, _, _ = problem.saddle(problem.x, problem.y, problem.z, gamma)
    before = method.state_dict()
    expected = (problem.inner(problem.y, problem.x) - value).item()
    assert method.gap(tol=1e-11) == pytest.approx(expected, rel=1e-8)
    for name, tensor in before.items():
        assert torch.equal(torch.as_tensor(method.state_dict()[name]), torch.as_tensor(tensor))
    with pytest.raises(NonFiniteError, match="not found in 3 iterations"):
        method.gap(max_steps=3)


class Toy:
    """The toy of the paper with its closed form: x = -0.3 e, y1 = 0.7 e, y2 = -0.4 e, F = n/20."""

    def __init__(self, n: int) -> None:
        self.n, self.e = n, torch.ones(n, **DOUBLE)

    def outer(self, y: dict[str, Tensor], x: Tensor) -> Tensor:
        return 0.5 * (x - y["y2"]).square().sum() + 0.5 * (y["y1"] - 1).square().sum()

    def inner(self, y: dict[str, Tensor], x: Tensor) -> Tensor:
        return 0.5 * y["y1"].square().sum() - x @ y["y1"] + y["y2"].sum()

    def constraint(self, y: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x.sum() + y["y1"].sum() + y["y2"].sum()).reshape(1)

    def project(self, y: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        shift = self.constraint(y, x) / (3 * self.n)
        return {name: part - shift for name, part in y.items()}, x - shift

    def method(self, **options: Any) -> LVHBA:
        start = 10 * self.e
        return LVHBA(
            self.inner,
            self.outer,
            self.constraint,
            {"y1": start.clone(), "y2": start.clone()},
            start,
            project=self.project,
            equality=True,
            multiplier=1.0,
            **options,
        )


def test_toy_reaches_its_closed_form() -> None:
    toy = Toy(100)
    # The closed form by another way: y1 = x + e and e'y2 = -2e'x - n eliminate the inner problem.
    # With all entries of x and of y2 equal (x_i = s, y2_i = -2 s - 1): F/n = (3s+1)^2/2 + s^2/2.
    s = -3 / 10
    assert 3 * (3 * s + 1) + s == pytest.approx(0)  # the derivative in s
    method = toy.method()
    gaps = {}
    for k in range(2000):
        if k in (20, 200, 1999):
            gaps[k] = abs(method.gap(tol=1e-7))
        seen = method.step()
    error = (method.hyper[""] - s).norm() / (s * toy.e).norm()
    assert error < 0.02  # what the issue asks for; the penalty leaves a bias O(1 / c_k)
    assert set(method.params) == {"y1", "y2"}
    assert (method.params["y1"] - 0.7).abs().max() < 0.05
    assert (method.params["y2"] + 0.4).abs().max() < 0.05
    assert seen.outer_value == pytest.approx(5.0, rel=0.05)
    assert seen.violation < 1e-10
    assert method.multiplier.item() == pytest.approx(-1, rel=2e-3)  # from 1 + lambda = 0
    assert gaps[1999] < 1e-2 * gaps[20]
    assert gaps[1999] < gaps[200]


def test_bias_falls_with_the_penalty() -> None:
    toy = Toy(4)
    errors = []
    for c in (4.0, 16.0, 64.0):
        method = toy.method(penalty=(c, 0.0), step=0.1, inner_step=0.1, multiplier_step=0.2)
        for _ in range(1000 if c < 20 else 3000):
            method.step()
        errors.append((method.hyper[""] + 0.3).norm().item())
    ratios = [errors[0] / errors[1], errors[1] / errors[2]]
    assert 3.5 < ratios[0] < ratios[1] < 4.01, errors  # O(1 / c)


def test_inequality_that_acts_at_the_solution() -> None:
    # Inner: y = min(2x, 1) by the constraint y <= 1 - 0 x; outer pulls y to 2 and x to 1.
    # For x > 1/2 y = 1, so x = 1, y = 1; for x <= 1/2, F >= (2x - 2)^2/2 + (x - 1)^2/2 >= 5/8.
    zero = torch.zeros(1, **DOUBLE)
    method = LVHBA(
        lambda y, x: 0.5 * (y - 2 * x).square().sum(),
        lambda y, x: 0.5 * (y - 2).square().sum() + 0.5 * (x - 1).square().sum(),
        lambda y, x: y - 1,
        zero,
        zero.clone(),
        project=lambda y, x: (y.clamp_max(1), x),
        step=0.2,
        inner_step=0.2,
        multiplier_step=0.5,
    )
    for _ in range(3000):
        seen = method.step()
    assert method.hyper[""].item() == pytest.approx(1, abs=0.02)
    assert method.params[""].item() == pytest.approx(1, abs=0.02)
    assert method.multiplier.item() == pytest.approx(1, abs=0.05)  # y - 2x + lambda = 0
    assert seen.violation == 0
    assert (method.multiplier >= 0).all()
    assert (method.z >= 0).all()


def test_inner_projection_keeps_theta_in_its_set() -> None:
    problem = Quadratic()
    method = problem.method((1.0, 1.0), project_inner=lambda y: y.clamp(-0.1, 0.1))
    for _ in range(5):
        method.step()
    assert isinstance(method.theta, Tensor)
    assert method.theta.abs().max() <= 0.1


def test_resumes_exactly() -> None:
    toy = Toy(5)
    whole, first = toy.method(), toy.method()
    for _ in range(7):
        first.step()
    state = first.state_dict()
    first.step()  # the state is a copy
    second = toy.method()
    second.load_state_dict(state)
    for _ in range(5):
        second.step()
    for _ in range(12):
        whole.step()
    assert second.steps == 12
    for name, tensor in whole.state_dict().items():
        assert torch.equal(torch.as_tensor(second.state_dict()[name]), torch.as_tensor(tensor))


def test_float32_stays_float32() -> None:
    zero = torch.zeros(2)
    method = LVHBA(
        lambda y, x: (y - x).square().sum(),
        lambda y, x: y.sum(),
        lambda y, x: y - 1,
        zero,
        zero.clone(),
        project=lambda y, x: (y.clamp_max(1), x),
    )
    method.step()
    assert all(
        value.dtype == torch.float32
        for value in method.state_dict().values()
        if isinstance(value, Tensor)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0.0}, "step is 0.0; it must be positive"),
        ({"inner_step": math.nan}, "inner_step is nan"),
        ({"gamma": (1.0, -1.0)}, r"gamma\[1\] is -1.0"),
        ({"penalty": (1.0, 0.5)}, r"penalty\[1\] is 0.5; it must be in \[0, 1/2\)"),
        ({"bound": math.inf}, "bound is inf"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    given = {"gamma": (1.0, 1.0), **options}
    with pytest.raises(ArgumentError, match=message):
        Quadratic().method(**given)


def test_refuses_wrong_shapes_and_values() -> None:
    one = torch.ones(2, **DOUBLE)

    def build(**parts: Any) -> LVHBA:
        given: dict[str, Any] = {
            "inner": lambda y, x: (x * y).sum(),
            "outer": lambda y, x: y.sum(),
            "constraint": lambda y, x: y,
            "params": one.clone(),
            "hyper": one.clone(),
            "project": lambda y, x: (y, x),
        }
        return LVHBA(**{**given, **parts})

    with pytest.raises(ShapeError, match="the inner loss returned \\(2,\\)"):
        build(inner=lambda y, x: x * y).step()
    with pytest.raises(ShapeError, match="the constraint returned \\(\\)"):
        build(constraint=lambda y, x: y.sum())
    with pytest.raises(ShapeError, match="project must return the pair"):
        build(project=lambda y, x: y)
    with pytest.raises(ShapeError, match="expected \\(2,\\)"):
        build(project=lambda y, x: (y[:1], x))
    with pytest.raises(ShapeError, match="does not broadcast to the 2 constraints"):
        build(multiplier=torch.ones(3, **DOUBLE))
    with pytest.raises(DtypeError, match="params are torch.float64 and hyper torch.float32"):
        build(hyper=one.float())
    method = build(outer=lambda y, x: (y - 1).sqrt().sum())  # an infinite slope at y = 1
    before = method.state_dict()
    with pytest.raises(
        NonFiniteError, match="direction of params is NaN or infinite after 0 steps"
    ):
        method.step()
    assert all(
        torch.equal(torch.as_tensor(before[name]), torch.as_tensor(value))
        for name, value in method.state_dict().items()
    )
    with pytest.raises(ArgumentError, match="lacks \\['z'\\]"):
        method.load_state_dict({k: v for k, v in before.items() if k != "z"})
    with pytest.raises(ShapeError, match="'z' of the state has shape \\(3,\\)"):
        method.load_state_dict({**before, "z": torch.ones(3, **DOUBLE)})
