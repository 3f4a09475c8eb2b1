from __future__ import annotations

import pytest
import torch
from tests.solvers.systems import (
    DTYPES,
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

from woodbury import CG, Dense, Identity, Kronecker, Nystrom, solve
from woodbury.errors import ArgumentError, NotPositiveDefiniteError, RankError, SingularError
from woodbury.operators.low_rank import LowRank
from woodbury.solvers import SolveStatus
from woodbury.solvers.nystrom import split_shift

F64 = torch.float64
METHODS = pytest.mark.parametrize("method", ["gaussian", "column"])


def psd(M: torch.Tensor):
    return function(M, {"positive_semidefinite"})


def decaying(n: int = N, dtype: torch.dtype = F64) -> torch.Tensor:
    return with_spectrum(torch.logspace(0, -8, n, dtype=F64), dtype=dtype)


@METHODS
@pytest.mark.parametrize("rho", [1e-3, 0.1, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_rank_is_the_damped_inverse(method, rho: float, dtype: torch.dtype) -> None:
    M, B = decaying(dtype=dtype), random(N, 3, dtype=dtype)
    damped = wide(M) + rho * eye(N)
    exact = solution_of(damped, B)
    bound = 1e-10 if dtype in (F64, torch.complex128) else 2e-3
    inside = solve(psd(M) + rho * Identity(N), B, Nystrom(N, method=method))
    assert error_of(inside.value, exact) < bound
    outside = solve(psd(M), B, Nystrom(N, damping=rho, method=method))
    assert error_of(outside.value, exact) < bound
    assert inside.status is outside.status is SolveStatus.completed


@METHODS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank_deficient_operator_is_no_failure(method, dtype: torch.dtype) -> None:
    # moskomule/hypergrad raises on a singular core.
    U = random(N, 4, dtype=dtype)
    M = U @ U.mH
    b, rho = random(N, dtype=dtype), 0.1
    exact = solution_of(wide(M) + rho * eye(N), b)
    solution = solve(psd(M) + rho * Identity(N), b, Nystrom(rank=12, method=method))
    assert error_of(solution.value, exact) < (1e-10 if dtype in (F64, torch.complex128) else 1e-3)
    if dtype == F64:
        assert solution.state.factor.basis.shape == (N, 4)


@METHODS
def test_large_damping_is_a_multiple_of_the_identity(method) -> None:
    M, b = decaying(), random(N)
    solution = solve(psd(M), b, Nystrom(rank=5, damping=1e9, method=method))
    assert error_of(1e9 * solution.value, b) < 1e-8


def test_column_form_is_that_of_the_paper() -> None:
    # (H_k + rho I)^-1 a = a / rho - C (M + C'C / rho)^-1 C'a / rho^2 with the columns drawn.
    H, a, rho = decaying() + 0.05 * eye(N), random(N), 0.3
    index = torch.randperm(N, generator=torch.Generator().manual_seed(7))[:6]
    C = H[:, index]
    core = C[index] + C.T @ C / rho
    expected = a / rho - C @ torch.linalg.solve(core, C.T @ a) / rho**2
    solution = solve(psd(H), a, Nystrom(rank=6, damping=rho, method="column", seed=7))
    assert error_of(solution.value, expected) < 1e-12


def test_column_form_takes_indefinite_operators() -> None:
    H = with_spectrum(torch.cat([torch.tensor([-0.5, -0.2]), torch.logspace(0, -3, 10)]).double())
    H = H - 1e-9 * eye(12)
    b = random(12)
    A = function(H, {"hermitian"})
    solution = solve(A, b, Nystrom(rank=12, damping=0.1, method="column"))
    assert error_of(solution.value, solution_of(H + 0.1 * eye(12), b)) < 1e-9
    with pytest.raises(NotPositiveDefiniteError, match=r"v\^H A v / v\^H v = -0\.\d+ was found"):
        solve(A, b, Nystrom(rank=12, damping=0.1))


@METHODS
def test_residual_is_that_of_the_operator_given(method) -> None:
    M, B = decaying(), random(N, 2)
    solution = solve(psd(M), B, Nystrom(rank=6, damping=0.1, method=method))
    assert torch.allclose(solution.residual, residual_of(M, solution.value, B))
    shifted = psd(M) + 0.1 * Identity(N)
    solution = solve(shifted, B, Nystrom(rank=6, method=method))
    expected = residual_of(M + 0.1 * eye(N), solution.value, B)
    assert torch.allclose(solution.residual, expected)
    assert (solution.residual < 0.3).all()


@METHODS
def test_error_falls_with_the_rank(method) -> None:
    M, b = decaying(60), random(60)
    A = psd(M) + 1e-3 * Identity(60)
    residuals = [float(solve(A, b, Nystrom(r, method=method)).residual) for r in (5, 20, 40, 60)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 1e-10


@METHODS
def test_chunks_change_nothing_but_the_width_of_products(method) -> None:
    M, b = decaying(), random(N)
    widths = []

    def product(X: torch.Tensor) -> torch.Tensor:
        widths.append(X.shape[1])
        return M @ X

    A = psd(M)
    A._forward = product
    recipes = [Nystrom(10, damping=0.1, method=method, chunk=chunk) for chunk in (None, 1, 4, 99)]
    whole, *chunked = [solve(A, b, recipe) for recipe in recipes]
    for solution in chunked:
        assert error_of(solution.value, whole.value) < 1e-12
        assert solution.products == whole.products == 11
    assert widths == [10, 1, *[1] * 10, 1, 4, 4, 2, 1, 10, 1]


@METHODS
def test_seed_decides(method) -> None:
    M, b = decaying(), random(N)
    solutions = [
        solve(psd(M), b, Nystrom(5, damping=0.1, method=method, seed=seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(solutions[0].value, solutions[1].value)
    assert not torch.equal(solutions[0].value, solutions[2].value)


def test_sketch_serves_other_right_hand_sides_and_shifts() -> None:
    M, b = decaying(), random(N)
    H = psd(M)
    first = solve(H + 0.1 * Identity(N), b, Nystrom(rank=N))
    for shift in (0.1, 0.5):
        A = H + shift * Identity(N)
        again = solve(A, 2 * b, Nystrom(rank=N), state=first.state)
        assert error_of(again.value, solution_of(M + shift * eye(N), 2 * b)) < 1e-10
        assert again.products == 1


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    solve(psd(decaying()), random(N), Nystrom(5, damping=0.1))
    assert torch.equal(torch.rand(1), expected)


# ---------------------------------------------------------------- the shift


def test_shift_is_seen_where_it_is_shown() -> None:
    H = psd(decaying())
    A = H + 0.25 * Identity(N)
    assert split_shift(A) == (H, 0.25)
    assert split_shift(A - 0.05 * Identity(N)) == (H, pytest.approx(0.2))
    assert split_shift(H) == (H, 0.0)
    both, shift = split_shift(A + psd(random(N, N)))
    assert (len(both.terms), shift) == (2, 0.25)
    low_rank = LowRank(random(N, 2))
    assert split_shift(low_rank + 2.0 * Identity(N)) == (low_rank, 2.0)
    kronecker = Kronecker(*[Dense(decaying(n), tags={"symmetric"}) for n in (4, 6)])
    assert split_shift(kronecker + 3.0 * Identity(N)) == (kronecker, 3.0)
    complex_operator = function(decaying(dtype=torch.complex128), {"hermitian"})
    shifted = complex_operator + 2j * Identity(N, dtype=torch.complex128)
    assert split_shift(shifted) == (shifted, 0.0)


def test_shift_is_damping() -> None:
    M, b = decaying(), random(N)
    shifted = solve(psd(M) + 0.1 * Identity(N), b, Nystrom(6))
    damped = solve(psd(M), b, Nystrom(6, damping=0.1))
    both = solve(psd(M) + 0.04 * Identity(N), b, Nystrom(6, damping=0.06))
    assert error_of(shifted.value, damped.value) < 1e-12
    assert error_of(both.value, damped.value) < 1e-12


def test_without_any_damping() -> None:
    with pytest.raises(SingularError, match=r"rank 5 of 24 and the damping is 0.*damping > 0"):
        solve(psd(decaying()), random(N), Nystrom(5))
    solution = solve(psd(decaying()), random(N), Nystrom(5), throw=False)
    assert solution.status is SolveStatus.singular
    # As a preconditioner it needs none.
    M = with_spectrum(torch.logspace(0, -3, N, dtype=F64))
    helped = solve(psd(M), random(N), CG(preconditioner=Nystrom(12)))
    assert helped.steps < solve(psd(M), random(N), CG()).steps


# ------------------------------------------------------------ preconditioner


def test_preconditioner_is_the_formula() -> None:
    M, mu = decaying(), 0.01
    A = psd(M) + mu * Identity(N)
    recipe = Nystrom(rank=6)
    state = recipe.prepare(A)
    U, values = state.factor.basis, state.factor.eigenvalues
    inside = U @ torch.diag((values[-1] + mu) / (values + mu)) @ U.T
    expected = inside + eye(N) - U @ U.T
    P = recipe.as_preconditioner(A, state)
    assert torch.allclose(P.to_dense(), expected)
    assert "positive_definite" in P.tags


def test_indefinite_sketch_cannot_precondition() -> None:
    H = with_spectrum(torch.linspace(-0.5, 1, N, dtype=F64))
    A = function(H, {"hermitian"})
    with pytest.raises(NotPositiveDefiniteError, match="it cannot precondition; raise the damping"):
        solve(A, random(N), CG(preconditioner=Nystrom(N, method="column")))


# ------------------------------------------------------------- what is refused


def test_rank_out_of_range() -> None:
    with pytest.raises(RankError, match="rank is 25, the operator has size 24"):
        solve(psd(decaying()), random(N), Nystrom(rank=25, damping=0.1), throw=False)
    with pytest.raises(RankError, match="rank is 0"):
        Nystrom(rank=0)


@pytest.mark.parametrize(
    "options", [{"damping": -1.0}, {"chunk": 0}, {"method": "rows"}, {"damping": float("nan")}]
)
def test_arguments_out_of_range(options) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(options))} is"):
        solve(psd(decaying()), random(N), Nystrom(rank=2, **{"damping": 0.1, **options}))


# -------------------------------------------------------------- to a target error


def test_tolerance_chooses_the_rank() -> None:
    M, b, mu = decaying(60), random(60), 1e-4
    A = psd(M) + mu * Identity(60)
    solution = solve(A, b, Nystrom(2, tolerance=mu))
    assert solution.status is SolveStatus.completed
    factor = solution.state.factor
    assert solution.info == {"rank": factor.basis.shape[1], "error": factor.error}
    assert factor.error <= mu
    helped = solve(A, b, CG(rtol=1e-10, preconditioner=Nystrom(2, tolerance=mu)))
    alone = solve(A, b, CG(rtol=1e-10))
    assert helped.status is alone.status is SolveStatus.converged
    assert helped.steps < alone.steps / 2
    assert error_of(helped.value, solution_of(M + mu * eye(60), b)) < 1e-6


def test_error_that_is_out_of_reach_is_said() -> None:
    A = psd(decaying(60)) + 1e-3 * Identity(60)
    solution = solve(A, random(60), Nystrom(2, tolerance=1e-7, max_rank=5))
    assert solution.info["rank"] == 5
    assert solution.info["error"] > 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_krylov_space_of_full_rank_is_the_damped_inverse(dtype: torch.dtype) -> None:
    M, B = decaying(dtype=dtype), random(N, 3, dtype=dtype)
    A = psd(M) + 0.1 * Identity(N)
    solution = solve(A, B, Nystrom(N // 2, method="block_krylov", depth=3))
    near = solution_of(wide(M) + 0.1 * eye(N), B)
    # Of rank 12 the spectrum 10^(-8 i / 23) leaves 6.7e-5.
    assert error_of(solution.value, near) < 2e-3
    assert solution.state.factor.products == N


def test_options_are_looked_at_before_any_work() -> None:
    with pytest.raises(ArgumentError, match="depth is 0"):
        Nystrom(3, depth=0)
    with pytest.raises(RankError, match="max_rank is 2"):
        Nystrom(3, tolerance=0.1, max_rank=2)
