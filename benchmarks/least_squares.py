"""LSMR and LSQR beside SciPy's: systems with a solution, least squares, and a block of columns.

Steps to a relative residual of 1e-8 on square matrices, with the true residual reached and the
shortest time of several; each stops at 10 n steps, or earlier where neither would get there. For
least squares (the columns of a matrix of the pack doubled by rows of another) the figure is
||A^T r|| / (||A|| ||r||), recomputed for both: SciPy estimates ||A|| by a sum that grows with the
steps, so that with the same tolerance it stops earlier. Below, QR and LAPACK's gelsd on a dense
problem, and 32 right-hand sides together and one by one. Reads the matrices of the data folder
(WOODBURY_DATA, by default ../shared/data beside the repository).

    python benchmarks/least_squares.py [--threads 1] [--repeats 3]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
import torch
from solvers import load, shortest

from woodbury import LSMR, LSQR, QR, Dense, Diagonal, Sparse, solve

RTOL = 1e-8
LIMIT = 20_000
SQUARE = ("bcsstk01", "west0067", "olm1000", "cryg2500", "recirc_flow", "unit_square", "airfoil")
TALL = ("unit_square", "airfoil", "recirc_flow")
RECIPES = {"LSMR": LSMR, "LSQR": LSQR}


def by_scipy(method: str, A: Any, b: np.ndarray, limit: int, atol: float) -> tuple[Any, int]:
    if method == "LSMR":
        x, _, steps, *_ = scipy.sparse.linalg.lsmr(
            A, b, atol=atol, btol=RTOL, conlim=0, maxiter=limit
        )
    else:
        x, _, steps, *_ = scipy.sparse.linalg.lsqr(
            A, b, atol=atol, btol=RTOL, conlim=0, iter_lim=limit
        )
    return x, steps


def compare(label: str, A: Any, b: np.ndarray, repeats: int, *, consistent: bool) -> None:
    operator, right = Sparse(A), torch.from_numpy(b)
    limit = min(LIMIT, 10 * A.shape[1])
    size = 0.0
    if not consistent:
        size = float(scipy.sparse.linalg.svds(A, 1, return_singular_vectors=False)[0])

    def worth(x: np.ndarray) -> float:
        r = b - A @ x
        if consistent:
            return float(np.linalg.norm(r) / np.linalg.norm(b))
        return float(np.linalg.norm(A.T @ r) / (size * np.linalg.norm(r)))

    for method, recipe in RECIPES.items():
        # A residual that vanishes is asked for alone where there is one.
        atol = 0.0 if consistent else RTOL
        (theirs, (x, steps)), (ours, solution) = shortest(
            repeats,
            lambda method=method, atol=atol: by_scipy(method, A, b, limit, atol),
            lambda recipe=recipe: solve(
                operator, right, recipe(rtol=RTOL, max_steps=limit), throw=False
            ),
        )
        print(
            f"{label:24} {method:5} SciPy {steps:6} {worth(x):8.1e} {1e3 * theirs:9.1f} ms   "
            f"woodbury {solution.steps:6} {worth(solution.value.numpy()):8.1e} "
            f"{1e3 * ours:9.1f} ms {solution.status.name:13} steps {solution.steps / steps:6.3f}, "
            f"per step {ours / max(1, solution.steps) / (theirs / steps):5.2f}"
        )


def scaled(label: str, A: Any, b: np.ndarray) -> None:
    """Columns of very different lengths, with and without their scaling."""
    lengths = 10.0 ** np.random.default_rng(1).uniform(-2, 2, A.shape[1])
    A = (A @ scipy.sparse.diags_array(lengths)).tocsr()
    norms = np.sqrt(A.multiply(A).sum(axis=0))
    scaling = Diagonal(torch.from_numpy(1 / norms))
    operator, right = Sparse(A), torch.from_numpy(b)
    limit = min(LIMIT, 10 * A.shape[1])
    plain = solve(operator, right, LSMR(rtol=RTOL, max_steps=limit), throw=False)
    recipe = LSMR(rtol=RTOL, max_steps=limit, preconditioner=scaling)
    helped = solve(operator, right, recipe, throw=False)
    print(
        f"{label:24} columns scaled by 1e-2 to 1e2: LSMR {plain.steps} steps ({plain.status.name}),"
        f" with 1 / norms of the columns {helped.steps} ({helped.status.name})"
    )


def block(label: str, A: Any, columns: int, repeats: int) -> None:
    B = torch.from_numpy(np.random.default_rng(2).standard_normal((A.shape[0], columns)))
    operator, recipe = Sparse(A), LSMR(rtol=RTOL, max_steps=LIMIT)
    (together, solution), (apart, alone) = shortest(
        repeats,
        lambda: solve(operator, B, recipe, throw=False),
        lambda: [solve(operator, b, recipe, throw=False) for b in B.T.contiguous()],
    )
    print(
        f"{label:24} k = {columns}: {1e3 * together:.1f} ms together, {1e3 * apart:.1f} ms one by "
        f"one, ratio {apart / together:.2f}; column steps {sum(solution.info['column_steps'])} "
        f"against {sum(s.steps for s in alone)}"
    )


def direct(repeats: int) -> None:
    rng = np.random.default_rng(3)
    for m, n, rank in ((2000, 500, 500), (2000, 500, 300)):
        A = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
        b = rng.standard_normal(m)
        operator, right = Dense(torch.from_numpy(A)), torch.from_numpy(b)
        (theirs, (x, *_)), (ours, solution) = shortest(
            repeats,
            lambda A=A, b=b: scipy.linalg.lstsq(A, b, cond=1e-12),
            lambda operator=operator, right=right: solve(operator, right, QR()),
        )
        apart = np.linalg.norm(solution.value.numpy() - x) / np.linalg.norm(x)
        print(
            f"dense {m} x {n} of rank {rank}: LAPACK gelsd {1e3 * theirs:.0f} ms, QR "
            f"{1e3 * ours:.0f} ms, ratio {ours / theirs:.2f}; apart by {apart:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("WOODBURY_DATA", root / "../shared/data")).resolve() / "matrices"
    if not folder.is_dir():
        sys.exit(f"{folder} is missing: set WOODBURY_DATA to the folder with the data")
    print(f"{arguments.threads} thread(s), shortest of {arguments.repeats}, rtol {RTOL:g}")
    rng = np.random.default_rng(0)
    for name in SQUARE:
        A = load(folder, name)
        compare(name, A, A @ rng.standard_normal(A.shape[1]), arguments.repeats, consistent=True)
    for name in TALL:
        half = load(folder, name)
        half = half / abs(half).max()
        n = half.shape[0]
        order = rng.permutation(n)
        A = scipy.sparse.vstack([half, half[order][:, order[::-1]]]).tocsr()
        b = rng.standard_normal(2 * n)
        compare(f"{name} {2 * n} x {n}", A, b, arguments.repeats, consistent=False)
        scaled(f"{name} {2 * n} x {n}", A, b)
        block(f"{name} {2 * n} x {n}", A, 32, max(2, arguments.repeats // 2))
    direct(arguments.repeats)


if __name__ == "__main__":
    main()
