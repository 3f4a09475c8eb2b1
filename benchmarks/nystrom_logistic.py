"""Hataya and Yamada's logistic example: how much depends on the settings of each estimator.

500 training and 500 validation rows of N(0, I), 100 features, labels 1[x'w + 0.1 noise > 0]; one
penalty per feature, 1/2 sum_i L_i w_i^2, L = 1 at first. Inner: descent at rate 0.1 on the mean
cross-entropy, 100 steps from w = 0 for each of 10 outer steps. Outer: rate 1, momentum 0.9, L kept
at 1e-8 or above. Printed: the validation loss of the parameters that the last penalties give in 100
more steps from zero, mean and standard deviation over five seeds, at the outer rate 1 of the paper,
and at 10 and 100; and what each estimate of the first hypergradient is beside the exact one: the
cosine between them and the ratio of their lengths.

The paper (AISTATS 2023) finds that its Nystrom method gets a lower loss than conjugate gradients
and the Neumann series and depends less on (k, rho) than they do on (l, alpha). Its conjugate
gradients take the residual before the last for the new direction; they are here as "CG, old
residual", beside ones done right. Sizes and rates of all are {5, 10, 20} and {0.01, 0.1, 1}.

    python benchmarks/nystrom_logistic.py [--seeds 5] [--small] [--figure nystrom.svg]
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from woodbury import CG, Cholesky, Neumann, Nystrom
from woodbury.bilevel import (
    AlternatingIFT,
    AlternatingNystrom,
    Bilevel,
    BilevelAlgorithm,
    HypergradientState,
)
from woodbury.errors import NonFiniteError
from woodbury.implicit import Implicit
from woodbury.solvers import Recipe
from woodbury.solvers.recipe import Outcome, Problem
from woodbury.solvers.solution import SolveStatus

FEATURES = 100
INNER_STEPS = 100
SIZES = (5, 10, 20)
RATES = (0.01, 0.1, 1.0)
OUTER_RATES = (1.0, 10.0, 100.0)
DIVERGED = 10.0


@dataclass(frozen=True)
class OldResidualCG(Recipe):
    """What passes for conjugate gradients in the paper's code: here to be measured, not used.

    The new direction is made of the residual before the step instead of the one after it.
    """

    steps: int

    def _run(self, problem: Problem, state: Any) -> Outcome:
        x, r = problem.start()
        p = r.clone()
        for _ in range(self.steps):
            Ap = problem.product(p)
            length = r @ r / (p @ Ap)
            x = x + length * p
            new = r - length * Ap
            p = r + (new @ new / (r @ r)) * p
            r = new
        return Outcome(x, [SolveStatus.completed], steps=self.steps)


class Example:
    """The data of one seed."""

    def __init__(self, seed: int, rows: int) -> None:
        gen = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, FEATURES, generator=gen)
        truth = torch.randn(FEATURES, generator=gen)
        y = (x @ truth + 0.1 * torch.randn(rows, generator=gen) > 0).float()
        half = rows // 2
        self.training, self.validation = (x[:half], y[:half]), (x[half:], y[half:])

    @staticmethod
    def inner(w: Tensor, L: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(batch[0] @ w, batch[1]) + 0.5 * (L * w**2).sum()

    @staticmethod
    def outer(w: Tensor, L: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(batch[0] @ w, batch[1])

    def bilevel(self) -> Bilevel:
        return Bilevel(
            self.inner,
            self.outer,
            torch.zeros(FEATURES),
            torch.ones(FEATURES),
            inner_data=[self.training],
            outer_data=[self.validation],
        )


Make = Callable[..., BilevelAlgorithm]


def by(recipe: Recipe) -> Make:
    # Ten products of CG do not reach a tolerance, and a series may diverge: take what there is.
    return partial(AlternatingIFT, estimator=Implicit(recipe, on_failure="ignore"))


def nystrom(state: HypergradientState, **settings: Any) -> BilevelAlgorithm:
    return AlternatingNystrom(**settings)  # it makes its own state


def methods() -> dict[str, dict[str, Make]]:
    """For each method its settings."""
    grid = [(size, rate) for size in SIZES for rate in RATES]
    return {
        "Nystrom (k, rho)": {
            f"{k}, {rho:g}": partial(nystrom, rank=k, damping=rho) for k, rho in grid
        },
        "Nystrom, Gaussian sketch (k, rho)": {
            f"{k}, {rho:g}": by(Nystrom(rank=k, damping=rho)) for k, rho in grid
        },
        "Neumann (l, alpha)": {
            f"{size}, {alpha:g}": by(Neumann(size, step=alpha)) for size, alpha in grid
        },
        "CG (l)": {f"{size}": by(CG(rtol=1e-6, max_steps=size)) for size in SIZES},
        "CG, old residual (l)": {f"{size}": by(OldResidualCG(size)) for size in SIZES},
        "exact": {"": by(Cholesky())},
    }


def prepare(example: Example, make: Make, seed: int, rate: float) -> BilevelAlgorithm:
    return make(
        problem=example.bilevel(),
        inner=0.1,
        outer=partial(torch.optim.SGD, lr=rate, momentum=0.9),
        inner_steps=INNER_STEPS,
        restart=True,
        project=lambda L: L.clamp_(min=1e-8),
        state=HypergradientState(warm_start=False),
        seed=seed,
    )


def final_loss(algorithm: BilevelAlgorithm, outer_steps: int) -> float:
    """Infinite where penalties grow beyond 20, at which inner descent of rate 0.1 diverges."""
    try:
        algorithm.run(outer_steps)
        algorithm.problem.set_params(torch.zeros(FEATURES))
        algorithm.descend(INNER_STEPS)
        return algorithm.problem.value("outer")
    except NonFiniteError:
        return math.inf


def first_hypergradient(example: Example, make: Make, seed: int) -> Tensor:
    """By its momentum, which after one step is the gradient."""
    algorithm = prepare(example, make, seed, 1e-30)
    algorithm.run(1)
    (held,) = algorithm.outer_optimizer.state.values()
    return held["momentum_buffer"]


@dataclass
class Line:
    """One setting of one method."""

    losses: dict[float, list[float]]
    cosine: float
    length: float


Found = dict[str, dict[str, Line]]


def measure(seeds: int, outer_steps: int, rows: int) -> Found:
    examples = [Example(seed, rows) for seed in range(seeds)]
    exact = [first_hypergradient(e, by(Cholesky()), s) for s, e in enumerate(examples)]
    found: Found = {}
    for method, settings in methods().items():
        found[method] = {}
        for name, make in settings.items():
            first = [first_hypergradient(e, make, s) for s, e in enumerate(examples)]
            pairs = list(zip(first, exact, strict=True))
            cosines = [(g @ e / (g.norm() * e.norm())).item() for g, e in pairs]
            lengths = [(g.norm() / e.norm()).item() for g, e in pairs]
            losses = {
                rate: [
                    final_loss(prepare(e, make, s, rate), outer_steps)
                    for s, e in enumerate(examples)
                ]
                for rate in OUTER_RATES
            }
            found[method][name] = Line(losses, statistics.mean(cosines), statistics.mean(lengths))
    return found


def without(seeds: int, rows: int) -> float:
    """The validation loss of the first penalties."""
    start = [prepare(Example(s, rows), by(Cholesky()), s, 1.0) for s in range(seeds)]
    return statistics.mean(final_loss(algorithm, 0) for algorithm in start)


def show(found: Found) -> None:
    for method, settings in found.items():
        rates = "".join(f"{'rate ' + format(rate, 'g'):>18}" for rate in OUTER_RATES)
        print(f"\n{method:<36} {'cosine':>7} {'length':>8}{rates}")
        for name, line in settings.items():
            cells = "".join(f"{cell(losses):>18}" for losses in line.losses.values())
            print(f"  {name:<34} {line.cosine:7.3f} {line.length:8.2f}{cells}")
        if len(settings) > 1:
            cells = ""
            for rate in OUTER_RATES:
                means = [statistics.mean(line.losses[rate]) for line in settings.values()]
                ratio = max(means) / min(means)
                cells += f"{ratio:18.2f}" if max(means) < DIVERGED else f"{'-':>18}"
            print(f"  {'worst / best':<50}{cells}")


def cell(losses: list[float]) -> str:
    diverged = sum(loss > DIVERGED for loss in losses)
    if diverged:
        return f"diverges ({diverged})"
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    return f"{statistics.mean(losses):.4f} +- {spread:.4f}"


def draw(found: Found, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(OUTER_RATES), figsize=(11, 3.8), sharey=True, layout="constrained"
    )
    top = 0.8
    for axis, rate in zip(axes, OUTER_RATES, strict=True):
        at = 0
        for colour, (method, settings) in enumerate(found.items()):
            for line in settings.values():
                for loss in line.losses[rate]:
                    mark = {"marker": "x"} if loss > DIVERGED else {"marker": "o", "s": 8}
                    axis.scatter(at, min(loss, top), color=f"C{colour}", **mark)
                at += 1
            axis.scatter([], [], color=f"C{colour}", label=method)
            at += 1
        axis.set(title=f"outer rate {rate:g}", xticks=[], ylim=(0.25, top + 0.03))
    axes[0].set_ylabel("validation loss (x: diverged)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="one seed, 2 outer steps, 60 rows")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    seeds, steps, rows = (1, 2, 60) if options.small else (options.seeds, 10, 1000)
    found = measure(seeds, steps, rows)
    print(f"{seeds} seeds; validation loss, {without(seeds, rows):.4f} with the first penalties")
    show(found)
    if options.figure is not None:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
