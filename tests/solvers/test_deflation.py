"""Deflation along sequences of systems: fewer steps, honest counts, the operator it stands for."""

from __future__ import annotations

import math

import pytest
import scipy.sparse
import torch
from tests.solvers.systems import (
    DTYPES,
    N,
    definite,
    error_of,
    eye,
    function,
    random,
    residual_of,
    solution_of,
    with_spectrum,
)

from woodbury import CG, Deflation, Dense, Diagonal, Identity, Jacobi, Sparse, solve
from woodbury.errors import ArgumentError, NonFiniteError, TagError
from woodbury.solvers import SolveStatus
from woodbury.solvers.deflation import DeflationState

F64 = torch.float64


def spd(M: torch.Tensor):
    return function(M, {"positive_definite"})


def hard(n: int = 120, small: int = 6, dtype: torch.dtype = F64) -> torch.Tensor:
    """A few small eigenvalues below a cluster."""
    spectrum = torch.cat([torch.logspace(-4, -3, small), torch.linspace(1, 3, n - small)])
    return with_spectrum(spectrum.to(F64), dtype=dtype)


# -------------------------------------------------------------------- sequences


@pytest.mark.parametrize("preconditioner", [None, Jacobi()], ids=str)
def test_slowly_changing_sequence_takes_fewer_and_fewer_steps(preconditioner) -> None:
    m = 24
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(m, m))
    grid = scipy.sparse.csr_array(scipy.sparse.kronsum(line, line))
    weights = random(m * m).abs().numpy()
    state, deflated, plain, products = None, [], [], []
    for i in range(6):
        change = scipy.sparse.diags_array(1e-3 * (1 + 0.3 * i) * weights)
        A = Sparse(grid + change, tags={"positive_definite"})
        b = random(m * m, seed=i)
        recipe = Deflation(rtol=1e-8, rank=10, preconditioner=preconditioner)
        solution = solve(A, b, recipe, state=state)
        state = solution.state
        assert solution.status is SolveStatus.converged
        assert residual_of(A.to_dense(), solution.value, b) <= 1.01e-8
        plain.append(solve(A, b, CG(rtol=1e-8, preconditioner=preconditioner)))
        deflated.append(solution.steps)
        products.append(solution.products)
    steps = [solution.steps for solution in plain]
    assert deflated[0] == steps[0]  # nothing is known yet
    assert all(d < 0.75 * c for d, c in zip(deflated[1:], steps[1:], strict=True))
    assert all(d < 0.65 * c for d, c in zip(deflated[2:], steps[2:], strict=True))
    # The products with W are counted, and still there are fewer.
    assert products[1:] == [d + 1 + 10 for d in deflated[1:]]
    assert sum(products) < 0.8 * sum(solution.products for solution in plain)


def test_same_operator_multiplies_the_vectors_never_again() -> None:
    M = hard()
    A, state, calls = spd(M), None, []

    def product(X: torch.Tensor) -> torch.Tensor:
        calls.append(X.shape[1])
        return M @ X

    A._forward = product
    steps = []
    for seed in range(4):
        calls.clear()
        solution = solve(A, random(120, seed=seed), Deflation(rtol=1e-9, rank=8), state=state)
        state = solution.state
        steps.append(solution.steps)
        assert solution.products == sum(calls) == solution.steps + 1
        assert state.basis.shape == (120, 8)
        assert solution.info["recycled"] == 8
        # What is kept is what it is said to be.
        assert error_of(state.image, M @ state.basis) < 1e-9
        assert error_of(state.basis.T @ M @ state.basis, torch.eye(8, dtype=F64)) < 1e-6
    exact = solve(spd(hard(small=0)), random(120), CG(rtol=1e-9)).steps
    assert steps[0] > exact
    assert steps[-1] <= exact + 3  # as if the small eigenvalues were not there


def test_states_are_never_changed() -> None:
    A = spd(hard())
    first = solve(A, random(120), Deflation(rank=5)).state
    kept = first.basis.clone()
    again = solve(A, random(120, seed=2), Deflation(rank=5), state=first)
    twice = solve(A, random(120, seed=2), Deflation(rank=5), state=first)
    assert torch.equal(first.basis, kept)
    assert torch.equal(again.value, twice.value)
    assert again.state is not first
    assert isinstance(again.state, DeflationState)


# ------------------------------------------------------------ what it stands for


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_the_whole_space_gives_the_exact_eigenvectors(dtype: torch.dtype) -> None:
    M = definite(12, condition=30, dtype=dtype)
    solution = solve(
        spd(M), random(12, dtype=dtype), Deflation(rtol=1e-14, rank=3, window=40), throw=False
    )
    W = solution.state.basis
    values, vectors = torch.linalg.eigh(M)
    small = vectors[:, :3]
    assert error_of(small @ (small.mH @ W), W) < 1e-6
    rayleigh = torch.linalg.eigvalsh(torch.linalg.qr(W)[0].mH @ M @ torch.linalg.qr(W)[0])
    assert torch.allclose(rayleigh, values[:3], rtol=1e-8)


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
@pytest.mark.parametrize("inner", [None, Jacobi()], ids=str)
def test_operator_is_the_balanced_form(inner, dtype: torch.dtype) -> None:
    M = definite(dtype=dtype)
    A = Dense(M, tags={"positive_definite"})
    recipe = Deflation(rtol=1e-2, rank=4, preconditioner=inner)
    state = solve(A, random(N, dtype=dtype), recipe).state
    near = Dense(M + 0.05 * definite(seed=3, dtype=dtype), tags={"positive_definite"})
    for operator in (A, near):
        P = recipe.as_preconditioner(operator, state)
        D = torch.diag(1 / M.diagonal()) if inner else eye().to(dtype)
        W, dense = state.basis, operator.to_dense()
        Q = W @ torch.linalg.inv(W.mH @ dense @ W) @ W.mH
        project = eye().to(dtype) - Q @ dense
        want = Q + project @ D @ project.mH
        assert error_of(P.to_dense(), want) < 1e-10
        assert "positive_definite" in P.tags
        assert torch.linalg.eigvalsh(P.to_dense())[0] > 0
        # W belongs to the eigenvalue 1 exactly, whatever W is.
        assert error_of(P @ (operator @ W), W) < 1e-10
        solution = solve(operator, random(N, dtype=dtype), CG(rtol=1e-9, preconditioner=P))
        assert solution.ok


def test_an_inaccurate_basis_helps_and_does_no_harm() -> None:
    M, b = hard(), random(120)
    A = spd(M)
    state = solve(A, random(120, seed=1), Deflation(rank=6, rtol=1e-10)).state
    far = spd(with_spectrum(torch.linspace(0.1, 4, 120, dtype=F64), seed=9))
    solution = solve(far, b, Deflation(rank=6, rtol=1e-8), state=state)
    assert solution.ok
    assert solution.steps <= 1.1 * solve(far, b, CG(rtol=1e-8)).steps


# ------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_and_dtypes(dtype: torch.dtype) -> None:
    rtol = 1e-9 if dtype in (F64, torch.complex128) else 1e-4
    M = definite(condition=200, dtype=dtype)
    A, state = spd(M), None
    for seed in range(3):
        B = random(N, 4, dtype=dtype, seed=seed)
        B[:, 2] = 0
        solution = solve(A, B, Deflation(rtol=rtol, rank=4), state=state)
        state = solution.state
        assert solution.status is SolveStatus.converged
        kept = [0, 1, 3]
        assert (residual_of(M, solution.value, B)[kept] <= 1.01 * rtol).all()
        assert error_of(solution.value, solution_of(M, B)) < 400 * rtol
        assert state.basis.dtype == dtype
        assert solution.info["column_steps"][2] == 0


def test_nothing_to_do_and_nothing_allowed() -> None:
    A, b = spd(definite()), random(N)
    dense = Dense(definite(), tags={"positive_definite"})
    zero = solve(dense, torch.zeros(N, dtype=F64), Deflation())
    assert (zero.steps, zero.products) == (0, 0)
    none = solve(A, b, Deflation(max_steps=0), throw=False)
    assert none.status is SolveStatus.max_steps
    assert none.state.basis is None or none.state.basis.shape[1] <= 1
    state = solve(A, b, Deflation(rank=3)).state
    done = solve(A, b, Deflation(rank=3, rtol=1e-8), x0=solution_of(definite(), b), state=state)
    assert (done.steps, done.status) == (0, SolveStatus.converged)


def test_multiple_of_the_identity_and_one_by_one() -> None:
    b = random(N)
    A, state = 2.0 * Identity(N, dtype=F64), None
    for _ in range(3):
        solution = solve(A, b, Deflation(rank=4), state=state)
        state = solution.state
        assert solution.steps == 1
        assert error_of(solution.value, b / 2) < 1e-12
    one = Dense(torch.tensor([[4.0]], dtype=F64), tags={"positive_definite"})
    for _ in range(2):
        found = solve(one, torch.tensor([2.0], dtype=F64), Deflation())
        assert found.value.item() == pytest.approx(0.5)


def test_operator_that_becomes_indefinite_is_reported() -> None:
    M, b = hard(), random(120)
    state = solve(spd(M), b, Deflation(rank=6, rtol=1e-8)).state
    lower = Dense(M - 5e-3 * torch.eye(120, dtype=F64), tags={"hermitian"})
    solution = solve(lower, b, Deflation(rank=6, rtol=1e-8), state=state, throw=False)
    assert solution.status in (SolveStatus.negative_curvature, SolveStatus.breakdown)
    saddle = Diagonal(torch.tensor([2.0, 1.0, -1.0], dtype=F64))
    found = solve(saddle, torch.ones(3, dtype=F64), Deflation(), throw=False)
    assert found.status is SolveStatus.negative_curvature


def test_gradient() -> None:
    M = definite()
    A, c = spd(M), random(N, seed=5)
    state = solve(A, random(N), Deflation(rank=4, rtol=1e-12)).state
    b = random(N).requires_grad_(True)
    value = solve(A, b, Deflation(rank=4, rtol=1e-12), state=state).value
    (gradient,) = torch.autograd.grad(value @ c, b)
    assert error_of(gradient, solution_of(M, c)) < 1e-9


def test_products_that_are_not_finite() -> None:
    M = definite()
    M[3, 3] = math.nan
    found = solve(spd(M), random(N), Deflation(), throw=False)
    assert found.status is SolveStatus.non_finite
    b = random(N)
    b[2] = math.inf
    with pytest.raises(NonFiniteError):
        solve(spd(definite()), b, Deflation())


def test_bad_arguments() -> None:
    for make, words in (
        (lambda: Deflation(rank=0), "rank is 0"),
        (lambda: Deflation(window=0), "window is 0"),
        (lambda: Deflation(rtol=math.nan), "rtol is nan"),
    ):
        with pytest.raises(ArgumentError, match=words):
            make()
    with pytest.raises(ArgumentError, match="before it has solved a system"):
        solve(spd(definite()), random(N), CG(preconditioner=Deflation()))
    with pytest.raises(TagError, match="'hermitian'"):
        solve(Dense(random(4, 4)), random(4), Deflation())
