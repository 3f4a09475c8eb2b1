"""Factored gradients per example against automatic differentiation, one example at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.curvature.reference import all_gradients
from tests.curvature.test_models import Convolutional, Recurrent, Text
from torch import nn

from woodbury import Fisher, Objective
from woodbury.curvature import FactoredGradients
from woodbury.curvature.layers import MatrixBlock, VectorBlock
from woodbury.errors import (
    ArgumentError,
    DataError,
    GradientError,
    NonFiniteError,
    StructureError,
    WoodburyError,
)

F64 = torch.float64


class HuggingFaceConv1D(nn.Module):
    """The layer of that name in transformers: a linear map with its weight the other way around."""

    def __init__(self, out: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(inputs, out)),
            nn.Parameter(torch.ones(out)),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(
            *x.shape[:-1], len(self.bias)
        )


class Mixed(nn.Module):
    """Positions that all examples share, tied weights, adapters, scales, shifts and views."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 4, padding_idx=0), nn.Embedding(6, 4)
        self.table = nn.Parameter(torch.randn(1, 6, 4))
        self.conv = HuggingFaceConv1D(5, 4)
        self.norm = nn.RMSNorm(5)
        self.back = nn.Linear(5, 4)
        self.scale, self.level = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(()))
        self.frozen = nn.Linear(4, 4)
        self.frozen.weight.requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.tokens.weight

    def forward(self, i):
        h = self.tokens(i) + self.places(torch.arange(i.shape[1])) + self.table[:, : i.shape[1]]
        h = self.norm(self.conv(h))
        h = self.back(torch.tanh(h)) * self.scale
        h = self.back(torch.tanh(h @ self.conv.weight)) * self.level + self.frozen(h)
        h = h + self.up(self.down(h)) @ self.frozen.weight.T
        return self.out(h).mT


class SequenceFirst(nn.Module):
    """Attention, also between two sequences of different length, with the examples on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6)
        self.decoder = nn.TransformerDecoderLayer(4, 2, 6)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.inner(x.transpose(0, 1))
        return self.head(self.decoder(x[:3], self.encoder(x))[-1])


class Separate(nn.Module):
    """Attention with keys and values of other sizes, whose weights are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.attention(x, x[..., :3], x.repeat(1, 1, 2)[..., :5])[0].mean(1))


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


def images(*sizes: int):
    return lambda: (torch.randn(5, *sizes, dtype=F64), torch.randint(3, (5,)))


def words(length: int = 6):
    return lambda: (torch.randint(5, (4, length)), torch.randint(5, (4, length)))


MODELS = {
    "linear": (lambda: flat(nn.Linear(4, 3), nn.Tanh(), nn.LayerNorm(3)), images(4)),
    "three axes": (
        lambda: flat(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2)),
        images(5, 4),
    ),
    "two more axes": (lambda: flat(nn.Linear(4, 3), nn.Tanh()), images(2, 5, 4)),
    "conv1d": (
        lambda: flat(
            nn.Conv1d(4, 6, 3, groups=2, padding="same", dilation=2, padding_mode="reflect"),
            nn.ReLU(inplace=True),
            nn.BatchNorm1d(6),
            nn.Conv1d(6, 2, 5, padding="same", bias=False),
        ),
        images(4, 7),
    ),
    "conv2d": (Convolutional, lambda: (torch.randn(5, 2, 5, 5, dtype=F64), torch.randint(3, (5,)))),
    "depthwise": (
        lambda: flat(
            nn.Conv2d(3, 6, (2, 3), stride=(2, 1), groups=3, padding_mode="circular", padding=1)
        ),
        images(3, 4, 5),
    ),
    "conv3d": (
        lambda: flat(
            nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2), dilation=(1, 2, 1)),
            nn.GroupNorm(2, 4),
        ),
        images(2, 3, 4, 3),
    ),
    "transposed convolution": (lambda: flat(nn.ConvTranspose1d(2, 3, 2)), images(2, 4)),
    "text": (Text, words()),
    "as many tokens as examples": (Text, words(4)),
    "mixed": (Mixed, words()),
    "mixed, as many tokens as examples": (Mixed, words(4)),
    "recurrent": (Recurrent, images(6, 2)),
    "sequence first": (
        SequenceFirst,
        lambda: (torch.randn(5, 5, 3, dtype=F64), torch.randint(2, (5,))),
    ),
    "separate": (Separate, lambda: (torch.randn(3, 5, 4, dtype=F64), torch.randint(2, (3,)))),
}


def made(name: str, **kwargs) -> Objective:
    torch.manual_seed(0)
    make_model, make_data = MODELS[name]
    model, data = make_model().eval().double(), make_data()
    with torch.no_grad():
        model(data[0])  # lazy layers
    for parameter in model.parameters():  # ones and zeros would hide mistakes
        torch.nn.init.normal_(parameter, std=0.5)
    return Objective(model, "cross_entropy", data, **kwargs)


def dense(objective: Objective, gradients: FactoredGradients) -> torch.Tensor:
    """All gradients as rows, in the order of the data, one column of the root after the other."""
    rows = {}
    for batch in gradients:
        G = torch.zeros(batch.size, objective.space.dim, dtype=F64)
        for part in batch.blocks.values():
            G[:, part.block.positions(objective.space)] += part.dense()
        for row, g in zip(batch.rows.tolist(), G, strict=True):
            rows[batch.column, row] = g
    return torch.stack([rows[key] for key in sorted(rows)])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_every_example(name):
    objective = made(name)
    truth = all_gradients(objective)
    assert (dense(objective, FactoredGradients(objective)) - truth).abs().max() < 1e-13
    positions = [b.positions(objective.space) for b in FactoredGradients(objective).blocks.values()]
    everything = torch.cat(positions).sort().values
    assert torch.equal(everything, torch.arange(objective.space.dim))  # each entry exactly once


@pytest.mark.parametrize("name", ["conv2d", "text", "mixed", "sequence first"])
def test_batches_of_any_size_give_the_same_gradients(name):
    objective = made(name)
    x, y = objective._batches.first().data
    batches = [(x[:1], y[:1]), (x[1:3], y[1:3]), (x[3:], y[3:])]
    split = Objective(objective._predict.model, "cross_entropy", batches)
    whole = dense(objective, FactoredGradients(objective))
    assert (dense(split, FactoredGradients(split)) - whole).abs().max() < 1e-13


def test_blocks_are_layers():
    blocks = FactoredGradients(made("mixed")).blocks
    found = {name: (b.p, b.m) for name, b in blocks.items() if isinstance(b, MatrixBlock)}
    assert found == {
        "tokens": (7, 5),  # the embedding, which is the output layer, with its bias
        "places": (4, 6),
        "conv": (5, 5),
        "back": (4, 6),
        "frozen.bias": (4, 1),
        "down": (2, 4),
        "up": (4, 2),
    }
    assert blocks["places"].one_hot
    vectors = [name for name, block in blocks.items() if isinstance(block, VectorBlock)]
    assert vectors == ["table", "scale", "level", "norm"]
    attention = FactoredGradients(made("sequence first")).blocks
    assert {"encoder.self_attn.q", "encoder.self_attn.k", "decoder.multihead_attn.v"} <= {
        *attention
    }
    objective = made("conv2d")
    sizes = [block.size(objective.space) for block in FactoredGradients(objective).blocks.values()]
    assert sizes == [20, 20, 8, 32, 27]


@pytest.mark.parametrize("name", ["linear", "conv1d", "text", "mixed"])
def test_products_with_factors_are_those_with_gradients(name):
    objective = made(name)
    (batch,) = FactoredGradients(objective)
    for part in batch.blocks.values():
        D, weights = part.dense(), torch.randn(batch.size, dtype=F64)
        assert torch.allclose(part.total(weights), weights @ D)
        block = part.block
        if isinstance(block, VectorBlock):
            U = torch.randn(3, D.shape[1], dtype=F64)
            assert torch.allclose(part.inner(U), U @ D.T)
            continue
        for q in (1, 3):
            U = torch.randn(q, block.p, block.m, dtype=F64)
            assert torch.allclose(part.inner(U), U.flatten(1) @ D.T)
            tokens = part.tokens(U)
            assert tokens.shape == (q, *part.grads.shape[:2])
            assert torch.allclose(tokens.sum(-1), U.flatten(1) @ D.T)
        Q_S, Q_A = (torch.randn(n, n, dtype=F64) for n in (block.p, block.m))
        matrices = D.view(-1, block.p, block.m)
        for S, A in ((Q_S, Q_A), (None, Q_A), (Q_S, None)):
            wanted = matrices if S is None else S.T @ matrices
            wanted = wanted if A is None else wanted @ A
            assert torch.allclose(part.rotate(S, A).dense(), wanted.flatten(1))
        outer = part.dense_inputs().mT @ part.grads
        assert torch.allclose(outer.mT.flatten(1), D)


@pytest.mark.parametrize("criterion", ["cross_entropy", "mse", "bce"])
def test_columns_of_a_root_make_the_exact_fisher_matrix(criterion):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(6, 3, dtype=F64)
    y = torch.randint(3, (6,)) if criterion == "cross_entropy" else torch.rand(6, 3, dtype=F64)
    loss = nn.BCEWithLogitsLoss() if criterion == "bce" else criterion
    objective = Objective(model, loss, [(x[:2], y[:2]), (x[2:], y[2:])])
    G = dense(objective, FactoredGradients(objective, "exact"))
    assert len(G) == 18
    assert torch.allclose(G.T @ G / 6, Fisher(objective).to_dense())


def test_elements_of_an_example_do_not_mix_in_the_exact_fisher_matrix():
    objective = made("text")
    G = dense(objective, FactoredGradients(objective, "exact"))
    assert len(G) == 4 * 6 * 5
    assert torch.allclose(G.T @ G / 4, Fisher(objective).to_dense(), atol=1e-12)


def test_sampled_gradients_are_those_of_the_sampled_fisher_matrix_and_the_same_in_every_pass():
    objective = made("text")
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    gradients = FactoredGradients(objective, "sampled", samples=3, generator=generators[0])
    G = dense(objective, gradients)
    assert len(G) == 12
    assert torch.equal(G, dense(objective, gradients))
    wanted = Fisher(objective, "sampled", samples=3, generator=generators[1]).to_dense()
    assert torch.allclose(G.T @ G / 4, wanted, atol=1e-12)


def test_frozen_parameters_are_constants():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = torch.randn(5, 3, dtype=F64), torch.randint(2, (5,))
    for names in (["0.weight"], ["0.bias", "2.weight"], ["2.bias"]):
        objective = Objective(model, "cross_entropy", data, params=names)
        G = dense(objective, FactoredGradients(objective))
        assert torch.allclose(G, all_gradients(objective), atol=1e-14)


def test_named_parameters_are_taken_one_by_one():
    objective = made("linear")
    gradients = FactoredGradients(objective, dense=["0.weight"])
    assert gradients.dense == ("0.weight",)
    assert isinstance(gradients.blocks["0.bias"], MatrixBlock)  # by itself now
    assert torch.allclose(dense(objective, gradients), all_gradients(objective))


def test_replayed_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    data = torch.randn(5, 3, dtype=F64), torch.randint(2, (5,))
    objective = Objective(model, "cross_entropy", data, mode="train")
    G = dense(objective, FactoredGradients(objective))
    assert torch.allclose(G, all_gradients(objective))


def test_functional_objective():
    x = torch.randn(5, 3, dtype=F64)
    params = {"w": torch.randn(2, 3, dtype=F64), "c": torch.randn(2, dtype=F64)}

    def loss(p, x):
        return (F.linear(x, p["w"], p["c"]).sin() * p["c"]).sum(1)

    objective = Objective.functional(loss, params, [x])
    gradients = FactoredGradients(objective)
    assert gradients.dense == ("c",)  # a bias and a scale at once has no one form
    assert torch.allclose(dense(objective, gradients), all_gradients(objective))


def test_model_is_as_it_was():
    objective = made("text")
    model = objective._predict.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    for _ in FactoredGradients(objective):
        pass
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inputs_changed_in_place_behind_a_layer_are_an_error_not_a_wrong_result():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            h = self.first(x)
            z = self.second(h)
            h.mul_(2)  # what the second layer saw is no more
            return z

    data = torch.randn(5, 3, dtype=F64), torch.randint(2, (5,))
    objective = Objective(Careless().double(), "cross_entropy", data)
    with pytest.raises((RuntimeError, WoodburyError)):
        list(FactoredGradients(objective))


class Hidden(torch.autograd.Function):
    """A product that watching functions of torch does not see."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


class Unseen(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(Hidden.apply(x, self.w))


def test_a_use_that_was_not_seen_is_an_error_and_can_be_taken_one_by_one():
    data = torch.randn(5, 3, dtype=F64), torch.randint(2, (5,))
    objective = Objective(Unseen().double(), "cross_entropy", data)
    with pytest.raises(StructureError, match=r"'w'.*dense=\['w'\]"):
        list(FactoredGradients(objective))
    G = dense(objective, FactoredGradients(objective, dense=["w"]))
    assert torch.allclose(G, all_gradients(objective))


def test_examples_that_depend_on_each_other_are_an_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    data = torch.randn(6, 3, dtype=F64), torch.randint(2, (6,))
    objective = Objective(model, "cross_entropy", data, mode="train")
    with pytest.raises(StructureError, match="depend on each other"):
        list(FactoredGradients(objective))


def test_layers_that_are_never_called_are_an_error():
    class Idle(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.idle = nn.Linear(2, 2)

    data = torch.randn(5, 3, dtype=F64), torch.randint(2, (5,))
    model = Idle().double()
    with pytest.raises(GradientError, match=r"idle\.weight"):
        list(FactoredGradients(Objective(model, "cross_entropy", data)))
    objective = Objective(model, "cross_entropy", data, allow_unused=True)
    assert list(FactoredGradients(objective).blocks) == ["weight"]


def test_a_loss_that_averages_over_the_batch_is_refused():
    model = nn.Linear(3, 2).double()
    data = torch.randn(6, 3, dtype=F64), torch.randint(2, (6,))

    def averaged(z, y):
        return F.cross_entropy(z, y, reduction="none") / len(y)

    with pytest.raises(DataError, match="within its batch"):
        list(FactoredGradients(Objective(model, averaged, data)))
    with pytest.raises(DataError, match="one loss per example"):
        list(FactoredGradients(Objective(model, lambda z, y: F.cross_entropy(z, y), data)))


def test_nan_is_named():
    x, y = torch.randn(9, 3, dtype=F64), torch.randint(2, (9,))
    x[7, 1] = float("nan")
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]
    for kind in ("empirical", "exact"):
        objective = Objective(nn.Linear(3, 2).double(), "cross_entropy", batches)
        with pytest.raises(NonFiniteError, match=r"batch 1 .*row 7 of the data"):
            list(FactoredGradients(objective, kind))


def test_data_whose_order_changes_is_an_error():
    class Shuffled:
        def __init__(self):
            self.x, self.y = torch.randn(8, 3, dtype=F64), torch.randint(2, (8,))
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            order = torch.randperm(8, generator=torch.Generator().manual_seed(self.passes))
            return iter([(self.x[rows], self.y[rows]) for rows in order.split(4)])

    objective = Objective(nn.Linear(3, 2).double(), "cross_entropy", Shuffled())
    with pytest.raises(DataError, match="same at every pass"):
        list(FactoredGradients(objective))


def test_bad_arguments():
    objective = made("linear")
    with pytest.raises(ArgumentError, match="kind"):
        FactoredGradients(objective, "true")
    with pytest.raises(ArgumentError, match="samples"):
        FactoredGradients(objective, "sampled", samples=0)
    with pytest.raises(ArgumentError, match="dense names"):
        FactoredGradients(objective, dense=["no"])
    other = Objective(
        nn.Linear(2, 1), lambda z, y: (z - y).abs().sum(1), (torch.ones(3, 2), torch.ones(3, 1))
    )
    with pytest.raises(StructureError, match="likelihood"):
        FactoredGradients(other, "exact")
