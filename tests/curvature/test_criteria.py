from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian

from woodbury.curvature.criteria import make_criterion
from woodbury.curvature.draws import Draws
from woodbury.curvature.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from woodbury.curvature.losses import weighted_sum
from woodbury.errors import ArgumentError, DataError, GradientError, ShapeError, StructureError

B, C, T = 4, 3, 2
F64 = torch.float64


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64)


def labels(*shape: int) -> torch.Tensor:
    return torch.randint(0, C, shape)


def partly_ignored() -> torch.Tensor:
    y = labels(B, T)
    y[0, 0] = -100
    y[1] = -100
    return y


def soft(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=F64)


class_weights = torch.tensor([0.5, 2.0, 1.5], dtype=F64)

# criterion, outputs, targets, losses per example written with torch's own functions
CASES = {
    "cross entropy": lambda: (
        nn.CrossEntropyLoss(),
        (z := normal(B, C)),
        (y := labels(B)),
        -z.log_softmax(1)[torch.arange(B), y],
    ),
    "cross entropy, summed": lambda: (
        nn.CrossEntropyLoss(reduction="sum"),
        (z := normal(B, C)),
        (y := labels(B)),
        -z.log_softmax(1)[torch.arange(B), y],
    ),
    "cross entropy, class weights": lambda: (
        nn.CrossEntropyLoss(weight=class_weights),
        (z := normal(B, C)),
        (y := labels(B)),
        -z.log_softmax(1)[torch.arange(B), y] * class_weights[y],
    ),
    "cross entropy, smoothed": lambda: (
        nn.CrossEntropyLoss(label_smoothing=0.2),
        (z := normal(B, C)),
        (y := labels(B)),
        -0.8 * z.log_softmax(1)[torch.arange(B), y] - 0.2 * z.log_softmax(1).mean(1),
    ),
    "cross entropy, smoothed, class weights": lambda: (
        nn.CrossEntropyLoss(label_smoothing=0.2, weight=class_weights),
        (z := normal(B, C)),
        (y := labels(B)),
        -0.8 * z.log_softmax(1)[torch.arange(B), y] * class_weights[y]
        - 0.2 * (z.log_softmax(1) * class_weights).mean(1),
    ),
    "cross entropy, soft targets": lambda: (
        nn.CrossEntropyLoss(weight=class_weights),
        (z := normal(B, C)),
        (y := soft(B, C)),
        -(y * class_weights * z.log_softmax(1)).sum(1),
    ),
    "cross entropy, tokens": lambda: (
        nn.CrossEntropyLoss(),
        (z := normal(B, C, T)),
        (y := labels(B, T)),
        F.cross_entropy(z, y, reduction="none").mean(1),
    ),
    "cross entropy, tokens ignored": lambda: (
        nn.CrossEntropyLoss(),
        (z := normal(B, C, T)),
        (y := partly_ignored()),
        F.cross_entropy(z, y, reduction="none").sum(1) / (y != -100).sum(1).clamp(min=1),
    ),
    "cross entropy, tokens ignored, summed": lambda: (
        nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1),
        (z := normal(B, C, T)),
        (y := partly_ignored()),
        F.cross_entropy(z, y, reduction="none", label_smoothing=0.1).sum(1),
    ),
    "mse": lambda: ("mse", (z := normal(B, C)), (y := normal(B, C)), ((z - y) ** 2).mean(1)),
    "mse, one output": lambda: ("mse", (z := normal(B)), (y := normal(B)), (z - y) ** 2),
    "mse, summed": lambda: (
        nn.MSELoss(reduction="sum"),
        (z := normal(B, C, T)),
        (y := normal(B, C, T)),
        ((z - y) ** 2).sum((1, 2)),
    ),
    "binary": lambda: (
        nn.BCEWithLogitsLoss(),
        (z := normal(B, C)),
        (y := torch.rand(B, C, dtype=F64).round()),
        -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).mean(1),
    ),
    "binary, weights": lambda: (
        nn.BCEWithLogitsLoss(weight=class_weights, pos_weight=2 * class_weights, reduction="sum"),
        (z := normal(B, C)),
        (y := torch.rand(B, C, dtype=F64).round()),
        -(
            class_weights * (2 * class_weights * y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z))
        ).sum(1),
    ),
    "Huber": lambda: (
        nn.HuberLoss(delta=0.5),
        (z := normal(B, C)),
        (y := normal(B, C)),
        F.huber_loss(z, y, delta=0.5, reduction="none").mean(1),
    ),
    "KL": lambda: (
        nn.KLDivLoss(reduction="batchmean"),
        (z := normal(B, C)),
        (y := soft(B, C)),
        (y * (y.log() - z)).sum(1),
    ),
    "callable per example": lambda: (
        lambda z, y: ((z - y) ** 4).sum(1),
        (z := normal(B, C)),
        (y := normal(B, C)),
        ((z - y) ** 4).sum(1),
    ),
    "callable per element": lambda: (
        lambda z, y: (z - y) ** 4,
        (z := normal(B, C)),
        (y := normal(B, C)),
        ((z - y) ** 4).mean(1),
    ),
}
LINEAR = {"KL"}


@pytest.mark.parametrize("name", CASES)
def test_losses_per_example(name: str) -> None:
    criterion, z, y, expected = CASES[name]()
    losses = make_criterion(criterion).losses(z, y, B)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("name", [name for name in CASES if name not in LINEAR])
@pytest.mark.parametrize("weighted", [True, False])
def test_curvature_is_the_hessian_in_the_outputs(name: str, weighted: bool) -> None:
    criterion, z, y, _ = CASES[name]()
    weights = torch.rand(B, dtype=F64) - 0.2 if weighted else None
    made = make_criterion(criterion)
    H = hessian(lambda z: weighted_sum(made.losses(z, y, B), weights, B), z)
    U = normal(5, *z.shape)
    expected = (U.flatten(1) @ H.reshape(z.numel(), -1)).view_as(U)
    kept = U.clone()
    torch.testing.assert_close(made.curvature(z, y, weights)(U), expected)
    assert torch.equal(U, kept)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("cross_entropy", Categorical),
        (F.cross_entropy, Categorical),
        (nn.CrossEntropyLoss(), Categorical),
        ("mse", Gaussian),
        (F.mse_loss, Gaussian),
        (F.binary_cross_entropy_with_logits, Bernoulli),
    ],
)
def test_known_criteria(given, kind: type) -> None:
    made = make_criterion(given)
    assert type(made) is kind
    assert made.convex


def test_what_is_known_to_be_convex() -> None:
    assert make_criterion(nn.HuberLoss()).convex
    assert not make_criterion(nn.CosineEmbeddingLoss()).convex
    assert not make_criterion(lambda z, y: (z - y) ** 2).convex

    class Changed(nn.CrossEntropyLoss):
        def forward(self, z, y):
            return -super().forward(z, y)

    assert not isinstance(make_criterion(Changed()), Likelihood)
    assert not make_criterion(Changed()).convex


def test_the_given_module_is_not_changed() -> None:
    loss = nn.HuberLoss(reduction="sum")
    make_criterion(loss).losses(normal(B, C), normal(B, C), B)
    assert loss.reduction == "sum"


def test_classes_on_the_last_axis() -> None:
    z, y = normal(B, C, C), labels(B, C)
    first, last = make_criterion("cross_entropy"), make_criterion("cross_entropy")
    last.classes_last = True
    U = normal(2, B, C, C)
    torch.testing.assert_close(first.losses(z, y, B), last.losses(z.mT, y, B))
    torch.testing.assert_close(
        first.curvature(z, y, None)(U), last.curvature(z.mT, y, None)(U.mT).mT
    )


@pytest.mark.parametrize("name", ["cross entropy, tokens", "mse", "binary"])
def test_scores_have_mean_zero_and_the_covariance(name: str) -> None:
    criterion, z, _, _ = CASES[name]()
    z = z[:1]
    made = make_criterion(criterion)
    rows = torch.arange(4000)
    draws = made.score(z.expand(4000, *z.shape[1:]), Draws(1, rows)).flatten(1)
    unit = torch.eye(z.numel(), dtype=F64).view(-1, *z.shape)
    covariance = made.covariance(z)(unit).reshape(z.numel(), -1)
    error = 5 * draws.square().std(0).max() / 4000**0.5
    assert (draws.mean(0)).abs().max() < 5 / 4000**0.5
    assert (draws.T @ draws / 4000 - covariance).abs().max() < error
    again = made.score(z, Draws(1, rows[7:8]))
    assert torch.equal(again.flatten(), draws[7])


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="'accuracy'"):
        make_criterion("accuracy")
    with pytest.raises(ArgumentError, match="None"):
        make_criterion(None)
    with pytest.raises(ArgumentError, match="reduction is 'median'"):
        make_criterion(nn.MSELoss(reduction="median"))
    with pytest.raises(ShapeError, match=r"\[5\]|\(5,\) for 4"):
        make_criterion(lambda z, y: torch.ones(5)).losses(normal(B), None, B)
    with pytest.raises(GradientError, match="float"):
        make_criterion(lambda z, y: 1.0).losses(normal(B), None, B)
    with pytest.raises(ShapeError, match=r"target\[:, None\]"):
        make_criterion("mse").losses(normal(B, 1), normal(B), B)
    with pytest.raises(ShapeError, match="classes belong on axis 1"):
        make_criterion("cross_entropy").losses(normal(B, T, C), labels(B, T), B)
    with pytest.raises(ShapeError, match="classes on axis 1"):
        make_criterion("cross_entropy").losses(normal(B), labels(B), B)
    with pytest.raises(DataError, match="one loss per example"):
        weighted_sum(torch.tensor(1.0), torch.ones(B), B)


@pytest.mark.parametrize("loss", [nn.NLLLoss(), nn.L1Loss()])
def test_a_criterion_linear_in_the_outputs_has_no_gauss_newton(loss: nn.Module) -> None:
    target = labels(B) if isinstance(loss, nn.NLLLoss) else normal(B, C)
    with pytest.raises(StructureError, match="linear in the outputs"):
        make_criterion(loss).curvature(normal(B, C), target, None)


def test_a_scalar_stands_for_the_mean_of_the_batch() -> None:
    z, y = normal(B, C), normal(B, C)
    made = make_criterion(lambda z, y: ((z - y) ** 2).mean())
    losses = made.losses(z, y, B)
    torch.testing.assert_close(weighted_sum(losses, None, B), ((z - y) ** 2).mean(1).sum())
