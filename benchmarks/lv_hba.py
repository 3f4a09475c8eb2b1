"""LV-HBA: the toy of the paper against its closed form, and support vector machines.

Toy (n = 100): F = |x - y2|^2 / 2 + |y1 - e|^2 / 2, f = |y1|^2 / 2 - x'y1 + e'y2, subject to
e'x + e'y1 + e'y2 = 0, whose solution is x = -0.3 e, y1 = 0.7 e, y2 = -0.4 e, F = 5. The inner
solution is not unique. Printed is the relative error of x, with lambda updated by the new theta
(as in woodbury) and by the old one (as in the authors' script, whose constants the last line has).

Support vector machines: inner |w|^2 / 2 + sum_i exp(C_i) xi_i^2 / 2 subject to
1 - xi_i - y_i (w'x_i + b) <= 0, one penalty C_i for each row; outer the paper's smooth count of
errors on validation rows, sum leakyrelu(2 sigmoid(-5 y f / |w|) - 1). 500 rows to fit, 150 to
validate, the others to test, as in the paper; its data (diabetes, fourclass) are not in the data
pack, so: svmguide1, splice, breast cancer. Beside it scikit-learn's linear machine with squared
hinge loss, its one C from 13 by the same validation rows, and at the C where LV-HBA starts.

    python benchmarks/lv_hba.py [--splits 5] [--small] [--figure lv_hba.svg]

The data pack is found through WOODBURY_DATA (default ../shared/data beside the repository).
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from woodbury import Dense, solve
from woodbury.bilevel import LVHBA
from woodbury.solvers import Cholesky

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data")).resolve()
MARKS = (500, 1500, 5000)


# --- the toy -------------------------------------------------------------------------------------


def toy(n: int, steps: int, penalty: tuple[float, float]) -> list[tuple[int, float, float, float]]:
    """Step, relative error of x, outer value and estimated gap."""
    e = torch.ones(n, dtype=torch.float64)

    def constraint(y: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x.sum() + y["y1"].sum() + y["y2"].sum()).reshape(1)

    def project(y: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        shift = constraint(y, x) / (3 * n)
        return {name: part - shift for name, part in y.items()}, x - shift

    x = 10 * e
    method = LVHBA(
        lambda y, x: 0.5 * y["y1"].square().sum() - x @ y["y1"] + y["y2"].sum(),
        lambda y, x: 0.5 * (x - y["y2"]).square().sum() + 0.5 * (y["y1"] - 1).square().sum(),
        constraint,
        {"y1": 10 * e, "y2": 10 * e},
        x,
        project=project,
        equality=True,
        multiplier=1.0,
        penalty=penalty,
    )
    rows = []
    for k in range(1, steps + 1):
        seen = method.step()
        if k % 50 == 0:
            error = ((x + 0.3 * e).norm() / (0.3 * e).norm()).item()
            rows.append((k, error, seen.outer_value, seen.gap))
    return rows


def authors(n: int, steps: int, c: float) -> list[tuple[int, float]]:
    """The authors' update by its formulas: theta and lambda from the same old point."""
    x, y = np.full(n, 10.0), np.full((2, n), 10.0)
    shift = (x.sum() + y.sum()) / (3 * n)
    x, y = x - shift, y - shift
    theta, lam, z, rows = np.ones((2, n)), 1.0, -1.0, []
    for k in range(steps):
        slope = np.stack([theta[0] - x + lam, np.full(n, 1 + lam)]) + (theta - y) / 10
        climb = x.sum() + theta.sum() - (lam - z) / 10
        theta, lam = theta - 0.01 * slope, float(np.clip(lam + 0.01 * climb, -1000, 1000))
        ck = c * (k + 1) ** 0.3
        d_x = (x - y[1]) / ck - y[0] + theta[0] - lam
        d_y = np.stack([y[0] - 1, y[1] - x]) / ck + np.stack([y[0] - x, np.ones(n)])
        x, y = x - 0.008 * d_x, y - 0.008 * (d_y - (y - theta) / 10)
        shift = (x.sum() + y.sum()) / (3 * n)
        x, y = x - shift, y - shift
        z = float(np.clip(z + 0.02 * (lam - z) / 10, -1000, 1000))
        if (k + 1) % 50 == 0:
            rows.append((k + 1, float(np.linalg.norm(x + 0.3) / (0.3 * n**0.5))))
    return rows


# --- support vector machines ---------------------------------------------------------------------


def table(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Features in [-1, 1] and labels -1, 1."""
    if name == "breast cancer":
        from sklearn.datasets import load_breast_cancer

        x, y = load_breast_cancer(return_X_y=True)
    else:
        from sklearn.datasets import load_svmlight_file

        path = DATA / "libsvm" / f"{name}.txt.gz"
        if not path.exists():
            sys.exit(f"{path} is missing: set WOODBURY_DATA to the data pack")
        with gzip.open(path) as file:
            x, y = load_svmlight_file(file)
        x = x.toarray()
    low, high = x.min(0), x.max(0)
    return 2 * (x - low) / np.maximum(high - low, 1e-12) - 1, np.where(y > 0, 1.0, -1.0)


class Machine:
    """A support vector machine with a penalty for each row."""

    def __init__(self, x: Tensor, y: Tensor, xv: Tensor, yv: Tensor, seed: int) -> None:
        self.x, self.y, self.xv, self.yv = x, y, xv, yv
        self.rows = torch.cat([y[:, None] * x, y[:, None]], 1)  # margins are rows @ (w, b)
        gen = torch.Generator().manual_seed(seed)
        self.C = torch.rand(len(y), generator=gen, dtype=torch.float64) - 6
        self.params = {
            "w": torch.ones(x.shape[1], dtype=torch.float64),
            "b": torch.zeros(1, dtype=torch.float64),
            "xi": torch.ones(len(y), dtype=torch.float64),
        }

    def inner(self, p: dict[str, Tensor], C: Tensor) -> Tensor:
        return 0.5 * p["w"].square().sum() + 0.5 * (C.exp() * p["xi"].square()).sum()

    def outer(self, p: dict[str, Tensor], C: Tensor) -> Tensor:
        margins = self.yv * (self.xv @ p["w"] + p["b"]) / p["w"].norm()
        return torch.nn.functional.leaky_relu(2 * torch.sigmoid(-5 * margins) - 1).sum()

    def constraint(self, p: dict[str, Tensor], C: Tensor) -> Tensor:
        return 1 - p["xi"] - self.rows @ torch.cat([p["w"], p["b"]])

    def project(self, p: dict[str, Tensor], C: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Exact: xi is eliminated, and Newton's method ends on the piecewise quadratic left."""
        start = torch.cat([p["w"], p["b"]])
        u, eye = start, torch.eye(len(start), dtype=start.dtype)
        for _ in range(50):
            lack = (1 - self.rows @ u - p["xi"]).clamp_min(0)
            slope = u - start - self.rows.T @ lack
            if slope.norm() <= 1e-12 * (1 + u.norm()):
                break
            active = self.rows[lack > 0]
            curvature = Dense(eye + active.T @ active, tags={"positive_definite"})
            step, length = solve(curvature, slope, Cholesky()).value, 1.0
            value = self._distance(u, start, p["xi"])
            while length > 1e-8 and self._distance(u - length * step, start, p["xi"]) > value:
                length /= 2
            u = u - length * step
        xi = torch.maximum(p["xi"], 1 - self.rows @ u)
        return {"w": u[:-1], "b": u[-1:], "xi": xi}, C

    def _distance(self, u: Tensor, start: Tensor, xi: Tensor) -> float:
        lack = (1 - self.rows @ u - xi).clamp_min(0)
        return (0.5 * (u - start).square().sum() + 0.5 * lack.square().sum()).item()

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return (y * (x @ self.params["w"] + self.params["b"]) > 0).double().mean().item()


def machine(name: str, seed: int, steps: int) -> tuple[list[float], list[float]]:
    """Test accuracies (LV-HBA, one C, the C of the start), and the outer loss along the run."""
    from sklearn.svm import LinearSVC

    x, y = table(name)
    order = np.random.default_rng(seed).permutation(len(y))
    fit = min(500, int(0.6 * len(y)))
    cuts = order[:fit], order[fit : fit + 150], order[fit + 150 :]
    parts = [(torch.from_numpy(x[rows]), torch.from_numpy(y[rows])) for rows in cuts]
    svm = Machine(*parts[0], *parts[1], seed)
    method = LVHBA(
        svm.inner,
        svm.outer,
        svm.constraint,
        svm.params,
        svm.C,
        project=svm.project,
        step=0.01,
        multiplier_step=0.1,
        inner_step=0.01,
        gamma=(10.0, 10.0),
        penalty=(1.0, 0.49),
        multiplier=1.0,
    )
    losses = [method.step().outer_value for _ in range(steps)]

    def one(C: float) -> tuple[float, float]:
        fitted = LinearSVC(C=C, loss="squared_hinge", dual=False, max_iter=100_000, tol=1e-8)
        fitted.fit(x[cuts[0]], y[cuts[0]])
        return tuple(float(fitted.score(x[c], y[c])) for c in cuts[1:])  # type: ignore[return-value]

    # LinearSVC minimises |w|^2 / 2 + C sum xi^2
    tried = [one(C) for C in np.logspace(-4, 2, 13)]
    chosen = max(tried, key=lambda scores: scores[0])[1]
    start = one(0.5 * float(np.exp(-5.5)))[1]
    return [svm.accuracy(*parts[2]), chosen, start], losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a few seconds, for the tests")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    n, steps = (100, 1500) if options.small else (100, 5000)
    marks = [k for k in MARKS if k <= steps]
    print("toy: relative error of x after " + ", ".join(map(str, marks)) + " steps, then F and gap")
    runs: dict[str, list[Any]] = {}
    for c in (2.0, 0.25, 0.025):
        runs[f"woodbury, c0 = {c:g}"] = toy(n, steps, (c, 0.3))
    for c in (2.0, 0.025):
        runs[f"old theta, c0 = {c:g}"] = authors(n, steps, c)
    for name, rows in runs.items():
        errors = {row[0]: row[1] for row in rows}
        tail = f"  {rows[-1][2]:.3f}  {rows[-1][3]:.1e}" if len(rows[-1]) > 2 else ""
        print(f"  {name:<22}" + "  ".join(f"{errors[k]:9.2e}" for k in marks) + tail)
    names = ["breast cancer"] if options.small else ["svmguide1", "splice", "breast cancer"]
    splits, rounds = (1, 30) if options.small else (options.splits, 1000)
    print(f"support vector machines, {rounds} steps, {splits} splits: accuracy on the test rows")
    print(f"  {'data':<14} {'LV-HBA':>14} {'one C, chosen':>14} {'C of the start':>15}")
    curves = {}
    for name in names:
        found = [machine(name, seed, rounds) for seed in range(splits)]
        scores = np.array([f[0] for f in found])
        curves[name] = found[0][1]
        cells = [f"{m:.3f} +- {s:.3f}" for m, s in zip(scores.mean(0), scores.std(0), strict=True)]
        print(f"  {name:<14} " + "  ".join(cells), flush=True)
    if options.figure is not None:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for name, rows in runs.items():
            axes[0].plot([row[0] for row in rows], [row[1] for row in rows], label=name)
        axes[0].axhline(0.02, color="grey", linewidth=0.8, linestyle=":")
        axes[0].set(yscale="log", xlabel="steps", ylabel="relative error of x", title="toy")
        axes[0].legend(fontsize=7)
        for name, losses in curves.items():
            axes[1].plot(losses, label=name)
        axes[1].set(xlabel="steps", ylabel="outer loss", title="support vector machines")
        axes[1].legend(fontsize=7)
        figure.savefig(options.figure)
        print(f"wrote {options.figure}")


if __name__ == "__main__":
    main()
