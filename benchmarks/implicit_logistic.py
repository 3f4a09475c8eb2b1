"""Logistic regression on digits, one penalty per weight: solution and implicit hypergradient.

1,000 training rows of 64 pixels (divided by 16), 10 classes, 640 weights w and as many penalties:
mean cross-entropy + 1/2 sum_i exp(l_i) w_i^2, all exp(l_i) the same at first, minimised from zero
to a gradient of norm 1e-8 in float64; then the gradient in l of the cross-entropy of the other 797
rows. The time is that of both together.

woodbury: Newton's method, its systems by conjugate gradients with the inverse of the Hessian's
blocks (one for each class) as preconditioner, then implicit_vjp with the same recipe. jaxopt:
L-BFGS, compiled (to compile is not counted), with its default solver for the derivative, and with
its conjugate gradients to the same residual as here. All derivatives are compared with a dense one
by LAPACK.

    python benchmarks/implicit_logistic.py [--threads 1] [--repeats 10]

jaxopt is run by the interpreter in WOODBURY_PEERS_PYTHON, by default .venv-peers/bin/python;
without it its row stays empty.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from implicit_svm import ROOT, shortest

TRAINING = 1000
CLASSES = 10
PENALTIES = (1e-3, 1e-4, 1e-5)
GTOL = 1e-8


def draw() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = X[order] / 16, y[order]
    return {
        "X": X[:TRAINING],
        "y": y[:TRAINING],
        "Xv": X[TRAINING:],
        "yv": y[TRAINING:],
    }


# --- woodbury ------------------------------------------------------------------------------------


def ours(data: dict[str, np.ndarray], penalty: float, repeats: int) -> dict[str, Any]:
    import torch
    from torch import Tensor
    from torch.nn.functional import cross_entropy

    from woodbury import CG, FunctionOperator, solve
    from woodbury.implicit import implicit_vjp

    X, y, Xv, yv = (torch.from_numpy(data[name]) for name in ("X", "y", "Xv", "yv"))
    n, pixels = X.shape
    size = pixels * CLASSES
    targets = torch.nn.functional.one_hot(y, CLASSES).to(X.dtype)

    def operator(function: Any) -> FunctionOperator:
        tags = {"positive_definite"}
        return FunctionOperator(function, (size, size), tags=tags, dtype=X.dtype, vectorized=False)

    def blocks(P: Tensor, decay: Tensor) -> FunctionOperator:
        """The inverse of the Hessian's blocks, one for each class."""
        weights = P * (1 - P) / n
        H = torch.stack([X.T @ (weights[:, c, None] * X) for c in range(CLASSES)])
        factor = torch.linalg.cholesky(H + torch.diag_embed(decay))
        return operator(
            lambda v: torch.cholesky_solve(v.reshape(CLASSES, pixels, 1), factor).reshape(-1)
        )

    def minimise(decay: Tensor) -> tuple[Tensor, FunctionOperator]:
        W = torch.zeros(CLASSES, pixels, dtype=X.dtype)

        def at(W: Tensor) -> tuple[float, Tensor, Tensor]:
            logits = X @ W.T
            level = torch.logsumexp(logits, 1)
            value = (level - (logits * targets).sum(1)).mean() + 0.5 * (decay * W * W).sum()
            P = (logits - level[:, None]).exp()
            return value.item(), (P - targets).T @ X / n + decay * W, P

        value, slope, P = at(W)
        M = blocks(P, decay)
        for step in range(100):
            norm = slope.norm().item()
            if norm < GTOL:
                break
            if step in (2, 4, 6):
                M = blocks(P, decay)

            def hessian(v: Tensor, P: Tensor = P) -> Tensor:
                V = v.reshape(CLASSES, pixels)
                moved = P * (X @ V.T)
                moved = moved - P * moved.sum(1, keepdim=True)
                return (moved.T @ X / n + decay * V).reshape(-1)

            recipe = CG(rtol=min(0.1, max(norm**0.5, 0.3 * GTOL / norm)), preconditioner=M)
            found = solve(operator(hessian), -slope.reshape(-1), recipe, throw=False)
            move, length = found.value.reshape(CLASSES, pixels), 1.0
            gain = (move * slope).sum().item()
            while True:
                new = at(W + length * move)
                if new[0] <= value + 1e-4 * length * gain + 1e-15 or length < 1e-10:
                    break
                length /= 2
            W = W + length * move
            value, slope, P = new
        return W, M

    def loss(W: Tensor, levels: Tensor) -> Tensor:
        return cross_entropy(X @ W.T, y) + 0.5 * (levels.exp() * W * W).sum()

    def stationary(W: Tensor, levels: Tensor) -> Tensor:
        """The gradient of the loss, written out: one graph less than differentiating it."""
        return (torch.softmax(X @ W.T, 1) - targets).T @ (X / n) + levels.exp() * W

    stationary.symmetric = stationary.positive_definite = True

    def both() -> tuple[Tensor, Tensor, float]:
        levels = torch.full((CLASSES, pixels), penalty, dtype=X.dtype).log()
        W, M = minimise(levels.exp())
        at = W.detach().requires_grad_()
        value = cross_entropy(Xv @ at.T, yv)
        (cotangent,) = torch.autograd.grad(value, at)
        recipe = CG(rtol=1e-6, preconditioner=M)
        slope = implicit_vjp(stationary, W, (levels,), cotangent, argnums=0, recipe=recipe)
        return W, slope, value.item()

    both()
    seconds, (W, slope, value) = shortest(repeats, both)
    levels = torch.full((CLASSES, pixels), penalty, dtype=X.dtype).log()
    gradient, hessian = torch.func.grad(loss), torch.func.hessian(loss)
    H = hessian(W, levels).reshape(size, size)
    mixed = torch.func.jacrev(gradient, argnums=1)(W, levels).reshape(size, size)
    at = W.detach().requires_grad_()
    (cotangent,) = torch.autograd.grad(cross_entropy(Xv @ at.T, yv), at)
    exact = -mixed.T @ torch.linalg.solve(H, cotangent.reshape(-1))
    return {
        "seconds": seconds,
        "value": value,
        "gradient": gradient(W, levels).norm().item(),
        "exact": exact.numpy(),
        "slope": slope.detach().reshape(-1).numpy(),
    }


# --- jaxopt --------------------------------------------------------------------------------------


def peer(path: Path, penalty: float, repeats: int) -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import jaxopt

    data = np.load(path)
    X, y, Xv, yv = (jnp.asarray(data[name]) for name in ("X", "y", "Xv", "yv"))

    def entropy(W: Any, X: Any, y: Any) -> Any:
        logits = X @ W.T
        return jnp.mean(jax.nn.logsumexp(logits, 1) - logits[jnp.arange(len(y)), y])

    def loss(W: Any, levels: Any) -> Any:
        return entropy(W, X, y) + 0.5 * jnp.sum(jnp.exp(levels) * W * W)

    levels = jnp.full((CLASSES, X.shape[1]), np.log(penalty))
    found = {}
    ways = {
        "default": None,
        "CG": lambda A, b, **_: jaxopt.linear_solve.solve_cg(A, b, tol=1e-6, maxiter=1000),
    }
    for way, how in ways.items():
        solver = jaxopt.LBFGS(loss, maxiter=5000, tol=GTOL, implicit_diff_solve=how)

        def outer(levels: Any, solver: Any = solver) -> Any:
            W, state = solver.run(jnp.zeros(levels.shape), levels)
            return entropy(W, Xv, yv), (W, state.iter_num)

        call = jax.jit(jax.value_and_grad(outer, has_aux=True))
        jax.block_until_ready(call(levels))
        seconds, ((value, (W, steps)), slope) = shortest(
            repeats, lambda call=call: jax.block_until_ready(call(levels))
        )
        norm = float(jnp.linalg.norm(jax.grad(loss)(W, levels)))
        found[way] = {
            "seconds": seconds,
            "value": float(value),
            "gradient": norm,
            "slope": np.asarray(slope).reshape(-1).tolist(),
            "steps": int(steps),
        }
    print(json.dumps(found))


def theirs(data: dict[str, np.ndarray], penalty: float, repeats: int) -> dict[str, Any] | None:
    python = os.environ.get("WOODBURY_PEERS_PYTHON", str(ROOT / ".venv-peers/bin/python"))
    if not Path(python).exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        np.savez(path, **data)
        command = [python, __file__, "--peer", str(path), "--penalties", str(penalty)]
        command += ["--repeats", str(repeats)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        print(f"jaxopt did not run: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(run.stdout)


def compare(data: dict[str, np.ndarray], penalty: float, repeats: int) -> None:
    own, others = ours(data, penalty, repeats), theirs(data, penalty, repeats)
    exact = own["exact"]

    def line(name: str, row: dict[str, Any]) -> str:
        error = np.linalg.norm(np.asarray(row["slope"]) - exact) / np.linalg.norm(exact)
        return (
            f"{name:<16} {row['seconds'] * 1e3:8.1f} ms  |gradient| {row['gradient']:.1e}  "
            f"outer loss {row['value']:.8f}  error of the hypergradient {error:.1e}"
        )

    print(f"\npenalties {penalty:g}")
    print(line("woodbury", own))
    if others is None:
        print("jaxopt           not there (WOODBURY_PEERS_PYTHON)")
        return
    for way, row in others.items():
        ratio = row["seconds"] / own["seconds"]
        print(line(f"jaxopt, {way}", row), f" {row['steps']} steps  ratio {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--penalties", type=float, nargs="*", default=list(PENALTIES))
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer is not None:
        peer(options.peer, options.penalties[0], options.repeats)
        return
    import torch

    torch.set_num_threads(options.threads)
    flags = f"--xla_cpu_multi_thread_eigen={str(options.threads > 1).lower()}"
    os.environ.setdefault("XLA_FLAGS", flags)
    data = draw()
    print(f"digits, {TRAINING} rows, 640 penalties, threads {options.threads}")
    for penalty in options.penalties:
        compare(data, penalty, options.repeats)


if __name__ == "__main__":
    main()
