from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from woodbury.apps.tables.encode import encode_categories, encode_dates, encode_text


def test_one_hot_with_missing_as_a_value() -> None:
    block, how = encode_categories(pd.Series(["a", "b", None, "a"] * 5))
    assert how == "one-hot, 3 values"
    assert block.shape == (20, 3)
    assert (block.sum(axis=1) == 1).all()
    assert not (block[0] == block[2]).all()


def test_rare_values_share_a_column() -> None:
    values = pd.Series([f"common{i % 5}" for i in range(200)] + [f"rare{i}" for i in range(20)])
    block, _ = encode_categories(values)
    assert block.shape == (220, 6)
    assert len(np.unique(block[200:], axis=0)) == 1


def test_many_values_are_hashed_to_different_rows() -> None:
    values = pd.Series([f"zip{i % 500}" for i in range(2000)])
    block, how = encode_categories(values)
    assert how == "hashed, 500 values"
    assert block.shape == (2000, 33)
    assert len(np.unique(block, axis=0)) > 490
    assert (block[0] == block[500]).all()


def test_dates() -> None:
    values = pd.Series(pd.to_datetime(["2024-01-01", "2024-07-01", None]))
    block = encode_dates(values)
    assert block.shape == (3, 5)
    assert np.isnan(block[2]).all()
    assert block[1, 0] - block[0, 0] == 182 * 86400
    np.testing.assert_allclose(block[0, 1:3], [0, 1])
    timed = encode_dates(pd.Series(pd.to_datetime(["2024-01-01 06:00", "2024-01-01 00:00"])))
    assert timed.shape == (2, 7)
    np.testing.assert_allclose(timed[0, 5:], [1, 0], atol=1e-12)


def test_text_keeps_topics_apart_and_is_repeatable() -> None:
    generator = np.random.default_rng(0)
    words = {0: ["ball", "goal", "team", "match"], 1: ["oven", "salt", "flour", "cake"]}
    topic = np.arange(200) % 2
    values = pd.Series([" ".join(generator.choice(words[t], 5)) for t in topic])
    block, how = encode_text(values, seed=3)
    assert block is not None
    assert "TF-IDF" in how
    centers = np.stack([block[topic == t].mean(0) for t in (0, 1)])
    nearest = np.linalg.norm(block[:, None] - centers, axis=-1).argmin(axis=1)
    assert (nearest == topic).all()
    np.testing.assert_allclose(block.var(axis=0).sum(), 16, rtol=1e-4)
    assert np.array_equal(block, encode_text(values, seed=3)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [["!!", "??"] * 5, ["same"] * 10, [None] * 10])
def test_text_without_words(values: list[str | None]) -> None:
    block, why = encode_text(pd.Series(values, dtype=object), seed=0)
    assert block is None
    assert "word" in why
