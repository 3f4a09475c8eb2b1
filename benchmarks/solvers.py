"""Conjugate gradients beside SciPy's on stiffness matrices, and a block beside its columns.

Prints steps to a relative residual of 1e-8, the true residual reached, the shortest time of
several, and the ratio. Reads the matrices of the data folder (WOODBURY_DATA, by default
../shared/data beside the repository).

    python benchmarks/solvers.py [--threads 1] [--repeats 5] [--columns 32]
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.io
import scipy.sparse
import scipy.sparse.linalg
import torch

from woodbury import CG, Diagonal, FunctionOperator, Identity, Nystrom, Solution, Sparse, solve

RTOL = 1e-8
MATRICES = ("bcsstk01", "bcsstk13", "bcsstk16", "airfoil", "unit_square", "bar")


class Peer(NamedTuple):
    """What SciPy did."""

    steps: int
    converged: bool
    residual: float


def load(folder: Path, name: str) -> Any:
    """A symmetric matrix as a SciPy CSR array."""
    for path in folder.glob(f"{name}.*"):
        if path.name.endswith(".triplets.gz"):
            with gzip.open(path) as lines:
                rows, columns, values = np.loadtxt(lines).T
            half = scipy.sparse.coo_array((values, (rows.astype(int), columns.astype(int))))
            return (half + half.T - scipy.sparse.diags_array(half.diagonal())).tocsr()
        if path.name.endswith(".mtx.gz"):
            return scipy.io.mmread(path, spmatrix=False).tocsr()
        return scipy.sparse.csr_array(scipy.io.loadmat(path)["A"]).astype(np.float64)
    raise FileNotFoundError(f"no file for {name} in {folder}")


def shortest(repeats: int, *functions: Callable[[], Any]) -> list[tuple[float, Any]]:
    """The shortest time of each, called in turn, and what it returned."""
    found: list[tuple[float, Any]] = [(float("inf"), None)] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            result = function()
            found[i] = min(found[i][0], time.perf_counter() - start), result
    return found


def by_scipy(A: Any, b: np.ndarray, M: Any, limit: int) -> Peer:
    steps = 0

    def count(_: np.ndarray) -> None:
        nonlocal steps
        steps += 1

    x, info = scipy.sparse.linalg.cg(A, b, rtol=RTOL, maxiter=limit, M=M, callback=count)
    return Peer(steps, info == 0, float(np.linalg.norm(b - A @ x) / np.linalg.norm(b)))


def single(name: str, A: Any, repeats: int) -> None:
    """One right-hand side, with and without Jacobi's preconditioner."""
    n = A.shape[0]
    limit = 10 * n
    b = A @ np.random.default_rng(0).standard_normal(n)
    operator, right = Sparse(A, tags={"positive_definite"}), torch.from_numpy(b)
    inverse_diagonal = 1 / A.diagonal()
    jacobi = Diagonal(torch.from_numpy(inverse_diagonal), tags={"positive_definite"})
    peers = scipy.sparse.diags_array(inverse_diagonal)
    for label, M, P in (("none", None, None), ("Jacobi", peers, jacobi)):
        recipe = CG(rtol=RTOL, max_steps=limit, preconditioner=P)

        def theirs(M: Any = M) -> Peer:
            return by_scipy(A, b, M, limit)

        def ours(recipe: CG = recipe) -> Solution:
            return solve(operator, right, recipe, throw=False)

        (theirs_time, peer), (ours_time, solution) = shortest(repeats, theirs, ours)
        peer_status = "converged" if peer.converged else "max_steps"
        print(
            f"{name:12} {n:7} {A.nnz:7} {label:7}"
            f" {peer.steps:6} {peer.residual:8.1e} {peer_status:10} {1e3 * theirs_time:9.2f} ms"
            f" {solution.steps:6} {float(solution.residual):8.1e} {solution.status.name:10}"
            f" {1e3 * ours_time:9.2f} ms {solution.steps / peer.steps:6.3f}"
            f" {ours_time / theirs_time:6.2f}"
        )


def block(name: str, A: Any, columns: int, repeats: int) -> None:
    """A block of right-hand sides, against its columns one by one."""
    B = torch.from_numpy(A @ np.random.default_rng(0).standard_normal((A.shape[0], columns)))
    operator = Sparse(A, tags={"positive_definite"})
    jacobi = Diagonal(torch.from_numpy(1 / A.diagonal()), tags={"positive_definite"})
    recipe = CG(rtol=RTOL, preconditioner=jacobi)

    def one_by_one() -> list[Solution]:
        return [solve(operator, b, recipe, throw=False) for b in B.T.contiguous()]

    (together, solution), (apart, alone) = shortest(
        max(2, repeats // 2), lambda: solve(operator, B, recipe, throw=False), one_by_one
    )
    steps = sum(s.steps for s in alone)
    print(
        f"{name:12} k = {columns}: {1e3 * together:9.1f} ms together, {1e3 * apart:9.1f} ms one by "
        f"one, ratio {apart / together:5.2f}; products {solution.products} against "
        f"{sum(s.products for s in alone)}, column steps {sum(solution.info['column_steps'])} "
        f"against {steps}"
    )


def nystrom(repeats: int) -> None:
    """Nystrom-preconditioned against plain CG on a dense kernel matrix with a small ridge."""
    x = torch.randn(2000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    K = torch.exp(-0.1 * torch.cdist(x, x).square()) + 1e-3 * torch.eye(2000, dtype=torch.float64)
    H = FunctionOperator(
        lambda X: K @ X - 1e-3 * X, (2000, 2000), tags={"positive_semidefinite"}, dtype=K.dtype
    )
    A, b = H + 1e-3 * Identity(2000), torch.ones(2000, dtype=K.dtype)
    recipe = CG(rtol=RTOL, preconditioner=Nystrom(rank=400))
    (plain_time, plain), (helped_time, helped) = shortest(
        repeats,
        lambda: solve(A, b, CG(rtol=RTOL), throw=False),
        lambda: solve(A, b, recipe, throw=False),
    )
    print(
        f"RBF kernel n = 2000, ridge 1e-3: CG {plain.steps} steps {1e3 * plain_time:.0f} ms, with "
        f"Nystrom(rank=400) {helped.steps} steps {1e3 * helped_time:.0f} ms (sketch included), "
        f"products {plain.products} against {helped.products}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--columns", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("WOODBURY_DATA", root / "../shared/data")).resolve() / "matrices"
    if not folder.is_dir():
        sys.exit(f"no folder {folder}: set WOODBURY_DATA to the folder of public data sets")
    matrices = {name: load(folder, name) for name in MATRICES}
    n = 1_000_000
    matrices["line"] = scipy.sparse.diags_array(
        [-1.0, 2.1, -1.0], offsets=[-1, 0, 1], shape=(n, n)
    ).tocsr()
    print(f"SciPy {scipy.__version__} and woodbury to {RTOL:.0e}, {options.threads} thread(s)")
    print(
        f"{'matrix':12} {'n':>7} {'nnz':>7} {'M':7} {'SciPy':>6} {'residual':>8} {'':10} {'':12}"
        f" {'steps':>6} {'residual':>8} {'':10} {'':12} {'steps':>6} {'time':>6}"
    )
    for name, A in matrices.items():
        single(name, A, options.repeats)
    for name in ("bar", "bcsstk13", "bcsstk16"):
        block(name, matrices[name], options.columns, options.repeats)
    nystrom(max(1, options.repeats // 2))


if __name__ == "__main__":
    main()
