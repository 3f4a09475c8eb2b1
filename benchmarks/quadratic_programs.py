"""The problems of Maros and Meszaros (1999) by the interior-point layer, within a time limit.

Dense up to --dense variables and rows, with sparse factors beyond (--dense 0: for all). For each
problem with at most --size variables and rows: status, steps, seconds, the objective, the
relative violation of the optimality conditions as the layer reports it, and the same recomputed
here from the original data, unscaled: the largest of |P z + q + A^T y| (y = multipliers of the
rows), the violation of the bounds and the gap, each relative to the largest of its terms and one.
Rows that are equations are given as such; infinite bounds are left out. Reads maros_meszaros of
the data folder (WOODBURY_DATA, by default ../shared/data beside the repository).

    python benchmarks/quadratic_programs.py [--threads 1] [--size 1200] [--dense 1200] [--limit 60]
        [--names ...]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import scipy.sparse
import torch

from woodbury import Sparse
from woodbury.errors import ArgumentError
from woodbury.implicit import quadratic_program

INFINITE = 1e19


def load(path: Path) -> tuple[Any, ...]:
    """P, q, constant, and the rows as equations ``A z = b`` and inequalities ``G z <= h``."""
    found = scipy.io.loadmat(path)
    P, rows = (scipy.sparse.csr_array(found[k]).astype(float) for k in ("P", "A"))
    q, low, high = (found[k].astype(float).ravel() for k in ("q", "l", "u"))
    equal = high - low <= 1e-12 * np.maximum(1, np.abs(low))
    above, below = ~equal & (high < INFINITE), ~equal & (low > -INFINITE)
    G = scipy.sparse.vstack([rows[above], -rows[below]]).tocsr()
    h = np.concatenate([high[above], -low[below]])
    return P, q, float(found["r"].ravel()[0]), rows[equal], low[equal], G, h


def recomputed(z: Any, nu: Any, lam: Any, P: Any, q: Any, A: Any, b: Any, G: Any, h: Any) -> float:
    """The largest relative violation, from the original data."""

    def relative(value: np.ndarray, *terms: np.ndarray) -> float:
        scale = max([1.0, *(np.abs(t).max(initial=0) for t in terms)])
        return float(np.abs(value).max(initial=0)) / scale

    slope = (P @ z, q, A.T @ nu, G.T @ lam)
    gap = z @ (P @ z) + q @ z + b @ nu + h @ lam
    objective = abs(z @ (P @ z) / 2 + q @ z)
    return max(
        relative(sum(slope), *slope),
        relative(A @ z - b, A @ z, b),
        relative(np.maximum(G @ z - h, 0), G @ z, h),
        abs(gap) / (1 + objective),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=1200, help="variables plus rows, at most")
    parser.add_argument("--dense", type=int, default=1200, help="up to this size without sparsity")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that count as solved")
    parser.add_argument("--tol", type=float, default=1e-8)
    parser.add_argument("--names", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("WOODBURY_DATA", root / "../shared/data")) / "maros_meszaros"
    paths = sorted(folder.glob("*.mat"))
    if not paths:
        print(f"no problems at {folder}; set WOODBURY_DATA")
        return
    print(
        f"{'problem':<10} {'n':>5} {'eq':>5} {'ineq':>5} {'':6} status     steps  seconds  "
        "objective"
    )
    solved = tried = 0
    for path in paths:
        if options.names and path.stem not in options.names:
            continue
        shape = scipy.io.whosmat(path)
        size = next(sum(dims) for name, dims, _ in shape if name == "A")
        if size > options.size:
            continue
        tried += 1
        P, q, constant, A, b, G, h = load(path)
        sparse = size > options.dense
        matrices = [Sparse(M) if sparse else torch.from_numpy(M.toarray()) for M in (P, A, G)]
        vectors = [torch.from_numpy(v) for v in (q, b, h)]
        arguments = [t for pair in zip(matrices, vectors, strict=True) for t in pair]
        start = time.perf_counter()
        try:
            found = quadratic_program(*arguments, tol=options.tol, throw=False)
        except ArgumentError as error:
            print(f"{path.stem:<10} refused: {error}")
            continue
        seconds = time.perf_counter() - start
        z, nu, lam = (t.numpy() for t in (found.value, found.equality, found.inequality))
        worst = recomputed(z, nu, lam, P, q, A, b, G, h)
        good = found.ok and worst <= options.tol and seconds <= options.limit
        solved += good
        print(
            f"{path.stem:<10} {len(q):5d} {len(b):5d} {len(h):5d} "
            f"{'sparse' if sparse else 'dense':<6} {found.status.name:<10} "
            f"{found.steps:5d} {seconds:8.2f}  {z @ (P @ z) / 2 + q @ z + constant:+.8e}  "
            f"violation {worst:.1e}{'' if good else '  NOT SOLVED'}",
            flush=True,
        )
    print(
        f"solved {solved} of {tried} tried, of {len(paths)} in the set (the others are larger than "
        f"--size {options.size})"
    )


if __name__ == "__main__":
    main()
