"""Time, memory and average precision of whole runs of ``woodbury clean`` on large tables.

    python benchmarks/scale.py mnist       # all 60,000 rows, NPZ
    python benchmarks/scale.py generated   # 1,000,000 rows of 50 columns, CSV

Each runs the command as a process of its own, on a table with 20 % uniform flips, and prints the
wall time of the whole (reading and writing included), the largest resident memory and the average
precision of ``rows.csv``.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

ROOT = Path(__file__).resolve().parent.parent


def mnist(folder: Path) -> tuple[Path, np.ndarray]:
    """All training rows as NPZ, and which labels are wrong."""
    data = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data")) / "mnist.npz"
    if not data.is_file():
        raise SystemExit(f"no {data}; set WOODBURY_DATA to the data folder")
    arrays = np.load(data)
    given, wrong = flip(arrays["y_train"].astype(int), 10)
    np.savez(folder / "table.npz", X=arrays["x_train"].reshape(-1, 28, 28), y=given)
    return folder / "table.npz", wrong


def generated(folder: Path, rows: int = 1_000_000) -> tuple[Path, np.ndarray]:
    """A CSV of 50 normal columns whose label comes from a random network with 5 outputs."""
    random = np.random.default_rng(0)
    X = random.standard_normal((rows, 50), dtype=np.float32)
    hidden = np.tanh(2 * X @ random.standard_normal((50, 24)).astype(np.float32) / 7)
    truth = (hidden @ random.standard_normal((24, 5))).argmax(1)
    given, wrong = flip(truth, 5)
    frame = pd.DataFrame(X, columns=[f"x{j}" for j in range(50)]).assign(y=given)
    import pyarrow as pa
    from pyarrow import csv

    csv.write_csv(pa.Table.from_pandas(frame, preserve_index=False), folder / "table.csv")
    return folder / "table.csv", wrong


def flip(truth: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """One label in five moved to another class."""
    random = np.random.default_rng(1)
    wrong = random.random(len(truth)) < 0.2
    given = truth.copy()
    given[wrong] = (truth[wrong] + random.integers(1, classes, wrong.sum())) % classes
    return given, wrong


def main() -> None:
    """Run what was asked for, both by default."""
    for name in sys.argv[1:] or ["mnist", "generated"]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            path, wrong = {"mnist": mnist, "generated": generated}[name](folder)
            command = [sys.executable, "-c", "from woodbury.cli import main; main()", "clean"]
            command += [str(path), "--label", "y", "--model", "auto", "--out", str(folder / "out")]
            start = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            seconds = time.perf_counter() - start
            memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            if done.returncode:
                raise SystemExit(f"{name}: the command failed with {done.returncode}")
            rows = next((folder / "out").glob("rows.*"))
            found = pd.read_csv(rows) if rows.suffix == ".csv" else pd.read_parquet(rows)
            error = found.sort_values("row")["error_probability"].to_numpy()
            precision = average_precision_score(wrong, error)
            print(done.stdout)
            print(
                f"{name}: {len(wrong):,} rows, average precision {precision:.4f}, "
                f"{seconds:.0f} s in all, {memory:.2f} GiB at most",
                flush=True,
            )


if __name__ == "__main__":
    main()
