"""The benchmarks of this room run at small size, and what they print is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

# torch warns of itself when forward mode is used first.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is dep:DeprecationWarning")


def test_logistic(printed: Callable[..., str]) -> None:
    out = printed("implicit_logistic.py", "--penalties", "1e-2", "--repeats", "1")
    assert float(re.search(r"\|gradient\| (\S+)", out)[1]) < 1e-8
    assert float(re.search(r"error of the hypergradient (\S+)", out)[1]) < 1e-5
    assert "jaxopt           not there" in out


def test_svm(printed: Callable[..., str]) -> None:
    options = ["--rows", "60", "--features", "80", "--repeats", "1"]
    out = printed("implicit_svm.py", *options)
    row = out.splitlines()[-1].replace("|", " ").split()
    implicit, fewest, doubled = float(row[2]), float(row[5]), float(row[9])
    assert max(implicit, fewest, doubled) < 1e-4


def test_molecular_dynamics(printed: Callable[..., str], tmp_path: Path) -> None:
    options = ["--particles", "16", "--seeds", "2", "--packing", "1.0"]
    options += ["--figure", str(tmp_path / "discs.png")]
    out = printed("molecular_dynamics.py", *options)
    rows = [line for line in out.splitlines() if line.startswith("implicit, ")]
    assert len(rows) == 4
    for row in rows:
        assert row.split()[2:4] == ["2/2", "2/2"]
        assert float(row.split()[5]) < 1e-6
    assert (tmp_path / "discs.png").stat().st_size > 0


def test_jacobian_error(printed: Callable[..., str], tmp_path: Path) -> None:
    options = ["--steps", "200", "--figure", str(tmp_path / "errors.png")]
    out = printed("jacobian_error.py", *options)
    constant = float(re.search(r"ratio of implicit at most (\S+)", out)[1])
    ridge = [line.split() for line in out.split("logistic")[0].splitlines()]
    rows = [[float(word) for word in row] for row in ridge if len(row) == 6 and row[0].isdigit()]
    assert all(row[3] <= constant for row in rows)
    assert all(row[5] > row[3] for row in rows)  # the unrolled one is worse at every step
    for implicit, unrolled in re.findall(r"slope: implicit (\S+), unrolled (\S+)", out):
        assert abs(float(implicit) - 1) < 0.05
        assert float(unrolled) < 0.9
    assert (tmp_path / "errors.png").stat().st_size > 0


def test_distillation(printed: Callable[..., str], tmp_path: Path) -> None:
    options = ["--digits", "--evaluations", "10", "--setting", "0.1", "1e-3"]
    options += ["--figure", str(tmp_path / "images.png")]
    out = printed("distillation.py", *options)
    rows = re.findall(r"(implicit|implicit, LBFGS|unrolled) +\d.* (\S+) +(\S+) +(\S+) %", out)
    assert len(rows) == 3
    for _, error, loss, accuracy in rows:
        assert float(error) < 0.2  # at an inner tolerance of 1e-3
        assert float(loss) < 2
        assert float(accuracy) > 75
    assert (tmp_path / "images.png").stat().st_size > 0


def test_dictionary_learning(printed: Callable[..., str], tmp_path: Path) -> None:
    options = ["--repeats", "1", "--steps", "2", "--rows", "150"]
    options += ["--figure", str(tmp_path / "areas.png")]
    out = printed("dictionary_learning.py", *options)
    areas = re.findall(r"^(?:l1|l2|dictionary|task).*? +(\d+\.\d\d) ", out, re.MULTILINE)
    assert len(areas) == 8
    assert all(80 < float(area) <= 100 for area in areas)
    assert (tmp_path / "areas.png").stat().st_size > 0
