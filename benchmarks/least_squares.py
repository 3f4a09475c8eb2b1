"""Dense least squares at several condition numbers: a sketch as preconditioner beside LAPACK.

For each condition number prints the steps of woodbury's SketchPrecondition, the time with the
sketch, the excess of the residual over the least, and the error of the solution; SciPy's lstsq
(LAPACK's gelsy, a pivoted QR factorisation), which is the reference for the error, and SciPy's
LSQR, which sees the condition number, beside it; and the ratios of the times.

    python benchmarks/least_squares.py [--threads 1] [--rows 40000] [--columns 400]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch

from woodbury import Dense, SketchPrecondition, solve


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def system(m: int, n: int, condition: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of that condition number, and a right-hand side a thousandth outside its range."""
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    A = (Q * torch.logspace(0, -float(np.log10(condition)), n, dtype=torch.float64)) @ V.T
    b = A @ torch.randn(n, generator=generator, dtype=torch.float64)
    noise = torch.randn(m, generator=generator, dtype=torch.float64)
    return A.contiguous(), b + 1e-3 * float(b.norm() / noise.norm()) * noise


def compare(m: int, n: int, condition: float, limit: int) -> None:
    M, b = system(m, n, condition)
    A, matrix, right = Dense(M), M.numpy(), b.numpy()
    peer_time, peer = timed(lambda: scipy.linalg.lstsq(matrix, right, lapack_driver="gelsy"))
    exact = torch.from_numpy(peer[0])
    least = float((b - M @ exact).norm())
    print(f"condition {condition:.0e}: LAPACK {peer_time:.2f}")
    for sketch in ("sparse_sign", "gaussian"):
        recipe = SketchPrecondition(rtol=1e-8, sketch=sketch)
        ours_time, ours = timed(lambda r=recipe: solve(A, b, r, throw=False))
        excess = float((b - M @ ours.value).norm()) / least - 1
        error = float((ours.value - exact).norm() / exact.norm())
        print(
            f"  {sketch:12s} {ours.steps:4d} steps, {ours_time:6.2f}, {ours.status.name}, "
            f"residual above the least by {excess:.1e}, solution off by {error:.1e}; "
            f"time / LAPACK's {ours_time / peer_time:.2f}"
        )
    lsqr_time, found = timed(
        lambda: scipy.sparse.linalg.lsqr(matrix, right, atol=1e-14, btol=1e-14, iter_lim=limit)
    )
    excess = float((b - M @ torch.from_numpy(found[0])).norm()) / least - 1
    print(
        f"  SciPy LSQR   {found[2]:4d} steps, {lsqr_time:6.2f}, residual above the least by "
        f"{excess:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--columns", type=int, default=400)
    parser.add_argument("--limit", type=int, default=400, help="steps of LSQR")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.rows} x {options.columns}, {options.threads} threads; times in seconds")
    for condition in (1e2, 1e6, 1e10):
        compare(options.rows, options.columns, condition, options.limit)


if __name__ == "__main__":
    main()
