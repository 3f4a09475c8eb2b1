"""stocBiO and AmIGO against the series and the recursions they are, batch by batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.bilevel.problems import T0, N
from torch import Tensor

from woodbury import CG, Neumann
from woodbury.bilevel import AlternatingIFT, AmIGO, Bilevel, StocBiO
from woodbury.errors import ArgumentError, NonFiniteError
from woodbury.implicit import Implicit


@pytest.fixture
def t0() -> T0:
    return T0()


def problem_of(t0: T0) -> Bilevel:
    return Bilevel(t0.inner, t0.outer, t0.w_star.clone(), t0.L.clone())


def largest(t0: T0) -> float:
    return torch.linalg.eigvalsh(t0.H)[-1].item()


def test_on_all_data_stocbio_is_alternating_descent_with_the_neumann_series(t0: T0) -> None:
    step = 0.8 / largest(t0)
    one, two = problem_of(t0), problem_of(t0)
    rates = {"inner": step, "outer": 0.1, "inner_steps": 3}
    reports = StocBiO(one, step=step, terms=4, **rates).run(5)
    others = AlternatingIFT(two, Neumann(4, step=step), **rates).run(5)
    torch.testing.assert_close(one.hyper_vector(), two.hyper_vector(), rtol=1e-12, atol=1e-13)
    for found, other in zip(reports, others, strict=True):
        assert found.outer_value == pytest.approx(other.outer_value, rel=1e-12)
        assert found.stationarity == pytest.approx(other.stationarity, rel=1e-9)


class Batched:
    """A quadratic inner loss whose Hessian and mixed derivative differ from batch to batch."""

    def __init__(self) -> None:
        gen = torch.Generator().manual_seed(0)
        self.x = torch.randn(6, 3, generator=gen).double()
        self.w, self.a = torch.ones(3).double(), torch.full((6,), 0.2).double()
        parts = [(self.x[i : i + 2], torch.arange(i, i + 2)) for i in (0, 2, 4)]
        self.problem = Bilevel(
            self.inner, self.outer, self.w, self.a, inner_data=parts, outer_data=parts
        )
        self.batches = [batch for batch, _ in self.problem.batches("inner")]

    @staticmethod
    def inner(w: Tensor, a: Tensor, batch: tuple) -> Tensor:
        x, rows = batch
        fit = 0.5 * (a[rows].sigmoid() * (x @ w - 1).square()).mean()
        return fit + 0.5 * w.square().sum()

    @staticmethod
    def outer(w: Tensor, a: Tensor, batch: tuple) -> Tensor:
        x, rows = batch
        return 0.5 * (x @ w).square().mean() + 0.1 * a[rows].square().mean()


class Scripted:
    """A sampler that draws what it is told."""

    def __init__(self, batches: list) -> None:
        self.batches = iter(batches)

    def draw(self) -> object:
        return next(self.batches)


def test_the_mean_of_stocbio_over_all_draws_is_the_series_of_the_mean_hessian() -> None:
    case = Batched()
    before = case.a.clone()
    directions = []
    for inner in itertools.product(case.batches, repeat=3):  # two factors, one mixed product
        for outer in case.batches:
            case.a.copy_(before)
            algorithm = StocBiO(
                case.problem, inner=0.1, outer=1.0, step=0.3, terms=2, inner_steps=0
            )
            algorithm.samplers = {"inner": Scripted(list(inner)), "outer": Scripted([outer])}
            algorithm.step()
            directions.append(before - case.a)
    case.a.copy_(before)
    whole = StocBiO(
        case.problem,
        inner=0.1,
        outer=1.0,
        step=0.3,
        terms=2,
        inner_steps=0,
        inner_batch_size="all",
        outer_batch_size="all",
    )
    whole.step()
    mean = torch.stack(directions).mean(0)
    torch.testing.assert_close(mean, before - case.a, rtol=1e-12, atol=1e-14)
    assert torch.stack(directions).std(0).min() > 1e-3  # the draws do differ


def test_the_adjoint_of_amigo_contracts_by_a_known_matrix(t0: T0) -> None:
    beta, steps = 0.9 / largest(t0), 3
    problem = problem_of(t0)
    algorithm = AmIGO(
        problem,
        inner=1e-3,
        outer=1e-300,
        adjoint_step=beta,
        adjoint_steps=steps,
        inner_steps=0,
    )
    a = t0.C.T @ (t0.C @ t0.w_star - t0.e)
    exact = torch.linalg.solve(t0.H, a)
    contraction = torch.linalg.matrix_power(torch.eye(N).double() - beta * t0.H, steps)
    for _ in range(4):
        error = algorithm.z - exact
        algorithm.step()
        torch.testing.assert_close(algorithm.z - exact, contraction @ error, rtol=1e-9, atol=1e-10)


def test_the_first_step_of_amigo_is_the_neumann_series(t0: T0) -> None:
    beta = 0.9 / largest(t0)
    one, two = problem_of(t0), problem_of(t0)
    AmIGO(one, inner=1.0, outer=0.1, adjoint_step=beta, adjoint_steps=6, inner_steps=0).step()
    AlternatingIFT(two, Neumann(5, step=beta), inner=1.0, outer=0.1, inner_steps=0).step()
    torch.testing.assert_close(one.hyper_vector(), two.hyper_vector(), rtol=1e-12, atol=1e-13)


def test_amigo_with_few_steps_ends_where_exact_hypergradients_end() -> None:
    gen = torch.Generator().manual_seed(1)
    target = torch.randn(4, generator=gen).double()
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])).double()

    def inner(w: Tensor, a: Tensor) -> Tensor:
        return 0.5 * w @ A @ w - a @ w

    def outer(w: Tensor, a: Tensor) -> Tensor:
        return 0.5 * (w - target).square().sum() + 0.05 * a.square().sum()

    # stationary where A^-1 (A^-1 a - t) + 0.1 a = 0
    inverse = torch.linalg.inv(A)
    exact = torch.linalg.solve(inverse @ inverse + 0.1 * torch.eye(4).double(), inverse @ target)
    ends = []
    for make in (
        lambda p: AmIGO(p, inner=0.2, outer=0.3, adjoint_step=0.2, adjoint_steps=1, inner_steps=1),
        lambda p: AlternatingIFT(
            p, Implicit(CG(max_steps=1), on_failure="ignore"), inner=0.2, outer=0.3
        ),
    ):
        a = torch.zeros(4).double()
        make(Bilevel(inner, outer, torch.zeros(4).double(), a)).run(600)
        ends.append(a)
    for end in ends:
        torch.testing.assert_close(end, exact, rtol=1e-6, atol=1e-8)


def test_equal_products_are_counted_alike() -> None:
    case = Batched()
    sizes = {"inner_batch_size": 2, "outer_batch_size": 2}
    StocBiO(case.problem, inner=0.1, outer=0.1, step=0.1, terms=3, inner_steps=5, **sizes).step()
    counts = case.problem.counts
    assert counts.outer_gradients == 2
    assert counts.mixed_products == 2
    assert counts.hessian_products == 2 * (3 + 1)  # the joint product comes with one
    assert counts.inner_gradients == 2 * (5 + 3 + 1)


@pytest.mark.parametrize("name", ["StocBiO", "AmIGO"])
def test_a_step_that_is_too_long_is_an_error_and_moves_nothing(t0: T0, name: str) -> None:
    problem = problem_of(t0)
    before = problem.hyper_vector()
    if name == "StocBiO":
        algorithm = StocBiO(problem, inner=1e-3, outer=1.0, step=1e150, terms=4, inner_steps=0)
    else:
        algorithm = AmIGO(
            problem, inner=1e-3, outer=1.0, adjoint_step=1e150, adjoint_steps=4, inner_steps=0
        )
    with pytest.raises(NonFiniteError, match="lower it"):
        algorithm.step()
    assert torch.equal(problem.hyper_vector(), before)


def test_what_makes_no_sense_is_refused(t0: T0) -> None:
    problem = problem_of(t0)
    for step in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ArgumentError, match="step is"):
            StocBiO(problem, inner=0.1, outer=0.1, step=step)
        with pytest.raises(ArgumentError, match="adjoint_step is"):
            AmIGO(problem, inner=0.1, outer=0.1, adjoint_step=step)
    for count in (-1, 2.0, True):
        with pytest.raises(ArgumentError, match="terms"):
            StocBiO(problem, inner=0.1, outer=0.1, step=0.1, terms=count)
    with pytest.raises(ArgumentError, match=">= 1"):
        AmIGO(problem, inner=0.1, outer=0.1, adjoint_step=0.1, adjoint_steps=0)
