"""The damping of a preconditioner for a number of steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from woodbury import CG, EKFAC, Diagonal, GaussNewton, Identity, Objective, solve
from woodbury.curvature import damping_for_steps
from woodbury.errors import ArgumentError
from woodbury.solvers import SolveStatus

F64 = torch.float64


@pytest.mark.parametrize("steps", [20, 60])
@pytest.mark.parametrize("accuracy", [1e-1, 1e-2, 1e-4])
def test_the_worst_spectrum_up_to_it_takes_that_many_steps(steps, accuracy):
    """Where Chebyshev's bound is attained: at the extrema of his polynomial, in these weights."""
    mu = 1e-3
    top = damping_for_steps(mu, steps, accuracy=accuracy)
    nodes = torch.cos(math.pi * torch.arange(steps + 1, dtype=F64) / steps)
    values = (top + mu) / 2 + (top - mu) / 2 * nodes
    gaps = values[:, None] - values[None, :]
    gaps.fill_diagonal_(1.0)
    ratios = values[None, :] / gaps
    weights = ratios.fill_diagonal_(1.0).prod(1).abs()  # Lagrange's polynomials at zero
    weights /= weights.sum()
    A, b = Diagonal(values, tags={"positive_definite"}), (weights * values).sqrt()

    solution = solve(A, b, CG(rtol=0, max_steps=steps), throw=False)
    assert solution.status is SolveStatus.max_steps
    gap = solution.value - b / values
    error = float((gap @ (values * gap)).sqrt())  # of 1 at the start
    root = math.sqrt(top / mu)
    rate = (root + 1) / (root - 1)
    assert error == pytest.approx(2 / (rate**steps + rate**-steps), rel=1e-3)
    assert 0.75 * accuracy < error <= accuracy


def test_few_steps_have_the_shift_itself_and_many_the_square_of_their_number():
    assert damping_for_steps(0.25, 0) == 0.25
    assert damping_for_steps(0.25, 2) == 0.25  # (4 / ln 200)^2 < 1
    assert damping_for_steps(0.25, 80) == pytest.approx(0.25 * (160 / math.log(200)) ** 2)
    assert damping_for_steps(3.0, 40) == pytest.approx(3 * damping_for_steps(1.0, 20) * 4)


def test_between_full_preconditioning_and_none():
    """With the exact matrix in its place the preconditioner is the limit at either end."""
    values = torch.logspace(-4, 1, 60, dtype=F64)
    K, b = Diagonal(values, tags={"positive_definite"}), torch.ones(60, dtype=F64)
    A, mu = K + 1e-3 * Identity(60, dtype=F64), 1e-3
    full = (K + damping_for_steps(mu, 1) * Identity(60, dtype=F64)).inverse()
    assert solve(A, b, CG(rtol=1e-10, preconditioner=full)).steps == 1
    none = (K + damping_for_steps(mu, 10**8) * Identity(60, dtype=F64)).inverse()
    plain = solve(A, b, CG(rtol=0, max_steps=10), throw=False).value
    with_it = solve(A, b, CG(rtol=0, max_steps=10, preconditioner=none), throw=False).value
    assert torch.allclose(with_it, plain, rtol=1e-8)


def fitted() -> tuple[Objective, torch.Tensor]:
    """A network that fits its rows, and gradients of others."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    centres = torch.randn(6, 20, generator=generator, dtype=F64)
    y = torch.randint(6, (320,), generator=generator)
    x = 0.4 * centres[y] + torch.randn(320, 20, generator=generator, dtype=F64)
    model = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 6)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:300]), y[:300]).backward()
        optimizer.step()
    others = Objective(model, "cross_entropy", (x[300:], y[300:]))
    B = torch.cat([g for _, g in others.per_example_gradients()]).T.contiguous()
    return Objective(model, "cross_entropy", (x[:300], y[:300])), B


@pytest.mark.parametrize("mu", [1e-4, 1e-3, 1e-2])
def test_ahead_of_plain_steps_and_of_the_damping_of_the_system_at_every_number(mu):
    objective, B = fitted()
    G = GaussNewton(objective).to_dense()
    A = GaussNewton(objective) + mu * Identity(len(G))
    truth = torch.linalg.solve(G + mu * torch.eye(len(G), dtype=F64), B)
    E = EKFAC(objective, "exact")

    def error(steps: int, damping: float | None) -> float:
        M = None if damping is None else E.damped_inverse(damping)
        recipe = CG(rtol=0, max_steps=steps, preconditioner=M)
        value = solve(A, B, recipe, throw=False).value
        return float((value - truth).norm() / truth.norm())

    for steps in (4, 8, 16, 32):
        ours = error(steps, damping_for_steps(mu, steps))
        assert ours < error(steps, None), steps
        assert ours < 1.05 * error(steps, mu), steps


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        ({"shift": 0.0, "steps": 5}, "shift is 0.0"),
        ({"shift": -1.0, "steps": 5}, "shift is -1.0"),
        ({"shift": math.nan, "steps": 5}, "shift is nan"),
        ({"shift": math.inf, "steps": 5}, "shift is inf"),
        ({"shift": 1.0, "steps": -1}, "steps is -1"),
        ({"shift": 1.0, "steps": math.inf}, "steps is inf"),
        ({"shift": 1.0, "steps": math.nan}, "steps is nan"),
        ({"shift": 1.0, "steps": 5, "accuracy": 0.0}, "accuracy is 0.0"),
        ({"shift": 1.0, "steps": 5, "accuracy": 1.0}, "accuracy is 1.0"),
        ({"shift": 1.0, "steps": 5, "accuracy": math.nan}, "accuracy is nan"),
    ],
)
def test_what_makes_no_sense_is_refused(words, pattern):
    with pytest.raises(ArgumentError, match=pattern):
        damping_for_steps(**words)
