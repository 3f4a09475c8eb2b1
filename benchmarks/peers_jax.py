"""CG, GMRES, LSMR and the log-determinant beside lineax and matfree (JAX, compiled, CPU, float64).

Systems of 1,000 unknowns with a matrix in memory, and of 10,000 on a grid: there JAX applies the
stencil without a matrix, which is its fastest way, and woodbury multiplies by a sparse matrix.
JAX's times are those of compiled functions; the time to compile is printed apart and is not in the
ratio. All are told to stop at 1e-8; lineax counts restarts of GMRES, not steps. All residuals are
recomputed here from the solutions, for least squares as ||A^T r|| / (||A|| ||r||): there the peers
follow SciPy, whose estimate of ||A|| grows with the steps, so that they stop earlier. For the
log-determinant all take the same number of probes and of Lanczos steps with full
reorthogonalisation; printed is the error with the standard error. SciPy is beside where it has the
method.

    python benchmarks/peers_jax.py [--threads 1] [--repeats 5]

lineax and matfree are run by the interpreter in WOODBURY_PEERS_PYTHON, by default
.venv-peers/bin/python; without it their columns stay empty.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

ROOT = Path(__file__).resolve().parents[1]
RTOL = 1e-8
SIDE = 100  # of the grid
RESTART = 30
PROBES, STEPS = 20, 30
SHIFT = 0.01  # added to the Laplacian of the grid
WIND = 0.4
DAMPING = 0.1


def line(n: int, below: float, on: float, above: float) -> Any:
    return scipy.sparse.diags_array([below, on, above], offsets=[-1, 0, 1], shape=(n, n))


def systems() -> dict[str, tuple[Any, np.ndarray]]:
    """Matrix and right-hand side by name; a name says the method and the size."""
    rng = np.random.default_rng(0)
    n = 1000
    Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    definite = (Q * np.logspace(-3, 0, n)) @ Q.T
    definite = (definite + definite.T) / 2
    general = np.eye(n) + 0.85 / np.sqrt(n) * rng.standard_normal((n, n))
    U, _ = np.linalg.qr(rng.standard_normal((2 * n, n)))
    tall = (U * np.logspace(-1.5, 0, n)) @ Q.T
    eye = scipy.sparse.eye_array(SIDE)
    laplacian = scipy.sparse.kronsum(
        line(SIDE, -1.0, 2.0, -1.0), line(SIDE, -1.0, 2.0, -1.0)
    ).tocsr()
    poisson = (laplacian + SHIFT * scipy.sparse.eye_array(SIDE**2)).tocsr()
    drift = line(SIDE, -WIND, 0.0, WIND)
    wind = scipy.sparse.kron(drift, eye) + scipy.sparse.kron(eye, drift)
    step = line(SIDE, 0.0, -1.0, 1.0).tocsr()[:-1]
    gradient = scipy.sparse.vstack(
        [
            scipy.sparse.kron(step, eye),
            scipy.sparse.kron(eye, step),
            DAMPING * scipy.sparse.eye_array(SIDE**2),
        ]
    ).tocsr()
    matrices = {
        "cg 1000": definite,
        "cg 10000": poisson,
        "gmres 1000": general,
        "gmres 10000": (poisson + wind).tocsr(),
        "lsmr 1000": tall,
        "lsmr 10000": gradient,
        "logdet 1000": definite,
        "logdet 10000": poisson,
    }
    return {name: (A, rng.standard_normal(A.shape[0])) for name, A in matrices.items()}


def shortest(repeats: int, function: Callable[[], Any]) -> tuple[float, Any]:
    """The shortest time in seconds, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        best = min(best, time.perf_counter() - start)
    return best, result


# ------------------------------------------------------------------------ woodbury


def ours(name: str, A: Any, b: np.ndarray, repeats: int) -> tuple[float, Any, int]:
    """Seconds, the solution or the log-determinant, and steps."""
    import torch

    from woodbury import CG, GMRES, LSMR, Dense, Sparse, solve
    from woodbury.spectra import SLQ, logdet

    tags = {"positive_definite"} if name.startswith(("cg", "logdet")) else set()
    if scipy.sparse.issparse(A):
        operator: Any = Sparse(A, tags=tags)
    else:
        operator = Dense(torch.from_numpy(A), tags=tags)
    right = torch.from_numpy(b)
    method = name.split()[0]
    if method == "logdet":
        plan = SLQ(probes=PROBES, steps=STEPS)
        seconds, found = shortest(repeats, lambda: logdet(operator, plan))
        return seconds, (float(found.value), float(found.standard_error)), STEPS
    recipe: Any = {
        "cg": CG(rtol=RTOL),
        "gmres": GMRES(rtol=RTOL, restart=RESTART),
        "lsmr": LSMR(rtol=RTOL),
    }[method]
    seconds, solution = shortest(repeats, lambda: solve(operator, right, recipe))
    return seconds, solution.value.numpy(), solution.steps


def by_scipy(name: str, A: Any, b: np.ndarray, repeats: int) -> tuple[float, Any, int] | None:
    """The same by SciPy."""
    method = name.split()[0]
    if method == "logdet":
        return None
    if method == "lsmr":
        seconds, found = shortest(
            repeats, lambda: scipy.sparse.linalg.lsmr(A, b, atol=RTOL, btol=RTOL, conlim=0)
        )
        return seconds, found[0], found[2]
    steps = 0

    def count(_: object) -> None:
        nonlocal steps
        steps += 1

    def run() -> np.ndarray:
        nonlocal steps
        steps = 0
        if method == "cg":
            return scipy.sparse.linalg.cg(A, b, rtol=RTOL, callback=count)[0]
        return scipy.sparse.linalg.gmres(
            A, b, rtol=RTOL, restart=RESTART, callback=count, callback_type="pr_norm"
        )[0]

    seconds, x = shortest(repeats, run)
    return seconds, x, steps


# ----------------------------------------------------------------------------- JAX


def jax_products() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The stencils on the grid: Laplacian, with wind, and the stacked gradient."""
    import jax.numpy as jnp

    def neighbours(x: Any) -> tuple[Any, ...]:
        p = jnp.pad(x.reshape(SIDE, SIDE), 1)
        return p[1:-1, 1:-1], p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]

    def poisson(x: Any) -> Any:
        c, up, down, left, right = neighbours(x)
        return ((4 + SHIFT) * c - up - down - left - right).ravel()

    def convection(x: Any) -> Any:
        c, up, down, left, right = neighbours(x)
        spread = (4 + SHIFT) * c - up - down - left - right
        return (spread + WIND * (down - up + right - left)).ravel()

    def gradient(x: Any) -> Any:
        g = x.reshape(SIDE, SIDE)
        parts = (g[1:] - g[:-1]).ravel(), (g[:, 1:] - g[:, :-1]).ravel(), DAMPING * x
        return jnp.concatenate(parts)

    return poisson, convection, gradient


def jax_calls(method: str, product: Callable[..., Any], n: int, b: Any) -> dict[str, Any]:
    """The functions ``(M, b) -> (solution, steps)`` of the peers, to be compiled."""
    import jax
    import jax.numpy as jnp
    import lineax as lx
    from matfree import decomp, funm, lstsq, stochtrace

    if method == "logdet":
        tridiagonal = decomp.tridiag_sym(STEPS, reortho="full")
        estimate = stochtrace.estimator_monte_carlo_mean_and_sem(
            funm.monte_carlo_funm_sym_logdet(tridiagonal),
            stochtrace.sampler_signs(jnp.zeros(n), num=PROBES),
        )
        key = jax.random.key(0)
        return {"matfree": lambda M, b: (jnp.stack(estimate(lambda x: product(M, x), key)), STEPS)}

    # lineax tests norm(r / atol) <= 1: with the root mean square that is the relative residual.
    atol = RTOL * float(jnp.linalg.norm(b)) / np.sqrt(len(b))

    def rms(x: Any) -> Any:
        return jnp.sqrt(jnp.mean(jnp.square(x)))

    options: dict[str, Any] = {"rtol": 0.0, "atol": atol, "norm": rms, "max_steps": 100_000}
    solver = {
        "cg": lambda: lx.CG(**options),
        "gmres": lambda: lx.GMRES(restart=RESTART, **options),
        "lsmr": lambda: lx.LSMR(rtol=RTOL, atol=RTOL, max_steps=100_000, conlim=1e30),
    }[method]()
    tags = lx.positive_semidefinite_tag if method == "cg" else ()

    def by_lineax(M: Any, b: Any) -> Any:
        structure = jax.eval_shape(lambda: jnp.zeros(n))
        operator = lx.FunctionLinearOperator(lambda x: product(M, x), structure, tags)
        found = lx.linear_solve(operator, b, solver, throw=False)
        return found.value, found.stats["num_steps"]

    if method != "lsmr":
        return {"lineax": by_lineax}
    run = lstsq.lsmr(atol=RTOL, btol=RTOL, ctol=0.0)

    def by_matfree(M: Any, b: Any) -> Any:
        back = jax.linear_transpose(lambda x: product(M, x), jnp.zeros(n))
        x, stats = run(lambda u: back(u)[0], b)
        return x, stats["iteration_count"]

    return {"lineax": by_lineax, "matfree": by_matfree}


def child(folder: Path, repeats: int) -> None:
    """Runs in the interpreter of the peers: solutions to files, figures to standard output."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp

    poisson, convection, gradient = jax_products()
    stencils = {"cg": poisson, "gmres": convection, "lsmr": gradient, "logdet": poisson}
    figures: dict[str, Any] = {}
    for path in sorted(folder.glob("*.npz")):
        method = path.stem.split()[0]
        data = np.load(path)
        b, stencil = jnp.asarray(data["b"]), stencils[method]
        dense = "A" in data
        M = jnp.asarray(data["A"]) if dense else jnp.zeros(())
        product = (lambda M, x: M @ x) if dense else (lambda M, x, stencil=stencil: stencil(x))
        for peer, function in jax_calls(method, product, int(data["columns"]), b).items():
            start = time.perf_counter()
            compiled = jax.jit(function).lower(M, b).compile()
            compiling = time.perf_counter() - start
            jax.block_until_ready(compiled(M, b))

            def call(compiled: Any = compiled, M: Any = M, b: Any = b) -> Any:
                return jax.block_until_ready(compiled(M, b))

            seconds, (x, steps) = shortest(repeats, call)
            np.save(folder / f"{path.stem} {peer}.npy", np.asarray(x))
            figures.setdefault(path.stem, {})[peer] = [seconds, compiling, int(steps)]
    print(json.dumps(figures))


def theirs(folder: Path, threads: int, repeats: int) -> dict[str, Any] | None:
    python = os.environ.get("WOODBURY_PEERS_PYTHON", str(ROOT / ".venv-peers/bin/python"))
    if not Path(python).exists():
        print(f"lineax and matfree are missing: no interpreter at {python}")
        return None
    arguments = ["--child", str(folder), "--threads", str(threads), "--repeats", str(repeats)]
    run = subprocess.run([python, __file__, *arguments], capture_output=True, text=True)
    if run.returncode:
        print(f"lineax and matfree did not run: {run.stderr.strip()[-2000:]}")
        return None
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


# --------------------------------------------------------------------------- table


def quality(name: str, A: Any, b: np.ndarray, x: Any, exact: float) -> str:
    """What the answer is worth, recomputed."""
    if name.startswith("logdet"):
        value, error = x
        return f"{value - exact:+8.2f} +- {error:5.2f}"
    r = b - A @ x
    if name.startswith("lsmr"):
        norm = scipy.sparse.linalg.svds(A, 1, return_singular_vectors=False)[0]
        return f"{np.linalg.norm(A.T @ r) / np.linalg.norm(r) / norm:9.1e}"
    return f"{np.linalg.norm(r) / np.linalg.norm(b):9.1e}"


def log_determinant(A: Any) -> float:
    if not scipy.sparse.issparse(A):
        return float(np.linalg.slogdet(A)[1])
    waves = 2 - 2 * np.cos(np.pi * np.arange(1, SIDE + 1) / (SIDE + 1))
    return float(np.log(waves[:, None] + waves[None, :] + SHIFT).sum())


def table(repeats: int, threads: int) -> None:
    found = systems()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, (A, b) in found.items():
            matrix = {} if scipy.sparse.issparse(A) else {"A": A}
            np.savez(folder / f"{label}.npz", b=b, columns=A.shape[1], **matrix)
        figures = theirs(folder, threads, repeats)
        print(
            f"{'system':14} {'by':9} {'steps':>6} {'residual or error':>18} {'ms':>9} "
            f"{'us / step':>10} {'woodbury / it':>14} {'to compile':>11}"
        )
        for label, (A, b) in found.items():
            exact = log_determinant(A) if label.startswith("logdet") else 0.0
            mine, *answer = ours(label, A, b, repeats)
            rows = [("woodbury", mine, *answer, "")]
            for peer, (seconds, compiling, count) in (figures or {}).get(label, {}).items():
                y = np.load(folder / f"{label} {peer}.npy")
                rows.append((peer, seconds, y, count, f"{compiling:.2f} s"))
            scipys = by_scipy(label, A, b, repeats)
            if scipys is not None:
                rows.append(("SciPy", *scipys, ""))
            for place, (peer, seconds, x, count, words) in enumerate(rows):
                ratio = f"{mine / seconds:.2f}" if place else ""
                print(
                    f"{'' if place else label:14} {peer:9} {count:6} "
                    f"{quality(label, A, b, x, exact):>18} {1e3 * seconds:9.2f} "
                    f"{1e6 * seconds / count:10.1f} {ratio:>14} {words:>11}".rstrip()
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", type=Path)
    arguments = parser.parse_args()
    # For JAX, which takes no number of threads.
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[: arguments.threads])
    if arguments.child is not None:
        child(arguments.child, arguments.repeats)
        return
    import torch

    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} thread(s), shortest of {arguments.repeats}, {sys.platform}")
    table(arguments.repeats, arguments.threads)


if __name__ == "__main__":
    main()
