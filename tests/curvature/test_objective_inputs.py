from __future__ import annotations

import pytest
import torch
from tests.curvature.reference import (
    all_gradients,
    apart,
    classification,
    classifier,
    cross_entropy,
    gradient_of,
    network,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from woodbury import Objective
from woodbury.errors import (
    ArgumentError,
    DataError,
    DeviceError,
    DtypeError,
    GradientError,
    NonDeterministicError,
    NonFiniteError,
    ShapeError,
)

SIZES = (3, 4, 2)
F64 = torch.float64


class TestLoaders:
    def test_shuffling_without_indices(self) -> None:
        model, data, losses, flat = classifier()
        tensors = TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True)))
        loader = DataLoader(tensors, batch_size=4, shuffle=True)
        objective = Objective(model, "cross_entropy", loader)
        assert apart(objective.value(), losses(flat).mean()) < 1e-13
        assert apart(objective.gradient(), gradient_of(lambda t: losses(t).mean(), flat)) < 1e-12
        for use in (
            objective.per_example_losses,
            objective.predict,
            objective.per_example_gradients,
            lambda: Objective(model, "cross_entropy", loader, weights=torch.ones(9, dtype=F64)),
        ):
            with pytest.raises(DataError, match="shuffle=False"):
                use()

    @pytest.mark.parametrize("as_mapping", [True, False])
    def test_shuffling_with_indices(self, as_mapping: bool) -> None:
        model, data, losses, flat = classifier()
        x, y = (torch.cat(part) for part in zip(*data, strict=True))
        if as_mapping:
            rows = [{"input": x[i], "labels": y[i], "indices": i} for i in range(9)]
            loader = DataLoader(rows, batch_size=4, shuffle=True)
        else:
            loader = DataLoader(TensorDataset(x, y, torch.arange(9)), batch_size=4, shuffle=True)
        weights = torch.rand(9, dtype=F64)
        objective = Objective(model, "cross_entropy", loader, weights=weights)
        assert apart(objective.per_example_losses(), losses(flat)) < 1e-13
        assert apart(objective.predict(), model(x).detach()) < 1e-13
        assert apart(objective.value(), (weights * losses(flat)).mean()) < 1e-13
        gradients = all_gradients(objective)
        assert apart(gradients, gradient_of(losses, flat)) < 1e-12

    def test_indices_that_are_no_rows(self) -> None:
        model, data, _, _ = classifier()
        x, y = data[1]
        objective = Objective(model, "cross_entropy", [(x, y, torch.tensor([0, 1, 2, 2]))])
        with pytest.raises(DataError, match="0 to 3, each once"):
            objective.predict()


class TestNothingIsChanged:
    @pytest.mark.parametrize("mode", ["eval", "train"])
    def test_the_model(self, mode: str) -> None:
        model = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
        ).double()
        model.train()
        model[2].eval()
        model[0].weight.grad = torch.ones_like(model[0].weight)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        x, y = classification(6, 3, 2)
        state = torch.get_rng_state()
        objective = Objective(model, "cross_entropy", (x, y), mode=mode)
        for use in (objective.value, objective.gradient, objective.predict):
            use()
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        assert [m.training for m in model.modules()] == [True, True, True, False, True]
        assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
        assert model[3].weight.grad is None
        assert torch.equal(torch.get_rng_state(), state)

    def test_after_an_error(self) -> None:
        class Failing(nn.Linear):
            def forward(self, x):
                raise RuntimeError("no")

        model = Failing(2, 2)
        with pytest.raises(RuntimeError, match="no"):
            Objective(model, "mse", (torch.ones(2, 2), torch.ones(2, 2))).value()
        assert model.training


class TestModes:
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 2)).double()

    def test_dropout_is_frozen_or_replayed(self) -> None:
        model, (x, y) = self.model(), classification(8, 3, 2)
        data = [(x[:4], y[:4]), (x[4:], y[4:])]
        frozen = Objective(model, "cross_entropy", data)
        assert apart(frozen.value(), cross_entropy(model.eval()(x), y).mean().detach()) < 1e-13
        replayed = Objective(model, "cross_entropy", data, mode="train")
        first = replayed.value()
        torch.randn(7)
        assert torch.equal(replayed.value(), first)
        assert not torch.equal(frozen.value(), first)
        other = Objective(model, "cross_entropy", data, mode="train", seed=1)
        assert not torch.equal(other.value(), first)

    def test_batches_draw_different_numbers(self) -> None:
        model, (x, y) = self.model(), classification(8, 3, 2)
        twice = Objective(model, "cross_entropy", [(x, y), (x, y)], mode="train")
        losses = twice.per_example_losses()
        assert not torch.equal(losses[:8], losses[8:])

    def test_batch_norm_uses_the_statistics_of_the_batch_in_training(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
        x, y = classification(8, 3, 2)
        data = [(x[:5], y[:5]), (x[5:], y[5:])]

        def normalized(x: torch.Tensor) -> torch.Tensor:
            return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()

        expected = torch.cat([cross_entropy(model[1](normalized(x)), y) for x, y in data])
        trained = Objective(model, "cross_entropy", data, mode="train")
        assert apart(trained.value(), expected.mean().detach()) < 1e-12
        frozen = Objective(model, "cross_entropy", data)
        expected = cross_entropy(model[1](x / (1 + 1e-5) ** 0.5), y).mean().detach()
        assert apart(frozen.value(), expected) < 1e-12

    def test_unknown_mode(self) -> None:
        with pytest.raises(ArgumentError, match="'test'"):
            Objective(self.model(), "mse", torch.ones(2), mode="test")


class TestSelection:
    def test_names_parameters_and_predicates(self) -> None:
        model, data, losses, flat = classifier()
        full = gradient_of(lambda t: losses(t).mean(), flat)
        weights = torch.cat([full[:12], full[16:24]])
        for params in (
            ["0.weight", "2.weight"],
            ["2.weight", "0.weight"],  # the order is the model's
            [model[0].weight, model[2].weight],
            lambda name, p: p.dim() == 2,
            (name for name in ["0.weight", "2.weight"]),
        ):
            objective = Objective(model, "cross_entropy", data, params=params)
            assert list(objective.space.shapes) == ["0.weight", "2.weight"]
            assert apart(objective.gradient(), weights) < 1e-12

    def test_frozen_parameters_are_constants(self) -> None:
        model, data, losses, flat = classifier()
        model[0].requires_grad_(False)
        full = gradient_of(lambda t: losses(t).mean(), flat)
        objective = Objective(model, "cross_entropy", data)
        assert apart(objective.gradient(), full[16:]) < 1e-12
        asked = Objective(model, "cross_entropy", data, params=["0.bias"])
        assert apart(asked.gradient(), full[12:16]) < 1e-12
        assert not model[0].bias.requires_grad

    def test_tied_weights_are_one_parameter(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
                self.second.weight = self.first.weight

            def forward(self, x):
                return self.second(torch.tanh(self.first(x)))

        model = Tied().double()
        x, y = classification(6, 3, 3)
        parameters = list(model.parameters())
        objective = Objective(model, "cross_entropy", (x, y))
        expected = torch.autograd.grad(cross_entropy(model(x), y).mean(), parameters)
        expected = torch.cat([g.flatten() for g in expected])
        assert list(objective.space.shapes) == ["first.weight", "first.bias", "second.bias"]
        assert apart(objective.gradient(), expected) < 1e-12
        by_alias = Objective(model, "cross_entropy", (x, y), params=["second.weight"])
        assert list(by_alias.space.shapes) == ["first.weight"]
        assert apart(by_alias.gradient(), expected[:9]) < 1e-12

    def test_refusals(self) -> None:
        model, data, _, _ = classifier()
        with pytest.raises(ArgumentError, match="no parameter called '1.weight'; it has 0.weight"):
            Objective(model, "mse", data, params=["1.weight"])
        with pytest.raises(ArgumentError, match=r"of shape \(2,\)"):
            Objective(model, "mse", data, params=[torch.ones(2)])
        with pytest.raises(ArgumentError, match="params is a str"):
            Objective(model, "mse", data, params="0.weight")
        with pytest.raises(GradientError, match="has 4, of which 4 require"):
            Objective(model, "mse", data, params=lambda name, p: False)
        with pytest.raises(GradientError, match="has 0"):
            Objective(nn.ReLU(), "mse", data)

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
    def test_other_dtypes_are_refused(self, dtype: torch.dtype) -> None:
        with pytest.raises(DtypeError, match="real floating-point"):
            Objective.functional(lambda p, x: x, {"w": torch.ones(2, dtype=dtype)}, torch.ones(2))

    def test_mixed_dtypes_are_refused(self) -> None:
        model, data, _, _ = classifier()
        model[2].float()
        with pytest.raises(DtypeError, match="several dtypes"):
            Objective(model, "mse", data)


class TestUnusedParameters:
    def model(self) -> nn.Module:
        class Unused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used = nn.Linear(3, 2)
                self.extra = nn.Linear(3, 2)

            def forward(self, x):
                return self.used(x) + (self.extra(x) if len(x) > 2 else 0)

        return Unused().double()

    def test_they_are_named(self) -> None:
        x, y = classification(2, 3, 2)
        objective = Objective(self.model(), "cross_entropy", (x, y))
        with pytest.raises(GradientError, match=r"'extra.weight', 'extra.bias'.*allow_unused"):
            objective.gradient()

    def test_they_may_be_allowed(self) -> None:
        x, y = classification(2, 3, 2)
        objective = Objective(self.model(), "cross_entropy", (x, y), allow_unused=True)
        gradient = objective.space.unflatten(objective.gradient())
        assert gradient["extra.weight"].abs().max() == 0
        assert gradient["used.weight"].abs().max() > 0

    def test_one_batch_that_uses_them_is_enough(self) -> None:
        x, y = classification(5, 3, 2)
        data = [(x[:2], y[:2]), (x[2:], y[2:])]
        gradient = Objective(self.model(), "cross_entropy", data).gradient()
        assert gradient.abs().min() > 0


def test_activation_checkpointing_is_refused() -> None:
    """It would recompute with the module's own parameters and modes."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = network((3, 4)), nn.Linear(4, 2, dtype=F64)

        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    objective = Objective(Checkpointed(), "cross_entropy", classification(5, 3, 2))
    objective.value()  # no graph, nothing to recompute
    with pytest.raises(GradientError, match="gradient_checkpointing_disable"):
        objective.gradient()


class TestBadValues:
    def test_a_random_model(self) -> None:
        class Random(nn.Linear):
            def forward(self, x):
                return super().forward(x) + torch.randn(1)

        objective = Objective(Random(2, 2), "mse", (torch.ones(3, 2), torch.ones(3, 2)))
        with pytest.raises(NonDeterministicError, match="mode='train'"):
            objective.gradient()
        replayed = Objective(
            Random(2, 2), "mse", (torch.ones(3, 2), torch.ones(3, 2)), mode="train"
        )
        assert torch.equal(replayed.gradient(), replayed.gradient())

    def test_randomness_that_is_not_of_torch(self) -> None:
        numbers = iter(range(1000))

        class Counting(nn.Linear):
            def forward(self, x):
                return super().forward(x) + next(numbers)

        data = (torch.ones(3, 2), torch.ones(3, 2))
        with pytest.raises(NonDeterministicError):
            Objective(Counting(2, 2), "mse", data, mode="train").value()

    def test_buffers_that_change_in_evaluation_mode(self) -> None:
        class Counter(nn.Linear):
            def __init__(self) -> None:
                super().__init__(2, 2)
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x):
                self.calls += 1
                return super().forward(x)

        model = Counter()
        data = (torch.ones(3, 2), torch.ones(3, 2))
        with pytest.raises(NonDeterministicError, match="'calls'"):
            Objective(model, "mse", data).value()
        Objective(model, "mse", data, mode="train").value()
        assert model.calls == 0

    def test_a_loss_that_is_not_finite(self) -> None:
        model, data, _, _ = classifier()
        data[2][0][1, 0] = float("nan")
        objective = Objective(model, "cross_entropy", data)
        for use in (objective.value, objective.gradient):
            with pytest.raises(NonFiniteError, match=r"batch 2 \(4 examples\) is nan"):
                use()

    def test_weights(self) -> None:
        model, data, _, _ = classifier()
        with pytest.raises(ShapeError, match=r"expected \[9\]"):
            Objective(model, "cross_entropy", data, weights=torch.ones(8, dtype=F64))
        with pytest.raises(NonFiniteError, match="weights"):
            Objective(model, "cross_entropy", data, weights=torch.full((9,), float("inf")))
        with pytest.raises(DeviceError, match="meta"):
            Objective(model, "cross_entropy", data, weights=torch.ones(9, device="meta"))
        scalar = Objective(
            model,
            lambda z, y: cross_entropy(z, y).mean(),
            data,
            weights=torch.ones(9, dtype=F64),
        )
        with pytest.raises(DataError, match="one loss per example"):
            scalar.value()

    def test_l2(self) -> None:
        model, data, _, _ = classifier()
        with pytest.raises(ShapeError, match=r"a number or \[26\]"):
            Objective(model, "cross_entropy", data, l2=torch.ones(3, dtype=F64))
        with pytest.raises(DtypeError, match="float32"):
            Objective(model, "cross_entropy", data, l2=torch.ones(26))
        with pytest.raises(NonFiniteError, match="l2"):
            Objective(model, "cross_entropy", data, l2=float("nan"))

    def test_outputs(self) -> None:
        class Wrong(nn.Linear):
            result: object = None

            def forward(self, x):
                return self.result

        model = Wrong(2, 2)
        data = (torch.ones(3, 2), torch.ones(3, 2))
        for result, message in [
            (None, "NoneType"),
            (torch.ones(2, 2), r"\(2, 2\) for 3 examples"),
            (torch.ones(()), "for 3 examples"),
        ]:
            model.result = result
            with pytest.raises(DataError, match=message):
                Objective(model, "mse", data).value()

    def test_outputs_of_several_shapes(self) -> None:
        model = nn.Linear(2, 2)
        data = [
            (torch.ones(3, 4, 2), torch.ones(3, 4, 2)),
            (torch.ones(3, 5, 2), torch.ones(3, 5, 2)),
        ]
        objective = Objective(model, "mse", data)
        assert objective.per_example_losses().shape == (6,)
        with pytest.raises(ShapeError, match=r"\[\(4, 2\), \(5, 2\)\]; pad"):
            objective.predict()

    def test_batches_without_targets(self) -> None:
        model = nn.Linear(2, 2)
        with pytest.raises(DataError, match="labels"):
            Objective(model, "mse", [{"input": torch.ones(3, 2)}]).value()
        with pytest.raises(DataError, match="list is a sequence of batches"):
            Objective(model, "mse", [torch.ones(3, 2), torch.ones(3, 2)]).value()


def test_progress() -> None:
    model, data, _, _ = classifier()
    calls = []
    objective = Objective(model, "cross_entropy", data, progress=lambda *call: calls.append(call))
    objective.value()
    assert calls == [("value", 1, 3), ("value", 2, 3), ("value", 3, 3)]


def test_half_precision() -> None:
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    x, y = classification(6, 3, 2)
    objective = Objective(model, "cross_entropy", (x.bfloat16(), y))
    wide = Objective(model.double(), "cross_entropy", (x.bfloat16().double(), y))
    assert objective.value().dtype == torch.bfloat16
    assert objective.gradient().dtype == torch.bfloat16
    assert apart(objective.gradient().double(), wide.gradient()) < 0.05
