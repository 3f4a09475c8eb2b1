from __future__ import annotations

import math

import pytest
import torch
from tests.solvers.systems import (
    DTYPES,
    KINDS,
    N,
    error_of,
    eye,
    function,
    random,
    residual_of,
    solution_of,
    wide,
    with_spectrum,
)

from woodbury import CG, Arnoldi, Dense, Identity, inverse, solve
from woodbury.decompositions import arnoldi
from woodbury.errors import (
    ArgumentError,
    NonFiniteError,
    NotPositiveDefiniteError,
    RankError,
    SingularError,
    TagError,
)
from woodbury.solvers import SolveStatus

F64 = torch.float64


def spectrum(n: int = N) -> torch.Tensor:
    return torch.logspace(0, -6, n, dtype=F64)


def symmetric(values: torch.Tensor, dtype: torch.dtype = F64):
    return function(with_spectrum(values, dtype=dtype), {"hermitian"})


# ------------------------------------------------------------------------------ the decomposition


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_pairs_are_the_matrix(dtype):
    M = with_spectrum(torch.linspace(-1, 2, N, dtype=F64), dtype=dtype)
    factor = arnoldi(function(M, {"hermitian"}), N)
    bound = 1e-10 if dtype in (F64, torch.complex128) else 1e-4
    assert (wide(factor.operator().to_dense()) - wide(M)).norm() < bound * wide(M).norm()
    assert factor.basis.dtype == dtype
    assert not factor.eigenvalues.is_complex()
    gram = wide(factor.basis).mH @ wide(factor.basis)
    assert (gram - eye()).norm() < bound * N


def test_the_ends_are_found_first_whatever_their_sign():
    values = torch.cat([torch.tensor([-4.0, 3.0, -2.0]), torch.linspace(-0.1, 0.1, 37)]).double()
    M = with_spectrum(values)
    factor = arnoldi(function(M, {"hermitian"}), 3, steps=16)
    torch.testing.assert_close(factor.eigenvalues, values[:3], rtol=1e-9, atol=1e-9)
    vectors = torch.linalg.eigh(M).eigenvectors[:, [0, -1, 1]]
    overlap = (factor.basis.T @ vectors).abs()
    torch.testing.assert_close(overlap, eye(3), rtol=1e-8, atol=1e-8)
    assert factor.products == 16


def test_within_its_bound_there_is_an_eigenvalue():
    M = with_spectrum(spectrum(60))
    exact = torch.linalg.eigvalsh(M)
    for steps in (4, 8, 20):
        factor = arnoldi(function(M, {"hermitian"}), 4, steps=steps)
        nearest = (factor.eigenvalues[:, None] - exact[None]).abs().min(1).values
        assert (nearest <= factor.errors + 1e-12).all()


def test_an_exhausted_space_gives_fewer_pairs():
    M = with_spectrum(torch.tensor([2.0] * 10 + [1.0] * 10).double())
    factor = arnoldi(function(M, {"hermitian"}), 5, steps=9)
    torch.testing.assert_close(factor.eigenvalues, torch.tensor([2.0, 1.0]).double())
    assert factor.errors.max() < 1e-12


# -------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize("rho", [1e-3, 0.1, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_rank_is_the_damped_inverse(rho, dtype):
    M, B = with_spectrum(spectrum(), dtype=dtype), random(N, 3, dtype=dtype)
    exact = solution_of(wide(M) + rho * eye(), B)
    bound = 1e-9 if dtype in (F64, torch.complex128) else 2e-3
    A = function(M, {"hermitian"})
    inside = solve(A + rho * Identity(N), B, Arnoldi(N))
    outside = solve(A, B, Arnoldi(N, damping=rho))
    for solution in (inside, outside):
        assert error_of(solution.value, exact) < bound
        assert solution.status is SolveStatus.completed
        assert solution.info["rank"] >= N - 1  # what rounding drowns is not found
    assert float(inside.residual.max()) < bound


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_operator(kind):
    A = KINDS[kind](F64)
    # Three pairs and a multiple of the identity, or all pairs.
    recipe = Arnoldi(3) if kind == "low_rank_update" else Arnoldi(N)
    b = random(N)
    if kind == "kronecker":  # an eigenvalue that is there twice is found once
        with pytest.raises(SingularError, match="rank 23 of 24"):
            solve(A, b, recipe)
        return
    solution = solve(A, b, recipe)
    assert residual_of(A.to_dense(), solution.value[:, None], b[:, None]).max() < 1e-8


def test_outside_is_zero_or_damped():
    values = torch.tensor([8.0, 4.0, 0.1, 0.05, 0.01]).double()
    M, b = with_spectrum(values), random(5)
    A = function(M, {"hermitian"})
    exact, Q = torch.linalg.eigh(M)
    U, theta = Q[:, [4, 3]], exact[[4, 3]]
    inside = U @ ((U.T @ b) / (theta + 0.5))
    zero = solve(A, b, Arnoldi(2, steps=5, damping=0.5, outside="zero")).value
    torch.testing.assert_close(zero, inside)
    damped = solve(A, b, Arnoldi(2, steps=5, damping=0.5)).value
    torch.testing.assert_close(damped, inside + (b - U @ (U.T @ b)) / 0.5)
    # Without damping only the pairs can be inverted, which is what the source does.
    pseudo = solve(A, b, Arnoldi(2, steps=5, outside="zero")).value
    torch.testing.assert_close(pseudo, U @ ((U.T @ b) / theta))
    with pytest.raises(SingularError, match="damping"):
        solve(A, b, Arnoldi(2, steps=5))


def test_more_steps_come_closer():
    M, b = with_spectrum(spectrum(60)), random(60)
    A = function(M, {"hermitian"}) + 1e-3 * Identity(60)
    residuals = [float(solve(A, b, Arnoldi(8, steps=s)).residual) for s in (8, 12, 30)]
    assert residuals[2] < residuals[0]


def test_as_a_preconditioner_it_saves_steps():
    values = torch.cat([torch.logspace(4, 1, 10), torch.linspace(0.5, 1, 50)]).double()
    M, b = with_spectrum(values), random(60)
    A = function(M, {"positive_definite"})
    plain = solve(A, b, CG(rtol=1e-10))
    deflated = solve(A, b, CG(rtol=1e-10, preconditioner=Arnoldi(10, steps=30)))
    assert deflated.status is SolveStatus.converged
    assert deflated.steps < plain.steps / 2
    torch.testing.assert_close(deflated.value, solution_of(M, b), rtol=1e-8, atol=1e-9)
    indefinite = function(with_spectrum(torch.linspace(-1, 1, 9).double()), {"hermitian"})
    with pytest.raises(NotPositiveDefiniteError, match="raise the damping"):
        Arnoldi(9).as_preconditioner(indefinite, Arnoldi(9).prepare(indefinite))


def test_states_serve_again_and_starts_count():
    M, b = with_spectrum(spectrum()), random(N)
    A = function(M, {"hermitian"}) + 0.1 * Identity(N)
    recipe = Arnoldi(6)
    state = recipe.prepare(A)
    first = solve(A, b, recipe, state=state)
    assert torch.equal(first.value, solve(A, b, recipe).value)
    # A solution refines itself: the remaining residual is what the inverse is applied to.
    again = solve(A, b, recipe, state=state, x0=first.value)
    assert float(again.residual) < float(first.residual)
    exact = solution_of(A.to_dense(), b)
    assert error_of(solve(A, b, recipe, x0=exact).value, exact) < 1e-12
    assert solve(A, torch.zeros(N, dtype=F64), recipe).value.abs().max() == 0
    shifted = solve(function(M, {"hermitian"}) + 0.2 * Identity(N), b, recipe, state=state)
    assert float(shifted.residual) < 1  # the pairs are of the operator without its shift
    product = inverse(A, recipe) @ b
    assert torch.equal(product, first.value)


@pytest.mark.parametrize("c", [2.0, -3.0])
def test_a_multiple_of_the_identity_and_one_by_one(c):
    A = function(c * eye(4), {"hermitian"})
    factor = arnoldi(A, 2)
    assert factor.eigenvalues.tolist() == pytest.approx([c])  # one vector of the one eigenspace
    one = function(torch.full((1, 1), c, dtype=F64), {"hermitian"})
    assert solve(one, torch.ones(1).double(), Arnoldi(1)).value.item() == pytest.approx(1 / c)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_named(value):
    M = with_spectrum(spectrum())
    M[2, 3] = M[3, 2] = value
    with pytest.raises(NonFiniteError):
        solve(function(M, {"hermitian"}), random(N), Arnoldi(4, damping=1.0))
    b = random(N)
    b[3] = value
    with pytest.raises(NonFiniteError):
        solve(symmetric(spectrum()), b, Arnoldi(4, damping=1.0))


def test_arguments_are_checked():
    with pytest.raises(RankError, match="rank is 0"):
        Arnoldi(0)
    with pytest.raises(ArgumentError, match="steps is 3"):
        Arnoldi(4, steps=3)
    with pytest.raises(ArgumentError, match="damping"):
        Arnoldi(4, damping=-1.0)
    with pytest.raises(ArgumentError, match="outside"):
        Arnoldi(4, outside="one")
    A = symmetric(spectrum(5))
    with pytest.raises(RankError, match="rank is 6"):
        arnoldi(A, 6)
    with pytest.raises(ArgumentError, match="steps is 6"):
        arnoldi(A, 3, steps=6)
    with pytest.raises(TagError, match="hermitian"):
        solve(Dense(random(5, 5)), random(5), Arnoldi(2))
