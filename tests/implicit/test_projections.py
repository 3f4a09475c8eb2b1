"""Projections against the variational inequality, other algorithms, and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import scipy.optimize
import torch
from tests.implicit.derivatives import check_derivatives
from torch import Tensor

from woodbury.errors import (
    ArgumentError,
    DtypeError,
    GradientError,
    NonFiniteError,
    ShapeError,
)
from woodbury.implicit import (
    project_affine,
    project_birkhoff,
    project_box,
    project_halfspace,
    project_l1_ball,
    project_l2_ball,
    project_linf_ball,
    project_second_order_cone,
    project_semidefinite,
    project_simplex,
    project_transport,
)

# Torch itself scripts what forward mode needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is dep:DeprecationWarning")

DOUBLE = torch.float64
NORMAL = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=DOUBLE)
EQUATIONS = torch.tensor([[1.0, 2.0, -1.0, 0.5], [0.0, 1.0, 1.0, -3.0]], dtype=DOUBLE)
RIGHT = torch.tensor([1.0, -2.0], dtype=DOUBLE)
ROWS, COLUMNS = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.5, 1.0, 0.75, 1.25])


def like(values: Tensor, y: Tensor) -> Tensor:
    return values.to(y.dtype)


# name: the projection, the shape of one point, and points of the set for the inequality
VECTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "simplex": lambda y: project_simplex(y, 1.5),
    "l1": lambda y: project_l1_ball(y, 1.5),
    "l2": lambda y: project_l2_ball(y, 1.5),
    "linf": lambda y: project_linf_ball(y, 0.7),
    "box": lambda y: project_box(y, -0.5, 1.0),
    "halfspace": lambda y: project_halfspace(y, like(NORMAL, y), -1.0),
    "affine": lambda y: project_affine(y, like(EQUATIONS, y), like(RIGHT, y)),
    "second_order_cone": project_second_order_cone,
}
MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "semidefinite": project_semidefinite,
    "transport": lambda Y: project_transport(Y, like(ROWS, Y), like(COLUMNS, Y)),
    "birkhoff": project_birkhoff,
}
SHAPES = dict.fromkeys(VECTORS, (4,)) | {
    "semidefinite": (4, 4),
    "transport": (3, 4),
    "birkhoff": (4, 4),
}
ALL = VECTORS | MATRICES


def draw(name: str, *batch: int, scale: float = 2.0, dtype: torch.dtype = DOUBLE) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return scale * torch.randn(*batch, *SHAPES[name], generator=generator, dtype=dtype)


def flat(name: str, x: Tensor) -> Tensor:
    return x.flatten(-len(SHAPES[name]))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_variational_inequality(name: str, dtype: torch.dtype) -> None:
    # x = P(y) in C is the projection if and only if <y - x, z - x> <= 0 for all z in C; the z are
    # themselves projections, of which membership is tested below.
    y = draw(name, 40, dtype=dtype)
    x = ALL[name](y)
    assert x.dtype == dtype
    assert x.shape == y.shape
    z = ALL[name](3 * draw(name, 60, dtype=dtype).flip(0))
    outward = flat(name, y - x)
    inner = outward @ flat(name, z).T - (outward * flat(name, x)).sum(-1, keepdim=True)
    assert inner.max() <= 20 * torch.finfo(dtype).eps * flat(name, y).square().sum(-1).max()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_projections_are_in_the_set_and_stay(name: str, dtype: torch.dtype) -> None:
    x = ALL[name](draw(name, 50, scale=5.0, dtype=dtype))
    eps = 50 * torch.finfo(dtype).eps
    violated = {
        "simplex": lambda: (x.sum(-1) - 1.5).abs().max() + (-x).clamp_min(0).max(),
        "l1": lambda: (x.abs().sum(-1) - 1.5).max(),
        "l2": lambda: (x.norm(dim=-1) - 1.5).max(),
        "linf": lambda: (x.abs() - 0.7).max(),
        "box": lambda: torch.maximum(-0.5 - x, x - 1).max(),
        "halfspace": lambda: (x @ NORMAL.to(dtype) + 1).max(),
        "affine": lambda: (x @ EQUATIONS.T.to(dtype) - RIGHT.to(dtype)).abs().max(),
        "second_order_cone": lambda: (x[:, 1:].norm(dim=-1) - x[:, 0]).max(),
        "semidefinite": lambda: (x - x.mT).abs().max() - torch.linalg.eigvalsh(x).min(),
        "transport": lambda: (
            (x.sum(-1) - ROWS).abs().max()
            + (x.sum(-2) - COLUMNS).abs().max()
            + (-x).clamp_min(0).max()
        ),
        "birkhoff": lambda: (
            (x.sum(-1) - 1).abs().max() + (x.sum(-2) - 1).abs().max() + (-x).clamp_min(0).max()
        ),
    }[name]()
    assert violated <= 10 * eps
    torch.testing.assert_close(ALL[name](x), x, rtol=0, atol=20 * eps)


@pytest.mark.parametrize("name", ALL)
def test_derivatives_of_every_kind(name: str) -> None:
    check_derivatives(ALL[name], draw(name, 2))
    check_derivatives(ALL[name], 0.2 * draw(name))


@pytest.mark.parametrize("name", ALL)
def test_transforms_compose(name: str) -> None:
    function, y = ALL[name], draw(name, 3)
    torch.testing.assert_close(torch.func.vmap(function)(y), function(y), rtol=0, atol=1e-14)
    reverse = torch.func.vmap(torch.func.jacrev(function))(y)
    forward = torch.func.vmap(torch.func.jacfwd(function))(y)
    torch.testing.assert_close(reverse, forward, rtol=0, atol=1e-13)
    one = y[0]
    cubic = lambda z: function(z).pow(3).sum()  # noqa: E731
    hessian = torch.func.hessian(cubic)(one)
    other = torch.func.jacrev(torch.func.jacrev(cubic))(one)
    torch.testing.assert_close(hessian, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("affine", "halfspace")])
def test_jacobian_is_symmetric_with_eigenvalues_in_the_unit_interval(name: str) -> None:
    # Of every projection onto a convex set, at every point where it is differentiable.
    y = draw(name)
    J = torch.func.jacrev(ALL[name])(y).reshape(y.numel(), y.numel())
    torch.testing.assert_close(J, J.T, rtol=0, atol=1e-13)
    values = torch.linalg.eigvalsh(J)
    assert values.min() > -1e-13
    assert values.max() < 1 + 1e-13


def test_parameters_of_the_sets_are_differentiated() -> None:
    y = draw("simplex", 3)
    radius = torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)
    for project in (project_simplex, project_l1_ball, project_l2_ball, project_linf_ball):
        check_derivatives(project, y, radius)
    check_derivatives(project_box, y, -torch.full((4,), 0.5, dtype=DOUBLE), NORMAL.abs())
    check_derivatives(project_halfspace, y, NORMAL, torch.zeros((), dtype=DOUBLE))
    check_derivatives(project_affine, y, EQUATIONS, RIGHT)


def test_transport_marginals_are_differentiated_along_equal_totals() -> None:
    # Sums of which no part of the rows equals a part of the columns: no vertex is degenerate.
    a = torch.tensor([1.03, 1.9, 0.57], dtype=DOUBLE)
    Y, b = draw("transport"), COLUMNS.double()

    def moved(Y: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return project_transport(Y, a + s - s.mean(), b + t - t.mean())

    check_derivatives(moved, Y, torch.zeros(3, dtype=DOUBLE), torch.zeros(4, dtype=DOUBLE))


def test_simplex_jacobian_in_closed_form() -> None:
    y = torch.tensor([0.9, 0.5, 0.3, -1.0], dtype=DOUBLE)
    s = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=DOUBLE)
    J = torch.func.jacrev(project_simplex)(y)
    torch.testing.assert_close(J, torch.diag(s) - torch.outer(s, s) / 3, rtol=0, atol=1e-16)
    radius = torch.ones((), dtype=DOUBLE)
    along = torch.func.jacrev(project_simplex, argnums=1)(y, radius)
    torch.testing.assert_close(along, s / 3, rtol=0, atol=1e-16)


def test_simplex_against_fifty_digits() -> None:
    y = draw("simplex", 20, scale=1.0).repeat(1, 3) + 1e6  # a shift must cost no digits
    x = project_simplex(y)
    with mpmath.workdps(50):
        for row, got in zip(y.tolist(), x.tolist(), strict=True):
            values = sorted((mpmath.mpf(v) for v in row), reverse=True)
            sums, threshold = mpmath.mpf(0), None
            for k, value in enumerate(values, 1):
                sums += value
                if value > (sums - 1) / k:
                    threshold = (sums - 1) / k
            exact = [max(mpmath.mpf(v) - threshold, 0) for v in row]
            error = max(abs(e - g) for e, g in zip(exact, got, strict=True))
            assert error < 2.3e-10  # one unit in the last place of a number of size 1e6


@pytest.mark.parametrize("name", ["transport", "birkhoff"])
def test_polytopes_against_a_general_solver(name: str) -> None:
    Y = draw(name)
    m, n = Y.shape
    a, b = (np.ones(m), np.ones(n)) if name == "birkhoff" else (ROWS.numpy(), COLUMNS.numpy())
    sums = np.vstack([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])
    found = scipy.optimize.minimize(
        lambda x: 0.5 * ((x - Y.numpy().ravel()) ** 2).sum(),
        np.outer(a, b).ravel() / a.sum(),
        jac=lambda x: x - Y.numpy().ravel(),
        bounds=[(0, None)] * (m * n),
        constraints=[{"type": "eq", "fun": lambda x: sums[:-1] @ x - np.concatenate([a, b])[:-1]}],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    got = ALL[name](Y).numpy().ravel()
    np.testing.assert_allclose(got, found.x, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e6])
def test_transport_of_many_sizes_ends_at_the_sums(scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    for m, n in ((1, 1), (1, 7), (7, 1), (12, 30), (40, 40)):
        Y = scale * torch.randn(2, m, n, generator=generator, dtype=DOUBLE)
        a = torch.rand(2, m, generator=generator, dtype=DOUBLE)
        b = torch.rand(2, n, generator=generator, dtype=DOUBLE)
        a[:, 0] *= 0 if m > 1 else 1  # an empty row
        b *= a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True)
        X = project_transport(Y, a, b)
        assert X.min() >= 0
        assert (X.sum(-1) - a).abs().max() < 1e-13 * (m + n) * max(1, scale)
        assert (X.sum(-2) - b).abs().max() < 1e-13 * (m + n) * max(1, scale)
        # On the support Y - X is a sum of potentials: its second differences are zero.
        if m == 40 and scale <= 1:
            D = (Y - X)[0]
            rows, columns = torch.nonzero(X[0] > 0, as_tuple=True)
            incidence = torch.zeros(len(rows), m + n, dtype=DOUBLE)
            incidence[torch.arange(len(rows)), rows] = 1
            incidence[torch.arange(len(rows)), m + columns] = 1
            wanted = D[rows, columns].unsqueeze(-1)
            fit = incidence @ torch.linalg.pinv(incidence) @ wanted
            torch.testing.assert_close(fit, wanted, rtol=0, atol=1e-12)


def test_doubly_stochastic_matrices_stay_and_permutations_are_vertices() -> None:
    P = torch.eye(5, dtype=DOUBLE)[torch.tensor([2, 0, 4, 1, 3])]
    torch.testing.assert_close(project_birkhoff(10 * P), P, rtol=0, atol=1e-13)
    torch.testing.assert_close(project_birkhoff(P), P, rtol=0, atol=1e-13)


def test_cones_by_moreau() -> None:
    # y = P_K(y) - P_K*(-y), orthogonal; both cones are self-dual.
    for name in ("second_order_cone", "semidefinite"):
        y = draw(name, 30)
        y = (y + y.mT) / 2 if name == "semidefinite" else y
        up, down = ALL[name](y), ALL[name](-y)
        torch.testing.assert_close(up - down, y, rtol=0, atol=1e-13)
        assert (flat(name, up) * flat(name, down)).sum(-1).abs().max() < 1e-12


def test_semidefinite_where_eigenvalues_meet() -> None:
    # The eigendecomposition has no derivative there, the projection has.
    Y = torch.diag(torch.tensor([2.0, 2.0, -1.0, -1.0], dtype=DOUBLE))
    Q = torch.linalg.qr(draw("semidefinite")).Q
    check_derivatives(project_semidefinite, Q @ Y @ Q.T)
    check_derivatives(project_semidefinite, torch.eye(3, dtype=DOUBLE))
    check_derivatives(project_semidefinite, -torch.eye(3, dtype=DOUBLE))


def test_semidefinite_refuses_a_third_derivative() -> None:
    f = torch.func.grad(lambda Y: project_semidefinite(Y).pow(2).sum())
    second = torch.func.jacrev(torch.func.jacrev(f))
    with pytest.raises(GradientError, match="third derivative"):
        second(torch.diag(torch.tensor([1.0, -1.0], dtype=DOUBLE)))


def test_kinks_take_the_element_that_is_said() -> None:
    jacobian = torch.func.jacrev
    eye = torch.eye(2, dtype=DOUBLE)
    half = torch.tensor([1.0, 0.0], dtype=DOUBLE)  # the second entry is about to enter
    # Of the two limits of Jacobians there, zero (entry outside) and diag(1) - 11'/2 (inside):
    J = jacobian(project_simplex)(half)
    torch.testing.assert_close(J, torch.zeros(2, 2, dtype=DOUBLE))
    on_sphere = torch.tensor([0.6, 0.8], dtype=DOUBLE)
    torch.testing.assert_close(jacobian(project_l2_ball)(on_sphere), eye)
    torch.testing.assert_close(jacobian(project_l1_ball)(half), eye)
    torch.testing.assert_close(jacobian(lambda y: project_box(y, 0.0, 1.0))(half), eye)
    apex = torch.zeros(2, dtype=DOUBLE)
    torch.testing.assert_close(jacobian(project_second_order_cone)(apex), eye)
    zero = torch.zeros(2, 2, dtype=DOUBLE)
    assert not jacobian(project_semidefinite)(zero).any()
    plane = lambda y: project_halfspace(y, half, 1.0)  # noqa: E731
    torch.testing.assert_close(jacobian(plane)(half), eye)


def test_radius_zero_and_points_at_infinity_of_a_bound() -> None:
    y = draw("simplex", 3)
    for project in (project_simplex, project_l1_ball, project_l2_ball, project_linf_ball):
        assert not project(y, 0.0).any()
        assert torch.isfinite(torch.func.jacrev(lambda z, p=project: p(z, 0.0))(y)).all()
    torch.testing.assert_close(project_box(y, -torch.inf, torch.inf), y, rtol=0, atol=0)
    assert not project_l2_ball(torch.zeros(3), 0.0).any()


def test_halfspace_with_tiny_and_zero_normals() -> None:
    y = torch.tensor([3.0, 1.0], dtype=DOUBLE)
    tiny = torch.tensor([1e-200, 0.0], dtype=DOUBLE)
    torch.testing.assert_close(
        project_halfspace(y, tiny, 1e-200), torch.tensor([1.0, 1.0], dtype=DOUBLE)
    )
    zero = torch.zeros(2, dtype=DOUBLE)
    torch.testing.assert_close(project_halfspace(y, zero, 0.0), y)
    with pytest.raises(ArgumentError, match="no point"):
        project_halfspace(y, zero, -1.0)


def test_affine_with_redundant_and_contradicting_equations() -> None:
    A = torch.cat([EQUATIONS, EQUATIONS.sum(0, keepdim=True)])
    b = torch.cat([RIGHT, RIGHT.sum(0, keepdim=True)])
    y = draw("affine", 5)
    expected = project_affine(y, EQUATIONS, RIGHT)
    torch.testing.assert_close(project_affine(y, A, b), expected, rtol=0, atol=1e-13)
    b = b + torch.tensor([0.0, 0.0, 1e-6], dtype=DOUBLE)
    with pytest.raises(ArgumentError, match="contradict"):
        project_affine(y, A, b)
    with pytest.raises(ArgumentError, match="contradict"):
        torch.func.vmap(lambda z: project_affine(z, A, b))(y)


@pytest.mark.parametrize("project", [project_simplex, project_l1_ball, project_l2_ball])
def test_balls_refuse_negative_radii_inside_transforms_too(project: Callable) -> None:
    y = draw("simplex", 3)
    radius = torch.tensor([1.0, -2.0, 1.0], dtype=DOUBLE)
    with pytest.raises(ArgumentError, match=r"radius is -2\.0"):
        project(y, radius)
    with pytest.raises(ArgumentError, match=r"radius is -2\.0"):
        torch.func.vmap(project)(y, radius)
    with pytest.raises(ArgumentError, match=r"radius is -2\.0"):
        torch.func.vmap(torch.func.grad(lambda z, r: project(z, r).sum()))(y, radius)


def test_bad_input_is_refused_before_work() -> None:
    y = draw("simplex", 3)
    with pytest.raises(ArgumentError, match="the box is empty"):
        project_box(y, 1.0, -1.0)
    with pytest.raises(ArgumentError, match="the box is empty"):
        project_box(y, float("nan"), 1.0)
    with pytest.raises(DtypeError, match=r"int64"):
        project_simplex(torch.arange(3))
    with pytest.raises(DtypeError, match="complex"):
        project_semidefinite(torch.eye(2, dtype=torch.complex64))
    with pytest.raises(DtypeError, match=r"radius is torch\.float32"):
        project_simplex(y, torch.ones(()))
    with pytest.raises(ShapeError, match="does not broadcast"):
        project_simplex(y, torch.ones(5, dtype=DOUBLE))
    with pytest.raises(ShapeError, match="not empty"):
        project_simplex(torch.zeros(2, 0))
    with pytest.raises(ShapeError, match="square"):
        project_semidefinite(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="square"):
        project_birkhoff(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="at least 2"):
        project_second_order_cone(torch.zeros(1))
    with pytest.raises(ShapeError, match="columns"):
        project_affine(y, EQUATIONS[:, :3], RIGHT)
    Y = draw("transport")
    with pytest.raises(ArgumentError, match="no matrix has both"):
        project_transport(Y, ROWS.double(), 2 * COLUMNS.double())
    with pytest.raises(ArgumentError, match="row sum is -1"):
        project_transport(Y, -ROWS.double(), COLUMNS.double())
    Y[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        project_transport(Y, ROWS.double(), COLUMNS.double())


def test_nan_is_not_hidden() -> None:
    y = torch.tensor([1.0, torch.nan, 2.0])
    for project in (project_simplex, project_l1_ball, project_l2_ball, project_linf_ball):
        assert torch.isnan(project(y)).any()
    assert torch.isnan(project_second_order_cone(y)).any()
    assert torch.isnan(project_box(y, 0.0, 1.0)).any()
