"""The small setting of the benchmark of memory runs and prints its figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_self_influence_prints_memory_and_time() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/self_influence_memory.py"), "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(
        r"self-influence of 400 rows: ([0-9.]+) s with the fit, ([0-9.]+) GiB", done.stdout
    )
    assert found is not None, done.stdout
    assert 0.05 < float(found[2]) < 8
