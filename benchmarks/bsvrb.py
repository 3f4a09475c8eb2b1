"""BSVRB with many inner problems: validation loss against samples (a9a, m = 20).

The task of Hu et al. (2023) with their a8a replaced by a9a: block i fits a linear model y_i by the
mean of sigmoid(x_j) log(1 + exp(-t_j a_j'y_i / s_i)) over training rows j (a fifth of them with the
wrong label), plus |y_i|^2 mu / 2, at a temperature s_i of its own; x holds one weight for each
training row, and the outer loss is the mean over blocks of the same loss, unweighted, on validation
rows (which here are no training rows). 2,000 + 1,000 rows, mu = 1e-2, I = 5 of 20 blocks and B = 32
rows a step. Beside it

- ``rescaled``: the rule of the paper's baseline RSVRB in the variables of version 2. A tracker of a
  sampled block becomes (1 - a)(q_i - (m/I) q^-) + (m/I) q, those of all others shrink by 1 - a,
  and all blocks move at every step.
- ``all blocks``: version 2 with I = m and B = 8, the same number of samples a step.
- ``no memory``: version 2 with a = b = 1, g = 0.

Outer rates are the best of a grid for each, by the loss at the end with seed 0; the table has the
mean over the other seeds of (F(x) - F(x_0)) / |F(x_0)| in percent, F at exact inner solutions
(Newton's method), against samples: the rows that both losses were asked for.

    python benchmarks/bsvrb.py [--seeds 3] [--small] [--figure bsvrb.svg]

The data pack is found through WOODBURY_DATA (default ../shared/data beside the repository).
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from woodbury.bilevel import BSVRBv1, BSVRBv2
from woodbury.errors import NonFiniteError

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data")).resolve()
RATES = (100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0)
RIDGE = 1e-2
POINTS = 6


def a9a(rows: int) -> tuple[Tensor, Tensor]:
    """The first rows with a constant feature, labels -1 and 1."""
    path = DATA / "libsvm" / "a9a.gz"
    if not path.exists():
        sys.exit(f"{path} is missing: set WOODBURY_DATA to the data pack")
    a, t = torch.zeros(rows, 124, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    a[:, 0] = 1
    with gzip.open(path, "rt") as file:
        for row, line in zip(range(rows), file, strict=False):
            label, *entries = line.split()
            t[row] = 1.0 if float(label) > 0 else -1.0
            for entry in entries:
                place, value = entry.split(":")
                a[row, int(place)] = float(value)
    return a, t


class Task:
    """m temperatures, one weight per training row."""

    def __init__(self, small: bool) -> None:
        self.m, self.sampled = (6, 2) if small else (20, 5)
        rows, judged = (200, 100) if small else (2000, 1000)
        self.steps = 60 if small else 600
        a, t = a9a(rows + judged)
        gen = torch.Generator().manual_seed(0)
        wrong = torch.rand(rows, generator=gen) < 0.2  # so that there is something to weigh
        t[:rows] = torch.where(wrong, -t[:rows], t[:rows])
        self.train = (a[:rows], t[:rows], torch.arange(rows))
        self.valid = (a[rows:], t[rows:])
        self.temperature = torch.linspace(1, 3, self.m, dtype=torch.float64)
        self.x = torch.zeros(rows, dtype=torch.float64)
        self.start = self.exact(self.x)

    def inner(self, y: Tensor, x: Tensor, blocks: Tensor, batch: Any) -> Tensor:
        a, t, index = batch
        margins = t * torch.einsum("ibp,ip->ib", a, y) / self.temperature[blocks, None]
        losses = torch.nn.functional.softplus(-margins)
        return (x[index].sigmoid() * losses).mean(1) + 0.5 * RIDGE * y.square().sum(1)

    def outer(self, y: Tensor, x: Tensor, blocks: Tensor, batch: Any) -> Tensor:
        a, t = batch
        margins = t * torch.einsum("ibp,ip->ib", a, y) / self.temperature[blocks, None]
        return torch.nn.functional.softplus(-margins).mean(1)

    def exact(self, x: Tensor) -> float:
        """``F(x)``, all blocks at once."""
        a, t, _ = self.train
        weights, s = x.sigmoid() / len(t), self.temperature[:, None]
        y = torch.zeros(self.m, a.shape[1], dtype=torch.float64)
        eye = RIDGE * torch.eye(a.shape[1], dtype=torch.float64)
        for _ in range(30):
            p = torch.sigmoid(-t * (y @ a.T) / s)
            slope = -((weights * t * p / s) @ a) + RIDGE * y
            if slope.norm() < 1e-9:
                break
            curvature = weights * p * (1 - p) / s**2
            H = torch.stack([(a.T * c) @ a for c in curvature]) + eye
            y = y - torch.linalg.solve(H, slope)
        a, t = self.valid
        return torch.nn.functional.softplus(-t * (y @ a.T) / s).mean().item()


class Rescaled(BSVRBv2):
    """RSVRB's rule: unbiased for the vector of all blocks, at the price of a factor m / I."""

    def _track(self, old: Tensor, blocks: Tensor, now: Tensor, then: Tensor | None) -> Tensor:
        keep, scale = 1 - self.tracking[0], self.count / self.sampled
        return scale * now + keep * (old - (0 if then is None else scale * then))

    def _move(self, blocks: Tensor, moves: Tensor) -> None:
        others = torch.ones(self.count, 1, dtype=self._y.dtype)
        others[blocks] = 0
        keep = others * (1 - self.tracking[0]) + (1 - others)
        self._misfits[blocks] = moves
        self._slopes, self._misfits = self._slopes * keep, self._misfits * keep
        self._y = self._y - self.inner_step * self._slopes
        moved = self.adjoints - self.adjoint_step * self._misfits
        length = moved.norm(dim=1, keepdim=True)
        self.adjoints = moved * (self.radius / length.clamp_min(self.radius))


Build = Callable[..., BSVRBv1 | BSVRBv2]
COMMON = {"tracking": (0.5, 0.5), "momentum": 0.5}


def build(kind: type, **more: Any) -> Build:
    def make(task: Task, rate: float, seed: int) -> Any:
        given = {"blocks": task.sampled, "batch_size": 32, "inner_step": 0.1, **COMMON, **more}
        if given["blocks"] is None:
            given["batch_size"] = 32 * task.sampled // task.m
        return kind(
            task.inner,
            task.outer,
            torch.zeros(task.m, 124, dtype=torch.float64),
            task.x.clone(),
            inner_data=task.train,
            outer_data=task.valid,
            outer=rate,
            generator=torch.Generator().manual_seed(seed),
            **given,
        )

    return make


METHODS: dict[str, Build] = {
    "version 1": build(BSVRBv1, inner_step=0.1, min_curvature=RIDGE),
    "version 2": build(BSVRBv2, radius=100.0),
    "rescaled": build(Rescaled, radius=100.0, inner_step=0.1 / 4),
    "all blocks": build(BSVRBv2, blocks=None, radius=100.0),
    "no memory": build(BSVRBv2, radius=100.0, tracking=(1.0, 0.0), momentum=1.0),
}


def run(task: Task, make: Build, rate: float, seed: int) -> list[tuple[int, float]]:
    method = make(task, rate, seed)
    rows, per = [], max(1, task.steps // POINTS)
    try:
        for k in range(1, POINTS * per + 1):
            method.step()
            if k % per == 0:
                change = 100 * (task.exact(method.hyper[""]) / task.start - 1)
                rows.append((method.samples, change))
    except NonFiniteError:
        rows.append((method.samples, math.inf))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a few seconds, for the tests")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    task = Task(options.small)
    rates, seeds = (RATES[:1], 1) if options.small else (RATES, options.seeds)
    print(f"a9a, m = {task.m}, {task.sampled} blocks a step; F at the start {task.start:.4f}")
    print("change of F in percent after the samples above; mean of seeds, and their spread at last")
    shown = {}
    for name, make in METHODS.items():
        tried = {rate: run(task, make, rate, 0)[-1][1] for rate in rates}
        rate = min(tried, key=lambda r: tried[r])
        runs = [run(task, make, rate, seed) for seed in range(1, seeds + 1)]
        shown[name] = runs
        if name == "version 1":
            marks = "  ".join(f"{samples:>9,}" for samples, _ in runs[0])
            print(f"{'':<12} {'rate':>6}  {marks}")
        values = np.array([[value for _, value in r] for r in runs])
        cells = "  ".join(f"{value:9.3f}" for value in values.mean(0))
        print(f"{name:<12} {rate:6g}  {cells}   {np.ptp(values[:, -1]):.3f}", flush=True)
    if options.figure is not None:
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
        for name, runs in shown.items():
            values = np.array([[value for _, value in r] for r in runs]).mean(0)
            axis.plot([samples for samples, _ in runs[0]], values, marker=".", label=name)
        axis.set(xlabel="samples", ylabel="change of F, percent")
        axis.legend()
        figure.savefig(options.figure)
        print(f"wrote {options.figure}")


if __name__ == "__main__":
    main()
