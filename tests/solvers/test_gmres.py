from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from tests.solvers.systems import (
    DTYPES,
    N,
    definite,
    error_of,
    function,
    random,
    residual_of,
    solution_of,
    wide,
)

from woodbury import CG, GMRES, LSMR, Dense, Diagonal, solve
from woodbury.errors import ArgumentError, DtypeError, ShapeError, TagError
from woodbury.solvers import LU, SolveReport, SolveStatus

F64 = torch.float64


def general(n: int = N, *, dtype: torch.dtype = F64, seed: int = 0) -> torch.Tensor:
    """Not normal, eigenvalues in a disc around 2."""
    return 2 * torch.eye(n, dtype=dtype) + 0.9 * random(n, n, dtype=dtype, seed=seed) / n**0.5


def plain(M: torch.Tensor):
    return function(M, set())


# ---------------------------------------------------- mathematics of the method


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_each_iterate_minimises_the_residual_in_its_krylov_space(dtype) -> None:
    M, b = general(12, dtype=dtype), random(12, dtype=dtype)
    krylov = [b]
    for step in range(1, 7):
        basis, _ = torch.linalg.qr(torch.stack(krylov, dim=1))
        best = basis @ torch.linalg.lstsq(M @ basis, b.unsqueeze(1)).solution.squeeze(1)
        found = solve(plain(M), b, GMRES(rtol=0.0, max_steps=step), throw=False, history=True)
        assert found.status is SolveStatus.max_steps
        assert (found.steps, found.products) == (step, step + 1)
        assert error_of(found.value, best) < 1e-10
        assert float(found.history[-1]) == pytest.approx(float(found.residual), rel=1e-9)
        krylov.append(M @ krylov[-1])


def test_the_residual_that_is_minimised_is_the_true_one() -> None:
    M, b, P = general(), random(N), torch.linalg.inv(general(seed=5))
    recipe = GMRES(rtol=0.0, max_steps=6, preconditioner=Dense(P))
    right = solve(plain(M), b, recipe, throw=False, history=True)
    product = solve(plain(M @ P), b, GMRES(rtol=0.0, max_steps=6), throw=False, history=True)
    assert error_of(right.value, P @ product.value) < 1e-10
    assert torch.allclose(right.history, product.history, rtol=1e-9)
    assert float(right.history[-1]) == pytest.approx(float(right.residual), rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_general_systems(dtype) -> None:
    M, b = general(dtype=dtype), random(N, 3, dtype=dtype)
    rtol = 1e-10 if dtype in (F64, torch.complex128) else 1e-5
    solution = solve(plain(M), b, GMRES(rtol=rtol))
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, solution_of(M, b)) < 20 * rtol
    assert solution.steps <= N


@pytest.mark.parametrize("restart", [5, 10, 30])
def test_same_steps_as_scipy(restart: int) -> None:
    M, b = general(100) + torch.diag(torch.linspace(0, 3, 100, dtype=F64)), random(100)
    theirs: list[float] = []
    scipy.sparse.linalg.gmres(
        M.numpy(),
        b.numpy(),
        rtol=1e-8,
        restart=restart,
        callback=theirs.append,
        callback_type="pr_norm",
    )
    solution = solve(plain(M), b, GMRES(rtol=1e-8, restart=restart), history=True)
    assert abs(solution.steps - len(theirs)) <= 1
    few = min(solution.steps, len(theirs)) - 1
    assert np.allclose(solution.history[1 : few + 1], theirs[:few], rtol=1e-5)


def test_happy_breakdown_has_the_solution() -> None:
    # b is the sum of two eigenvectors.
    M = torch.diag(torch.arange(1.0, N + 1, dtype=F64))
    b = torch.zeros(N, dtype=F64)
    b[3] = b[7] = 1
    solution = solve(plain(M), b, GMRES(rtol=1e-14))
    assert solution.status is SolveStatus.converged
    assert solution.steps == 2
    assert error_of(solution.value, solution_of(M, b)) < 1e-14


def test_a_breakdown_of_one_column_leaves_the_others_their_space() -> None:
    M = general()
    values, vectors = torch.linalg.eigh(definite())
    S = vectors @ torch.diag(values) @ vectors.T
    B = torch.stack([random(N), vectors[:, 2], vectors[:, 2] + vectors[:, 9]], dim=1)
    block = solve(plain(S), B, GMRES(rtol=1e-10))
    assert block.info["column_steps"][1:] == [1, 2]
    alone = solve(plain(S), B[:, 0], GMRES(rtol=1e-10))
    assert block.info["column_steps"][0] == alone.steps
    assert M.shape == S.shape


@hypothesis.given(n=st.integers(1, 12), seed=st.integers(0, 1000), columns=st.integers(1, 3))
@hypothesis.settings(max_examples=60, deadline=None)
def test_random_systems(n: int, seed: int, columns: int) -> None:
    M, b = general(n, seed=seed), random(n, columns, seed=seed + 1)
    condition = float(torch.linalg.cond(M))
    hypothesis.assume(condition < 1e3)
    solution = solve(plain(M), b, GMRES(rtol=1e-9))
    assert solution.status is SolveStatus.converged
    assert solution.steps <= n + 1
    assert error_of(solution.value, solution_of(M, b)) < 1e-9 * condition * 3


# ------------------------------------------------------------- preconditioner


def test_exact_inverse_takes_one_step() -> None:
    M, b = general(), random(N, 2)
    solution = solve(plain(M), b, GMRES(rtol=1e-10, preconditioner=LU()))
    assert solution.info["column_steps"] == [1, 1]
    assert (residual_of(M, solution.value, b) < 1e-10).all()


def test_a_flexible_preconditioner_may_be_another_in_each_step() -> None:
    M = definite(100, condition=1e4)
    A = function(M, {"positive_definite"})
    b = random(100, 2)
    with pytest.raises(TagError, match="CG is not a fixed linear function"):
        solve(A, b, GMRES(preconditioner=CG(0.1)))
    slow = solve(A, b, GMRES(rtol=1e-8, restart=20, max_steps=4000))
    fast = solve(A, b, GMRES(rtol=1e-8, restart=20, preconditioner=CG(0.01), flexible=True))
    assert fast.status is SolveStatus.converged
    assert fast.steps < slow.steps / 10
    assert (residual_of(M, fast.value, b) <= 1.01e-8).all()


def test_flexible_equals_fixed_where_nothing_changes() -> None:
    M, b, P = general(), random(N, 2), Dense(torch.linalg.inv(general(seed=5)))
    fixed, flexible = (
        solve(plain(M), b, GMRES(rtol=1e-9, restart=5, preconditioner=P, flexible=flag))
        for flag in (False, True)
    )
    assert fixed.steps == flexible.steps
    assert error_of(flexible.value, fixed.value) < 1e-9


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
@pytest.mark.parametrize("recipe", [LU(), "operator"], ids=["recipe", "operator"])
def test_the_transposed_solve_has_the_adjoint_of_the_preconditioner(recipe, dtype) -> None:
    M = general(dtype=dtype)
    P = LU() if recipe == "operator" else recipe
    if recipe == "operator":
        P = Dense(torch.linalg.inv(M))
    b, weights = random(N, dtype=dtype).requires_grad_(), random(N, dtype=dtype, seed=3)
    report = SolveReport()
    value = solve(plain(M), b, GMRES(rtol=1e-10, preconditioner=P), report=report).value
    torch.vdot(weights, value).real.backward()
    # With the preconditioner itself instead of its adjoint it would take many steps.
    assert report.last.steps == 1
    assert error_of(b.grad, solution_of(M.mH, weights)) < 1e-9


@pytest.mark.parametrize(
    ("preconditioner", "error", "message"),
    [
        (Diagonal(torch.ones(3, dtype=F64)), ShapeError, r"shape \(3, 3\)"),
        (Diagonal(torch.ones(N)), DtypeError, "float32, the operator torch.float64"),
    ],
)
def test_unfit_preconditioner_is_refused(preconditioner, error, message) -> None:
    with pytest.raises(error, match=message):
        solve(plain(general()), random(N), GMRES(preconditioner=preconditioner))


# --------------------------------------------------------- what may go wrong


def test_a_cycle_that_does_not_lower_the_residual_is_stagnation() -> None:
    # A cyclic shift: the residual stays what it is until step n.
    M = torch.roll(torch.eye(N, dtype=F64), 1, dims=0)
    b = torch.zeros(N, dtype=F64)
    b[0] = 1
    solution = solve(plain(M), b, GMRES(restart=N - 1), throw=False)
    assert solution.status is SolveStatus.stagnation
    assert solution.steps <= 2 * (N - 1)
    assert solution.residual == pytest.approx(1.0)
    whole = solve(plain(M), b, GMRES(restart=N))
    assert whole.steps == N
    assert error_of(whole.value, solution_of(M, b)) < 1e-12


def test_singular_and_consistent_is_solved() -> None:
    # Kernel and range of a normal matrix have nothing in common.
    M = torch.diag(torch.cat([torch.zeros(4, dtype=F64), torch.linspace(1, 2, N - 4, dtype=F64)]))
    b = M @ random(N, 2)
    solution = solve(plain(M), b, GMRES(rtol=1e-10))
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, torch.linalg.pinv(M) @ b) < 1e-9


def test_singular_and_not_consistent_is_found() -> None:
    nilpotent = torch.diag(torch.ones(N - 1, dtype=F64), 1)
    b = torch.zeros(N, 2, dtype=F64)
    b[-1, 0] = 1  # not in the range, and no power of the matrix brings it there
    b[:, 1] = torch.cat([torch.ones(N - 1, dtype=F64), torch.zeros(1, dtype=F64)])
    solution = solve(plain(nilpotent), b, GMRES(), throw=False)
    assert solution.column_status[0] is SolveStatus.singular
    assert solution.residual[0] == pytest.approx(1.0)
    assert torch.isfinite(solution.value).all()
    projector = torch.diag(torch.cat([torch.ones(N - 1, dtype=F64), torch.zeros(1, dtype=F64)]))
    b = torch.ones(N, dtype=F64)
    solution = solve(plain(projector), b, GMRES(), throw=False)
    assert solution.status is SolveStatus.singular
    exact = solve(plain(projector), b, LSMR(), throw=False)
    assert float(solution.residual) == pytest.approx(float(exact.residual))


def test_restarting_costs_steps_and_saves_memory() -> None:
    M, b = general(100) + torch.diag(torch.linspace(0, 6, 100, dtype=F64)), random(100)
    steps = [solve(plain(M), b, GMRES(rtol=1e-9, restart=m)).steps for m in (3, 10, 100)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > steps[2]


@pytest.mark.parametrize("limit", [1, 4, 5, 7])
def test_the_limit_of_steps_counts_over_cycles(limit: int) -> None:
    M, b = general(), random(N, 2)
    recipe = GMRES(rtol=1e-13, restart=5, max_steps=limit)
    solution = solve(plain(M), b, recipe, throw=False, history=True)
    assert solution.status is SolveStatus.max_steps
    assert solution.steps == limit
    assert len(solution.history) == limit + 1
    assert torch.allclose(solution.residual, residual_of(M, solution.value, b), rtol=1e-8)
    assert torch.allclose(solution.residual, solution.history[-1], rtol=1e-8)


@pytest.mark.parametrize("options", [{"restart": 0}, {"rtol": -1.0}, {"max_steps": -1}], ids=str)
def test_arguments_out_of_range(options: dict) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(options))} is .*; it must be"):
        GMRES(**options)


def test_half_precision_products() -> None:
    M = general(dtype=torch.float32).to(torch.bfloat16)
    b = random(N, dtype=torch.float32).to(torch.bfloat16)
    solution = solve(plain(M), b, GMRES(rtol=1e-1, max_steps=60), throw=False)
    assert solution.value.dtype == torch.bfloat16
    assert float(residual_of(wide(M), solution.value, b)) < 0.2


def test_a_blown_up_iterate_is_no_precision() -> None:
    """Rounding explains any residual of an iterate that is large enough; that is no answer."""
    for seed, n in ((12, 3), (17, 6), (28, 3), (36, 3), (37, 6), (69, 6)):
        generator = torch.Generator().manual_seed(seed)
        Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        spectrum = torch.randn(n, generator=generator, dtype=torch.float64)
        spectrum[0] = 0
        b = torch.randn(n, generator=generator, dtype=torch.float64)
        matrix = (Q * spectrum) @ Q.T
        A = Dense((matrix + matrix.T) / 2, tags={"hermitian"})
        solution = solve(A, b, GMRES(), throw=False)
        assert not solution.ok
        assert solution.status in (SolveStatus.stagnation, SolveStatus.singular)
