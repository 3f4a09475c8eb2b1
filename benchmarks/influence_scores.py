"""Time of EK-FAC influence scores of 100 queries and 10,000 rows beside kronfluence 1.0.1.

784-1024-1024-10, trained for two epochs on 10,000 rows of MNIST; all layers with their biases;
float32; two threads; damping 0.1 of the mean corrected eigenvalue of each layer. Times include the
gradients of queries and rows and the measurement of the error, not the fit.

Values are compared on both sides with factors of the first 512 rows and their labels, for which the
peer's fit takes a minute and not eight; scores take as long whatever the factors are. Ours are
timed with factors of all rows. The relative error is the one in the Frobenius norm over all scores:
the estimate and the upper limit of the certificate, and against exact scores of every tenth row.

    python benchmarks/influence_scores.py [--small] [--no-peer]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.layer_fit import PEERS, build  # noqa: E402

from woodbury import EKFAC, Influence, Objective  # noqa: E402
from woodbury.influence import Scores  # noqa: E402

THREADS = 2


def data(small: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and queries: MNIST, or noise with labels where it is small."""
    if small:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(330, 784, generator=generator)
        y = x[:, :10].argmax(1)
        return x[:300], y[:300], x[300:], y[300:]
    with np.load(Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data")) / "mnist.npz") as f:
        x, y = f["x_train"][:10_000].reshape(-1, 784), f["y_train"][:10_000]
        q, z = f["x_test"][:100].reshape(-1, 784), f["y_test"][:100]
    images = (torch.as_tensor(part, dtype=torch.float32) / 255 for part in (x, q))
    x, q = images
    return x, torch.as_tensor(y).long(), q, torch.as_tensor(z).long()


def train(width: int, x: Tensor, y: Tensor) -> nn.Module:
    """Two epochs of SGD with momentum."""
    torch.manual_seed(0)
    model = build("mlp", width=width)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        for part in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model


def timed(
    objective: Objective, matrix: EKFAC, queries: tuple[Tensor, Tensor], tolerance: float
) -> tuple[float, Scores]:
    """Seconds and scores."""
    influence = Influence(objective, matrix=matrix, tolerance=tolerance)
    start = time.perf_counter()
    scores = influence.scores(queries)
    return time.perf_counter() - start, scores


def relative(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of the difference over that of ``b``."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def peer(job: dict, script: str = "_kronfluence_scores") -> dict | None:
    """What kronfluence says of a job, or ``None`` where it is not there."""
    if not PEERS.exists():
        print(f"{PEERS} is missing: kronfluence is not shown", flush=True)
        return None
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "job.pt", Path(folder) / "found.pt"
        torch.save(job, given)
        words = [str(PEERS), "-m", f"benchmarks.{script}", str(given), str(found)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            print("kronfluence failed:", done.stderr.strip().splitlines()[-1:], flush=True)
            return None
        return torch.load(found, weights_only=False)


def main() -> None:
    """Print the table."""
    small = "--small" in sys.argv
    torch.set_num_threads(THREADS)
    x, y, xq, yq = data(small)
    width, batch, fitted = (64, 100, 100) if small else (1024, 1000, 512)
    model = train(width, x, y)
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    objective = Objective(model, "cross_entropy", batches)
    start = time.perf_counter()
    matrix = EKFAC(objective, "empirical")
    print(f"fit of all {len(x)} rows: {time.perf_counter() - start:.1f} s", flush=True)
    seconds, fast = timed(objective, matrix, (xq, yq), 0.01)
    limit = fast.solves.get("truncation_error_at_most", 0.0)
    print(f"ours to 1 %: {seconds:.2f} s, certified {limit:.4f}, {dict(fast.solves)}", flush=True)
    tenth = torch.arange(0, len(x), 10)
    exact = Influence(objective, matrix=matrix, tolerance=0.0).scores((xq, yq), rows=tenth)
    true = relative(fast.values[:, tenth], exact.values)
    print(f"relative error against exact scores of {len(tenth)} rows: {true:.5f}", flush=True)

    few = Objective(model, "cross_entropy", [(x[:fitted], y[:fitted])])
    matrix = EKFAC(few, "empirical")
    exact_seconds, exact = timed(objective, matrix, (xq, yq), 0.0)
    print(f"ours, exact: {exact_seconds:.2f} s", flush=True)
    if "--no-peer" in sys.argv:
        return
    found = peer(
        {
            "state": model.state_dict(),
            "width": width,
            "threads": THREADS,
            "batch": batch,
            "fitted": fitted,
            "x": x,
            "y": y,
            "x_query": xq,
            "y_query": yq,
        }
    )
    if found is None:
        return
    theirs = -found["scores"] / len(x)  # without sign and 1 / N there
    correlation = torch.corrcoef(torch.stack([exact.values.flatten(), theirs.flatten()]))[0, 1]
    print(
        f"kronfluence: {found['seconds']:.1f} s; ratio {found['seconds'] / seconds:.1f} to 1 %, "
        f"{found['seconds'] / exact_seconds:.1f} exact; scores of both exact: correlation "
        f"{correlation.item():.6f}, relative difference {relative(exact.values, theirs):.1e}"
    )


if __name__ == "__main__":
    main()
