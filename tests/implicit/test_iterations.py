"""Iterative solvers against closed forms, SciPy and GMRES; each row of a batch by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import minimize as scipy_minimize
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from woodbury import GMRES, Dense, solve
from woodbury.errors import ArgumentError, GradientError, NonFiniteError, ShapeError, SolveError
from woodbury.implicit import (
    LBFGS,
    AcceleratedProximalGradient,
    Anderson,
    BlockCoordinateDescent,
    GradientDescent,
    InnerSolver,
    IterationStatus,
    MirrorDescent,
    NewtonCG,
    project_simplex,
    prox_l1,
    prox_ridge,
)

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator)


X, y = random(20, 4), random(20, seed=1)


def ridge(w: Tensor, decay: Tensor) -> Tensor:
    """Of one problem ``w [4]``, or of each ``w [B, 4]``."""
    return ((w @ X.mT - y) ** 2).mean(-1) + (decay.exp() * w**2).sum(-1)


def ridge_solution(decay: Tensor) -> Tensor:
    return torch.linalg.solve(X.mT @ X / 20 + torch.diag_embed(decay.exp()), X.mT @ y / 20)


def lasso_gap(w: Tensor, penalty: float) -> Tensor:
    """How far the subgradient of |X w - y|^2 / 2 + penalty |w|_1 is from zero."""
    g = X.mT @ (X @ w - y)
    inactive = torch.relu(g.abs() - penalty)
    return torch.where(w != 0, (g + penalty * torch.sign(w)).abs(), inactive).max()


def half_squares(w: Tensor, target: Tensor) -> Tensor:
    return 0.5 * ((w @ X.mT - target) ** 2).sum(-1)


def cosines(x: Tensor, t: Tensor) -> Tensor:
    return 0.6 * torch.cos(x + x.roll(1, -1)) + t


DESCENT = [
    GradientDescent(tol=1e-11),
    LBFGS(tol=1e-11),
    NewtonCG(tol=1e-11),
    GradientDescent(tol=1e-11, step=0.1),
]


@pytest.mark.parametrize("solver", DESCENT, ids=repr)
def test_ridge(solver: InnerSolver) -> None:
    decay = random(4, seed=2)
    found = solver.run(ridge, torch.zeros(4, dtype=F64), decay)
    assert (found.ok, found.status) == (True, IterationStatus.converged)
    torch.testing.assert_close(found.value, ridge_solution(decay), rtol=1e-9, atol=1e-10)
    gradient = torch.func.grad(ridge)(found.value, decay)
    torch.testing.assert_close(found.residual, gradient.norm(), rtol=1e-3, atol=1e-14)


def test_rosenbrock_in_many_dimensions_as_scipy() -> None:
    def f(x: Tensor) -> Tensor:
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    start = torch.linspace(-1, 1, 30, dtype=F64)
    found = LBFGS(tol=1e-9).run(f, start)
    reference = scipy_minimize(
        lambda x: f(torch.tensor(x)).item(), start.numpy(), method="L-BFGS-B", tol=1e-14,
        jac=lambda x: torch.func.grad(f)(torch.tensor(x)).numpy(),
    )  # fmt: skip
    assert f(found.value) <= reference.fun + 1e-12
    torch.testing.assert_close(found.value, torch.ones(30, dtype=F64), rtol=1e-7, atol=0)
    assert found.steps < 3 * reference.nfev


def test_lbfgs_with_full_memory_ends_on_a_quadratic() -> None:
    """With exact curvature in every direction the step is Newton's."""
    d = torch.tensor([1.0, 3.0, 10.0, 30.0], dtype=F64)
    found = LBFGS(tol=1e-10, memory=30).run(lambda x: 0.5 * (d * (x - 1) ** 2).sum(), 0 * d)
    plain = GradientDescent(tol=1e-10).run(lambda x: 0.5 * (d * (x - 1) ** 2).sum(), 0 * d)
    assert found.steps < 25
    assert found.steps < plain.steps / 2


def test_lasso() -> None:
    solver = AcceleratedProximalGradient(tol=1e-12, prox=prox_l1, max_steps=5000)
    penalty = torch.tensor(6.0, dtype=F64)
    found = solver.run(half_squares, torch.zeros(4, dtype=F64), y, penalty)
    assert found.ok
    assert 0 < (found.value != 0).sum() < 4
    assert lasso_gap(found.value, 6.0) < 1e-9
    active = found.value != 0
    S = X[:, active]
    wanted = torch.zeros(4, dtype=F64)
    wanted[active] = -torch.linalg.solve(S.mT @ S, torch.sign(found.value[active]))
    lasso = solver.differentiable(half_squares)
    jacobian = torch.func.jacrev(lasso, argnums=2)(torch.zeros(4, dtype=F64), y, penalty)
    torch.testing.assert_close(jacobian, wanted, rtol=1e-8, atol=1e-10)


def test_anderson_on_a_linear_map_is_gmres() -> None:
    """Walker and Ni, theorem 2.2: x of step k + 1 is T at the GMRES iterate of step k."""
    M, b = 0.4 * random(6, 6, seed=3), random(6, seed=4)
    A = torch.eye(6, dtype=F64) - M
    for k in range(1, 5):
        anderson = Anderson(tol=0.0, max_steps=k + 1, memory=20, ridge=0.0)
        points: list[Tensor] = []

        def T(x: Tensor, points: list[Tensor] = points) -> Tensor:
            points.append(x)
            return M @ x + b

        anderson.run(T, torch.zeros(6, dtype=F64), throw=False)
        iterate = solve(Dense(A), b, GMRES(rtol=0.0, max_steps=k), throw=False).value
        torch.testing.assert_close(points[k + 1], M @ iterate + b, rtol=1e-9, atol=1e-11)


def test_anderson_beats_the_plain_iteration() -> None:
    t = random(5, seed=5)
    plain = Anderson(tol=1e-10, memory=1).run(lambda x: 0.9 * torch.sin(x) + t, 0 * t)
    mixed = Anderson(tol=1e-10).run(lambda x: 0.9 * torch.sin(x) + t, 0 * t)
    torch.testing.assert_close(plain.value, mixed.value, rtol=1e-8, atol=1e-8)
    assert mixed.steps < 0.6 * plain.steps


Case = tuple[InnerSolver, Callable[..., Any], tuple[Tensor, ...]]
BATCHED: dict[str, Case] = {
    "gradient descent": (GradientDescent(tol=1e-10, batched=True), ridge, (random(3, 4),)),
    "lbfgs": (LBFGS(tol=1e-10, batched=True), ridge, (3 * random(3, 4),)),
    "newton": (NewtonCG(tol=1e-10, batched=True), ridge, (3 * random(3, 4),)),
    "anderson": (Anderson(tol=1e-10, batched=True), cosines, (random(3, 4),)),
    "proximal": (
        AcceleratedProximalGradient(
            tol=1e-11, max_steps=5000, batched=True, prox=prox_l1
        ),
        half_squares,
        (random(3, 20, seed=6), torch.tensor(4.0, dtype=F64)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_is_a_loop(name: str) -> None:
    solver, function, args = BATCHED[name]
    start = torch.zeros(3, 4, dtype=F64)
    found = solver.run(function, start, *args)
    assert found.ok
    assert found.row_status == (IterationStatus.converged,) * 3
    assert found.residual.shape == (3,)
    from dataclasses import replace

    single = replace(solver, batched=False)
    for row in range(3):
        own = (args[0][row], *args[1:])
        alone = single.run(function, start[row], *own)
        torch.testing.assert_close(found.value[row], alone.value, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", BATCHED)
def test_derivatives(name: str) -> None:
    solver, function, args = BATCHED[name]
    differentiable = solver.differentiable(function)
    leaves = tuple(t.clone().requires_grad_() for t in args)
    f = lambda *args: differentiable(torch.zeros(3, 4, dtype=F64), *args)  # noqa: E731
    assert gradcheck(f, leaves, atol=1e-5)
    assert gradgradcheck(f, leaves, atol=1e-5)


def test_rows_that_are_solved_stay_where_they_are() -> None:
    decay = torch.zeros(2, 4, dtype=F64)
    start = torch.stack([ridge_solution(decay[0]), torch.full((4,), 50.0, dtype=F64)])
    for kind in (GradientDescent, LBFGS, NewtonCG):
        solver = kind(batched=True, tol=1e-9)
        found = solver.run(ridge, start, decay)
        assert found.ok
        assert torch.equal(found.value[0], start[0])


ALL: list[InnerSolver] = [
    GradientDescent(),
    LBFGS(),
    NewtonCG(),
    AcceleratedProximalGradient(prox=lambda v, step: v),
]


@pytest.mark.parametrize("solver", ALL, ids=lambda solver: type(solver).__name__)
def test_already_solved_and_no_budget(solver: InnerSolver) -> None:
    from dataclasses import replace

    f = lambda x, t: 0.5 * ((x - t) ** 2).sum()  # noqa: E731
    t = torch.ones(3, dtype=F64)
    found = solver.run(f, t, t)
    assert (found.ok, found.steps <= 1) == (True, True)
    assert torch.equal(found.value, t)
    none = replace(solver, max_steps=0).run(f, 0 * t, t, throw=False)
    assert (none.status, none.steps) == (IterationStatus.max_steps, 0)
    with pytest.raises(SolveError, match="max_steps after 0 steps.*raise max_steps") as caught:
        replace(solver, max_steps=0).run(f, 0 * t, t)
    assert torch.equal(caught.value.solution.value, 0 * t)


@pytest.mark.parametrize("solver", ALL, ids=lambda solver: type(solver).__name__)
def test_bad_functions(solver: InnerSolver) -> None:
    zeros = torch.zeros(2, dtype=F64)
    with pytest.raises(GradientError, match="expected"):
        solver.run(lambda x, *_: x, zeros, zeros)
    with pytest.raises(GradientError, match="does not depend"):
        solver.run(lambda x, *_: torch.ones(()), zeros, zeros)
    with pytest.raises(NonFiniteError, match="start"):
        solver.run(lambda x, *_: x.log().sum(), zeros - 1, zeros)


def test_statuses() -> None:
    zeros = torch.zeros(2, dtype=F64)
    wild = GradientDescent(step=10.0).run(lambda x: ((x - 1) ** 4).sum(), zeros, throw=False)
    assert wild.status is IterationStatus.diverged
    assert wild.value.isfinite().all()
    steep = lambda x: torch.maximum(x - 0.3, 0.6 - 2 * x).sum()  # noqa: E731
    kink = GradientDescent().run(steep, zeros, throw=False)
    assert kink.status is IterationStatus.stagnation
    away = Anderson(memory=1).run(lambda x: 3 * x**2 + 1, zeros, throw=False)
    assert away.status is IterationStatus.diverged
    assert away.value.isfinite().all()
    with pytest.raises(NonFiniteError, match="start"):
        Anderson().run(lambda x: x / 0, zeros)


def test_one_bad_row_does_not_spoil_the_batch() -> None:
    a = torch.tensor([[0.5], [3.0]], dtype=F64)
    start = torch.ones(2, 1, dtype=F64)
    found = Anderson(memory=1, batched=True).run(lambda x: a * x**2 + 0.1, start, throw=False)
    assert [s.name for s in found.row_status] == ["converged", "diverged"]
    wanted = 1 - (1 - 0.2) ** 0.5
    torch.testing.assert_close(found.value[0, 0].item(), wanted, rtol=1e-7, atol=0)


def test_float32_and_trees() -> None:
    f = lambda x: ((x["a"] - 1) ** 2).sum() + ((x["b"] + 2) ** 2).sum()  # noqa: E731
    start = {"a": torch.zeros(2, 2), "b": torch.zeros(())}
    for solver in (GradientDescent(tol=1e-5), LBFGS(tol=1e-5), NewtonCG(tol=1e-5)):
        found = solver.run(f, start)
        assert found.value["a"].dtype == torch.float32
        torch.testing.assert_close(found.value["a"], torch.ones(2, 2), rtol=1e-4, atol=0)
        torch.testing.assert_close(found.value["b"], torch.tensor(-2.0), rtol=1e-4, atol=0)


def test_settings_that_make_no_sense() -> None:
    for make in (
        lambda: GradientDescent(tol=-1.0),
        lambda: GradientDescent(max_steps=-1),
        lambda: GradientDescent(step=0.0),
        lambda: LBFGS(memory=0),
        lambda: NewtonCG(max_products=0),
        lambda: NewtonCG(preconditioner=1.0),
        lambda: Anderson(memory=0),
        lambda: Anderson(mixing=0.0),
        lambda: Anderson(ridge=-1.0),
        lambda: AcceleratedProximalGradient(),
        lambda: AcceleratedProximalGradient(prox=prox_l1, step=0.0),
    ):
        with pytest.raises(ArgumentError):
            make()
    with pytest.raises(ShapeError, match="first dimension"):
        LBFGS(batched=True).run(lambda x: x, torch.zeros(()))


def test_auxiliary_output_says_what_happened() -> None:
    solver = LBFGS(tol=1e-10).differentiable(ridge, has_aux=True)
    value, aux = solver(torch.zeros(4, dtype=F64), torch.zeros(4, dtype=F64))
    assert aux["ok"]
    assert aux["steps"] > 1
    torch.testing.assert_close(value, ridge_solution(torch.zeros(4, dtype=F64)))


def entropic(x: Tensor, t: Tensor) -> Tensor:
    """Its minimum over the simplex is softmax(t)."""
    return torch.special.xlogy(x, x).sum(-1) - (x * t).sum(-1)


def distance(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * ((x - t) ** 2).sum(-1)


@pytest.mark.parametrize("batched", [False, True])
def test_mirror_descent_on_the_simplex(batched: bool) -> None:
    t = random(3, 5, seed=7) if batched else random(5, seed=7)
    start = torch.full_like(t, 0.2)
    solver = MirrorDescent(tol=1e-12, batched=batched)
    found = solver.run(entropic, start, t)
    assert found.ok
    torch.testing.assert_close(found.value, torch.softmax(t, -1), rtol=1e-9, atol=1e-11)
    inner = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=F64) + 0.01 * t
    nearest = MirrorDescent(tol=1e-8, batched=batched).run(distance, start, inner)
    torch.testing.assert_close(nearest.value, project_simplex(inner), rtol=0, atol=1e-6)
    leaf = t.clone().requires_grad_()
    differentiable = solver.differentiable(entropic)
    assert gradcheck(lambda t: differentiable(start, t), (leaf,), atol=1e-5)
    assert gradgradcheck(lambda t: differentiable(start, t), (leaf,), atol=1e-5)


def test_mirror_descent_starts_inside() -> None:
    for start in (torch.tensor([1.0, 0.0]), torch.ones(2), torch.tensor(1.0)):
        with pytest.raises(ArgumentError, match="x0"):
            MirrorDescent().run(lambda x: x.sum(), start)
    with pytest.raises(ArgumentError, match="step"):
        MirrorDescent(step=0.0)
    third = torch.full((3,), 1 / 3, dtype=F64)
    short = MirrorDescent(max_steps=0).run(lambda x: (x[0] - x[1]) ** 2 + x[2], third, throw=False)
    assert (short.status, short.steps) == (IterationStatus.max_steps, 0)


def test_block_coordinate_descent_is_the_elastic_problem() -> None:
    """Lasso in one block and ridge in the other, against accelerated steps on both at once."""

    def f(x: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return 0.5 * ((x[0] @ X[:, :2].mT + x[1] @ X[:, 2:].mT - target) ** 2).sum(-1)

    a, b = torch.tensor(4.0, dtype=F64), torch.tensor(2.0, dtype=F64)
    solver = BlockCoordinateDescent(tol=1e-12, proxes=(prox_l1, prox_ridge))
    start = torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)
    found = solver.run(f, start, y, a, b)
    assert found.ok

    def both(v: tuple[Tensor, Tensor], a: Tensor, b: Tensor, step: float) -> Any:
        return prox_l1(v[0], a, step=step), prox_ridge(v[1], b, step=step)

    reference = AcceleratedProximalGradient(tol=1e-12, prox=both, max_steps=5000)
    wanted = reference.run(f, start, y, a, b)
    torch.testing.assert_close(found.value, wanted.value, rtol=1e-9, atol=1e-10)
    targets = torch.stack([y, -y])
    many = BlockCoordinateDescent(tol=1e-12, proxes=(prox_l1, prox_ridge), batched=True)
    batch = many.run(f, tuple(s.expand(2, 2) for s in start), targets, a, b)
    torch.testing.assert_close(batch.value[1][1], -wanted.value[1], rtol=1e-9, atol=1e-10)
    differentiable = solver.differentiable(f)
    leaves = tuple(t.clone().requires_grad_() for t in (y, a, b))
    g = lambda *args: torch.cat(differentiable(start, *args))  # noqa: E731
    assert gradcheck(g, leaves, atol=1e-5)
    assert gradgradcheck(g, leaves, atol=1e-5)


def test_block_coordinate_descent_needs_its_blocks() -> None:
    for make in (
        lambda: BlockCoordinateDescent(),
        lambda: BlockCoordinateDescent(proxes=(prox_l1,), step=-1.0),
        lambda: BlockCoordinateDescent(proxes=(prox_l1,)).run(lambda x, t: x.sum(), y, y),
    ):
        with pytest.raises(ArgumentError):
            make()
