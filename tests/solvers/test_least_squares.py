"""LSMR and LSQR against LAPACK, and against each other's identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conformance import OperatorConformance
from tests.solvers.systems import (
    DTYPES,
    KINDS,
    N,
    definite,
    error_of,
    random,
    residual_of,
    solution_of,
    wide,
)

from woodbury import CG, LSMR, LSQR, Dense, Diagonal, FunctionOperator, Identity, inverse, solve
from woodbury.errors import (
    ArgumentError,
    DtypeError,
    NonFiniteError,
    ShapeError,
    SolveError,
    StructureError,
    TagError,
)
from woodbury.solvers import LU, SolveReport, SolveStatus

F64 = torch.float64
EACH = pytest.mark.parametrize("recipe", [LSMR, LSQR])
SHAPES = {"tall": (40, 15), "wide": (15, 40), "square": (20, 20)}


def matrix(m: int, n: int, rank: int, *, condition: float = 20.0, dtype=F64, seed: int = 3):
    """``[m, n]`` with singular values from 1 down to 1 / condition, and zeros."""
    drawn = torch.complex128 if dtype.is_complex else F64
    U, _ = torch.linalg.qr(random(m, rank, dtype=drawn, seed=seed))
    V, _ = torch.linalg.qr(random(n, rank, dtype=drawn, seed=seed + 1))
    values = torch.logspace(0, -math.log10(condition), rank, dtype=F64)
    return ((U * values.to(drawn)) @ V.mH).to(dtype)


def function(M: torch.Tensor) -> FunctionOperator:
    shape = (M.shape[0], M.shape[1])
    return FunctionOperator(
        lambda X: M @ X, shape, rmatmat=lambda Y: M.mH @ Y, dtype=M.dtype, tags=()
    )


def least_squares(M: torch.Tensor, b: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
    """The solution of smallest norm by LAPACK's SVD, or by a dense solve of the damped system."""
    M, b = wide(M), wide(b)
    if damping:
        gram = M.mH @ M + damping**2 * torch.eye(M.shape[1], dtype=M.dtype)
        return torch.linalg.solve(gram, M.mH @ b)
    rcond = 1e-4
    return torch.from_numpy(np.linalg.lstsq(M.numpy(), b.numpy(), rcond=rcond)[0])


def normal_residual_of(M: torch.Tensor, x: torch.Tensor, b: torch.Tensor) -> float:
    r = wide(b) - wide(M) @ wide(x)
    return float((wide(M).mH @ r).norm() / (r.norm() * torch.linalg.matrix_norm(wide(M), 2)))


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [15, 6])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("columns", [None, 1, 4])
def test_minimises(recipe, dtype, rank: int, shape: str, columns) -> None:
    m, n = SHAPES[shape]
    M = matrix(m, n, rank, dtype=dtype)
    b = random(*(m,) if columns is None else (m, columns), dtype=dtype)
    precise = dtype in (F64, torch.complex128)
    rtol = 1e-10 if precise else 1e-5
    solution = solve(function(M), b, recipe(rtol=rtol))
    exact = least_squares(M, b)
    consistent = rank == m
    wanted = SolveStatus.converged if consistent else SolveStatus.least_squares
    assert solution.status is wanted
    assert solution.value.shape == exact.shape
    assert error_of(solution.value, exact) < 500 * rtol
    true = residual_of(M, solution.value, b)
    assert torch.allclose(solution.residual, true, rtol=1e-4, atol=1e-11 if precise else 1e-5)
    assert len(solution.info["normal_residual"]) == (columns or 1)
    if not consistent:
        assert max(solution.info["normal_residual"]) <= rtol
    assert solution.history is None


@EACH
@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("start", [False, True])
def test_damped(recipe, dtype, shape: str, preconditioned: bool, start: bool) -> None:
    """Damping is of x whatever the preconditioner and the start: the damped problem is unique."""
    m, n = SHAPES[shape]
    M, b = matrix(m, n, 12, dtype=dtype), random(m, 3, dtype=dtype)
    scaling = Diagonal(torch.linspace(0.5, 2, n, dtype=F64).to(dtype)) if preconditioned else None
    found = recipe(rtol=1e-11, damping=0.1, preconditioner=scaling)
    x0 = random(n, 3, dtype=dtype, seed=8) if start else None
    solution = solve(Dense(M), b, found, x0=x0)
    exact = least_squares(M, b, damping=0.1)
    assert solution.status is SolveStatus.least_squares
    assert error_of(solution.value, exact) < 1e-8
    # The certificate is of the damped problem: A^H r = damping^2 x.
    r = wide(b) - wide(M) @ solution.value
    gradient = (wide(M).mH @ r - 0.01 * solution.value).norm(dim=0)
    stacked = torch.hypot(r.norm(dim=0), 0.1 * solution.value.norm(dim=0))
    top = math.hypot(1, 0.1)
    for j in range(3):
        assert solution.info["normal_residual"][j] >= 0.9 * float(gradient[j] / stacked[j] / top)
        assert solution.info["normal_residual"][j] <= 1e-11


@EACH
def test_estimates_of_the_norm_and_the_condition_number(recipe) -> None:
    M, b = matrix(60, 30, 30, condition=300), random(60)
    solution = solve(Dense(M), b, recipe(rtol=1e-12))
    assert solution.info["norm"] == pytest.approx(1, rel=0.3)
    assert solution.info["norm"] <= 1 + 1e-12
    assert solution.info["condition"] == pytest.approx(300, rel=0.01)
    # The claim is made against the norm from below, so it holds for the true norm.
    assert normal_residual_of(M, solution.value, b) <= 1e-12
    early = solve(Dense(M), b, recipe(rtol=1e-12, max_steps=4), throw=False)
    assert 1 <= early.info["condition"] < 300


@pytest.mark.parametrize(
    ("recipe", "peer"), [(LSMR, scipy.sparse.linalg.lsmr), (LSQR, scipy.sparse.linalg.lsqr)]
)
@pytest.mark.parametrize("consistent", [False, True])
def test_same_iterates_as_scipy(recipe, peer, consistent: bool) -> None:
    M = matrix(60, 40, 40, condition=100)
    b = M @ random(40) if consistent else random(60)
    name = "maxiter" if recipe is LSMR else "iter_lim"
    for steps in (1, 2, 4, 8):  # later rounding makes any two of them differ
        theirs = peer(M.numpy(), b.numpy(), atol=0, btol=0, conlim=0, **{name: steps})[0]
        ours = solve(Dense(M), b, recipe(rtol=0, max_steps=steps), throw=False)
        assert ours.status is SolveStatus.max_steps
        assert ours.steps == steps
        assert ours.products == 2 * steps + 3
        assert error_of(ours.value, torch.from_numpy(theirs)) < 1e-9


def test_what_each_minimises() -> None:
    """Over the same Krylov space LSQR has the smaller residual, LSMR that of the normal system."""
    M, b = matrix(50, 30, 30, condition=100), random(50)
    gram, right = M.T @ M, M.T @ b
    basis = [right]
    for steps in range(1, 6):
        K, _ = torch.linalg.qr(torch.stack(basis, dim=1))
        for recipe, least in (
            (LSQR, K @ torch.linalg.lstsq(M @ K, b[:, None]).solution[:, 0]),
            (LSMR, K @ torch.linalg.lstsq(gram @ K, right[:, None]).solution[:, 0]),
        ):
            found = solve(Dense(M), b, recipe(rtol=0, max_steps=steps), throw=False)
            assert error_of(found.value, least) < 1e-9
        basis.append(gram @ basis[-1] / basis[-1].norm())


def test_lsqr_is_cg_on_the_normal_equations() -> None:
    M, b = matrix(30, 20, 20, condition=10), random(30, 2)
    gram = Dense(M.T @ M, tags={"positive_definite"})
    for steps in (1, 3, 8):
        ours = solve(Dense(M), b, LSQR(rtol=0, max_steps=steps), throw=False)
        other = solve(gram, M.T @ b, CG(rtol=0, max_steps=steps), throw=False)
        assert error_of(ours.value, other.value) < 1e-10


@EACH
def test_monotone_history(recipe) -> None:
    M, b = matrix(50, 30, 30, condition=100), random(50, 2)
    solution = solve(Dense(M), b, recipe(rtol=1e-9), history=True)
    assert solution.history.shape == (solution.steps + 1, 2)
    assert (solution.history.diff(dim=0) <= 1e-14).all()
    assert torch.allclose(solution.history[0], torch.ones(2, dtype=F64))
    assert torch.allclose(solution.history[-1], solution.residual, rtol=1e-6)


def test_local_error_is_what_was_gained() -> None:
    M, b = matrix(50, 30, 30, condition=30), random(50)
    before = solve(Dense(M), b, LSQR(rtol=0, max_steps=9), throw=False)
    now = solve(Dense(M), b, LSQR(rtol=0, max_steps=14), throw=False)
    gained = (M @ (now.value - before.value)).norm()
    assert now.info["local_error"][0] == pytest.approx(float(gained / b.norm()), rel=1e-9)
    assert gained <= (M @ (least_squares(M, b) - before.value)).norm()
    block = torch.stack([b, torch.zeros_like(b), 1e150 * b], dim=1)
    errors = solve(Dense(M), block, LSQR(rtol=0, max_steps=14), throw=False).info["local_error"]
    assert errors[1] == 0
    assert errors[::2] == pytest.approx(2 * now.info["local_error"], rel=1e-3)


@EACH
def test_preconditioner_scales_columns(recipe) -> None:
    M = matrix(60, 30, 30, condition=5) * torch.logspace(0, 4, 30, dtype=F64)
    b = random(60, 2)
    scaling = Diagonal(1 / M.norm(dim=0))
    plain = solve(Dense(M), b, recipe(rtol=1e-10, max_steps=100), throw=False)
    scaled = solve(Dense(M), b, recipe(rtol=1e-10, preconditioner=scaling))
    assert plain.status is SolveStatus.max_steps
    assert scaled.status is SolveStatus.least_squares
    assert scaled.steps < 60
    assert max(scaled.info["normal_residual"]) <= 1e-10
    exact = torch.linalg.lstsq(M, b).solution
    assert error_of(scaled.value, exact) < 1e-5


@EACH
def test_recipe_as_preconditioner(recipe) -> None:
    M = definite(condition=1e4) + 0.01 * random(N, N)
    b = random(N)
    solution = solve(Dense(M), b, recipe(rtol=1e-10, preconditioner=LU()))
    assert solution.status is SolveStatus.converged
    assert solution.steps <= 2
    assert error_of(solution.value, solution_of(M, b)) < 1e-8


@EACH
def test_preconditioner_of_any_kind(recipe) -> None:
    """It needs no tag: an indefinite one only changes the path, NaN is noticed."""
    M, b = matrix(30, 12, 12), random(30)
    signs = torch.ones(12, dtype=F64)
    signs[::2] = -2
    solution = solve(Dense(M), b, recipe(rtol=1e-10, preconditioner=Diagonal(signs)))
    assert solution.status is SolveStatus.least_squares
    assert error_of(solution.value, least_squares(M, b)) < 1e-8
    signs[3] = math.nan
    broken = solve(Dense(M), b, recipe(preconditioner=Diagonal(signs)), throw=False)
    assert broken.status is SolveStatus.non_finite
    assert (broken.value == 0).all()


@EACH
def test_singular_preconditioner_restricts_the_solution(recipe) -> None:
    """x = M y stays in the range of M: the residual is least there, which is no success."""
    M, b = matrix(30, 12, 12), random(30)
    projection = torch.ones(12, dtype=F64)
    projection[8:] = 0
    found = recipe(rtol=1e-10, preconditioner=Diagonal(projection))
    solution = solve(Dense(M), b, found, throw=False)
    assert not solution.ok
    assert solution.info["normal_residual"][0] > 1e-3
    assert error_of(solution.value[:8], least_squares(M[:, :8], b)) < 1e-6
    assert (solution.value[8:] == 0).all()


@EACH
def test_columns_leave_the_block(recipe) -> None:
    widths = []
    M = matrix(30, 20, 20, condition=50)

    def product(X: torch.Tensor) -> torch.Tensor:
        widths.append(X.shape[1])
        return M @ X

    A = FunctionOperator(product, (30, 20), rmatmat=lambda Y: M.T @ Y, dtype=F64)
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    hard = random(30)
    b = torch.stack(
        [U[:, 0], torch.zeros(30, dtype=F64), hard, 2.0**500 * hard, U[:, 3] + U[:, 9]], 1
    )
    solution = solve(A, b, recipe(rtol=1e-10))
    names = [status.name for status in solution.column_status]
    assert names == ["converged", "converged", "least_squares", "least_squares", "converged"]
    assert error_of(solution.value[:, 0], Vh[0]) < 1e-9
    assert error_of(solution.value[:, 2], least_squares(M, hard)) < 1e-7
    assert error_of(solution.value[:, 3] / 2.0**500, least_squares(M, hard)) < 1e-7
    assert (solution.value[:, 1] == 0).all()
    steps = solution.info["column_steps"]
    assert steps[0] == 1
    assert steps[1] == 0
    assert steps[4] == 2
    assert steps[2] > 10
    assert solution.info["normal_residual"][1] == 0
    assert set(widths) >= {4, 3, 2}
    for j in (0, 2, 4):
        alone = solve(A, b[:, j], recipe(rtol=1e-10))
        assert error_of(solution.value[:, j], alone.value) < 1e-8
        assert alone.steps == pytest.approx(steps[j], abs=1)


@EACH
def test_start(recipe) -> None:
    M, b = matrix(30, 20, 20), random(30)
    exact = least_squares(M, b)
    done = solve(Dense(M), b, recipe(rtol=1e-8), x0=exact)
    assert (done.steps, done.status) == (0, SolveStatus.least_squares)
    assert torch.equal(done.value, exact)
    near = solve(Dense(M), b, recipe(rtol=1e-10), x0=exact + 1e-3 * random(20, seed=4))
    assert error_of(near.value, exact) < 1e-8
    solved = solve(Dense(M), M @ exact, recipe(), x0=exact)
    assert (solved.steps, solved.status) == (0, SolveStatus.converged)


@EACH
def test_start_leads_to_the_nearest_solution(recipe) -> None:
    M = matrix(10, 25, 10)
    b, x0 = random(10), random(25, seed=9)
    solution = solve(Dense(M), b, recipe(rtol=1e-12), x0=x0)
    assert solution.status is SolveStatus.converged
    nearest = x0 + torch.linalg.pinv(M) @ (b - M @ x0)
    assert error_of(solution.value, nearest) < 1e-10


@EACH
@pytest.mark.parametrize(
    ("M", "steps", "status"),
    [
        (3.0 * torch.eye(6, dtype=F64), 1, SolveStatus.converged),
        (-2.0 * torch.eye(6, dtype=F64), 1, SolveStatus.converged),
        (torch.diag(torch.tensor([1.0, 1, 1, -4, -4, 9], dtype=F64)), 3, SolveStatus.converged),
        (torch.diag(torch.tensor([2.0, 2, 2, 0, 0, 0], dtype=F64)), 1, SolveStatus.least_squares),
        (torch.zeros(6, 4, dtype=F64), 0, SolveStatus.least_squares),
        (torch.full((1, 1), 4.0, dtype=F64), 1, SolveStatus.converged),
        (torch.ones(5, 1, dtype=F64), 1, SolveStatus.least_squares),
        (torch.ones(1, 5, dtype=F64), 1, SolveStatus.converged),
    ],
    ids=["cI", "-cI", "diagonal", "zero rows", "zero", "1x1", "column", "row"],
)
@pytest.mark.parametrize("scale", [1.0, 1e-140, 1e140])
def test_few_distinct_singular_values(recipe, M, steps: int, status, scale: float) -> None:
    b = random(M.shape[0])
    solution = solve(Dense(M * scale), b, recipe(rtol=1e-10))
    assert (solution.steps, solution.status) == (steps, status)
    exact = torch.linalg.pinv(M) @ b
    assert torch.allclose(solution.value * scale, exact, atol=1e-12)


@EACH
def test_right_hand_side_outside_the_range(recipe) -> None:
    """``A^H b = 0``: zero is the least-squares solution, found before any step."""
    U, _, _ = torch.linalg.svd(matrix(12, 5, 5))
    solution = solve(Dense(matrix(12, 5, 5)), U[:, 11].contiguous(), recipe(rtol=1e-8))
    assert solution.ok
    assert solution.value.norm() < 1e-12
    assert solution.residual == pytest.approx(1)


@EACH
def test_step_limit(recipe) -> None:
    M, b = matrix(30, 20, 20, condition=1e3), random(30)
    with pytest.raises(SolveError, match=r"max_steps after 3 steps, 9 products.*raise max_steps"):
        solve(Dense(M), b, recipe(max_steps=3))
    nothing = solve(Dense(M), b, recipe(max_steps=0), throw=False)
    assert (nothing.status, nothing.steps) == (SolveStatus.max_steps, 0)
    assert (nothing.value == 0).all()
    assert nothing.residual == 1


@EACH
def test_beyond_the_precision_of_the_dtype(recipe) -> None:
    M, b = matrix(30, 20, 20, condition=100), random(30)
    flat = solve(Dense(M), b, recipe(rtol=0))
    assert flat.status is SolveStatus.precision
    assert error_of(flat.value, least_squares(M, b)) < 1e-11
    consistent = solve(Dense(M), M @ random(20), recipe(rtol=1e-17))
    assert consistent.status is SolveStatus.precision
    assert error_of(consistent.value, random(20)) < 1e-11


@EACH
def test_half_precision_products(recipe) -> None:
    M, b = matrix(30, 10, 10, condition=3), random(30)
    A = Dense(M.to(torch.bfloat16))
    solution = solve(A, b.to(torch.bfloat16), recipe(rtol=2e-2))
    assert solution.ok
    assert solution.value.dtype == torch.bfloat16
    exact = least_squares(M.to(torch.bfloat16).to(F64), b.to(torch.bfloat16).to(F64))
    assert error_of(solution.value, exact) < 0.1


@EACH
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(recipe, bad: float) -> None:
    M, b = matrix(12, 8, 8), random(12, 2)
    M[3, 2] = bad
    solution = solve(Dense(M), b, recipe(), throw=False)
    assert solution.status is SolveStatus.non_finite
    assert (solution.value == 0).all()
    b[1, 1] = bad
    with pytest.raises(NonFiniteError, match="the first in row 1, column 1"):
        solve(Dense(matrix(12, 8, 8)), b, recipe())


@EACH
def test_not_finite_on_the_way(recipe) -> None:
    M, calls = matrix(12, 8, 8), []

    def product(X: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return M @ X if len(calls) != 4 else torch.full((12, X.shape[1]), math.nan, dtype=F64)

    A = FunctionOperator(product, (12, 8), rmatmat=lambda Y: M.T @ Y, dtype=F64)
    solution = solve(A, random(12), recipe(rtol=1e-12), throw=False)
    assert (solution.status, solution.steps) == (SolveStatus.non_finite, 3)
    third = solve(Dense(M), random(12), recipe(rtol=1e-12, max_steps=3), throw=False)
    assert torch.allclose(solution.value, third.value)
    assert torch.allclose(solution.residual, third.residual)


@EACH
def test_drift_is_found_out(recipe) -> None:
    """Products that are off by little: what is claimed is checked, and said to be out of reach."""
    M, calls = matrix(30, 20, 20, condition=5), []

    def product(X: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        noise = random(30, X.shape[1], seed=len(calls))
        return M @ X + 1e-5 * X.norm() * noise / noise.norm()

    A = FunctionOperator(product, (30, 20), rmatmat=lambda Y: M.T @ Y, dtype=F64)
    solution = solve(A, M @ random(20), recipe(rtol=1e-10), throw=False)
    assert solution.status in (SolveStatus.stagnation, SolveStatus.max_steps)
    assert solution.residual < 1e-3


@EACH
def test_wrong_arguments(recipe) -> None:
    A, b = Dense(matrix(12, 8, 8)), random(12)
    for arguments in ({"damping": -1.0}, {"damping": math.nan}, {"rtol": -1.0}, {"max_steps": -1}):
        with pytest.raises(ArgumentError, match="must be"):
            recipe(**arguments)
    with pytest.raises(ShapeError, match=r"must be \(8, 8\)"):
        solve(A, b, recipe(preconditioner=Identity(12, dtype=F64)))
    with pytest.raises(DtypeError, match="preconditioner is torch.float32"):
        solve(A, b, recipe(preconditioner=Identity(8)))
    with pytest.raises(TagError, match="fixed linear function"):
        solve(A, b, recipe(preconditioner=LSMR()))
    with pytest.raises(ShapeError, match=r"expected \[12\] or \[12, k\]"):
        solve(A, random(8), recipe())
    with pytest.raises(ShapeError, match=r"x0 has shape .* expected \[8\] or \[8, k\]"):
        solve(A, b, recipe(), x0=random(12))
    with pytest.raises(ShapeError, match="columns must agree"):
        solve(A, b, recipe(), x0=random(8, 2))
    with pytest.raises(ShapeError, match=r"for least squares use LSMR\(\) or QR\(\)"):
        solve(A, b, CG())


@EACH
def test_operator_without_an_adjoint(recipe) -> None:
    A = FunctionOperator(lambda X: X[:5], (5, 8), dtype=F64)
    with pytest.raises(StructureError, match="no adjoint product"):
        solve(A, random(5), recipe())


class TestPseudoInverse(OperatorConformance):
    def make(self):
        cases = []
        for m, n, rank in ((6, 4, 4), (4, 6, 4), (6, 5, 3)):
            for dtype in (F64, torch.complex128):
                M = matrix(m, n, rank, condition=4, dtype=dtype)
                pinv = torch.linalg.pinv(M, rtol=1e-8)
                for recipe in (LSMR(rtol=1e-13), LSQR(rtol=1e-13)):
                    cases.append((inverse(Dense(M), recipe), pinv))
        return cases


@EACH
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_adjoint_with_a_preconditioner(recipe, damping: float, shape: str, dtype) -> None:
    """The preconditioner changes sides: the adjoint is that of the map ``b -> x``, whatever M is.

    Without damping ``x = M (A M)^+ b``, also where ``A`` is wide and the solution not unique.
    """
    m, n = SHAPES[shape]
    A = Dense(matrix(m, n, min(m, n), dtype=dtype))
    M = Dense(definite(n, condition=4, dtype=dtype) + 0.1 * random(n, n, dtype=dtype))
    report = SolveReport()
    found = recipe(rtol=1e-11, damping=damping, preconditioner=M)
    inverse_A = inverse(A, found, report=report)
    if damping:
        eye = torch.eye(n, dtype=dtype)
        exact = torch.linalg.solve(A.matrix.mH @ A.matrix + damping**2 * eye, A.matrix.mH)
    else:
        exact = M.matrix @ torch.linalg.pinv(A.matrix @ M.matrix)
    b, g = random(m, 2, dtype=dtype), random(n, 2, dtype=dtype, seed=6)
    assert error_of(inverse_A @ b, exact @ b) < 1e-7
    assert error_of(inverse_A.rmatmat(g), exact.mH @ g) < 1e-7
    assert report.ok
    if not damping and m > n:  # A^H y = g has a solution, so the true residual says it all
        assert report.last.status is SolveStatus.converged


@EACH
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_gradient_of_the_right_hand_side(recipe, shape: str, damping: float) -> None:
    m, n = SHAPES[shape]
    M = matrix(m, n, min(m, n), condition=3)
    b = random(m, 2).requires_grad_()
    found = recipe(rtol=1e-12, damping=damping)
    assert torch.autograd.gradcheck(
        lambda b: solve(Dense(M), b, found).value, b, eps=1e-4, atol=1e-6
    )
    weights = random(n, 2, seed=5)
    (gradient,) = torch.autograd.grad((solve(Dense(M), b, found).value * weights).sum(), b)
    if not damping:
        assert error_of(gradient, torch.linalg.pinv(M).T @ weights) < 1e-9


@EACH
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_operators(recipe, kind: str) -> None:
    for dtype in DTYPES:
        rtol = 1e-10 if dtype in (F64, torch.complex128) else 1e-4
        A, b = KINDS[kind](dtype), random(N, 2, dtype=dtype)
        solution = solve(A, b, recipe(rtol=rtol, max_steps=40 * N))
        assert solution.status is SolveStatus.converged
        exact = solution_of(A.to_dense(), b)
        assert error_of(solution.value, exact) < 2e4 * rtol


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@EACH
def test_random_shapes_and_ranks(recipe, data) -> None:
    m, n = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 25))
    rank = data.draw(st.integers(0, min(m, n)))
    seed, k = data.draw(st.integers(0, 10**6)), data.draw(st.integers(1, 3))
    condition = data.draw(st.sampled_from([1.0, 3.0, 30.0]))
    damping = data.draw(st.sampled_from([0.0, 0.0, 0.2]))
    dtype = data.draw(st.sampled_from([F64, torch.complex128]))
    if rank:
        M = matrix(m, n, rank, condition=condition, dtype=dtype, seed=seed)
    else:
        M = torch.zeros(m, n, dtype=dtype)
    b = random(m, k, dtype=dtype, seed=seed + 2)
    solution = solve(Dense(M), b, recipe(rtol=1e-11, damping=damping, max_steps=500))
    exact = least_squares(M, b, damping) if rank else torch.zeros(n, k, dtype=dtype)
    assert torch.allclose(solution.value, exact, atol=1e-7, rtol=1e-7)
    undamped_and_full = rank == m and not damping
    for status in solution.column_status:
        if undamped_and_full:
            assert status is SolveStatus.converged
        else:
            assert status in (SolveStatus.least_squares, SolveStatus.precision)
