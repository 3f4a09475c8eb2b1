"""Derivatives of solutions against closed forms, differentiated solvers and differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import minimize as scipy_minimize
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from woodbury import CG, GMRES, LSMR, MINRES, Cholesky, Dense, Neumann
from woodbury.implicit import (
    Implicit,
    ImplicitSolver,
    OneStep,
    Phantom,
    Truncated,
    WarmStart,
    attach,
    fixed_point,
    implicit_jvp,
    implicit_vjp,
    minimize,
    root,
)
from woodbury.implicit.link import default_recipe
from woodbury.operators import FunctionOperator
from woodbury.solvers import LU, Eigh, SolveReport

# What torch says of itself when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is dep:DeprecationWarning")

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator)


M = 0.3 * random(4, 4)
X, y = random(20, 4, seed=1), random(20, seed=2)


def cubic(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """Not symmetric, not linear in anything."""
    return x**3 + 2 * x + M @ x - t * c.sum()


def newton(x: Tensor | None, t: Tensor, c: Tensor) -> Tensor:
    """Differentiable itself."""
    x = torch.zeros_like(t)
    for _ in range(25):
        x = x - torch.linalg.solve(jacrev(cubic)(x, t, c), cubic(x, t, c))
    return x


def ridge_loss(w: Tensor, decay: Tensor) -> Tensor:
    return 0.5 * ((X @ w - y) ** 2).sum() + 0.5 * (decay.exp() * w**2).sum()


def ridge_solution(_: Any, decay: Tensor) -> Tensor:
    return torch.linalg.solve(X.mT @ X + torch.diag(decay.exp()), X.mT @ y)


def logistic_loss(w: Tensor, decay: Tensor) -> Tensor:
    z = X @ w * torch.sign(y)
    return torch.nn.functional.softplus(-z).sum() + 0.5 * (decay.exp() * w**2).sum()


def logistic_solution(_: Any, decay: Tensor) -> Tensor:
    w = torch.zeros(4, dtype=F64)
    for _ in range(20):
        H = jacrev(grad(logistic_loss))(w, decay)  # forward mode would not nest
        w = w - torch.linalg.solve(H, grad(logistic_loss)(w, decay))
    return w


def contraction(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    return 0.4 * torch.tanh(M @ x) + t * c.sum()


def iterate(x: Tensor | None, t: Tensor, c: Tensor) -> Tensor:
    x = torch.zeros_like(t)
    for _ in range(60):
        x = contraction(x, t, c)
    return x


T0, C0 = random(4, seed=3), random(2, seed=4)
PROBLEMS: dict[str, tuple[ImplicitSolver, tuple[Tensor, ...]]] = {
    "root": (root(cubic, newton), (T0, C0)),
    "fixed point": (fixed_point(contraction, iterate), (T0, C0)),
    "quadratic": (minimize(ridge_loss, ridge_solution), (T0,)),
    "logistic": (minimize(logistic_loss, logistic_solution), (T0,)),
    "gmres": (root(cubic, newton, mode=Implicit(GMRES(rtol=1e-12))), (T0, C0)),
    "cg": (minimize(logistic_loss, logistic_solution, mode=Implicit(CG(rtol=1e-13))), (T0,)),
}


def pair(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]:
    """The solution, differentiated implicitly and through its solver, and where."""
    solver, point = PROBLEMS[name]
    return (
        lambda *args: solver(None, *args),
        lambda *args: solver.with_mode("unrolled")(None, *args),
        point,
    )


@pytest.mark.parametrize("name", PROBLEMS)
def test_first_and_second_derivatives_by_differences(name: str) -> None:
    f, _, point = pair(name)
    leaves = tuple(t.clone().requires_grad_() for t in point)
    assert gradcheck(f, leaves, check_forward_ad=True)
    assert gradgradcheck(f, leaves)


TRANSFORMS: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f)),
    "jacfwd(jacrev)": lambda f: jacfwd(jacrev(f)),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f)),
    "hessian": lambda f: hessian(lambda *args: (f(*args) ** 2).sum()),
    "grad": lambda f: grad(lambda *args: (f(*args) ** 3).sum()),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["root", "fixed point", "logistic"])
def test_transforms_agree_with_the_differentiated_solver(name: str, transform: str) -> None:
    f, unrolled, point = pair(name)
    found, wanted = (TRANSFORMS[transform](g)(*point) for g in (f, unrolled))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("transform", [*TRANSFORMS, "value"])
def test_vmap_is_a_loop_over_samples(transform: str) -> None:
    f, _, (t, c) = pair("root")
    transformed = TRANSFORMS.get(transform, lambda f: f)(f)
    batch = t + 0.1 * random(3, 4, seed=5)
    found = vmap(transformed, in_dims=(0, None))(batch, c)
    torch.testing.assert_close(found, torch.stack([transformed(t, c) for t in batch]))


def test_derivative_of_a_vmapped_solution() -> None:
    f, unrolled, (t, c) = pair("root")
    batch = t + 0.1 * random(3, 4, seed=5)
    found, wanted = (
        jacrev(lambda batch: vmap(g, in_dims=(0, None))(batch, c))(batch) for g in (f, unrolled)
    )
    torch.testing.assert_close(found, wanted)


def test_ridge_in_closed_form() -> None:
    solver = minimize(
        lambda w, theta: 0.5 * ((X @ w - y) ** 2).sum() + 0.5 * theta * (w**2).sum(),
        lambda w0, theta: ridge_solution(None, theta.log().expand(4)),
    )
    theta = torch.tensor(0.7, dtype=F64)
    w = ridge_solution(None, theta.log().expand(4))
    wanted = -torch.linalg.solve(X.mT @ X + theta * torch.eye(4, dtype=F64), w)
    for derivative in (jacrev, jacfwd):
        found = derivative(lambda theta: solver(None, theta))(theta)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_lasso_in_closed_form_whatever_the_step() -> None:
    penalty = torch.tensor(6.0, dtype=F64)

    def soften(x: Tensor, by: Tensor) -> Tensor:
        return torch.sign(x) * torch.relu(x.abs() - by)

    def lasso(w0: Any, penalty: Tensor) -> Tensor:
        w = torch.zeros(4, dtype=F64)
        for _ in range(3000):
            w = soften(w - 0.02 * X.mT @ (X @ w - y), 0.02 * penalty)
        return w

    w = lasso(None, penalty)
    active = w != 0
    assert 0 < active.sum() < 4
    S = X[:, active]
    wanted = torch.zeros(4, dtype=F64)
    wanted[active] = -torch.linalg.solve(S.mT @ S, torch.sign(w[active]))
    for step in (0.02, 0.002):

        def T(w: Tensor, penalty: Tensor, step: float = step) -> Tensor:
            return soften(w - step * X.mT @ (X @ w - y), step * penalty)

        solver = fixed_point(T, lasso)
        found = jacrev(lambda penalty, solver=solver: solver(None, penalty))(penalty)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_linear_fixed_point_in_closed_form() -> None:
    solver = fixed_point(
        lambda x, b: M @ x + b, lambda x0, b: torch.linalg.solve(torch.eye(4, dtype=F64) - M, b)
    )
    found = jacrev(lambda b: solver(None, b))(T0)
    torch.testing.assert_close(found, torch.linalg.inv(torch.eye(4, dtype=F64) - M))


def test_one_step_of_newton_has_the_derivative() -> None:
    """Spec, item (e): a check that shares no code."""
    f, _, (t, c) = pair("root")
    x = newton(None, t, c)
    A = jacrev(cubic)(x, t, c)
    wanted = -torch.linalg.solve(A, jacrev(cubic, argnums=1)(x, t, c))
    torch.testing.assert_close(jacrev(f)(t, c), wanted, rtol=1e-12, atol=1e-14)


def test_scipy_solver_and_pytrees() -> None:
    """Named tensors in and out, through NumPy, with auxiliary output."""

    def loss(x: dict[str, Tensor], data: dict[str, Any], decay: Tensor) -> Tensor:
        residual = data["X"] @ x["w"] + x["b"] - data["y"]
        return (residual**2).sum() + decay * (x["w"] ** 2).sum() + 0.1 * (x["b"] ** 2).sum()

    @minimize(loss, has_aux=True)
    def fit(x0: Any, data: dict[str, Any], decay: Tensor) -> Any:
        def value(flat: Any) -> Any:
            x = torch.tensor(flat, requires_grad=True)
            found = loss({"w": x[:4], "b": x[4]}, data, decay)
            found.backward()
            return found.item(), x.grad.numpy()

        found = scipy_minimize(value, torch.zeros(5, dtype=F64).numpy(), jac=True, tol=1e-12)
        x = torch.from_numpy(found.x)
        return {"w": x[:4], "b": x[4]}, {"steps": found.nit}

    def exact(data: dict[str, Any], decay: Tensor) -> dict[str, Tensor]:
        Z = torch.cat([data["X"], torch.ones(20, 1, dtype=F64)], dim=1)
        D = torch.diag(torch.cat([decay.expand(4), torch.tensor([0.1], dtype=F64)]))
        x = torch.linalg.solve(Z.mT @ Z + D, Z.mT @ data["y"])
        return {"w": x[:4], "b": x[4]}

    results = []
    for solve in (lambda *args: fit(None, *args)[0], exact):
        decay = torch.tensor(0.5, dtype=F64, requires_grad=True)
        data = {"X": X.clone().requires_grad_(), "y": y.clone().requires_grad_()}
        x = solve(data, decay)
        (x["w"].square().sum() + x["b"]).backward()
        results.append((decay.grad, data["X"].grad, data["y"].grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert fit(None, {"X": X, "y": y}, torch.tensor(0.5, dtype=F64))[1]["steps"] > 1


def test_training_loop_with_the_parameters_of_a_module() -> None:
    model = torch.nn.Linear(4, 1).double()

    def loss(w: dict[str, Tensor], decay: Tensor) -> Tensor:
        error = functional_call(model, w, (X,)).squeeze(1) - y
        return (error**2).mean() + decay * sum((p**2).sum() for p in w.values())

    def train(w0: dict[str, Tensor], decay: Tensor) -> dict[str, Tensor]:
        w = {name: p.clone().requires_grad_() for name, p in w0.items()}
        optimizer = torch.optim.LBFGS(
            w.values(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0, history_size=20
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(w, decay)
            value.backward()
            return value

        optimizer.step(closure)
        return w

    trained = minimize(loss, train)
    decay = torch.tensor(0.3, dtype=F64, requires_grad=True)
    start = dict(model.named_parameters())
    trained(start, decay)["weight"].square().sum().backward()
    with torch.no_grad():
        high, low = (
            train({k: p.detach() for k, p in start.items()}, decay.detach() + h)["weight"]
            for h in (1e-5, -1e-5)
        )
    difference = (high.square().sum() - low.square().sum()) / 2e-5
    torch.testing.assert_close(decay.grad, difference.detach(), rtol=1e-7, atol=1e-9)


def test_one_solve_for_all_arguments_and_only_those_asked_for() -> None:
    report = SolveReport()
    solver = root(cubic, newton, argnums=1, report=report)
    t, c = T0.clone().requires_grad_(), C0.clone().requires_grad_()
    solver(None, t, c).sum().backward()
    assert t.grad is None
    assert c.grad is not None
    both = root(cubic, newton, report=report)
    both(None, t, c).sum().backward()
    assert t.grad is not None
    assert (report.calls, report.ok) == (2, True)
    torch.testing.assert_close(c.grad[0], c.grad[1])  # of both calls, of an argument that is summed


@pytest.mark.parametrize("mode", ["unrolled", "truncated", "one_step", "phantom"])
def test_only_arguments_asked_for_in_every_mode(mode: str) -> None:
    solver = fixed_point(contraction, iterate, argnums=-1, mode=mode)
    t, c = T0.clone().requires_grad_(), C0.clone().requires_grad_()
    solver(None, t, c).sum().backward()
    assert t.grad is None
    assert c.grad is not None


@pytest.mark.parametrize(
    ("size", "tags", "recipe"),
    [
        (4, {"positive_definite"}, Cholesky),
        (4, {"symmetric"}, Eigh),
        (4, set(), LU),
        (300, {"positive_definite"}, CG),
        (300, {"symmetric"}, MINRES),
        (300, set(), GMRES),
    ],
)
def test_default_recipe_knows_the_symmetry(size: int, tags: set[str], recipe: type) -> None:
    A = FunctionOperator(lambda V: V, (size, size), lambda V: V, tags=tags)
    assert type(default_recipe(A)) is recipe


def test_large_symmetric_condition_by_a_symmetric_solver() -> None:
    n = 300
    d = torch.linspace(1, 3, n, dtype=F64)
    report = SolveReport()
    solver = root(
        lambda x, b: d * x - b - 0.1 * x.mean(),
        lambda x0, b: torch.linalg.solve(torch.diag(d) - 0.1 / n, b),
        symmetric=True,
        report=report,
    )
    b = torch.ones(n, dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(solver(None, b)[0], b)
    wanted = torch.linalg.inv(torch.diag(d) - 0.1 / n)[0]
    assert isinstance(report.last.recipe, MINRES)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)  # MINRES goes to 1e-6


def test_preconditioner_goes_into_the_transposed_solve() -> None:
    n = 40
    A = torch.diag(torch.logspace(0, 4, n, dtype=F64)) + torch.triu(random(n, n), 1)
    exact = Dense(torch.linalg.inv(A))
    b = torch.ones(n, dtype=F64, requires_grad=True)
    steps = {}
    for name, M in (("none", None), ("exact", exact)):
        report = SolveReport()
        mode = Implicit(GMRES(rtol=1e-10, preconditioner=M, max_steps=400), on_failure="ignore")
        solver = root(
            lambda x, b: A @ x - b,
            lambda x0, b: torch.linalg.solve(A, b),
            mode=mode,
            report=report,
        )
        (found,) = torch.autograd.grad(solver(None, b).sum(), b)
        steps[name] = report.last.steps
    wanted = torch.linalg.solve(A.mT, torch.ones(n, dtype=F64))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    assert steps["exact"] <= 2 < 10 < steps["none"]


def test_warm_start_of_the_transposed_solve() -> None:
    n = 50
    A = torch.diag(torch.linspace(1, 100, n, dtype=F64)) + 0.1
    report, warm = SolveReport(), WarmStart()
    solver = root(
        lambda x, b: A @ x - b,
        lambda x0, b: torch.linalg.solve(A, b),
        symmetric=True,
        mode=Implicit(MINRES(rtol=1e-8)),
        report=report,
        warm=warm,
    )
    b = torch.ones(n, dtype=F64, requires_grad=True)
    torch.autograd.grad(solver(None, b).sum(), b)
    first = report.last.steps
    torch.autograd.grad(solver(None, b).sum(), b)
    assert first > 5
    assert report.last.steps == 0
    assert warm.adjoint is not None
    jvp(lambda b: solver(None, b), (b.detach(),), (torch.ones_like(b),))  # not used, no trouble


def test_truncated_is_the_neumann_series() -> None:
    step = 0.02
    theta = T0.clone()
    results = []
    for mode in (Truncated(steps=7, step=step), Implicit(Neumann(terms=6, step=step))):
        solver = minimize(ridge_loss, ridge_solution, mode=mode)
        results.append(jacrev(lambda t, solver=solver: solver(None, t))(theta))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)


def test_truncated_phantom_and_one_step_in_closed_form() -> None:
    J = jacrev(contraction)(iterate(None, T0, C0), T0, C0)
    of_t = C0.sum() * torch.eye(4, dtype=F64)
    d = 0.3
    damped = (1 - d) * torch.eye(4, dtype=F64) + d * J
    powers = [torch.linalg.matrix_power(J, j) for j in range(6)]
    of_damped = [torch.linalg.matrix_power(damped, j) for j in range(6)]
    wanted = {
        OneStep(): of_t,
        Truncated(steps=6): sum(powers) @ of_t,
        Phantom(steps=6, damping=d): d * sum(of_damped) @ of_t,
    }
    for mode, jacobian in wanted.items():
        solver = fixed_point(contraction, iterate, mode=mode)
        for derivative in (jacrev, jacfwd):
            found = derivative(lambda t, solver=solver: solver(None, t, C0))(T0)
            torch.testing.assert_close(found, jacobian, rtol=1e-12, atol=1e-14)
        batch = torch.stack([T0, T0])
        found = vmap(jacrev(lambda t, solver=solver: solver(None, t, C0)))(batch)
        torch.testing.assert_close(found[1], jacobian, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["implicit", "truncated", "one_step", "phantom"])
def test_the_mode_does_not_change_the_value(mode: str) -> None:
    x = iterate(None, T0, C0)
    t = T0.clone().requires_grad_()
    assert torch.equal(fixed_point(contraction, iterate, mode=mode)(None, t, C0), x)


def test_functions_without_a_solver() -> None:
    x, A = newton(None, T0, C0), None
    A = jacrev(cubic)(x, T0, C0)
    of_t, of_c = jacrev(cubic, argnums=(1, 2))(x, T0, C0)
    g, dt = random(4, seed=6), random(4, seed=7)
    adjoint = torch.linalg.solve(A.mT, g)
    both = implicit_vjp(cubic, x, (T0, C0), g)
    torch.testing.assert_close(both, (-of_t.mT @ adjoint, -of_c.mT @ adjoint))
    torch.testing.assert_close(implicit_vjp(cubic, x, (T0, C0), g, argnums=1), both[1])
    moved = implicit_jvp(cubic, x, (T0, C0), (dt, None))
    torch.testing.assert_close(moved, -torch.linalg.solve(A, of_t @ dt))
    torch.testing.assert_close(implicit_jvp(cubic, x, (T0, C0), dt, argnums=0), moved)
    f = lambda t, c: attach(cubic, newton(None, t, c).detach(), t, c)  # noqa: E731
    leaves = (T0.clone().requires_grad_(), C0.clone().requires_grad_())
    assert gradcheck(f, leaves, check_forward_ad=True)
    assert gradgradcheck(f, leaves)


def test_functions_inside_transforms() -> None:
    x = newton(None, T0, C0)
    G = torch.eye(4, dtype=F64)
    rows = vmap(lambda g: implicit_vjp(cubic, x, (T0, C0), g, argnums=0))(G)
    columns = vmap(lambda d: implicit_jvp(cubic, x, (T0, C0), d, argnums=0), out_dims=1)(G)
    torch.testing.assert_close(rows, columns)


def test_trees_in_the_functions_without_a_solver() -> None:
    def F(x: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
        return {"a": x["a"] - args["s"] * args["n"], "b": x["b"] + x["a"].sum() - args["t"]}

    args = {"s": torch.tensor(2.0), "n": 3, "t": torch.ones(2), "labels": torch.arange(2)}
    x = {"a": torch.tensor([6.0]), "b": torch.full((2,), -5.0)}
    (found,) = implicit_vjp(F, x, (args,), {"a": torch.zeros(1), "b": torch.ones(2)})
    assert (found["s"], found["n"], found["labels"]) == (torch.tensor(-6.0), None, None)
    assert torch.equal(found["t"], torch.ones(2))
    tangents = ({"s": torch.tensor(1.0), "n": None, "t": None, "labels": None},)
    moved = implicit_jvp(F, x, (args,), tangents)
    assert (moved["a"].item(), moved["b"].tolist()) == (3.0, [-3.0, -3.0])


def test_integers_may_be_batched_and_auxiliary_output_too() -> None:
    def solver(x0: Any, t: Tensor, i: Tensor) -> Any:
        return t.sqrt() * i, {"t": t.sum(), "steps": 3}

    f = root(lambda x, t, i: (x / i) ** 2 - t, solver, has_aux=True)
    batch, i = torch.rand(3, 2, dtype=F64) + 0.5, torch.arange(1, 4)
    x, aux = vmap(lambda t, i: f(None, t, i))(batch, i)
    torch.testing.assert_close(x, batch.sqrt() * i[:, None])
    assert aux["steps"].tolist() == [3, 3, 3]
    torch.testing.assert_close(aux["t"], batch.sum(1))
    found = vmap(jacrev(lambda t, i: f(None, t, i)[0]))(batch, i)
    torch.testing.assert_close(found, torch.diag_embed(i[:, None] / (2 * batch.sqrt())))


def test_least_squares_recipe_differentiates_along_a_singular_direction() -> None:
    """Of x0 + x1 = t the solution of smallest norm moves by (1/2, 1/2)."""
    solver = root(
        lambda x, t: (x.sum() - t).expand(2),
        lambda x0, t: (t / 2).expand(2),
        mode=Implicit(LSMR(rtol=1e-12)),
    )
    t = torch.tensor(3.0, dtype=F64)
    torch.testing.assert_close(
        jacrev(lambda t: solver(None, t))(t), torch.full((2,), 0.5, dtype=F64)
    )
