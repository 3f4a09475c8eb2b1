"""The noise models: exact posteriors, gradients, and recovery of what was put in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from woodbury.apps.clean import label_noise
from woodbury.apps.clean.label_noise import Changes, LabelNoise, Likelihood
from woodbury.apps.clean.noise import ResidualNoise


def labels(n: int, C: int, transition: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, true and observed labels of a world that the model can describe exactly."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(n, C, generator=generator, dtype=torch.float64)
    truth = torch.multinomial((3 * outputs).softmax(1), 1, generator=generator).squeeze(1)
    observed = torch.multinomial(transition[truth], 1, generator=generator).squeeze(1)
    return outputs, truth, observed


def uniform_flips(C: int, rate: float) -> Tensor:
    eye = torch.eye(C, dtype=torch.float64)
    return (1 - rate) * eye + rate * (1 - eye) / (C - 1)


def test_posterior_is_that_of_bayes() -> None:
    transition = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    offsets = torch.tensor([0.5, 0.0]).double()
    model = LabelNoise(math.log(2.0), torch.zeros(2, 2).double(), offsets, transition.log())
    outputs = torch.tensor([[0.2, -0.1]], dtype=torch.float64)
    judged = model.judge(outputs, torch.tensor([1]))
    a, b = math.exp(2 * 0.2 + 0.5), math.exp(-0.2)
    p = a / (a + b)
    likelihood = p * 0.1 + (1 - p) * 0.7
    assert judged.error.item() == pytest.approx(p * 0.1 / likelihood)
    assert judged.losses.item() == pytest.approx(-math.log(likelihood))
    assert judged.probabilities is not None
    assert judged.probabilities[0, 0].item() == pytest.approx(p)


def test_slopes_are_derivatives_of_losses() -> None:
    outputs, _, observed = labels(20, 3, uniform_flips(3, 0.2))
    trusted = torch.arange(20) % 4 == 0
    offsets = torch.tensor([0.1, 0.0, -0.2]).double()
    mixing = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = LabelNoise(0.7, mixing, offsets, uniform_flips(3, 0.2).log())
    found = model.judge(outputs, observed, None, trusted).slopes

    leaf = outputs.clone().requires_grad_()
    p = (math.exp(0.7) * leaf + leaf @ mixing + offsets).softmax(1)
    own = p[torch.arange(20), observed]
    seen = (p * uniform_flips(3, 0.2).mT[observed]).sum(1)
    (expected,) = torch.autograd.grad(-torch.where(trusted, own, seen).log().sum(), leaf)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("changes", ["uniform", "by class"])
@pytest.mark.parametrize("n", [30, 120])
def test_gradient_of_the_likelihood_equals_autograd(changes: Changes, n: int) -> None:
    outputs, _, observed = labels(n, 3, uniform_flips(3, 0.2))
    trusted = torch.arange(n) < 5
    problem = Likelihood(outputs, observed, trusted, changes)
    assert problem.mixed == (n == 120)  # 3 x 3 numbers are learned from 90 rows on
    theta = torch.randn(sum(problem.sizes), dtype=torch.float64, requires_grad=True)
    log_scale, offsets, parameters, mixing = theta.split(problem.sizes)
    eye = torch.eye(3, dtype=torch.float64)
    T = {
        "uniform": lambda: eye * (1 - parameters.sigmoid()) + (1 - eye) * parameters.sigmoid() / 2,
        "by class": lambda: parameters.view(3, 3).softmax(1),
    }[changes]()
    logits = log_scale.exp() * outputs + offsets
    if problem.mixed:
        logits = logits + outputs @ mixing.view(3, 3) / outputs.std()
    p = logits.softmax(1)
    own = p[torch.arange(n), observed]
    seen = torch.where(trusted, own, (p * T.mT[observed]).sum(1))
    prior = (9 * eye + 0.5 * (1 - eye)) / (30 if changes == "uniform" else 1)
    value = -seen.log().sum() / n + 0.01 * offsets.square().sum()
    value = value - (prior * T.log()).sum() / n
    if problem.mixed:
        value = value + label_noise.MIXING_RIDGE / n * mixing.square().sum()
    (expected,) = torch.autograd.grad(value, theta)
    found_value, found = problem(theta.detach())
    assert found_value == pytest.approx(value.item())
    torch.testing.assert_close(found, expected)


def test_transitions_are_recovered_and_errors_calibrated() -> None:
    transition = torch.eye(4, dtype=torch.float64)
    transition[1, 2], transition[1, 1] = 0.4, 0.6
    transition[3, 0], transition[3, 3] = 0.2, 0.8
    outputs, truth, observed = labels(6000, 4, transition)
    model = LabelNoise.start(outputs).fit(outputs, observed)
    assert math.exp(model.log_scale) == pytest.approx(3.0, rel=0.1)
    torch.testing.assert_close(model.log_transition.exp(), transition, rtol=0, atol=0.05)
    error = model.judge(outputs, observed).error
    wrong = (truth != observed).double()
    assert error.mean().item() == pytest.approx(wrong.mean().item(), abs=0.01)
    high = error > 0.5
    assert error[high].mean().item() == pytest.approx(wrong[high].mean().item(), abs=0.05)


def confusable(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of four classes, the first two of which the model can hardly tell apart."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 4, (n,), generator=generator)
    outputs = 4 * torch.nn.functional.one_hot(truth, 4).double()
    outputs += torch.randn(n, 4, generator=generator, dtype=torch.float64)
    blurred = outputs[:, :2].mean(1, keepdim=True)
    outputs[:, :2] = blurred + 0.2 * (outputs[:, :2] - blurred)
    truth = torch.multinomial(outputs.softmax(1), 1, generator=generator).squeeze(1)
    return outputs, truth, torch.rand(n, generator=generator, dtype=torch.float64)


def test_hard_rows_are_no_wrong_labels() -> None:
    outputs, truth, _ = confusable(3000)
    model = LabelNoise.start(outputs).choose(outputs, truth)
    judged = model.judge(outputs, truth)
    assert model.changes == "uniform"
    assert judged.error.sum() < 30
    assert (judged.suggested == truth).double().mean() > 0.99


@pytest.mark.parametrize("changes", ["uniform", "by class"])
def test_the_form_of_changes_is_chosen_and_its_rate_recovered(changes: Changes) -> None:
    outputs, truth, chance = confusable(3000)
    moved = (truth + 1 + (torch.arange(3000) % 3 if changes == "uniform" else 0)) % 4
    observed = torch.where(chance < 0.15, moved, truth)
    model = LabelNoise.start(outputs).choose(outputs, observed)
    assert model.changes == changes
    wrong = (truth != observed).double()
    error = model.judge(outputs, observed).error
    assert error.mean().item() == pytest.approx(wrong.mean().item(), abs=0.03)


def test_few_rows_fall_back_on_the_prior() -> None:
    outputs = torch.eye(3, dtype=torch.float64)
    model = LabelNoise.start(outputs).fit(outputs, torch.arange(3))
    assert (model.log_transition.diagonal().exp() > 0.85).all()


def test_suggestion_is_another_class_where_the_label_is_probably_wrong() -> None:
    outputs = torch.tensor([[4.0, 0.0, 1.0], [0.0, 4.0, 0.0]], dtype=torch.float64)
    zeros = torch.zeros(3, 3).double()
    model = LabelNoise(0.0, zeros, zeros[0], uniform_flips(3, 0.2).log())
    judged = model.judge(outputs, torch.tensor([2, 1]))
    assert judged.suggested.tolist() == [0, 1]
    assert (judged.error > 0.5).tolist() == [True, False]


def test_trusted_labels_are_right() -> None:
    outputs, _, observed = labels(50, 3, uniform_flips(3, 0.3))
    every = torch.ones(50, dtype=torch.bool)
    judged = LabelNoise.start(outputs).judge(outputs, observed, None, every)
    assert judged.error.eq(0).all()
    noise = ResidualNoise()
    assert noise.judge(outputs[:, :1], observed.double(), None, every).error.eq(0).all()


def residuals(share: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = 4000
    y = 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
    wrong = torch.rand(n, generator=generator) < share
    y[wrong] = torch.randn(int(wrong.sum()), generator=generator, dtype=torch.float64)
    return torch.zeros(n, 1, dtype=torch.float64), y, wrong


def test_share_and_deviation_of_residuals_are_recovered() -> None:
    outputs, y, wrong = residuals(0.1)
    model = ResidualNoise().fit(outputs, y)
    assert model.deviation == pytest.approx(0.1, rel=0.1)
    assert model.share == pytest.approx(0.1, abs=0.03)
    judged = model.judge(outputs, y)
    assert judged.error.mean().item() == pytest.approx(wrong.double().mean().item(), abs=0.03)


def test_farther_is_never_less_wrong() -> None:
    y = torch.linspace(0, 20, 500, dtype=torch.float64)
    outputs = torch.zeros(500, 1, dtype=torch.float64)
    for freedom in (2.5, 30.0):
        error = ResidualNoise(0.1, 0.05, freedom).judge(outputs, y).error
        assert (error[y > 0.2].diff() >= -1e-12).all()
        assert error[-1] > 0.9


def test_residual_slopes_are_derivatives_of_losses() -> None:
    outputs, y, _ = residuals(0.2)
    outputs, y = outputs[:30], y[:30]
    variance = torch.linspace(1, 3, 30, dtype=torch.float64)
    model = ResidualNoise(0.2, 0.1, 4.0)
    step = 1e-6
    ends = [model.judge(outputs + s, y, variance).losses for s in (step, -step)]
    expected = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(
        model.judge(outputs, y, variance).slopes[:, 0], expected, rtol=1e-5, atol=1e-6
    )


def test_constant_residuals_do_not_divide_by_zero() -> None:
    outputs = torch.zeros(10, 1, dtype=torch.float64)
    y = torch.zeros(10, dtype=torch.float64)
    y[3] = 1.0
    judged = ResidualNoise().fit(outputs, y).judge(outputs, y)
    assert torch.isfinite(judged.losses).all()
    assert judged.error.argmax() == 3
