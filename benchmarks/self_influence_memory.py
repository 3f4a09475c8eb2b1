"""Memory and time of the self-influence of all 60,000 training rows of MNIST, by EK-FAC.

784-1024-1024-10, trained for one epoch, all layers with biases, float32, default damping (0.1 of
the mean eigenvalue of each layer); the fit of factors, eigenbases and corrected eigenvalues is
included. A process of its own loads the rows (in uint8), trains and scores; the largest resident
memory is that of the process, with Python, torch and the data.

    python benchmarks/self_influence_memory.py [--small]
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 2.0  # GiB
BATCH = 1000


def data(small: bool) -> tuple[Tensor, Tensor]:
    """Rows in uint8 and labels: MNIST, or noise with labels where it is small."""
    if small:
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(256, (400, 784), dtype=torch.uint8, generator=generator)
        return x, x[:, :10].argmax(1)
    path = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data")) / "mnist.npz"
    if not path.is_file():
        raise SystemExit(f"no {path}; set WOODBURY_DATA to the data folder")
    with np.load(path) as file:
        x, y = file["x_train"], file["y_train"]
    return torch.as_tensor(x).reshape(len(x), -1), torch.as_tensor(y).long()


class Scaled(nn.Module):
    """Bytes to numbers from 0 to 1, so that the rows stay bytes until they are used."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 255


def child(small: bool) -> None:
    """Train, score, and print what the parent shows."""
    from woodbury import Influence, Objective

    torch.manual_seed(0)
    x, y = data(small)
    width = 64 if small else 1024
    model = nn.Sequential(
        Scaled(),
        nn.Linear(784, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for part in torch.randperm(len(x)).split(128):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    size = min(BATCH, len(x))
    batches = list(zip(x.split(size), y.split(size), strict=True))
    start = time.perf_counter()
    found = Influence(Objective(model, "cross_entropy", batches), matrix="ekfac").self_influence()
    seconds = time.perf_counter() - start
    assert bool((found.values <= 0).all())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(found.values)} {seconds} {memory} {float(found.values.min())}")


def main() -> None:
    """Run the child and print its figures."""
    small = "--small" in sys.argv
    if "--child" in sys.argv:
        child(small)
        return
    command = [sys.executable, __file__, "--child", *(["--small"] if small else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run failed with {done.returncode}")
    rows, seconds, memory, least = map(float, done.stdout.split()[-4:])
    verdict = "within" if memory <= LIMIT else "beyond"
    print(
        f"self-influence of {rows:,.0f} rows: {seconds:.1f} s with the fit, {memory:.2f} GiB at "
        f"most, {verdict} {LIMIT:.0f} GiB; largest {least:.3g}",
        flush=True,
    )


if __name__ == "__main__":
    main()
