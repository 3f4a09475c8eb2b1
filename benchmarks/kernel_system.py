"""An RBF kernel system of 8,192 rows: CG, CG preconditioned by Nystrom, and SciPy's CG beside them.

The system is (K + mu I) x = y with the rows of kin8nm, inputs and target standardised, mu = 1e-3
and k(x, z) = exp(-|x - z|^2 / (2 l^2)). The matrix (512 MiB in float64) is never formed. Prints,
for each length scale and tolerance, the iterations, the true residual, the time, and the ratios;
then the time of a product beside that of its parts, and the memory at the peak. SciPy's CG runs on
the same operator, so that the two differ by the solver alone; and, for a few iterations, on a plain
NumPy product in blocks, which is what one would write by hand.

Reads the data folder (WOODBURY_DATA, by default ../shared/data beside the repository).

    python benchmarks/kernel_system.py [--threads 1] [--lengths 2.0 4.0] [--rank 800]

The length scale is the median distance between rows unless others are given.
"""

from __future__ import annotations

import argparse
import gzip
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from woodbury import CG, Identity, Kernel, Nystrom, solve
from woodbury.kernels import RBF, median_lengthscale
from woodbury.operators import LinearOperator

MU = 1e-3
TOLERANCES = (1e-6, 1e-8)
HAND_STEPS = 20


def peak() -> float:
    """The largest memory this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def shortest(function: Callable[[], Any], repeats: int = 7) -> float:
    return min(timed(function)[0] for _ in range(repeats))


def load(path: Path) -> tuple[Tensor, Tensor]:
    """Inputs and target, both standardised."""
    with gzip.open(path) as lines:
        table = torch.from_numpy(np.loadtxt(lines))
    table = (table - table.mean(0)) / table.std(0)
    return table[:, :-1].contiguous(), table[:, -1].contiguous()


def by_hand(X: np.ndarray, length: float, rows: int = 64) -> Callable[[np.ndarray], np.ndarray]:
    """The product in NumPy, in blocks of rows."""
    Z = X / length
    squares = (Z * Z).sum(1)

    def product(v: np.ndarray) -> np.ndarray:
        v = v.ravel()
        result = MU * v
        for start in range(0, len(Z), rows):
            part = slice(start, start + rows)
            block = Z[part] @ Z.T
            block -= 0.5 * squares
            block -= 0.5 * squares[part, None]
            np.exp(block, out=block)
            result[part] += block @ v
        return result

    return product


def by_scipy(
    product: Callable[[np.ndarray], np.ndarray], y: np.ndarray, rtol: float, limit: int
) -> tuple[int, np.ndarray]:
    n, steps = len(y), 0

    def count(_: np.ndarray) -> None:
        nonlocal steps
        steps += 1

    A = scipy.sparse.linalg.LinearOperator((n, n), matvec=product, dtype=y.dtype)
    x, _ = scipy.sparse.linalg.cg(A, y, rtol=rtol, maxiter=limit, callback=count)
    return steps, x


def systems(X: Tensor, y: Tensor, length: float, rank: int, limit: int) -> None:
    K = Kernel(X, kernel=RBF(length), tags={"positive_semidefinite"})
    A: LinearOperator = K + MU * Identity(len(X), dtype=X.dtype)
    numpy_product = by_hand(X.numpy(), length)

    def residual(x: np.ndarray) -> float:
        r = y.numpy() - numpy_product(x)
        return float(np.linalg.norm(r) / np.linalg.norm(y.numpy()))

    def matvec(v: np.ndarray) -> np.ndarray:
        return (A @ torch.from_numpy(np.ascontiguousarray(v.ravel()))).numpy()

    def alone(r: float) -> Any:
        return solve(A, y, CG(rtol=r, max_steps=limit), throw=False)

    hand_time, _ = timed(lambda: by_scipy(numpy_product, y.numpy(), 0.0, HAND_STEPS))
    for rtol in TOLERANCES:
        print(f"length {length:g}, tolerance {rtol:g}")
        plain_time, plain = timed(lambda r=rtol: alone(r))
        report("woodbury CG", plain.steps, residual(plain.value.numpy()), plain_time, plain.status)
        recipe = CG(rtol=rtol, preconditioner=Nystrom(rank))
        helped_time, helped = timed(lambda r=recipe: solve(A, y, r, throw=False))
        name = f"woodbury CG + Nystrom({rank})"
        report(name, helped.steps, residual(helped.value.numpy()), helped_time, helped.status)
        least = "" if plain.ok else ">= "
        print(
            f"  plain / Nystrom: iterations {least}{plain.steps / max(1, helped.steps):.1f}, "
            f"time {least}{plain_time / helped_time:.2f}",
            flush=True,
        )
        if rtol < TOLERANCES[0]:
            continue
        scipy_time, (steps, x) = timed(lambda r=rtol: by_scipy(matvec, y.numpy(), r, limit))
        report("SciPy CG, our product", steps, residual(x), scipy_time)
        print(
            f"  woodbury CG / SciPy CG: iterations {plain.steps / steps:.3f}, "
            f"time {plain_time / scipy_time:.2f}; with Nystrom {helped_time / scipy_time:.3f}"
        )
        per_step = plain_time / plain.steps / (hand_time / HAND_STEPS)
        print(
            f"  an iteration of woodbury CG / one of SciPy CG with a NumPy product ({HAND_STEPS} "
            f"taken, {1e3 * hand_time / HAND_STEPS:.0f} ms each): {per_step:.2f}",
            flush=True,
        )


def report(name: str, steps: int, residual: float, seconds: float, status: Any = None) -> None:
    said = "" if status is None else f"  {status.name}"
    print(f"  {name:28s} {steps:6d} iterations, residual {residual:.1e}, {seconds:7.2f} s{said}")


def products(X: Tensor, length: float) -> None:
    """The time of a product beside that of its parts alone, per entry evaluated."""
    n = len(X)
    K = Kernel(X, kernel=RBF(length), tags={"positive_semidefinite"})
    v = torch.ones(n, dtype=X.dtype)
    with torch.no_grad():
        ours = shortest(lambda: K @ v)
    hand = by_hand(X.numpy(), length)
    theirs = shortest(lambda: hand(v.numpy()), 3)
    rows, columns = 128, 4096
    left, right = torch.randn(rows, X.shape[1] + 2).double(), torch.randn(columns, X.shape[1] + 2)
    right, block = right.double(), torch.empty(rows, columns, dtype=X.dtype)
    w = torch.ones(columns, dtype=X.dtype)
    scale = n * n / 2 / block.numel()
    floor = {
        "distances": shortest(lambda: torch.mm(left, right.mT, out=block), 30),
        "exp": shortest(lambda: torch.exp2(block.clamp_max_(0), out=block), 30),
        "two products": 2 * shortest(lambda: block @ w, 30),
    }
    parts = ", ".join(f"{name} {1e3 * scale * part:.1f}" for name, part in floor.items())
    whole = scale * sum(floor.values())
    print(f"a product: {1e3 * ours:.1f} ms; its parts alone, for half of the entries: {parts} ms")
    print(
        f"  product / parts {ours / whole:.2f}; NumPy's {1e3 * theirs:.1f} ms, "
        f"ours / NumPy's {ours / theirs:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=float, nargs="+", default=None)
    parser.add_argument("--rank", type=int, default=800)
    parser.add_argument("--limit", type=int, default=2500, help="iterations of CG without help")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.threads > 1 and os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        print("NumPy's threads compete with torch's: set OPENBLAS_NUM_THREADS=1 for fair times")
    folder = Path(os.environ.get("WOODBURY_DATA", "../shared/data"))
    path = folder / "uci" / "kin8nm.txt.gz"
    if not path.exists():
        sys.exit(f"{path} is missing: set WOODBURY_DATA to the folder with the data")
    X, y = load(path)
    before = peak()
    print(f"kin8nm: {len(X)} rows of {X.shape[1]}, {options.threads} threads, mu = {MU:g}")
    lengths = options.lengths or [median_lengthscale(X)]
    for length in lengths:
        systems(X, y, length, options.rank, options.limit)
    products(X, lengths[0])
    print(
        f"memory at the peak {peak():.0f} MiB, {before:.0f} MiB of it before the first system "
        f"(imports and data), {peak() - before:.0f} MiB beyond; the matrix would take "
        f"{len(X) ** 2 * 8 / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
