from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import scipy.sparse.linalg
import torch
from tests.solvers.systems import (
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

from woodbury import CG, Dense, Diagonal, Identity, Nystrom, Space, solve
from woodbury.errors import ArgumentError, DtypeError, ShapeError, SolveError, TagError
from woodbury.solvers import SolveStatus

F64 = torch.float64


def spd(M: torch.Tensor):
    return function(M, {"positive_definite"})


# ------------------------------------------------- what goes wrong elsewhere


def test_multiple_of_the_identity_takes_one_step() -> None:
    # hypertorch and BOAT return the iterate before the last: zeros for A = 2 I.
    b = random(N)
    solution = solve(2.0 * Identity(N, dtype=F64), b, CG())
    assert torch.allclose(solution.value, b / 2, rtol=1e-15)
    assert (solution.steps, solution.products) == (1, 2)


def test_residual_falls_as_in_the_textbook() -> None:
    # moskomule/hypergrad uses the old residual for the new direction: 0.37/0.34/0.47/0.77.
    M = with_spectrum(torch.linspace(1, 5, 10, dtype=F64))
    solution = solve(spd(M), random(10), CG(rtol=1e-13), history=True)
    assert solution.steps <= 10
    assert solution.history[5] < 0.05
    assert solution.history[10] < 1e-12


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
def test_scale_of_the_operator_does_not_matter(scale: float) -> None:
    # Betty's CG is right for one scale only.
    M, b = definite(), random(N)
    plain = solve(spd(M), b, CG(rtol=1e-8))
    scaled = solve(spd(scale * M), b, CG(rtol=1e-8))
    assert scaled.steps == plain.steps
    assert torch.allclose(scale * scaled.value, plain.value, rtol=1e-6)


def test_default_tolerance_is_a_tolerance() -> None:
    # linear_operator's default tolerance is 1.
    M, b = definite(), random(N)
    assert error_of(solve(spd(M), b, CG()).value, solution_of(M, b)) < 1e-4


# ---------------------------------------------------- mathematics of the method


def test_each_iterate_is_optimal_in_its_krylov_space() -> None:
    M, b = definite(12), random(12)
    exact = solution_of(M, b)
    krylov = [b]
    for step in range(1, 6):
        basis, _ = torch.linalg.qr(torch.stack(krylov, dim=1))
        best = basis @ torch.linalg.solve(basis.T @ M @ basis, basis.T @ b)
        found = solve(spd(M), b, CG(rtol=0.0, max_steps=step), throw=False)
        assert found.status is SolveStatus.max_steps
        assert error_of(found.value, best) < 1e-10
        krylov.append(M @ krylov[-1])
    assert (best - exact).norm() > 1e-3


def test_as_many_steps_as_distinct_eigenvalues() -> None:
    spectrum = torch.tensor([1.0] * 20 + [4.0] * 15 + [9.0] * 5, dtype=F64)
    solution = solve(spd(with_spectrum(spectrum)), random(40), CG(rtol=1e-12))
    assert solution.steps == 3


def test_same_steps_as_scipy() -> None:
    # Beyond n steps rounding decides in which one the tolerance is met: hence the sum of several.
    theirs, ours = 0, 0
    for seed in range(6):
        M, b = definite(200, condition=1e4, seed=seed), random(200, seed=seed + 1)
        count: list[int] = []
        scipy.sparse.linalg.cg(M.numpy(), b.numpy(), rtol=1e-8, callback=lambda x: count.append(1))
        solution = solve(spd(M), b, CG(rtol=1e-8))
        assert solution.products == solution.steps + 1
        theirs, ours = theirs + len(count), ours + solution.steps
    assert abs(ours - theirs) <= 0.02 * theirs


@hypothesis.given(
    eigenvalues=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
    columns=st.integers(1, 3),
)
@hypothesis.settings(max_examples=60)
def test_random_spectra(eigenvalues: list[float], seed: int, columns: int) -> None:
    M = with_spectrum(torch.tensor(eigenvalues, dtype=F64), seed=seed)
    b = random(len(eigenvalues), columns, seed=seed + 1)
    solution = solve(spd(M), b, CG(rtol=1e-8, max_steps=500))
    assert solution.status is SolveStatus.converged
    assert (residual_of(M, solution.value, b) <= 1.001e-8).all()
    assert error_of(solution.value, solution_of(M, b)) < 1e-8 * 1e6


# ------------------------------------------------------------------- blocks


def test_block_is_its_columns() -> None:
    M, B = definite(condition=1e3), random(N, 5)
    block = solve(spd(M), B, CG(rtol=1e-9), history=True)
    for j in range(5):
        single = solve(spd(M), B[:, j], CG(rtol=1e-9), history=True)
        assert abs(single.steps - block.info["column_steps"][j]) <= 1
        assert torch.allclose(single.value, block.value[:, j], rtol=1e-6, atol=1e-8)
        assert torch.allclose(block.history[:10, j], single.history[:10], rtol=1e-6)
    assert block.steps == max(block.info["column_steps"])


def test_columns_leave_the_block_as_they_converge() -> None:
    spectrum = torch.linspace(1, 100, N, dtype=F64)
    M = with_spectrum(spectrum)
    _, vectors = torch.linalg.eigh(M)
    widths = []

    def product(X: torch.Tensor) -> torch.Tensor:
        widths.append(X.shape[1])
        return M @ X

    A = function(M, {"positive_definite"})
    A._forward = product
    # An eigenvector takes one step, a sum of two takes two, a random vector many.
    B = torch.stack([vectors[:, 3], vectors[:, 1] + vectors[:, 7], random(N)], dim=1)
    solution = solve(A, B, CG(rtol=1e-9))
    steps = solution.info["column_steps"]
    assert steps[:2] == [1, 2]
    assert steps[2] > 10
    # Three columns, the check of the first, two, the check of the second, one from then on.
    assert widths == [3, 1, 2, 1] + [1] * (steps[2] - 1)
    assert solution.products == sum(widths) == sum(steps) + 3


def test_statuses_are_those_of_the_columns() -> None:
    A = Diagonal(torch.tensor([1.0, 2.0, -1.0], dtype=F64))
    B = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=F64)
    solution = solve(A, B, CG(), throw=False)
    expected = (SolveStatus.converged, SolveStatus.breakdown, SolveStatus.converged)
    assert solution.column_status == expected
    assert solution.status is SolveStatus.breakdown
    assert torch.allclose(solution.value[:, 0], torch.tensor([1.0, 0.5, 0.0], dtype=F64))
    assert solution.residual[2] == 0
    assert not solution.ok
    with pytest.raises(SolveError, match=r"breakdown in 1 of 3 columns \(1\)"):
        solve(A, B, CG())


# -------------------------------------------------------------- preconditioner


def test_preconditioner_is_used_in_the_right_place() -> None:
    spectrum = torch.cat([torch.logspace(0, 4, 10, dtype=F64), torch.ones(190, dtype=F64)])
    M, b = with_spectrum(spectrum), random(200)
    exact_inverse = Dense(torch.linalg.inv(M), tags={"positive_definite"})
    solution = solve(spd(M), b, CG(rtol=1e-10, preconditioner=exact_inverse))
    assert solution.steps == 1
    decaying = with_spectrum(torch.logspace(0, -8, 200, dtype=F64))
    A = function(decaying, {"positive_semidefinite"}) + 1e-5 * Identity(200)
    plain = solve(A, b, CG(rtol=1e-8))
    helped = solve(A, b, CG(rtol=1e-8, preconditioner=Nystrom(rank=120)))
    assert helped.steps < plain.steps / 5
    assert helped.residual <= 1e-8


def test_jacobi_equals_scaling_by_hand() -> None:
    scales = torch.logspace(0, 3, N, dtype=F64)
    M = scales[:, None] * definite() * scales
    M = (M + M.T) / 2
    root = torch.diagonal(M).sqrt()
    b = random(N)
    jacobi = Diagonal(1 / torch.diagonal(M), tags={"positive_definite"})
    left = solve(spd(M), b, CG(rtol=0, max_steps=7, preconditioner=jacobi), throw=False)
    scaled = M / root[:, None] / root
    right = solve(spd(scaled), b / root, CG(rtol=0, max_steps=7), throw=False)
    assert error_of(left.value, right.value / root) < 1e-8


def test_indefinite_preconditioner_is_found() -> None:
    P = Diagonal(torch.cat([torch.ones(N - 1, dtype=F64), torch.tensor([-9.0], dtype=F64)]))
    b = torch.zeros(N, dtype=F64)
    b[-1] = 1
    with pytest.raises(SolveError, match="the preconditioner is not positive definite"):
        solve(spd(definite()), b, CG(preconditioner=P))
    solution = solve(spd(definite()), random(N, 2), CG(preconditioner=-1 * P), throw=False)
    assert solution.column_status == (SolveStatus.indefinite_preconditioner,) * 2
    assert (solution.steps, solution.products) == (0, 0)


def test_preconditioner_with_nan_is_found() -> None:
    P = function(torch.full((N, N), math.nan, dtype=F64), {"positive_definite"})
    solution = solve(spd(definite()), random(N), CG(preconditioner=P), throw=False)
    assert solution.status is SolveStatus.non_finite


@pytest.mark.parametrize(
    ("preconditioner", "error", "message"),
    [
        (function(definite(), set()), TagError, "promise 'positive_definite'"),
        (
            Diagonal(torch.ones(3, dtype=F64)),
            ShapeError,
            r"shape \(3, 3\), the operator \(24, 24\)",
        ),
        (Diagonal(torch.ones(N)), DtypeError, "float32, the operator torch.float64"),
        (CG(), TagError, "CG is not a fixed linear function"),
    ],
)
def test_unfit_preconditioner_is_refused(preconditioner, error, message) -> None:
    with pytest.raises(error, match=message):
        solve(spd(definite()), random(N), CG(preconditioner=preconditioner))


# ------------------------------------------------------- starts and limits


def test_warm_start_takes_fewer_steps() -> None:
    M, b = definite(condition=1e3), random(N)
    exact = solution_of(M, b)
    cold = solve(spd(M), b, CG(rtol=1e-8))
    warm = solve(spd(M), b, CG(rtol=1e-8), x0=exact + 1e-6 * random(N, seed=5))
    assert warm.steps < cold.steps
    assert warm.residual <= 1e-8
    assert error_of(warm.value, exact) < 1e-5


def test_already_solved() -> None:
    M, B = definite(), random(N, 2)
    exact = solution_of(M, B)
    solution = solve(spd(M), B, CG(rtol=1e-8), x0=exact)
    assert solution.status is SolveStatus.converged
    assert (solution.steps, solution.products) == (0, 2)
    assert torch.equal(solution.value, exact)


def test_budget_of_no_steps() -> None:
    M, b = definite(), random(N)
    solution = solve(spd(M), b, CG(max_steps=0), throw=False, history=True)
    assert solution.status is SolveStatus.max_steps
    assert (solution.steps, solution.products) == (0, 0)
    assert torch.equal(solution.value, torch.zeros_like(b))
    assert solution.residual == 1
    assert solution.history.tolist() == [1.0]


def test_limit_of_steps_returns_the_last_iterate() -> None:
    M, b = definite(100, condition=1e6), random(100)
    exact = solution_of(M, b)

    def energy(x: torch.Tensor) -> float:
        return float((x - exact) @ M @ (x - exact))

    found = [solve(spd(M), b, CG(max_steps=k), throw=False) for k in (0, 5, 10, 20, 40)]
    energies = [energy(solution.value) for solution in found]
    assert energies == sorted(energies, reverse=True)
    for solution in found:
        assert torch.allclose(solution.residual, residual_of(M, solution.value, b), rtol=1e-6)
    with pytest.raises(SolveError, match=r"max_steps after 5 steps, 6 products.*raise max_steps"):
        solve(spd(M), b, CG(max_steps=5))


def test_absolute_tolerance() -> None:
    M, b = definite(), 1e-5 * random(N)
    solution = solve(spd(M), b, CG(rtol=0.0, atol=1e-6))
    assert solution.status is SolveStatus.converged
    assert (wide(M) @ solution.value - b).norm() <= 1e-6
    assert solution.steps < solve(spd(M), b, CG(rtol=1e-10)).steps


@pytest.mark.parametrize("size", [1e-280, 1e-30, 1e30, 1e280])
def test_any_size_of_right_hand_side(size: float) -> None:
    M, b = definite(), random(N)
    plain = solve(spd(M), b, CG())
    solution = solve(spd(M), size * b, CG(), x0=size * 0.1 * b)
    assert solution.status is SolveStatus.converged
    assert torch.allclose(solution.value / size, plain.value, rtol=1e-4, atol=1e-6)


def test_tiny_float32_right_hand_side_is_not_zero() -> None:
    # Its square underflows: taken for zero it would be solved by zero.
    M, b = definite(dtype=torch.float32), 1e-30 * random(N, dtype=torch.float32)
    solution = solve(spd(M), b, CG(rtol=1e-4, atol=1e-36))
    assert solution.steps > 5
    assert error_of(solution.value, solution_of(M, b)) < 1e-2


@pytest.mark.parametrize(
    "options", [{"rtol": -1.0}, {"rtol": math.nan}, {"atol": math.inf}, {"max_steps": -1}], ids=str
)
def test_arguments_out_of_range(options: dict) -> None:
    name = next(iter(options))
    with pytest.raises(ArgumentError, match=f"{name} is .*; it must be"):
        CG(**options)


# --------------------------------------------------------- what may go wrong


def test_negative_curvature_is_found_and_shown() -> None:
    spectrum = torch.linspace(-0.5, 3, N, dtype=F64)
    M = with_spectrum(spectrum)
    A, b = function(M, {"hermitian"}), random(N)
    solution = solve(A, b, CG(), throw=False)
    assert solution.status is SolveStatus.negative_curvature
    p = solution.info["direction"]
    assert float(p.norm()) == pytest.approx(1.0)
    assert float(p @ M @ p) == pytest.approx(solution.info["curvature"])
    assert solution.info["curvature"] < 0
    # The quadratic model went down on the way.
    assert solution.value @ M @ solution.value / 2 - b @ solution.value < 0
    with pytest.raises(SolveError, match=r"x\^H A x / x\^H x = -.* was found") as caught:
        solve(A, b, CG())
    assert torch.equal(caught.value.solution.value, solution.value)


def test_negative_definite_is_found_at_once() -> None:
    solution = solve(-1.0 * Identity(N, dtype=F64), random(N), CG(), throw=False)
    assert solution.status is SolveStatus.negative_curvature
    assert (solution.steps, solution.info["curvature"]) == (0, pytest.approx(-1.0))


def test_zero_operator_is_a_breakdown() -> None:
    solution = solve(0.0 * Identity(N, dtype=F64), random(N), CG(), throw=False)
    assert solution.status is SolveStatus.breakdown
    assert torch.equal(solution.value, torch.zeros(N, dtype=F64))
    assert solution.residual == 1


def test_singular_but_consistent_is_solved() -> None:
    spectrum = torch.cat([torch.zeros(6, dtype=F64), torch.linspace(1, 5, N - 6, dtype=F64)])
    M = with_spectrum(spectrum)
    b = M @ random(N)
    solution = solve(function(M, {"positive_semidefinite"}), b, CG(rtol=1e-10))
    assert solution.status is SolveStatus.converged
    # From zero it stays in the range: the solution of smallest norm.
    assert error_of(solution.value, torch.linalg.pinv(M, hermitian=True) @ b) < 1e-8


def test_zero_rows_in_the_operator() -> None:
    A = Diagonal(torch.tensor([0.0, 1.0, 4.0, 0.0], dtype=F64), tags={"positive_semidefinite"})
    solution = solve(A, torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=F64), CG())
    assert solution.value.tolist() == pytest.approx([0.0, 1.0, 0.25, 0.0])


def test_inconsistent_returns_the_smallest_residual() -> None:
    spectrum = torch.cat([torch.zeros(1, dtype=F64), torch.linspace(1, 5, N - 1, dtype=F64)])
    M = with_spectrum(spectrum)
    null = torch.linalg.eigh(M).eigenvectors[:, 0]
    b = M @ random(N)
    b = b / b.norm() + 0.1 * null
    solution = solve(
        function(M, {"positive_semidefinite"}), b, CG(rtol=1e-8), throw=False, history=True
    )
    assert solution.status is SolveStatus.breakdown
    assert 0.1 < solution.residual < 0.2
    assert float(solution.residual) == pytest.approx(float(solution.history.min()), rel=1e-3)
    assert float(solution.residual) == pytest.approx(float(residual_of(M, solution.value, b)))


@pytest.mark.parametrize("preconditioner", [None, Nystrom(rank=10)], ids=["plain", "nystrom"])
def test_tolerance_below_rounding_ends_at_rounding(preconditioner) -> None:
    M, b = definite(100, condition=1e3, dtype=torch.float32), random(100, dtype=torch.float32)
    recipe = CG(rtol=1e-9, preconditioner=preconditioner)
    solution = solve(spd(M), b, recipe)
    assert solution.status is SolveStatus.precision
    assert solution.ok
    exact = solution_of(M, b)
    rounding = torch.finfo(torch.float32).eps * (exact.norm() + b.norm()) / b.norm()
    assert 1e-9 < solution.residual < 8 * rounding
    assert error_of(solution.value, exact) < 1e-5
    # It did not go on for long once rounding was all that was left.
    assert (
        solution.steps < 1.5 * solve(spd(M), b, CG(1e-3, preconditioner=preconditioner)).steps + 100
    )


def test_stagnation_where_the_product_is_too_rough() -> None:
    M = definite(60, condition=100)

    def rough(X: torch.Tensor) -> torch.Tensor:
        return (M @ X).float().double()  # errors far above the rounding of float64

    A = spd(M)
    A._forward = rough
    solution = solve(A, random(60), CG(rtol=1e-12), throw=False)
    assert solution.status is SolveStatus.stagnation
    assert 1e-12 < solution.residual < 1e-5


def test_drift_of_the_recurrence_is_found() -> None:
    # A far start makes residuals large on the way: their rounding stays in the recurrence.
    M, b = definite(60, condition=100), random(60)
    solution = solve(spd(M), b, CG(rtol=1e-11), x0=1e9 * random(60, seed=3))
    assert solution.status is SolveStatus.converged
    assert float(residual_of(M, solution.value, b)) <= 1.001e-11
    checks = solution.products - solution.steps - 1
    assert checks > 1, "the recurrence was right at once: this tests nothing"


def test_product_with_nan() -> None:
    M = definite()
    calls = []

    def product(X: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return M @ X if len(calls) <= 3 else torch.full_like(X, math.nan)

    A = spd(M)
    A._forward = product
    solution = solve(A, random(N), CG(), throw=False)
    assert solution.status is SolveStatus.non_finite
    assert solution.steps == 3
    assert torch.isfinite(solution.value).all()
    expected = solve(spd(M), random(N), CG(max_steps=3), throw=False)
    assert torch.allclose(solution.value, expected.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_operator_that_is_not_finite(value: float) -> None:
    M = definite()
    M[2, 3] = value
    with pytest.raises(SolveError, match="NaN or infinity"):
        solve(spd(M), random(N), CG())


def test_overflow_is_a_status() -> None:
    A = function(1e-38 * torch.eye(3), {"positive_definite"})
    solution = solve(A, 1e10 * torch.ones(3), CG(), throw=False)
    assert not solution.ok
    A = function(3e38 * torch.eye(3), {"positive_definite"})
    solution = solve(A, torch.full((3,), 1e5), CG(), throw=False)
    assert solution.status is SolveStatus.non_finite


# --------------------------------------------------- dtypes, spaces, watching


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products(dtype: torch.dtype) -> None:
    M = definite(64, condition=10, dtype=dtype)
    b = random(64, 2, dtype=dtype)
    solution = solve(spd(M), b, CG(rtol=0.03))
    assert solution.value.dtype == dtype
    # The certificate is that of the rounded value, up to the rounding of the product itself.
    assert torch.allclose(solution.residual, residual_of(M, solution.value, b), atol=0.01)
    assert (solution.residual < 0.05).all()


class Weighted(Space):
    """An inner product of its own, as a sharded vector would have."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__(weights.shape[0])
        self.weights = weights

    def inner(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weights = self.weights if x.dim() == 1 else self.weights[:, None]
        return (x.conj() * weights * y).sum(0)

    def gram(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.mH @ (self.weights[:, None] * y)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x).sqrt()


@pytest.mark.parametrize("recipe", [CG(rtol=1e-10), CG(rtol=1e-10, preconditioner=Nystrom(rank=5))])
def test_inner_products_are_those_of_the_space(recipe: CG) -> None:
    # W^-1 S is symmetric in the inner product x^T W y, and not in the plain one.
    weights = torch.logspace(-2, 2, N, dtype=F64)
    M = definite() / weights[:, None]
    A = function(M, {"positive_definite"})
    A.space = A.out_space = Weighted(weights)
    B = random(N, 2)
    solution = solve(A, B, recipe)
    assert error_of(solution.value, solution_of(M, B)) < 1e-7
    plain = solve(function(M, {"positive_definite"}), B, CG(rtol=1e-10), throw=False)
    assert not plain.ok or plain.steps > solution.steps


def test_history_and_progress() -> None:
    M, B = definite(), random(N, 3)
    seen = []
    solution = solve(spd(M), B, CG(), history=True, progress=lambda step, r: seen.append((step, r)))
    assert solution.history.shape == (solution.steps + 1, 3)
    assert [step for step, _ in seen] == list(range(solution.steps + 1))
    assert [r for _, r in seen] == pytest.approx(solution.history.amax(dim=1).tolist())
    assert torch.allclose(solution.history[0], torch.ones(3, dtype=F64))
    assert torch.allclose(solution.history[-1], solution.residual, rtol=1e-3)


def test_needs_a_hermitian_operator() -> None:
    with pytest.raises(TagError, match=r"CG needs the tag 'hermitian'.*promise it"):
        solve(function(definite(), set()), random(N), CG())
