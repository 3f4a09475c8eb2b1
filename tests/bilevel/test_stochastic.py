"""SOBA, SABA, F2SA and BO-REP: closed forms, unbiasedness, limits, exact resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.bilevel.problems import T0, N
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from woodbury.bilevel import BOREP, F2SA, SABA, SOBA, Bilevel, BilevelAlgorithm
from woodbury.errors import ArgumentError, NonFiniteError

DOUBLE = {"dtype": torch.float64}


def slope_of(t0: T0, L: Tensor) -> Tensor:
    """The hypergradient at any L, through LAPACK's solution."""
    L = L.clone().requires_grad_()
    w = torch.linalg.solve(t0.A + torch.diag(L.exp()), t0.b)
    return torch.autograd.grad(t0.outer(w, L), L)[0]


def well_conditioned() -> T0:
    t0 = T0()
    t0.L += 2  # condition number 7
    return t0


def t0_problem(t0: T0, w: Tensor | None = None) -> tuple[Bilevel, Tensor, Tensor]:
    w, L = torch.zeros(N, **DOUBLE) if w is None else w.clone(), t0.L.clone()
    return Bilevel(t0.inner, t0.outer, w, L), w, L


def longest(t0: T0) -> float:
    return torch.linalg.eigvalsh(t0.H)[-1].item()


class Rows:
    """Ridge regression with a decay per weight over batches of rows, in closed form."""

    def __init__(self, batches: int = 8, n: int = 3) -> None:
        gen = torch.Generator().manual_seed(4)
        sizes = [5] * (batches - 1) + [3]  # the last is smaller: shares matter
        self.sizes = torch.tensor(sizes, **DOUBLE)
        x = [torch.randn(2, size, n, generator=gen, **DOUBLE) for size in sizes]
        truth = torch.tensor([1.0, -1.0, 0.0], **DOUBLE)
        y = [part @ truth + torch.randn(part.shape[:2], generator=gen, **DOUBLE) for part in x]
        self.data = [[(a[k], b[k]) for a, b in zip(x, y, strict=True)] for k in range(2)]
        self.whole = [tuple(torch.cat(parts) for parts in zip(*d, strict=True)) for d in self.data]
        self.w, self.a = torch.zeros(n, **DOUBLE), torch.zeros(n, **DOUBLE)

    @staticmethod
    def inner(w: Tensor, a: Tensor, batch: Any) -> Tensor:
        return 0.5 * (batch[0] @ w - batch[1]).square().mean() + 0.5 * (a.exp() * w**2).sum()

    @staticmethod
    def outer(w: Tensor, a: Tensor, batch: Any) -> Tensor:
        # With a term in a itself: the minimum is then where no decay runs off to infinity.
        return 0.5 * (batch[0] @ w - batch[1]).square().mean() + 0.05 * (a + 1).square().sum()

    def bilevel(self) -> Bilevel:
        return Bilevel(
            self.inner, self.outer, self.w, self.a, inner_data=self.data[0], outer_data=self.data[1]
        )

    def slope(self, a: Tensor) -> Tensor:
        a = a.clone().requires_grad_()
        x, y = self.whole[0]
        w = torch.linalg.solve(x.T @ x / len(y) + torch.diag(a.exp()), x.T @ y / len(y))
        return torch.autograd.grad(self.outer(w, a, self.whole[1]), a)[0]

    def minimum(self) -> Tensor:
        a = self.a.clone()
        for _ in range(3000):
            a = a - 0.5 * self.slope(a)
        assert self.slope(a).norm() < 1e-13
        return a


# ------------------------------------------------------------------------------------ deterministic


def test_soba_moves_all_three_at_once_along_the_closed_forms() -> None:
    t0 = T0()
    problem, w, L = t0_problem(t0)
    method = SOBA(problem, inner=0.1, outer=0.2, adjoint_step=0.05, decay=(0.4, 0.6))
    gen = torch.Generator().manual_seed(1)
    w.copy_(torch.randn(N, generator=gen, **DOUBLE))
    method.z = torch.randn(N, generator=gen, **DOUBLE)
    for t in range(1, 4):
        H, z, at, L0 = t0.A + torch.diag(L.exp()), method.z.clone(), w.clone(), L.clone()
        a = t0.C.T @ (t0.C @ at - t0.e)
        method.step()
        torch.testing.assert_close(w, at - 0.1 * t**-0.4 * (H @ at - t0.b), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            method.z, z - 0.05 * t**-0.4 * (H @ z - a), rtol=1e-12, atol=1e-12
        )
        slope = 0.2 * L0 - L0.exp() * at * z
        torch.testing.assert_close(L, L0 - 0.2 * t**-0.6 * slope, rtol=1e-12, atol=1e-12)


Deterministic = Callable[[Bilevel, float], BilevelAlgorithm]


@pytest.mark.parametrize("method", [SOBA, SABA])
def test_direction_at_the_solution_is_the_exact_hypergradient(method: Any) -> None:
    t0 = T0()
    problem, _, L = t0_problem(t0, t0.w_star)
    algorithm = method(problem, inner=0.1, outer=1.0)
    a = t0.C.T @ (t0.C @ t0.w_star - t0.e)
    algorithm.z = torch.linalg.solve(t0.H, a)
    report = algorithm.step()
    torch.testing.assert_close(t0.L - L, slope_of(t0, t0.L), rtol=1e-9, atol=1e-11)
    assert report.stationarity < 1e-12
    assert report.outer_value == pytest.approx(t0.outer(t0.w_star, t0.L).item())


@pytest.mark.parametrize("method", [SOBA, SABA])
def test_without_noise_constant_steps_converge_to_a_stationary_point(method: Any) -> None:
    t0 = well_conditioned()
    problem, w, L = t0_problem(t0)
    rate = 1.0 / longest(t0)
    algorithm = method(problem, inner=rate, outer=0.02, decay=(0.0, 0.0))
    algorithm.run(4500)
    assert slope_of(t0, L).norm() < 1e-8 * slope_of(t0, t0.L).norm()
    solved = torch.linalg.solve(t0.A + torch.diag(L.exp()), t0.b)
    torch.testing.assert_close(w, solved, rtol=1e-7, atol=1e-9)


def test_f2sa_tends_to_the_hypergradient_like_one_over_the_penalty() -> None:
    t0 = T0()
    exact = slope_of(t0, t0.L)
    errors, penalties = [], (1e2, 1e3, 1e4, 1e5)
    for sigma in penalties:
        problem, _, L = t0_problem(t0, t0.w_star)
        method = F2SA(problem, inner=1e-3, outer=1.0, penalty=(sigma, 0.0), inner_steps=1)
        # The minimiser of g + f / sigma: the inner steps stay where they are.
        matrix = t0.H + t0.C.T @ t0.C / sigma
        method.y = torch.linalg.solve(matrix, t0.b + t0.C.T @ t0.e / sigma)
        method.step()
        errors.append((t0.L - L - exact).norm().item() / exact.norm().item())
    slopes = [
        math.log(errors[k] / errors[k + 1]) / math.log(penalties[k + 1] / penalties[k])
        for k in range(3)
    ]
    assert all(0.97 < slope < 1.03 for slope in slopes[1:]), errors
    assert errors[-1] < 1e-3


def test_f2sa_converges_to_a_stationary_point_as_the_penalty_grows() -> None:
    t0 = well_conditioned()
    norms = []
    for sigma in (1e2, 1e4):
        problem, _, L = t0_problem(t0)
        rate = 1.0 / longest(t0)
        F2SA(problem, inner=rate, outer=0.05, penalty=(sigma, 0.0), inner_steps=4).run(1000)
        norms.append((slope_of(t0, L).norm() / slope_of(t0, t0.L).norm()).item())
    assert norms[1] < norms[0] / 50
    assert norms[1] < 1e-4


def test_bo_rep_moves_along_the_normalised_hypergradient() -> None:
    t0 = well_conditioned()
    problem, _, L = t0_problem(t0, t0.w_star)
    rate = 1.0 / longest(t0)
    method = BOREP(
        problem,
        inner=rate,
        outer=1e-6,
        adjoint_step=rate,
        momentum=0.0,
        period=1,
        inner_steps=10,
    )
    method.run(200)  # with steps this small w and z follow
    before = L.clone()
    report = method.step()
    exact = slope_of(t0, before)
    moved = (before - L) / 1e-6
    torch.testing.assert_close(moved, exact / exact.norm(), rtol=1e-3, atol=1e-4)
    assert moved.norm().item() == pytest.approx(1.0, rel=1e-8)
    assert report.hypergradient_norm == pytest.approx(exact.norm().item(), rel=1e-3)


def test_bo_rep_drift_between_refreshes_is_bounded() -> None:
    t0 = T0()
    problem, w, L = t0_problem(t0, t0.w_star)
    eta, period = 0.02, 4
    method = BOREP(
        problem, inner=0.1, outer=eta, adjoint_step=0.1, period=period, inner_steps=5, warm_epochs=0
    )
    method.run(1)  # the refresh of step 0
    for _ in range(10):
        start, kept = L.clone(), w.clone()
        method.run(period - 1)
        assert torch.equal(w, kept)  # not refreshed in between
        method.run(1)
        assert not torch.equal(w, kept)
        assert (L - start).norm() <= eta * period * (1 + 1e-12)
        rates, solutions = [], []
        for s in torch.linspace(0, 1, 21):
            at = start + s * (L - start)
            H = t0.A + torch.diag(at.exp())
            solutions.append(torch.linalg.solve(H, t0.b))
            mixed = (at.exp() * solutions[-1]).abs().max()
            rates.append((mixed / torch.linalg.eigvalsh(H)[0]).item())
        drift = (solutions[-1] - solutions[0]).norm().item()
        assert 0 < drift <= max(rates) * eta * period


@pytest.mark.parametrize("outer", ["quartic", "exponential"])
def test_unbounded_smoothness_breaks_plain_steps_and_not_normalised_ones(outer: str) -> None:
    def inner(w: Tensor, a: Tensor) -> Tensor:
        return 0.5 * (w - a).square().sum()

    losses = {
        "quartic": lambda w, a: 0.25 * (w - 3).pow(4).sum(),
        "exponential": lambda w, a: torch.cosh(w - 3).sum(),
    }
    rates = {"inner": 0.5, "outer": 0.1, "adjoint_step": 0.5}
    plain = Bilevel(inner, losses[outer], torch.zeros(1, **DOUBLE), torch.full((1,), 23.0).double())
    with pytest.raises(NonFiniteError):
        SOBA(plain, decay=(0.0, 0.0), **rates).run(200)
    a = torch.full((1,), 23.0, **DOUBLE)
    problem = Bilevel(inner, losses[outer], torch.zeros(1, **DOUBLE), a)
    BOREP(problem, **rates).run(400)
    assert abs(a.item() - 3) < 1.5  # from 20 away; 1 / (1 - momentum) steps of length 0.1


def test_bo_rep_averages_inside_a_ball() -> None:
    # One inner step of rate 1 jumps to the minimum at 10: the ball of radius 2 holds it back.
    problem = Bilevel(
        lambda w, a: 0.5 * (w - 10).square().sum() + 0 * a.sum(),
        lambda w, a: w.sum() + a.sum(),
        torch.zeros(1, **DOUBLE),
        torch.zeros(1, **DOUBLE),
    )
    method = BOREP(problem, inner=1.0, outer=0.1, inner_steps=3, radius=2.0, warm_epochs=0)
    method.step()
    assert problem.params[""].item() == 2.0
    free = Bilevel(*problem.losses.values(), torch.zeros(1).double(), torch.zeros(1).double())
    BOREP(free, inner=0.5, outer=0.1, inner_steps=3, warm_epochs=0).step()
    assert free.params[""].item() == pytest.approx((5 + 7.5 + 8.75) / 3)  # the mean
    warm = Bilevel(*problem.losses.values(), torch.zeros(1).double(), torch.zeros(1).double())
    method = BOREP(
        warm,
        inner=1.0,
        outer=0.1,
        inner_steps=1,
        radius=1e-9,
        warm_epochs=2,
        warm_steps=1,
        warm_radius=2.0,
    )
    method.step()  # 0 -> 2, then two steps at rate 1/2 in a ball of radius sqrt 2
    assert warm.params[""].item() == pytest.approx(2 + math.sqrt(2), abs=1e-8)
    assert method.inner_optimizer is not None
    assert method.inner_optimizer.param_groups[0]["lr"] == 1.0


# --------------------------------------------------------------------------------------- stochastic


class Fixed(SABA):
    """SABA that draws what it is told to."""

    pair: tuple[int, int] | None = None

    def draw(self, level: Any) -> Any:
        assert self.pair is not None
        place = self.pair[0] if level == "inner" else self.pair[1]
        return list(self.problem.data[level].passes("draws"))[place]  # type: ignore[union-attr]


def test_saba_is_unbiased_over_all_draws() -> None:
    case = Rows(batches=3)
    gen = torch.Generator().manual_seed(2)
    shares = case.sizes / case.sizes.sum()
    mean = {"w": torch.zeros(3, **DOUBLE), "z": torch.zeros(3, **DOUBLE)}
    mean["a"] = torch.zeros(3, **DOUBLE)
    points = [torch.randn(3, generator=gen, **DOUBLE) for _ in range(3)]
    varied = []
    for i in range(3):
        for j in range(3):
            case.w.zero_(), case.a.zero_()
            method = Fixed(case.bilevel(), inner=0.1, outer=0.1)
            method.pair = (0, 1)
            method.step()  # fills the memory elsewhere
            case.w.copy_(points[0]), case.a.copy_(points[1])
            method.z = points[2].clone()
            method.pair = (i, j)
            method.step()
            share = shares[i] * shares[j]
            mean["w"] += share * (points[0] - case.w) / 0.1
            mean["a"] += share * (points[1] - case.a) / 0.1
            mean["z"] += share * (points[2] - method.z) / 0.1
            varied.append(case.w.clone())
    case.w.copy_(points[0]), case.a.copy_(points[1])
    exact = case.bilevel().joint(points[2])
    outer = case.bilevel().gradients("outer")
    torch.testing.assert_close(mean["w"], exact.gradient, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(mean["z"], exact.hessian_product - outer.params)
    torch.testing.assert_close(mean["a"], outer.hyper - exact.mixed_product)
    assert not torch.allclose(varied[0], varied[4])  # each draw differs


def test_saba_converges_with_constant_steps_where_soba_stalls() -> None:
    case = Rows()
    best = case.minimum()
    ends = {}
    for name, method in (("SOBA", SOBA), ("SABA", SABA)):
        case = Rows()
        algorithm = method(case.bilevel(), inner=0.1, outer=0.1, decay=(0.0, 0.0), seed=3)
        algorithm.run(3000)
        tail = []
        for _ in range(50):
            algorithm.step()
            tail.append((case.a - best).norm().item())
        ends[name] = max(tail)
        if method is SABA:  # and its memory holds what every batch gives at the solution
            memory = algorithm.memory["outer_hyper"]
            exact = torch.stack(
                [
                    torch.autograd.grad(case.outer(case.w, a, batch), a)[0]
                    for batch in case.data[1]
                    for a in [case.a.clone().requires_grad_()]
                ]
            )
            torch.testing.assert_close(memory, exact, rtol=1e-7, atol=1e-9)
    assert ends["SABA"] < 1e-9
    assert ends["SOBA"] > 1e-2


def test_saba_keeps_the_means_of_its_memory() -> None:
    case = Rows()
    method = SABA(case.bilevel(), inner=0.1, outer=0.1)
    method.run(200)
    shares = case.sizes / case.sizes.sum()
    for name in ("inner_gradient", "hessian_product", "mixed_product", "outer_params"):
        torch.testing.assert_close(
            method.memory[f"{name}_mean"], shares @ method.memory[name], rtol=1e-12, atol=1e-13
        )


ADAM = partial(torch.optim.Adam, lr=0.02)
MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ALGORITHMS: dict[str, Callable[[Bilevel], BilevelAlgorithm]] = {
    "SOBA": lambda p: SOBA(p, inner=0.2, outer=0.5, inner_batch_size=6, outer_batch_size=6),
    "SOBA, Adam": lambda p: SOBA(p, inner=MOMENTUM, outer=ADAM, adjoint_step=0.1, decay=(0.0, 0.2)),
    "SABA": lambda p: SABA(p, inner=0.1, outer=MOMENTUM),
    "F2SA": lambda p: F2SA(
        p, inner=0.2, outer=ADAM, inner_steps=3, inner_batch_size=6, outer_batch_size=6
    ),
    "BO-REP": lambda p: BOREP(
        p,
        inner=MOMENTUM,
        outer=0.03,
        adjoint_step=0.1,
        inner_steps=3,
        inner_batch_size=6,
    ),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_resumed_run_is_the_run(name: str) -> None:
    case = Rows()
    whole = ALGORITHMS[name](case.bilevel())
    whole.run(7)
    state = whole.state_dict()
    reports = whole.run(7)
    other = Rows()
    resumed = ALGORITHMS[name](other.bilevel())
    resumed.run(2)
    resumed.load_state_dict(state)
    assert resumed.run(7) == reports
    assert torch.equal(other.w, case.w)
    assert torch.equal(other.a, case.a)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_stochastic_runs_come_near_the_minimum(name: str) -> None:
    case = Rows()
    best = case.minimum()
    start = (case.a - best).norm()
    ALGORITHMS[name](case.bilevel()).run(400)
    assert (case.a - best).norm() < 0.35 * start


@pytest.mark.parametrize("method", [SOBA, SABA, F2SA, BOREP])
def test_float32_stays_float32_and_optimizers_are_checked(method: Any) -> None:
    w, a = torch.zeros(2), torch.zeros(2)
    problem = Bilevel(
        lambda w, a: 0.5 * (w - a).square().sum(), lambda w, a: (w - 1).square().sum(), w, a
    )
    more = {"adjoint_step": 0.2} if method is BOREP else {}
    algorithm = method(problem, inner=0.2, outer=0.05, **more)
    algorithm.run(300)
    assert a.dtype == w.dtype == torch.float32
    assert (a - 1).abs().max() < (0.5 if method is BOREP else 0.1)
    if method is not BOREP:
        what = "penalised_step" if method is F2SA else "adjoint_step"
        with pytest.raises(ArgumentError, match=f"give {what}"):
            method(problem, inner=ADAM, outer=0.1)
        for bad in (0.0, math.inf, math.nan):
            with pytest.raises(ArgumentError, match=f"{what} is"):
                method(problem, inner=0.1, outer=0.1, **{what: bad})


def test_rates_of_the_optimizers_decay() -> None:
    case = Rows()
    method = SOBA(case.bilevel(), inner=0.2, outer=0.5)
    method.run(10)
    assert method.inner_optimizer is not None
    assert method.inner_optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 10**-0.4)
    assert method.outer_optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 10**-0.6)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (SOBA, {"decay": (-0.1, 0.0)}, "decay is"),
        (SABA, {"decay": (0.1,)}, "two exponents"),
        (F2SA, {"penalty": (0.0, 0.1)}, "penalty is"),
        (F2SA, {"penalty": (1.0, -0.1)}, "power >= 0"),
        (F2SA, {"inner_steps": 0}, "inner_steps is 0"),
        (BOREP, {"momentum": 1.0}, "momentum is 1.0"),
        (BOREP, {"period": 0}, "period is 0"),
        (BOREP, {"radius": 0.0}, "radius is 0.0"),
        (BOREP, {"warm_radius": math.nan}, "warm_radius is nan"),
        (BOREP, {"adjoint_step": 0.0}, "adjoint_step is 0.0"),
        (BOREP, {"warm_epochs": -1}, "warm_epochs is -1"),
    ],
)
def test_settings_that_make_no_sense(method: Any, options: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        method(Rows().bilevel(), inner=0.1, outer=0.1, **options)


def test_saba_refuses_what_it_cannot_remember() -> None:
    case = Rows()
    rows = DataLoader(TensorDataset(*case.whole[0]), batch_size=4, shuffle=True)
    problem = Bilevel(
        case.inner, case.outer, case.w, case.a, inner_data=rows, outer_data=case.data[1]
    )
    with pytest.raises(ArgumentError, match="the inner data comes from a loader"):
        SABA(problem, inner=0.1, outer=0.1)


@pytest.mark.parametrize("method", [SOBA, SABA, F2SA, BOREP])
def test_steps_too_long_are_an_error_and_not_a_number(method: Any) -> None:
    t0 = T0()
    problem, _, L = t0_problem(t0)
    more = {} if method is not BOREP else {"adjoint_step": 1e3}
    with pytest.raises(NonFiniteError):
        method(problem, inner=1e3, outer=1e-3, **more).run(400)
    assert torch.isfinite(L).all()
