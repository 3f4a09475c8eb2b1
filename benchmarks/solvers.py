"""Krylov recipes beside SciPy's on the matrices of the data folder, and blocks beside columns.

One line for each matrix, method and preconditioner: steps to a true relative residual of 1e-8 (of
GMRES, inner ones with the same restart), the shortest time of several, their ratios and a verdict
(steps within 2 % or one step, time within 1.2 times). SciPy's steps are those after which its
iterate has that residual; its time is that of as many steps, with nothing watched. Then blocks of
right-hand sides against our own columns one by one and SciPy's (at least 4 times faster). Reads the
matrices of the data folder (WOODBURY_DATA, by default ../shared/data beside the repository).

    python benchmarks/solvers.py [--threads 1] [--repeats 5] [--columns 32] [--only NAME ...]
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
import scipy.sparse.linalg as peers
import torch

from woodbury import CG, GMRES, MINRES, BiCGSTAB, LinearOperator, Solution, Sparse, solve
from woodbury.solvers import BlockCG, IncompleteCholesky, Jacobi, Recipe

RTOL = 1e-8
RESTART = 30
# Stiffness matrices are definite; that of unit_square is singular, and the systems are consistent.
STIFF = ("bcsstk01", "bcsstk13", "bcsstk16", "airfoil", "unit_square", "bar")
GENERAL = ("recirc_flow", "cryg2500", "olm1000", "west0067", "helmholtz_2D")
OURS: dict[str, Callable[..., Recipe]] = {
    "CG": CG,
    "BlockCG": BlockCG,
    "MINRES": MINRES,
    "GMRES": lambda **options: GMRES(restart=RESTART, **options),
    "BiCGSTAB": BiCGSTAB,
}


class Peer(NamedTuple):
    """What SciPy does: a solve of so many steps at most, and whether they reach the tolerance."""

    run: Callable[[np.ndarray, int], np.ndarray]
    steps: int
    converged: bool


def load(folder: Path, name: str) -> Any:
    """A matrix as a SciPy CSR array."""
    for path in folder.glob(f"{name}.*"):
        if path.name.endswith(".triplets.gz"):
            with gzip.open(path) as lines:
                rows, columns, values = np.loadtxt(lines).T
            half = scipy.sparse.coo_array((values, (rows.astype(int), columns.astype(int))))
            return (half + half.T - scipy.sparse.diags_array(half.diagonal())).tocsr()
        if path.name.endswith(".mtx.gz"):
            return scipy.io.mmread(path, spmatrix=False).tocsr().astype(np.float64)
        A = scipy.sparse.csr_array(scipy.io.loadmat(path)["A"])
        return A.astype(np.complex128 if np.iscomplexobj(A.data) else np.float64)
    raise FileNotFoundError(f"no file for {name} in {folder}")


def right_hand_sides(A: Any, columns: int) -> np.ndarray:
    """``A`` times normal numbers: in its range, also where it is singular."""
    return A @ np.random.default_rng(0).standard_normal((A.shape[0], columns))


def shortest(repeats: int, *functions: Callable[[], Any]) -> list[tuple[float, Any]]:
    """The shortest time of each, called in turn, and what it returned."""
    found: list[tuple[float, Any]] = [(float("inf"), None)] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            result = function()
            found[i] = min(found[i][0], time.perf_counter() - start), result
    return found


def peer(method: str, A: Any, b: np.ndarray, M: Any, limit: int) -> Peer:
    """SciPy's method, and the first of its steps whose iterate has the residual."""
    goal = RTOL * np.linalg.norm(b)
    # A tolerance that is never met, so that the number of steps alone decides.
    if method == "GMRES":
        history: list[float] = []
        options: dict[str, Any] = {"M": M, "restart": RESTART, "atol": 0.0}
        _, info = peers.gmres(
            A,
            b,
            rtol=RTOL,
            maxiter=-(-limit // RESTART),
            callback=history.append,
            callback_type="pr_norm",
            **options,
        )
        cycles = -(-len(history) // RESTART)

        def run(b: np.ndarray, steps: int) -> np.ndarray:
            return peers.gmres(A, b, rtol=RTOL, maxiter=cycles, **options)[0]

        x = run(b, 0)
        reached = info == 0 and bool(np.linalg.norm(b - A @ x) <= 1.01 * goal)
        return Peer(run, len(history), reached)
    function = {"CG": peers.cg, "MINRES": peers.minres, "BiCGSTAB": peers.bicgstab}[method]
    strict = {"rtol": 1e-15} if method == "MINRES" else {"rtol": 1e-30, "atol": 0.0}

    def run(b: np.ndarray, steps: int, callback: Any = None) -> np.ndarray:
        return function(A, b, maxiter=steps, M=M, callback=callback, **strict)[0]

    steps = 0

    def watch(x: np.ndarray) -> None:
        nonlocal steps
        steps += 1
        if np.linalg.norm(b - A @ x) <= goal:
            raise StopIteration

    try:
        run(b, limit, watch)
    except StopIteration:
        return Peer(run, steps, True)
    return Peer(run, steps, False)


def verdict(value: float, limit: float) -> str:
    return "PASS" if value <= limit else "miss"


def single(name: str, A: Any, method: str, label: str, repeats: int) -> list[str]:
    """One right-hand side: prints a line, returns the verdicts."""
    limit = 10 * A.shape[0]
    b = right_hand_sides(A, 1)[:, 0]
    operator, M = of(A, method, label)
    recipe = OURS[method](rtol=RTOL, max_steps=limit, preconditioner=M)
    state = recipe.prepare(operator)
    theirs = peer(method, A, b, for_scipy(A, M, label), limit)
    right = torch.from_numpy(b)

    def ours() -> Solution:
        return solve(operator, right, recipe, state=state, throw=False)

    with torch.no_grad():
        (theirs_time, _), (ours_time, solution) = shortest(
            repeats, lambda: theirs.run(b, theirs.steps), ours
        )
    steps, times = solution.steps / theirs.steps, ours_time / theirs_time
    allowed = max(1.02, 1 + 1 / theirs.steps)  # no method takes half a step
    verdicts = ["-", "-"]
    if theirs.converged:
        met = solution.ok and float(solution.residual) <= 1.01 * RTOL
        verdicts = [verdict(steps if met else float("inf"), allowed), verdict(times, 1.2)]
    print(
        f"{name:12} {A.shape[0]:5} {A.nnz:7} {method:9} {label:7}"
        f" {theirs.steps:6} {'yes' if theirs.converged else 'no':3} {1e3 * theirs_time:9.2f} ms"
        f" {solution.steps:6} {float(solution.residual):8.1e} {solution.status.name:12}"
        f" {1e3 * ours_time:9.2f} ms  steps {steps:6.3f} {verdicts[0]:4}  time {times:6.2f}"
        f" {verdicts[1]}",
        flush=True,
    )
    return verdicts


def of(A: Any, method: str, label: str) -> tuple[Sparse, LinearOperator | None]:
    """Our operator, with the tags that the method needs, and a preconditioner made for it."""
    tags = {"positive_definite"} if method in ("CG", "BlockCG", "MINRES") else set()
    operator = Sparse(A, tags=tags)
    kinds = {"Jacobi": Jacobi(), "IC(0)": IncompleteCholesky()}
    if label not in kinds:
        return operator, None
    recipe = kinds[label]
    return operator, recipe.as_preconditioner(operator, recipe.prepare(operator))


def for_scipy(A: Any, M: LinearOperator | None, label: str) -> Any:
    """The same preconditioner for SciPy: a diagonal matrix, or our triangular solves."""
    if M is None:
        return None
    return scipy.sparse.diags_array(1 / A.diagonal()) if label == "Jacobi" else M.to_scipy()


def block(name: str, A: Any, method: str, label: str, columns: int, repeats: int) -> list[str]:
    """A block of right-hand sides against its columns one by one: ours, and SciPy's."""
    B = right_hand_sides(A, columns)
    operator, M = of(A, method, label)
    recipe = OURS[method](rtol=RTOL, preconditioner=M)
    state = recipe.prepare(operator)
    right = torch.from_numpy(B)
    limit = 10 * A.shape[0]
    P = for_scipy(A, M, label)
    theirs = peer("CG" if method == "BlockCG" else method, A, B[:, 0].copy(), P, limit)
    # One column of a block method is CG.
    single_recipe = CG(rtol=RTOL, preconditioner=M) if method == "BlockCG" else recipe
    single_state = single_recipe.prepare(operator)
    apart = [b.contiguous() for b in right.T]

    def one_by_one() -> list[Solution]:
        return [solve(operator, b, single_recipe, state=single_state, throw=False) for b in apart]

    def by_scipy() -> None:
        for b in B.T:
            theirs.run(np.ascontiguousarray(b), theirs.steps)

    with torch.no_grad():
        (together, solution), (alone, singles), (scipys, _) = shortest(
            repeats,
            lambda: solve(operator, right, recipe, state=state, throw=False),
            one_by_one,
            by_scipy,
        )
    verdicts = [verdict(4 * together, scipys), verdict(4 * together, alone)]
    print(
        f"{name:12} {method:9} {label:7} k = {columns}: {1e3 * together:8.1f} ms together"
        f" ({solution.status.name}), one by one {1e3 * alone:8.1f} ms, by SciPy"
        f" {1e3 * scipys:8.1f} ms; ratio to SciPy {scipys / together:5.2f} {verdicts[0]}, to ours"
        f" {alone / together:5.2f} {verdicts[1]}; column steps"
        f" {sum(solution.info['column_steps'])} against {sum(s.steps for s in singles)}",
        flush=True,
    )
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--columns", type=int, default=32)
    parser.add_argument("--only", nargs="*", help="names of matrices")
    parser.add_argument("--no-blocks", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("WOODBURY_DATA", root / "../shared/data")).resolve() / "matrices"
    if not folder.is_dir():
        sys.exit(f"no folder {folder}: set WOODBURY_DATA to the folder of public data sets")
    names = [name for name in (*STIFF, *GENERAL) if not options.only or name in options.only]
    matrices = {name: load(folder, name) for name in names}
    print(
        f"SciPy {scipy.__version__} and woodbury on torch {torch.__version__} to a true residual of"
        f" {RTOL:.0e}, GMRES({RESTART}), {options.threads} thread(s)\n"
        f"{'matrix':12} {'n':>5} {'nnz':>7} {'method':9} {'M':7} {'SciPy':>6} {'met':3}"
        f" {'time':>12} {'ours':>6} {'residual':8} {'status':12} {'time':>12}  ratios"
    )
    verdicts: list[list[str]] = []
    for name, A in matrices.items():
        if name in STIFF:
            cases = [(m, "none") for m in ("CG", "MINRES")]
            cases += [("CG", "Jacobi"), ("MINRES", "Jacobi"), ("CG", "IC(0)"), ("MINRES", "IC(0)")]
        else:
            cases = [("GMRES", "none"), ("BiCGSTAB", "none")]
        for method, label in cases:
            repeats = options.repeats if A.nnz < 50_000 else max(1, options.repeats // 2)
            verdicts.append(single(name, A, method, label, repeats))
    total = [v for v in verdicts if v[0] != "-"]
    for place, what in enumerate(("steps", "time")):
        good = sum(v[place] == "PASS" for v in total)
        print(f"{what}: {good} of {len(total)} lines where SciPy converges")
    if options.no_blocks:
        return
    blocks = []
    for name, A in matrices.items():
        method, label = ("CG", "Jacobi") if name in STIFF else ("GMRES", "none")
        if name in ("recirc_flow", "helmholtz_2D") or name in STIFF:
            for kind in ("CG", "BlockCG") if name in STIFF else (method,):
                repeats = 1 + (A.nnz < 50_000)
                blocks.append(block(name, A, kind, label, options.columns, repeats))
    for place, what in enumerate(("SciPy's columns", "our columns")):
        good = sum(v[place] == "PASS" for v in blocks)
        print(f"blocks against {what} one by one, at least 4 times faster: {good} of {len(blocks)}")


if __name__ == "__main__":
    main()
