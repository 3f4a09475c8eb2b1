"""The scripts behind the figures of layers run to their end at a small size, on made-up data."""

from __future__ import annotations

import gzip
import re

import numpy as np
import pytest


@pytest.fixture
def pack(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    centres = rng.random((10, 784))

    def images(count):
        y = rng.integers(0, 10, count)
        x = 255 * np.clip(centres[y] + 0.3 * rng.standard_normal((count, 784)), 0, 1)
        return x.reshape(count, 28, 28).astype(np.uint8), y

    (x, y), (x_test, y_test) = images(200), images(2)
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    (tmp_path / "text").mkdir()
    with gzip.open(tmp_path / "text" / "tinyshakespeare.txt.gz", "wt") as file:
        file.write("All the world's a stage, and all the men and women merely players. " * 10)
    monkeypatch.setenv("WOODBURY_DATA", str(tmp_path))


def test_fit_of_both_models(pack, printed):
    out = printed("layer_fit.py", "--small", "--no-peer")
    assert re.search(r"^mlp, 64 rows: woodbury \d+\.\d+ s; kronfluence is missing", out, re.M)
    assert re.search(r"^transformer, 8 rows: woodbury", out, re.M)


def test_every_recipe_is_in_the_table_of_damped_solves(pack, printed):
    out = printed("damped_solves.py", "--small")
    number = r"\d\.\de[-+]\d\d"
    for name in ("K-FAC alone", "EK-FAC alone"):
        assert re.search(rf"^{name} +{number}$", out, re.M)
    names = ("Neumann", "CG", "CG, diagonal", "block CG", "CG, K-FAC", "CG, EK-FAC")
    for name in (*names, "CG, EK-FAC, for the budget", "block CG, EK-FAC, for the budget"):
        assert re.search(rf"^{name} +{number} +{number}$", out, re.M)
