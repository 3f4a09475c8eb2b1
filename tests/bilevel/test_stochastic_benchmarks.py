"""The scripts behind the figures of stochastic algorithms run to their end at a small size."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data of the form of the data pack, made up."""
    rng = np.random.default_rng(0)
    (tmp_path / "libsvm").mkdir()
    features = rng.random((600, 123)) < 0.1
    labels = features @ rng.standard_normal(123) > 0
    with gzip.open(tmp_path / "libsvm" / "a9a.gz", "wt") as file:
        for row, label in zip(features, labels, strict=True):
            entries = " ".join(f"{place + 1}:1" for place in np.flatnonzero(row))
            file.write(f"{int(label)} {entries}\n")
    centres = rng.random((10, 784))

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.integers(0, 10, count)
        x = 255 * np.clip(centres[y] + 0.3 * rng.standard_normal((count, 784)), 0, 1)
        return x.astype(np.uint8), y

    (x, y), (x_test, y_test) = images(520), images(100)
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    monkeypatch.setenv("WOODBURY_DATA", str(tmp_path))
    return tmp_path


def test_all_algorithms_are_in_both_tables(pack: Path, printed: Callable[..., str]) -> None:
    out = printed("bilevel_stochastic.py", "--small", "--figure", str(pack / "a.svg"))
    assert (pack / "a.svg").stat().st_size > 1000
    for name in ("IFT, Neumann", "Nystrom", "stocBiO", "AmIGO", "SOBA", "SABA", "F2SA", "BO-REP"):
        assert len(re.findall(rf"^{name} +\S+ +-?\d+\.\d+", out, re.M)) == 2
    assert re.search(r"^right labels", out, re.M)


def test_every_version_of_blocks_is_in_the_table(pack: Path, printed: Callable[..., str]) -> None:
    out = printed("bsvrb.py", "--small", "--figure", str(pack / "a.svg"))
    assert (pack / "a.svg").stat().st_size > 1000
    for name in ("version 1", "version 2", "rescaled", "all blocks", "no memory"):
        assert len(re.findall(rf"^{name} +\d+ +-?\d+\.\d+", out, re.M)) == 1


def test_toy_and_machines_are_in_the_table(tmp_path: Path, printed: Callable[..., str]) -> None:
    out = printed("lv_hba.py", "--small", "--figure", str(tmp_path / "a.svg"))
    assert (tmp_path / "a.svg").stat().st_size > 1000
    found = re.search(r"woodbury, c0 = 2 +\S+ +(\S+)", out)
    assert found
    assert float(found.group(1)) < 0.02
    assert re.search(r"breast cancer +0\.\d+", out)
