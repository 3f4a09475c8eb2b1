"""Distil MNIST to ten images, one for each digit: implicit hypergradients against unrolled ones.

The experiment of Blondel et al. (2022, section 4.2). Inner problem: multinomial logistic regression
on the ten images, mean cross-entropy + l2 / 2 |W|^2 with l2 = 0.1, from ones, to a gradient of norm
1e-3. Outer problem: the images that minimise the cross-entropy of that model on all training
images, from N(0, 1) / 784, by 50 evaluations of L-BFGS. Pixels are in [0, 1], everything is in
float32. A second table has the tolerance 1e-5.

implicit: one linear solve by conjugate gradients to the tolerance, after gradient descent with the
step 1/L as for unrolling, or after LBFGS, which cannot be unrolled. unrolled: backward through the
steps of gradient descent. jaxopt (JAX, CPU, compiled; to compile is not counted): GradientDescent
with its defaults (acceleration and a line search) and at most 500 steps, all of which it runs to
unroll; on the images as many steps of gradient descent. Each runs in a process of its own, one
after the other. "inner" is the time of a hypergradient without the loss of the training images:
the median of 50 at the last images, for jaxopt the mean of the run less that loss and its
derivative. Memory is what the graph of the last hypergradient holds beside the
training images; for jaxopt, the temporary memory that XLA reserves. The error of that hypergradient
is relative to one by an inner solution to 1e-9 in float64. The test accuracy is that of a logistic
regression fitted to the ten images alone.

    python benchmarks/distillation.py [--threads 1] [--rows 60000] [--figure PATH] [--digits]

MNIST is read from $WOODBURY_DATA/mnist.npz (default ../shared/data); --digits takes the small
digits of scikit-learn instead. jaxopt is run by the interpreter in WOODBURY_PEERS_PYTHON, by
default .venv-peers/bin/python; without it its rows stay empty.
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
CLASSES = 10
SETTINGS = ((0.1, 1e-3), (0.1, 1e-5))  # l2 and tolerance of the inner problem
STEPS, PEER_STEPS = 20000, 500
OURS = ("implicit", "implicit, LBFGS", "unrolled")
PEERS = ("jaxopt, implicit", "jaxopt, unrolled")


def load(rows: int, digits: bool) -> dict[str, np.ndarray]:
    """Training and test images in [0, 1], flat."""
    if digits:
        from sklearn.datasets import load_digits

        X, y = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(X))
        X, y = (X[order] / 16).astype(np.float32), y[order]
        return {"X": X[:1200], "y": y[:1200], "Xt": X[1200:], "yt": y[1200:]}
    folder = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data"))
    path = folder / "mnist.npz"
    if not path.exists():
        raise SystemExit(f"{path} is missing: set WOODBURY_DATA, or take --digits")
    with np.load(path) as data:
        arrays = {name: data[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    flat = {
        name: arrays[name].reshape(-1, 784).astype(np.float32) / 255
        for name in arrays
        if name.startswith("x")
    }
    return {
        "X": flat["x_train"][:rows],
        "y": arrays["y_train"][:rows].astype(np.int64),
        "Xt": flat["x_test"],
        "yt": arrays["y_test"].astype(np.int64),
    }


def start(pixels: int) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((CLASSES, pixels)) / pixels).astype(np.float32)


def accuracy(images: np.ndarray, data: dict[str, np.ndarray], l2: float) -> float:
    """Of a logistic regression on ten images, by scikit-learn."""
    from sklearn.linear_model import LogisticRegression

    # Its objective is C times the sum of losses + |W|^2 / 2.
    model = LogisticRegression(C=1 / (l2 * CLASSES), fit_intercept=False, max_iter=2000)
    model.fit(images.astype(np.float64), np.arange(CLASSES))
    return float(model.score(data["Xt"], data["yt"]))


# --- woodbury ------------------------------------------------------------------------------------


def ours(
    way: str, data: dict[str, np.ndarray], l2: float, tol: float, evaluations: int
) -> dict[str, Any]:
    import torch
    from torch import Tensor
    from torch.nn.functional import cross_entropy

    from woodbury import CG
    from woodbury.implicit import LBFGS, Implicit, root

    X, y = torch.from_numpy(data["X"]), torch.from_numpy(data["y"])
    labels = torch.arange(CLASSES)
    ones = torch.ones(CLASSES, X.shape[1])
    taken: list[int] = []

    def inner(W: Tensor, images: Tensor) -> Tensor:
        return cross_entropy(images @ W.T, labels) + 0.5 * l2 * (W * W).sum()

    def gradient(W: Tensor, images: Tensor) -> Tensor:
        residual = torch.softmax(images @ W.T, 1) - torch.eye(CLASSES)
        return residual.T @ images / CLASSES + l2 * W

    def descend(W: Tensor, images: Tensor) -> Tensor:
        step = 1 / (torch.linalg.matrix_norm(images.detach(), 2) ** 2 / (2 * CLASSES) + l2)
        count = 0
        slope = gradient(W, images)
        while count < STEPS and slope.norm() > tol:
            W = W - step * slope
            slope = gradient(W, images)
            count += 1
        taken.append(count)
        return W

    def by_lbfgs(W: Tensor, images: Tensor) -> Tensor:
        found = LBFGS(tol=tol / max(1.0, gradient(W, images).norm().item())).run(inner, W, images)
        taken.append(found.steps)
        return found.value

    forward = by_lbfgs if way == "implicit, LBFGS" else descend
    mode: Any = "unrolled" if way == "unrolled" else Implicit(CG(rtol=tol))
    fitted = root(gradient, forward, mode=mode, symmetric=True, stationary_rtol=1e-2)

    columns, index = X.T.contiguous(), y.unsqueeze(0)

    def entropy(W: Tensor) -> Tensor:
        # Classes along the first axis: long rows are multiplied faster.
        return -torch.log_softmax(W @ columns, 0).gather(0, index).mean()

    def outer(images: Tensor) -> Tensor:
        return entropy(fitted(ones, images))

    first = torch.from_numpy(start(X.shape[1]))
    image = first.clone().requires_grad_()
    outer(image).backward()  # warms up
    taken.clear()
    began = time.perf_counter()
    found = LBFGS(tol=0.0, max_steps=evaluations).run(outer, first, throw=False)
    seconds = time.perf_counter() - began

    steps = float(np.mean(taken))

    # The hypergradient at the end beside one from an inner solution to 1e-9 in float64.
    images = found.value
    leaf = images.clone().requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (X, columns, y)}
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = outer(leaf)
    value.backward()
    W = fitted(ones, leaf)
    (cotangent,) = torch.autograd.grad(entropy(W), W)
    spent = []
    for _ in range(50):
        began = time.perf_counter()
        torch.autograd.grad(fitted(ones, leaf), leaf, cotangent)
        spent.append(time.perf_counter() - began)
    wide = images.double().requires_grad_()
    solver = LBFGS(tol=1e-9, max_steps=5000).differentiable(inner, mode=Implicit(CG(rtol=1e-9)))
    cross_entropy(X.double() @ solver(ones.double(), wide).T, y).backward()
    assert leaf.grad is not None
    assert wide.grad is not None
    return {
        "seconds": seconds,
        "inner": float(np.median(spent)),
        "memory": sum(held.values()) / 2**20,
        "steps": steps,
        "loss": value.item(),
        "error": ((leaf.grad - wide.grad).norm() / wide.grad.norm()).item(),
        "images": images.numpy().tolist(),
    }


# --- jaxopt --------------------------------------------------------------------------------------


def peer(
    way: str, data: dict[str, np.ndarray], l2: float, tol: float, evaluations: int
) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import jaxopt

    X, y = jnp.asarray(data["X"]), jnp.asarray(data["y"])
    labels = jnp.arange(CLASSES)
    ones = jnp.ones((CLASSES, X.shape[1]), jnp.float32)

    def entropy(W: Any, X: Any, y: Any) -> Any:
        logits = X @ W.T
        return jnp.mean(jax.nn.logsumexp(logits, 1) - logits[jnp.arange(len(y)), y])

    def inner(W: Any, images: Any) -> Any:
        return entropy(W, images, labels) + 0.5 * l2 * jnp.sum(W * W)

    solver = jaxopt.GradientDescent(
        inner,
        maxiter=PEER_STEPS,
        tol=tol,
        implicit_diff=way == "jaxopt, implicit",
        unroll=way == "jaxopt, unrolled",
    )

    def outer(images: Any, X: Any, y: Any) -> Any:
        W, state = solver.run(ones, images)
        return entropy(W, X, y), state.iter_num

    images = jnp.asarray(start(X.shape[1]))
    call = jax.jit(jax.value_and_grad(outer, has_aux=True)).lower(images, X, y).compile()
    taken: list[int] = []
    jax.block_until_ready(call(images, X, y))
    began = time.perf_counter()
    found = np.asarray(images)
    for _ in range(evaluations + 1):
        (loss, steps), slope = jax.block_until_ready(call(jnp.asarray(found), X, y))
        taken.append(int(steps))
        found = found - 1.0 * np.asarray(slope)
    seconds = time.perf_counter() - began
    slope_in_W = jax.jit(jax.grad(entropy)).lower(ones, X, y).compile()
    began = time.perf_counter()
    for _ in range(10):
        jax.block_until_ready(slope_in_W(ones, X, y))
    plain = (time.perf_counter() - began) / 10
    return {
        "seconds": seconds,
        "inner": seconds / (evaluations + 1) - plain,
        "memory": call.memory_analysis().temp_size_in_bytes / 2**20,
        "steps": float(np.mean(taken)),
        "loss": float(loss),
        "images": found.tolist(),
    }


# --- table ---------------------------------------------------------------------------------------


def run(way: str, l2: float, tol: float, options: argparse.Namespace) -> dict[str, Any] | None:
    """In a process of its own."""
    python = sys.executable
    if way in PEERS:
        python = os.environ.get("WOODBURY_PEERS_PYTHON", str(ROOT / ".venv-peers/bin/python"))
        if not Path(python).exists():
            return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        np.savez(path, **load(options.rows, options.digits))
        command = [python, __file__, "--way", way, "--load", str(path)]
        command += ["--threads", str(options.threads), "--evaluations", str(options.evaluations)]
        command += ["--setting", str(l2), str(tol)]
        threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        flags = f"--xla_cpu_multi_thread_eigen={str(options.threads > 1).lower()}"
        environment = {**os.environ, **threads, "XLA_FLAGS": flags}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        print(f"{way} did not run: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return dict(json.loads(done.stdout.splitlines()[-1]))


def figure(path: Path, images: np.ndarray, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    side = round(images.shape[1] ** 0.5)
    pictures, axes = plt.subplots(2, 5, figsize=(8, 3.6))
    size = np.abs(images).max()
    for digit, ax in enumerate(axes.flat):
        ax.imshow(images[digit].reshape(side, side), cmap="RdBu_r", vmin=-size, vmax=size)
        ax.set_title(str(digit))
        ax.axis("off")
    pictures.suptitle(title)
    pictures.tight_layout()
    pictures.savefig(path)


def table(
    data: dict[str, np.ndarray],
    l2: float,
    tol: float,
    options: argparse.Namespace,
    path: Path | None,
) -> None:
    print(f"\nl2 = {l2:g}, inner tolerance {tol:g}")
    print(
        f"{'way':<18} {'seconds':>8} {'ratio':>6} {'inner, ms':>10} {'ratio':>6} {'steps':>6} "
        f"{'MiB':>6} {'error':>8} {'loss':>7} {'test accuracy':>14}"
    )
    base: dict[str, Any] | None = None
    for way in (*OURS, *PEERS):
        row = run(way, l2, tol, options)
        if row is None:
            print(f"{way:<18} not there (WOODBURY_PEERS_PYTHON)")
            continue
        base = row if base is None else base
        images = np.asarray(row["images"], dtype=np.float32)
        right = accuracy(images, data, l2) if np.isfinite(images).all() else float("nan")
        error = f"{row['error']:8.1e}" if "error" in row else f"{'':>8}"
        print(
            f"{way:<18} {row['seconds']:8.2f} {row['seconds'] / base['seconds']:6.2f} "
            f"{1e3 * row['inner']:10.1f} {row['inner'] / base['inner']:6.2f} {row['steps']:6.0f} "
            f"{row['memory']:6.1f} {error} {row['loss']:7.4f} {100 * right:12.1f} %",
            flush=True,
        )
        if way == OURS[0] and path is not None:
            figure(path, images, f"test accuracy {100 * right:.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=60000)
    parser.add_argument("--evaluations", type=int, default=50)
    parser.add_argument("--setting", type=float, nargs=2, help="l2 and tolerance; default both")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way is not None:
        with np.load(options.load) as file:
            data = {name: file[name] for name in file}
        function: Callable[..., dict[str, Any]] = peer if options.way in PEERS else ours
        if options.way in OURS:
            import torch

            torch.set_num_threads(options.threads)
        print(json.dumps(function(options.way, data, *options.setting, options.evaluations)))
        return
    data = load(options.rows, options.digits)
    print(
        f"{len(data['X'])} training images, {options.evaluations} outer evaluations, "
        f"{options.threads} thread(s)"
    )
    settings = SETTINGS if options.setting is None else (tuple(options.setting),)
    for place, (l2, tol) in enumerate(settings):
        table(data, l2, tol, options, None if place else options.figure)


if __name__ == "__main__":
    main()
