from __future__ import annotations

import numpy as np
import pytest

from woodbury.apps.clean.metrics import calibration, score


def test_perfect_and_reversed_rankings() -> None:
    truth = np.array(["a", "b", "a", "b"])
    given = np.array(["a", "b", "b", "b"])
    perfect = score(np.array([0.1, 0.2, 0.9, 0.1]), truth, truth, given)
    assert perfect["average_precision"] == perfect["auc"] == 1
    assert perfect["precision"] == perfect["recall"] == perfect["corrected"] == 1
    assert perfect["wrong_labels"] == 1
    reversed_ = score(np.array([0.9, 0.8, 0.1, 0.9]), given, truth, given)
    assert reversed_["auc"] == 0
    assert reversed_["average_precision"] == 0.25
    assert reversed_["precision"] == reversed_["recall"] == reversed_["corrected"] == 0


def test_calibration_of_honest_and_boasting_probabilities() -> None:
    generator = np.random.default_rng(0)
    stated = generator.random(200_000)
    wrong = generator.random(200_000) < stated
    error, table = calibration(stated, wrong)
    assert error < 0.01
    assert sum(item["rows"] for item in table) == 200_000
    assert calibration(np.full(10, 0.9), np.zeros(10, dtype=bool))[0] == pytest.approx(0.9)
