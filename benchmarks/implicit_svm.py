"""Hypergradient of a multiclass SVM through its dual: implicit, unrolled, and jaxopt (JAX, CPU).

The problem of Blondel et al. (2022, section 4.1): rows of x in the simplex minimise
theta/2 ||W||^2 + <x, Y> with W = X^T (Y - x) / theta; the outer loss is half the squared error of
the scores on as many validation rows, and the figure is the time for its value and derivative in
log theta, at theta = p (columns are standardised). 700 training rows, 5 classes, float64.

woodbury: accelerated projected gradient with restarts in the Gram matrix (forming it is in the
time), near the end Newton's method on the support, and one linear solve for the derivative.
Unrolled: the same accelerated method, differentiated through, in three ways. "fewest": the fewest
steps that bring its derivative to a relative error of 1e-5, which nobody knows beforehand; the time
is of that run alone. "doubled": 16 steps, then twice as many until the derivative changes by less
than 1e-5, all runs together: what one can do without knowing the answer. Then the 2,500 steps of
the paper. jaxopt: ProjectedGradient, compiled, stopped at the
same residual, the fastest of four ways (fixed step or line search, with X or with the Gram
matrix; to compile is not counted). Errors are relative to a solution to 1e-12.

    python benchmarks/implicit_svm.py [--threads 1] [--repeats 5] [--rows 700]

jaxopt is run by the interpreter in WOODBURY_PEERS_PYTHON, by default .venv-peers/bin/python;
without it its columns stay empty.
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

ROOT = Path(__file__).resolve().parents[1]
FEATURES = (100, 200, 500, 1000, 2000)
CLASSES = 5
TOL = 1e-6
ACCURACY = 1e-5  # of the unrolled derivative
PAPER = 2500  # steps that the paper unrolls


def draw(p: int, rows: int) -> dict[str, np.ndarray]:
    """Training and validation data."""
    from sklearn.datasets import make_classification

    X, y = make_classification(
        2 * rows, p, n_informative=min(p, 50), n_classes=CLASSES, random_state=0
    )
    X = (X - X.mean(0)) / X.std(0)
    Y = np.eye(CLASSES)[y]
    return {"X": X[:rows], "Y": Y[:rows], "Xv": X[rows:], "Yv": Y[rows:]}


def shortest(repeats: int, function: Callable[[], Any]) -> tuple[float, Any]:
    best, found = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        found = function()
        best = min(best, time.perf_counter() - start)
    return best, found


# --- woodbury ------------------------------------------------------------------------------------


def ours(data: dict[str, np.ndarray], repeats: int) -> dict[str, Any]:
    import torch
    from torch import Tensor

    from woodbury import GMRES
    from woodbury.implicit import attach, project_simplex

    X, Y, Xv, Yv = (torch.from_numpy(data[name]) for name in ("X", "Y", "Xv", "Yv"))
    start = torch.full_like(Y, 1 / CLASSES)

    def gram() -> Tensor:
        """X X^T, of which only blocks below the diagonal are computed."""
        K = X.new_empty(len(X), len(X))
        for first in range(0, len(X), 175):
            block = slice(first, first + 175)
            K[first:, block] = X[first:] @ X[block].T
            K[block, first + 175 :] = K[first + 175 :, block].T
        return K

    def times(K: Tensor, x: Tensor) -> Tensor:
        """K x for symmetric K: a few long rows are multiplied faster than a few long columns."""
        return (x.T.contiguous() @ K).T

    def radius(K: Tensor) -> float:
        """A bound of the largest eigenvalue that is rarely too small."""
        v = K.sum(1)
        for _ in range(10):
            v = K @ (v / v.norm())
        return 1.02 * v.norm().item()

    def accelerated(K: Tensor, q: Tensor, step: float, steps: int, tol: float, x: Tensor) -> Tensor:
        """FISTA with restarts (O'Donoghue and Candes 2015), until the residual is below tol."""
        z, t = x, 1.0
        for i in range(steps):
            new = project_simplex(z - step * (times(K, z) + q))
            moved = new - x
            with torch.no_grad():
                turned = bool(((z - new) * moved).sum() > 0)
                if tol and i % 8 == 7:
                    here = new - project_simplex(new - (times(K, new) + q))
                    if here.norm() < tol:
                        return new
            later = (1 + (1 + 4 * t * t) ** 0.5) / 2
            z, t = (new, 1.0) if turned else (new + (t - 1) / later * moved, later)
            x = new
        return x

    def on_support(K: Tensor, q: Tensor, x: Tensor) -> Tensor | None:
        """Newton's method in the free directions of the rows, where it stays feasible."""
        for _ in range(30):
            keep = x > 0
            pivot = x.argmax(1)
            keep[torch.arange(len(x)), pivot] = False
            rows, columns = keep.nonzero(as_tuple=True)
            if len(rows) > 1000:
                return None  # then first-order steps are cheaper
            Z = torch.zeros(len(rows), CLASSES, dtype=x.dtype)
            each = torch.arange(len(rows))
            Z[each, columns] = 1
            Z[each, pivot[rows]] -= 1
            H = K[rows][:, rows] * (Z @ Z.T)
            slope = (Z * (times(K, x) + q)[rows]).sum(1)
            factor, info = torch.linalg.cholesky_ex(H)
            if info:
                return None
            free = -torch.cholesky_solve(slope.unsqueeze(1), factor)
            step = torch.zeros_like(x).index_add_(0, rows, free * Z)
            shrink = step < 0
            limit = (x[shrink] / -step[shrink]).min().item() if shrink.any() else 1.0
            if limit >= 1:
                return (x + step).clamp_min(0)
            x = (x + limit * step).clamp_min(1e-15) * (x > 0)
            x = torch.where(x <= 2e-15, 0, x)
        return None

    def solve(theta: float, tol: float) -> tuple[Tensor, Tensor, float]:
        K = gram() / theta
        q = Y - times(K, Y)
        step = 1 / radius(K)

        def residual(x: Tensor) -> float:
            return (x - project_simplex(x - (times(K, x) + q))).norm().item()

        x = start
        for _ in range(40):
            x = accelerated(K, q, step, 120, tol, x)
            if residual(x) < tol:
                break
            better = on_support(K, q, x)
            if better is not None and residual(better) < residual(x):
                x = better
                if residual(x) < tol:
                    break
        return x, K, step

    def outer(x: Tensor, theta: Tensor) -> Tensor:
        W = X.T @ (Y - x) / theta
        return 0.5 * (Xv @ W - Yv).square().sum()

    def implicit(tol: float = TOL, rtol: float = 1e-6) -> tuple[float, float]:
        level = torch.tensor(float(np.log(X.shape[1])), dtype=X.dtype, requires_grad=True)
        theta = level.exp()
        x, K, step = solve(theta.item(), tol)

        G = K * theta.item()

        # projected_gradient(dual, project_simplex, step), with the gradient written out.
        def F(x: Tensor, theta: Tensor) -> Tensor:
            return x - project_simplex(x - step * (Y - times(G, Y - x) / theta))

        x = attach(F, x, theta, recipe=GMRES(rtol=rtol, restart=100))
        value = outer(x, theta)
        (slope,) = torch.autograd.grad(value, level)
        return value.item(), slope.item()

    def unrolled(steps: int) -> tuple[float, float]:
        level = torch.tensor(float(np.log(X.shape[1])), dtype=X.dtype, requires_grad=True)
        theta = level.exp()
        K = gram() / theta
        q = Y - times(K, Y)
        x = accelerated(K, q, 1 / radius(K.detach()), steps, 0.0, start)
        value = outer(x, theta)
        (slope,) = torch.autograd.grad(value, level)
        return value.item(), slope.item()

    exact = implicit(1e-12, 1e-13)[1]
    implicit()
    seconds, (value, slope) = shortest(repeats, implicit)
    steps = 16
    while steps < 5000 and abs(unrolled(steps)[1] / exact - 1) > ACCURACY:
        steps = int(steps * 1.25)
    other, (_, far) = shortest(max(2, repeats // 2), lambda: unrolled(steps))

    def doubled() -> tuple[int, float]:
        """Unroll until the derivative does not change: steps of the last run, and derivative."""
        count, before = 16, unrolled(16)[1]
        while count < 5000:
            count *= 2
            now = unrolled(count)[1]
            if abs(now - before) <= ACCURACY * abs(now):
                break
            before = now
        return count, now

    stopped, (count, last) = shortest(max(1, repeats // 3), doubled)
    full, _ = shortest(1, lambda: unrolled(PAPER))
    return {
        "seconds": seconds,
        "value": value,
        "exact": exact,
        "error": abs(slope / exact - 1),
        "unrolled": other,
        "steps": steps,
        "unrolled_error": abs(far / exact - 1),
        "doubled": stopped,
        "doubled_steps": count,
        "doubled_error": abs(last / exact - 1),
        "paper": full,
    }


# --- jaxopt --------------------------------------------------------------------------------------


def peer(path: Path, repeats: int) -> None:
    """What the other interpreter runs: reads the data, prints seconds, value and slope."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import jaxopt

    data = np.load(path)
    X, Y, Xv, Yv = (jnp.asarray(data[name]) for name in ("X", "Y", "Xv", "Yv"))
    radius = float(np.linalg.norm(data["X"], 2) ** 2)

    def project(x: Any, _: Any) -> Any:
        return jax.vmap(jaxopt.projection.projection_simplex)(x)

    def by_features(x: Any, level: Any, gram: Any) -> Any:
        W = X.T @ (Y - x) / jnp.exp(level)
        return 0.5 * jnp.exp(level) * jnp.sum(W * W) + jnp.vdot(x, Y)

    def by_gram(x: Any, level: Any, gram: Any) -> Any:
        left = Y - x
        return 0.5 / jnp.exp(level) * jnp.vdot(left, gram @ left) + jnp.vdot(x, Y)

    found = {}
    level = float(np.log(X.shape[1]))
    for form, fun in (("X", by_features), ("Gram", by_gram)):
        for rule, size in (("fixed step", float(np.exp(level)) / radius), ("line search", 0.0)):
            solver = jaxopt.ProjectedGradient(fun, project, stepsize=size, maxiter=5000, tol=TOL)

            def outer(level: Any, X: Any, solver: Any = solver, form: str = form) -> Any:
                gram = X @ X.T if form == "Gram" else 0.0
                x, state = solver.run(jnp.full(Y.shape, 1 / CLASSES), None, level, gram)
                W = X.T @ (Y - x) / jnp.exp(level)
                return 0.5 * jnp.sum((Xv @ W - Yv) ** 2), state.iter_num

            call = jax.jit(jax.value_and_grad(outer, has_aux=True))
            jax.block_until_ready(call(level, X))
            seconds, ((value, steps), slope) = shortest(
                repeats, lambda call=call: jax.block_until_ready(call(level, X))
            )
            found[f"{form}, {rule}"] = [seconds, float(value), float(slope), int(steps)]
    print(json.dumps(found))


def theirs(data: dict[str, np.ndarray], repeats: int) -> dict[str, Any] | None:
    python = os.environ.get("WOODBURY_PEERS_PYTHON", str(ROOT / ".venv-peers/bin/python"))
    if not Path(python).exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        np.savez(path, **data)
        command = [python, __file__, "--peer", str(path), "--repeats", str(repeats)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        print(f"jaxopt did not run: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=700)
    parser.add_argument("--features", type=int, nargs="*", default=list(FEATURES))
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer is not None:
        peer(options.peer, options.repeats)
        return
    import torch

    torch.set_num_threads(options.threads)
    flags = f"--xla_cpu_multi_thread_eigen={str(options.threads > 1).lower()}"
    os.environ.setdefault("XLA_FLAGS", flags)
    print(f"{options.rows} rows, {CLASSES} classes, threads {options.threads}; milliseconds")
    print(f"{'':24}|{'unrolled, fewest':^28}|{'unrolled, doubled':^29}|{PAPER:>6} |{'jaxopt':^31}")
    print(
        f"{'p':>5} {'implicit':>9} {'error':>8}|{'ms':>7} {'steps':>5} {'error':>8} {'ratio':>5}|"
        f"{'ms':>8} {'steps':>5} {'error':>8} {'ratio':>5}|{'ratio':>6} |"
        f"{'ms':>8} {'steps':>6} {'error':>8} {'ratio':>5}  way"
    )
    for p in options.features:
        data = draw(p, options.rows)
        own = ours(data, options.repeats)
        mine = own["seconds"]
        row = (
            f"{p:5d} {mine * 1e3:9.1f} {own['error']:8.1e}|"
            f"{own['unrolled'] * 1e3:7.0f} {own['steps']:5d} {own['unrolled_error']:8.1e} "
            f"{own['unrolled'] / mine:5.1f}|{own['doubled'] * 1e3:8.0f} {own['doubled_steps']:5d} "
            f"{own['doubled_error']:8.1e} {own['doubled'] / mine:5.1f}|{own['paper'] / mine:6.1f} |"
        )
        other = theirs(data, options.repeats)
        if other is not None:
            way, (seconds, _, slope, steps) = min(other.items(), key=lambda item: item[1][0])
            error = abs(slope / own["exact"] - 1)
            row += f"{seconds * 1e3:8.1f} {steps:6d} {error:8.1e} {seconds / mine:5.1f}  {way}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
