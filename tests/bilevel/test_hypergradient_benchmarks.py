"""The scripts behind the figures of hypergradients run to their end at a small size."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(
    name: str, figure: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    script = BENCHMARKS / name
    monkeypatch.setattr("sys.argv", [str(script), "--small", "--figure", str(figure)])
    runpy.run_path(str(script), run_name="__main__")
    assert figure.stat().st_size > 1000
    return capsys.readouterr().out


def test_every_bound_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("hypergradient_bounds.py", tmp_path / "a.svg", monkeypatch, capsys)
    assert "every bound holds in every draw" in out
    assert len(re.findall(r"converged|completed", out)) == 15


def test_terms_are_counted_for_both_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("hypergradient_terms.py", tmp_path / "a.svg", monkeypatch, capsys)
    assert out.count("CG, 20 steps") == 4
    # 10 unknowns: 20 steps of conjugate gradients are exact
    assert re.search(r"CG, 20 steps +1\.0000 +1\.0000", out)


def test_every_setting_of_the_logistic_example_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("nystrom_logistic.py", tmp_path / "a.svg", monkeypatch, capsys)
    assert len(re.findall(r"^  (?:5|10|20), (?:0\.01|0\.1|1) ", out, re.M)) == 27
    exact = re.search(r"^exact.*\n +1\.000 +1\.00 ", out, re.M)
    assert exact
