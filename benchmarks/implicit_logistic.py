"""Logistic regression on digits, one penalty per weight: solution and implicit hypergradient.

1,000 training rows of 64 pixels (divided by 16), 10 classes, 640 weights w and as many penalties:
mean cross-entropy + 1/2 sum_i exp(l_i) w_i^2, all exp(l_i) the same at first, minimised from zero
to a gradient of norm 1e-8 in float64; then the gradient in l of the cross-entropy of the other 797
rows. The time is that of both together.

woodbury: NewtonCG with the gradient in closed form, its systems preconditioned by the diagonal of
the Hessian in the eigenbases of a Kronecker product (EK-FAC), then implicit_vjp with the same
recipe. jaxopt: L-BFGS, compiled (to compile is not counted), with its default solver for the
derivative, and with its conjugate gradients to the same residual as here. All derivatives are
compared with a dense one by LAPACK.

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

    from woodbury import CG, FunctionOperator
    from woodbury.implicit import NewtonCG, implicit_vjp

    X, y, Xv, yv = (torch.from_numpy(data[name]) for name in ("X", "y", "Xv", "yv"))
    n, pixels = X.shape
    size = pixels * CLASSES
    # Classes along the first axis: rows of 1,000 numbers, not of 10.
    columns, rows, index = X.T.contiguous(), X / n, y.unsqueeze(0)

    def loss(W: Tensor, levels: Tensor) -> Tensor:
        likelihood = torch.log_softmax(W @ columns, 0).gather(0, index).mean()
        return 0.5 * (levels.exp() * W * W).sum() - likelihood

    targets = torch.nn.functional.one_hot(y, CLASSES).T.to(X.dtype)

    def gradient(W: Tensor, levels: Tensor) -> Tensor:
        P = torch.softmax(W @ columns, 0)
        return (P - targets) @ rows + levels.exp() * W

    U = torch.linalg.eigh(columns @ X)[1]
    squares = (X @ U) ** 2 / n

    def in_eigenbases(W: Tensor, levels: Tensor) -> FunctionOperator:
        """The inverse of the Hessian's diagonal in the bases of K-FAC, as EK-FAC has it."""
        P = torch.softmax(W @ columns, 0)
        V = torch.linalg.eigh(torch.diag(P.sum(1)) - P @ P.T)[1]
        curvature = ((V.T**2) @ P - (V.T @ P) ** 2) @ squares
        scale = 1 / (curvature + (V.T**2) @ levels.exp() @ U**2)

        def product(v: Tensor) -> Tensor:
            turned = V.T @ v.reshape(CLASSES, pixels) @ U
            return (V @ (turned * scale) @ U.T).reshape(-1)

        tags = {"positive_definite"}
        return FunctionOperator(product, (size, size), tags=tags, dtype=X.dtype, vectorized=False)

    solver = NewtonCG(tol=GTOL, preconditioner=in_eigenbases, gradient=gradient)

    def both() -> tuple[Tensor, Tensor, float]:
        levels = torch.full((CLASSES, pixels), penalty, dtype=X.dtype).log()
        W = solver.run(loss, torch.zeros_like(levels), levels).value
        at = W.detach().requires_grad_()
        value = cross_entropy(Xv @ at.T, yv)
        (cotangent,) = torch.autograd.grad(value, at)
        recipe = CG(rtol=1e-6, preconditioner=in_eigenbases(W, levels))
        slope = implicit_vjp(
            gradient, W, (levels,), cotangent, symmetric=True, argnums=0, recipe=recipe
        )
        return W, slope, value.item()

    both()
    seconds, (W, slope, value) = shortest(repeats, both)
    levels = torch.full((CLASSES, pixels), penalty, dtype=X.dtype).log()
    found = torch.func.grad(loss)(W, levels)
    # By LAPACK, from the closed form of the Hessian.
    P = torch.softmax(X @ W.T, 1)
    spread = torch.diag_embed(P) - P[:, :, None] * P[:, None, :]
    H = torch.einsum("nab,ni,nj->aibj", spread, X, X / n).reshape(size, size)
    H += torch.diag(levels.exp().reshape(-1))
    at = W.detach().requires_grad_()
    (cotangent,) = torch.autograd.grad(cross_entropy(Xv @ at.T, yv), at)
    exact = -(levels.exp() * W).reshape(-1) * torch.linalg.solve(H, cotangent.reshape(-1))
    return {
        "seconds": seconds,
        "value": value,
        "gradient": found.norm().item(),
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
