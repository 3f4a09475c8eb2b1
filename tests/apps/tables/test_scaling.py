from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits

from woodbury.apps.tables.scaling import scale_columns, scale_jointly, shared_unit

generator = np.random.default_rng(0)


def test_pixels_share_a_unit() -> None:
    digits = load_digits().data
    assert shared_unit(digits) == "all 64 columns are whole numbers from 0 to 16"
    assert shared_unit((digits * 15).astype(np.uint8)) != ""


@pytest.mark.parametrize(
    "rows",
    [
        load_breast_cancer().data,
        generator.normal(size=(200, 30)),
        generator.poisson(np.geomspace(0.05, 20, 30), size=(200, 30)),  # counts of words
        load_digits().data[:, :12],  # too few columns to tell
        np.where(generator.random((50, 20)) < 0.1, np.nan, 1.0),
        np.ones((10, 20)),
        generator.integers(1, 5, size=(300, 60)),  # codes of letters
        generator.integers(0, 2, size=(300, 60)).astype(float),
    ],
)
def test_other_tables_do_not(rows: np.ndarray) -> None:
    assert shared_unit(rows) == ""


def test_answers_on_one_scale_share_a_unit() -> None:
    rows = generator.integers(1, 11, size=(300, 20))
    assert shared_unit(rows) == "all 20 columns run from 1 to 10"


def test_joint_scaling_keeps_the_ratio_of_distances() -> None:
    rows = load_digits().data
    scaled = scale_jointly(rows)
    before = np.linalg.norm(rows[:50, None] - rows[None, :50], axis=-1)
    after = np.linalg.norm(scaled[:50, None] - scaled[None, :50], axis=-1)
    ratio = (after / np.where(before > 0, before, 1))[before > 0]
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-5)
    varies = rows.std(axis=0) > 0
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(
        (scaled.astype(np.float64) ** 2).mean(0)[varies].mean(), 1, rtol=1e-5
    )
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-5)


def test_columns_are_scaled_by_their_own_robust_spread() -> None:
    rows = generator.normal(size=(4000, 40)) * np.geomspace(1e-3, 1e3, 40) + 7
    rows[0, 0] = 1e6  # an outlier must not flatten its column
    scaled, marks = scale_columns(rows)
    assert marks.shape == (4000, 0)
    np.testing.assert_allclose(scaled.std(axis=0), 1, atol=0.1)
    np.testing.assert_allclose(np.median(scaled, axis=0), 0, atol=1e-3)
    assert 20 < scaled[0, 0] < 30  # 4 + log of its distance


def test_mostly_equal_values_use_the_standard_deviation() -> None:
    rows = np.zeros((100, 1))
    rows[:10] = 1.0
    scaled, _ = scale_columns(rows)
    np.testing.assert_allclose(scaled.std(), 1, rtol=1e-5)


def test_missing_values_become_the_median_and_a_mark() -> None:
    rows = np.array([[1.0, 5.0], [np.nan, 6.0], [3.0, 7.0], [8.0, 8.0]])
    scaled, marks = scale_columns(rows)
    assert marks.tolist() == [[0], [1], [0], [0]]
    assert scaled[1, 0] == scaled[2, 0]
    assert np.isfinite(scaled).all()
