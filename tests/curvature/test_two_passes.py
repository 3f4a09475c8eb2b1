"""What the second pass of a fit takes over from the first does not change the fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from woodbury.curvature import EKFAC, KFAC, Objective
from woodbury.curvature.memory import storage_bytes
from woodbury.curvature.two_passes import TwoPasses, _tensors
from woodbury.errors import ArgumentError

CLASSES, LENGTH = 5, 6


class Attention(nn.Module):
    """Queries, keys and values of the same inputs, tokens looked up, an output for each token."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(7, 4)
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, CLASSES)
        self.calls = 0

    def forward(self, index):
        self.calls += 1
        x = self.token(index)
        mixed = (self.q(x) @ self.k(x).mT / 2).softmax(-1) @ self.v(x)
        return self.head(self.norm(mixed)).transpose(1, 2)


def problem(dtype=torch.float64, batches=4, data=None):
    torch.manual_seed(0)
    model = Attention().to(dtype)
    x, y = torch.randint(7, (12, LENGTH)), torch.randint(CLASSES, (12, LENGTH))
    rows = 12 // batches
    data = list(zip(x.split(rows), y.split(rows), strict=True)) if data is None else data(x, y)
    return model, Objective(model, "cross_entropy", data)


def fit(cache, kind, dtype=torch.float64, **settings):
    model, objective = problem(dtype, **settings)
    generator = torch.Generator().manual_seed(3)
    return EKFAC(objective, kind, generator=generator, cache=cache), model


def values(E):
    return {name: block.values for name, block in E.blocks.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["empirical", "sampled", "exact"])
@pytest.mark.parametrize("cache", ["auto", 6_000, 100_000])
def test_the_fit_is_the_same_whatever_is_kept(cache, kind, dtype):
    kept, streamed = (values(fit(each, kind, dtype)[0]) for each in (cache, "off"))
    assert kept.keys() == streamed.keys()
    for name, own in kept.items():
        assert own.abs().sum() > 0
        torch.testing.assert_close(own, streamed[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["empirical", "sampled", "exact"])
def test_what_is_kept_is_not_computed_again(kind):
    calls = {cache: fit(cache, kind)[1].calls for cache in ("auto", "off")}
    assert calls["off"] - calls["auto"] == 4  # one forward pass less for every batch


@pytest.mark.parametrize("kind", ["empirical", "sampled", "exact"])
@pytest.mark.parametrize("budget", [0, 1, 4_000, 20_000, 2**30])
def test_no_more_is_kept_than_allowed(kind, budget):
    _, objective = problem()
    passes = TwoPasses(objective, kind, 1, (1, 2), (), budget)
    for _ in passes.factors(0, (0, 1)):
        kept = [each.found for found in passes._kept.values() for each in found]
        assert sum(storage_bytes(_tensors(found)) for found in kept) <= budget
    assert len(passes._kept) == 4 if budget == 2**30 else len(passes._kept) < 4
    columns = CLASSES * LENGTH if kind == "exact" else 1
    assert sum(1 for _ in passes.corrections(0, (0, 1))) == 4 * columns
    assert not passes._kept  # given back as it is used


def test_a_first_pass_that_began_later_and_one_of_several_processes():
    _, objective = problem()
    everything = TwoPasses(objective, "sampled", 2, (1, 2), (), None)
    expected = {(b.index, b.column): b.blocks["q"].grads for b in everything.corrections(0, (0, 1))}
    later = TwoPasses(objective, "sampled", 2, (1, 2), (), "auto")
    assert [b.index for b in later.factors(2, (0, 1))] == [2, 2, 3, 3]
    found = {(b.index, b.column): b.blocks["q"].grads for b in later.corrections(0, (0, 1))}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], grads) for key, grads in expected.items())
    second = TwoPasses(objective, "sampled", 2, (1, 2), (), "auto")
    assert [b.index for b in second.factors(0, (1, 2))] == [1, 1, 3, 3]
    assert [b.index for b in second.corrections(0, (1, 2))] == [1, 1, 3, 3]


class Reused:
    """A loader that gives every batch in the same memory."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return 4

    def __iter__(self):
        x, y = torch.empty_like(self.x[:3]), torch.empty_like(self.y[:3])
        for start in range(0, 12, 3):
            # as a loader does that fills an array: torch does not see it
            x.numpy()[:] = self.x[start : start + 3].numpy()
            y.numpy()[:] = self.y[start : start + 3].numpy()
            yield x, y


def test_a_loader_may_write_over_its_batches():
    kept, plain = (values(fit("auto", "empirical", data=data)[0]) for data in (Reused, None))
    for name, own in kept.items():
        torch.testing.assert_close(own, plain[name], rtol=0, atol=0)


def test_a_model_may_write_over_its_inputs():
    place = torch.zeros(3, 4, dtype=torch.float64)

    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2, bias=False)

        def forward(self, x):
            here = place[: len(x)]
            here.copy_(x)
            return self.layer(here)

    torch.manual_seed(0)
    x, y = torch.randn(12, 4).double(), torch.randn(12, 2).double()
    objective = Objective(Writing().double(), "mse", list(zip(x.split(3), y.split(3), strict=True)))
    kept, plain = (values(EKFAC(objective, "empirical", cache=each)) for each in ("auto", "off"))
    for name, own in kept.items():
        torch.testing.assert_close(own, plain[name], rtol=0, atol=0)


def test_layers_with_the_same_inputs_share_them():
    _, objective = problem()
    found = next(iter(TwoPasses(objective, "empirical", 1, (0, 0), (), None).factors(0, (0, 1))))
    q, k, v = (found.blocks[name].inputs for name in "qkv")
    assert q is k
    assert q is v
    assert torch.equal(q[..., -1], torch.ones(3, LENGTH).double())


@pytest.mark.parametrize("method", [KFAC, EKFAC])
@pytest.mark.parametrize("cache", [-1, 1.5, True, "much"])
def test_a_budget_that_is_none(method, cache):
    _, objective = problem()
    with pytest.raises(ArgumentError, match=r"cache is .*; give 'auto', a number of bytes"):
        method(objective, cache=cache)
