"""What users do wrong: a typed error with the values and the remedy, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from woodbury import Neumann
from woodbury.bilevel import (
    Augmentation,
    ExampleWeights,
    Hyper,
    HyperLearner,
    Indexed,
    LabelCorrection,
    LearningRates,
    LossWeights,
    WeightDecay,
)
from woodbury.errors import (
    ArgumentError,
    DataError,
    DtypeError,
    GradientError,
    NonFiniteError,
    ShapeError,
)

SERIES = Neumann(1, step=0.1)
X, Y, ROWS = torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), torch.arange(4)
VALID = torch.randn(3, 2), torch.tensor([0, 1, 1])


def learner_of(model: nn.Module, hypers: Any = None, **options: Any) -> HyperLearner:
    options = {"recipe": SERIES, "criterion": "cross_entropy", **options}
    criterion = options.pop("criterion")
    return HyperLearner(model, criterion, hypers or WeightDecay(model), **options)


MODEL = nn.Linear(2, 2)
RATES = torch.optim.SGD(MODEL.parameters(), lr=0.1)
CONSTRUCTIONS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "negative decay": (lambda: WeightDecay(MODEL, -1.0), ArgumentError, "initial is -1.0"),
    "zero decay": (lambda: WeightDecay(MODEL, 0.0), ArgumentError, "give 1e-8"),
    "beyond largest": (lambda: WeightDecay(MODEL, 1.0, largest=0.5), ArgumentError, "is 0.5"),
    "unknown per": (lambda: WeightDecay(MODEL, per="layer"), ArgumentError, "'weight', 'tensor'"),
    "unknown name": (lambda: WeightDecay(MODEL, params=["w"]), ArgumentError, "no parameter"),
    "no examples": (lambda: ExampleWeights(0), ArgumentError, "count is 0"),
    "unknown kind": (lambda: ExampleWeights(3, "relu"), ArgumentError, "'softmax'"),
    "weight of one": (lambda: ExampleWeights(3, initial=1.0), ArgumentError, "between 0 and 1"),
    "float labels": (lambda: LabelCorrection(torch.ones(3)), DtypeError, "torch.float32"),
    "bool labels": (lambda: LabelCorrection(Y > 0), DtypeError, "torch.bool"),
    "no labels": (lambda: LabelCorrection(Y[:0]), DataError, "[N]"),
    "one class": (lambda: LabelCorrection(torch.zeros(3).long()), ArgumentError, "classes is 1"),
    "label too large": (lambda: LabelCorrection(torch.tensor([0, 4]), 3), DataError, "0 to 4"),
    "confidence": (lambda: LabelCorrection(Y, 2, confidence=0.4), ArgumentError, "0.5"),
    "nothing to learn": (lambda: Augmentation(nn.ReLU()), GradientError, "ReLU has no parameters"),
    "no terms": (lambda: LossWeights({}), ArgumentError, "empty"),
    "negative term": (lambda: LossWeights({"a": -1.0}), ArgumentError, "'a' is -1.0"),
    "rate zero": (
        lambda: LearningRates(torch.optim.SGD(MODEL.parameters(), lr=0.0)),
        ArgumentError,
        "group 0 is 0.0",
    ),
    "no hyper": (lambda: HyperLearner(MODEL, "mse", []), ArgumentError, "hypers is empty"),
    "no object": (lambda: learner_of(MODEL, [1e-3]), ArgumentError, "a float"),
    "two alike": (
        lambda: learner_of(MODEL, [WeightDecay(MODEL), WeightDecay(MODEL)]),
        ArgumentError,
        "two hyperparameters are called WeightDecay",
    ),
    "dot": (lambda: learner_of(MODEL, {"a.b": WeightDecay(MODEL)}), ArgumentError, "without a dot"),
    "no step": (lambda: learner_of(MODEL, recipe=None), ArgumentError, "optimizer=..."),
    "policy": (lambda: learner_of(MODEL, on_failure="nan"), ArgumentError, "'raise', 'warn'"),
    "certify": (lambda: learner_of(MODEL, certify_every=0), ArgumentError, "at least 1"),
    "terms without outer": (
        lambda: learner_of(MODEL, criterion={"a": "mse", "b": "mse"}),
        ArgumentError,
        "outer=...",
    ),
    "terms that differ": (
        lambda: learner_of(MODEL, LossWeights({"a": 1.0}), criterion={"b": "mse"}, outer="mse"),
        ArgumentError,
        "['a'], and criterion has the terms ['b']",
    ),
    "terms of one criterion": (
        lambda: learner_of(MODEL, LossWeights({"a": 1.0})),
        ArgumentError,
        "one criterion",
    ),
    "no terms of criterion": (
        lambda: learner_of(MODEL, criterion={}, outer="mse"),
        ArgumentError,
        "empty mapping",
    ),
    "criterion": (lambda: learner_of(MODEL, criterion=3), ArgumentError, "criterion is 3"),
    "frozen model": (
        lambda: WeightDecay(nn.Linear(2, 2).requires_grad_(False)),
        GradientError,
        "no parameter is selected",
    ),
    "untrained parameter": (
        lambda: learner_of(
            MODEL, recipe=Neumann(1), optimizer=torch.optim.SGD([MODEL.bias], lr=0.1)
        ),
        ArgumentError,
        "does not train the parameters ['weight']",
    ),
    "item": (lambda: Indexed([(1, 2, 3)])[0], DataError, "(inputs, target)"),
}


@pytest.mark.parametrize("case", CONSTRUCTIONS)
def test_construction(case: str) -> None:
    make, error, message = CONSTRUCTIONS[case]
    with pytest.raises(error) as found:
        make()
    assert message in str(found.value)


INFINITE = torch.tensor([[float("nan"), 0.0]] * 3)
BATCHES: dict[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "no indices": (ExampleWeights(4), (X, Y), VALID, DataError, "Indexed"),
    "index too large": (ExampleWeights(4), (X, Y, ROWS + 1), VALID, DataError, "row 4"),
    "negative index": (ExampleWeights(4), (X, Y, ROWS - 1), VALID, DataError, "row -1"),
    "float index": (ExampleWeights(4), (X, Y, ROWS / 2), VALID, DataError, "torch.float32"),
    "index short": (ExampleWeights(4), (X, Y, ROWS[:2]), VALID, DataError, "integers [4]"),
    "label index": (LabelCorrection(Y), (X, Y, ROWS + 9), VALID, DataError, "row 12"),
    "empty train": (None, (X[:0], Y[:0]), VALID, DataError, "no rows"),
    "empty validation": (None, (X, Y), (X[:0], Y[:0]), DataError, "no rows"),
    "targets short": (None, (X, Y[:2]), VALID, DataError, "4 rows of inputs and 2 targets"),
    "validation short": (None, (X, Y), (X, Y[:2]), DataError, "4 rows of inputs and 2 targets"),
    "no target": (None, (X, Y), X, DataError, "expected (inputs, targets)"),
    "nan train": (None, (INFINITE, Y[:3]), VALID, NonFiniteError, "inner loss is nan"),
    "nan validation": (None, (X, Y), (INFINITE, Y[:3]), NonFiniteError, "outer loss is nan"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches(case: str) -> None:
    hyper, train, valid, error, message = BATCHES[case]
    model = nn.Linear(2, 2)
    learner = learner_of(model, [WeightDecay(model), hyper] if hyper else None)
    before = {name: p.clone() for name, p in learner._tensors.items()}
    with pytest.raises(error) as found:
        learner.step(valid, train)
    assert message in str(found.value)
    assert learner.steps == 0
    assert all(torch.equal(p, before[name]) for name, p in learner._tensors.items())
    if case in ("no indices", "index too large", "empty train", "targets short"):
        with pytest.raises(error):
            learner.loss(train)


def test_a_criterion_that_returns_the_mean_has_nothing_to_weigh() -> None:
    learner = learner_of(
        MODEL, ExampleWeights(4), criterion=lambda out, y: nn.functional.cross_entropy(out, y)
    )
    with pytest.raises(DataError, match="one loss per example"):
        learner.loss((X, Y, ROWS))


def test_a_criterion_of_another_shape() -> None:
    learner = learner_of(MODEL, criterion=lambda out, y: out[:2, 0])
    with pytest.raises(ShapeError, match="4 examples"):
        learner.loss((X, Y))


def test_no_training_batch() -> None:
    with pytest.raises(DataError, match=r"call learner.loss\(batch\)"):
        learner_of(MODEL).step(VALID)


def test_no_optimizer_step_to_differentiate() -> None:
    learner = learner_of(MODEL, LearningRates(RATES))
    with pytest.raises(GradientError, match="no step yet"):
        learner.step(VALID)


def test_a_validation_loss_that_ignores_the_weights() -> None:
    learner = learner_of(MODEL, outer=lambda out, y: torch.zeros(len(out)))
    with pytest.raises(GradientError, match="does not depend on params"):
        learner.step(VALID, (X, Y))


def test_a_training_loss_that_ignores_a_weight() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.forward = lambda x: model[0](x)
    with pytest.raises(GradientError, match=r"does not depend on the parameters \['1.weight'"):
        learner_of(model).step(VALID, (X, Y))


class Idle(Hyper):
    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(()), requires_grad=False)


class Additive(Idle):
    def weigh(self, losses: Tensor, rows: Tensor | None) -> Tensor:
        return losses + self.number


@pytest.mark.parametrize("kind", [Idle, Additive])
def test_a_hyperparameter_that_does_not_enter(kind: type[Hyper]) -> None:
    learner = learner_of(MODEL, {"idle": kind(), "decay": WeightDecay(MODEL)})
    with pytest.raises(GradientError, match=r"\['idle.number'\]"):
        learner.step(VALID, (X, Y))


def test_a_parameter_that_the_criterion_took_from_outside() -> None:
    model = nn.Linear(2, 2)
    outside = model.weight

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(out, y, reduction="none")
        return loss + outside.square().sum()

    with pytest.raises(GradientError, match=r"uses model.weight from outside"):
        learner_of(model, criterion=criterion).step(VALID, (X, Y))
    with pytest.raises(GradientError, match=r"validation loss uses model.weight"):
        learner_of(model, outer=criterion).step(VALID, (X, Y))


def test_a_tensor_of_nobody_that_requires_a_gradient() -> None:
    outside = torch.ones(2, requires_grad=True)
    learner = learner_of(
        MODEL, criterion=lambda out, y: nn.functional.cross_entropy(out * outside, y)
    )
    with pytest.raises(GradientError, match=r"a tensor of shape \(2,\)"):
        learner.step(VALID, (X, Y))


def test_a_penalty_in_the_criterion_on_a_parameter_of_the_model_counts() -> None:
    model = nn.Linear(2, 2).double()

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(out, y, reduction="none")
        return loss + 3.0 * model.weight.square().sum()  # looked up when it is called

    decay = WeightDecay(model, 1.0)
    batch, valid = (X.double(), Y), (VALID[0].double(), VALID[1])
    learner = learner_of(model, decay, criterion=criterion, outer="cross_entropy")
    plain = learner_of(model, WeightDecay(model, 1.0), outer="cross_entropy")
    found = learner.hypergradient(valid, batch).residual
    assert abs(found - plain.hypergradient(valid, batch).residual) > 0.1


def test_parameters_frozen_or_replaced_since() -> None:
    model = nn.Linear(2, 2)
    learner = learner_of(model)
    model.bias.requires_grad_(False)
    with pytest.raises(GradientError, match=r"\['bias'\] were frozen"):
        learner.step(VALID, (X, Y))
    model.bias.requires_grad_()
    model.weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(GradientError, match=r"\['weight'\] were replaced"):
        learner.step(VALID, (X, Y))


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-1, 1)
        return super().forward(x)


def test_parameters_changed_in_place_by_the_model() -> None:
    model = Clamped(2, 2)
    with pytest.raises(GradientError, match=r"\['weight'\] in place in its forward"):
        learner_of(model).step(VALID, (X, Y))


def test_decays_that_overflow() -> None:
    model = nn.Linear(2, 2)
    decay = WeightDecay(model)
    learner = learner_of(model, decay)
    decay.log_decay.fill_(1e4)
    with pytest.raises(NonFiniteError, match="nothing was changed"):
        learner.step(VALID, (X, Y))


def test_a_state_of_other_hyperparameters() -> None:
    other = nn.Linear(3, 2)
    with pytest.raises(ArgumentError, match="state is of the hyperparameters"):
        learner_of(MODEL).load_state_dict(learner_of(other).state_dict())


def test_a_preconditioner_beside_several_rates() -> None:
    from woodbury import Jacobi

    groups = [{"params": [MODEL.weight], "lr": 0.2}, {"params": [MODEL.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ArgumentError, match="several learning rates"):
        learner_of(MODEL, recipe=Neumann(1, preconditioner=Jacobi()), optimizer=optimizer)
