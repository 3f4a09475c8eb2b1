"""What every algorithm owes: optimizers, reports, exact resume, refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tests.bilevel.problems import T0, N, written
from torch import Tensor

from woodbury import CG, Neumann
from woodbury.bilevel import (
    AlternatingIFT,
    AlternatingNystrom,
    AmIGO,
    Bilevel,
    BilevelAlgorithm,
    FiniteDifference,
    StocBiO,
    UnrolledDescent,
    hypergradient,
)
from woodbury.errors import ArgumentError, GradientError, SolveError
from woodbury.implicit import Implicit, OneStep, Truncated
from woodbury.solvers import SolveStatus
from woodbury.solvers.solve import SolveWarning


class Rows:
    """Ridge regression with a decay per weight, over rows, in closed form."""

    def __init__(self, rows: int = 40, n: int = 4) -> None:
        gen = torch.Generator().manual_seed(0)
        self.x = torch.randn(2, rows, n, generator=gen, dtype=torch.float64)
        truth = torch.tensor([1.0, -2.0, 0.0, 0.0], dtype=torch.float64)
        noise = torch.randn(2, rows, generator=gen, dtype=torch.float64)
        self.y = self.x @ truth + noise
        self.w, self.a = torch.zeros(n).double(), torch.zeros(n).double()
        self.data = [(self.x[i], self.y[i]) for i in range(2)]

    @staticmethod
    def inner(w: Tensor, a: Tensor, batch: tuple) -> Tensor:
        return 0.5 * (batch[0] @ w - batch[1]).square().mean() + 0.5 * (a.exp() * w**2).sum()

    @staticmethod
    def outer(w: Tensor, a: Tensor, batch: tuple) -> Tensor:
        return 0.5 * (batch[0] @ w - batch[1]).square().mean()

    def bilevel(self) -> Bilevel:
        return Bilevel(
            self.inner,
            self.outer,
            self.w,
            self.a,
            inner_data=[self.data[0]],
            outer_data=[self.data[1]],
        )


Make = Callable[[Bilevel], BilevelAlgorithm]
SIZES = {"inner_batch_size": 8, "outer_batch_size": 8}
ADAM = partial(torch.optim.Adam, lr=0.05)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ALGORITHMS: dict[str, Make] = {
    "Neumann": lambda p: AlternatingIFT(
        p, Neumann(3, step=0.1), inner=SGD, outer=ADAM, inner_steps=3, **SIZES
    ),
    "CG, warm": lambda p: AlternatingIFT(p, CG(rtol=1e-3), inner=ADAM, outer=0.1, **SIZES),
    "restart": lambda p: AlternatingIFT(
        p, CG(), inner=SGD, outer=ADAM, inner_steps=5, restart=True, **SIZES
    ),
    "unrolled": lambda p: AlternatingIFT(p, UnrolledDescent(4, 0.1), inner=0.1, outer=0.1, **SIZES),
    "stocBiO": lambda p: StocBiO(
        p, inner=SGD, outer=ADAM, step=0.1, terms=3, inner_steps=3, **SIZES
    ),
    "AmIGO": lambda p: AmIGO(
        p, inner=SGD, outer=ADAM, adjoint_step=0.1, adjoint_steps=3, inner_steps=3, **SIZES
    ),
    "Nystrom": lambda p: AlternatingNystrom(
        p, rank=2, damping=0.5, inner=0.1, outer=SGD, inner_steps=2, **SIZES
    ),
    "Nystrom, kept": lambda p: AlternatingNystrom(
        p, rank=2, damping=0.5, inner=0.1, outer=SGD, inner_steps=2, keep=True, refresh=1.1, **SIZES
    ),
    "Nystrom, Gaussian, kept": lambda p: AlternatingNystrom(
        p,
        rank=4,
        damping=0.5,
        method="gaussian",
        keep=True,
        inner=0.1,
        outer=SGD,
        inner_steps=2,
        **SIZES,
    ),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_resumed_run_is_the_run(name: str) -> None:
    case = Rows()
    whole = ALGORITHMS[name](case.bilevel())
    whole.run(6)
    state = written(whole.state_dict())
    reports = whole.run(6)
    other = Rows()
    resumed = ALGORITHMS[name](other.bilevel())
    resumed.run(1)  # whatever it did before is forgotten
    resumed.load_state_dict(state)
    assert resumed.run(6) == reports
    assert torch.equal(other.w, case.w)
    assert torch.equal(other.a, case.a)
    assert other.a.abs().min() > 0  # something moved


def test_a_state_of_something_else_is_refused() -> None:
    case = Rows()
    algorithm = ALGORITHMS["Neumann"](case.bilevel())
    state = algorithm.state_dict()
    with pytest.raises(ArgumentError, match="params"):
        algorithm.load_state_dict({**state, "params": {"": torch.zeros(9)}})
    with pytest.raises(ArgumentError, match="another method"):
        algorithm.load_state_dict({**state, "own": {}})
    with pytest.raises(ArgumentError, match="inner optimizer"):
        algorithm.load_state_dict({**state, "inner_optimizer": None})


@pytest.mark.parametrize(
    "estimator",
    [
        CG(rtol=1e-10),
        Implicit(CG(rtol=1e-10)),
        Neumann(400, step=0.3),
        Truncated(steps=400, step=0.3),
        FiniteDifference(CG(rtol=1e-9)),
        UnrolledDescent(400, 0.3),
    ],
    ids=lambda e: type(e).__name__,
)
def test_one_deterministic_step_is_descent_along_the_hypergradient(estimator: object) -> None:
    case = Rows()
    start = case.a.clone()
    algorithm = AlternatingIFT(
        case.bilevel(),
        estimator,
        inner=0.3,
        outer=0.5,
        inner_steps=400,  # type: ignore[arg-type]
    )
    report = algorithm.step()
    x, y = case.data[0]
    solved = torch.linalg.solve(x.T @ x / 40 + torch.diag(start.exp()), x.T @ y / 40)
    torch.testing.assert_close(case.w, solved, rtol=1e-9, atol=1e-12)
    exact = hypergradient(
        case.inner,
        case.outer,
        solved,
        start,
        CG(rtol=1e-12),
        inner_data=[case.data[0]],
        outer_data=[case.data[1]],
    )
    torch.testing.assert_close((start - case.a) / 0.5, exact.value, rtol=1e-6, atol=1e-9)
    assert report.hypergradient_norm == pytest.approx(exact.value.norm().item(), rel=1e-6)
    assert report.outer_value == pytest.approx(exact.outer_value, rel=1e-9)
    assert report.stationarity < 1e-9
    assert report.step == 1
    assert report.products == algorithm.counts.total


@pytest.mark.parametrize("name", ALGORITHMS)
def test_stochastic_runs_lower_the_outer_loss_at_the_inner_solution(name: str) -> None:
    case = Rows()
    x, y = case.data[0]

    def outer_at(a: Tensor) -> float:
        solved = torch.linalg.solve(x.T @ x / 40 + torch.diag(a.exp()), x.T @ y / 40)
        return case.outer(solved, a, case.data[1]).item()

    before = outer_at(case.a)
    best = min(outer_at(torch.full((4,), v).double()) for v in (-8.0, -4.0, -2.0, 0.0))
    ALGORITHMS[name](case.bilevel()).run(120)
    after = outer_at(case.a)
    assert after < before - 0.4 * (before - best)


def test_restart_begins_each_time_from_the_same_point() -> None:
    case = Rows()
    algorithm = AlternatingIFT(
        case.bilevel(), CG(), inner=SGD, outer=1e-30, inner_steps=3, restart=True
    )
    algorithm.step()
    first = case.w.clone()
    algorithm.step()
    assert torch.equal(case.w, first)


def test_project_is_applied_in_place_after_the_outer_step() -> None:
    case = Rows()
    algorithm = AlternatingIFT(
        case.bilevel(), CG(), inner=0.1, outer=1e3, project=lambda a: a.clamp_(-0.5, 0.5)
    )
    algorithm.step()
    assert (case.a.abs() == 0.5).all()


def test_gradients_of_the_caller_stay_and_any_optimizer_may_be_given() -> None:
    case = Rows()
    case.w.requires_grad_()
    case.w.grad = torch.full((4,), 7.0).double()
    inner = torch.optim.RMSprop([case.w], lr=1e-2)
    algorithm = AlternatingIFT(
        case.bilevel(), CG(), inner=inner, outer=partial(torch.optim.Adagrad, lr=0.1)
    )
    before = case.w.detach().clone()
    algorithm.run(3)
    assert (case.w.grad == 7).all()
    assert case.w.is_leaf
    assert not torch.equal(case.w.detach(), before)
    assert isinstance(algorithm.outer_optimizer, torch.optim.Adagrad)


def test_what_makes_no_sense_is_refused() -> None:
    case = Rows()
    problem = case.bilevel()
    make = partial(AlternatingIFT, problem, CG())
    with pytest.raises(ArgumentError, match="LBFGS"):
        make(inner=torch.optim.LBFGS, outer=0.1)
    with pytest.raises(ArgumentError, match="make it with those"):
        make(inner=torch.optim.SGD([torch.ones(2)], lr=0.1), outer=0.1)
    for rate in (0, -1.0, float("nan")):
        with pytest.raises(ArgumentError, match="positive"):
            make(inner=0.1, outer=rate)
    with pytest.raises(ArgumentError, match="factory"):
        make(inner="adam", outer=0.1)
    for steps in (-1, 1.5, True):
        with pytest.raises(ArgumentError, match="inner_steps"):
            make(inner=0.1, outer=0.1, inner_steps=steps)
    with pytest.raises(ArgumentError, match="estimator is str"):
        AlternatingIFT(problem, "cg", inner=0.1, outer=0.1)  # type: ignore[arg-type]
    computed = torch.ones(4, requires_grad=True).double() * 2
    with pytest.raises(GradientError, match="leaf"):
        AlternatingIFT(Bilevel(case.inner, case.outer, computed, case.a), inner=0.1, outer=0.1)
    with pytest.raises(GradientError, match="shares memory"):
        AlternatingIFT(Bilevel(case.inner, case.outer, case.a, case.a), inner=0.1, outer=0.1)
    with pytest.raises(NotImplementedError, match="_step"):
        BilevelAlgorithm(problem, outer=0.1).step()
    with pytest.raises(ArgumentError, match="no inner optimizer"):
        BilevelAlgorithm(problem, outer=0.1).descend(1)


def test_a_diverging_series_warns_or_raises_and_is_in_the_report() -> None:
    t0 = T0()
    w, L = t0.w_star.clone(), t0.L.clone()
    step = 2.5 / torch.linalg.eigvalsh(t0.H)[-1].item()
    recipe = Neumann(60, step=step)
    problem = Bilevel(t0.inner, t0.outer, w, L)
    with pytest.raises(SolveError, match="lower the step"):
        AlternatingIFT(problem, recipe, inner=1e-3, outer=1e-3).step()
    mode = Implicit(recipe, on_failure="warn")
    with pytest.warns(SolveWarning, match="lower the step"):
        report = AlternatingIFT(problem, mode, inner=1e-3, outer=1e-3).step()
    assert report.status is SolveStatus.diverged
    assert len(w) == N


def test_one_step_is_the_identity_times_its_step() -> None:
    case = Rows()
    moved = []
    for estimator in (OneStep(step=0.2), Neumann(0, step=0.2)):
        case = Rows()
        case.w.fill_(1.0)
        AlternatingIFT(case.bilevel(), estimator, inner=0.1, outer=1.0, inner_steps=0).step()
        moved.append(case.a.clone())
    a = Rows.bilevel(case).params_gradient("outer")
    torch.testing.assert_close(moved[0], 0.2 * a)  # J = diag(exp(a) w) = 1, and the step is -J q
    assert torch.equal(moved[0], moved[1])
