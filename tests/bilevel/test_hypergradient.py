"""The hypergradient against closed forms, finite differences and unrolling."""

from __future__ import annotations

import pytest
import torch
from tests.bilevel.problems import T0, N
from torch import Tensor

from woodbury import CG, Cholesky, Eigh, Neumann, Nystrom, hypergradient
from woodbury.bilevel import unrolled_hypergradient
from woodbury.curvature import Hessian
from woodbury.errors import DataError, GradientError, NonFiniteError, SolveError
from woodbury.implicit import StationarityWarning


@pytest.fixture
def t0() -> T0:
    return T0()


@pytest.mark.parametrize("recipe", [CG(rtol=1e-12), Cholesky(), Eigh()])
def test_exact_recipes_give_the_closed_form(t0: T0, recipe: object) -> None:
    result = hypergradient(t0.inner, t0.outer, t0.w_star, t0.L, recipe)
    torch.testing.assert_close(result.value, t0.exact(), rtol=1e-9, atol=1e-11)
    assert result.solution.ok
    assert result.stationarity < 1e-12
    assert abs(result.outer_error) < 1e-11
    torch.testing.assert_close(result.direct, 0.2 * t0.L)


def test_neumann_meets_its_bound_and_tends_to_exact(t0: T0) -> None:
    step = 1.0 / torch.linalg.eigvalsh(t0.H)[-1].item()
    contraction = torch.linalg.matrix_norm(torch.eye(N).double() - step * t0.H, 2)
    a = t0.C.T @ (t0.C @ t0.w_star - t0.e)
    exact = torch.linalg.solve(t0.H, a)
    for terms in (0, 1, 5, 40):
        recipe = Neumann(terms=terms, step=step)
        q = hypergradient(t0.inner, t0.outer, t0.w_star, t0.L, recipe).solution.value
        assert (q - exact).norm() <= (1 + 1e-9) * contraction ** (terms + 1) * exact.norm()
        if terms == 0:
            torch.testing.assert_close(q, step * a)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_unrolled_from_the_solution_is_the_truncated_series(t0: T0, steps: int) -> None:
    step = 0.7 / torch.linalg.eigvalsh(t0.H)[-1].item()
    unrolled = unrolled_hypergradient(
        t0.inner, t0.outer, t0.w_star, t0.L, steps=steps, step_size=step
    )
    recipe = Neumann(terms=steps - 1, step=step)
    neumann = hypergradient(t0.inner, t0.outer, t0.w_star, t0.L, recipe)
    torch.testing.assert_close(unrolled, neumann.value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["gaussian", "column"])
def test_nystrom_of_full_rank_is_the_damped_inverse(t0: T0, method: str) -> None:
    damping = 1e-2
    recipe = Nystrom(rank=N, damping=damping, method=method)
    result = hypergradient(t0.inner, t0.outer, t0.w_star, t0.L, recipe)
    damped = torch.linalg.inv(t0.H + damping * torch.eye(N).double())
    torch.testing.assert_close(result.value, t0.exact(damped), rtol=1e-9, atol=1e-10)


def test_nystrom_sketch_is_reused(t0: T0) -> None:
    recipe = Nystrom(rank=N, damping=1e-2)
    first = hypergradient(t0.inner, t0.outer, t0.w_star, t0.L, recipe)
    again = hypergradient(t0.inner, t0.outer, t0.w_star, t0.L, recipe, state=first.solution.state)
    torch.testing.assert_close(again.value, first.value, rtol=1e-10, atol=1e-12)
    assert again.solution.products < first.solution.products


def test_warm_start_needs_fewer_products(t0: T0) -> None:
    recipe = CG(rtol=1e-8)
    cold = hypergradient(t0.inner, t0.outer, t0.w_star, t0.L, recipe)
    warm = hypergradient(t0.inner, t0.outer, t0.w_star, t0.L, recipe, x0=cold.solution.value)
    assert warm.solution.products < cold.solution.products


def test_outer_error_estimates_an_unsolved_inner_problem(t0: T0) -> None:
    w = t0.w_star + 1e-4 * torch.randn(N, generator=torch.Generator().manual_seed(1)).double()
    result = hypergradient(t0.inner, t0.outer, w, t0.L, Cholesky(), stationary_rtol=None)
    truth = (t0.outer(w, t0.L) - t0.outer(t0.w_star, t0.L)).item()
    assert result.outer_error == pytest.approx(truth, rel=1e-2)
    assert result.stationarity == pytest.approx((t0.H @ w - t0.b).norm().item())


def test_batches_of_unequal_size_are_weighted_by_rows() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(11, 3, generator=gen, dtype=torch.float64)
    y = torch.randn(11, generator=gen, dtype=torch.float64)
    decay = torch.full((3,), -1.0, dtype=torch.float64)

    def inner(p: dict, h: dict, batch: tuple) -> Tensor:
        features, target = batch
        fit = (features @ p["w"] - target).square().mean()
        return fit + (h["decay"].exp() * p["w"] ** 2).sum()

    def outer(p: dict, h: dict, batch: tuple) -> Tensor:
        features, target = batch
        return (features @ p["w"] - target).abs().pow(3).mean()

    w = torch.linalg.solve(x.T @ x / 11 + torch.diag(decay.exp()), x.T @ y / 11)
    parts = [(x[:7], y[:7]), (x[7:], y[7:])]
    arguments = (inner, outer, {"w": w}, {"decay": decay}, Cholesky())
    whole = hypergradient(*arguments, inner_data=[(x, y)], outer_data=[(x, y)])
    split = hypergradient(*arguments, inner_data=parts, outer_data=parts)
    torch.testing.assert_close(split.value["decay"], whole.value["decay"], rtol=1e-12, atol=1e-14)
    assert whole.stationarity < 1e-12

    # finite differences of the re-solved problem
    def refit(value: Tensor) -> Tensor:
        solved = torch.linalg.solve(x.T @ x / 11 + torch.diag(value.exp()), x.T @ y / 11)
        return (x @ solved - y).abs().pow(3).mean()

    step = 1e-5
    for j in range(3):
        shift = step * torch.eye(3, dtype=torch.float64)[j]
        difference = (refit(decay + shift) - refit(decay - shift)) / (2 * step)
        assert whole.value["decay"][j].item() == pytest.approx(difference.item(), rel=1e-7)


def test_a_hyperparameter_in_neither_loss_is_named(t0: T0) -> None:
    def inner(w: Tensor, h: dict) -> Tensor:
        return t0.inner(w, h["decay"])

    def outer(w: Tensor, h: dict) -> Tensor:
        return t0.outer(w, h["decay"])

    hyper = {"decay": t0.L, "forgotten": torch.ones(2).double()}
    with pytest.raises(GradientError, match="'forgotten'"):
        hypergradient(inner, outer, t0.w_star, hyper, Cholesky())


def test_closing_over_the_hyperparameter_is_an_error_not_zero(t0: T0) -> None:
    outside = t0.L.clone().requires_grad_()
    with pytest.raises(GradientError, match="second argument"):
        hypergradient(
            lambda w, L: t0.inner(w, outside),
            lambda w, L: (t0.C @ w).square().sum(),
            t0.w_star,
            t0.L,
            Cholesky(),
        )


def test_an_unsolved_inner_problem_is_warned_of_with_a_bound(t0: T0) -> None:
    w = t0.w_star + 0.01 * torch.ones(N).double()
    distance = (w - t0.w_star).norm().item()
    with pytest.warns(StationarityWarning, match="to first order") as caught:
        hypergradient(t0.inner, t0.outer, w, t0.L, Cholesky())
    # the inner problem is quadratic, so one Newton step measures the distance
    assert f"|x - x*| <= {distance:.3g}" in str(caught[0].message)
    residual = (t0.H @ w - t0.b).norm().item()
    assert f"|F(x)| = {residual:.3g}" in str(caught[0].message)


def test_an_outer_loss_that_ignores_the_parameters_is_an_error_not_zero(t0: T0) -> None:
    outside = t0.w_star.clone().requires_grad_()
    with pytest.raises(GradientError, match="outer loss does not depend on params"):
        hypergradient(t0.inner, lambda w, L: t0.outer(outside, L), t0.w_star, t0.L, Cholesky())
    with pytest.raises(GradientError, match="outer loss does not depend on params"):
        hypergradient(t0.inner, lambda w, L: L.sum(), t0.w_star, t0.L, Cholesky())


def test_a_parameter_the_inner_loss_does_not_use_is_named(t0: T0) -> None:
    params = {"w": t0.w_star, "idle": torch.ones(2).double()}
    with pytest.raises(GradientError, match="idle"):
        hypergradient(
            lambda p, L: t0.inner(p["w"], L), lambda p, L: t0.outer(p["w"], L), params, t0.L
        )


def test_bad_losses_are_refused(t0: T0) -> None:
    with pytest.raises(GradientError, match="scalar"):
        hypergradient(lambda w, L: w * L, t0.outer, t0.w_star, t0.L)
    with pytest.raises(NonFiniteError, match="outer loss is nan"):
        hypergradient(t0.inner, lambda w, L: t0.outer(w, L) * torch.nan, t0.w_star, t0.L)
    with pytest.raises(GradientError, match="floating"):
        hypergradient(t0.inner, t0.outer, t0.w_star, torch.ones(N, dtype=torch.long))
    with pytest.raises(DataError, match="no batch"):
        hypergradient(t0.inner, t0.outer, t0.w_star, t0.L, inner_data=[])


def test_failed_solve_raises_or_reports(t0: T0) -> None:
    with pytest.raises(SolveError):
        hypergradient(t0.inner, t0.outer, t0.w_star, t0.L, CG(rtol=1e-12, max_steps=2))
    result = hypergradient(
        t0.inner, t0.outer, t0.w_star, t0.L, CG(rtol=1e-12, max_steps=2), throw=False
    )
    assert result.certificate()["solve_residual"] > 1e-12
    assert not result.solution.ok


def test_a_saddle_is_reported_as_negative_curvature() -> None:
    saddle = torch.tensor([1.0, -2.0], dtype=torch.float64)
    with pytest.raises(SolveError, match="positive definite"):
        hypergradient(
            lambda w, L: 0.5 * (saddle * w**2).sum() + (L * w).sum(),
            lambda w, L: w.sum(),
            torch.zeros(2).double(),
            torch.zeros(2).double(),
            CG(),
        )


def test_module_parameters_stay_untouched() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    x, y = torch.randn(20, 4), torch.randint(0, 2, (20,))
    weights = torch.zeros(20)

    def run(p: dict, inputs: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (inputs,))

    def inner(p: dict, h: Tensor, batch: tuple) -> Tensor:
        losses = torch.nn.functional.cross_entropy(run(p, batch[0]), batch[1], reduction="none")
        decay = sum(value.square().sum() for value in p.values())
        return (torch.sigmoid(h) * losses).mean() + 0.05 * decay

    def outer(p: dict, h: Tensor, batch: tuple) -> Tensor:
        return torch.nn.functional.cross_entropy(run(p, batch[0]), batch[1])

    params = dict(model.named_parameters())
    before = {name: value.clone() for name, value in params.items()}
    recipe = Eigh()
    result = hypergradient(
        inner,
        outer,
        params,
        weights,
        recipe,
        inner_data=[(x, y)],
        outer_data=[(x, y)],
        stationary_rtol=None,
    )
    assert result.value.shape == weights.shape
    assert all(torch.equal(before[name], value) for name, value in params.items())
    assert all(value.grad is None for value in params.values())

    # the same by a dense Hessian of an independent flat formulation
    sizes = [value.numel() for value in params.values()]

    def flat_inner(flat: Tensor, h: Tensor) -> Tensor:
        parts = flat.split(sizes)
        named = {n: p.view_as(params[n]) for n, p in zip(params, parts, strict=True)}
        return inner(named, h, (x.to(flat.dtype), y))

    model.double()
    flat = torch.cat([value.detach().double().reshape(-1) for value in before.values()])
    h = weights.double()
    H = torch.autograd.functional.hessian(lambda t: flat_inner(t, h), flat)
    mixed = torch.autograd.functional.jacobian(
        lambda s: torch.autograd.grad(
            flat_inner(flat.requires_grad_(), s), flat, create_graph=True
        )[0],
        h,
    )
    named = {n: p.view_as(params[n]) for n, p in zip(params, flat.split(sizes), strict=True)}
    a = torch.autograd.grad(outer(named, h, (x.double(), y)), flat)[0]
    reference = -mixed.T @ torch.linalg.solve(H, a)
    torch.testing.assert_close(result.value.double(), reference, rtol=2e-3, atol=2e-5)


def test_the_hessian_used_is_that_of_the_inner_loss(t0: T0) -> None:
    from woodbury.bilevel import Bilevel

    problem = Bilevel(t0.inner, t0.outer, t0.w_star, t0.L)
    torch.testing.assert_close(Hessian(problem.inner_objective()).to_dense(), t0.H)
