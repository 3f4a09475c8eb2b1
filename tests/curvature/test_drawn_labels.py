"""Sampled labels belong to rows: no cut of the data into batches or processes changes a matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from woodbury import EKFAC, KFAC, Fisher, GradientWindow, Objective
from woodbury.curvature import FactoredGradients, block_curvature, diagonal_curvature

F64 = torch.float64
N = 23


class Tokens(nn.Module):
    """Classes of every token, on the last axis, with a loss that leaves padding out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 5)

    def forward(self, tokens):
        return {"logits": self.head(torch.tanh(self.table(tokens)))}


def rows(*shape):
    return torch.randn(N, *shape, dtype=F64)


CASES = {
    "classes": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        "cross_entropy",
        lambda: (rows(4), torch.randint(3, (N,))),
    ),
    "regression": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)),
        "mse",
        lambda: (rows(4), rows(2)),
    ),
    "binary": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Tanh(), nn.Linear(9, 2)),
        nn.BCEWithLogitsLoss(),
        lambda: (rows(2, 4), torch.randint(2, (N, 2)).to(F64)),
    ),
    "tokens": (
        Tokens,
        "cross_entropy",
        lambda: (torch.randint(7, (N, 6)), torch.randint(5, (N, 6))),
    ),
}


def case(name: str):
    """A function from batches to objectives, and the data."""
    torch.manual_seed(0)
    make_model, criterion, data = CASES[name]
    model = make_model().double()
    weights = torch.rand(N, dtype=F64) + 0.5
    return lambda batches: Objective(model, criterion, batches, weights=weights), data()


def cut(x, y, size: int):
    return list(zip(x.split(size), y.split(size), strict=True))


def shuffled(x, y, sizes):
    """Batches of several sizes in a random order that carry the numbers of their rows."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(8))
    return [(x[part], y[part], part) for part in order.split(sizes)]


def cuts(x, y):
    return {
        "1": cut(x, y, 1),
        "7": cut(x, y, 7),
        "shuffled": shuffled(x, y, [5, 1, 10, 7]),
    }


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("method", [KFAC, EKFAC])
@pytest.mark.parametrize("name", CASES)
def test_a_fit_does_not_depend_on_the_batches(name, method):
    make, (x, y) = case(name)
    wanted = method(make((x, y)), samples=2, generator=generator())
    other = method(make((x, y)), samples=2, generator=torch.Generator().manual_seed(2))
    assert (other.to_dense() - wanted.to_dense()).norm() > 0.01 * wanted.to_dense().norm()
    for what, batches in cuts(x, y).items():
        mine = method(make(batches), samples=2, generator=generator())
        for block, operator in wanted.blocks.items():
            values, found = operator.values, mine.blocks[block].values
            assert (found - values).abs().max() <= 1e-12 * values.abs().max(), (what, block)
            dense = operator.to_dense()
            gap = (mine.blocks[block].to_dense() - dense).norm()
            assert gap <= 1e-12 * dense.norm(), (what, block)


@pytest.mark.parametrize("name", CASES)
def test_other_matrices_of_sampled_labels_do_not_depend_on_the_batches(name):
    make, (x, y) = case(name)
    matrices = {
        "fisher": lambda o: Fisher(o, "sampled", samples=2, generator=generator()).to_dense(),
        "diagonal": lambda o: (
            diagonal_curvature(
                o, "fisher", method="sampled", samples=2, generator=generator()
            ).values
        ),
        "blocks": lambda o: block_curvature(
            o, "fisher", method="sampled", samples=2, generator=generator()
        ).to_dense(),
        "window": lambda o: GradientWindow.from_objective(
            o, 0.1, rows="sampled", samples=2, generator=generator()
        ).to_dense(),
    }
    for what, matrix in matrices.items():
        wanted = matrix(make((x, y)))
        for how, batches in cuts(x, y).items():
            mine = matrix(make(batches))
            assert (mine - wanted).norm() <= 1e-12 * wanted.norm(), (what, how)


def test_the_kinds_of_matrices_draw_the_same_labels():
    """One seed, one label for each row: gradients of all of them agree."""
    make, (x, y) = case("classes")
    objective = make((x, y))
    blocks = block_curvature(
        objective, "fisher", method="sampled", blocks=[list(objective.space.shapes)]
    ).to_dense()
    seed = torch.Generator().manual_seed(0)  # what is taken without a generator
    F = Fisher(objective, "sampled", generator=seed).to_dense()
    total = torch.zeros_like(F)
    seed.manual_seed(0)
    for batch in FactoredGradients(objective, "sampled", generator=seed):
        G = torch.zeros(batch.size, objective.space.dim, dtype=F64)
        for gradients in batch.blocks.values():
            places = gradients.block.positions(objective.space)
            G[:, places] = gradients.dense().flatten(1)
        total += G.T @ (batch.weights[:, None] * G) / N
    assert torch.allclose(total, F, atol=1e-13)
    assert torch.allclose(blocks, F, atol=1e-13)


def test_part_of_the_data_has_the_labels_of_its_rows():
    """Objectives on some rows that carry their numbers add up to that on all of them."""
    make, (x, y) = case("classes")
    whole = make((x, y)).with_weights(None)
    wanted = Fisher(whole, "sampled", generator=generator()).to_dense()
    numbers = torch.arange(N)
    total = torch.zeros_like(wanted)
    for part in (numbers[::2], numbers[1::2]):
        some = whole.with_data([(x[part], y[part], part)])
        total += len(part) / N * Fisher(some, "sampled", generator=generator()).to_dense()
    assert torch.allclose(total, wanted, atol=1e-14)
    plain = whole.with_data([(x[1::2], y[1::2])])  # rows 0, 1, ... of data of their own
    other = Fisher(plain, "sampled", generator=generator()).to_dense()
    some = whole.with_data([(x[1::2], y[1::2], numbers[1::2])])
    assert not torch.allclose(other, Fisher(some, "sampled", generator=generator()).to_dense())


@pytest.mark.parametrize("method", [KFAC, EKFAC])
def test_padding_changes_no_label(method):
    """Batches padded to their own longest sequence, and all padded to one length."""
    make, (x, y) = case("tokens")
    lengths = torch.randint(1, 7, (N,))
    lengths[3] = 6
    y = y.masked_fill(torch.arange(6) >= lengths[:, None], -100)
    long = torch.nn.functional.pad(x, (0, 3)), torch.nn.functional.pad(y, (0, 3), value=-100)
    wanted = method(make(long), generator=generator()).to_dense()
    short = []
    for part in torch.arange(N).split(5):
        longest = int(lengths[part].max())
        short.append((x[part, :longest], y[part, :longest]))
    assert len({batch[0].shape[1] for batch in short}) > 1
    mine = method(make(short), generator=generator()).to_dense()
    assert (mine - wanted).norm() <= 1e-12 * wanted.norm()


def test_signals_padded_to_another_length_keep_the_labels_of_their_places():
    """Squared error at every place of a signal, channels first: one axis for channels and time."""
    model = nn.Conv1d(2, 3, 1).double()
    x, y = rows(2, 6), rows(3, 6)
    whole = Objective(model, nn.MSELoss(reduction="sum"), (x, y))
    short = Objective(model, nn.MSELoss(reduction="sum"), (x[..., :4], y[..., :4]))
    first, second = (
        next(iter(batch.blocks.values())).grads
        for o in (whole, short)
        for batch in FactoredGradients(o, "sampled", generator=generator())
    )
    assert first.shape == (N, 6, 3)
    assert torch.equal(first[:, :4], second)


def _process(rank: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name in CASES:
        make, (x, y) = case(name)
        K = EKFAC(make(cut(x, y, 3)), group=dist.group.WORLD, generator=generator())
        torch.save(K.to_dense(), f"{folder}/{name}{rank}.pt")
    dist.destroy_process_group()


def test_processes_draw_the_labels_of_one(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    for name in CASES:
        make, data = case(name)
        wanted = EKFAC(make(data), generator=generator()).to_dense()
        for rank in range(2):
            mine = torch.load(tmp_path / f"{name}{rank}.pt")
            assert (mine - wanted).norm() <= 1e-12 * wanted.norm()
