"""Preconditioners beside each other, beside SciPy's incomplete LU, and along a sequence of systems.

For each matrix and recipe: time to prepare, steps of conjugate gradients to a relative residual of
1e-8, and the time of the solve. Then a sequence of slowly changing systems by plain conjugate
gradients and with recycled Ritz vectors. Reads the matrices of the data folder (WOODBURY_DATA, by
default ../shared/data beside the repository).

    python benchmarks/preconditioners.py [--threads 1] [--repeats 3]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from solvers import RTOL, load, shortest

from woodbury import (
    CG,
    SSOR,
    BlockJacobi,
    Chebyshev,
    Deflation,
    IncompleteCholesky,
    Jacobi,
    Sparse,
    solve,
)
from woodbury.solvers import Recipe

MATRICES = ("bcsstk01", "bcsstk13", "bcsstk16", "airfoil", "unit_square", "bar")
RECIPES: dict[str, Recipe | None] = {
    "none": None,
    "Jacobi": Jacobi(),
    "blocks of 6": BlockJacobi(size=6),
    "SSOR": SSOR(),
    "Chebyshev, degree 3": Chebyshev(preconditioner=Jacobi()),
    "IC, level 0": IncompleteCholesky(drop=None),
    "IC, drop 1e-2": IncompleteCholesky(drop=1e-2),
    "IC, drop 1e-3": IncompleteCholesky(),
}


def by_scipy(A: Any, b: np.ndarray, repeats: int) -> tuple[float, int, float]:
    """SciPy's conjugate gradients with its incomplete LU, made symmetric in mode and threshold."""
    csc = A.tocsc()
    steps = 0

    def count(_: np.ndarray) -> None:
        nonlocal steps
        steps += 1

    def prepare() -> Any:
        return scipy.sparse.linalg.spilu(
            csc, 1e-3, 10, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0
        )

    ((prepared, factor),) = shortest(repeats, prepare)
    M = scipy.sparse.linalg.LinearOperator(A.shape, factor.solve)

    def run() -> int:
        nonlocal steps
        steps = 0
        limit = 10 * A.shape[0]
        _, info = scipy.sparse.linalg.cg(A, b, rtol=RTOL, maxiter=limit, M=M, callback=count)
        return steps if info == 0 else -1

    ((elapsed, found),) = shortest(1, run)
    return prepared, found, elapsed


def compare(name: str, A: Any, repeats: int) -> None:
    n = A.shape[0]
    b = A @ np.random.default_rng(0).standard_normal(n)
    operator, right = Sparse(A, tags={"positive_definite"}), torch.from_numpy(b)
    for label, M in RECIPES.items():
        recipe = CG(rtol=RTOL, max_steps=10 * n, preconditioner=M)
        (prepared, _), (elapsed, solution) = shortest(
            repeats,
            lambda recipe=recipe: recipe.prepare(operator),
            lambda recipe=recipe: solve(
                operator, right, recipe, state=recipe.prepare(operator), throw=False
            ),
        )
        extra = ""
        if isinstance(M, IncompleteCholesky):
            extra = f" shift {M.prepare(operator).shift:g}"
        print(
            f"{name:12} {label:20} prepared {1e3 * prepared:8.2f} ms {solution.steps:6} steps"
            f" {1e3 * elapsed:9.2f} ms in all, {solution.status.name}{extra}"
        )
    prepared, steps, elapsed = by_scipy(A, b, repeats)
    print(
        f"{name:12} {'SciPy, spilu 1e-3':20} prepared {1e3 * prepared:8.2f} ms "
        f"{steps if steps >= 0 else 'no':>6} steps {1e3 * (prepared + elapsed):9.2f} ms in all"
    )


def sequence(systems: int = 8, side: int = 100, rank: int = 20) -> None:
    """A grid whose reaction term changes slowly."""
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(side, side))
    grid = scipy.sparse.csr_array(scipy.sparse.kronsum(line, line))
    rng = np.random.default_rng(0)
    reaction = 1e-4 * rng.random(side * side)
    for label, M in (("none", None), ("IC, level 0", IncompleteCholesky(drop=None))):
        rows: dict[str, list[Any]] = {"CG": [], "Deflation": []}
        times = dict.fromkeys(rows, 0.0)
        state = None
        for i in range(systems):
            change = scipy.sparse.diags_array(reaction * (1 + 0.2 * i))
            A = Sparse(grid + change, tags={"positive_definite"})
            b = torch.from_numpy(rng.standard_normal(side * side))
            recipes = {
                "CG": CG(rtol=RTOL, preconditioner=M),
                "Deflation": Deflation(rtol=RTOL, preconditioner=M, rank=rank),
            }
            for name, recipe in recipes.items():
                start = time.perf_counter()
                found = solve(A, b, recipe, state=state if name == "Deflation" else None)
                times[name] += time.perf_counter() - start
                rows[name].append(found)
                if name == "Deflation":
                    state = found.state
        for name, found in rows.items():
            print(
                f"{systems} systems of size {side * side}, M {label}: {name:9} steps "
                f"{[s.steps for s in found]}, products {sum(s.products for s in found)}, "
                f"{1e3 * times[name]:.0f} ms"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("WOODBURY_DATA", root / "../shared/data")).resolve() / "matrices"
    if not folder.is_dir():
        sys.exit(f"no folder {folder}: set WOODBURY_DATA to the folder of public data sets")
    print(f"conjugate gradients to {RTOL:.0e}, {options.threads} thread(s)")
    for name in MATRICES:
        compare(name, load(folder, name), options.repeats)
    sequence()


if __name__ == "__main__":
    main()
