"""Sparse quadratic programs against the dense layer and the published optimal values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from woodbury import Dense, Sparse
from woodbury.errors import (
    ArgumentError,
    DtypeError,
    NonFiniteError,
    ShapeError,
    SingularError,
)
from woodbury.implicit import QuadraticProgramStatus, quadratic_program

DOUBLE = torch.float64


def draw(n: int = 12, p: int = 3, m: int = 10) -> tuple:
    """A feasible problem with sparse matrices that have empty rows and columns of their own."""
    rng = np.random.default_rng(n + m)

    def sparse(rows: int) -> scipy.sparse.csr_array:
        return scipy.sparse.random_array((rows, n), density=0.3, rng=rng).tocsr()

    R = sparse(n)
    P = (R @ R.T + 0.1 * scipy.sparse.eye_array(n)).tocsr()
    inside = rng.normal(size=n)
    A = (sparse(p) + scipy.sparse.eye_array(p, n)).tocsr()
    G = sparse(m)
    vectors = (rng.normal(size=n), A @ inside, G @ inside + rng.uniform(0.1, 1, m))
    q, b, h = (torch.from_numpy(v) for v in vectors)
    return Sparse(P), q, Sparse(A), b, Sparse(G), h


def dense(problem: tuple) -> list[Tensor]:
    return [M.to_dense() if isinstance(M, Sparse) else M for M in problem]


def with_values(M: Sparse, values: Tensor) -> Sparse:
    indices = torch.stack([M.rows, M.column_indices])
    return Sparse(torch.sparse_coo_tensor(indices, values, M.shape, check_invariants=True))


@pytest.mark.parametrize("which", ["all", "equations", "inequalities", "none"])
def test_the_dense_layer_agrees(which: str) -> None:
    P, q, A, b, G, h = draw()
    if which in ("inequalities", "none"):
        A = b = None
    if which in ("equations", "none"):
        G = h = None
    found = quadratic_program(P, q, A, b, G, h)
    given = [M.to_dense() if isinstance(M, Sparse) else M for M in (P, q, A, b, G, h)]
    expected = quadratic_program(*given)
    assert found.status is QuadraticProgramStatus.optimal
    assert found.residual <= 1e-9
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.equality, expected.equality, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.inequality, expected.inequality, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_dense_layer_on_the_pattern() -> None:
    problem = draw()
    leaves = [M.values if isinstance(M, Sparse) else M for M in problem]
    for leaf in leaves:
        leaf.requires_grad_()
    full = [t.detach().requires_grad_() for t in dense(problem)]
    weights = torch.linspace(-1, 1, 25, dtype=DOUBLE).split([12, 3, 10])

    def loss(found) -> Tensor:  # type: ignore[no-untyped-def]
        parts = (found.value, found.equality, found.inequality)
        return sum((w * t).sum() for w, t in zip(weights, parts, strict=True))

    found = torch.autograd.grad(loss(quadratic_program(*problem, tol=1e-12)), leaves)
    expected = torch.autograd.grad(loss(quadratic_program(*full, tol=1e-12)), full)
    for M, part, whole in zip(problem, found, expected, strict=True):
        on = whole[M.rows, M.column_indices] if isinstance(M, Sparse) else whole
        torch.testing.assert_close(part, on, rtol=1e-5, atol=1e-6)


def test_first_and_second_derivatives_by_differences() -> None:
    P, q, A, b, G, h = draw(4, 1, 3)

    def layer(Pv: Tensor, q: Tensor, Av: Tensor, b: Tensor, Gv: Tensor, h: Tensor) -> Tensor:
        matrices = with_values(P, Pv), with_values(A, Av), with_values(G, Gv)
        found = quadratic_program(matrices[0], q, matrices[1], b, matrices[2], h, tol=1e-12)
        return torch.cat([found.value, found.equality, found.inequality])

    rest = [t.clone().requires_grad_() for t in (q, A.values, b, G.values, h)]
    check = (lambda *t: layer(P.values, *t), rest)
    assert gradcheck(*check)
    assert gradgradcheck(*check)
    # P as s times itself: a symmetric direction.
    scale = torch.ones((), dtype=DOUBLE, requires_grad=True)
    values = [t.detach() for t in rest]
    assert gradcheck(lambda s: layer(s * P.values, *values), [scale])


def test_statuses() -> None:
    eye, ones = Sparse(scipy.sparse.eye_array(3)), torch.ones(3, dtype=DOUBLE)
    sides = Sparse(scipy.sparse.vstack([scipy.sparse.eye_array(3), -scipy.sparse.eye_array(3)]))
    none = quadratic_program(eye, ones, G=sides, h=-torch.ones(6).double(), throw=False)
    assert none.status is QuadraticProgramStatus.infeasible
    with pytest.raises(ArgumentError, match="No point satisfies"):
        quadratic_program(eye, ones, G=sides, h=-torch.ones(6).double())
    zero = Sparse(scipy.sparse.csr_array((3, 3)))
    assert (
        quadratic_program(zero, ones, G=eye, h=ones, throw=False).status
        is QuadraticProgramStatus.unbounded
    )
    few = quadratic_program(*draw(), max_steps=1, throw=False)
    assert few.status is QuadraticProgramStatus.max_steps
    # A linear program, at its vertex.
    lowest = quadratic_program(zero, ones, G=sides, h=torch.ones(6).double())
    torch.testing.assert_close(lowest.value, -ones, rtol=0, atol=1e-7)


def test_redundant_equations_have_a_solution_and_no_derivative() -> None:
    eye, ones = Sparse(scipy.sparse.eye_array(3)), torch.ones(3, dtype=DOUBLE)
    twice = Sparse(scipy.sparse.csr_array(np.ones((2, 3))))
    q = ones.clone().requires_grad_()
    found = quadratic_program(eye, q, twice, ones[:2])
    torch.testing.assert_close(found.value.detach(), ones / 3, rtol=0, atol=1e-7)
    with pytest.raises(SingularError, match="depend on each other"):
        found.value.sum().backward()


def test_float32_comes_back_as_it_went() -> None:
    problem = [
        with_values(M, M.values.float()) if isinstance(M, Sparse) else M.float() for M in draw()
    ]
    found = quadratic_program(*problem)
    assert found.value.dtype == torch.float32
    expected = quadratic_program(*draw()).value
    torch.testing.assert_close(found.value.double(), expected, rtol=1e-3, atol=1e-4)


def test_bad_input() -> None:
    P, q, A, b, G, h = draw()
    with pytest.raises(DtypeError, match="A is Tensor where another matrix is Sparse"):
        quadratic_program(P, q, A.to_dense(), b)
    with pytest.raises(DtypeError, match="P is Dense"):
        quadratic_program(Dense(P.to_dense()), q)
    with pytest.raises(DtypeError, match="q is torch.int64"):
        quadratic_program(P, q.long())
    with pytest.raises(DtypeError, match="convert"):
        quadratic_program(P, q.float())
    with pytest.raises(ShapeError, match="one problem"):
        quadratic_program(P, q.expand(2, 12))
    with pytest.raises(ShapeError, match="A has shape"):
        quadratic_program(P, q, A, torch.ones(4, dtype=DOUBLE))
    with pytest.raises(ArgumentError, match="belong together"):
        quadratic_program(P, q, A)
    with pytest.raises(ArgumentError, match="not convex"):
        quadratic_program(-1.0 * P, q)
    with pytest.raises(ArgumentError, match="not symmetric"):
        quadratic_program(Sparse(scipy.sparse.csr_array(np.triu(np.ones((12, 12))))), q)
    with pytest.raises(NonFiniteError, match="h has an entry"):
        quadratic_program(P, q, A, b, G, h * torch.nan)
    with pytest.raises(NonFiniteError, match="P has an entry"):
        quadratic_program(with_values(P, P.values * torch.inf), q)


# Optimal values of Maros and Meszaros (1999), table 1; more than 1,200 variables and rows.
PUBLISHED = {
    "AUG3DC": 7.71262439e2,
    "CONT-050": -4.56385090,
    "CVXQP1_M": 1.08751157e6,
    "CVXQP2_M": 8.20155431e5,
    "LASER": 2.40960135e6,
    "MOSARQP2": -1.59748211e3,
    "QSCSD8": 9.40763574e2,
    "QSHIP08S": 2.38572885e6,
    "YAO": 1.97704256e2,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_optimal_values(name: str, data_folder: Path) -> None:
    path = data_folder / "maros_meszaros" / f"{name}.mat"
    if not path.exists():
        pytest.skip(f"no {path}")
    data = scipy.io.loadmat(path)
    P, rows = (scipy.sparse.csr_array(data[k]).astype(float) for k in ("P", "A"))
    q, low, high = (data[k].astype(float).ravel() for k in ("q", "l", "u"))
    equal = low == high
    above, below = ~equal & (high < 1e19), ~equal & (low > -1e19)
    G = Sparse(scipy.sparse.vstack([rows[above], -rows[below]]))
    h = torch.from_numpy(np.concatenate([high[above], -low[below]]))
    linear = torch.from_numpy(q).requires_grad_()
    found = quadratic_program(
        Sparse(P), linear, Sparse(rows[equal]), torch.from_numpy(low[equal]), G, h, tol=1e-8
    )
    z = found.value.detach().numpy()
    value = z @ (P @ z) / 2 + q @ z + float(data["r"].item())
    assert found.ok
    assert abs(value / PUBLISHED[name] - 1) < 1e-5
    # The value changes with q as z does: the envelope theorem, through the sparse factors.
    if name in ("AUG3DC", "CONT-050"):
        objective = 0.5 * found.value @ (Sparse(P) @ found.value) + linear @ found.value
        (slope,) = torch.autograd.grad(objective, linear)
        np.testing.assert_allclose(slope.numpy(), z, rtol=0, atol=1e-5 * (1 + np.abs(z).max()))
