"""Smoothed linear programs: HiGHS as the smoothing vanishes, differences while it does not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from tests.implicit.derivatives import check_derivatives
from torch import Tensor

from woodbury.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
from woodbury.implicit import QuadraticProgramStatus, linear_program

# Torch itself scripts what forward mode needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is dep:DeprecationWarning")

DOUBLE = torch.float64
KINDS = ["barrier", "quadratic"]


def draw(count: int, n: int, p: int, m: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Feasible and bounded: random constraints within a box."""
    generator = torch.Generator().manual_seed(seed + n + m)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    inside, A, G = randn(count, n, 1), randn(count, p, n), randn(count, m, n)
    h = (G @ inside).squeeze(-1) + 0.5 + torch.rand(count, m, generator=generator, dtype=DOUBLE)
    eye = torch.eye(n, dtype=DOUBLE).expand(count, n, n)
    box = torch.full((count, n), 4.0, dtype=DOUBLE)
    G, h = torch.cat([G, eye, -eye], 1), torch.cat([h, box, box], 1)
    return randn(count, n), A, (A @ inside).squeeze(-1), G, h


def highs(c: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> scipy.optimize.OptimizeResult:
    arrays = (t.numpy() for t in (c, G, h, A, b))
    return scipy.optimize.linprog(*arrays, bounds=(None, None), method="highs-ds")


@pytest.mark.parametrize("kind", KINDS)
def test_highs_is_the_limit(kind: str) -> None:
    problem = draw(4, 5, 2, 6)
    for mu in (1e-2, 1e-4, 1e-6):
        found = linear_program(*problem, smoothing=mu, kind=kind)
        assert found.status is QuadraticProgramStatus.optimal
        for i in range(4):
            exact = highs(*(t[i] for t in problem))
            above = (problem[0][i] @ found.value[i]).item() - exact.fun
            bound = 16 * mu if kind == "barrier" else 0.5 * mu * float(exact.x @ exact.x)
            assert -1e-8 <= above <= bound + 1e-8
            if mu < 1e-5:
                np.testing.assert_allclose(found.value[i].numpy(), exact.x, atol=1e-3)


def test_the_point_is_on_the_central_path_with_its_duality_gap() -> None:
    c, A, b, G, h = draw(3, 5, 2, 6)
    for mu in (1.0, 1e-3):
        found = linear_program(c, A, b, G, h, smoothing=mu)
        z, nu, lam = found.value, found.equality, found.inequality
        slack = h - (G @ z[..., None]).squeeze(-1)
        assert slack.min() > 0
        torch.testing.assert_close(slack * lam, torch.full_like(lam, mu), rtol=1e-6, atol=0)
        slope = c + (A.mT @ nu[..., None] + G.mT @ lam[..., None]).squeeze(-1)
        assert slope.abs().max() < 1e-7
        gap = (c * z).sum(-1) + (b * nu).sum(-1) + (h * lam).sum(-1)
        torch.testing.assert_close(gap, torch.full_like(gap, mu * 16), rtol=1e-6, atol=1e-9)
        # It minimises the barrier: no direction of the equations lowers it.
        flat = torch.linalg.svd(A).Vh[:, 2:]
        barrier = c - mu * (G.mT @ (-1 / slack)[..., None]).squeeze(-1)
        assert (flat @ barrier[..., None]).abs().max() < 1e-6


def test_the_simplex_in_closed_form() -> None:
    # z_i = mu / (c_i + nu), with nu from one scalar equation, solved here by SciPy.
    cost, mu = torch.tensor([0.3, 1.0, 2.0], dtype=DOUBLE), 0.2
    A, b = torch.ones(1, 3, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)
    found = linear_program(
        cost,
        A,
        b,
        -torch.eye(3, dtype=DOUBLE),
        torch.zeros(3, dtype=DOUBLE),
        smoothing=mu,
        tol=1e-12,
    )
    nu = scipy.optimize.brentq(
        lambda v: (mu / (cost.numpy() + v)).sum() - 1, -0.3 + 1e-9, 10, xtol=1e-15
    )
    torch.testing.assert_close(found.value, mu / (cost + nu), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_every_kind(kind: str) -> None:
    # The square has to be strong enough that its solution is off the vertices.
    mu = 0.3 if kind == "barrier" else 2.0
    problem = tuple(t[:1] for t in draw(1, 2, 1, 1))

    def layer(*data: Tensor) -> tuple[Tensor, ...]:
        found = linear_program(*data, smoothing=mu, kind=kind, tol=1e-12)
        return found.value, found.equality, found.inequality

    check_derivatives(layer, *problem)


def test_the_derivative_tends_to_that_of_the_vertex() -> None:
    problem = tuple(t[0] for t in draw(1, 4, 1, 6))
    c, A, b, G, h = problem
    exact = highs(*problem)
    active = torch.from_numpy(exact.slack < 1e-9)
    basis = torch.cat([A, G[active]])
    assert basis.shape == (4, 4)  # a vertex that is not degenerate
    inverse = torch.linalg.inv(basis)

    def value(c: Tensor, b: Tensor, h: Tensor, mu: float, kind: str) -> Tensor:
        return linear_program(c, A, b, G, h, smoothing=mu, kind=kind, tol=1e-10).value

    errors = []
    for mu in (1e-2, 1e-3, 1e-4, 1e-5):
        in_c, in_b, in_h = torch.func.jacrev(value, argnums=(0, 1, 2))(c, b, h, mu, "barrier")
        right = torch.cat([in_b, in_h[:, active]], 1) - inverse
        errors.append(max(t.abs().max().item() for t in (in_c, right, in_h[:, ~active])))
    # Linear in mu, and so the error falls by ten with it.
    assert errors[-1] < 1e-3
    for before, after in itertools.pairwise(errors[1:]):
        assert 5 < before / after < 20
    in_c, in_b, in_h = torch.func.jacrev(value, argnums=(0, 1, 2))(c, b, h, 1e-3, "quadratic")
    assert in_c.abs().max() < 1e-7  # the vertex itself
    torch.testing.assert_close(torch.cat([in_b, in_h[:, active]], 1), inverse, rtol=0, atol=1e-6)


def test_derivative_against_differences_of_the_smoothed_solution() -> None:
    c, A, b, G, h = (t[0] for t in draw(1, 4, 1, 6))

    def first(c: Tensor) -> Tensor:
        return linear_program(c, A, b, G, h, smoothing=0.05, tol=1e-12).value

    jacobian, step = torch.func.jacrev(first)(c), 1e-5
    for j in range(4):
        move = step * torch.eye(4, dtype=DOUBLE)[j]
        difference = (first(c + move) - first(c - move)) / (2 * step)
        torch.testing.assert_close(jacobian[:, j], difference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(jacobian, jacobian.mT, rtol=0, atol=1e-7)  # a gradient's Jacobian
    assert torch.linalg.eigvalsh((jacobian + jacobian.mT) / 2).max() < 1e-9


def test_batches_vmap_and_float32() -> None:
    problem = draw(3, 4, 1, 5)
    found = linear_program(*problem, smoothing=0.1)
    mapped = torch.func.vmap(lambda *one: linear_program(*one, smoothing=0.1).value)(*problem)
    torch.testing.assert_close(mapped, found.value, rtol=1e-7, atol=1e-9)
    single = linear_program(*(t.float() for t in problem), smoothing=0.1)
    assert single.value.dtype == torch.float32
    torch.testing.assert_close(single.value.double(), found.value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_statuses(kind: str) -> None:
    c, eye = torch.ones(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE)
    sides = torch.cat([eye, -eye])
    none = linear_program(
        c, G=sides, h=-torch.ones(4, dtype=DOUBLE), smoothing=0.1, kind=kind, throw=False
    )
    assert none.status is QuadraticProgramStatus.infeasible
    with pytest.raises(ArgumentError, match="No point satisfies"):
        linear_program(c, G=sides, h=-torch.ones(4, dtype=DOUBLE), smoothing=0.1, kind=kind)
    few = linear_program(*draw(1, 4, 1, 5), smoothing=0.1, kind=kind, max_steps=1, throw=False)
    assert few.status is QuadraticProgramStatus.max_steps
    with pytest.raises(NonFiniteError, match="max_steps was 1"):
        linear_program(*draw(1, 4, 1, 5), smoothing=0.1, kind=kind, max_steps=1)


def test_an_endless_program_and_one_without_an_interior() -> None:
    c, eye = torch.ones(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE)
    down = linear_program(c, G=eye, h=torch.ones(2, dtype=DOUBLE), smoothing=0.1, throw=False)
    assert down.status is QuadraticProgramStatus.unbounded
    pinched = torch.cat([eye, -eye])
    point = linear_program(c, G=pinched, h=torch.zeros(4).double(), smoothing=0.1, throw=False)
    assert not point.ok


def test_bad_input() -> None:
    c, eye = torch.ones(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE)
    for smoothing in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ArgumentError, match="smoothing is"):
            linear_program(c, G=eye, h=c, smoothing=smoothing)
    with pytest.raises(ArgumentError, match="kind is 'entropy'"):
        linear_program(c, G=eye, h=c, smoothing=1.0, kind="entropy")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="give G and h"):
        linear_program(c, eye, c, smoothing=1.0)
    with pytest.raises(ArgumentError, match="belong together"):
        linear_program(c, G=eye, smoothing=1.0)
    with pytest.raises(DtypeError, match="int64"):
        linear_program(c.long(), G=eye, h=c, smoothing=1.0)
    with pytest.raises(ShapeError, match="G and h"):
        linear_program(c, G=eye, h=torch.ones(3, dtype=DOUBLE), smoothing=1.0)
    with pytest.raises(NonFiniteError, match="h has an entry"):
        linear_program(c, G=eye, h=c * torch.nan, smoothing=1.0)
