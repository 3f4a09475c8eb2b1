"""The learner inside a training loop: nothing of the training changes, and it resumes exactly."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from woodbury import Eigh, Neumann, SolveStatus
from woodbury.bilevel import (
    Augmentation,
    ExampleWeights,
    HyperLearner,
    Indexed,
    LabelCorrection,
    LearningRates,
    WeightDecay,
)
from woodbury.curvature.batches import Batch
from woodbury.curvature.functions import ModuleFunction

ROWS, CLASSES = 24, 3


class Noise(nn.Module):
    """A network that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x) + 0.1 * torch.randn_like(x)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, CLASSES)
    )


def data() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 4, generator=gen)
    y = torch.randint(0, CLASSES, (ROWS,), generator=gen)
    valid = torch.randn(10, 4, generator=gen), torch.randint(0, CLASSES, (10,), generator=gen)
    return TensorDataset(x, y), valid


class Loop:
    """A user's training with every kind of hyperparameter."""

    def __init__(self, seed: int = 0) -> None:
        self.train, self.valid = data()
        self.model = network(seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        hypers = [
            WeightDecay(self.model, 1e-2),
            ExampleWeights(ROWS),
            LabelCorrection(self.train.tensors[1], CLASSES),
            Augmentation(Noise()),
            LearningRates(self.optimizer),
        ]
        self.learner = HyperLearner(
            self.model, "cross_entropy", hypers, optimizer=self.optimizer,
            hyper_optimizer=partial(torch.optim.Adam, lr=0.05),
        )  # fmt: skip
        self.batches = list(DataLoader(Indexed(self.train), batch_size=8))

    def run(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.model.train()
            self.optimizer.zero_grad()
            self.learner.loss(self.batches[step % 3]).backward()
            self.optimizer.step()
            if step % 2:
                self.model.eval()
                self.learner.step(self.valid)

    def numbers(self) -> dict[str, Tensor]:
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, hyper in self.learner.hypers.items():
            found |= {f"{name}.{k}": v for k, v in hyper.state_dict().items()}
        found["rates"] = torch.tensor([g["lr"] for g in self.optimizer.param_groups]).double()
        return {name: value.clone() for name, value in found.items()}


def test_killed_and_resumed_is_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    loop = Loop()
    start = loop.numbers()
    loop.run(0, 5)
    saved = {
        "model": loop.model.state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "learner": loop.learner.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(saved, tmp_path / "checkpoint.pt")
    loop.run(5, 12)
    del saved

    other = Loop(seed=7)
    found = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.model.load_state_dict(found["model"])
    other.optimizer.load_state_dict(found["optimizer"])
    other.learner.load_state_dict(found["learner"])
    torch.set_rng_state(found["random"])
    other.run(5, 12)
    assert other.learner.steps == loop.learner.steps == 6
    wanted = loop.numbers()
    for name, value in other.numbers().items():
        assert torch.equal(value, wanted[name]), name
    moved = {n for n, value in wanted.items() if not torch.equal(value, start[n])}
    assert moved >= {"WeightDecay.log_decay", "ExampleWeights.logits", "LabelCorrection.logits"}
    assert moved >= {"Augmentation.network.mix.weight", "LearningRates.log_rates", "rates"}


def test_a_learning_rate_survives_to_the_bit_before_it_was_ever_written() -> None:
    loop = Loop()
    loop.optimizer.param_groups[0]["lr"] = 0.3  # a scheduler
    state = copy.deepcopy(loop.learner.state_dict())
    other = Loop()
    other.learner.load_state_dict(state)
    assert other.optimizer.param_groups[0]["lr"] == 0.3


def test_nothing_of_the_training_is_changed() -> None:
    loop = Loop()
    loop.run(0, 3)
    loop.model.train()
    loop.model[1].eval()  # a frozen batch norm
    loop.learner.loss(loop.batches[0]).backward()  # gradients in accumulation
    gradients = {n: p.grad.clone() for n, p in loop.model.named_parameters()}
    state = {n: t.clone() for n, t in loop.model.state_dict().items()}
    modes = [m.training for m in loop.model.modules()]
    random = torch.get_rng_state()
    optimizer = copy.deepcopy(loop.optimizer.state_dict()["state"])
    loop.learner.step(loop.valid)
    assert all(torch.equal(p.grad, gradients[n]) for n, p in loop.model.named_parameters())
    assert all(torch.equal(t, state[n]) for n, t in loop.model.state_dict().items())
    assert [m.training for m in loop.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    after = loop.optimizer.state_dict()["state"]
    for key, entry in optimizer.items():
        assert torch.equal(entry["momentum_buffer"], after[key]["momentum_buffer"])
    assert all(p.grad is None for h in loop.learner.hypers.values() for p in h.parameters())


def test_the_training_loss_itself_draws_and_counts_as_it_would_without_the_learner() -> None:
    train, _ = data()
    x, y = train.tensors
    model, twin = network(), network()
    learner = HyperLearner(
        model, "cross_entropy", WeightDecay(model, 1e-2), recipe=Neumann(1, step=0.1)
    )
    torch.manual_seed(5)
    loss = learner.loss((x, y))
    torch.manual_seed(5)
    bare = nn.functional.cross_entropy(twin(x), y)
    penalty = 0.5 * 1e-2 * sum(p.square().sum() for p in twin.parameters())
    torch.testing.assert_close(loss, bare + penalty)
    assert torch.equal(model[1].running_mean, twin[1].running_mean)
    assert model[1].num_batches_tracked == 1


def test_dropout_and_batch_norm_are_one_function_for_all_products() -> None:
    train, valid = data()
    x, y = (t.double() if t.is_floating_point() else t for t in train.tensors)
    v, z = valid[0].double(), valid[1]
    model = network().double()
    model(x)  # statistics
    decay = WeightDecay(model, 0.5).double()
    weights = ExampleWeights(ROWS).double()
    learner = HyperLearner(model, "cross_entropy", [decay, weights], recipe=Eigh(), seed=11)
    learner.loss((x, y, torch.arange(ROWS)))
    report = learner.hypergradient((v, z))
    assert report.status is SolveStatus.converged
    again = learner.hypergradient((v, z))
    assert all(torch.equal(again.value[n], value) for n, value in report.value.items())

    # densely, with the same draws made by hand
    params = dict(model.named_parameters())
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    sizes = [p.numel() for p in params.values()]

    def call(flat: Tensor, inputs: Tensor) -> Tensor:
        views = dict(zip(params, flat.split(sizes), strict=True))
        shaped = {n: view.view(params[n].shape) for n, view in views.items()}
        copies = {n: b.clone() for n, b in buffers.items()}
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return torch.func.functional_call(model, {**shaped, **copies}, (inputs,))

    def inner(flat: Tensor, log_decay: Tensor, logits: Tensor) -> Tensor:
        model.train()
        losses = nn.functional.cross_entropy(call(flat, x), y, reduction="none")
        return (logits.sigmoid() * losses).mean() + 0.5 * (log_decay.exp() * flat**2).sum()

    def outer(flat: Tensor) -> Tensor:
        model.eval()
        return nn.functional.cross_entropy(call(flat, v), z)

    flat = torch.cat([p.detach().flatten() for p in params.values()])
    a = torch.autograd.functional.jacobian(outer, flat)
    point = flat, decay.log_decay.detach(), weights.logits.detach()
    blocks = torch.autograd.functional.hessian(inner, point)
    q = torch.linalg.solve(blocks[0][0], a)
    for name, block in (("WeightDecay.log_decay", 1), ("ExampleWeights.logits", 2)):
        torch.testing.assert_close(report.value[name], -blocks[block][0] @ q, rtol=1e-7, atol=1e-10)


def test_a_frozen_batch_norm_stays_frozen_in_the_hypergradient() -> None:
    train, valid = data()
    x, y = train.tensors
    model = network()
    model.train()
    model(x)
    model[1].eval()
    learner = HyperLearner(
        model, "cross_entropy", WeightDecay(model), recipe=Neumann(0, step=0.1), seed=3
    )
    learner.loss((x, y))
    model.eval()  # for validation, as loops do
    report = learner.hypergradient(valid)
    model.train()
    model[1].eval()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loss = nn.functional.cross_entropy(model(x), y)
    penalty = 0.5 * 1e-4 * sum(p.square().sum() for p in model.parameters())
    assert report.inner_value == pytest.approx((loss + penalty).item(), rel=1e-6)


def test_flags_of_a_module_function_are_one_for_each_module() -> None:
    model = network()
    modes = [m.training for m in model.modules()]
    modes[2] = False
    function = ModuleFunction(model, dict(model.named_parameters()), "train", 0, modes)
    x = torch.randn(5, 4)
    out = function(dict(model.named_parameters()), Batch(0, (x, None), 5, slice(0)))
    hidden = model[0](x)
    hidden = (hidden - model[1].running_mean) / (model[1].running_var + 1e-5).sqrt()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wanted = model[4](model[3](model[2](hidden)))
    torch.testing.assert_close(out, wanted)


def test_a_step_under_autocast_is_the_step_without() -> None:
    loops = Loop(), Loop()
    random = torch.get_rng_state()
    for loop, half in zip(loops, (False, True), strict=True):
        torch.set_rng_state(random)
        loop.learner.loss(loop.batches[0]).backward()
        loop.optimizer.step()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loop.learner.step(loop.valid)
    wanted = loops[0].numbers()
    assert all(torch.equal(value, wanted[name]) for name, value in loops[1].numbers().items())


def test_autocast_and_a_gradient_scaler() -> None:
    loop = Loop()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        loop.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loop.learner.loss(loop.batches[step % 3])
        scaler.scale(loss).backward()
        scaler.step(loop.optimizer)
        scaler.update()
        scaled = [p.grad.clone() for p in loop.model.parameters()]
        report = loop.learner.step(loop.valid)
        pairs = zip(loop.model.parameters(), scaled, strict=True)
        assert all(torch.equal(p.grad, before) for p, before in pairs)
        assert report.residual < 1
    assert all(bool(torch.isfinite(value).all()) for value in loop.numbers().values())


def test_within_no_grad_and_inference_mode() -> None:
    loops = [Loop() for _ in range(3)]
    random = torch.get_rng_state()
    contexts = [torch.enable_grad(), torch.no_grad(), torch.inference_mode()]
    for loop, context in zip(loops, contexts, strict=True):
        torch.set_rng_state(random)
        loop.learner.loss(loop.batches[0]).backward()
        loop.optimizer.step()
        with context:
            loop.learner.step(loop.valid)
    wanted = loops[0].numbers()
    for loop in loops[1:]:
        assert all(torch.equal(value, wanted[name]) for name, value in loop.numbers().items())


def test_batches_that_are_mappings_and_outputs_with_logits() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, tokens: Tensor) -> dict[str, Tensor]:
            return {"logits": self.table(tokens).mean(1)}

    model = Text()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    learner = HyperLearner(
        model, "cross_entropy", [WeightDecay(model), ExampleWeights(4)], optimizer=optimizer
    )
    batch = {
        "tokens": torch.randint(0, 5, (4, 2)),
        "labels": torch.randint(0, 3, (4,)),
        "indices": torch.arange(4),
    }
    learner.loss(batch).backward()
    optimizer.step()
    report = learner.step({"tokens": batch["tokens"], "labels": batch["labels"]})
    assert report.status is SolveStatus.completed


def test_weights_of_examples_fall_where_labels_are_wrong() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(120, 2, generator=gen)
    y = (x[:, 0] > 0).long()
    wrong = torch.zeros(120, dtype=torch.bool)
    wrong[:30] = True
    noisy = torch.where(wrong, 1 - y, y)
    v = torch.randn(60, 2, generator=gen)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    weights = ExampleWeights(120)
    correction = LabelCorrection(noisy)
    for hyper, rate in ((weights, 0.2), (correction, 0.2)):
        learner = HyperLearner(
            model, "cross_entropy", hyper, optimizer=optimizer,
            hyper_optimizer=partial(torch.optim.Adam, lr=rate),
        )  # fmt: skip
        for _ in range(60):
            optimizer.zero_grad()
            learner.loss((x, noisy, torch.arange(120))).backward()
            optimizer.step()
            learner.step((v, (v[:, 0] > 0).long()))
    assert weights.weights()[wrong].mean() < 0.2 < 0.6 < weights.weights()[~wrong].mean()
    assert (correction.labels() == y).float().mean() > 0.9


def test_decays_stay_below_their_bound() -> None:
    train, valid = data()
    model = nn.Linear(4, CLASSES)
    decay = WeightDecay(model, 0.4, largest=0.5)
    learner = HyperLearner(
        model, "cross_entropy", decay, recipe=Neumann(1, step=0.1),
        hyper_optimizer=partial(torch.optim.SGD, lr=1e3),
    )  # fmt: skip
    gradient = learner.hypergradient(valid, train.tensors).value["WeightDecay.log_decay"]
    learner.step(valid, train.tensors)
    wanted = (torch.tensor(0.4).log() - 1e3 * gradient).clamp(max=torch.tensor(0.5).log())
    torch.testing.assert_close(decay.log_decay.data, wanted)
    assert (wanted < torch.tensor(0.5).log()).any()
    assert (wanted == torch.tensor(0.5).log()).any()
