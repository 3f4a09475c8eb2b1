"""Stochastic bilevel algorithms side by side: error against oracle calls.

Two problems of benchmark_bilevel (Dagreou et al. 2022), in float64:

- ``logistic``: a9a, 4,000 rows to fit and 4,000 to judge (their ijcnn1 is not in the data pack).
  Inner: mean logistic loss and sum_j exp(L_j) w_j^2 / 2, one penalty for each of 123 features;
  outer: mean logistic loss. L starts at 0 and is kept in [-12, 1]. Printed is
  (F(L) - F*) / (F(0) - F*), F at the exact inner solution (Newton's method), F* from exact
  hypergradients.
- ``cleaning``: MNIST, 2,000 rows with 30 % random labels, 1,000 right ones to judge. Inner:
  softmax regression with weights sigmoid(L_i) for the rows, 0.01 |W|^2 / 2. Printed are the outer
  loss of the algorithm's own W, its accuracy on 10,000 test images, and the area under the curve
  of the weights as a detector of right labels. This is the experiment for which BO-REP is claimed
  to beat stocBiO and SOBA, which do not normalise, at equal work.

All methods have batches of 64 and one inner rate. The rate of the outer variable (for BO-REP, the
length of a step) is the best of a grid of four by the last figure of seed 0, for each method by
itself; the table has the mean of the other seeds at that rate. Work is what ``problem.counts``
counts: examples for which a gradient or a product was taken.

    python benchmarks/bilevel_stochastic.py [--problem logistic cleaning] [--seeds 3] [--small]
        [--figure stochastic.svg]

The data pack is found through WOODBURY_DATA (default ../shared/data beside the repository).
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from woodbury import Neumann, hypergradient
from woodbury.bilevel import (
    BOREP,
    F2SA,
    SABA,
    SOBA,
    AlternatingIFT,
    AlternatingNystrom,
    AmIGO,
    Bilevel,
    BilevelAlgorithm,
    StocBiO,
)
from woodbury.errors import NonFiniteError
from woodbury.implicit import Implicit
from woodbury.solvers import Cholesky

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data")).resolve()
BATCH = 64
POINTS = 8  # how often a run is looked at


def found(path: Path) -> Path:
    if not path.exists():
        sys.exit(f"{path} is missing: set WOODBURY_DATA to the data pack")
    return path


def libsvm(path: Path, features: int, rows: int) -> tuple[Tensor, Tensor]:
    """The first rows of a file in LIBSVM format, dense, labels -1 and 1."""
    x, y = torch.zeros(rows, features, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    with gzip.open(found(path), "rt") as file:
        for row, line in zip(range(rows), file, strict=False):
            label, *entries = line.split()
            y[row] = 1.0 if float(label) > 0 else -1.0
            for entry in entries:
                place, value = entry.split(":")
                x[row, int(place) - 1] = float(value)
    return x, y


class Logistic:
    """One penalty per feature."""

    name = "logistic"
    columns = ("error",)
    inner_rate = 0.3
    rates = (1e2, 1e3, 1e4, 1e5)
    lengths = (0.1, 0.3, 1.0, 3.0)

    def __init__(self, small: bool) -> None:
        rows = 300 if small else 4000
        x, y = libsvm(DATA / "libsvm" / "a9a.gz", 123, 2 * rows)
        self.train, self.valid = (x[:rows], y[:rows]), (x[rows:], y[rows:])
        self.budget = 30_000 if small else 400_000
        self.first = torch.zeros(123, dtype=torch.float64)
        self.best, self.start = math.inf, self.exact(self.first)[0]
        self.best = self._minimum(60 if small else 300)

    @staticmethod
    def inner(w: Tensor, L: Tensor, batch: Any) -> Tensor:
        x, y = batch
        return torch.nn.functional.softplus(-y * (x @ w)).mean() + 0.5 * (L.exp() * w**2).sum()

    @staticmethod
    def outer(w: Tensor, L: Tensor, batch: Any) -> Tensor:
        x, y = batch
        return torch.nn.functional.softplus(-y * (x @ w)).mean()

    @staticmethod
    def project(L: Tensor) -> None:
        L.clamp_(-12, 1)

    def tensors(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(123, dtype=torch.float64), self.first.clone()

    def exact(self, L: Tensor) -> tuple[float, Tensor]:
        """``F(L)`` by Newton's method, and the inner solution."""
        x, y = self.train
        w, value = torch.zeros_like(L), math.inf
        for _ in range(100):
            p = torch.sigmoid(-y * (x @ w))
            slope = -(x.T @ (p * y)) / len(y) + L.exp() * w
            if slope.norm() < 1e-9:
                break
            H = (x.T * (p * (1 - p) / len(y))) @ x + torch.diag(L.exp())
            value, step = self.inner(w, L, self.train).item(), torch.linalg.solve(H, slope)
            length = 1.0
            while length > 1e-6 and self.inner(w - length * step, L, self.train).item() > value:
                length /= 2
            w = w - length * step
        return self.outer(w, L, self.valid).item(), w

    def _minimum(self, steps: int) -> float:
        L = self.first.clone()
        optimizer = torch.optim.Adam([L], lr=0.2)
        best = math.inf
        for _ in range(steps):
            value, w = self.exact(L)
            best = min(best, value)
            L.grad = hypergradient(
                self.inner,
                self.outer,
                w,
                L,
                Cholesky(),
                inner_data=self.train,
                outer_data=self.valid,
            ).value
            optimizer.step()
            self.project(L)
        return best

    def measure(self, w: Tensor, L: Tensor) -> tuple[float, ...]:
        value = self.exact(L)[0]
        return ((value - self.best) / (self.start - self.best),)


class Cleaning:
    """One weight per training row."""

    name = "cleaning"
    columns = ("outer loss", "accuracy", "AUC")
    inner_rate = 0.2
    rates = (1e3, 1e4, 1e5, 1e6)
    lengths = (1.0, 3.0, 10.0, 30.0)

    def __init__(self, small: bool) -> None:
        rows, judged = (300, 200) if small else (2000, 1000)
        data = np.load(found(DATA / "mnist.npz"))
        picked = np.random.default_rng(0).permutation(len(data["y_train"]))[: rows + judged]
        x = torch.from_numpy(data["x_train"][picked]).double() / 255
        test = torch.from_numpy(data["x_test"]).double() / 255
        mean = x.mean(0)
        scale = (x - mean).square().sum(1).mean().sqrt() / 4  # rows of mean squared length 16
        x, test = (x - mean) / scale, (test - mean) / scale
        y = torch.from_numpy(data["y_train"][picked]).long()
        gen = torch.Generator().manual_seed(0)
        self.wrong = torch.rand(rows, generator=gen) < 0.3
        noise = torch.randint(10, (rows,), generator=gen)
        given = torch.where(self.wrong, noise, y[:rows])
        self.wrong &= given != y[:rows]
        self.train = (x[:rows], given, torch.arange(rows))
        self.valid = (x[rows:], y[rows:])
        self.test = (test, torch.from_numpy(data["y_test"]).long())
        self.budget = 30_000 if small else 800_000
        self.rows = rows

    @staticmethod
    def inner(w: Tensor, L: Tensor, batch: Any) -> Tensor:
        x, y, index = batch
        losses = torch.nn.functional.cross_entropy(x @ w, y, reduction="none")
        return (L[index].sigmoid() * losses).mean() + 0.005 * w.square().sum()

    @staticmethod
    def outer(w: Tensor, L: Tensor, batch: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(batch[0] @ w, batch[1])

    @staticmethod
    def project(L: Tensor) -> None:
        L.clamp_(-8, 8)

    def tensors(self) -> tuple[Tensor, Tensor]:
        w = torch.zeros(784, 10, dtype=torch.float64)
        return w, torch.ones(self.rows, dtype=torch.float64)

    def fit(self, weights: Tensor) -> Tensor:
        """The inner solution for given weights of the rows."""
        w = self.tensors()[0].requires_grad_()
        optimizer = torch.optim.LBFGS([w], max_iter=300, line_search_fn="strong_wolfe")
        L = torch.logit(weights, eps=1e-9)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = self.inner(w, L, self.train)
            value.backward()
            return value

        optimizer.step(closure)  # type: ignore[arg-type]
        return w.detach()

    def measure(self, w: Tensor, L: Tensor) -> tuple[float, ...]:
        loss = self.outer(w, L, self.valid).item()
        accuracy = (self.test[0] @ w).argmax(1).eq(self.test[1]).double().mean().item()
        ranks = L.argsort().argsort().double() + 1
        right, wrong = int((~self.wrong).sum()), int(self.wrong.sum())
        auc = (ranks[~self.wrong].sum().item() - right * (right + 1) / 2) / (right * wrong)
        return loss, accuracy, auc


Problem = Logistic | Cleaning
Build = Callable[[Bilevel, Problem, float, int], BilevelAlgorithm]


def drawn(problem: Problem, rate: float, seed: int) -> dict[str, Any]:
    return {
        "inner": problem.inner_rate,
        "outer": rate,
        "project": problem.project,
        "seed": seed,
        "inner_batch_size": BATCH,
        "outer_batch_size": BATCH,
    }


def saba(b: Bilevel, p: Problem, rate: float, seed: int) -> SABA:
    # Steps that do not fall need to be shorter than those that SOBA starts with.
    return SABA(b, inner=p.inner_rate / 3, outer=rate / 30, project=p.project, seed=seed)


METHODS: dict[str, Build] = {
    "IFT, Neumann": lambda b, p, r, s: AlternatingIFT(
        b,
        Implicit(Neumann(terms=10, step=p.inner_rate), on_failure="ignore"),
        inner_steps=10,
        **drawn(p, r, s),
    ),
    "Nystrom": lambda b, p, r, s: AlternatingNystrom(
        b, rank=10, damping=0.1, inner_steps=10, **drawn(p, r, s)
    ),
    "stocBiO": lambda b, p, r, s: StocBiO(
        b, step=p.inner_rate, terms=10, inner_steps=10, **drawn(p, r, s)
    ),
    "AmIGO": lambda b, p, r, s: AmIGO(
        b, adjoint_step=p.inner_rate, adjoint_steps=10, inner_steps=10, **drawn(p, r, s)
    ),
    "SOBA": lambda b, p, r, s: SOBA(b, **drawn(p, r, s)),
    "SABA": saba,
    "F2SA": lambda b, p, r, s: F2SA(b, inner_steps=10, **drawn(p, r, s)),
    "BO-REP": lambda b, p, r, s: BOREP(b, adjoint_step=p.inner_rate / 10, **drawn(p, r, s)),
}


@dataclass
class Run:
    """What was seen along one run."""

    work: list[int] = field(default_factory=list)
    seen: list[tuple[float, ...]] = field(default_factory=list)

    @property
    def last(self) -> float:
        return self.seen[-1][0] if self.seen and math.isfinite(self.seen[-1][0]) else math.inf


def run(problem: Problem, build: Build, rate: float, seed: int) -> Run:
    w, L = problem.tensors()
    inner, outer = split(problem.train), split(problem.valid)
    bilevel = Bilevel(problem.inner, problem.outer, w, L, inner_data=inner, outer_data=outer)
    algorithm = build(bilevel, problem, rate, seed)
    trace, marks = Run(), np.geomspace(problem.budget / 100, problem.budget, POINTS)
    try:
        for mark in marks:
            while bilevel.counts.total < mark:
                algorithm.step()
            trace.work.append(bilevel.counts.total)
            trace.seen.append(problem.measure(w, L))
    except (NonFiniteError, torch.linalg.LinAlgError):
        trace.seen.append((math.inf,) * len(problem.columns))
        trace.work.append(bilevel.counts.total)
    return trace


def split(data: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(BATCH) for t in data), strict=True))


def compare(problem: Problem, seeds: int) -> dict[str, list[Run]]:
    shown = {}
    print(f"\n{problem.name}, {problem.budget:,} examples in gradients and products")
    heads = "  ".join(f"{name:>10}" for name in problem.columns)
    print(f"{'method':<14} {'rate':>8}  {heads}  {'spread':>8}  after 1/7")
    for name, build in METHODS.items():
        grid = problem.lengths if name == "BO-REP" else problem.rates
        tried = {rate: run(problem, build, rate, 0) for rate in grid}
        rate = min(grid, key=lambda r: tried[r].last)
        runs = [run(problem, build, rate, seed) for seed in range(1, seeds + 1)]
        shown[name] = runs
        ends = np.array([r.seen[-1] for r in runs])
        halves = np.array([r.seen[min(POINTS // 2, len(r.seen) - 1)][0] for r in runs])
        cells = "  ".join(f"{value:10.4f}" for value in ends.mean(0))
        edge = " (end of the grid)" if rate in (grid[0], grid[-1]) else ""
        print(
            f"{name:<14} {rate:8g}  {cells}  {np.ptp(ends[:, 0]):8.4f}  {halves.mean():.4f}{edge}",
            flush=True,
        )
    if isinstance(problem, Cleaning):
        for what, weights in (
            ("all rows", torch.full((problem.rows,), 0.731, dtype=torch.float64)),
            ("right labels", (~problem.wrong).double()),
        ):
            loss, accuracy, _ = problem.measure(problem.fit(weights), torch.zeros(problem.rows))
            print(
                f"{what:<14} {'':>8}  {loss:10.4f}  {accuracy:10.4f}  (fitted, no bilevel method)"
            )
    return shown


def draw(shown: dict[str, dict[str, list[Run]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 3.8), squeeze=False)
    labels = {"logistic": "relative error of F", "cleaning": "outer loss"}
    for axis, (problem, methods) in zip(axes[0], shown.items(), strict=True):
        for name, runs in methods.items():
            count = min(len(r.seen) for r in runs)
            values = [np.mean([r.seen[k][0] for r in runs]) for k in range(count)]
            axis.plot(runs[0].work[:count], values, marker=".", label=name)
        axis.set(xscale="log", yscale="log", xlabel="examples", ylabel=labels[problem])
        axis.set_title(problem)
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problem", nargs="*", default=["logistic", "cleaning"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a few seconds, for the tests")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    kinds: dict[str, type[Problem]] = {"logistic": Logistic, "cleaning": Cleaning}
    shown = {
        name: compare(kinds[name](options.small), 1 if options.small else options.seeds)
        for name in options.problem
    }
    if options.figure is not None:
        draw(shown, options.figure)


if __name__ == "__main__":
    main()
