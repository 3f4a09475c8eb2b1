from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from woodbury.errors import ArgumentError, NonFiniteError, ShapeError
from woodbury.influence.evaluation import flip_labels, label_margin, mislabel_detection


@given(st.integers(0, 200), st.booleans())
def test_both_measures_are_those_of_scikit_learn_with_ties(seed, ties):
    generator = torch.Generator().manual_seed(seed)
    suspicion = torch.randn(15, generator=generator).double()
    if ties:
        suspicion = suspicion.round()
    wrong = torch.rand(15, generator=generator) < 0.4
    wrong[0], wrong[1] = True, False
    found = mislabel_detection(suspicion, wrong, resamples=2)
    want = average_precision_score(wrong, suspicion)
    assert found.average_precision.value == pytest.approx(want, abs=1e-12)
    assert found.auroc.value == pytest.approx(roc_auc_score(wrong, suspicion), abs=1e-12)


def test_a_perfect_ranking_and_its_reverse():
    wrong = torch.arange(20) < 5
    perfect = mislabel_detection(wrong.double(), wrong, resamples=50)
    assert perfect.average_precision.value == perfect.auroc.value == 1.0
    assert perfect.average_precision.low == 1.0
    assert perfect.found[4] == 1.0
    assert mislabel_detection(-wrong.double(), wrong, resamples=2).auroc.value == 0.0
    constant = mislabel_detection(torch.zeros(20), wrong, resamples=2)
    assert constant.auroc.value == 0.5
    assert constant.average_precision.value == 0.25


def test_the_interval_is_wider_with_fewer_rows():
    widths = []
    for count in (40, 4000):
        generator = torch.Generator().manual_seed(0)
        wrong = torch.rand(count, generator=generator) < 0.3
        suspicion = wrong + torch.randn(count, generator=generator)
        auroc = mislabel_detection(suspicion, wrong, resamples=100).auroc
        assert auroc.low < 0.76 < auroc.high  # two normals one apart: 0.76
        widths.append(auroc.high - auroc.low)
    assert widths[1] < widths[0] / 4


def test_flipped_labels_are_others_and_counted():
    labels = torch.arange(200) % 4
    noisy, wrong = flip_labels(labels, 0.25)
    assert int(wrong.sum()) == 50
    assert torch.equal(noisy != labels, wrong)
    assert set(noisy.tolist()) == {0, 1, 2, 3}
    again, _ = flip_labels(labels, 0.25)
    assert torch.equal(noisy, again)
    same, none = flip_labels(labels, 0.0)
    assert torch.equal(same, labels)
    assert not none.any()


def test_what_cannot_be_measured_is_refused():
    wrong = torch.tensor([True, False])
    with pytest.raises(ShapeError, match="booleans"):
        mislabel_detection(torch.zeros(3), wrong)
    with pytest.raises(ShapeError, match="booleans"):
        mislabel_detection(torch.zeros(2), wrong.long())
    with pytest.raises(NonFiniteError, match="1 rows"):
        mislabel_detection(torch.tensor([math.nan, 0.0]), wrong)
    for none in (torch.zeros(2).bool(), torch.ones(2).bool()):
        with pytest.raises(ArgumentError, match="nothing to find"):
            mislabel_detection(torch.zeros(2), none)
    with pytest.raises(ShapeError, match="class numbers"):
        flip_labels(torch.zeros(3))
    for share, classes in [(1.5, 3), (-0.1, 3), (0.5, 1)]:
        with pytest.raises(ArgumentError, match="share"):
            flip_labels(torch.zeros(3).long(), share, classes=classes)
    with pytest.raises(ArgumentError, match="classes"):
        flip_labels(torch.zeros(0).long())


def test_the_margin_is_that_of_mean_probabilities():
    logits = 3 * torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 4
    found = label_margin(logits, labels)
    for i in range(8):
        p = [sum(float(m[i].double().softmax(0)[c]) for m in logits) / 3 for c in range(4)]
        own = p.pop(int(labels[i]))
        assert found[i] == pytest.approx(math.log(max(p)) - math.log(own), abs=1e-10)
    assert found.dtype == torch.float64
    torch.testing.assert_close(label_margin(logits[1], labels), label_margin(logits[1:2], labels))


def test_of_one_model_it_is_a_difference_of_logits_however_large():
    logits = torch.tensor([[0.0, 1.5, 1.0], [1e4, 0.0, 2e4], [2.0, 2.0, -9.0]])
    found = label_margin(logits, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(found, torch.tensor([1.5, 2e4, 0.0]).double())


@pytest.mark.parametrize(
    ("logits", "labels", "error", "match"),
    [
        (torch.zeros(3), torch.zeros(3).long(), ShapeError, r"\(3,\)"),
        (torch.zeros(3, 1), torch.zeros(3).long(), ShapeError, "2 classes"),
        (torch.zeros(3, 2), torch.zeros(4).long(), ShapeError, r"\(4,\)"),
        (torch.zeros(3, 2), torch.zeros(3), ShapeError, "float32"),
        (torch.zeros(3, 2), torch.full((3,), 2), ShapeError, "from 2 to 2.*2 classes"),
        (torch.zeros(3, 2), torch.full((3,), -1), ShapeError, "from -1"),
        (torch.full((3, 2), torch.nan), torch.zeros(3).long(), NonFiniteError, "NaN"),
    ],
)
def test_margins_of_what_does_not_fit_are_refused(logits, labels, error, match):
    with pytest.raises(error, match=match):
        label_margin(logits, labels)
