"""The quadratic-program layer against SciPy, closed forms, and finite differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.optimize
import torch
from tests.implicit.derivatives import check_derivatives
from torch import Tensor

from woodbury.errors import (
    ArgumentError,
    DtypeError,
    NonFiniteError,
    ShapeError,
    SingularError,
)
from woodbury.implicit import (
    QuadraticProgramStatus,
    project_box,
    project_simplex,
    quadratic_program,
)

# Torch itself scripts what forward mode needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is dep:DeprecationWarning")

DOUBLE = torch.float64
EYE = torch.eye(2, dtype=DOUBLE)
ONES = torch.ones(2, dtype=DOUBLE)


def draw(count: int, n: int, p: int, m: int) -> tuple[Tensor, ...]:
    """Strictly feasible problems with a solution."""
    generator = torch.Generator().manual_seed(n + m)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    R, inside = randn(count, n, n), randn(count, n, 1)
    P = R @ R.mT + 0.1 * torch.eye(n, dtype=DOUBLE)
    A, G = randn(count, p, n), randn(count, m, n)
    h = (G @ inside).squeeze(-1) + torch.rand(count, m, generator=generator, dtype=DOUBLE)
    return P, randn(count, n), A, (A @ inside).squeeze(-1), G, h


def test_conditions_hold_and_scipy_agrees() -> None:
    problem = draw(4, 6, 2, 8)
    P, q, A, b, G, h = problem
    found = quadratic_program(*problem)
    z, nu, lam = found.value, found.equality, found.inequality
    assert found.ok
    assert found.status is QuadraticProgramStatus.optimal
    assert found.residual.max() <= 1e-9
    slope = P @ z[..., None] + q[..., None] + A.mT @ nu[..., None] + G.mT @ lam[..., None]
    assert slope.abs().max() < 1e-7
    assert (A @ z[..., None] - b[..., None]).abs().max() < 1e-7
    slack = h - (G @ z[..., None]).squeeze(-1)
    assert slack.min() > -1e-7
    assert lam.min() >= 0
    assert (lam * slack).abs().max() < 1e-7
    for i in range(4):
        reference = scipy.optimize.minimize(
            lambda x, i=i: 0.5 * x @ P[i].numpy() @ x + q[i].numpy() @ x,
            np.zeros(6),
            jac=lambda x, i=i: P[i].numpy() @ x + q[i].numpy(),
            constraints=[
                {"type": "eq", "fun": lambda x, i=i: A[i].numpy() @ x - b[i].numpy()},
                {"type": "ineq", "fun": lambda x, i=i: h[i].numpy() - G[i].numpy() @ x},
            ],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        np.testing.assert_allclose(z[i].numpy(), reference.x, atol=1e-5)


def test_linear_programs_against_highs() -> None:
    _, q, _, _, G, h = draw(5, 4, 0, 10)
    box = torch.cat([torch.eye(4, dtype=DOUBLE), -torch.eye(4, dtype=DOUBLE)]).expand(5, 8, 4)
    G = torch.cat([G, box], 1)
    h = torch.cat([h, torch.full((5, 8), 3.0, dtype=DOUBLE)], 1)
    found = quadratic_program(torch.zeros(4, 4, dtype=DOUBLE), q, G=G, h=h)
    for i in range(5):
        best = scipy.optimize.linprog(q[i].numpy(), G[i].numpy(), h[i].numpy(), bounds=(None, None))
        assert abs(best.fun - (q[i] @ found.value[i]).item()) < 1e-6


def test_equations_alone_are_one_linear_system() -> None:
    P, q, A, b, _, _ = draw(3, 5, 2, 1)
    found = quadratic_program(P, q, A, b)
    K = torch.cat([torch.cat([P, A.mT], -1), torch.cat([A, torch.zeros(3, 2, 2)], -1)], -2)
    x = torch.linalg.solve(K, torch.cat([-q, b], -1))
    torch.testing.assert_close(found.value, x[:, :5], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.equality, x[:, 5:], rtol=1e-9, atol=1e-9)
    free = quadratic_program(P, q)
    torch.testing.assert_close(free.value, -torch.linalg.solve(P, q), rtol=1e-9, atol=1e-9)


def test_redundant_equations_do_not_stop_it() -> None:
    P, q, A, b, G, h = draw(2, 5, 2, 4)
    expected = quadratic_program(P, q, A, b, G, h).value
    twice = quadratic_program(P, q, torch.cat([A, A], 1), torch.cat([b, b], 1), G, h)
    torch.testing.assert_close(twice.value, expected, rtol=0, atol=1e-7)


def layer(P: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    found = quadratic_program((P + P.mT) / 2, *others, tol=1e-12)
    return found.value, found.equality, found.inequality


def test_derivatives_of_every_kind() -> None:
    check_derivatives(layer, *(t[:1] for t in draw(1, 3, 1, 4)))


def test_layer_under_vmap_and_hessian() -> None:
    P, q, A, b, G, h = draw(3, 4, 1, 5)
    every = torch.func.vmap(lambda q: quadratic_program(P[0], q, A[0], b[0], G[0], h[0]).value)(q)
    one = quadratic_program(P[0], q, A[0], b[0], G[0], h[0]).value
    torch.testing.assert_close(every, one, rtol=0, atol=1e-12)
    jacobian = torch.func.jacrev(lambda q: quadratic_program(P[0], q, A[0], b[0], G[0], h[0]).value)
    forward = torch.func.jacfwd(lambda q: quadratic_program(P[0], q, A[0], b[0], G[0], h[0]).value)
    torch.testing.assert_close(jacobian(q[0]), forward(q[0]), rtol=0, atol=1e-9)


def test_projections_are_quadratic_programs() -> None:
    y = torch.tensor([0.9, 0.5, 0.3, -1.0], dtype=DOUBLE)
    eye, one = torch.eye(4, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)

    def simplex(y: Tensor) -> Tensor:
        ones = torch.ones(1, 4, dtype=DOUBLE)
        zero = torch.zeros(4, dtype=DOUBLE)
        return quadratic_program(eye, -y, ones, one, -eye, zero, tol=1e-12).value

    torch.testing.assert_close(simplex(y), project_simplex(y), rtol=0, atol=1e-9)
    expected = torch.func.jacrev(project_simplex)(y)
    torch.testing.assert_close(torch.func.jacrev(simplex)(y), expected, rtol=0, atol=1e-9)
    both = torch.cat([eye, -eye])
    bounds = torch.tensor([0.6] * 4 + [0.2] * 4, dtype=DOUBLE)
    clipped = quadratic_program(eye, -y, G=both, h=bounds).value
    torch.testing.assert_close(clipped, project_box(y, -0.2, 0.6), rtol=0, atol=1e-8)


def test_float32_comes_back_as_it_went() -> None:
    problem = [t.float() for t in draw(2, 4, 1, 5)]
    found = quadratic_program(*problem)
    assert found.value.dtype == torch.float32
    exact = quadratic_program(*(t.double() for t in problem)).value
    torch.testing.assert_close(found.value, exact.float(), rtol=0, atol=0)


def test_infeasible_and_unbounded_problems_say_so() -> None:
    sides = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=DOUBLE)
    cases = [
        ((EYE, ONES, None, None, sides, -ONES), QuadraticProgramStatus.infeasible),
        ((EYE, ONES, torch.ones(2, 2).double(), ONES.cumsum(0)), QuadraticProgramStatus.infeasible),
        ((0 * EYE, -ONES, None, None, EYE[:1], ONES[:1]), QuadraticProgramStatus.unbounded),
        ((0 * EYE, -ONES), QuadraticProgramStatus.unbounded),
    ]
    for problem, status in cases:
        found = quadratic_program(*problem, throw=False)
        assert found.status is status
        assert not found.ok
        with pytest.raises(ArgumentError, match=status.value[:30]):
            quadratic_program(*problem)


def test_one_bad_problem_does_not_spoil_a_batch() -> None:
    q = torch.stack([ONES, ONES])
    h = torch.tensor([[1.0, 2.0], [-1.0, -1.0]], dtype=DOUBLE)
    G = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=DOUBLE)
    found = quadratic_program(EYE, q, G=G, h=h, throw=False)
    assert found.codes.tolist() == [0, 1]
    torch.testing.assert_close(found.value[0], -ONES, rtol=0, atol=1e-7)
    with pytest.raises(ArgumentError, match=r"problem \[1\]"):
        quadratic_program(EYE, q, G=G, h=h)


def test_a_budget_that_is_too_small_is_a_status() -> None:
    problem = draw(2, 5, 1, 6)
    found = quadratic_program(*problem, max_steps=1, throw=False)
    assert found.status is QuadraticProgramStatus.max_steps
    assert found.steps == 1
    with pytest.raises(NonFiniteError, match="max_steps was 1"):
        quadratic_program(*problem, max_steps=1)


def test_a_kink_is_seen_and_its_derivative_refused() -> None:
    # min (z - y)^2 / 2 with z >= 0 at y = 0: constraint and multiplier vanish together.
    q = torch.zeros(1, dtype=DOUBLE, requires_grad=True)
    one, zero = torch.ones(1, 1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)
    found = quadratic_program(one, q, G=-one, h=zero, tol=1e-14, throw=False)
    assert found.margin < 1e-6
    redundant = torch.ones(2, 1, dtype=DOUBLE)
    twice = quadratic_program(one, q, redundant, ONES)
    with pytest.raises(SingularError, match="depend on each other"):
        twice.value.backward()


# Optimal values of Maros and Meszaros (1999), table 1.
PUBLISHED = {
    "CVXQP1_S": 1.15907181e4,
    "DUAL4": 7.46090842e-1,
    "DUALC1": 6.15525083e3,
    "HS118": 6.64820452e2,
    "HS21": -9.99599999e1,
    "HS76": -4.68181818,
    "LOTSCHD": 2.39841589e3,
    "QAFIRO": -1.59078179,
    "QISRAEL": 2.53478378e7,
    "QSHARE2B": 1.17036917e4,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_optimal_values(name: str, data_folder: Path) -> None:
    path = data_folder / "maros_meszaros" / f"{name}.mat"
    if not path.exists():
        pytest.skip(f"no {path}")
    data = scipy.io.loadmat(path)
    P, rows = (data[k].toarray().astype(float) for k in ("P", "A"))
    q, low, high = (data[k].astype(float).ravel() for k in ("q", "l", "u"))
    equal = low == high
    above, below = ~equal & (high < 1e19), ~equal & (low > -1e19)
    G = np.concatenate([rows[above], -rows[below]])
    h = np.concatenate([high[above], -low[below]])
    arguments = [torch.from_numpy(t) for t in (P, q, rows[equal], low[equal], G, h)]
    found = quadratic_program(*arguments, tol=1e-8)
    z = found.value.numpy()
    value = z @ P @ z / 2 + q @ z + float(data["r"].item())
    assert found.ok
    assert abs(value / PUBLISHED[name] - 1) < 1e-6


def test_bad_input_is_refused() -> None:
    with pytest.raises(ArgumentError, match="belong together"):
        quadratic_program(EYE, ONES, EYE)
    with pytest.raises(ArgumentError, match="not symmetric"):
        quadratic_program(EYE + torch.tensor([[0.0, 1.0], [0.0, 0.0]]).double(), ONES)
    with pytest.raises(ArgumentError, match="not convex"):
        quadratic_program(-EYE, ONES)
    with pytest.raises(ArgumentError, match="must be positive"):
        quadratic_program(EYE, ONES, tol=0.0)
    with pytest.raises(DtypeError, match="q is"):
        quadratic_program(EYE.float(), ONES)
    with pytest.raises(DtypeError, match="int64"):
        quadratic_program(EYE.long(), ONES)
    with pytest.raises(ShapeError, match="P has shape"):
        quadratic_program(EYE, torch.ones(3, dtype=DOUBLE))
    with pytest.raises(ShapeError, match="A and b"):
        quadratic_program(EYE, ONES, EYE, torch.ones(3, dtype=DOUBLE))
    with pytest.raises(ShapeError, match="do not broadcast"):
        quadratic_program(EYE.expand(3, 2, 2), ONES.expand(2, 2))
    with pytest.raises(NonFiniteError, match="q has an entry"):
        quadratic_program(EYE, ONES * torch.nan)
