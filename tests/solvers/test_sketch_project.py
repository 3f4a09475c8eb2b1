"""Sketch-and-project and Kaczmarz: special cases exactly, rates in the mean, verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import torch
from tests.solvers.systems import DTYPES, definite, error_of, function, random, wide, with_spectrum
from tests.solvers.test_cg import Weighted

from woodbury import Dense, Diagonal, Identity, Kaczmarz, SketchProject, Sparse, inverse, solve
from woodbury.errors import ArgumentError, NonFiniteError, SolveError, StructureError, TagError
from woodbury.solvers import SolveStatus

F64 = torch.float64
METRICS = pytest.mark.parametrize("metric", ["identity", "energy", "normal"])
SKETCHES = pytest.mark.parametrize("sketch", ["coordinate", "gaussian"])
BLOCKS = pytest.mark.parametrize("block", [1, 3])


def spd(M: torch.Tensor) -> Dense:
    return Dense(M, tags={"hermitian", "positive_definite"})


def drawn(weights: torch.Tensor, steps: int, seed: int) -> list[int]:
    """What a recipe with this seed draws, for blocks of one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights, 1024, replacement=True, generator=generator)[:steps].tolist()


def after(A, b: torch.Tensor, recipe, steps: int, **options) -> torch.Tensor:
    """The iterate after a number of steps."""
    values = {**recipe.__dict__, "max_steps": steps, "rtol": 0.0}
    return solve(A, b, type(recipe)(**values), throw=False, **options).value


# ------------------------------------------------------- special cases, exactly


def test_kaczmarz_is_the_method_of_strohmer_and_vershynin() -> None:
    M, b = random(9, 5), random(9, seed=3)
    x, A = np.zeros(5), M.numpy()
    for i in drawn(M.square().sum(1), 40, seed=7):
        x = x + (b[i].item() - A[i] @ x) / (A[i] @ A[i]) * A[i]
    found = after(Dense(M), b, Kaczmarz(seed=7), 40)
    assert error_of(found, torch.from_numpy(x)) < 1e-13


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("sampling", ["norms", "uniform"])
def test_kaczmarz_is_sketch_and_project_with_coordinates(block: int, sampling: str) -> None:
    A, b = Dense(random(9, 5)), random(9, 2, seed=3)
    options = {"block": block, "sampling": sampling, "seed": 2}
    found = after(A, b, Kaczmarz(**options), 25)
    same = after(A, b, SketchProject(metric="identity", sketch="coordinate", **options), 25)
    assert torch.equal(found, same)


def test_energy_metric_is_coordinate_descent() -> None:
    M = definite(8)
    b, x, A = random(8), np.zeros(8), M.numpy()
    for i in drawn(M.diagonal(), 40, seed=1):
        x[i] += (b[i].item() - A[i] @ x) / A[i, i]
    found = after(spd(M), b, SketchProject(metric="energy", seed=1), 40)
    assert error_of(found, torch.from_numpy(x)) < 1e-13


def test_normal_metric_is_coordinate_descent_for_least_squares() -> None:
    M, b = random(9, 5), random(9, seed=3)
    x, A = np.zeros(5), M.numpy()
    for j in drawn(M.square().sum(0), 40, seed=1):
        x[j] += A[:, j] @ (b.numpy() - A @ x) / (A[:, j] @ A[:, j])
    found = after(Dense(M), b, SketchProject(metric="normal", seed=1), 40)
    assert error_of(found, torch.from_numpy(x)) < 1e-13


@METRICS
def test_gaussian_step_is_the_formula(metric: str) -> None:
    # Gower and Richtarik 2015, equation 2.3, one step with B = I, A or A^T A.
    M, b, x = definite(8), random(8), random(8, seed=5)
    recipe = SketchProject(metric=metric, sketch="gaussian", block=3, seed=4)
    found = after(spd(M), b, recipe, 1, x0=x)
    S = torch.randn(8, 3, dtype=F64, generator=torch.Generator().manual_seed(4))
    B = {"identity": torch.eye(8, dtype=F64), "energy": M, "normal": M.T @ M}[metric]
    S = M @ S if metric == "normal" else S
    G = torch.linalg.inv(B) @ M.T @ S
    expected = x + G @ torch.linalg.inv(S.T @ M @ G) @ S.T @ (b - M @ x)
    assert error_of(found, expected) < 1e-10


@METRICS
@SKETCHES
def test_each_step_solves_its_equations_by_the_nearest_point(metric: str, sketch: str) -> None:
    M, exact = definite(8), random(8, seed=2)
    B = {"identity": torch.eye(8, dtype=F64), "energy": M, "normal": M.T @ M}[metric]
    recipe = SketchProject(metric=metric, sketch=sketch, block=2)
    last = exact
    for steps in range(1, 6):
        x = after(spd(M), M @ exact, recipe, steps)
        before = after(spd(M), M @ exact, recipe, steps - 1)
        error, moved = x - exact, x - before
        # Pythagoras in the metric: what is left is orthogonal to the step.
        assert abs(float(error @ B @ moved)) < 1e-10
        assert float(error @ B @ error) <= float((before - exact) @ B @ (before - exact)) + 1e-12
        last = error
    assert float(last @ B @ last) < float(exact @ B @ exact)


@METRICS
@SKETCHES
def test_block_of_everything_solves_in_one_step(metric: str, sketch: str) -> None:
    M, b = definite(8), random(8)
    found = after(spd(M), b, SketchProject(metric=metric, sketch=sketch, block=8), 1)
    assert error_of(found, torch.linalg.solve(M, b)) < 1e-8


# ------------------------------------------------------------------ rates, in the mean


def mean_and_spread(numbers: list[float]) -> tuple[float, float]:
    mean = sum(numbers) / len(numbers)
    variance = sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1)
    return mean, math.sqrt(variance / len(numbers))


@pytest.mark.parametrize(("recipe", "rate"), [
    (Kaczmarz(), 1 - 1 / 12),
    (Kaczmarz(sampling="uniform", block=3), 1 - 3 / 12),
    (SketchProject(sketch="gaussian"), 1 - 1 / 12),
    (SketchProject(sketch="gaussian", block=4), 1 - 4 / 12),
], ids=str)  # fmt: skip
def test_expected_rate_is_exact_for_an_orthogonal_matrix(recipe, rate: float) -> None:
    Q, _ = torch.linalg.qr(random(12, 12))
    exact = random(12, seed=4)
    found = []
    for seed in range(300):
        values = {**recipe.__dict__, "seed": seed}
        x = after(Dense(Q), Q @ exact, type(recipe)(**values), 6)
        found.append(float((x - exact).norm() ** 2 / exact.norm() ** 2))
    mean, spread = mean_and_spread(found)
    assert abs(mean - rate**6) < 4 * spread
    assert spread < 0.1 * mean


@pytest.mark.parametrize("shape", [(20, 6), (12, 12)], ids=str)
def test_expected_rate_of_kaczmarz(shape) -> None:
    # Strohmer and Vershynin 2009, theorem 2, and exactly: E e' = (I - A^T A / |A|_F^2) e.
    M = random(*shape) @ torch.diag(torch.logspace(0, -0.5, shape[1], dtype=F64))
    exact = random(shape[1], seed=4)
    steps, squares, errors = 30, [], []
    for seed in range(300):
        error = after(Dense(M), M @ exact, Kaczmarz(seed=seed), steps) - exact
        errors.append(error)
        squares.append(float(error @ error))
    frobenius = float(M.square().sum())
    smallest = float(torch.linalg.svdvals(M)[-1])
    mean, spread = mean_and_spread(squares)
    assert mean < (1 - smallest**2 / frobenius) ** steps * float(exact @ exact) + 4 * spread
    contraction = torch.eye(shape[1], dtype=F64) - M.T @ M / frobenius
    expected = -torch.linalg.matrix_power(contraction, steps) @ exact
    stacked = torch.stack(errors)
    deviation = (stacked.mean(0) - expected).abs() / (stacked.std(0) / math.sqrt(300))
    assert float(deviation.max()) < 4


def test_expected_rate_of_coordinate_descent() -> None:
    # Leventhal and Lewis 2010: E e' = (I - A / tr A) e with coordinates drawn by the diagonal.
    M, exact, steps = definite(10, condition=8), random(10, seed=4), 30
    errors = torch.stack(
        [
            after(spd(M), M @ exact, SketchProject(metric="energy", seed=seed), steps) - exact
            for seed in range(300)
        ]
    )
    contraction = torch.eye(10, dtype=F64) - M / M.trace()
    expected = -torch.linalg.matrix_power(contraction, steps) @ exact
    deviation = (errors.mean(0) - expected).abs() / (errors.std(0) / math.sqrt(300))
    assert float(deviation.max()) < 4
    energies = (errors @ M * errors).sum(1)
    bound = (1 - float(torch.linalg.eigvalsh(M)[0] / M.trace())) ** steps * float(exact @ M @ exact)
    assert float(energies.mean()) < bound


# ------------------------------------------------------------------------ solves


@METRICS
@SKETCHES
@BLOCKS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_solves_to_the_tolerance(metric, sketch, block: int, dtype: torch.dtype) -> None:
    M = definite(10, condition=4, dtype=dtype)
    rtol = 1e-8 if dtype in (F64, torch.complex128) else 1e-4
    recipe = SketchProject(rtol, metric=metric, sketch=sketch, block=block, max_steps=20_000)
    for shape in ((10,), (10, 3)):
        b = random(*shape, dtype=dtype)
        solution = solve(spd(M), b, recipe, history=True)
        assert solution.status is SolveStatus.converged
        exact = torch.from_numpy(scipy.linalg.solve(wide(M).numpy(), wide(b).numpy()))
        assert error_of(solution.value, exact) < 10 * rtol
        assert bool((solution.residual <= rtol).all())
        assert len(solution.history) == -(-solution.steps // recipe.sweep(spd(M))) + 1


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)], ids=str)
@BLOCKS
def test_kaczmarz_finds_the_solution_of_smallest_norm(shape, block: int) -> None:
    M = random(*shape)
    b = M @ random(shape[1], seed=3)
    exact = torch.linalg.pinv(M) @ b
    sparse = Sparse(scipy.sparse.csr_array(M.numpy()))
    for A in (Dense(M), sparse, function(M, set())):
        solution = solve(A, b, Kaczmarz(1e-9, block=block))
        assert solution.status is SolveStatus.converged
        assert error_of(solution.value, exact) < 1e-7
        sweeps = solution.steps // -(-shape[0] // block)
        assert solution.products == shape[1] + sweeps


def test_normal_metric_minimises() -> None:
    M, b = random(30, 8), random(30, 2, seed=3)
    for A in (Dense(M), Sparse(scipy.sparse.csr_array(M.numpy()))):
        for sketch in ("coordinate", "gaussian"):
            solution = solve(A, b, SketchProject(1e-9, metric="normal", sketch=sketch, block=2))
            assert solution.status is SolveStatus.least_squares
            assert error_of(solution.value, torch.linalg.lstsq(M, b).solution) < 1e-7
            assert max(solution.info["normal_residual"]) <= 1e-9


@METRICS
def test_sparse_and_dense_take_the_same_steps(metric: str) -> None:
    M = definite(9)
    sparse = Sparse(scipy.sparse.csr_array(M.numpy()), tags={"hermitian", "positive_definite"})
    for block in (1, 3):
        recipe = SketchProject(metric=metric, block=block)
        found = [after(A, random(9), recipe, 20) for A in (spd(M), sparse)]
        assert error_of(found[1], found[0]) < 1e-12


# --------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    "recipe",
    [Kaczmarz(), Kaczmarz(block=4), SketchProject(sketch="gaussian", block=2)],
    ids=str,
)
def test_no_solution_is_said_and_proved(recipe) -> None:
    M, b = random(30, 6), random(30, seed=3)
    with pytest.raises(SolveError, match="inconsistent"):
        solve(Dense(M), b, recipe)
    solution = solve(Dense(M), b, recipe, throw=False)
    assert solution.status is SolveStatus.inconsistent
    assert error_of(solution.value, torch.linalg.lstsq(M, b).solution) < 1e-5
    assert 0.1 < float(solution.residual) < 1
    # A column with a solution is not taken down by one without.
    B = torch.stack([b, M @ random(6)], 1)
    both = solve(Dense(M), B, recipe, throw=False)
    assert both.column_status == (SolveStatus.inconsistent, SolveStatus.converged)


def test_slow_is_not_inconsistent() -> None:
    M = with_spectrum(torch.logspace(0, -4, 12, dtype=F64))
    solution = solve(Dense(M), M @ random(12), Kaczmarz(1e-12, max_steps=12 * 60), throw=False)
    assert solution.status is SolveStatus.max_steps
    assert solution.steps == 12 * 60


def test_singular_systems_with_and_without_a_solution() -> None:
    M = with_spectrum(torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0], dtype=F64))
    A = Dense(M, tags={"positive_semidefinite"})
    inside, outside = M @ random(5), random(5)
    for metric in ("identity", "energy"):
        good = solve(A, inside, SketchProject(1e-9, metric=metric))
        assert good.status is SolveStatus.converged
        bad = solve(A, outside, SketchProject(1e-9, metric=metric), throw=False)
        assert bad.status is SolveStatus.inconsistent
        r = outside - M @ bad.value
        assert float((M @ r).norm()) < 1e-8 * float(r.norm())


def test_zero_rows() -> None:
    M = random(12, 5)
    M[[2, 7]] = 0
    b = M @ random(5)
    for recipe in (Kaczmarz(1e-8), Kaczmarz(1e-8, block=20), Kaczmarz(1e-8, sampling="uniform")):
        assert solve(Dense(M), b, recipe).status is SolveStatus.converged
        b[7] = 1.0
        found = solve(Dense(M), b, recipe, throw=False)
        assert found.status is SolveStatus.inconsistent
        assert found.steps == 0  # it is seen at once
        b[7] = 0.0


def test_negative_curvature_is_shown() -> None:
    M = with_spectrum(torch.linspace(-0.5, 2, 9, dtype=F64))
    A = Dense(M)
    A.tags = frozenset({"symmetric", "hermitian", "positive_semidefinite", "positive_definite"})
    for options in ({"sketch": "gaussian", "block": 4}, {"block": 8}):
        solution = solve(A, random(9), SketchProject(metric="energy", **options), throw=False)
        assert solution.status is SolveStatus.negative_curvature
        d = solution.info["direction"]
        assert float(d @ M @ d) == pytest.approx(solution.info["curvature"])
        assert solution.info["curvature"] < 0
    D = Diagonal(torch.tensor([1.0, -2.0, 3.0], dtype=F64))
    D.tags = A.tags
    solution = solve(D, random(3), SketchProject(metric="energy"), throw=False)
    assert solution.status is SolveStatus.negative_curvature
    assert solution.info["curvature"] == -2.0


@METRICS
@SKETCHES
def test_edge_cases(metric: str, sketch: str) -> None:
    recipe = SketchProject(1e-9, metric=metric, sketch=sketch, max_steps=5000)
    b = random(7)
    same = solve(3.0 * Identity(7, dtype=F64), b, recipe)
    assert error_of(same.value, b / 3) < 1e-8
    diagonal = Diagonal(torch.linspace(1, 3, 7, dtype=F64), tags={"positive_definite"})
    assert error_of(solve(diagonal, b, recipe).value, b / diagonal.diagonal()) < 1e-8
    one = solve(spd(torch.full((1, 1), 4.0, dtype=F64)), torch.ones(1, dtype=F64), recipe)
    assert one.value.item() == pytest.approx(0.25)
    M = definite(7, condition=4)
    exact = torch.linalg.solve(M, b)
    solved = solve(spd(M), b, recipe, x0=exact)
    assert (solved.status, solved.steps) == (SolveStatus.converged, 0)
    assert torch.equal(solved.value, exact)
    nothing = solve(spd(M), torch.zeros(7, dtype=F64), recipe)
    assert torch.equal(nothing.value, torch.zeros(7, dtype=F64))
    none = solve(spd(M), b, SketchProject(metric=metric, sketch=sketch, max_steps=0), throw=False)
    assert (none.status, none.steps) == (SolveStatus.max_steps, 0)
    B = torch.stack([b, torch.zeros(7, dtype=F64), M @ torch.ones(7, dtype=F64)], 1)
    X0 = torch.stack([torch.zeros(7), torch.zeros(7), torch.ones(7)], 1).double()
    block = solve(spd(M), B, recipe, x0=X0)
    assert block.status is SolveStatus.converged
    assert block.info["column_steps"][1:] == [0, 0]
    assert block.info["column_steps"][0] > 0


def test_zero_operator() -> None:
    A = Dense(torch.zeros(4, 3, dtype=F64))
    solution = solve(A, random(4), Kaczmarz(), throw=False)
    assert solution.status is SolveStatus.inconsistent
    assert torch.equal(solution.value, torch.zeros(3, dtype=F64))


def test_seed_decides_and_the_global_state_is_left_alone() -> None:
    A, b = Dense(random(9, 5)), random(9)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    for recipe in (Kaczmarz, SketchProject):
        first, second, other = (after(A, b, recipe(seed=seed), 20) for seed in (0, 0, 1))
        assert torch.equal(first, second)
        assert not torch.equal(first, other)
    assert torch.equal(torch.rand(1), expected)


def test_gradient_and_inverse() -> None:
    M = definite(6, condition=3)
    b = random(6).requires_grad_()
    recipe = Kaczmarz(1e-12)
    assert torch.autograd.gradcheck(lambda b: solve(spd(M), b, recipe).value, b)
    assert error_of(inverse(spd(M), recipe).to_dense(), torch.linalg.inv(M)) < 1e-9
    # The adjoint of least squares is the solution of smallest norm, and the other way about.
    tall = random(9, 4)
    found = inverse(Dense(tall), SketchProject(1e-12, metric="normal"))
    assert error_of(found.to_dense(), torch.linalg.pinv(tall)) < 1e-8
    assert error_of(found.rmatmat(random(4, 2)), torch.linalg.pinv(tall).T @ random(4, 2)) < 1e-8
    wide_inverse = inverse(Dense(tall.T.contiguous()), recipe)
    assert error_of(wide_inverse.to_dense(), torch.linalg.pinv(tall.T)) < 1e-8
    assert (
        error_of(wide_inverse.rmatmat(random(9, 2)), torch.linalg.pinv(tall) @ random(9, 2)) < 1e-8
    )


@pytest.mark.parametrize("shape", [(8, 3), (3, 8)], ids=str)
def test_derivatives_with_respect_to_the_matrix(shape) -> None:
    M = random(*shape).requires_grad_()
    tall = shape[0] > shape[1]
    recipe = SketchProject(1e-13, metric="normal") if tall else Kaczmarz(1e-13, max_steps=10_000)
    b = random(shape[0]).requires_grad_()

    def value(M: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return solve(Dense(M), b, recipe, throw=False).value

    assert torch.autograd.gradcheck(value, (M, b), rtol=1e-4)
    exact = torch.linalg.pinv(M) @ b
    expected = torch.autograd.grad(exact.square().sum(), (M, b))
    found = torch.autograd.grad(value(M, b).square().sum(), (M, b))
    for got, want in zip(found, expected, strict=True):
        assert error_of(got, want) < 1e-8


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite(bad: float) -> None:
    M, b = definite(6), random(6)
    M[2, 3] = bad
    with pytest.raises(NonFiniteError, match="matrix of Dense holds NaN or infinity"):
        solve(Dense(M), b, Kaczmarz())
    for recipe in (Kaczmarz(), SketchProject(sketch="gaussian")):
        status = solve(Dense(M), b, recipe, throw=False).status
        assert status is SolveStatus.non_finite
    b[1] = bad
    with pytest.raises(NonFiniteError, match="b are NaN or infinite"):
        solve(Dense(definite(6)), b, Kaczmarz())


@pytest.mark.parametrize("scale", [1e-300, 1e200])
def test_entries_whose_squares_leave_the_range(scale: float) -> None:
    M = scale * random(9, 4)
    b = M @ torch.ones(4, dtype=F64)
    for recipe in (Kaczmarz(), SketchProject(metric="normal")):
        with pytest.raises(NonFiniteError, match="scale the operator and b"):
            solve(Dense(M), b, recipe)
    # Gaussian sketches cannot know; they must not claim what they have not reached.
    recipe = SketchProject(metric="normal", sketch="gaussian", max_steps=40)
    assert not solve(Dense(M), b, recipe, throw=False).ok


def test_what_is_refused() -> None:
    for options in (
        {"metric": "kl"},
        {"sketch": "hadamard"},
        {"sampling": "greedy"},
        {"block": 0},
        {"rtol": -1.0},
        {"max_steps": -2},
    ):
        with pytest.raises(ArgumentError, match=f"{next(iter(options))} is"):
            SketchProject(**options)
    with pytest.raises(ArgumentError, match="block is 0"):
        Kaczmarz(block=0)
    with pytest.raises(TagError, match="needs the tag 'positive_semidefinite'"):
        solve(Dense(random(5, 5)), random(5), SketchProject(metric="energy"))
    A = function(definite(6), set())
    A.space = A.out_space = Weighted(torch.ones(6, dtype=F64))
    with pytest.raises(StructureError, match="inner product of its own"):
        solve(A, random(6), Kaczmarz())


@pytest.mark.parametrize("recipe", [Kaczmarz(), SketchProject()], ids=repr)
def test_columns_of_a_block_that_have_no_solution_are_found_together(recipe) -> None:
    A = random(6, 6)
    A[5] = A[0]
    b = random(6, 3, seed=3)
    b[5, 1] = b[0, 1]  # this one has a solution
    b[:, 2] = 2 * b[:, 0]  # these two end at the same step
    solution = solve(Dense(A), b, recipe, throw=False)
    assert solution.column_status[0] is SolveStatus.inconsistent
    assert solution.column_status[2] is SolveStatus.inconsistent
    assert solution.column_status[1] is not SolveStatus.inconsistent
    best = scipy.linalg.lstsq(A.numpy(), b.numpy(), cond=1e-12)[0]
    least = np.linalg.norm(b.numpy() - A.numpy() @ best, axis=0) / np.linalg.norm(b.numpy(), axis=0)
    assert np.allclose(solution.residual[[0, 2]], least[[0, 2]], rtol=1e-4)
