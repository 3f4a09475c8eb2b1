from __future__ import annotations

import math
import os

import pytest
import torch
from tests.influence.evaluation.trainers import X, measure, total, with_process

from woodbury.errors import ArgumentError, DataError, NonFiniteError, ShapeError
from woodbury.influence.evaluation import half_subsets, retrain

SUBSETS = [[0, 1], [2], [3, 4, 5], [11]]
WANT = torch.tensor([1.0, 2.0, 12.0, 11.0]).double()


class KilledError(Exception):
    pass


def test_values_are_those_of_every_subset_and_seed():
    found = retrain(total, measure, SUBSETS, seeds=[0, 2])
    want = WANT[:, None] + torch.tensor([0.0, 2000.0])
    assert torch.equal(found.values[:, :, 0], want.double())
    assert torch.equal(found.values[:, :, 1], 2 * want.double())
    assert torch.equal(found.means()[:, 0], WANT + 1000)
    want = torch.full((4,), 1000.0).double()  # the deviation of two numbers 2000 apart, over root 2
    torch.testing.assert_close(found.standard_errors()[:, 0], want)
    assert retrain(total, measure, SUBSETS).standard_errors().isnan().all()


def test_seeds_may_differ_between_subsets():
    found = retrain(total, measure, SUBSETS, seeds=[[0], [1], [2], [3]])
    assert torch.equal(found.values[:, 0, 0], WANT + 1000 * torch.arange(4))


def test_a_killed_run_goes_on_and_trains_nothing_twice(tmp_path):
    calls = []

    def train(rows, seed):
        if len(calls) == 3:
            raise KilledError
        calls.append(rows.tolist())
        return total(rows, seed)

    with pytest.raises(KilledError):
        retrain(train, measure, SUBSETS, seeds=[0, 1], folder=tmp_path)
    assert len(calls) == 3

    def rest(rows, seed):
        calls.append(rows.tolist())
        return total(rows, seed)

    resumed = retrain(rest, measure, SUBSETS, seeds=[0, 1], folder=tmp_path)
    assert len(calls) == 8
    assert torch.equal(resumed.values, retrain(total, measure, SUBSETS, seeds=[0, 1]).values)

    def never(rows, seed):
        raise AssertionError("all models are there")

    again = retrain(never, measure, SUBSETS, seeds=[0, 1], folder=tmp_path)
    assert torch.equal(again.values, resumed.values)


def test_a_folder_of_another_question_is_refused(tmp_path):
    retrain(total, measure, SUBSETS, folder=tmp_path, key="one")
    for change in (
        {"key": "two"},
        {"key": "one", "seeds": [5]},
    ):
        with pytest.raises(DataError, match="another run"):
            retrain(total, measure, SUBSETS, folder=tmp_path, **change)
    with pytest.raises(DataError, match="subsets"):
        retrain(total, measure, SUBSETS[:-1], folder=tmp_path, key="one")


def test_groups_are_trained_in_one_call():
    calls = []

    def many(subsets, seeds):
        calls.append(len(subsets))
        return [total(rows, seed) for rows, seed in zip(subsets, seeds, strict=True)]

    found = retrain(many, measure, SUBSETS, seeds=[0, 1], group=3)
    assert calls == [3, 3, 2]
    assert torch.equal(found.values, retrain(total, measure, SUBSETS, seeds=[0, 1]).values)
    with pytest.raises(ShapeError, match="1 models for 3"):
        retrain(lambda subsets, seeds: [0.0], measure, SUBSETS, group=3)


def test_shares_complete_each_other(tmp_path):
    one = retrain(total, measure, SUBSETS, folder=tmp_path, share=(0, 2))
    assert one.values[:, 0, 0].isnan().tolist() == [False, True, False, True]
    two = retrain(total, measure, SUBSETS, folder=tmp_path, share=(1, 2))
    assert torch.equal(two.values[:, 0, 0], WANT)


def test_functions_that_no_other_process_can_have_are_refused():
    with pytest.raises(ArgumentError, match=r"train cannot be sent to 2 processes .*no lambda"):
        retrain(lambda rows, seed: X[rows].sum(), measure, SUBSETS, processes=2)
    with pytest.raises(ArgumentError, match="measure cannot be sent"):
        retrain(total, lambda model: model, SUBSETS, processes=2)


def test_processes_give_the_same_values(tmp_path):
    found = retrain(total, measure, SUBSETS, seeds=[0, 1], folder=tmp_path, processes=2)
    assert torch.equal(found.values, retrain(total, measure, SUBSETS, seeds=[0, 1]).values)
    elsewhere = retrain(with_process, torch.clone, SUBSETS, processes=2)
    assert os.getpid() not in elsewhere.values[:, 0, 0].tolist()
    assert (elsewhere.values[:, 0, 1] == max(1, torch.get_num_threads() // 2)).all()


def test_progress_ends_at_one(tmp_path):
    seen = []
    for _ in range(2):  # also where everything is read
        retrain(total, measure, SUBSETS, folder=tmp_path, progress=lambda what, f: seen.append(f))
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_measurements_that_are_none_are_named():
    def bad(rows, seed):
        return math.nan if len(rows) == 3 else total(rows, seed)

    with pytest.raises(NonFiniteError, match="subset 2 with seed 7"):
        retrain(bad, measure, SUBSETS, seeds=[7])
    with pytest.raises(ShapeError, match=r"\[Q\]"):
        retrain(total, lambda model: torch.zeros(2, 2), SUBSETS)
    with pytest.raises(ShapeError, match=r"expected \[2\]"):
        retrain(lambda rows, seed: len(rows), lambda size: torch.zeros(3 - size), SUBSETS[1::-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subsets": []}, "no subsets"),
        ({"subsets": [[]]}, "subset 0"),
        ({"subsets": [[1], [-1]]}, "subset 1"),
        ({"subsets": [[[1]]]}, "subset 0"),
        ({"group": 0}, "group is 0"),
        ({"processes": 0}, "processes 0"),
        ({"share": (2, 2)}, "share"),
    ],
)
def test_arguments_are_checked_before_work(change, message):
    arguments = {"subsets": SUBSETS, **change}
    with pytest.raises(ArgumentError, match=message):
        retrain(None, None, **arguments)


def test_seeds_that_do_not_fit_are_refused():
    for seeds in ([], [[1], [2]], torch.zeros(4, 1, 1)):
        with pytest.raises(ShapeError, match=r"\[R\]"):
            retrain(None, None, SUBSETS, seeds=seeds)


def test_half_subsets_are_halves_without_repetition():
    one, two = half_subsets(11, 5), half_subsets(11, 5)
    for subset, again in zip(one, two, strict=True):
        assert len(subset) == 5
        assert torch.equal(subset, subset.unique())
        assert torch.equal(subset, again)
    assert len({tuple(subset.tolist()) for subset in one}) > 1
    assert len(half_subsets(11, 1, fraction=1.0)[0]) == 11
    for count, fraction, rows in [(0, 0.5, 9), (1, 0.0, 9), (1, 1.1, 9), (1, 0.5, 1)]:
        with pytest.raises(ArgumentError, match="subsets of"):
            half_subsets(rows, count, fraction=fraction)
    # Every row is in about half of many subsets.
    often = torch.zeros(len(X))
    for subset in half_subsets(len(X), 400):
        often[subset] += 1
    assert (often / 400 - 0.5).abs().max() < 0.1
