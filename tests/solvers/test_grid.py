"""Every recipe on every kind of positive definite operator, block and dtype."""

from __future__ import annotations

import math
from dataclasses import replace

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

from woodbury import (
    CG,
    CUR,
    GMRES,
    MINRES,
    SOR,
    SSOR,
    UTV,
    BiCGSTAB,
    BlockJacobi,
    Chebyshev,
    Cholesky,
    Deflation,
    Dense,
    Diagonal,
    Eigh,
    GaussSeidel,
    GeneralizedNystrom,
    Identity,
    IncompleteCholesky,
    IncompleteLU,
    Jacobi,
    NearestKronecker,
    Neumann,
    Nystrom,
    Richardson,
    SketchPrecondition,
    inverse,
    solve,
)
from woodbury.errors import NonFiniteError, StructureError
from woodbury.solvers import LU, Recipe, SolveStatus, Structural

EXACT = {
    "default": None,
    "structural": Structural(),
    "cholesky": Cholesky(),
    "eigh": Eigh(),
    "lu": LU(),
    "nystrom": Nystrom(rank=N),
    "nystrom-column": Nystrom(rank=N, method="column"),
    "nystrom-chunks": Nystrom(rank=N, chunk=7),
    "nystrom-krylov": Nystrom(rank=N, method="block_krylov"),
    "nystrom-adaptive": Nystrom(rank=3, tolerance=0.0),
    "generalized-nystrom": GeneralizedNystrom(rank=N),
    "cur": CUR(rank=N),
    "utv": UTV(rank=N),
    "sketch-precondition": SketchPrecondition(rtol=1e-12),
}
ITERATIVE = {
    "cg": lambda rtol: CG(rtol=rtol),
    "cg-nystrom": lambda rtol: CG(rtol=rtol, preconditioner=Nystrom(rank=8)),
    "cg-cholesky": lambda rtol: CG(rtol=rtol, preconditioner=Cholesky()),
    "cg-neumann": lambda rtol: CG(rtol=rtol, preconditioner=Neumann(terms=2)),
    "minres": lambda rtol: MINRES(rtol=rtol),
    "minres-nystrom": lambda rtol: MINRES(rtol=rtol, preconditioner=Nystrom(rank=8)),
    "gmres": lambda rtol: GMRES(rtol=rtol),
    "gmres-restarted": lambda rtol: GMRES(rtol=rtol, restart=8),
    "gmres-nystrom": lambda rtol: GMRES(rtol=rtol, preconditioner=Nystrom(rank=8)),
    "gmres-flexible": lambda rtol: GMRES(rtol=rtol, preconditioner=CG(0.1), flexible=True),
    "bicgstab": lambda rtol: BiCGSTAB(rtol=rtol),
    "bicgstab-neumann": lambda rtol: BiCGSTAB(rtol=rtol, preconditioner=Neumann(terms=2)),
}
# Stationary and polynomial methods and preconditioners; tests/solvers/test_stationary.py has more.
FURTHER = {
    "richardson": lambda rtol: Richardson(rtol=rtol, max_steps=3000),
    "gauss-seidel": lambda rtol: GaussSeidel(rtol=rtol, max_steps=3000),
    "sor": lambda rtol: SOR(omega=1.2, rtol=rtol, max_steps=3000),
    "ssor": lambda rtol: SSOR(omega=1.2, rtol=rtol, max_steps=3000),
    "chebyshev": lambda rtol: Chebyshev(rtol=rtol, max_steps=3000),
    "chebyshev-jacobi": lambda rtol: Chebyshev(rtol, 0.0, 3000, Jacobi()),
    "deflation": lambda rtol: Deflation(rtol=rtol, rank=4),
    "cg-jacobi": lambda rtol: CG(rtol=rtol, preconditioner=Jacobi()),
    "cg-block-jacobi": lambda rtol: CG(rtol=rtol, preconditioner=BlockJacobi(size=5)),
    "cg-ssor": lambda rtol: CG(rtol=rtol, preconditioner=SSOR()),
    "cg-chebyshev": lambda rtol: CG(rtol=rtol, preconditioner=Chebyshev(degree=2)),
    "cg-incomplete-cholesky": lambda rtol: CG(rtol=rtol, preconditioner=IncompleteCholesky()),
    "cg-kronecker": lambda rtol: CG(rtol=rtol, preconditioner=NearestKronecker(sizes=(4, 6))),
    "gmres-incomplete-lu": lambda rtol: GMRES(rtol=rtol, preconditioner=IncompleteLU(drop=0.01)),
    "gmres-gauss-seidel": lambda rtol: GMRES(rtol=rtol, preconditioner=GaussSeidel()),
    "minres-ssor": lambda rtol: MINRES(rtol=rtol, preconditioner=SSOR()),
    "bicgstab-sor": lambda rtol: BiCGSTAB(rtol=rtol, preconditioner=SOR(omega=1.1)),
}
UNAIDED = ("cg", "minres", "gmres", "gmres-restarted", "bicgstab")
SHAPES = [(N,), (N, 1), (N, 4)]


def precision(dtype: torch.dtype) -> float:
    return 1e-10 if dtype in (torch.float64, torch.complex128) else 2e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXACT)
def test_recipes_without_a_tolerance(name: str, kind: str, dtype: torch.dtype) -> None:
    A, recipe = KINDS[kind](dtype), EXACT[name]
    if name == "structural" and not A.has_inverse:
        with pytest.raises(StructureError, match="no structural inverse"):
            solve(A, random(N, dtype=dtype), recipe)
        return
    M = wide(A.to_dense())
    for shape in SHAPES:
        b = random(*shape, dtype=dtype)
        solution = solve(A, b, recipe)
        assert solution.value.shape == b.shape
        assert solution.value.dtype == dtype
        assert error_of(solution.value, solution_of(M, b)) < precision(dtype)
        assert_certificate(solution, M, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*ITERATIVE, *FURTHER])
def test_recipes_with_a_tolerance(name: str, kind: str, dtype: torch.dtype) -> None:
    A = KINDS[kind](dtype)
    rtol = 1e-9 if dtype in (torch.float64, torch.complex128) else 1e-4
    M = wide(A.to_dense())
    for shape in SHAPES:
        b = random(*shape, dtype=dtype)
        solution = solve(A, b, (ITERATIVE | FURTHER)[name](rtol))
        assert solution.status is SolveStatus.converged
        assert (residual_of(M, solution.value, b) <= 1.01 * rtol).all()
        assert error_of(solution.value, solution_of(M, b)) < 60 * rtol
        assert_certificate(solution, M, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "recipe", [Cholesky(), Eigh(), LU(), CG(rtol=1e-12), Structural()], ids=str
)
def test_inverse_operator(recipe: Recipe, dtype: torch.dtype) -> None:
    A = KINDS["dense"](dtype)
    M = wide(A.to_dense())
    inverse_A = inverse(A, recipe, on_failure="ignore")
    dense = torch.linalg.inv(M)
    assert inverse_A.tags == A.tags
    assert error_of(inverse_A.to_dense(), dense) < 10 * precision(dtype)
    Y = random(N, 2, dtype=dtype)
    assert error_of(inverse_A.rmatmat(Y), dense.mH @ wide(Y)) < 10 * precision(dtype)


# ------------------------------------------------------------------ edge cases

F64 = torch.float64


def recipe_of(name: str, rtol: float = 1e-8, **options) -> Recipe:
    return replace(ITERATIVE[name](rtol), **options)


@pytest.mark.parametrize("name", ITERATIVE)
def test_multiple_of_the_identity(name: str) -> None:
    b = random(N, 2)
    solution = solve(
        Dense(3.0 * torch.eye(N, dtype=F64), tags={"positive_definite"}), b, recipe_of(name)
    )
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, b / 3) < 1e-8
    assert solution.steps <= 2


@pytest.mark.parametrize("name", ITERATIVE)
def test_one_by_one(name: str) -> None:
    recipe = recipe_of(name)
    if isinstance(recipe.preconditioner, Nystrom):
        recipe = replace(recipe, preconditioner=Nystrom(rank=1))
    solution = solve(
        Diagonal(torch.tensor([4.0], dtype=F64), tags={"positive_definite"}),
        torch.tensor([2.0], dtype=F64),
        recipe,
    )
    assert solution.status is SolveStatus.converged
    assert solution.value.item() == pytest.approx(0.5)
    assert solution.steps <= 1


@torch.no_grad()
@pytest.mark.parametrize("name", ITERATIVE)
def test_right_hand_side_of_zero(name: str) -> None:
    solution = solve(
        KINDS["function"](F64), torch.zeros(N, 2, dtype=F64), recipe_of(name), x0=random(N, 2)
    )
    assert solution.column_status == (SolveStatus.converged,) * 2
    assert not solution.value.any()
    assert (solution.steps, solution.products) == (0, 0)


@pytest.mark.parametrize("name", ITERATIVE)
def test_nothing_to_do(name: str) -> None:
    A = KINDS["function"](F64)
    recipe = recipe_of(name)
    state = recipe.prepare(A)
    b = random(N, 3)
    exact = solution_of(A.to_dense(), b)
    solution = solve(A, b, recipe, x0=exact, state=state)
    assert solution.status is SolveStatus.converged
    assert (solution.steps, solution.products) == (0, 3)
    assert torch.equal(solution.value, exact)


@pytest.mark.parametrize("name", ITERATIVE)
def test_no_steps_allowed(name: str) -> None:
    A = KINDS["function"](F64)
    recipe = recipe_of(name, max_steps=0)
    solution = solve(A, random(N), recipe, state=recipe.prepare(A), throw=False, history=True)
    assert solution.status is SolveStatus.max_steps
    assert (solution.steps, solution.products) == (0, 0)
    assert solution.residual == 1
    assert solution.history.tolist() == [1.0]
    assert not solution.value.any()


@pytest.mark.parametrize("name", sorted(set(ITERATIVE) - {"cg-cholesky"}))
def test_limit_of_steps(name: str) -> None:
    M = definite(condition=1e4)
    b = random(N, 2)
    solution = solve(
        function(M, {"positive_definite"}),
        b,
        recipe_of(name, max_steps=1, rtol=1e-14),
        throw=False,
        history=True,
    )
    assert solution.column_status == (SolveStatus.max_steps,) * 2
    assert solution.info["column_steps"] == [1, 1]
    assert torch.allclose(solution.residual, residual_of(M, solution.value, b), rtol=1e-9)
    assert (solution.residual <= 1.000001 * solution.history[-1]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", UNAIDED)
def test_no_number_in_the_operator(name: str, bad: float) -> None:
    M = definite()
    M[3, 5] = M[5, 3] = bad
    solution = solve(function(M, {"positive_definite"}), random(N, 2), recipe_of(name), throw=False)
    assert solution.column_status == (SolveStatus.non_finite,) * 2
    assert torch.isfinite(solution.value).all()


@pytest.mark.parametrize("name", ITERATIVE)
def test_no_number_in_the_right_hand_side(name: str) -> None:
    b = random(N, 2)
    b[4, 1] = math.nan
    with pytest.raises(NonFiniteError, match="row 4, column 1"):
        solve(KINDS["function"](F64), b, recipe_of(name))


@pytest.mark.parametrize("name", UNAIDED)
def test_columns_leave_one_by_one(name: str) -> None:
    M = with_spectrum(torch.linspace(1, 100, N, dtype=F64))
    _, vectors = torch.linalg.eigh(M)
    zero = torch.zeros(N, dtype=F64)
    # An eigenvector takes one step, a sum of two takes two, a random vector many.
    B = torch.stack([random(N), vectors[:, 3], zero, vectors[:, 1] + vectors[:, 7]], dim=1)
    widths = []
    A = function(M, {"positive_definite"})
    A._forward = lambda X: widths.append(X.shape[1]) or M @ X
    solution = solve(A, B, recipe_of(name, rtol=1e-9))
    steps = solution.info["column_steps"]
    assert steps[1:] == [1, 0, 2]
    assert steps[0] == solution.steps > 4
    assert solution.column_status == (SolveStatus.converged,) * 4
    assert solution.products == sum(widths)
    assert widths[0] == 3
    assert widths[-1] == 1
    assert not solution.value[:, 2].any()
    assert (residual_of(M, solution.value, B)[[0, 1, 3]] <= 1.001e-9).all()


@pytest.mark.parametrize("name", UNAIDED)
def test_block_is_its_columns(name: str) -> None:
    M, B = definite(condition=30), random(N, 4)
    A = function(M, {"positive_definite"})
    block = solve(A, B, recipe_of(name), history=True)
    for j in range(4):
        single = solve(A, B[:, j], recipe_of(name), history=True)
        assert abs(single.steps - block.info["column_steps"][j]) <= 1
        assert error_of(block.value[:, j], single.value) < 1e-6
        assert torch.allclose(block.history[:6, j], single.history[:6], rtol=1e-6)


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
@pytest.mark.parametrize("name", ["minres", "gmres", "gmres-restarted", "bicgstab"])
def test_indefinite(name: str, dtype: torch.dtype) -> None:
    spectrum = torch.linspace(1, 3, N, dtype=F64) * (-1) ** torch.arange(N)
    M = with_spectrum(spectrum, dtype=dtype)
    b = random(N, 3, dtype=dtype)
    recipe = recipe_of(name)
    if name == "gmres-restarted":
        recipe = replace(recipe, restart=16)
    solution = solve(function(M, {"hermitian"}), b, recipe)
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, solution_of(M, b)) < 1e-7


@pytest.mark.parametrize("name", UNAIDED)
def test_zero_rows_and_a_consistent_right_hand_side(name: str) -> None:
    A = Diagonal(torch.tensor([0.0, 1.0, 4.0, 0.0, 2.0], dtype=F64), tags={"positive_semidefinite"})
    b = torch.tensor([0.0, 1.0, 1.0, 0.0, 3.0], dtype=F64)
    solution = solve(A, b, recipe_of(name))
    assert solution.status is SolveStatus.converged
    assert solution.value.tolist() == pytest.approx([0.0, 1.0, 0.25, 0.0, 1.5])


@pytest.mark.parametrize("name", UNAIDED)
def test_the_zero_operator(name: str) -> None:
    solution = solve(0.0 * Identity(N, dtype=F64), random(N, 2), recipe_of(name), throw=False)
    expected = {
        "cg": SolveStatus.breakdown,
        "minres": SolveStatus.inconsistent,
        "gmres": SolveStatus.singular,
        "gmres-restarted": SolveStatus.singular,
        "bicgstab": SolveStatus.breakdown,
    }[name]
    assert solution.column_status == (expected,) * 2
    assert not solution.value.any()
    assert solution.residual.tolist() == [1, 1]


@pytest.mark.parametrize("name", UNAIDED)
def test_tolerance_below_rounding(name: str) -> None:
    M = definite(60, condition=100, dtype=torch.float32)
    b = random(60, 2, dtype=torch.float32)
    recipe = recipe_of(name, rtol=1e-9)
    if isinstance(recipe, GMRES):
        recipe = replace(recipe, restart=60)
    solution = solve(function(M, {"positive_definite"}), b, recipe)
    assert solution.status is SolveStatus.precision
    assert (residual_of(M, solution.value, b) < 2e-5).all()
    assert error_of(solution.value, solution_of(M, b)) < 1e-4


@pytest.mark.parametrize("name", UNAIDED)
@pytest.mark.parametrize("size", [1e-280, 1e-30, 1e30, 1e280])
def test_any_size_of_right_hand_side(name: str, size: float) -> None:
    M, b = definite(), random(N)
    solution = solve(
        function(M, {"positive_definite"}), size * b, recipe_of(name), x0=size * 0.1 * b
    )
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value / size, solution_of(M, b)) < 1e-6


@pytest.mark.parametrize("name", UNAIDED)
def test_warm_start(name: str) -> None:
    M, b = definite(condition=30), random(N)
    A = function(M, {"positive_definite"})
    exact = solution_of(M, b)
    cold = solve(A, b, recipe_of(name))
    warm = solve(A, b, recipe_of(name), x0=exact + 1e-6 * random(N, seed=5))
    assert warm.steps < cold.steps
    assert warm.status is SolveStatus.converged
    assert warm.residual <= 1e-8


@pytest.mark.parametrize("name", UNAIDED)
def test_absolute_tolerance(name: str) -> None:
    M, b = definite(), 1e-5 * random(N)
    solution = solve(function(M, {"positive_definite"}), b, recipe_of(name, rtol=0.0, atol=1e-6))
    assert solution.status is SolveStatus.converged
    assert (wide(M) @ solution.value - b).norm() <= 1e-6


def assert_certificate(solution, M: torch.Tensor, b: torch.Tensor) -> None:
    """What the solution says of itself is true."""
    true = residual_of(M, solution.value, b)
    rounding = 2e-4 if b.dtype in (torch.float32, torch.complex64) else 1e-11
    assert solution.residual.shape == b.shape[1:]
    assert torch.allclose(solution.residual, true, rtol=0.05, atol=rounding)
    assert solution.ok
    assert solution.history is None
    if b.dim() == 1:
        assert solution.column_status is None
    else:
        assert solution.column_status == (solution.status,) * b.shape[1]
    report = solution.certificate()
    assert report["ok"] is True
    assert report["residual"] == pytest.approx(float(solution.residual.max()))
    assert report["products"] == solution.products
