"""Implicit Jacobians of each condition against closed forms, LAPACK and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from tests.implicit.derivatives import check_derivatives, dense_jacobian
from torch import Tensor

from woodbury.errors import ArgumentError, ShapeError, SingularError
from woodbury.implicit import (
    Cones,
    attach,
    block_proximal,
    conic_residual,
    kkt,
    mirror_descent,
    newton_residual,
    project_affine,
    project_box,
    project_simplex,
    projected_gradient,
    prox_group_lasso,
    prox_l1,
    prox_ridge,
    proximal_gradient,
    stationary,
)
from woodbury.solvers import GMRES, LU

# Torch itself scripts what forward mode needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is dep:DeprecationWarning")

DOUBLE = torch.float64
generator = torch.Generator().manual_seed(1)
X = torch.randn(12, 5, generator=generator, dtype=DOUBLE)
target = X @ torch.tensor([1.5, 0.0, -2.0, 0.0, 0.3], dtype=DOUBLE)
target = target + 0.1 * torch.randn(12, generator=generator, dtype=DOUBLE)
STEP = 1 / torch.linalg.matrix_norm(X, 2).item() ** 2


def squares(w: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (X @ w - y).square().sum()


def iterate(F: Callable[..., Any], x: Tensor, *args: Tensor, steps: int = 20000) -> Tensor:
    """The fixed point of ``x - F`` to rounding, however long it takes."""
    for _ in range(steps):
        new = x - F(x, *args)
        still = (new - x).abs().max() <= 1e-15
        x = new
        if still:
            break
    assert F(x, *args).abs().max() < 1e-13
    return x


def differences(solution: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """The Jacobian of a solver by central differences."""
    columns = []
    for e in torch.eye(at.numel(), dtype=DOUBLE):
        shift = step * e.reshape(at.shape)
        columns.append((solution(at + shift) - solution(at - shift)) / (2 * step))
    return torch.stack(columns, -1).reshape(-1, at.numel())


def attached(F: Callable[..., Any], x: Tensor, *args: Tensor, wrt: int = 0) -> Tensor:
    """The same Jacobian through ``attach`` of the library, by its solvers."""

    def solution(theta: Tensor) -> Tensor:
        given = [theta if i == wrt else a for i, a in enumerate(args)]
        return attach(F, x, *given, recipe=LU())

    return torch.autograd.functional.jacobian(solution, args[wrt])


# --- ridge and lasso -----------------------------------------------------------------------------


def test_ridge_by_stationarity() -> None:
    penalty = torch.tensor(0.7, dtype=DOUBLE)
    F = stationary(lambda w, c: squares(w, target) + 0.5 * c * w.square().sum())
    assert F.symmetric
    H = X.T @ X + 0.7 * torch.eye(5, dtype=DOUBLE)
    w = torch.linalg.solve(H, X.T @ target)
    assert F(w, penalty).abs().max() < 1e-13
    expected = -torch.linalg.solve(H, w)
    torch.testing.assert_close(dense_jacobian(F, w, penalty), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(attached(F, w, penalty), expected, rtol=0, atol=1e-12)


def lasso() -> tuple[Callable[..., Any], Tensor, Tensor]:
    F = proximal_gradient(squares, prox_l1, STEP)
    penalty = torch.tensor(2.0, dtype=DOUBLE)
    return F, iterate(F, torch.zeros(5, dtype=DOUBLE), target, penalty), penalty


@pytest.mark.parametrize("eta", [1.0, 0.1, 3.0])
def test_lasso_by_proximal_gradient_whatever_the_step(eta: float) -> None:
    _, w, penalty = lasso()
    S = w != 0
    assert 1 < S.sum() < 5
    gram = X[:, S].T @ X[:, S]
    expected = torch.zeros(5, dtype=DOUBLE)
    expected[S] = -torch.linalg.solve(gram, w[S].sign())
    along = torch.zeros(5, 12, dtype=DOUBLE)
    along[S] = torch.linalg.solve(gram, X[:, S].T)
    F = proximal_gradient(squares, prox_l1, eta * STEP)
    found = dense_jacobian(F, w, target, penalty, wrt=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(dense_jacobian(F, w, target, penalty), along, rtol=0, atol=1e-12)
    torch.testing.assert_close(attached(F, w, target, penalty, wrt=1), expected, rtol=0, atol=1e-11)


def test_lasso_one_penalty_per_weight_in_two_blocks() -> None:
    F, w, penalty = lasso()
    each = penalty.expand(5)
    one = dense_jacobian(F, w, target, each, wrt=1)
    blocks = block_proximal(
        lambda x, y: squares(torch.cat(x), y), (prox_l1, prox_l1), (STEP, 0.5 * STEP)
    )

    def joined(w: Tensor, y: Tensor, c: Tensor) -> Tensor:
        return torch.cat(blocks((w[:2], w[2:]), y, c[:2], c[2:]))

    assert joined(w, target, each).abs().max() < 1e-13
    two = dense_jacobian(joined, w, target, each, wrt=1)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-12)


def test_blocks_of_different_penalties_against_differences() -> None:
    blocks = block_proximal(
        lambda x, y: squares(torch.cat(x), y), (prox_group_lasso, prox_ridge), STEP
    )

    def joined(w: Tensor, y: Tensor, c: Tensor) -> Tensor:
        return torch.cat(blocks((w[:3], w[3:]), y, c[0], c[1]))

    c = torch.tensor([1.0, 0.5], dtype=DOUBLE)
    w = iterate(joined, torch.zeros(5, dtype=DOUBLE), target, c)
    expected = differences(lambda c: iterate(joined, w, target, c), c)
    found = dense_jacobian(joined, w, target, c, wrt=1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


# --- quadratic programs --------------------------------------------------------------------------

P = X.T @ X + torch.eye(5, dtype=DOUBLE)


def quadratic(z: Tensor, q: Tensor) -> Tensor:
    return 0.5 * z @ P @ z + q @ z


def test_quadratic_program_by_kkt_and_by_projected_gradient() -> None:
    # min over the simplex: two conditions for one solution, and so one Jacobian.
    q = torch.tensor([1.0, -8.0, 3.0, -9.0, -6.0], dtype=DOUBLE)
    step = 1 / torch.linalg.matrix_norm(P, 2).item()
    by_projection = projected_gradient(quadratic, project_simplex, step)
    z = iterate(by_projection, torch.full((5,), 0.2, dtype=DOUBLE), q)
    support = z > 0
    assert 1 < support.sum() < 5
    slope = P @ z + q
    nu = -slope[support].mean().reshape(1)
    lam = slope + nu  # slope + nu - lam = 0
    lam[support] = 0
    assert (lam[~support] > 0.01).all()
    by_kkt = kkt(
        quadratic,
        equality=lambda z, q: z.sum().reshape(1) - 1,
        inequality=lambda z, q: -z,
    )
    assert not by_kkt.symmetric

    def joined(x: Tensor, q: Tensor) -> Tensor:
        return torch.cat(by_kkt((x[:5], x[5:6], x[6:]), q))

    x = torch.cat([z, nu, lam])
    assert joined(x, q).abs().max() < 1e-12
    first = dense_jacobian(joined, x, q)[:5]
    second = dense_jacobian(by_projection, z, q)
    # In closed form on the support, with the constraint of the sum: minus the projected inverse.
    inverse = torch.linalg.inv(P[support][:, support])
    ones = inverse.sum(0, keepdim=True)
    closed = torch.zeros(5, 5, dtype=DOUBLE)
    closed[torch.outer(support, support)] = (ones.T @ ones / ones.sum() - inverse).flatten()
    torch.testing.assert_close(first, closed, rtol=0, atol=1e-12)
    torch.testing.assert_close(second, closed, rtol=0, atol=1e-12)
    torch.testing.assert_close(attached(by_projection, z, q), closed, rtol=0, atol=1e-11)
    solution = attach(by_kkt, (z, nu, lam), q.requires_grad_(), recipe=LU())
    (found,) = torch.autograd.grad(solution[0].sum() + solution[0][1], q)
    torch.testing.assert_close(found, closed.sum(0) + closed[1], rtol=0, atol=1e-11)


def test_equations_alone_have_a_symmetric_jacobian_and_agree_with_the_projection() -> None:
    A = torch.tensor([[1.0, 1.0, 0.0, 0.0, -1.0], [0.0, 2.0, 1.0, 0.0, 0.0]], dtype=DOUBLE)
    b, q = torch.tensor([1.0, -0.5], dtype=DOUBLE), torch.ones(5, dtype=DOUBLE)
    F = kkt(lambda z, b: quadratic(z, q), equality=lambda z, b: A @ z - b)
    assert F.symmetric
    K = torch.cat([torch.cat([P, A.T], 1), torch.cat([A, torch.zeros(2, 2, dtype=DOUBLE)], 1)])
    x = torch.linalg.solve(K, torch.cat([-q, b]))

    def joined(x: Tensor, b: Tensor) -> Tensor:
        return torch.cat(F((x[:5], x[5:]), b))

    J = torch.func.jacrev(joined)(x, b)
    torch.testing.assert_close(J, K, rtol=0, atol=1e-13)
    expected = torch.linalg.inv(K)[:5, 5:]
    torch.testing.assert_close(dense_jacobian(joined, x, b)[:5], expected, rtol=0, atol=1e-12)
    step = 1 / torch.linalg.matrix_norm(P, 2).item()
    G = projected_gradient(quadratic, lambda y, b: project_affine(y, A, b), step)
    assert G(x[:5], q, b).abs().max() < 1e-13
    found = dense_jacobian(G, x[:5], q, b, wrt=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_bounds_of_a_box_are_differentiated() -> None:
    q = torch.tensor([1.0, -8.0, 3.0, -9.0, -6.0], dtype=DOUBLE)
    low, high = torch.full((5,), -0.2, dtype=DOUBLE), torch.full((5,), 0.5, dtype=DOUBLE)
    F = projected_gradient(quadratic, project_box, 1 / torch.linalg.matrix_norm(P, 2).item())
    z = iterate(F, torch.zeros(5, dtype=DOUBLE), q, low, high)
    at_low, at_high = z == low, z == high
    assert at_low.any()
    assert at_high.any()
    free = ~(at_low | at_high)
    expected = torch.zeros(5, 5, dtype=DOUBLE)
    expected[at_high, at_high] = 1
    fill = -torch.linalg.solve(P[free][:, free], P[free][:, at_high])
    expected[free.nonzero(), at_high.nonzero().T] = fill
    found = dense_jacobian(F, z, q, low, high, wrt=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# --- support vector machine ----------------------------------------------------------------------

FEATURES = torch.randn(12, 40, generator=generator, dtype=DOUBLE)


def svm() -> tuple[Callable, Callable, Tensor, Tensor]:
    """The dual of a multiclass SVM: rows in the simplex; theta is the l2 strength."""
    rows = FEATURES
    labels = torch.nn.functional.one_hot(torch.arange(12) % 3, 3).double()

    def dual(x: Tensor, theta: Tensor) -> Tensor:
        W = rows.T @ (labels - x) / theta
        return 0.5 * theta * W.square().sum() + (x * labels).sum()

    step = 20 / torch.linalg.matrix_norm(rows, 2).item() ** 2
    projected = projected_gradient(dual, project_simplex, step)
    mirrored = mirror_descent(dual, step=step)
    theta = torch.tensor(20.0, dtype=DOUBLE)
    x = torch.full((12, 3), 1 / 3, dtype=DOUBLE)
    return projected, mirrored, iterate(projected, x, theta), theta


def test_svm_dual_by_projected_gradient_and_mirror_descent() -> None:
    projected, mirrored, x, theta = svm()
    assert mirrored(x, theta).abs().max() < 1e-12
    assert (x == 0).any()
    a = dense_jacobian(projected, x, theta)
    b = dense_jacobian(mirrored, x, theta)
    expected = differences(lambda t: iterate(projected, x, t.reshape(())), theta.reshape(1), 1e-6)
    torch.testing.assert_close(a.flatten(), expected.flatten(), rtol=0, atol=1e-7)
    torch.testing.assert_close(b, a, rtol=0, atol=1e-9)
    torch.testing.assert_close(attached(projected, x, theta), a, rtol=0, atol=1e-10)


def test_simplex_projection_as_a_problem() -> None:
    # The solution of min ||x - y||^2 over the simplex is the projection, and so is its Jacobian.
    y = torch.tensor([0.9, 0.5, 0.3, -1.0], dtype=DOUBLE)
    x = project_simplex(y)
    expected = torch.func.jacrev(project_simplex)(y)
    distance = lambda x, y: 0.5 * (x - y).square().sum()  # noqa: E731
    for F in (projected_gradient(distance, project_simplex, 0.7), mirror_descent(distance)):
        assert F(x, y).abs().max() < 1e-15
        torch.testing.assert_close(dense_jacobian(F, x, y), expected, rtol=0, atol=1e-14)


def test_mirror_descent_with_a_mirror_of_ones_own() -> None:
    # phi = ||x||^2 / 2 is projected gradient.
    projected, _, x, theta = svm()
    rows = FEATURES
    labels = torch.nn.functional.one_hot(torch.arange(12) % 3, 3).double()

    def dual(x: Tensor, theta: Tensor) -> Tensor:
        return 0.5 / theta * (rows.T @ (labels - x)).square().sum() + (x * labels).sum()

    step = 20 / torch.linalg.matrix_norm(rows, 2).item() ** 2
    F = mirror_descent(dual, mirror=lambda x: x, projection=project_simplex, step=step)
    point = x + 0.01
    torch.testing.assert_close(F(point, theta), projected(point, theta), rtol=0, atol=1e-14)
    # The entropy by logarithms, at a point inside, is the form without them.
    softmax = lambda y: torch.softmax(y, -1)  # noqa: E731
    inside = torch.softmax(X[:, :3], -1)
    G = mirror_descent(dual, mirror=torch.log, projection=softmax, step=step)
    own = mirror_descent(dual, step=step)
    torch.testing.assert_close(G(inside, theta), own(inside, theta), rtol=0, atol=1e-14)


# --- roots ---------------------------------------------------------------------------------------


def cubic(x: dict[str, Tensor], a: Tensor) -> dict[str, Tensor]:
    return {"u": x["u"] ** 3 + x["v"].sum() - a, "v": x["v"] - a[:1] * x["u"].sum()}


def test_newton_has_the_derivative_of_the_root_and_a_trivial_jacobian() -> None:
    a = torch.tensor([2.0, 3.0], dtype=DOUBLE)

    def flat(F: Callable) -> Callable[[Tensor, Tensor], Tensor]:
        def joined(x: Tensor, a: Tensor) -> Tensor:
            value = F({"u": x[:2], "v": x[2:]}, a)
            return torch.cat([value["u"], value["v"]])

        return joined

    G, F = flat(cubic), flat(newton_residual(cubic, 0.5))
    x = torch.ones(3, dtype=DOUBLE)
    for _ in range(60):
        x = x - 2 * F(x, a)
    assert G(x, a).abs().max() < 1e-13
    eye = 0.5 * torch.eye(3, dtype=DOUBLE)
    torch.testing.assert_close(torch.func.jacrev(F)(x, a), eye, rtol=0, atol=1e-12)
    expected = dense_jacobian(G, x, a)
    torch.testing.assert_close(dense_jacobian(F, x, a), expected, rtol=0, atol=1e-12)
    with pytest.raises(SingularError):
        newton_residual(lambda x, a: x * 0 + a)(x, a.sum())


# --- cone programs -------------------------------------------------------------------------------


def newton_cone(F: Callable, x: Tensor, *data: Tensor) -> Tensor:
    """The solution of a conic residual near a guess, by Newton's method with LAPACK."""
    for _ in range(30):
        x = x - torch.linalg.solve(torch.func.jacrev(F)(x, *data), F(x, *data))
    assert F(x, *data).abs().max() < 1e-12
    return x


def flat_conic(cones: Cones, p: int) -> Callable[..., Tensor]:
    F = conic_residual(cones)
    return lambda x, c, E, d: torch.cat(F((x[:p], x[p:]), c, E, d))


def test_linear_program_by_the_embedding() -> None:
    # min -z1 - 2 z2 in the triangle z >= 0, z1 + z2 <= b: z = (0, b).
    c = torch.tensor([-1.0, -2.0], dtype=DOUBLE)
    E = torch.tensor([[-1.0, 0.0], [0.0, -1.0], [1.0, 1.0]], dtype=DOUBLE)
    d = torch.tensor([0.0, 0.0, 1.5], dtype=DOUBLE)
    F = flat_conic(Cones(nonnegative=3), 2)
    x = torch.tensor([0.0, 1.5, 1.0, -1.5, 2.0], dtype=DOUBLE)  # v = y - s
    assert not F(x, c, E, d).any()
    J = dense_jacobian(F, x, c, E, d, wrt=2)[:2]
    expected = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 1.0]], dtype=DOUBLE)
    torch.testing.assert_close(J, expected, rtol=0, atol=1e-14)
    found = scipy.optimize.linprog(c.numpy(), E.numpy(), d.numpy(), bounds=(None, None))
    np.testing.assert_allclose(found.x, x[:2].numpy(), atol=1e-12)


def test_second_order_cone_program_in_closed_form() -> None:
    # min c'z with ||z - m|| <= r: z = m - r c / ||c||.
    c = torch.tensor([3.0, -4.0], dtype=DOUBLE)
    d = torch.tensor([2.0, 1.0, 0.5], dtype=DOUBLE)  # s = d - E z = (r, z - m)... with signs
    E = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=DOUBLE)
    F = flat_conic(Cones(second_order=(3,)), 2)

    def solution(c: Tensor, d: Tensor) -> Tensor:
        return d[1:] - d[0] * c / c.norm()

    z = solution(c, d)
    s = d - E @ z
    y = torch.cat([c.norm().reshape(1), -c])  # E'y + c = 0 on the boundary of the cone
    x = torch.cat([z, y - s])
    assert F(x, c, E, d).abs().max() < 1e-14
    for wrt, argument in ((0, c), (2, d)):
        found = dense_jacobian(F, x, c, E, d, wrt=wrt)[:2]
        other = (d,) if wrt == 0 else (c,)
        closed = torch.func.jacrev(
            lambda t, o=other, w=wrt: solution(t, *o) if w == 0 else solution(*o, t)
        )
        torch.testing.assert_close(found, closed(argument), rtol=0, atol=1e-12)


def lower(M: Tensor) -> Tensor:
    """The scaled lower triangle column by column, written out without the library."""
    k = M.shape[-1]
    rows = [M[j, i] * (1 if i == j else 2**0.5) for i in range(k) for j in range(i, k)]
    return torch.stack(rows)


def test_semidefinite_program_is_the_smallest_eigenvalue() -> None:
    # max t with M - t I >= 0: t is the smallest eigenvalue of M, dt/dM = u u'.
    R = torch.randn(3, 3, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)
    M = (R + R.T) / 2
    values, U = torch.linalg.eigh(M)
    u = U[:, 0]
    c = torch.tensor([-1.0], dtype=DOUBLE)
    E = lower(torch.eye(3, dtype=DOUBLE)).unsqueeze(1)
    F = flat_conic(Cones(semidefinite=(3,)), 1)
    s, y = M - values[0] * torch.eye(3, dtype=DOUBLE), torch.outer(u, u)
    x = torch.cat([values[:1], lower(y) - lower(s)])
    assert F(x, c, E, lower(M)).abs().max() < 1e-14
    J = dense_jacobian(F, x, c, E, lower(M), wrt=2)
    torch.testing.assert_close(J[0], lower(y), rtol=0, atol=1e-12)
    start = x + 0.01 * torch.randn(7, generator=generator, dtype=DOUBLE)
    torch.testing.assert_close(newton_cone(F, start, c, E, lower(M)), x, rtol=0, atol=1e-10)
    solution = differences(lambda m: newton_cone(F, x, c, E, m), lower(M))
    torch.testing.assert_close(J, solution, rtol=0, atol=1e-7)


def test_all_cones_together_against_differences_of_the_solution() -> None:
    # min ||(z1, z2)|| + z3 with z1 + z2 = 1, z3 >= 0.5 + z1, and a 2x2 matrix [z3, z1; z1, z4] >= 0
    cones = Cones(zero=1, nonnegative=1, second_order=(3,), semidefinite=(2,))
    assert cones.rows == 8
    root = 2**0.5
    E = torch.zeros(8, 5, dtype=DOUBLE)  # variables z1 z2 z3 z4 t
    E[0, :2] = 1
    E[1, 0], E[1, 2] = 1, -1
    E[2, 4] = E[3, 0] = E[4, 1] = -1
    E[5, 2], E[6, 0], E[7, 3] = -1, -root, -1
    d = torch.tensor([1.0, -0.5, 0, 0, 0, 0, 0, 0], dtype=DOUBLE)
    c = torch.tensor([0.1, 0.0, 1.0, 1.0, 1.0], dtype=DOUBLE)
    F = flat_conic(cones, 5)

    def objective(z: np.ndarray) -> float:
        # What is left when t = ||(z1, z2)||, z2 = 1 - z1 and z4 = z1^2 / z3 are put in.
        z1, z3 = z
        return 0.1 * z1 + z3 + z1 * z1 / z3 + np.hypot(z1, 1 - z1)

    best = scipy.optimize.minimize(
        objective,
        [0.2, 0.9],
        bounds=[(None, None), (1e-3, None)],
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda z: z[1] - 0.5 - z[0]},
        options={"ftol": 1e-15},
    )
    z1, z3 = best.x
    z = torch.tensor([z1, 1 - z1, z3, z1 * z1 / z3, np.hypot(z1, 1 - z1)], dtype=DOUBLE)
    s = d - E @ z
    # The multipliers by least squares on the faces of the cones that s lies in.
    t, dual2 = s[2:5], torch.cat([s[2:3], -s[3:5]])
    S = torch.tensor([[s[5], s[6] / root], [s[6] / root, s[7]]], dtype=DOUBLE)
    kernel = torch.linalg.eigh(S).eigenvectors[:, 0]
    faces = torch.zeros(8, 4, dtype=DOUBLE)
    faces[0, 0] = 1
    faces[1, 1] = 1 if s[1] < 1e-6 else 0
    faces[2:5, 2] = dual2
    faces[5:, 3] = lower(torch.outer(kernel, kernel))
    y = faces @ torch.linalg.lstsq(E.T @ faces, -c, driver="gelsd").solution
    assert t[0] > 0
    x = newton_cone(F, torch.cat([z, y - s]), c, E, d)
    torch.testing.assert_close(x[:5], z, rtol=0, atol=1e-5)
    for wrt, data in ((0, c), (2, d)):
        found = dense_jacobian(F, x, c, E, d, wrt=wrt)

        def moved(t: Tensor, wrt: int = wrt) -> Tensor:
            return newton_cone(F, x, *((t, E, d) if wrt == 0 else (c, E, t)))

        torch.testing.assert_close(found, differences(moved, data), rtol=1e-6, atol=1e-6)


def test_homogeneous_embedding_is_homogeneous_and_agrees() -> None:
    c = torch.tensor([3.0, -4.0], dtype=DOUBLE)
    d = torch.tensor([2.0, 1.0, 0.5], dtype=DOUBLE)
    E = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=DOUBLE)
    F = conic_residual(Cones(second_order=(3,)), homogeneous=True)
    z = d[1:] - d[0] * c / c.norm()
    v = torch.cat([c.norm().reshape(1), -c]) - (d - E @ z)
    x = torch.cat([z, v, torch.ones(1, dtype=DOUBLE)])

    def joined(x: Tensor) -> Tensor:
        return torch.cat(F((x[:2], x[2:5], x[5:]), c, E, d))

    assert joined(x).abs().max() < 1e-14
    point = x + 0.1 * torch.randn(6, generator=generator, dtype=DOUBLE)
    torch.testing.assert_close(joined(3 * point), 3 * joined(point), rtol=0, atol=1e-13)
    # Euler: J x = F(x) = 0 at the solution: the Jacobian is singular along x.
    assert (torch.func.jacrev(joined)(x) @ x).abs().max() < 1e-13
    # F = ((Q - I) Pi + I) x with the skew matrix written out.
    Q = torch.zeros(6, 6, dtype=DOUBLE)
    Q[:2, 2:5], Q[:2, 5], Q[2:5, 5] = E.T, c, d
    Q = Q - Q.T
    y = Cones(second_order=(3,)).project_dual(point[2:5])
    projected = torch.cat([point[:2], y, point[5:].clamp_min(0)])
    expected = (Q - torch.eye(6, dtype=DOUBLE)) @ projected + point
    torch.testing.assert_close(joined(point), expected, rtol=0, atol=1e-13)


def test_cones_by_moreau() -> None:
    cones = Cones(zero=2, nonnegative=2, second_order=(3, 2), semidefinite=(1, 3))
    y = torch.randn(20, cones.rows, generator=generator, dtype=DOUBLE)
    up, down = cones.project(y), cones.project_dual(-y)
    torch.testing.assert_close(up - down, y, rtol=0, atol=1e-13)
    assert (up * down).sum(-1).abs().max() < 1e-12
    assert not up[:, :2].any()


# --- derivatives of the conditions themselves -----------------------------------------------------


def smooth(x: Tensor, theta: Tensor) -> Tensor:
    return (x.exp() * theta).sum() + 0.25 * x.square().sum() ** 2


def blocks(x: Tensor, theta: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    F = block_proximal(lambda x, t: smooth(torch.cat(x), t), (prox_l1, prox_group_lasso), 0.3)
    return F((x[:2], x[2:]), theta, c, c.sum())


def constrained(x: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
    F = kkt(smooth, lambda z, t: (z**3).sum() - t[0], lambda z, t: z[:2] ** 2 * t[:2] - 1)
    return F((x[:4], x[4], x[5:]), theta)


def conic(x: Tensor, c: Tensor, E: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    cones = Cones(zero=1, nonnegative=1, second_order=(3,), semidefinite=(2,))
    return conic_residual(cones)((x[:2], x[2:]), c, E, d)


def values(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape) + 7)
    return torch.randn(*shape, generator=draw, dtype=DOUBLE)


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize(
    ("F", "arguments"),
    [
        (stationary(smooth), (values(4), values(4))),
        (constrained, (values(7), values(4))),
        (projected_gradient(smooth, project_simplex, 0.3), (values(4), values(4))),
        (
            proximal_gradient(smooth, prox_l1, 0.3),
            (values(4), values(4), torch.tensor(0.5, dtype=DOUBLE)),
        ),
        (blocks, (values(4), values(4), torch.tensor([0.3, 0.4], dtype=DOUBLE))),
        (mirror_descent(smooth, step=0.3), (values(4).softmax(0), values(4))),
        (
            newton_residual(lambda x, t: x**3 + 3 * x + t * x.sum(), 0.5),
            (values(3), values(3).abs()),
        ),
        (conic, (values(10), values(2), values(8, 2), values(8))),
    ],
    ids=["stationary", "kkt", "projected", "proximal", "blocks", "mirror", "newton", "conic"],
)
def test_derivatives_of_every_kind(F: Callable[..., Any], arguments: tuple[Tensor, ...]) -> None:
    # Solves know the vmap of torch.func, not the older one that gradcheck uses.
    solves = F.__name__ == "newton_residual"
    check_derivatives(F, *arguments, batched=not solves)
    jacobians = [
        mode(lambda x: torch.cat([t.reshape(-1) for t in _tuple(F(x, *arguments[1:]))]))
        for mode in (torch.func.jacrev, torch.func.jacfwd)
    ]
    batch = torch.stack([arguments[0], 0.9 * arguments[0]])
    reverse, forward = (torch.func.vmap(jacobian)(batch) for jacobian in jacobians)
    torch.testing.assert_close(reverse, forward, rtol=0, atol=1e-12)


def test_second_derivative_of_a_solution() -> None:
    # d2w/dc2 of ridge is 2 H^-2 w, through a condition and the library's solves.
    c = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    H = X.T @ X + 0.7 * torch.eye(5, dtype=DOUBLE)
    w = torch.linalg.solve(H, X.T @ target)
    F = stationary(lambda w, c: squares(w, target) + 0.5 * c * w.square().sum())
    solution = attach(F, w, c, recipe=LU())
    (first,) = torch.autograd.grad(solution[1], c, create_graph=True)
    (second,) = torch.autograd.grad(first, c)
    expected = 2 * torch.linalg.solve(H, torch.linalg.solve(H, w))
    torch.testing.assert_close(second, expected[1], rtol=1e-9, atol=0)


def test_conditions_work_with_krylov_solvers() -> None:
    F, w, penalty = lasso()
    penalty = penalty.requires_grad_()
    found = attach(F, w, target, penalty, recipe=GMRES(rtol=1e-12))
    (slope,) = torch.autograd.grad(found.sum(), penalty)
    expected = dense_jacobian(F, w, target, penalty.detach(), wrt=1).sum()
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-9)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_refused() -> None:
    for make in (stationary, kkt, newton_residual, mirror_descent):
        with pytest.raises(ArgumentError):
            make(None)
    with pytest.raises(ArgumentError, match="projection is"):
        projected_gradient(smooth, 3)
    with pytest.raises(ArgumentError, match="step is -1"):
        projected_gradient(smooth, project_simplex, -1.0)
    with pytest.raises(ArgumentError, match="step is nan"):
        proximal_gradient(smooth, prox_l1, float("nan"))
    with pytest.raises(ArgumentError, match="both or neither"):
        mirror_descent(smooth, mirror=torch.log)
    with pytest.raises(ArgumentError, match="no constraint"):
        kkt(smooth)
    with pytest.raises(ArgumentError, match="2 proxes and 1 steps"):
        block_proximal(smooth, (prox_l1, prox_l1), (1.0,))
    x = values(4)
    with pytest.raises(ArgumentError, match=r"tuple \(z, nu\)"):
        kkt(smooth, lambda z, t: z.sum())(x, x)
    with pytest.raises(ShapeError, match="multipliers"):
        kkt(smooth, lambda z, t: z.sum())((x, values(2)), x)
    with pytest.raises(ArgumentError, match="2 blocks"):
        block_proximal(smooth, (prox_l1, prox_l1))((x,), x)
    with pytest.raises(ArgumentError, match="1 parameters for 2"):
        block_proximal(smooth, (prox_l1, prox_l1))((x, x), x, x)
    with pytest.raises(ShapeError, match="entries and x has"):
        newton_residual(lambda x: x[:2])(x)
    with pytest.raises(ArgumentError, match="must be >= 2"):
        Cones(second_order=(1,))
    with pytest.raises(ArgumentError, match="must be >= 0"):
        Cones(zero=-1)
    with pytest.raises(ArgumentError, match="give Cones"):
        conic_residual(3)
    with pytest.raises(ShapeError, match="3 rows of cones"):
        conic_residual(Cones(zero=3))((x, x[:3]), x, values(2, 4), x)
    with pytest.raises(ShapeError, match="cones have 3 rows"):
        Cones(zero=3).project(x)
