"""What one outer step costs with a weight decay for each of a million weights.

A ReLU network 784-1024-256-10 (1,068,810 weights, and as many hyperparameters), cross-entropy,
MNIST, batches of 256 rows, Adam for the weights and for the hyperparameters. The unit is one step
of the plain training (gradient and Adam, nothing of woodbury in it). An outer step is a
hypergradient with K terms of the Neumann series and a step of Adam on the decays; "certified"
spends one more product on the residual of the solve, which a learner does in every tenth step
unless told otherwise. Steps of all kinds are timed in turns. Beside them: the published algorithm
written out in torch, all derivatives by autograd. Both get the same batches and must give the same
gradient.

Peak memory is counted exactly, storage by storage, weights, optimizers and hyperparameters
included, over a loop of steps; the unit is the peak of the plain training.

Targets: at most 4 training steps, and at most 3 times the memory of training.

    python benchmarks/hyper_millions.py [--threads 1] [--repeats 20] [--batch 256] [--small]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from woodbury import Neumann
from woodbury.bilevel import HyperLearner, WeightDecay

ROOT = Path(__file__).resolve().parents[1]
TERMS = (0, 1, 3, 5)
RATE, HYPER_RATE, DECAY = 1e-3, 1e-2, 1e-4
Batch = tuple[Tensor, Tensor]


def network(sizes: list[int]) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def data(batch: int, features: int) -> tuple[Batch, Batch]:
    """A batch to train on and one to validate."""
    folder = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data"))
    if features == 784 and (folder / "mnist.npz").is_file():
        mnist = np.load(folder / "mnist.npz")
        x = torch.from_numpy(mnist["x_train"][: 2 * batch].reshape(-1, 784)).float() / 255
        y = torch.from_numpy(mnist["y_train"][: 2 * batch]).long()
    else:
        print("random rows in place of MNIST: set WOODBURY_DATA to a folder with mnist.npz")
        x, y = torch.rand(2 * batch, features), torch.randint(0, 10, (2 * batch,))
    return (x[:batch], y[:batch]), (x[batch:], y[batch:])


class Plain:
    """Training as it is without hyperparameters: the unit."""

    def __init__(self, sizes: list[int], train: Batch) -> None:
        self.model, self.train = network(sizes), train
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE, weight_decay=DECAY)

    def loss(self) -> Tensor:
        return cross_entropy(self.model(self.train[0]), self.train[1])

    def inner(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


class Ours(Plain):
    def __init__(
        self, sizes: list[int], train: Batch, valid: Batch, terms: int, certify: bool
    ) -> None:
        super().__init__(sizes, train)
        self.optimizer.param_groups[0]["weight_decay"] = 0.0
        self.valid = valid
        self.learner = HyperLearner(
            self.model,
            "cross_entropy",
            WeightDecay(self.model, DECAY),
            optimizer=self.optimizer,
            recipe=Neumann(terms),
            hyper_optimizer=lambda groups: torch.optim.Adam(groups, lr=HYPER_RATE),
            certify_every=1 if certify else 10**9,
        )
        self.learner.steps = 0 if certify else 1

    def loss(self) -> Tensor:
        return self.learner.loss(self.train)

    def outer(self) -> Any:
        return self.learner.step(self.valid)


class Published(Plain):
    """Algorithm 3 of the paper, as one writes it down."""

    def __init__(self, sizes: list[int], train: Batch, valid: Batch, terms: int) -> None:
        super().__init__(sizes, train)
        self.optimizer.param_groups[0]["weight_decay"] = 0.0
        self.valid, self.terms = valid, terms
        self.params = list(self.model.parameters())
        self.logs = [torch.full_like(p, np.log(DECAY)).requires_grad_() for p in self.params]
        self.hyper_optimizer = torch.optim.Adam(self.logs, lr=HYPER_RATE)

    def loss(self) -> Tensor:
        pairs = zip(self.logs, self.params, strict=True)
        return super().loss() + 0.5 * sum((log.exp() * p**2).sum() for log, p in pairs)

    def hypergradient(self) -> list[Tensor]:
        v = torch.autograd.grad(
            cross_entropy(self.model(self.valid[0]), self.valid[1]), self.params
        )
        slopes = torch.autograd.grad(self.loss(), self.params, create_graph=True)
        q = v
        for _ in range(self.terms):
            products = torch.autograd.grad(slopes, self.params, v, retain_graph=True)
            v = tuple(a - RATE * h for a, h in zip(v, products, strict=True))
            q = tuple(a + b for a, b in zip(q, v, strict=True))
        mixed = torch.autograd.grad(slopes, self.logs, [RATE * part for part in q])
        return [-part for part in mixed]

    def outer(self) -> None:
        for log, gradient in zip(self.logs, self.hypergradient(), strict=True):
            log.grad = gradient
        self.hyper_optimizer.step()


def peak(make: Callable[[], Any], steps: int = 3) -> int:
    """Bytes at most, of all that is made by a loop."""
    from tests.curvature.peak import PeakMemory

    with PeakMemory() as memory:
        loop = make()
        for _ in range(steps):
            loop.inner()
            if hasattr(loop, "outer"):
                loop.outer()
    return memory.bytes


def timed(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each job, all in turns."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 2):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn >= 2:
                found[name].append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--small", action="store_true", help="20-16-10, 3 repeats: seconds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = [20, 16, 10] if options.small else [784, 1024, 256, 10]
    repeats = 3 if options.small else options.repeats
    train, valid = data(32 if options.small else options.batch, sizes[0])

    plain = Plain(sizes, train)
    loops: dict[str, Any] = {}
    for terms in TERMS:
        loops[f"K = {terms}"] = Ours(sizes, train, valid, terms, False)
        loops[f"K = {terms}, certified"] = Ours(sizes, train, valid, terms, True)
        loops[f"K = {terms}, published"] = Published(sizes, train, valid, terms)
    count = sum(p.numel() for p in plain.model.parameters())
    print(
        f"{count:,} weights, as many decays; batches of {len(train[0])}, {options.threads} thread"
    )

    differences = []
    for terms in TERMS:
        ours, rival = loops[f"K = {terms}"], loops[f"K = {terms}, published"]
        found = ours.learner.hypergradient(valid, train).value["WeightDecay.log_decay"]
        wanted = torch.cat([part.flatten() for part in rival.hypergradient()])
        differences.append(((found - wanted).norm() / wanted.norm()).item())
    print(f"hypergradients differ from the published by at most {max(differences):.1e}, relative")

    jobs: dict[str, Callable[[], Any]] = {"plain": plain.inner}
    one = loops["K = 1"]
    jobs["ours, inner"] = one.inner
    for loop in loops.values():
        loop.inner()
    jobs |= {name: loop.outer for name, loop in loops.items()}
    seconds = timed(jobs, repeats)
    unit = median(seconds["plain"])
    least = min(seconds["plain"])
    print(f"\none training step {1e3 * unit:.1f} ms (least {1e3 * least:.1f})")
    print(f"with a decay per weight in its loss {median(seconds['ours, inner']) / unit:.2f}")
    base = peak(lambda: Plain(sizes, train))
    print(f"peak of the training {base / 2**20:.1f} MiB\n")
    print(f"{'outer step':20} {'time':>6} {'least':>6} {'memory':>7} {'products':>9}")
    for terms in TERMS:
        makers = {
            f"K = {terms}": lambda k=terms: Ours(sizes, train, valid, k, False),
            f"K = {terms}, certified": lambda k=terms: Ours(sizes, train, valid, k, True),
            f"K = {terms}, published": lambda k=terms: Published(sizes, train, valid, k),
        }
        for name, make in makers.items():
            times = seconds[name]
            report = loops[name].outer() if "published" not in name else None
            products = "" if report is None else f"{report.products:9d}"
            residual = ""
            if report is not None and "certified" in name:
                residual = f"  residual {report.residual:.3f}, {report.status.name}"
            print(
                f"{name:20} {median(times) / unit:6.2f} {min(times) / least:6.2f} "
                f"{peak(make) / base:7.2f} {products}{residual}"
            )
    print("targets                 4.00            3.00")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    main()
