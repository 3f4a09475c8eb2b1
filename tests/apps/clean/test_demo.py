from __future__ import annotations

import numpy as np
import pytest

from woodbury.apps.clean.demo import demo_table
from woodbury.errors import DataError


def test_digits_are_flipped_with_the_seed() -> None:
    frame, label, truth = demo_table("digits", seed=1)
    assert frame.shape == (1797, 65)
    wrong = frame[label].to_numpy() != truth
    assert wrong.sum() == round(0.2 * 1797)
    # Uniform: no pair of classes takes more than its chance would make likely.
    pairs = np.zeros((10, 10))
    np.add.at(pairs, (truth[wrong], frame[label].to_numpy()[wrong]), 1)
    assert np.diag(pairs).sum() == 0
    assert pairs.max() < 16
    same = demo_table("digits", seed=1)[0]
    assert same.equals(frame)
    assert not demo_table("digits", seed=2)[0].equals(frame)


def test_unknown_demo() -> None:
    with pytest.raises(DataError, match="no demonstration 'cats'. There is: digits"):
        demo_table("cats", seed=0)
