"""Broyden's method and the deep equilibrium layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from woodbury import GMRES
from woodbury.errors import ArgumentError, NonFiniteError, SolveError
from woodbury.implicit import (
    LBFGS,
    Anderson,
    Broyden,
    DeepEquilibrium,
    Implicit,
    InnerSolver,
    IterationStatus,
)

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator)


class Step(torch.nn.Module):
    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(n, n, dtype=F64)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return 0.7 * torch.tanh(self.linear(z)) + u


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_broyden_ends_on_a_linear_map_after_2n_steps(n: int) -> None:
    """Gay 1979; the map need not be a contraction."""
    A, b = torch.eye(n, dtype=F64) - 0.7 * random(n, n, seed=n), random(n, seed=9)
    found = Broyden(tol=1e-9).run(lambda x: x + b - A @ x, torch.zeros(n, dtype=F64))
    assert found.ok
    assert found.steps <= 2 * n
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("memory", [3, 30])
def test_broyden_in_a_batch_is_a_loop(memory: int) -> None:
    t = random(3, 5, seed=1)
    T = lambda x, t: 0.9 * torch.cos(x + x.roll(1, -1)) + t  # noqa: E731
    start = torch.zeros(3, 5, dtype=F64)
    found = Broyden(tol=1e-10, batched=True, memory=memory).run(T, start, t)
    assert found.row_status == (IterationStatus.converged,) * 3
    assert ((T(found.value, t) - found.value).norm(dim=1) < 1e-9).all()
    for row in range(3):
        alone = Broyden(tol=1e-10, memory=memory).run(T, start[row], t[row])
        torch.testing.assert_close(found.value[row], alone.value, rtol=1e-8, atol=1e-8)


def test_broyden_derivatives_and_statuses() -> None:
    T = lambda x, t: 0.5 * torch.cos(x) * t  # noqa: E731
    solver = Broyden(tol=1e-12).differentiable(T)
    t = random(3, seed=2).requires_grad_()
    assert gradcheck(lambda t: solver(torch.zeros(3, dtype=F64), t), (t,))
    assert gradgradcheck(lambda t: solver(torch.zeros(3, dtype=F64), t), (t,))
    zeros = torch.zeros(2, dtype=F64)
    assert Broyden().run(lambda x: x * 0.5, zeros).steps == 0
    with pytest.raises(SolveError, match="max_steps"):
        Broyden(max_steps=1).run(lambda x: torch.cos(x), zeros)
    with pytest.raises(NonFiniteError, match="start"):
        Broyden().run(lambda x: x / 0, zeros)
    lost = Broyden(max_steps=60).run(lambda x: x + 1 + x**2, zeros, throw=False)
    assert not lost.ok  # x^2 = -1 has no solution
    assert lost.value.isfinite().all()
    with pytest.raises(ArgumentError, match="memory"):
        Broyden(memory=0)


@pytest.mark.parametrize(
    ("solver", "mode"),
    [
        (Anderson(tol=1e-12), "implicit"),
        (Broyden(tol=1e-12), "implicit"),
        (Anderson(tol=1e-12, batched=True), Implicit(GMRES(rtol=1e-12))),
    ],
)
def test_layer_has_the_gradients_of_the_unrolled_iteration(
    solver: InnerSolver, mode: str | Implicit
) -> None:
    step, u = Step(), random(6, 4, seed=3).requires_grad_()
    layer = DeepEquilibrium(step, solver, mode=mode)
    z = layer(torch.zeros(6, 4, dtype=F64), u)
    leaves = [u, *step.parameters()]
    found = torch.autograd.grad((z**3).sum(), leaves)
    w = torch.zeros(6, 4, dtype=F64)
    for _ in range(150):
        w = step(w, u)
    wanted = torch.autograd.grad((w**3).sum(), leaves)
    torch.testing.assert_close(z, w, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


def test_layer_trains() -> None:
    layer, u = DeepEquilibrium(Step()), random(32, 4, seed=4)
    target = 0.3 * torch.sin(3 * u)
    head = torch.nn.Linear(4, 4, dtype=F64)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = ((head(layer(torch.zeros_like(u), u)) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_bad_layers() -> None:
    with pytest.raises(ArgumentError, match="module"):
        DeepEquilibrium(lambda z: z)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="LBFGS does not solve fixed points"):
        DeepEquilibrium(Step(), LBFGS())
    layer = DeepEquilibrium(Step(), Anderson(tol=1e-12, max_steps=1))
    with pytest.raises(SolveError, match="max_steps"):
        layer(torch.zeros(2, 4, dtype=F64), torch.ones(2, 4, dtype=F64))
