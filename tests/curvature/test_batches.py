from __future__ import annotations

import functools
import operator
import random
from collections import UserDict

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from woodbury.curvature.batches import Batches, batch_size, is_ordered, normalize, split
from woodbury.errors import DataError

CPU = torch.device("cpu")


def rows(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(2.0 * n).view(n, 2), torch.arange(n)


def sizes(data) -> list[int]:
    return [batch_size(batch) for batch in normalize(data)]


def test_forms_of_data() -> None:
    x, y = rows(5)
    assert sizes((x, y)) == [5]
    assert sizes(x) == [5]
    assert sizes({"input_ids": x, "labels": y}) == [5]
    assert sizes(UserDict(input_ids=x, labels=y)) == [5]
    assert sizes(({"a": x}, y)) == [5]
    assert sizes([(x, y), (x[:2], y[:2])]) == [5, 2]
    assert sizes([[x, y], [x[:2], y[:2]]]) == [5, 2]
    assert sizes(((x, y), (x[:2], y[:2]))) == [5, 2]
    assert sizes(TensorDataset(x, y)) == [5]
    assert sizes(DataLoader(TensorDataset(x, y), batch_size=2)) == [2, 2, 1]


def test_an_iterable_is_iterated_again_and_again() -> None:
    class Source:
        def __iter__(self):
            return iter([rows(3), rows(2)])

    data = normalize(Source())
    assert sizes(data) == sizes(data) == [3, 2]


def test_a_generator_is_refused() -> None:
    with pytest.raises(DataError, match=r"list\(data\)"):
        normalize(batch for batch in [rows(3)])
    with pytest.raises(DataError, match="int"):
        normalize(3)


def test_a_data_set_of_single_examples_is_refused() -> None:
    class Single(Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int):
            return torch.ones(2), 1

    with pytest.raises(DataError, match="DataLoader"):
        normalize(Single())


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((1, 2), ((1,), {}, 2)),
        ([1, 2, 3], ((1,), {}, 2)),
        (((1, 4), 2), ((1, 4), {}, 2)),
        (({"a": 1}, 2), ((), {"a": 1}, 2)),
        ({"a": 1, "labels": 2}, ((), {"a": 1}, 2)),
        ({"a": 1, "y": 2, "indices": 3}, ((), {"a": 1}, 2)),
    ],
)
def test_split(batch, expected) -> None:
    assert split(batch) == expected


@pytest.mark.parametrize("batch", [torch.ones(3), (1,), (1, 2, 3, 4)])
def test_split_refuses_other_forms(batch) -> None:
    with pytest.raises(DataError, match="Objective.functional"):
        split(batch)


def test_split_names_the_keys_it_saw() -> None:
    with pytest.raises(DataError, match=r"\['a', 'b'\].*labels"):
        split({"b": 1, "a": 2})


def test_rows_of_unequal_batches() -> None:
    x, y = rows(7)
    batches = Batches([(x[:3], y[:3]), (x[3:4], y[3:4]), (x[4:], y[4:])], CPU, paired=True)
    weights = torch.arange(7.0)
    seen = [batch.select(weights).tolist() for batch in batches.passes("test")]
    assert seen == [[0, 1, 2], [3], [4, 5, 6]]
    assert batches.num_examples == 7
    assert [batch.index for batch in batches.passes("test", start=1)] == [1, 2]
    assert [batch.rows for batch in batches.passes("test", start=2)] == [slice(4, 7)]


@pytest.mark.parametrize("as_mapping", [True, False])
def test_rows_by_indices(as_mapping: bool) -> None:
    x, y = rows(4)
    order = torch.tensor([2, 0, 3, 1])
    batch = {"x": x, "y": y, "indices": order} if as_mapping else (x, y, order)
    batches = Batches([batch], CPU, paired=True)
    assert next(batches.passes("test")).select(torch.arange(4.0)).tolist() == [2, 0, 3, 1]


def test_an_unpaired_batch_may_have_any_form() -> None:
    x, y = rows(4)
    batches = Batches([(x, y, torch.tensor([7, 7]))], CPU)
    assert next(batches.passes("test")).rows == slice(0, 4)


def test_order_of_loaders() -> None:
    data = TensorDataset(*rows(6))
    assert is_ordered(DataLoader(data, batch_size=2))
    assert not is_ordered(DataLoader(data, batch_size=2, shuffle=True))
    assert not is_ordered(DataLoader(data, batch_size=None, shuffle=True))
    assert is_ordered([rows(3)])


def test_a_shuffling_loader_is_replayed_and_draws_from_nobody() -> None:
    for generator in (None, torch.Generator().manual_seed(5)):
        loader = DataLoader(
            TensorDataset(*rows(20)), batch_size=3, shuffle=True, generator=generator
        )
        batches = Batches(loader, CPU, paired=True)
        before = torch.get_rng_state()
        own = None if generator is None else generator.get_state()
        first = [batch.data[1].tolist() for batch in batches.passes("test")]
        second = [batch.data[1].tolist() for batch in batches.passes("test")]
        assert first == second
        assert sorted(functools.reduce(operator.iadd, first, [])) == list(range(20))
        assert functools.reduce(operator.iadd, first, []) != list(range(20))
        assert torch.equal(torch.get_rng_state(), before)
        if generator is not None:
            assert torch.equal(generator.get_state(), own)


def test_random_augmentations_by_torch_are_replayed() -> None:
    class Noisy(Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int):
            return torch.randn(2), i

    batches = Batches(DataLoader(Noisy(), batch_size=4), CPU, paired=True)
    first = [batch.data[0] for batch in batches.passes("test")]
    torch.randn(3)  # what others draw in between does not matter
    second = [batch.data[0] for batch in batches.passes("test")]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_data_that_changes_is_noticed() -> None:
    class Changing(IterableDataset):
        def __iter__(self):
            yield from [(torch.tensor([random.random()]), 0) for _ in range(4)]

    batches = Batches(DataLoader(Changing(), batch_size=2), CPU, paired=True)
    list(batches.passes("test"))
    with pytest.raises(DataError, match="batch 0 is not what it was"):
        list(batches.passes("test"))


def test_a_shorter_pass_is_noticed() -> None:
    class Shrinking:
        count = 3

        def __iter__(self):
            self.count -= 1
            return iter([rows(2)] * (self.count + 1))

    batches = Batches(Shrinking(), CPU, paired=True)
    list(batches.passes("test"))
    with pytest.raises(DataError, match="gave 2 batches, an earlier one 3"):
        list(batches.passes("test"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch"),
        ([(torch.ones(0, 2), torch.ones(0))], "batch 0 has no rows"),
        ([(torch.ones(2, 2), torch.ones(2)), (torch.ones(3, 2), torch.ones(2))], "batch 1 has 3"),
        ([("a", "b")], "batch 0: .* no tensor"),
    ],
)
def test_unusable_batches(data, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(Batches(data, CPU, paired=True).passes("test"))


def test_progress() -> None:
    calls = []
    batches = Batches([rows(2), rows(3)], CPU, lambda *args: calls.append(args), paired=True)
    list(batches.passes("gradient"))
    assert calls == [("gradient", 1, 2), ("gradient", 2, 2)]
    calls.clear()
    loader = Batches(
        DataLoader(TensorDataset(*rows(3)), batch_size=2), CPU, lambda *args: calls.append(args)
    )
    list(loader.passes("gradient"))
    list(loader.passes("again"))
    assert calls == [("gradient", 1, None), ("gradient", 2, None), ("again", 1, 2), ("again", 2, 2)]


def test_what_stays_in_memory_anyway() -> None:
    data = rows(3)
    assert next(Batches([data], CPU, paired=True).passes("test")).resident
    loader = DataLoader(TensorDataset(*data), batch_size=3)
    assert not next(Batches(loader, CPU, paired=True).passes("test")).resident
