"""Proximal operators against their definition, Moreau's identity, and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import scipy.optimize
import torch
from tests.implicit.derivatives import check_derivatives
from torch import Tensor

from woodbury.errors import ArgumentError, DtypeError, ShapeError
from woodbury.implicit import (
    project_l2_ball,
    project_linf_ball,
    prox_elastic_net,
    prox_group_lasso,
    prox_l1,
    prox_log,
    prox_nonnegative,
    prox_ridge,
)

# Torch itself scripts what forward mode needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is dep:DeprecationWarning")

DOUBLE = torch.float64
ALL = (prox_elastic_net, prox_group_lasso, prox_l1, prox_log, prox_nonnegative, prox_ridge)
y = torch.tensor([[2.0, -0.7, 0.3, -3.0], [0.1, 0.2, -0.1, 0.05]], dtype=DOUBLE)
LAMBDA, GAMMA, STEP = 0.8, 0.4, 0.6

PENALTIES: dict[Callable, Callable[[float], float]] = {
    prox_l1: lambda x: LAMBDA * abs(x),
    prox_elastic_net: lambda x: LAMBDA * abs(x) + GAMMA / 2 * x * x,
    prox_log: lambda x: -LAMBDA * float(mpmath.log(x)) if x > 0 else float("inf"),
    prox_nonnegative: lambda x: LAMBDA * x if x >= 0 else float("inf"),
    prox_ridge: lambda x: LAMBDA / 2 * x * x,
    prox_group_lasso: lambda x: LAMBDA * abs(x),  # a group of one
}


def call(prox: Callable, y: Tensor) -> Tensor:
    if prox is prox_elastic_net:
        return prox(y, LAMBDA, GAMMA, step=STEP)
    return prox(y, LAMBDA, step=STEP)


@pytest.mark.parametrize("prox", ALL)
def test_definition_by_a_scalar_search(prox: Callable) -> None:
    penalty = PENALTIES[prox]
    for value in y.flatten().tolist():
        least = 1e-12 if prox in (prox_log, prox_nonnegative) else -4.0
        found = scipy.optimize.minimize_scalar(
            lambda x, value=value: 0.5 * (x - value) ** 2 + STEP * penalty(x),
            bounds=(least, 4.0),
            method="bounded",
            options={"xatol": 1e-10},
        )
        got = call(prox, torch.tensor([value], dtype=DOUBLE)).item()
        assert abs(got - found.x) < 1e-6


def conjugate_step(prox: Callable, v: Tensor) -> Tensor:
    """``prox_{h* / step}(v)`` in closed form, for the conjugate ``h*`` of each penalty."""
    if prox is prox_l1:  # the indicator of a ball
        return project_linf_ball(v, LAMBDA)
    if prox is prox_group_lasso:
        return project_l2_ball(v, LAMBDA)
    if prox is prox_ridge:  # v^2 / (2 lambda)
        return v / (1 + 1 / (STEP * LAMBDA))
    if prox is prox_nonnegative:  # the indicator of v <= lambda
        return v.clamp(max=LAMBDA)
    if prox is prox_log:  # -lambda log(-v), a mirrored barrier
        return -prox_log(-v, LAMBDA, step=1 / STEP)
    # Elastic net: (|v| - lambda)_+^2 / (2 gamma), whose minimiser solves a linear equation.
    shrunk = (v.abs() * GAMMA * STEP + LAMBDA) / (1 + GAMMA * STEP)
    return torch.where(v.abs() <= LAMBDA, v, v.sign() * shrunk)


@pytest.mark.parametrize("prox", ALL)
def test_moreau_identity(prox: Callable) -> None:
    both = call(prox, y) + STEP * conjugate_step(prox, y / STEP)
    torch.testing.assert_close(both, y, rtol=0, atol=1e-15)


@pytest.mark.parametrize("prox", ALL)
def test_derivatives_of_every_kind(prox: Callable) -> None:
    shape = y.shape[:1] if prox is prox_group_lasso else y.shape
    weights = torch.linspace(0.2, 0.9, shape.numel(), dtype=DOUBLE).reshape(shape)
    more = (weights.flip(0),) if prox is prox_elastic_net else ()
    check_derivatives(lambda *a: prox(*a, step=STEP), y, weights, *more)
    one = lambda z: call(prox, z)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(one)(y), one(y), rtol=0, atol=0)
    reverse, forward = (
        torch.func.vmap(mode(one))(y) for mode in (torch.func.jacrev, torch.func.jacfwd)
    )
    torch.testing.assert_close(reverse, forward, rtol=0, atol=1e-15)


@pytest.mark.parametrize("prox", ALL)
def test_float32_is_kept_and_firmly_nonexpansive(prox: Callable) -> None:
    a, b = torch.randn(2, 200, 4)
    p, q = call(prox, a), call(prox, b)
    assert p.dtype == torch.float32
    assert (((p - q) ** 2).sum(-1) <= ((p - q) * (a - b)).sum(-1) + 1e-5).all()


def test_log_against_fifty_digits_where_the_naive_formula_cancels() -> None:
    points = [-1e8, -1e3, -1.0, 0.0, 1e-3, 1e8, -1e200, 1e200]
    got = prox_log(torch.tensor(points, dtype=DOUBLE), 0.3).tolist()
    with mpmath.workdps(450):
        for value, found in zip(points, got, strict=True):
            v = mpmath.mpf(value)
            exact = (v + mpmath.sqrt(v * v + 4 * mpmath.mpf(0.3))) / 2
            assert abs(found / exact - 1) < 1e-15


def test_zero_penalty_is_the_identity() -> None:
    for prox in (prox_l1, prox_group_lasso, prox_ridge):
        torch.testing.assert_close(prox(y, 0.0), y, rtol=0, atol=0)
        assert not prox(torch.zeros(3), 0.0).any()
    torch.testing.assert_close(prox_nonnegative(y), y.clamp_min(0), rtol=0, atol=0)


def test_kinks_have_derivative_zero() -> None:
    at = torch.tensor([0.6, 0.8], dtype=DOUBLE)
    for prox, point in ((prox_l1, at), (prox_nonnegative, at), (prox_group_lasso, at)):
        weight = at if prox is not prox_group_lasso else torch.ones((), dtype=DOUBLE)
        assert not torch.func.jacrev(prox)(point, weight).any()


def test_bad_input_is_refused() -> None:
    for prox in ALL:
        with pytest.raises(ArgumentError, match="must not be negative"):
            prox(y, -1.0)
        with pytest.raises(ArgumentError, match="must not be negative"):
            prox(y, float("nan"))
        with pytest.raises(ArgumentError, match="step is 0"):
            prox(y, step=0)
        with pytest.raises(DtypeError, match="int64"):
            prox(torch.arange(3))
        with pytest.raises(ShapeError, match="does not broadcast"):
            prox(y, torch.ones(7, dtype=DOUBLE))
        with pytest.raises(ArgumentError, match="must not be negative"):
            torch.func.vmap(lambda z, prox=prox: prox(z, -1.0))(y)
    with pytest.raises(ArgumentError, match="barrier"):
        prox_log(y, 0.0)
