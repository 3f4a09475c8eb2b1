from __future__ import annotations

import math
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tests.solvers.systems import (
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

from woodbury import (
    CG,
    Auto,
    Cholesky,
    Dense,
    Diagonal,
    Eigh,
    FunctionOperator,
    Identity,
    Neumann,
    Nystrom,
    inverse,
    solve,
)
from woodbury.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    GradientError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    SingularError,
    SolveError,
    TagError,
)
from woodbury.solvers import LSMR, LU, QR, SolveReport, SolveStatus, SolveWarning, Structural
from woodbury.solvers.default import SMALL, default_recipe

F64 = torch.float64
RECIPES = [
    CG(),
    Cholesky(),
    Eigh(),
    LU(),
    Structural(),
    Neumann(terms=5),
    Neumann(terms=5, step=0.5),
    Nystrom(rank=1, damping=0.1),
    Nystrom(rank=1, damping=0.1, method="column"),
]
EACH_RECIPE = pytest.mark.parametrize("recipe", RECIPES, ids=repr)


def spd(M: torch.Tensor):
    return function(M, {"positive_definite"})


def dense(M: torch.Tensor):
    return Dense(M, tags={"positive_definite"})


# --------------------------------------------------------------- edge cases


@EACH_RECIPE
def test_zero_right_hand_side_has_the_solution_zero(recipe) -> None:
    A = dense(definite())
    solution = solve(A, torch.zeros(N, dtype=F64), recipe, x0=random(N), history=True)
    assert solution.status is SolveStatus.converged
    assert torch.equal(solution.value, torch.zeros(N, dtype=F64))
    assert (solution.residual, solution.steps, solution.products) == (0, 0, 0)
    assert solution.history.tolist() == [0.0]


@EACH_RECIPE
def test_zero_columns_cost_nothing_and_change_nothing(recipe) -> None:
    A, b = dense(definite()), random(N)
    alone = solve(A, b, recipe, history=True)
    block = torch.zeros(N, 3, dtype=F64)
    block[:, 1] = b
    solution = solve(A, block, recipe, history=True)
    assert torch.equal(solution.value[:, 1], alone.value)
    assert torch.equal(solution.value[:, [0, 2]], torch.zeros(N, 2, dtype=F64))
    assert solution.products == alone.products
    assert solution.residual.tolist() == [0.0, alone.residual.item(), 0.0]
    assert torch.equal(solution.history[:, 1], alone.history)
    assert solution.column_status == (SolveStatus.converged, alone.status, SolveStatus.converged)


@EACH_RECIPE
def test_block_without_columns(recipe) -> None:
    solution = solve(dense(definite()), torch.zeros(N, 0, dtype=F64), recipe)
    assert solution.value.shape == (N, 0)
    assert solution.status is SolveStatus.converged
    assert solution.residual.shape == (0,)
    assert solution.certificate()["residual"] == 0


@EACH_RECIPE
@pytest.mark.parametrize("shape", [(0,), (0, 2)])
def test_operator_of_size_zero(recipe, shape) -> None:
    A = dense(torch.zeros(0, 0, dtype=F64))
    solution = solve(A, torch.zeros(*shape, dtype=F64), recipe)
    assert solution.value.shape == shape
    assert solution.ok


@EACH_RECIPE
def test_one_by_one(recipe) -> None:
    A = dense(torch.tensor([[4.0]], dtype=F64))
    shift = recipe.damping if isinstance(recipe, Nystrom) else 0.0
    solution = solve(A, torch.tensor([2.0], dtype=F64), recipe, throw=False)
    if isinstance(recipe, Neumann) and recipe.step:
        expected = 0.0  # the step 0.5 is the largest that does not diverge: 0.5 * (1 - 1 + 1 ...) 2
        assert solution.value.item() == pytest.approx(expected)
    else:
        assert solution.value.item() == pytest.approx(2 / (4 + shift), rel=1e-5)


@EACH_RECIPE
def test_multiple_of_the_identity(recipe) -> None:
    A, b = dense(2.0 * eye(N)), random(N)
    solution = solve(A, b, recipe)
    if isinstance(recipe, Nystrom):
        assert solution.status is SolveStatus.completed  # rank 1 of 24: the residual tells
        assert solution.residual > 0.5
    else:
        assert error_of(solution.value, b / 2) < 1e-12


def test_warm_start_of_every_recipe_is_corrected() -> None:
    A, b = dense(definite()), random(N)
    x0 = solution_of(definite(), b) + 1e-3 * random(N, seed=9)
    for recipe in RECIPES:
        cold, warm = solve(A, b, recipe), solve(A, b, recipe, x0=x0)
        assert warm.residual < 1e-2
        assert warm.residual <= cold.residual + 1e-12
        assert torch.allclose(warm.residual, residual_of(A.matrix, warm.value, b), atol=1e-14)


@hypothesis.given(
    eigenvalues=st.lists(st.floats(1e-2, 1e2), min_size=1, max_size=10),
    signs=st.integers(0, 2**10 - 1),
    seed=st.integers(0, 100),
)
@hypothesis.settings(max_examples=50)
def test_random_spectra_by_factorisation(eigenvalues, signs: int, seed: int) -> None:
    n = len(eigenvalues)
    values = torch.tensor(eigenvalues, dtype=F64)
    b = random(n, 2, seed=seed)
    for indefinite in (False, True):
        if indefinite:
            values = values * torch.tensor([-1.0 if signs >> i & 1 else 1.0 for i in range(n)])
        M = with_spectrum(values, seed=seed)
        recipes = [Eigh(), LU(), *([] if indefinite else [Cholesky()])]
        for recipe in recipes:
            solution = solve(function(M, {"hermitian"}), b, recipe)
            assert solution.status is SolveStatus.converged
            assert error_of(solution.value, solution_of(M, b)) < 1e-9


# ------------------------------------------------------------ default recipe


def test_default_recipe_follows_structure_size_and_tags() -> None:
    def large(tags: set[str]) -> FunctionOperator:
        n = SMALL + 1
        return FunctionOperator(lambda X: 2 * X, (n, n), tags=tags, dtype=F64)

    M = definite()
    assert default_recipe(Dense(M)) == Structural()
    assert default_recipe(spd(M)) == Cholesky()
    assert default_recipe(function(M, {"hermitian"})) == Eigh()
    assert default_recipe(function(M, {"positive_semidefinite"})) == Eigh()
    assert default_recipe(function(M, set())) == LU()
    assert default_recipe(large({"positive_definite"})) == CG()
    assert default_recipe(large({"positive_semidefinite"})) == CG()
    assert default_recipe(large({"hermitian"})) == Auto()
    assert default_recipe(large(set())) == Auto()
    found = solve(large({"hermitian"}), torch.ones(SMALL + 1, dtype=F64))
    assert found.status is SolveStatus.converged
    solution = solve(large({"positive_definite"}), torch.ones(SMALL + 1, dtype=F64))
    assert solution.recipe == CG()
    assert torch.allclose(solution.value, torch.full((SMALL + 1,), 0.5, dtype=F64))


def test_default_recipe_for_least_squares() -> None:
    assert default_recipe(Dense(random(N, 3))) == QR()
    assert default_recipe(Dense(random(3, N))) == QR()
    wide = FunctionOperator(lambda X: X[:2000], (2000, 2001), lambda Y: Y, dtype=F64)
    assert default_recipe(wide) == LSMR()
    M, b = random(N, 3), random(N)
    assert error_of(solve(Dense(M), b).value, torch.linalg.pinv(M) @ b) < 1e-13


def test_default_recipe_solves_what_is_not_symmetric() -> None:
    M = definite() + torch.triu(random(N, N), 1)
    b = random(N, 2)
    for A in (Dense(M), function(M, set())):
        assert error_of(solve(A, b).value, solution_of(M, b)) < 1e-10


# ---------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("b", "error", "message"),
    [
        (torch.ones(N), DtypeError, r"b is torch.float32, A is torch.float64.*\.to\("),
        (torch.ones(N, dtype=torch.int64), DtypeError, "b is torch.int64"),
        (torch.ones(N + 1, dtype=F64), ShapeError, r"b has shape \(25,\).*expected \[24\]"),
        (torch.ones(1, N, dtype=F64), ShapeError, r"b has shape \(1, 24\)"),
        (torch.ones(N, 1, 1, dtype=F64), ShapeError, r"b has shape \(24, 1, 1\)"),
        (torch.tensor(1.0, dtype=F64), ShapeError, r"b has shape \(\)"),
        (torch.ones(N, dtype=F64, device="meta"), DeviceError, "b is on meta, A on cpu"),
        ([1.0] * N, DtypeError, "b is list, expected a torch.Tensor"),
    ],
)
def test_right_hand_side_that_does_not_fit(b, error, message) -> None:
    with pytest.raises(error, match=message):
        solve(dense(definite()), b, CG(), throw=False)


@pytest.mark.parametrize(
    ("x0", "error", "message"),
    [
        (torch.ones(N), DtypeError, "x0 is torch.float32"),
        (torch.ones(N, 1, dtype=F64), ShapeError, r"x0 has shape \(24, 1\), b \(24,\)"),
        (torch.full((N,), math.nan, dtype=F64), NonFiniteError, "24 of 24 entries of x0"),
    ],
)
def test_start_that_does_not_fit(x0, error, message) -> None:
    with pytest.raises(error, match=message):
        solve(dense(definite()), random(N), CG(), x0=x0)


def test_matrix_that_is_not_an_operator() -> None:
    with pytest.raises(DtypeError, match=r"A is Tensor, not an operator; wrap a matrix in Dense"):
        solve(definite(), random(N))


@EACH_RECIPE
def test_operator_that_is_not_square(recipe) -> None:
    A = Dense(random(N, 3))
    with pytest.raises(ShapeError, match=r"needs a square operator.*LSMR\(\) or QR"):
        solve(A, random(N), recipe)
    with pytest.raises(ShapeError, match="needs a square operator"):
        inverse(A, recipe)


@EACH_RECIPE
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_right_hand_side_that_is_not_finite(recipe, value: float) -> None:
    b = random(N, 2)
    b[3, 1] = value
    b[5, 0] = value
    with pytest.raises(NonFiniteError, match="2 of 48 entries of b.*the first in row 3, column 1"):
        solve(dense(definite()), b, recipe, throw=False)


@EACH_RECIPE
def test_operator_that_is_not_finite(recipe) -> None:
    M = definite()
    M[1, 2] = M[2, 1] = math.nan
    A, b = spd(M), random(N)
    if isinstance(recipe, Structural):
        A = Dense(M)
    with pytest.raises((NonFiniteError, SolveError), match="NaN or inf|non-finite"):
        solve(A, b, recipe)
    solution = solve(A, b, recipe, throw=False)
    assert solution.status is SolveStatus.non_finite
    assert not solution.ok


@pytest.mark.parametrize(
    "recipe", [CG(), Cholesky(), Eigh(), Nystrom(rank=1), Neumann(terms=1)], ids=repr
)
def test_recipe_for_a_tag_the_operator_does_not_have(recipe) -> None:
    with pytest.raises(TagError, match="'hermitian'"):
        solve(function(definite(), {"lower_triangular"}), random(N), recipe, throw=False)


@pytest.mark.parametrize("recipe", [Cholesky(), Eigh()], ids=repr)
def test_tag_that_is_not_true(recipe) -> None:
    M = definite()
    M[2, 5] += 1
    with pytest.raises(TagError, match=r"entries \((2, 5|5, 2)\) and \((2, 5|5, 2)\) are"):
        solve(spd(M), random(N), recipe)


# ------------------------------------------------------------------- states


@EACH_RECIPE
def test_state_is_reused(recipe) -> None:
    A, b = dense(definite()), random(N)
    first = solve(A, b, recipe)
    again = solve(A, b, recipe, state=first.state)
    assert again.state is first.state
    assert torch.equal(again.value, first.value)
    assert again.products == first.products - first.state.products
    prepared = recipe.prepare(A)
    assert torch.equal(solve(A, b, state=prepared).value, first.value)


def test_stale_factor_is_refined_or_reported() -> None:
    M, b = definite(), random(N)
    state = Cholesky().prepare(spd(M))
    near = M + 1e-6 * eye(N)
    solution = solve(spd(near), b, Cholesky(), state=state)
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, solution_of(near, b)) < 1e-8
    far = solve(spd(3 * M), b, Cholesky(), state=state, throw=False)
    assert far.status is SolveStatus.stagnation


def test_state_that_does_not_fit() -> None:
    state = Cholesky().prepare(dense(definite()))
    with pytest.raises(ArgumentError, match=r"prepared by Cholesky\(\), the recipe is Eigh"):
        solve(dense(definite()), random(N), Eigh(), state=state)
    with pytest.raises(ShapeError, match=r"for an operator \(24, 24\).*this one is \(5, 5\)"):
        solve(dense(definite(5)), random(5), Cholesky(), state=state)


# ---------------------------------------------------------- failure policy


def test_factorisation_that_does_not_exist() -> None:
    indefinite = function(with_spectrum(torch.linspace(-1, 1, N, dtype=F64)), {"hermitian"})
    singular = function(with_spectrum(torch.linspace(0, 1, N, dtype=F64)), {"hermitian"})
    b = random(N, 2)
    with pytest.raises(NotPositiveDefiniteError, match="run from -1 to 1"):
        solve(indefinite, b, Cholesky())
    with pytest.raises(SingularError, match="singular to working precision"):
        solve(singular, b, Cholesky())
    for A, status in (
        (indefinite, SolveStatus.not_positive_definite),
        (singular, SolveStatus.singular),
    ):
        solution = solve(A, b, Cholesky(), throw=False)
        assert solution.column_status == (status, status)
        assert torch.isnan(solution.value).all(), "zeros would look like an answer"
        assert torch.isnan(solution.residual).all()


def test_error_holds_the_solution() -> None:
    with pytest.raises(SolveError, match="max_steps") as caught:
        solve(spd(definite()), random(N), CG(max_steps=2))
    solution = caught.value.solution
    assert solution.steps == 2
    assert str(caught.value) == solution.message()
    assert not solution.certificate()["ok"]


def test_report_receives_what_fails() -> None:
    report = SolveReport()
    A = spd(definite())
    solve(A, random(N), CG(), report=report)
    with pytest.raises(SolveError):
        solve(A, random(N), CG(max_steps=2), report=report)
    assert (report.calls, report.failures, report.ok) == (2, 1, False)
    assert report.last.status is SolveStatus.max_steps
    assert report.residual == pytest.approx(float(report.last.residual))
    assert report.certificate()["failures"] == 1
    assert repr(report).startswith("SolveReport(calls=2, failures=1")


# ---------------------------------------------------------------- gradients

DIFFERENTIABLE = [CG(rtol=1e-13), Cholesky(), Eigh(), LU(), Structural(), Nystrom(rank=4)]


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
@pytest.mark.parametrize("recipe", DIFFERENTIABLE, ids=repr)
@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_gradient_with_respect_to_b(recipe, shape, dtype: torch.dtype) -> None:
    M = definite(4, condition=10, dtype=dtype)
    A = Dense(M, tags={"hermitian", "positive_definite"})
    b = random(*shape, dtype=dtype).requires_grad_()

    def value(b: torch.Tensor) -> torch.Tensor:
        return solve(A, b, recipe).value

    assert torch.autograd.gradcheck(value, (b,), atol=1e-7)
    # The solution is linear in b; its square is not.
    assert torch.autograd.gradgradcheck(lambda b: value(b) * value(b).conj(), (b,), atol=1e-6)


@pytest.mark.parametrize("recipe", [LU(), Structural(), Neumann(terms=4, step=0.3)], ids=repr)
def test_gradient_solves_with_the_adjoint(recipe) -> None:
    M = definite(8, condition=5, dtype=torch.complex128) + 0.1j * random(8, 8)
    A = Dense(M)
    b, g = random(8, dtype=torch.complex128).requires_grad_(), random(8, dtype=torch.complex128)
    report = SolveReport()
    (grad,) = torch.autograd.grad(solve(A, b, recipe, report=report).value, b, g)
    if not isinstance(recipe, Neumann):
        assert error_of(grad, solution_of(M.mH.resolve_conj(), g)) < 1e-12
    assert error_of(grad, solve(Dense(M.mH.contiguous()), g, recipe).value) < 1e-12
    assert report.calls == 2


@pytest.mark.parametrize(
    "recipe", [CG(), Cholesky(), Structural(), Neumann(9, step=0.25)], ids=repr
)
def test_gradient_of_a_scalar_and_at_zero(recipe) -> None:
    # TorchOpt: gradients silently zero for scalar inputs. At b = 0 nothing is solved forward.
    A = dense(torch.tensor([[4.0]], dtype=F64))
    for value in (3.0, 0.0):
        b = torch.tensor([value], dtype=F64, requires_grad=True)
        solve(A, b, recipe).value.sum().backward()
        assert b.grad.item() == pytest.approx(0.25)


def test_preconditioner_serves_the_backward_pass_too() -> None:
    M = with_spectrum(torch.logspace(0, -6, 100, dtype=F64))
    A = function(M, {"positive_semidefinite"}) + 1e-4 * Identity(100)
    report = SolveReport()
    b = random(100).requires_grad_()
    recipe = CG(rtol=1e-8, preconditioner=Nystrom(rank=60))
    solve(A, b, recipe, report=report).value.sum().backward()
    assert report.calls == 2
    assert report.last.steps < 25
    assert solve(A, torch.ones(100, dtype=F64), CG(rtol=1e-8)).steps > 100
    assert report.last.state.preconditioner is not None


def test_failure_in_the_backward_pass_is_not_silent() -> None:
    # lineax #117: convergence failure ignored in the backward pass.
    M = definite(40, condition=1e4)
    vectors = torch.linalg.eigh(M).eigenvectors
    b = vectors[:, 0].clone().requires_grad_()  # one step forward, many backward
    value = solve(spd(M), b, CG(rtol=1e-8, max_steps=3)).value
    with pytest.raises(SolveError, match="max_steps"):
        value.sum().backward()
    value = solve(spd(M), b, CG(rtol=1e-8, max_steps=3), throw=False).value
    with pytest.warns(SolveWarning, match="max_steps"):
        value.sum().backward()


def test_no_graph_is_kept_without_grad_mode() -> None:
    b = random(N).requires_grad_()
    with torch.no_grad():
        assert not solve(dense(definite()), b, CG()).value.requires_grad
    assert not solve(dense(definite()), b.detach(), CG()).value.requires_grad


def test_gradient_with_respect_to_the_start_is_refused() -> None:
    # TorchOpt: gradients silently zero.
    with pytest.raises(GradientError, match="x0 requires a gradient"):
        solve(dense(definite()), random(N), CG(), x0=random(N).requires_grad_())


# ------------------------------------------------------------------- inputs


def test_inputs_are_not_changed() -> None:
    A, b, x0 = dense(definite()), random(N, 2), random(N, 2, seed=4)
    kept = A.matrix.clone(), b.clone(), x0.clone()
    for recipe in RECIPES:
        solve(A, b, recipe, x0=x0)
    assert all(torch.equal(x, y) for x, y in zip((A.matrix, b, x0), kept, strict=True))


def test_strides_and_conjugate_views() -> None:
    M = definite(dtype=torch.complex128)
    A = Dense(M, tags={"hermitian", "positive_definite"})
    wide_block = random(2, 2 * N, dtype=torch.complex128)
    for b in (wide_block[:, ::2].mT, wide_block[:, :N].mH, wide_block[0, :N].conj()):
        for recipe in (CG(rtol=1e-10), Cholesky(), Nystrom(rank=N), Neumann(terms=1)):
            plain = solve(A, b.resolve_conj().contiguous(), recipe)
            assert torch.allclose(solve(A, b, recipe).value, plain.value)


def test_no_warnings_on_the_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for recipe in RECIPES:
            solve(dense(definite()), random(N, 2), recipe, history=True)


def test_diagonal_with_every_recipe() -> None:
    d = torch.linspace(1, 2, N, dtype=F64)
    A = Diagonal(d, tags={"positive_definite"})
    b = random(N, 2)
    for recipe in (CG(rtol=1e-12), Cholesky(), Eigh(), LU(), Structural(), Nystrom(rank=N)):
        assert error_of(solve(A, b, recipe).value, b / d[:, None]) < 1e-10
