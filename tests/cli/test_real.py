"""The command with the real numerics, as a process: the demonstration, and a run that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import woodbury
from woodbury.apps.clean.demo import demo_table

COMMAND = [sys.executable, "-c", "from woodbury.cli import main; main()", "clean"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(woodbury.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
}


def finish(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
    )


def kill_when(stage: str, *words: object) -> int:
    """Start the command, kill it as soon as it reports a stage, and return its exit status."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:
            if line.startswith(stage):
                process.send_signal(signal.SIGKILL)
                break
    return process.wait(60)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "digits.csv"
    demo_table("digits", seed=0)[0].head(500).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def undisturbed(table: Path) -> Callable[[str], Path]:
    """The folder of an undisturbed run with a model."""

    def run(model: str) -> Path:
        out = table.parent / model
        if not out.exists():
            done = finish(table, "--label", "digit", "--model", model, "--out", out)
            assert done.returncode == 0, done.stderr
        return out

    return run


@pytest.mark.parametrize(
    ("model", "stage"),
    [
        ("kernel", "round 2"),
        ("linear", "round 1"),
        pytest.param("kernel", "writing", marks=pytest.mark.slow),
        pytest.param("linear", "round 3", marks=pytest.mark.slow),
        pytest.param("mlp", "round 2", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_result(
    model: str, stage: str, table: Path, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    words = (table, "--label", "digit", "--model", model, "--out", tmp_path / "out")
    assert kill_when(stage, *words) == -signal.SIGKILL
    assert not (tmp_path / "out" / "report.html").exists()
    refused = finish(*words)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    done = finish(*words, "--resume")
    assert done.returncode == 0, done.stderr
    assert "choosing the model" not in done.stderr  # what was done is not done again
    for name in ("rows.csv", "cleaned.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (undisturbed(model) / name).read_bytes()
    assert not list((tmp_path / "out").glob(".*"))


def test_resuming_a_finished_run_changes_nothing(
    undisturbed: Callable[[str], Path], table: Path
) -> None:
    out = undisturbed("kernel")
    before = (out / "rows.csv").read_bytes()
    done = finish(table, "--label", "digit", "--model", "kernel", "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert (out / "rows.csv").read_bytes() == before


def test_demo_finds_what_it_falsified(tmp_path: Path) -> None:
    done = finish("--demo", "digits", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["average_precision"] > 0.998
    assert summary["expected_calibration_error"] < 0.05
    assert summary["certificate"]["relative_residual"] < 1e-6
    rows = pd.read_csv(tmp_path / "out" / "rows.csv")
    assert len(rows) == 1797
    assert sorted(rows["rank"]) == list(range(1, 1798))


def test_the_same_seed_gives_the_same_rows_from_python(
    table: Path, undisturbed: Callable[[str], Path]
) -> None:
    frame = pd.read_csv(table)
    found = woodbury.clean(frame, label="digit", model="kernel").rows
    stored = pd.read_csv(undisturbed("kernel") / "rows.csv")
    assert found["suggested_label"].tolist() == stored["suggested_label"].tolist()
    np.testing.assert_allclose(found["error_probability"], stored["error_probability"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_table_of_every_kind(task: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    n = 600
    x = generator.normal(size=(n, 3))
    color = generator.choice(["red", "green", "blue"], n)
    score = x[:, 0] - x[:, 1] + 1.5 * (color == "red")
    frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "color": color})
    frame["day"] = pd.date_range("2024-01-01", periods=n, freq="h").astype(str)
    frame["note"] = [" ".join(generator.choice(list("abcdefgh"), 5)) for _ in range(n)]
    frame.loc[::9, "b"] = None
    wrong = generator.choice(n, 30, replace=False)
    if task == "classification":
        frame["y"] = np.where(score > 0.3, "yes", "no")
        frame.loc[wrong, "y"] = np.where(frame.loc[wrong, "y"] == "yes", "no", "yes")
    else:
        frame["y"] = score + 0.1 * generator.normal(size=n)
        frame.loc[wrong, "y"] += 4
    frame.to_parquet(tmp_path / "t.parquet")
    done = finish(tmp_path / "t.parquet", "--label", "y", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(tmp_path / "out" / "rows.parquet")
    top = rows.sort_values("rank")["row"].head(30)
    assert len(set(top) & set(wrong)) >= 18
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["task"] == task
