from __future__ import annotations

import math

import pytest
import torch
from tests.solvers.systems import (
    DTYPES,
    KINDS,
    N,
    definite,
    error_of,
    function,
    random,
    residual_of,
    solution_of,
    wide,
    with_spectrum,
)

from woodbury import CG, Dense, Diagonal, Nystrom, solve
from woodbury.errors import TagError
from woodbury.solvers import BlockCG, SolveStatus

F64 = torch.float64


def spd(M: torch.Tensor):
    return function(M, {"positive_definite"})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_operator(kind: str, dtype: torch.dtype) -> None:
    A = KINDS[kind](dtype)
    M = wide(A.to_dense())
    rtol = 1e-9 if dtype in (F64, torch.complex128) else 1e-4
    for shape in [(N,), (N, 1), (N, 4), (N, N)]:
        b = random(*shape, dtype=dtype)
        for preconditioner in (None, Nystrom(rank=8)):
            solution = solve(A, b, BlockCG(rtol=rtol, preconditioner=preconditioner))
            assert solution.status is SolveStatus.converged
            assert (residual_of(M, solution.value, b) <= 1.01 * rtol).all()


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_each_iterate_is_optimal_in_the_space_of_the_block(dtype, preconditioned) -> None:
    M, B = definite(40, dtype=dtype), random(40, 3, dtype=dtype)
    P = definite(40, condition=20, dtype=dtype, seed=3) if preconditioned else None
    operator = Dense(P, tags={"positive_definite"}) if preconditioned else None
    apply = (lambda X: P @ X) if preconditioned else (lambda X: X)
    krylov = apply(B)
    for step in range(1, 5):
        basis, _ = torch.linalg.qr(krylov)
        best = basis @ torch.linalg.solve(basis.mH @ M @ basis, basis.mH @ B)
        recipe = BlockCG(rtol=0.0, max_steps=step, preconditioner=operator)
        found = solve(spd(M), B, recipe, throw=False)
        assert found.column_status == (SolveStatus.max_steps,) * 3
        assert found.info["block_steps"] == found.steps == step
        assert error_of(found.value, best) < 1e-9
        krylov = torch.cat([krylov, apply(M @ krylov[:, -3:])], dim=1)


def test_n_over_k_steps_at_most() -> None:
    M, B = definite(60, condition=20), random(60, 6)
    solution = solve(spd(M), B, BlockCG(rtol=1e-9), history=True)
    assert solution.info["block_steps"] <= 11
    assert solution.steps <= 15  # rounding is left to the columns one by one
    assert len(solution.history) == solution.steps + 1
    assert solve(spd(M), B, CG(rtol=1e-9)).steps > 2 * solution.steps


def test_dependent_columns_are_left_to_conjugate_gradients() -> None:
    M, B = definite(), random(N, 3)
    B[:, 2] = 2 * B[:, 0] - B[:, 1]
    solution = solve(spd(M), B, BlockCG(rtol=1e-10))
    assert solution.status is SolveStatus.converged
    assert solution.info["block_steps"] == 0
    assert error_of(solution.value, solution_of(M, B)) < 1e-8


def test_columns_that_are_solved_early_do_not_spoil_the_rest() -> None:
    M = with_spectrum(torch.linspace(1, 100, 60, dtype=F64))
    _, vectors = torch.linalg.eigh(M)
    B = torch.stack([vectors[:, 3], random(60), vectors[:, 1] + vectors[:, 7]], dim=1)
    solution = solve(spd(M), B, BlockCG(rtol=1e-10))
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, solution_of(M, B)) < 1e-8


def test_columns_of_very_different_size() -> None:
    M = definite()
    B = random(N, 3) * torch.tensor([1e-12, 1.0, 1e12], dtype=F64)
    solution = solve(spd(M), B, BlockCG(rtol=1e-9))
    assert solution.status is SolveStatus.converged
    assert (residual_of(M, solution.value, B) <= 1.001e-9).all()


@torch.no_grad()
def test_edges() -> None:
    M, B = definite(), random(N, 3)
    zero = solve(spd(M), 0 * B, BlockCG())
    assert (zero.steps, zero.products, zero.status) == (0, 0, SolveStatus.converged)
    exact = solution_of(M, B)
    done = solve(spd(M), B, BlockCG(rtol=1e-8), x0=exact)
    assert (done.steps, done.status) == (0, SolveStatus.converged)
    assert torch.equal(done.value, exact)
    none = solve(spd(M), B, BlockCG(max_steps=0), throw=False)
    assert (none.steps, none.status) == (0, SolveStatus.max_steps)
    one = solve(
        Diagonal(torch.tensor([4.0], dtype=F64), tags={"positive_definite"}), B[:1], BlockCG()
    )
    assert torch.allclose(one.value, B[:1] / 4)
    M[3, 5] = M[5, 3] = math.nan
    bad = solve(spd(M), B, BlockCG(), throw=False)
    assert bad.column_status == (SolveStatus.non_finite,) * 3
    with pytest.raises(TagError, match="BlockCG needs the tag 'hermitian'"):
        solve(function(definite(), set()), B, BlockCG())


def test_negative_curvature_is_a_status() -> None:
    M = with_spectrum(torch.linspace(-0.5, 3, N, dtype=F64))
    solution = solve(function(M, {"hermitian"}), random(N, 3), BlockCG(), throw=False)
    assert solution.status is SolveStatus.negative_curvature
    p = solution.info["direction"]
    assert float(p @ M @ p) == pytest.approx(solution.info["curvature"])
    assert torch.isfinite(solution.value).all()


def test_preconditioner_that_is_not_definite_is_a_status() -> None:
    P = Diagonal(torch.cat([torch.ones(N - 1, dtype=F64), torch.tensor([-9.0], dtype=F64)]))
    B = torch.zeros(N, 2, dtype=F64)
    B[-1], B[0, 1] = 1, 0.1
    solution = solve(spd(definite()), B, BlockCG(preconditioner=P), throw=False)
    assert solution.column_status == (SolveStatus.indefinite_preconditioner,) * 2


def test_float32_ends_at_rounding() -> None:
    M = definite(60, condition=100, dtype=torch.float32)
    B = random(60, 4, dtype=torch.float32)
    solution = solve(spd(M), B, BlockCG(rtol=1e-9))
    assert solution.status is SolveStatus.precision
    assert error_of(solution.value, solution_of(M, B)) < 1e-4


def test_gradient() -> None:
    M = definite()
    B, weights = random(N, 3).requires_grad_(), random(N, 3, seed=4)
    (solve(spd(M), B, BlockCG(rtol=1e-10)).value * weights).sum().backward()
    assert error_of(B.grad, solution_of(M, weights)) < 1e-8
