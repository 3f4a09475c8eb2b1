"""The models of the job: their held-out outputs against refits, their gradients against finite
differences of whole refits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from woodbury.apps.clean import softmax
from woodbury.apps.clean.kernel import KernelModel, landmarks
from woodbury.apps.clean.label_noise import LabelNoise
from woodbury.apps.clean.lbfgs import minimize
from woodbury.apps.clean.linear import Logistic, LogisticHeldOut, Ridge, classwise_score
from woodbury.apps.clean.mlp import Network
from woodbury.apps.clean.models import Data, HeldOutScore, principal_components
from woodbury.apps.clean.noise import ResidualNoise
from woodbury.influence.glm import push_slopes


def quiet(fraction: float) -> None:
    assert 0 <= fraction <= 1


def make(n: int, d: int, classes: int, seed: int = 0, budget: int = 2**30) -> Data:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator)
    X /= d**0.5
    scores = 4 * X.double() @ torch.randn(d, max(1, classes), generator=generator).double()
    if classes == 0:
        noise = 0.1 * torch.randn(n, generator=generator).double()
        return Data(X, scores[:, 0] / scores.std() + noise, 0, None, 0, budget)
    y = torch.multinomial(scores.softmax(1), 1, generator=generator).squeeze(1)
    return Data(X, y, classes, None, 0, budget)


def without(data: Data, i: int) -> tuple[Data, Tensor]:
    keep = torch.arange(len(data.X)) != i
    return data.take(torch.where(keep)[0]), keep


def test_logistic_fit_is_stationary_by_autograd() -> None:
    data = make(60, 4, 3)
    model = Logistic(data, penalty=0.4)
    weights = torch.rand(60).double()
    fit = model._problem(None, weights, 0.4).fit()
    theta = fit.theta.clone().requires_grad_()
    X = torch.cat([data.X.double(), torch.ones(60, 1).double()], 1)
    losses = torch.nn.functional.cross_entropy(X @ theta, data.observed, reduction="none")
    ridge = 0.2 * theta[:-1].square().sum() + 0.002 * theta[-1].square().sum()
    value = (weights * losses).sum() + ridge
    (gradient,) = torch.autograd.grad(value, theta)
    assert gradient.norm() < 1e-3
    assert 0 <= fit.suboptimality < 1e-7


def test_logistic_left_out_equals_refits_on_digits() -> None:
    digits = load_digits()
    X = torch.from_numpy(digits.data[:500]).float()
    X = X - X.mean(0)
    X /= X.square().sum(1).mean().sqrt()
    data = Data(X, torch.from_numpy(digits.target[:500]), 10, None, 0, 2**30)
    model = Logistic(data, penalty=0.3)
    weights = torch.ones(500).double()
    whole = model._problem(None, weights, 0.3).fit()
    found = LogisticHeldOut(whole).outputs.log_softmax(1)
    expected, mine = [], []
    for i in range(0, 500, 25):
        rest = weights.clone()
        rest[i] = 0
        refit = model._problem(None, rest, 0.3).fit(whole.theta, whole.curvature)
        expected.append(refit.logits[i].log_softmax(0))
        mine.append(found[i])
    pair = torch.stack([torch.cat(expected), torch.cat(mine)])
    assert torch.corrcoef(pair)[0, 1] > 0.999


@pytest.mark.parametrize("coupled", [True, False])
def test_logistic_weight_hypergradient_equals_finite_differences_of_refits(
    coupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Differences over 1e-3 need fits that end nearer to the minimum than those of the job.
    monkeypatch.setattr(softmax, "TOLERANCE", 1e-12)
    data = make(120, 3, 3)
    model = Logistic(data, penalty=0.5)
    model.coupled = coupled
    weights = 0.3 + 0.7 * torch.rand(120, generator=torch.Generator().manual_seed(1)).double()

    def refit(w: Tensor) -> LogisticHeldOut:
        return LogisticHeldOut(model._problem(None, w, 0.5).fit())

    held = refit(weights)
    noise = LabelNoise.start(held.outputs).fit(held.outputs, data.observed)
    slopes = noise.judge(held.outputs, data.observed).slopes
    found = held.weight_hypergradient(slopes)
    pushed = push_slopes(slopes, held._fit.P, weights, held._leverage)
    step = 1e-3
    chosen = torch.arange(0, 120, 6)
    fixed, whole = [], []
    for j in chosen:
        shift = step * torch.eye(120)[j].double()
        ends = [refit(weights + shift), refit(weights - shift)]
        moved = (ends[0]._fit.logits - ends[1]._fit.logits) / (2 * step)
        moved[j] = 0  # not in its own held-out prediction
        fixed.append((moved * pushed).sum())
        whole.append(((ends[0].outputs - ends[1].outputs) * slopes).sum() / (2 * step))
    if coupled:  # exactly what is promised: the parameters move, the leverages do not
        torch.testing.assert_close(found[chosen], torch.stack(fixed), rtol=1e-2, atol=1e-4)
    # And that is most of the truth.
    assert torch.corrcoef(torch.stack([found[chosen], torch.stack(whole)]))[0, 1] > 0.9


def test_penalty_gradient_of_the_classwise_score_equals_finite_differences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("woodbury.apps.clean.label_noise.FIT_TOLERANCE", 1e-13)
    data = make(150, 4, 3)
    model = Logistic(data)
    noise = LabelNoise.start(data.targets())

    def value(penalty: float) -> tuple[float, float]:
        fit = model._problem(None, torch.ones(150).double(), penalty).fit()
        return classwise_score(fit, HeldOutScore(data, noise))

    _, slope = value(0.7)
    step = 1e-2
    expected = (value(0.7 * np.exp(step))[0] - value(0.7 * np.exp(-step))[0]) / (2 * step)
    assert slope == pytest.approx(expected, rel=0.02)


def test_many_classes_go_class_by_class_and_still_fit() -> None:
    data = make(600, 6, 160)
    model = Logistic(data)
    assert not model.coupled
    held = model.fit(torch.ones(600).double(), quiet)
    certificate = held.certificate()
    assert certificate["method"] == "class-wise leverage"
    assert certificate["relative_residual"] < 1e-5
    assert torch.isfinite(held.outputs).all()


def test_wide_tables_are_condensed() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, 3, generator=generator) @ torch.randn(3, 400, generator=generator)
    data = Data(X - X.mean(0), torch.arange(50) % 5, 5, None, 0, 2**30)
    assert Logistic(data).columns <= 3
    scores = principal_components(data.X, most=3, share=1.0)
    torch.testing.assert_close(scores @ scores.mT, data.X @ data.X.mT, rtol=1e-3, atol=1e-2)


def test_ridge_left_out_equals_refits_with_an_intercept() -> None:
    data = make(30, 3, 0)
    model = Ridge(data, penalty=0.05)
    weights = torch.rand(30).double() + 0.1
    held = model.fit(weights, quiet)
    X = torch.cat([data.X.double(), torch.full((30, 1), 10.0).double()], 1)
    for i in (0, 9):
        keep = torch.arange(30) != i
        x, y, w = X[keep], data.observed[keep], weights[keep]
        A = x.mT @ (w[:, None] * x) + 0.05 * torch.eye(4).double()
        assert held.outputs[i, 0] == pytest.approx(
            (X[i] @ torch.linalg.solve(A, x.mT @ (w * y))).item(), abs=1e-9
        )


@pytest.mark.parametrize("classes", [0, 3])
def test_network_weight_hypergradient_equals_finite_differences_of_training(classes: int) -> None:
    data = make(80, 3, classes)
    model = Network(data, penalty=30.0)
    weights = 0.4 + 0.6 * torch.rand(80, generator=torch.Generator().manual_seed(1)).double()
    held = model.fit(weights, quiet)
    width = max(1, classes)
    direction = torch.randn(80, width, generator=torch.Generator().manual_seed(2)).double()
    found = held.weight_hypergradient(direction)
    expected, chosen = [], range(0, 80, 8)
    step = 1e-2
    for j in chosen:
        ends = []
        for s in (step, -step):
            moved = weights.clone()
            moved[j] += s
            model._last = held.objective.params_vector()  # type: ignore[attr-defined]
            trained = model._train(torch.arange(80), moved, 30.0)
            outputs = trained._left_out.fitted.clone()
            outputs[j] = 0  # a row's weight does not count for its own held-out output
            ends.append((outputs * direction).sum())
        expected.append((ends[0] - ends[1]) / (2 * step))
    pair = torch.stack([found[list(chosen)], torch.stack(expected)])
    assert torch.corrcoef(pair)[0, 1] > 0.95


def test_network_on_a_sample_judges_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(300, 3, 0)
    model = Network(data)
    model.rows = 200
    held = model.fit(torch.ones(300).double(), quiet)
    assert held.outputs.shape == (300, 1)
    assert held.variance is not None
    assert held.variance.shape == (300,)
    rest = torch.ones(300, dtype=torch.bool)
    rest[data.sample(200)] = False
    push = held.weight_hypergradient(torch.ones(300, 1).double())
    assert push[rest].eq(0).all()
    assert push[~rest].ne(0).any()
    assert held.certificate()["rows_in_training"] == 200
    # Outside the sample the network is simply applied: close to its left-out self inside.
    assert (held.outputs[rest, 0] - data.observed[rest]).abs().median() < 0.5


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("kind", [KernelModel, Network, Logistic])
def test_tuning_improves_on_the_start_and_is_restored(kind, classes: int) -> None:
    if kind is Logistic and classes == 0:
        kind = Ridge
    data = make(120, 3, classes)
    noise = ResidualNoise() if classes == 0 else LabelNoise.start(data.targets())
    rows, weights = torch.arange(120), torch.ones(120).double()
    model = kind(data)
    before = HeldOutScore(data, noise)(model.fit(weights, quiet).outputs)[0]
    score, _ = model.tune(rows, weights, noise, quiet)
    assert score <= before + 1e-3
    other = kind(data)
    other.restore(model.settings())
    assert other.settings() == model.settings()
    pair = [m.fit(weights, quiet).outputs for m in (model, other)]
    assert torch.equal(*pair)


def test_kernel_takes_landmarks_where_rows_or_memory_ask_for_it() -> None:
    data = make(400, 3, 2, budget=2**20)
    model = KernelModel(data)
    assert model.landmarks is not None
    assert model.landmarks < 200
    certificate = model.fit(torch.ones(400).double(), quiet).certificate()
    assert certificate["method"] == "Nystrom"
    assert KernelModel(make(400, 3, 2)).landmarks is None
    assert landmarks(1_000_000, make(10, 2, 2)) == 500


def test_lbfgs_minimises_rosenbrock() -> None:
    def rosenbrock(place: Tensor) -> tuple[float, Tensor]:
        leaf = place.clone().requires_grad_()
        value = (1 - leaf[0]) ** 2 + 100 * (leaf[1] - leaf[0] ** 2) ** 2
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.item(), gradient

    found = minimize(rosenbrock, torch.tensor([-1.2, 1.0]).double(), tolerance=1e-14)
    torch.testing.assert_close(found.place, torch.ones(2).double(), rtol=0, atol=1e-5)
    assert found.steps < 60


def test_lbfgs_with_the_inverse_hessian_takes_one_step() -> None:
    A = torch.diag(torch.tensor([1.0, 1e4, 1e-3])).double()
    found = minimize(
        lambda x: (0.5 * (x @ A @ x).item(), A @ x),
        torch.ones(3).double(),
        precondition=lambda g: torch.linalg.solve(A, g),
    )
    assert found.steps == 1
    assert found.place.norm() < 1e-12


def test_fold_score_is_that_of_networks_that_never_saw_the_fold() -> None:
    """Labels that are pure chance cannot be predicted by what has not seen them."""
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(150, 6, generator=generator)
    labels = torch.randint(0, 3, (150,), generator=generator)
    data = Data(X / X.square().sum(1).mean().sqrt(), labels, 3, None, 0, 2**30)
    rows, weights = torch.arange(150), torch.ones(150, dtype=torch.float64)
    network = Network(data, penalty=0.01)  # overfits: in sample it would score far below log 3
    score = network.fold_score(rows, weights, LabelNoise.start(data.targets()))
    entropy = -(labels.bincount() / 150 * (labels.bincount() / 150).log()).sum().item()
    assert score > entropy - 0.02
    fitted = network.fit(weights, lambda fraction: None)
    seen = torch.nn.functional.cross_entropy(fitted.predict(network.inputs), labels)
    assert seen < 0.5 * entropy
