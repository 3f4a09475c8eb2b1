"""Every estimator of a hypergradient against its stated bound; what a state saves and refreshes."""

from __future__ import annotations

import pytest
import torch
from tests.bilevel.problems import T0, N, written
from torch import Tensor

from woodbury import CG, Cholesky, Dense, FunctionOperator, Neumann, Nystrom, inverse
from woodbury.bilevel import (
    Bilevel,
    FiniteDifference,
    HypergradientState,
    UnrolledDescent,
    estimate_hypergradient,
)
from woodbury.errors import ArgumentError, NotPositiveDefiniteError, SolveError
from woodbury.implicit import Implicit, OneStep, Phantom, Truncated, Unrolled
from woodbury.solvers import Recipe, SolveStatus


@pytest.fixture
def t0() -> T0:
    return T0()


def problem_of(t0: T0, w: Tensor | None = None) -> Bilevel:
    return Bilevel(t0.inner, t0.outer, (t0.w_star if w is None else w).clone(), t0.L.clone())


def indirect_bound(t0: T0) -> float:
    """``|J| |H^-1 a|``: what a relative error of the adjoint is multiplied by."""
    a = t0.C.T @ (t0.C @ t0.w_star - t0.e)
    largest = (t0.L.exp() * t0.w_star).abs().max()
    return (largest * torch.linalg.solve(t0.H, a).norm()).item()


@pytest.mark.parametrize("count", [1, 2, 6, 40])
@pytest.mark.parametrize(
    "make",
    [
        lambda k, c: Neumann(terms=k - 1, step=c),
        lambda k, c: Truncated(steps=k, step=c),
        lambda k, c: Phantom(steps=k, damping=0.5, step=2 * c),
        lambda k, c: UnrolledDescent(steps=k, step=c),
    ],
    ids=["Neumann", "Truncated", "Phantom", "UnrolledDescent"],
)
def test_all_forms_of_the_truncated_series_are_one_and_meet_its_bound(
    t0: T0, make: object, count: int
) -> None:
    step = 1.0 / torch.linalg.eigvalsh(t0.H)[-1].item()
    found = estimate_hypergradient(problem_of(t0), make(count, step))  # type: ignore[operator]
    series, power = torch.zeros(N, N).double(), torch.eye(N).double()
    for _ in range(count):
        series, power = series + step * power, power @ (torch.eye(N).double() - step * t0.H)
    torch.testing.assert_close(found.value, t0.exact(series), rtol=1e-10, atol=1e-12)
    contraction = torch.linalg.matrix_norm(torch.eye(N).double() - step * t0.H, 2).item()
    error = (found.value - t0.exact()).norm().item()
    assert error <= (1 + 1e-9) * contraction**count * indirect_bound(t0)


def test_unrolling_from_elsewhere_is_the_derivative_of_the_unrolled_outer_loss(t0: T0) -> None:
    start, step, steps = torch.ones(N).double(), 0.05, 7

    def unrolled(L: Tensor) -> Tensor:
        w = start
        for _ in range(steps):
            w = w - step * ((t0.A + torch.diag(L.exp())) @ w - t0.b)
        return t0.outer(w, L)

    exact = torch.autograd.functional.jacobian(unrolled, t0.L)
    problem = problem_of(t0, start)
    found = estimate_hypergradient(problem, UnrolledDescent(steps, step))
    torch.testing.assert_close(found.value, exact, rtol=1e-12, atol=1e-12)
    assert found.outer_value == pytest.approx(unrolled(t0.L).item(), rel=1e-12)
    assert found.stationarity == pytest.approx((t0.H @ start - t0.b).norm().item())
    assert found.solution is None
    torch.testing.assert_close(problem.params_vector(), start)  # the parameters stay


def test_the_damped_inverses_meet_their_bound(t0: T0) -> None:
    """|H^-1 - (H + r)^-1| = r / (m (m + r)) at the smallest eigenvalue m, which scales |J| |a|."""
    smallest = torch.linalg.eigvalsh(t0.H)[0].item()
    a = (t0.C.T @ (t0.C @ t0.w_star - t0.e)).norm().item()
    largest = (t0.L.exp() * t0.w_star).abs().max().item()
    for damping in (1e-1, 1e-3, 1e-6):
        found = estimate_hypergradient(problem_of(t0), Nystrom(rank=N, damping=damping))
        damped = torch.linalg.inv(t0.H + damping * torch.eye(N).double())
        torch.testing.assert_close(found.value, t0.exact(damped), rtol=1e-8, atol=1e-10)
        bound = damping / (smallest * (smallest + damping)) * a * largest
        assert (found.value - t0.exact()).norm().item() <= 1.001 * bound + 1e-10


@pytest.mark.parametrize("terms", [0, 1, 4])
def test_any_approximate_inverse_is_an_estimator_by_itself_and_with_terms(
    t0: T0, terms: int
) -> None:
    """M in the place of H^-1 (K-FAC, say): I - (I - M H)^(K + 1) times H^-1, exact for M = H^-1."""
    eye = torch.eye(N).double()
    for damping in (0.0, 0.1):
        B = Dense(t0.H + damping * eye, tags={"positive_definite"})
        recipe = Neumann(terms, step=1.0, preconditioner=inverse(B, Cholesky()))
        found = estimate_hypergradient(problem_of(t0), recipe)
        M = torch.linalg.inv(t0.H + damping * eye)
        left = torch.linalg.matrix_power(eye - M @ t0.H, terms + 1)
        stands_for = (eye - left) @ torch.linalg.inv(t0.H)
        torch.testing.assert_close(found.value, t0.exact(stands_for), rtol=1e-8, atol=1e-10)
        assert found.solution is not None
        a = t0.C.T @ (t0.C @ t0.w_star - t0.e)
        residual = (a - t0.H @ found.solution.value).norm() / a.norm()
        assert float(found.solution.residual) == pytest.approx(residual.item(), abs=1e-9)


@pytest.mark.parametrize("recipe", [CG(rtol=1e-10), Cholesky(), None])
def test_differences_are_exact_for_a_quadratic(t0: T0, recipe: object) -> None:
    found = estimate_hypergradient(problem_of(t0), FiniteDifference(recipe))  # type: ignore[arg-type]
    rtol = 1e-3 if recipe is None else 1e-7
    torch.testing.assert_close(found.value, t0.exact(), rtol=rtol, atol=rtol)
    assert found.solution is not None
    assert found.solution.status.ok


def test_the_error_of_differences_falls_with_the_square_of_the_radius() -> None:
    inner = lambda w, a: (w.exp() - a * w).sum() + 0.1 * (a.exp() * w**3).sum()  # noqa: E731
    outer = lambda w, a: w.square().sum()  # noqa: E731
    w, a = torch.tensor([0.3, 0.7]).double(), torch.tensor([0.5, 0.2]).double()
    exact = estimate_hypergradient(Bilevel(inner, outer, w, a), Cholesky()).value
    errors = []
    for radius in (1e-1, 1e-2):
        mode = FiniteDifference(Cholesky(), radius=radius)
        found = estimate_hypergradient(Bilevel(inner, outer, w, a), mode).value
        errors.append((found - exact).norm().item())
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)


def test_differences_need_no_second_derivative() -> None:
    class Once(torch.autograd.Function):
        """w^2 whose backward cannot be differentiated."""

        @staticmethod
        def forward(ctx, w):
            ctx.save_for_backward(w)
            return w**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    def inner(w: Tensor, a: Tensor) -> Tensor:
        return 0.5 * (a * Once.apply(w)).sum() - w.sum()

    w, a = torch.tensor([1.0, 0.5]).double(), torch.tensor([1.0, 2.0]).double()
    problem = Bilevel(inner, lambda w, a: 0.5 * w.square().sum(), w, a)
    found = estimate_hypergradient(problem, FiniteDifference(CG(rtol=1e-8)))
    torch.testing.assert_close(found.value, -1 / a**3, rtol=1e-6, atol=1e-8)
    counts = problem.counts
    assert counts.hessian_products == counts.mixed_products == 0
    with pytest.raises(SolveError):  # to autograd the Hessian is zero
        estimate_hypergradient(problem, CG())


def test_gradcheck_of_the_solved_problem(t0: T0) -> None:
    """The estimate as the backward pass of F, under torch's own check by differences."""

    class F(torch.autograd.Function):
        @staticmethod
        def forward(ctx, L):
            ctx.L = L.detach().clone()
            w = torch.linalg.solve(t0.A + torch.diag(L.exp()), t0.b)
            return t0.outer(w, L)

        @staticmethod
        def backward(ctx, g):
            w = torch.linalg.solve(t0.A + torch.diag(ctx.L.exp()), t0.b)
            problem = Bilevel(t0.inner, t0.outer, w, ctx.L)
            return g * estimate_hypergradient(problem, CG(rtol=1e-12)).value

    assert torch.autograd.gradcheck(F.apply, t0.L.clone().requires_grad_())


def test_batches_give_the_estimate_of_those_batches() -> None:
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, generator=gen).double(), torch.randn(6, generator=gen).double()

    def loss(w: Tensor, a: Tensor, batch: tuple) -> Tensor:
        return 0.5 * (batch[0] @ w - batch[1]).square().mean() + 0.5 * (a.exp() * w**2).sum()

    w, a = torch.ones(3).double(), torch.zeros(3).double()
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    problem = Bilevel(loss, loss, w, a, inner_data=data, outer_data=data)
    inner, outer = (batch for batch, _ in problem.batches("inner"))
    found = estimate_hypergradient(
        problem, CG(rtol=1e-12), inner_batch=inner, outer_batch=outer
    ).value
    H = x[:4].T @ x[:4] / 4 + torch.eye(3).double()
    slope = x[4:].T @ (x[4:] @ w - y[4:]) / 2 + w
    torch.testing.assert_close(found, 0.5 * w**2 - torch.linalg.solve(H, slope))
    unrolled = estimate_hypergradient(
        problem, UnrolledDescent(200, 0.1), inner_batch=inner, outer_batch=outer
    )
    assert unrolled.outer_value != pytest.approx(problem.value("outer"))
    with pytest.raises(ArgumentError, match="at least one"):
        UnrolledDescent(0)


# --- the state kept between outer steps


def move(problem: Bilevel, size: float, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    L = problem.hyper_vector()
    problem.set_hyper(L + size * torch.randn(N, generator=gen, dtype=torch.float64))


def test_a_warm_start_saves_products_and_changes_no_answer(t0: T0) -> None:
    problem, state = problem_of(t0), HypergradientState()
    cold, warm = 0, 0
    for step in range(6):
        first = estimate_hypergradient(problem, CG(rtol=1e-6))
        second = estimate_hypergradient(problem, CG(rtol=1e-6), state=state)
        assert first.solution is not None
        assert second.solution is not None
        assert second.solution.status is SolveStatus.converged
        torch.testing.assert_close(second.value, first.value, rtol=1e-4, atol=1e-6)
        if step:
            cold += first.solution.products
            warm += second.solution.products
        move(problem, 1e-4, step)
    assert warm < 0.8 * cold
    assert state.refreshes == 0


def test_recipes_of_fixed_work_start_from_zero_unless_told(t0: T0) -> None:
    recipe = Neumann(3, step=0.1)
    for warm_start, same in ((None, True), (True, False)):
        state = HypergradientState(warm_start=warm_start)
        first = estimate_hypergradient(problem_of(t0), recipe, state=state).value
        again = estimate_hypergradient(problem_of(t0), recipe, state=state).value
        assert torch.equal(first, again) is same
    # a warm start goes on with the series: 4 + 4 summands
    longer = estimate_hypergradient(problem_of(t0), Neumann(7, step=0.1)).value
    torch.testing.assert_close(again, longer, rtol=1e-10, atol=1e-12)


def test_a_kept_sketch_saves_products_and_is_refreshed_when_the_hessian_moves(t0: T0) -> None:
    problem, state = problem_of(t0), HypergradientState()
    recipe = Nystrom(rank=N, damping=1e-3)
    made = estimate_hypergradient(problem, recipe, state=state)
    assert made.solution is not None
    assert made.solution.products == N + 1
    move(problem, 1e-6, 0)
    kept = estimate_hypergradient(problem, recipe, state=state)
    assert kept.solution is not None
    assert (kept.solution.products, kept.refreshed, state.refreshes) == (1, "", 0)
    move(problem, 1.0, 1)
    before = problem.counts.hessian_products
    refreshed = estimate_hypergradient(problem, recipe, state=state)
    assert "the residual rose from" in refreshed.refreshed
    assert refreshed.certificate()["refreshed"] == refreshed.refreshed == state.reason
    assert state.refreshes == 1
    assert problem.counts.hessian_products - before == N + 2  # one try, then anew
    fresh = estimate_hypergradient(problem, recipe)
    torch.testing.assert_close(refreshed.value, fresh.value, rtol=1e-10, atol=1e-12)


def test_a_stale_preconditioner_is_noticed_by_its_steps_and_made_anew_for_the_next(t0: T0) -> None:
    problem, state = problem_of(t0), HypergradientState(warm_start=False, refresh=1.5)
    recipe = CG(rtol=1e-8, preconditioner=Nystrom(rank=N - 1, damping=1e-6))
    first = estimate_hypergradient(problem, recipe, state=state)
    move(problem, 2.0, 1)
    slow = estimate_hypergradient(problem, recipe, state=state)
    assert first.solution is not None
    assert slow.solution is not None
    assert slow.solution.steps > 1.5 * first.solution.steps + 1
    assert slow.solution.status is SolveStatus.converged
    assert slow.refreshed == ""
    again = estimate_hypergradient(problem, recipe, state=state)
    assert again.refreshed.startswith("the steps rose")
    assert again.solution is not None
    assert again.solution.steps < slow.solution.steps


def test_a_kept_factor_of_another_matrix_is_never_believed(t0: T0) -> None:
    problem, state = problem_of(t0), HypergradientState()
    estimate_hypergradient(problem, Cholesky(), state=state)
    move(problem, 0.5, 1)
    found = estimate_hypergradient(problem, Cholesky(), state=state)
    assert found.refreshed
    fresh = estimate_hypergradient(problem, Cholesky())
    torch.testing.assert_close(found.value, fresh.value, rtol=1e-10, atol=1e-12)


def test_a_kept_step_that_diverges_is_found_anew(t0: T0) -> None:
    problem, state = problem_of(t0), HypergradientState()
    recipe = Neumann(terms=200)
    estimate_hypergradient(problem, recipe, state=state)
    problem.set_hyper(t0.L + 4)
    found = estimate_hypergradient(problem, recipe, state=state)
    assert "diverged" in found.refreshed
    assert found.solution is not None
    assert found.solution.ok


def test_another_recipe_or_size_takes_nothing_from_the_state(t0: T0) -> None:
    state = HypergradientState()
    estimate_hypergradient(problem_of(t0), Nystrom(rank=3, damping=0.1), state=state)
    other = Nystrom(rank=3, damping=0.1, seed=1)
    found = estimate_hypergradient(problem_of(t0), other, state=state)
    fresh = estimate_hypergradient(problem_of(t0), other)
    assert torch.equal(found.value, fresh.value)
    assert found.refreshed == ""
    w = torch.tensor([1.0]).double()
    small = Bilevel(lambda w, a: 0.5 * a * w @ w, lambda w, a: w.sum(), w, w[0].clone())
    assert estimate_hypergradient(small, CG(), state=state).solution is not None


@pytest.mark.parametrize(
    ("recipe", "refreshes"),
    [
        (Nystrom(rank=N, damping=1e-3), 1),
        (CG(rtol=1e-8, preconditioner=Nystrom(rank=3, damping=0.1)), 0),
        (Cholesky(), 1),
    ],
)
def test_the_state_of_a_state_is_restored(t0: T0, recipe: Recipe, refreshes: int) -> None:
    problem = problem_of(t0)
    state, other = HypergradientState(refresh=1.2), HypergradientState(refresh=1.2)
    estimate_hypergradient(problem, recipe, state=state)
    other.load_state_dict(written(state.state_dict()))
    for size in (1e-3, 1.0):
        move(problem, size, 5)
        one = estimate_hypergradient(problem, recipe, state=state)
        two = estimate_hypergradient(problem, recipe, state=other)
        assert torch.equal(one.value, two.value)
        assert one.refreshed == two.refreshed
        assert one.solution is not None
        assert two.solution is not None
        assert one.solution.products == two.solution.products
    assert state.refreshes == other.refreshes == refreshes
    assert state.reason == other.reason


def test_a_state_of_functions_is_prepared_anew(t0: T0) -> None:
    problem = problem_of(t0)
    M = FunctionOperator(lambda x: 2.0 * x, (N, N), dtype=torch.float64, tags={"positive_definite"})
    state, other = HypergradientState(), HypergradientState()
    recipe = CG(rtol=1e-8, preconditioner=M)
    first = estimate_hypergradient(problem, recipe, state=state)
    other.load_state_dict(written(state.state_dict()))
    again = estimate_hypergradient(problem, recipe, state=other)
    assert torch.allclose(again.value, first.value, rtol=1e-6)
    assert again.solution is not None
    assert again.solution.steps == 0  # from the adjoint that was kept
    with pytest.raises(ArgumentError, match="a HypergradientState has"):
        other.load_state_dict({"adjoint": None})


def test_what_makes_no_sense_is_refused(t0: T0) -> None:
    problem = problem_of(t0)
    for refresh in (1.0, 0.5, float("nan")):
        with pytest.raises(ArgumentError, match="above 1"):
            HypergradientState(refresh=refresh)
    for radius in (0.0, -1.0, float("inf")):
        with pytest.raises(ArgumentError, match="radius"):
            FiniteDifference(radius=radius)
    with pytest.raises(ArgumentError, match="UnrolledDescent"):
        estimate_hypergradient(problem, Unrolled())
    with pytest.raises(ArgumentError, match="Phantom needs its step"):
        estimate_hypergradient(problem, Phantom())
    with pytest.raises(ArgumentError, match="step is"):
        UnrolledDescent(3, step=-1.0)
    assert estimate_hypergradient(problem, OneStep(0.1)).solution is not None


def test_an_indefinite_or_singular_hessian_is_a_status(t0: T0) -> None:
    saddle = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def problem(curvature: Tensor) -> Bilevel:
        return Bilevel(
            lambda w, a: 0.5 * (curvature * w**2).sum() + (a * w).sum(),
            lambda w, a: w.sum(),
            torch.ones(2).double(),
            torch.ones(2).double(),
        )

    with pytest.raises(SolveError, match="negative_curvature"):
        estimate_hypergradient(problem(saddle), CG())
    with pytest.raises(NotPositiveDefiniteError):
        estimate_hypergradient(problem(saddle), Cholesky())
    mode = Implicit(CG(), on_failure="nan")
    found = estimate_hypergradient(problem(saddle), mode)
    assert torch.isnan(found.value).all()  # never a silent zero
    assert found.solution is not None
    assert found.solution.status is SolveStatus.negative_curvature
    singular = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = estimate_hypergradient(problem(singular), Implicit(CG(), on_failure="ignore"))
    assert found.solution is not None
    assert not found.solution.ok
    # the kept adjoint of a failure is not where the next solve starts
    state = HypergradientState()
    estimate_hypergradient(problem(saddle), mode, state=state)
    assert state.adjoint is None


# --- edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "estimator",
    [CG(), Cholesky(), Neumann(2000, step=0.3), Nystrom(N), FiniteDifference(CG(rtol=1e-3))],
    ids=lambda e: type(e).__name__,
)
def test_both_dtypes_are_kept_and_right(t0: T0, dtype: torch.dtype, estimator: object) -> None:
    shift = torch.eye(N).double()
    t0.A = t0.A + shift  # well conditioned, so that float32 says something
    exact = t0.exact()
    t0.A, t0.b, t0.C, t0.e = (part.to(dtype) for part in (t0.A, t0.b, t0.C, t0.e))
    w = torch.linalg.solve(t0.A.double() + torch.diag(t0.L.exp()), t0.b.double())
    problem = Bilevel(t0.inner, t0.outer, w.to(dtype), t0.L.to(dtype))
    found = estimate_hypergradient(problem, estimator)  # type: ignore[arg-type]
    assert found.value.dtype is dtype  # type: ignore[union-attr]
    tolerance = 5e-3 if dtype is torch.float32 else 1e-3
    torch.testing.assert_close(found.value.double(), exact, rtol=tolerance, atol=tolerance)
    assert found.solution is not None
    assert found.solution.status.ok


@pytest.mark.parametrize(
    "estimator",
    [CG(), Cholesky(), Neumann(3), Nystrom(2, damping=0.1), FiniteDifference(), OneStep(0.1)],
    ids=lambda e: type(e).__name__,
)
def test_at_a_minimum_of_the_outer_loss_the_direct_part_is_left(t0: T0, estimator: object) -> None:
    """b = 0 in the solve: the answer is exact, and the status says so."""
    e = t0.C @ t0.w_star
    problem = Bilevel(
        t0.inner,
        lambda w, L: 0.5 * (t0.C @ w - e).square().sum() + 0.1 * L.square().sum(),
        t0.w_star,
        t0.L,
    )
    found = estimate_hypergradient(problem, estimator)  # type: ignore[arg-type]
    assert torch.equal(found.value, 0.2 * t0.L)
    assert found.solution is not None
    assert found.solution.status is SolveStatus.converged
    assert found.solution.products == 0


def test_one_parameter_and_one_hyperparameter() -> None:
    """g = a w^2 / 2 - w, f = w^2 / 2: F = 1 / (2 a^2), for scalars of no dimension."""
    w, a = torch.tensor(0.5).double(), torch.tensor(2.0).double()
    problem = Bilevel(lambda w, a: a * w**2 / 2 - w, lambda w, a: w**2 / 2, w, a)
    for estimator in (CG(), Cholesky(), Neumann(80, step=0.4), Nystrom(1), FiniteDifference()):
        found = estimate_hypergradient(problem, estimator)
        torch.testing.assert_close(found.value, -1 / a**3, rtol=1e-6, atol=1e-9)


def test_a_budget_of_no_products_is_a_status(t0: T0) -> None:
    mode = Implicit(CG(max_steps=0), on_failure="ignore")
    found = estimate_hypergradient(problem_of(t0), mode)
    assert found.solution is not None
    assert found.solution.status is SolveStatus.max_steps
    assert float(found.solution.residual) == 1
    with pytest.raises(SolveError, match="step limit"):
        estimate_hypergradient(problem_of(t0), CG(max_steps=0))


def test_a_second_derivative_that_is_not_finite_is_a_status() -> None:
    def inner(w: Tensor, a: Tensor) -> Tensor:
        return (w.abs() ** 1.5).sum() + (a * w).sum()  # no curvature at 0

    problem = Bilevel(inner, lambda w, a: w.sum(), torch.zeros(2).double(), torch.ones(2).double())
    with pytest.raises(SolveError, match="non_finite"):
        estimate_hypergradient(problem, CG())
    batchless = Implicit(CG(), on_failure="nan")
    assert torch.isnan(estimate_hypergradient(problem, batchless).value).all()


def test_a_start_at_the_answer_takes_no_step(t0: T0) -> None:
    state = HypergradientState()
    state.adjoint = torch.linalg.solve(t0.H, t0.C.T @ (t0.C @ t0.w_star - t0.e))
    found = estimate_hypergradient(problem_of(t0), CG(rtol=1e-8), state=state)
    assert found.solution is not None
    assert (found.solution.steps, found.solution.status) == (0, SolveStatus.converged)
