"""Two processes under DistributedDataParallel (gloo) learn what one learns on the joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("parallel.py")


@pytest.mark.parametrize("recipe", ["neumann", "cg"])
def test_two_processes_are_one_on_the_joined_batch(tmp_path: Path, recipe: str) -> None:
    def start(rank: int, processes: int) -> tuple[subprocess.Popen, Path]:
        output = tmp_path / f"{rank}of{processes}.pt"
        arguments = [rank, processes, tmp_path / "store", output, recipe]
        command = [sys.executable, "-W", "ignore", str(PROGRAM), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE), output

    started = [start(0, 2), start(1, 2), start(0, 1)]
    said = [process.communicate(timeout=240)[1].decode() for process, _ in started]
    assert [process.returncode for process, _ in started] == [0, 0, 0], said
    found = [torch.load(output, weights_only=True) for _, output in started]
    first, second, alone = found
    assert first["reports"] == second["reports"]
    for name, value in alone["numbers"].items():
        assert torch.equal(first["numbers"][name], second["numbers"][name]), name
        torch.testing.assert_close(first["numbers"][name], value, rtol=1e-7, atol=1e-9)
    for ours, wanted in zip(first["reports"], alone["reports"], strict=True):
        assert ours["inner_stationarity"] == pytest.approx(wanted["inner_stationarity"], rel=1e-6)
        assert ours["solve_status"] == wanted["solve_status"]
    assert all("without rows" in result["error"] for result in (first, second))
    assert all("validation loss of a process" in result["nan"] for result in (first, second))
    assert "outer loss is nan" in alone["nan"]
    start_value = torch.full((16,), 0.0, dtype=torch.float64)
    assert (first["numbers"]["weights"] - start_value).abs().max() > 0.1
