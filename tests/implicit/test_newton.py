"""Newton-CG reaches the minimum that SciPy's solver and closed forms name."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from woodbury import CG, Dense, Diagonal, Nystrom, Objective
from woodbury.errors import ArgumentError, GradientError, NonFiniteError
from woodbury.implicit import LBFGS, IterationStatus, NewtonCG, newton_cg


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def test_rosenbrock_with_negative_curvature_on_the_way() -> None:
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    objective = Objective.functional(
        lambda p, batch: rosenbrock(p["x"]), {"x": start}, [torch.zeros(1)]
    )
    found = newton_cg(objective, gtol=1e-10)
    reference = minimize(
        lambda x: rosenbrock(torch.tensor(x)).item(),
        start.numpy(),
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 10000, "maxfev": 10000},
    )
    gradient = objective.with_params(found).gradient()
    assert gradient.norm() < 1e-6
    assert rosenbrock(found).item() <= reference.fun + 1e-10
    assert torch.equal(objective.params_vector(), start)


def test_non_finite_start_is_refused() -> None:
    objective = Objective.functional(
        lambda p, batch: p["x"].log().sum(),
        {"x": torch.full((2,), -1.0, dtype=torch.float64)},
        [torch.zeros(1)],
    )
    with pytest.raises(NonFiniteError):
        newton_cg(objective)


F64 = torch.float64


def entropy(w: Tensor, X: Tensor, decay: Tensor) -> Tensor:
    """Strictly convex: log(1 + exp(X w)) and a penalty for each weight, of each row of a batch."""
    z = w @ X.mT
    smooth = (torch.logaddexp(z, torch.zeros_like(z)) - 0.3 * z).mean(-1)
    return smooth + 0.5 * (decay * w**2).sum(-1)


def hessian(w: Tensor, X: Tensor, decay: Tensor) -> Tensor:
    s = torch.sigmoid(X @ w)
    return (X.mT * (s * (1 - s) / len(X))) @ X + torch.diag(decay)


def data(n: int = 40, p: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, p, dtype=F64, generator=generator) * torch.logspace(0, -2, p, dtype=F64)
    return X, torch.full((p,), 1e-4, dtype=F64)


def count_products(solver: NewtonCG, start: Tensor, *args: Tensor) -> tuple[Tensor, int]:
    """The solution, and backward passes of linearised gradients."""
    seen = []

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(w: Tensor) -> Tensor:
            return w.clone()

        @staticmethod
        def setup_context(ctx: object, inputs: object, output: object) -> None:
            pass

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            seen.append(torch.is_grad_enabled())  # the gradient itself is made with a graph
            return g

    found = solver.run(lambda w, *args: entropy(Once.apply(w), *args), start, *args)
    assert found.ok
    return found.value, len(seen) - sum(seen)


def test_the_minimum_is_that_of_dense_newton() -> None:
    X, decay = data()
    found = NewtonCG(tol=1e-12).run(entropy, torch.zeros(12, dtype=F64), X, decay)
    w = torch.zeros(12, dtype=F64)
    for _ in range(30):
        g = torch.func.grad(entropy)(w, X, decay)
        w = w - torch.linalg.solve(hessian(w, X, decay), g)
    assert found.status is IterationStatus.converged
    torch.testing.assert_close(found.value, w, rtol=1e-8, atol=1e-9)
    assert found.steps < LBFGS(tol=1e-9).run(entropy, 0 * w, X, decay).steps / 10


def test_convergence_is_superlinear() -> None:
    X, decay = data()
    norms = [
        NewtonCG(tol=0.0, max_steps=k)
        .run(entropy, torch.zeros(12, dtype=F64), X, decay, throw=False)
        .residual.item()
        for k in range(4, 10)
    ]
    rates = [b / a for a, b in itertools.pairwise(norms) if a > 1e-9]
    assert len(rates) >= 2
    assert rates[-1] < 0.1 * rates[0] or rates[-1] < 1e-3


def test_preconditioners_of_three_kinds() -> None:
    X, decay = data()
    start = torch.zeros(12, dtype=F64)
    plain, products = count_products(NewtonCG(tol=1e-10), start, X, decay)

    def exact(w: Tensor, X: Tensor, decay: Tensor) -> Dense:
        H = hessian(w, X, decay)
        return Dense(torch.linalg.inv(H), tags={"positive_definite"})

    scale = Diagonal(1 / hessian(start, X, decay).diagonal())
    for M, most in ((exact, 0.4), (Nystrom(rank=12), 1.4), (scale, 0.8)):
        solver = NewtonCG(tol=1e-10, preconditioner=M)
        found, taken = count_products(solver, start, X, decay)
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-7)
        assert taken <= most * products  # 12 products are what Nystrom is made of


def test_negative_curvature_is_left_downhill() -> None:
    """A double well from beside its ridge: the Hessian there is negative."""
    f = lambda x: ((x**2 - 1) ** 2).sum()  # noqa: E731
    start = torch.tensor([0.1, -0.2, 0.3], dtype=F64)
    found = NewtonCG(tol=1e-10).run(f, start)
    torch.testing.assert_close(found.value, torch.sign(start), rtol=1e-8, atol=0)
    rows = NewtonCG(tol=1e-10, batched=True).run(
        lambda x: ((x**2 - 1) ** 2).sum(-1), torch.stack([start, 1.5 + start])
    )
    assert rows.row_status == (IterationStatus.converged,) * 2
    torch.testing.assert_close(rows.value[0], torch.sign(start), rtol=1e-8, atol=0)
    torch.testing.assert_close(rows.value[1], torch.ones(3, dtype=F64), rtol=1e-8, atol=0)


def test_no_curvature_at_all() -> None:
    found = NewtonCG(max_steps=5).run(lambda x: x.sum(), torch.zeros(2), throw=False)
    assert found.status is IterationStatus.max_steps
    torch.testing.assert_close(found.value, torch.full((2,), -5.0))


def test_implicit_derivative_with_the_preconditioner_of_the_forward_pass() -> None:
    X, decay = data()
    from woodbury.implicit import Implicit

    H = hessian(torch.zeros(12, dtype=F64), X, decay)
    M = Dense(torch.linalg.inv(H), tags={"positive_definite"})
    solver = NewtonCG(tol=1e-12, preconditioner=M).differentiable(
        entropy, mode=Implicit(CG(rtol=1e-12, preconditioner=M))
    )
    found = torch.func.jacrev(lambda d: solver(torch.zeros(12, dtype=F64), X, d))(decay)
    w = solver(torch.zeros(12, dtype=F64), X, decay)
    at = hessian(w, X, decay)
    torch.testing.assert_close(found, -torch.linalg.solve(at, torch.diag(w)), rtol=1e-7, atol=1e-7)


def entropy_gradient(w: Tensor, X: Tensor, decay: Tensor) -> Tensor:
    return (torch.sigmoid(w @ X.mT) - 0.3) @ X / len(X) + decay * w


@pytest.mark.parametrize("batched", [False, True])
def test_gradient_in_closed_form(batched: bool) -> None:
    X, decay = data()
    start = torch.zeros((3, 12) if batched else (12,), dtype=F64)
    start[..., 1] = 2.0
    given = NewtonCG(tol=1e-12, batched=batched, gradient=entropy_gradient)
    derived = NewtonCG(tol=1e-12, batched=batched)
    found, reference = given.run(entropy, start, X, decay), derived.run(entropy, start, X, decay)
    torch.testing.assert_close(found.value, reference.value, rtol=1e-9, atol=1e-10)
    assert (found.ok, found.steps) == (True, reference.steps)
    # The derivative goes through the gradient that is given.
    leaf = decay.clone().requires_grad_()
    given.differentiable(entropy)(start, X, leaf).sum().backward()
    at = reference.value[0] if batched else reference.value
    adjoint = torch.linalg.solve(hessian(at, X, decay), torch.ones(12, dtype=F64))
    wanted = -(3 if batched else 1) * adjoint * at
    torch.testing.assert_close(leaf.grad, wanted, rtol=1e-7, atol=1e-7)


def test_a_gradient_of_something_else_is_refused() -> None:
    X, decay = data()
    wrong = NewtonCG(gradient=lambda w, X, decay: 2 * entropy_gradient(w, X, decay))
    with pytest.raises(GradientError, match="differs from the gradient of the objective"):
        wrong.run(entropy, torch.ones(12, dtype=F64), X, decay)
    with pytest.raises(ArgumentError, match="not a function"):
        NewtonCG(gradient=1.0)
