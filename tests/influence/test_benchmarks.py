"""The small setting of every benchmark of influence runs and prints its table."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize("name", ["bregman", "mislabeled"])
def test_of_digits(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    table = importlib.import_module(name).main(["--small"])
    check(table, capsys)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("datamodeling", ["--model", "lr"]),
        ("datamodeling", ["--model", "mlp"]),
        ("counterfactuals", []),
    ],
)
def test_of_the_data_folder(name, options, monkeypatch, capsys, tmp_path, data_folder):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("WOODBURY_DATA", str(data_folder))
    table = importlib.import_module(name).main(["--small", "--folder", str(tmp_path), *options])
    check(table, capsys)
    assert list(tmp_path.rglob("*.safetensors")), "what was trained is kept"


def check(table, capsys):
    assert len(table) >= 4
    assert all(math.isfinite(value) for value in table.values())
    printed = capsys.readouterr().out
    assert all(name.split(" ")[-1] in printed for name in table)
