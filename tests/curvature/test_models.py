"""Architectures: every matrix against a dense reference of the model on all data at once."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tests.curvature.reference import (
    apart,
    at,
    dense_gauss_newton,
    dense_hessian,
    dense_jacobian,
    flat_parameters,
)
from torch import nn

from woodbury import Fisher, GaussNewton, Hessian, Jacobian, Objective

F64 = torch.float64


class Convolutional(nn.Module):
    """Grouped, strided and dilated convolutions, group norm, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            nn.Conv2d(4, 2, 2, stride=2, dilation=2, bias=False),
            nn.Flatten(),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        return self.layers(x)


class Text(nn.Module):
    """An embedding whose weights are the output layer's, and attention with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        hidden = self.encoder(self.embedding(tokens), src_key_padding_mask=tokens == 0)
        return self.out(hidden).mT


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Cube(torch.autograd.Function):
    """Has neither a forward-mode derivative nor a rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(Cube.apply(self.first(x)))


class Reused(nn.Module):
    """One layer applied twice, wide enough for signals, and a parameter used outside of layers."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4)) if scaled else None

    def forward(self, x):
        x = torch.tanh(self.inner(torch.tanh(self.inner(x))))
        return self.head(x if self.scale is None else x * self.scale)


def normalized() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3))


CASES = {
    "convolutional": (Convolutional, lambda n: torch.randn(n, 2, 6, 6)),
    "text": (Text, lambda n: torch.randint(0, 5, (n, 3)).index_fill(1, torch.tensor([0]), 1)),
    "recurrent": (Recurrent, lambda n: torch.randn(n, 3, 2)),
    "custom function": (Custom, lambda n: torch.randn(n, 3)),
    "reused layer": (lambda: Reused(scaled=False), lambda n: torch.randn(n, 4)),
    "reused layer and scale": (lambda: Reused(scaled=True), lambda n: torch.randn(n, 4)),
    "weight norm": (normalized, lambda n: torch.randn(n, 3)),
}


def setting(name: str, rows: int = 6):
    make, draw = CASES[name]
    model = make().double().eval()
    x = draw(rows)
    x = x.double() if x.is_floating_point() else x
    z = model(x)
    y = torch.randint(0, z.shape[1], (rows, *z.shape[2:]))
    if z.dim() > 2:
        y[0, 1:] = -100
    names = list(dict(model.named_parameters()))
    data = [(x[:2], y[:2]), (x[2:], y[2:])]
    return model, data, x, y, names, flat_parameters(model)


def losses(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Per example, the mean over its counted elements."""
    each = F.cross_entropy(z, y, reduction="none")
    if each.dim() == 1:
        return each
    return each.sum(1) / (y != -100).sum(1)


def gradient(model, x, y, flat: torch.Tensor) -> torch.Tensor:
    flat = flat.clone().requires_grad_()
    return torch.autograd.grad(losses(at(model, flat, x), y).mean(), flat)[0]


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
@pytest.mark.parametrize("name", CASES)
class TestArchitectures:
    @pytest.mark.parametrize("cache", ["auto", 0])
    def test_hessian(self, name: str, cache) -> None:
        model, data, x, y, _, flat = setting(name)
        objective = Objective(model, "cross_entropy", data)
        # By differences of gradients: torch's own second derivatives may be wrong, and one is.
        V, eps = torch.randn(len(flat), 2, dtype=F64), 1e-5
        up, down = (
            torch.stack([gradient(model, x, y, flat + s * eps * v) for v in V.T], dim=1)
            for s in (1, -1)
        )
        M = (up - down) / (2 * eps)
        H = Hessian(objective, cache=cache)
        assert apart(H @ V, M) < 1e-7
        assert apart(H @ V[:, 0], M[:, 0]) < 1e-7

    @pytest.mark.parametrize("cache", ["auto", 0])
    def test_gauss_newton_and_jacobian(self, name: str, cache) -> None:
        model, data, x, y, _, flat = setting(name)
        objective = Objective(model, "cross_entropy", data)
        M = dense_gauss_newton(lambda t: at(model, t, x), lambda z: losses(z, y).mean(), flat)
        V = torch.randn(len(flat), 2, dtype=F64)
        G = GaussNewton(objective, cache=cache)
        assert apart(G @ V, M @ V) < 1e-10
        assert apart(G @ V[:, 0], M @ V[:, 0]) < 1e-10
        J, K = Jacobian(objective, cache=cache), dense_jacobian(lambda t: at(model, t, x), flat)
        U = torch.randn(len(K), 2, dtype=F64)
        assert apart(J @ V, K @ V) < 1e-10
        assert apart(J.T @ U, K.T @ U) < 1e-10

    @pytest.mark.parametrize("cache", ["auto", 0])
    def test_empirical_fisher_and_gradients(self, name: str, cache) -> None:
        model, data, x, y, _, flat = setting(name)
        objective = Objective(model, "cross_entropy", data)
        K = dense_jacobian(lambda t: losses(at(model, t, x), y), flat)
        V = torch.randn(len(flat), 2, dtype=F64)
        E = Fisher(objective, "empirical", cache=cache)
        assert apart(E @ V, K.T @ (K @ V) / len(x)) < 1e-10
        assert apart(E @ V[:, 0], K.T @ (K @ V[:, 0]) / len(x)) < 1e-10
        gradients = torch.cat([g for _, g in objective.per_example_gradients()])
        assert apart(gradients, K) < 1e-10


class TestForms:
    """What data and outputs may look like: the same matrix each time."""

    def reference(self):
        torch.manual_seed(1)
        model = nn.Linear(3, 4).double()
        x, y = torch.randn(5, 2, 3, dtype=F64), torch.randint(0, 4, (5, 2))
        y[1, 1] = -100

        def loss(t: torch.Tensor) -> torch.Tensor:
            return losses(at(model, t, x).mT, y).mean()

        return model, x, y, dense_hessian(loss, flat_parameters(model))

    @pytest.mark.parametrize("returns", ["object", "mapping", "transposed", "tuple"])
    @pytest.mark.parametrize("batches", ["dict", "UserDict", "tuple"])
    def test_token_classification(self, returns: str, batches: str) -> None:
        inner, x, y, M = self.reference()

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, input_ids, attention_mask=None):
                assert (attention_mask is None) == (batches == "tuple")
                z = self.inner(input_ids)
                return {
                    "object": SimpleNamespace(logits=z, hidden=None),
                    "mapping": {"logits": z},
                    "transposed": z.mT,
                    "tuple": (z.mT, None),
                }[returns]

        def batch(rows: slice):
            parts = {"input_ids": x[rows], "attention_mask": y[rows] >= 0, "labels": y[rows]}
            if batches == "tuple":
                return x[rows], y[rows]
            return parts if batches == "dict" else UserDict(parts)

        objective = Objective(Model(), "cross_entropy", [batch(slice(0, 1)), batch(slice(1, 5))])
        assert apart(Hessian(objective).to_dense(), M) < 1e-12
        assert apart(GaussNewton(objective).to_dense(), M) < 1e-12
        assert apart(GaussNewton(objective, cache=0).to_dense(), M) < 1e-12

    def test_logits_with_as_many_tokens_as_classes(self) -> None:
        """Classes are on the last axis of ``logits``, even where axis 1 would fit."""

        class Model(nn.Linear):
            def forward(self, x):
                return SimpleNamespace(logits=super().forward(x))

        model = Model(3, 2).double()
        x, y = torch.randn(5, 2, 3, dtype=F64), torch.randint(0, 2, (5, 2))
        objective = Objective(model, "cross_entropy", (x, y))
        z = x @ model.weight.detach().T + model.bias.detach()
        expected = F.cross_entropy(z.reshape(-1, 2), y.reshape(-1))
        assert apart(objective.value(), expected) < 1e-13

    def test_several_inputs(self) -> None:
        model = nn.Bilinear(2, 3, 2).double()
        a, b = torch.randn(4, 2, dtype=F64), torch.randn(4, 3, dtype=F64)
        y = torch.randint(0, 2, (4,))
        M = dense_hessian(lambda t: F.cross_entropy(at(model, t, a, b), y), flat_parameters(model))
        for data in (((a, b), y), ({"input1": a, "input2": b}, y)):
            assert apart(Hessian(Objective(model, "cross_entropy", [data])).to_dense(), M) < 1e-12

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
        x, y = torch.randn(6, 3, dtype=dtype), torch.randint(0, 2, (6,))
        objective = Objective(model, "cross_entropy", (x, y), l2=0.1)
        v = torch.randn(26).to(dtype)
        for kind in (Hessian, GaussNewton, lambda o, **k: Fisher(o, "empirical", **k)):
            products = [kind(objective, cache=cache) @ v for cache in ("auto", 0)]
            wide = Objective(model.double(), "cross_entropy", (x.double(), y), l2=0.1)
            truth = kind(wide) @ v.double()
            model.to(dtype)
            for product in products:
                assert product.dtype == dtype
                assert apart(product.double(), truth) < 0.1
