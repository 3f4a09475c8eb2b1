"""The oracles of a bilevel problem against closed forms and torch's own derivatives."""

from __future__ import annotations

import pytest
import torch
from tests.bilevel.problems import T0, N
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from woodbury.bilevel import Bilevel
from woodbury.errors import (
    ArgumentError,
    DataError,
    DtypeError,
    GradientError,
    NonFiniteError,
    ShapeError,
)


@pytest.fixture
def t0() -> T0:
    return T0()


def problem_of(t0: T0) -> Bilevel:
    return Bilevel(t0.inner, t0.outer, t0.w_star + 0.1, t0.L)


def random(n: int, seed: int = 3) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_oracle_is_its_closed_form(t0: T0) -> None:
    problem, v = problem_of(t0), random(N)
    w = t0.w_star + 0.1
    joint = problem.joint(v)
    assert joint.value == pytest.approx(t0.inner(w, t0.L).item())
    torch.testing.assert_close(joint.gradient, t0.H @ w - t0.b)
    torch.testing.assert_close(joint.hessian_product, t0.H @ v)
    torch.testing.assert_close(joint.mixed_product, t0.L.exp() * w * v)
    torch.testing.assert_close(problem.hessian_product(v), joint.hessian_product)
    torch.testing.assert_close(problem.mixed_product(v), joint.mixed_product)
    outer = problem.gradients("outer")
    torch.testing.assert_close(outer.params, t0.C.T @ (t0.C @ w - t0.e))
    torch.testing.assert_close(outer.hyper, 0.2 * t0.L)
    assert problem.value("outer") == outer.value == pytest.approx(t0.outer(w, t0.L).item())
    torch.testing.assert_close(problem.params_gradient("inner"), joint.gradient)
    for point in (problem.linearize(), problem.linearize(batch=None, cache=None)):
        torch.testing.assert_close(point.hessian.to_dense(), t0.H)
        torch.testing.assert_close(point.gradient, joint.gradient)


class Regression:
    """Weighted, regularised logistic losses over rows: both second derivatives depend on both."""

    def __init__(self, rows: int = 11) -> None:
        self.x, self.y = random(rows * 3).view(rows, 3), (random(rows, 4) > 0).double()
        self.rows = torch.arange(rows)
        self.params = {"w": random(3, 5), "b": random(1, 6)}
        self.hyper = {"weights": random(rows, 7), "decay": random(3, 8)}

    def inner(self, p: dict, h: dict, batch: tuple) -> Tensor:
        x, y, rows = batch
        losses = torch.nn.functional.softplus((x @ p["w"] + p["b"]) * (1 - 2 * y))
        fit = (torch.sigmoid(h["weights"][rows]) * losses).mean()
        return fit + (h["decay"].exp() * p["w"] ** 2).sum() + 0.1 * (p["b"] ** 2).sum()

    def outer(self, p: dict, h: dict, batch: tuple) -> Tensor:
        x, y, _ = batch
        return (x @ p["w"] + p["b"] - y).square().mean()

    @property
    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.y, self.rows

    def bilevel(self, data: object) -> Bilevel:
        return Bilevel(
            self.inner, self.outer, self.params, self.hyper, inner_data=data, outer_data=data
        )

    def flat(self, w: Tensor, h: Tensor) -> Tensor:
        params = {"w": w[:3], "b": w[3:]}
        return self.inner(params, {"weights": h[:11], "decay": h[11:]}, self.data)


@pytest.mark.parametrize("cuts", [(11,), (7, 4), (2, 3, 6)])
def test_oracles_over_batches_are_those_of_the_mean(cuts: tuple[int, ...]) -> None:
    case = Regression()
    parts = [torch.split(part, cuts) for part in case.data]
    problem = case.bilevel(list(zip(*parts, strict=True)))
    w, h, v = problem.params_vector(), problem.hyper_vector(), random(4, 9)
    H = hessian(lambda t: case.flat(t, h), w)

    def gradient(s: Tensor) -> Tensor:
        leaf = w.clone().requires_grad_()
        return torch.autograd.grad(case.flat(leaf, s), leaf, create_graph=True)[0]

    J = jacobian(gradient, h).T
    joint = problem.joint(v)
    assert joint.value == pytest.approx(case.flat(w, h).item(), rel=1e-12)
    torch.testing.assert_close(joint.hessian_product, H @ v)
    torch.testing.assert_close(joint.mixed_product, J @ v)
    torch.testing.assert_close(problem.linearize().hessian.to_dense(), H)
    found = problem.gradients("inner")
    torch.testing.assert_close(found.params, gradient(h).detach())
    of_h = jacobian(lambda s: case.flat(w, s), h)
    torch.testing.assert_close(found.hyper, of_h)


def test_the_mean_over_draws_is_the_mean_over_the_data() -> None:
    """Exact expectation over all that can be drawn, weighted by its probability."""
    case = Regression()
    parts = [torch.split(part, (2, 3, 6)) for part in case.data]
    problem = case.bilevel(list(zip(*parts, strict=True)))
    batches = [batch for batch, _ in problem.batches("inner")]
    mean = sum(
        share * problem.params_gradient("inner", batch) for batch, share in problem.batches("inner")
    )
    torch.testing.assert_close(mean, problem.params_gradient("inner"))
    # and the sampler draws with those probabilities
    sampler = problem.sampler("inner", None, torch.Generator().manual_seed(0))
    drawn = torch.zeros(3)
    for _ in range(3000):
        batch = sampler.draw()
        assert batch is not None
        drawn[batch.index] += 1
    expected = torch.tensor([batch.size for batch in batches]) / 11
    assert ((drawn / 3000 - expected).abs() < 4 * (expected * (1 - expected) / 3000).sqrt()).all()
    assert sampler.count == 3


def test_rows_are_drawn_once_an_epoch_with_their_targets() -> None:
    case = Regression()
    problem = case.bilevel([case.data])
    sampler = problem.sampler("inner", 4, torch.Generator().manual_seed(0))
    for _ in range(5):
        first, second = sampler.draw(), sampler.draw()
        assert first is not None
        assert second is not None
        rows = torch.cat([first.data[2], second.data[2]])
        assert len(set(rows.tolist())) == 8
        torch.testing.assert_close(first.data[0], case.x[first.data[2]])
        torch.testing.assert_close(first.data[1], case.y[first.data[2]])
    assert problem.sampler("inner", "all").draw() is None


@pytest.mark.parametrize("size", [None, 4])
def test_a_sampler_resumes(size: int | None) -> None:
    case = Regression()
    parts = [torch.split(part, (2, 3, 6)) for part in case.data]
    problem = case.bilevel(list(zip(*parts, strict=True)))
    sampler = problem.sampler("inner", size, torch.Generator().manual_seed(1))
    for _ in range(3):
        sampler.draw()
    state = sampler.state_dict()
    after = [sampler.draw().data[2].tolist() for _ in range(6)]
    other = problem.sampler("inner", size, torch.Generator().manual_seed(99))
    other.load_state_dict(state)
    assert [other.draw().data[2].tolist() for _ in range(6)] == after


def test_a_loader_is_streamed_and_resumes() -> None:
    case = Regression()
    dataset = torch.utils.data.TensorDataset(*case.data)
    problem = case.bilevel(torch.utils.data.DataLoader(dataset, batch_size=4))
    sampler = problem.sampler("inner")
    first = [sampler.draw().data[2].tolist() for _ in range(4)]
    assert first == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10], [0, 1, 2, 3]]
    state = sampler.state_dict()
    other = problem.sampler("inner")
    other.load_state_dict(state)
    assert other.draw().data[2].tolist() == sampler.draw().data[2].tolist() == [4, 5, 6, 7]
    with pytest.raises(DataError, match="not in memory"):
        problem.sampler("inner", 2)


def test_counts_are_in_examples() -> None:
    case = Regression()
    parts = [torch.split(part, (7, 4)) for part in case.data]
    problem = case.bilevel(list(zip(*parts, strict=True)))
    problem.params_gradient("inner")
    assert problem.counts.inner_gradients == 11
    batch = problem.sampler("inner", 3).draw()
    problem.joint(random(4), batch)
    counts = problem.counts
    assert (counts.inner_gradients, counts.hessian_products, counts.mixed_products) == (14, 3, 3)
    problem.gradients("outer")
    problem.value("outer")
    assert (counts.outer_gradients, counts.values) == (11, 11)
    assert counts.total == 14 + 3 + 3 + 11 + 11
    point = problem.linearize()
    point.hessian @ torch.eye(4).double()
    assert counts.hessian_products == 3 + 4 * 11
    assert problem.at(problem.params_vector()).counts is counts


def test_it_follows_the_tensors_of_the_caller(t0: T0) -> None:
    w, L = t0.w_star.clone(), t0.L.clone()
    problem = Bilevel(t0.inner, t0.outer, w, L)
    problem.linearize().hessian @ random(N)
    problem.set_params(2 * t0.w_star)
    problem.set_hyper(t0.L + 1)
    torch.testing.assert_close(w, 2 * t0.w_star)
    H = t0.A + torch.diag((t0.L + 1).exp())
    torch.testing.assert_close(problem.linearize().hessian.to_dense(), H)
    torch.testing.assert_close(problem.params_gradient("inner"), H @ w - t0.b)
    elsewhere = problem.at(t0.w_star, t0.L)
    torch.testing.assert_close(elsewhere.linearize().hessian.to_dense(), t0.H)
    torch.testing.assert_close(w, 2 * t0.w_star)
    assert w.grad is None
    assert not w.requires_grad


def test_in_place_changes_between_linearisation_and_product_are_refused() -> None:
    case = Regression()
    problem = case.bilevel([case.data])
    batch = problem.sampler("inner").draw()
    for tensor in (case.params["w"], case.hyper["decay"]):
        point = problem.linearize(batch)
        tensor.add_(1.0)
        for product in (point.hessian.matvec, point.mixed_parts):
            with pytest.raises(GradientError, match="changed in place"):
                product(random(4))
    whole = problem.linearize()
    case.params["w"].add_(1.0)
    with pytest.raises(GradientError, match="changed in place"):
        whole.hessian @ random(4)


def test_reduce_is_applied_to_every_gradient_and_product(t0: T0) -> None:
    half = Bilevel(t0.inner, t0.outer, t0.w_star + 0.1, t0.L, reduce=lambda x: 0.5 * x)
    whole, v = problem_of(t0), random(N)
    one, other = half.joint(v), whole.joint(v)
    for name in ("gradient", "hessian_product", "mixed_product"):
        torch.testing.assert_close(2 * getattr(one, name), getattr(other, name))
    torch.testing.assert_close(2 * (half.linearize().hessian @ v), whole.linearize().hessian @ v)
    torch.testing.assert_close(2 * half.gradients("outer").hyper, whole.gradients("outer").hyper)


def test_what_makes_no_sense_is_refused(t0: T0) -> None:
    with pytest.raises(GradientError, match="int64"):
        Bilevel(t0.inner, t0.outer, torch.ones(N, dtype=torch.long), t0.L)
    with pytest.raises(GradientError, match="bool"):
        Bilevel(t0.inner, t0.outer, t0.w_star, {"a": torch.ones(N, dtype=torch.bool)})
    with pytest.raises(GradientError, match="empty"):
        Bilevel(t0.inner, t0.outer, {}, t0.L)
    with pytest.raises(DataError, match="no batch"):
        Bilevel(t0.inner, t0.outer, t0.w_star, t0.L, inner_data=[])
    with pytest.raises(DataError, match="no rows"):
        Bilevel(t0.inner, t0.outer, t0.w_star, t0.L, outer_data=[torch.ones(0, 3)])
    with pytest.raises(DataError, match="more than once"):
        Bilevel(t0.inner, t0.outer, t0.w_star, t0.L, inner_data=iter([torch.ones(2)]))
    with pytest.raises(DtypeError, match="several dtypes"):
        Bilevel(t0.inner, t0.outer, {"a": t0.w_star, "b": torch.ones(2)}, t0.L)
    problem = problem_of(t0)
    with pytest.raises(ShapeError):
        problem.at(torch.ones(N + 1).double())
    with pytest.raises(ShapeError):
        problem.set_params(torch.ones(N, 1).double())
    for size in (0, -1, True, "some", 2.5):
        with pytest.raises(ArgumentError, match="batch_size"):
            problem.sampler("inner", size)  # type: ignore[arg-type]
    rows = Regression()
    with pytest.raises(ArgumentError, match="11 rows"):
        rows.bilevel([rows.data]).sampler("inner", 12)
    with pytest.raises(NonFiniteError):
        problem.at(torch.full((N,), torch.nan).double()).params_gradient("inner")


def test_an_infinite_gradient_of_a_finite_loss_is_refused() -> None:
    problem = Bilevel(
        lambda w, a: (a * w).abs().sqrt().sum(),
        lambda w, a: w.sum(),
        torch.zeros(2),
        torch.ones(2),
    )
    with pytest.raises(NonFiniteError, match="inner gradient"):
        problem.params_gradient("inner")
