"""The hypergradient of every kind of hyperparameter against dense references."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tests.bilevel.learner.convex import CRITERION, KINDS, ROWS, SIZE, Convex
from torch import Tensor, nn

from woodbury import CG, Cholesky, Neumann, Nystrom, SolveStatus
from woodbury.bilevel import (
    ExampleWeights,
    Hyper,
    HyperLearner,
    LearningRates,
    WeightDecay,
)
from woodbury.errors import SolveError
from woodbury.solvers.solve import SolveWarning

EXACT = CG(rtol=1e-13, max_steps=200)
COMBINATIONS = [
    *[(kind,) for kind in KINDS],
    ("decay", "weights"),
    ("decay", "labels", "terms"),
    ("softmax", "augment", "decay"),
    tuple(kind for kind in KINDS if kind != "softmax"),
]


def learner_of(problem: Convex, **options: object) -> HyperLearner:
    return HyperLearner(problem.model, CRITERION, problem.hypers, outer="cross_entropy", **options)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="+".join)
def test_every_kind_agrees_with_lapack(kinds: tuple[str, ...]) -> None:
    problem = Convex(kinds)
    wanted = problem.exact()
    assert all(value.abs().max() > 1e-5 for value in wanted.values())
    report = learner_of(problem, recipe=EXACT).hypergradient(problem.valid, problem.train)
    close(report.value, wanted, 1e-9)
    assert report.status is SolveStatus.converged
    assert report.residual < 1e-12
    assert report.stationarity < 1e-12
    assert report.inner_value == pytest.approx(
        problem.inner(problem.point(), problem.values()).item(), rel=1e-12
    )
    assert report.outer_value == pytest.approx(problem.outer(problem.point()).item(), rel=1e-12)


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="+".join)
def test_every_kind_agrees_with_differences_of_exact_solutions(kinds: tuple[str, ...]) -> None:
    problem = Convex(kinds)
    report = learner_of(problem, recipe=EXACT).hypergradient(problem.valid, problem.train)
    h = problem.values()
    direction = {name: problem.randn(*value.shape) for name, value in h.items()}

    def solved(step: float) -> Tensor:
        moved = {name: value + step * direction[name] for name, value in h.items()}
        return problem.outer(problem.solve(moved))

    step = 1e-3
    coarse = (solved(step) - solved(-step)) / (2 * step)
    fine = (solved(step / 2) - solved(-step / 2)) / step
    difference = (4 * fine - coarse) / 3
    implicit = sum((report.value[name] * direction[name]).sum() for name in h)
    torch.testing.assert_close(implicit, difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("per", ["weight", "tensor", "all"])
def test_weight_decay_at_every_granularity(per: str) -> None:
    problem = Convex(("decay",), per)
    report = learner_of(problem, recipe=Cholesky()).hypergradient(problem.valid, problem.train)
    close(report.value, problem.exact(), 1e-9)


def test_away_from_the_solution_the_formula_is_taken_where_the_weights_are() -> None:
    problem = Convex(("decay", "weights"))
    problem.set(problem.point() + 1e-4 * problem.randn(SIZE * SIZE + SIZE))
    report = learner_of(problem, recipe=EXACT).hypergradient(problem.valid, problem.train)
    close(report.value, problem.exact(), 1e-9)
    slope = torch.func.grad(problem.inner)(problem.point(), problem.values())
    assert report.stationarity == pytest.approx(slope.norm().item(), rel=1e-10)
    truth = problem.outer(problem.point()) - problem.outer(problem.solve(problem.values()))
    assert report.outer_error == pytest.approx(truth.item(), rel=1e-2)


def test_the_training_loss_is_that_of_the_formula_and_so_is_its_gradient() -> None:
    problem = Convex(tuple(kind for kind in KINDS if kind != "softmax"))
    learner = learner_of(problem, recipe=EXACT)
    problem.set(problem.point() + problem.randn(SIZE * SIZE + SIZE))
    loss = learner.loss(problem.train)
    loss.backward()
    value = problem.inner(problem.point(), problem.values())
    torch.testing.assert_close(loss.detach(), value, rtol=1e-12, atol=0)
    slope = torch.func.grad(problem.inner)(problem.point(), problem.values())
    found = torch.cat([problem.model.weight.grad.flatten(), problem.model.bias.grad])
    torch.testing.assert_close(found, slope, rtol=1e-11, atol=1e-13)
    assert all(p.grad is None for h in learner.hypers.values() for p in h.parameters())


# ------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("terms", [0, 1, 4])
@pytest.mark.parametrize("kinds", [("decay",), ("decay", "weights")])
def test_the_series_is_that_of_unrolled_steps(kinds: tuple[str, ...], terms: int) -> None:
    problem = Convex(kinds)
    rates = (0.3, 0.2)
    optimizer = torch.optim.SGD(
        [
            {"params": [problem.model.weight], "lr": rates[0]},
            {"params": [problem.model.bias], "lr": rates[1]},
        ]
    )
    learner = learner_of(problem, optimizer=optimizer, recipe=Neumann(terms))
    report = learner.hypergradient(problem.valid, problem.train)
    assert report.status is SolveStatus.completed
    assert report.products == terms + 1  # the last is the residual

    h = {name: value.requires_grad_() for name, value in problem.values().items()}
    step = torch.tensor([rates[0]] * SIZE * SIZE + [rates[1]] * SIZE, dtype=torch.float64)
    w = problem.point()
    for _ in range(terms + 1):
        slope = torch.func.grad(problem.inner)(w, h)
        w = w - step * slope
    unrolled = torch.autograd.grad(problem.outer(w), list(h.values()))
    close(report.value, dict(zip(h, unrolled, strict=True)), 1e-9)


def test_the_residual_is_true_and_is_spent_where_asked() -> None:
    problem = Convex(("decay",))
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.3)
    learner = learner_of(problem, optimizer=optimizer, certify_every=2)
    certified = learner.step(problem.valid, problem.train)
    spared = learner.step(problem.valid, problem.train)
    again = learner.step(problem.valid, problem.train)
    assert [r.products for r in (certified, spared, again)] == [4, 3, 4]
    assert spared.residual != spared.residual
    problem = Convex(("decay",))
    H = torch.func.jacrev(torch.func.grad(problem.inner))(problem.point(), problem.values())
    power = torch.linalg.matrix_power(torch.eye(len(H)).double() - 0.3 * H, 4)
    a = torch.func.grad(problem.outer)(problem.point())
    assert certified.residual == pytest.approx(((power @ a).norm() / a.norm()).item(), rel=1e-9)


def test_weights_of_examples_bring_the_residual_with_the_mixed_product() -> None:
    problem = Convex(("decay", "weights"))
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.3)
    learner = learner_of(problem, optimizer=optimizer, certify_every=1000)
    learner.step(problem.valid, problem.train)
    report = learner.step(problem.valid, problem.train)
    H = torch.func.jacrev(torch.func.grad(problem.inner))(problem.point(), problem.values())
    assert 0 < report.residual < 1
    before = learner._problem.counts.total
    report = learner.hypergradient(problem.valid, problem.train)
    # one gradient each, three products, and one backward pass for residual and mixed product
    assert learner._problem.counts.total - before == 9 + ROWS * (1 + 4 + 1)
    power = torch.linalg.matrix_power(torch.eye(len(H)).double() - 0.3 * _dense(problem), 4)
    a = torch.func.grad(problem.outer)(problem.point())
    assert report.residual == pytest.approx(((power @ a).norm() / a.norm()).item(), rel=1e-9)


def _dense(problem: Convex) -> Tensor:
    return torch.func.jacrev(torch.func.grad(problem.inner))(problem.point(), problem.values())


def test_nystrom_of_full_rank_is_the_damped_inverse() -> None:
    problem = Convex(("decay", "weights"))
    n, damping = SIZE * SIZE + SIZE, 1e-2
    learner = learner_of(problem, recipe=Nystrom(rank=n, damping=damping))
    report = learner.hypergradient(problem.valid, problem.train)
    wanted = problem.exact(
        lambda H, a: torch.linalg.solve(H + damping * torch.eye(n, dtype=H.dtype), a)
    )
    close(report.value, wanted, 1e-8)
    assert report.status is SolveStatus.completed


def test_a_series_that_diverges_says_so() -> None:
    problem = Convex(("decay",))
    before = problem.values()
    recipe = Neumann(terms=6, step=50.0)
    with pytest.raises(SolveError, match="diverges"):
        learner_of(problem, recipe=recipe, on_failure="raise").step(problem.valid, problem.train)
    assert torch.equal(problem.values()["decay.log_decay"], before["decay.log_decay"])
    learner = learner_of(problem, recipe=recipe, certify_every=1)
    with pytest.warns(SolveWarning, match="lower the step"):
        learner.step(problem.valid, problem.train)
    again = learner.step(problem.valid, problem.train)  # warned of once, and said in the report
    assert again.status is SolveStatus.diverged
    report = learner_of(problem, recipe=recipe, on_failure="ignore").step(
        problem.valid, problem.train
    )
    assert report.status is SolveStatus.diverged
    assert "diverges" in str(report)


# ------------------------------------------------------------------- learning rates

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates_are_differentiated_through_the_last_step(name: str) -> None:
    problem = Convex(("decay",))
    model = problem.model

    def groups_of(m: nn.Linear) -> list[dict]:
        return [{"params": [m.weight]}, {"params": [m.bias], "lr": 0.05}]

    optimizer = OPTIMIZERS[name](groups_of(model))
    rates = LearningRates(optimizer).double()
    learner = HyperLearner(
        model, CRITERION, {"decay": problem.hypers["decay"], "rates": rates},
        outer="cross_entropy", recipe=EXACT,
    )  # fmt: skip
    problem.set(problem.point() + problem.randn(SIZE * SIZE + SIZE))

    def train(opt: torch.optim.Optimizer, value: Tensor) -> None:
        opt.zero_grad()
        value.backward()
        opt.step()

    train(optimizer, learner.loss(problem.train))
    twins = {}
    for group, factor in itertools.product(range(2), (1.0, -1.0)):
        twin = copy.deepcopy(model)
        other = OPTIMIZERS[name](groups_of(twin))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other.param_groups[group]["lr"] *= torch.tensor(1e-4 * factor).double().exp().item()
        twins[group, factor] = twin, other
    train(optimizer, learner.loss(problem.train))
    report = learner.hypergradient(problem.valid, problem.train)
    for group in range(2):
        values = []
        for factor in (1.0, -1.0):
            twin, other = twins[group, factor]
            swapped = HyperLearner(
                twin, CRITERION, WeightDecay(twin), outer="cross_entropy", recipe=EXACT
            )
            swapped.hypers["WeightDecay"].double().log_decay.copy_(
                problem.hypers["decay"].log_decay
            )
            train(other, swapped.loss(problem.train))
            values.append(nn.functional.cross_entropy(twin(problem.v), problem.z))
        difference = (values[0] - values[1]) / 2e-4
        torch.testing.assert_close(
            report.value["rates.log_rates"][group], difference.detach(), rtol=1e-6, atol=1e-10
        )


def test_learning_rates_alone_need_no_solve_and_are_written_back() -> None:
    problem = Convex(("decay",))
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.5)
    rates = LearningRates(optimizer)
    learner = HyperLearner(
        problem.model, "cross_entropy", rates,
        hyper_optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0),
    )  # fmt: skip
    problem.set(problem.point() + problem.randn(SIZE * SIZE + SIZE))
    learner.loss(problem.train).backward()
    optimizer.step()
    report = learner.step(problem.valid)
    assert (report.status, report.products) == (None, 0)
    wanted = 0.5 * torch.exp(-report.value["LearningRates.log_rates"].double()).item()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted, rel=1e-6)
    assert rates.rates() == [optimizer.param_groups[0]["lr"]]
    optimizer.param_groups[0]["lr"] = 0.125  # a scheduler
    learner.loss(problem.train).backward()
    optimizer.step()
    report = learner.step(problem.valid)
    wanted = 0.125 * torch.exp(-report.value["LearningRates.log_rates"].double()).item()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted, rel=1e-6)


# ------------------------------------------------------------------------ own kinds


class Temperature(Hyper):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(()), requires_grad=False)

    def outputs(self, outputs: Tensor) -> Tensor:
        return outputs * self.log.exp()


def test_a_kind_of_the_users_own() -> None:
    problem = Convex(("decay",))
    hypers = {**problem.hypers, "temperature": Temperature().double()}
    learner = HyperLearner(problem.model, CRITERION, hypers, outer="cross_entropy", recipe=EXACT)
    report = learner.hypergradient(problem.valid, problem.train)
    inner = problem.inner

    def scaled(flat: Tensor, h: dict[str, Tensor]) -> Tensor:
        decay = 0.5 * (h["decay.log_decay"].exp() * flat**2).sum()
        bare = {"decay.log_decay": torch.full_like(h["decay.log_decay"], -torch.inf)}
        return inner(flat * h["temperature.log"].exp(), bare) + decay

    problem.inner, values = scaled, problem.values()
    problem.values = lambda: {**values, "temperature.log": torch.zeros((), dtype=torch.float64)}
    close(report.value, problem.exact(), 1e-9)


def test_float32_and_weights_that_no_batch_holds() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learner = HyperLearner(model, "cross_entropy", ExampleWeights(5), optimizer=optimizer)
    batch = (torch.randn(2, 2), torch.tensor([0, 1]), torch.tensor([3, 1]))
    gradient = learner.hypergradient((torch.randn(4, 2), torch.zeros(4).long()), batch).value
    found = gradient["ExampleWeights.logits"]
    assert found.dtype == torch.float32
    assert torch.equal(found != 0, torch.tensor([False, True, False, True, False]))


def test_a_model_of_a_single_parameter_whose_hessian_is_the_identity() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.w - x

    model = Shift()
    decay = WeightDecay(model, 0.5)
    learner = HyperLearner(
        model, lambda out, y: 0.5 * out.square().sum(1), decay, recipe=Neumann(1, step=0.5)
    )
    batch = torch.zeros(1, 2).double(), torch.zeros(1)
    report = learner.hypergradient(batch, batch)
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    q = 0.5 * (w + (w - 0.5 * 1.5 * w))
    torch.testing.assert_close(report.value["WeightDecay.log_decay"], -0.5 * w * q)
    assert report.residual == pytest.approx(0.25**2)
    assert report.stationarity == pytest.approx(1.5 * w.norm().item())
    assert torch.equal(model.w.detach(), w)
