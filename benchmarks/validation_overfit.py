"""Fifty validation images learned by heart through the weight decays, one per weight.

MNIST, 50 training and 50 validation images, full batches, a linear model and networks with one and
two hidden layers of 128 ReLU. The weights see the training images only, the decays the validation
loss only: after each step of the weights (SGD with momentum 0.9) comes one of the decays
(RMSprop, decays at most 10), with three terms of the Neumann series, as Lorraine, Vicol and
Duvenaud did it ("Optimizing Millions of Hyperparameters by Implicit Differentiation", 2020, section
5.1). If the hypergradient is good for anything, a decay per weight must be able to overfit the
validation images: 100 %. The rivals are the same training with one decay per tensor, with one for
all, and with the first decay throughout.

Test accuracy is that on the 10,000 test images: what it is not about.

    python benchmarks/validation_overfit.py [--steps 2000] [--seeds 3] [--small] [--figure f.svg]
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn

from woodbury import Neumann
from woodbury.bilevel import HyperLearner, WeightDecay

ROOT = Path(__file__).resolve().parents[1]
IMAGES, RATE, HYPER_RATE, FIRST, LARGEST, TERMS = 50, 0.05, 0.1, 1e-3, 10.0, 3
MODELS = {"linear": [], "1 hidden layer": [128], "2 hidden layers": [128, 128]}
KINDS = ("weight", "tensor", "all", "fixed")
NAMES = {
    "weight": "one per weight",
    "tensor": "one per tensor",
    "all": "one for all",
    "fixed": f"fixed at {FIRST:g}",
}


@dataclass
class Run:
    """Accuracies of one run."""

    hypers: int
    validation: list[float] = field(default_factory=list)
    training: float = math.nan
    test: float = math.nan
    first: int | None = None  # the step from which on the validation images are all right
    seconds: float = 0.0


def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images of MNIST; digits of scikit-learn where that is missing."""
    folder = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data"))
    if (folder / "mnist.npz").is_file():
        found = np.load(folder / "mnist.npz")
        parts = [found[name] for name in ("x_train", "y_train", "x_test", "y_test")]
        scale = 255
    else:
        from sklearn.datasets import load_digits

        print("the digits of scikit-learn in place of MNIST: set WOODBURY_DATA")
        digits = load_digits()
        x, y = digits.data, digits.target
        parts, scale = [x[:1000], y[:1000], x[1000:], y[1000:]], 16
    x, y, v, z = (torch.from_numpy(np.asarray(part)) for part in parts)
    return x.flatten(1).float() / scale, y.long(), v.flatten(1).float() / scale, z.long()


def network(inputs: int, hidden: list[int]) -> nn.Sequential:
    sizes = [inputs, *hidden, 10]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def run(hidden: list[int], kind: str, steps: int, seed: int, data: tuple) -> Run:
    x, y, v, z = data
    torch.manual_seed(seed)
    rows = torch.randperm(len(x))[: 2 * IMAGES]
    train = x[rows[:IMAGES]], y[rows[:IMAGES]]
    valid = x[rows[IMAGES:]], y[rows[IMAGES:]]
    model = network(x.shape[1], hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    decay = WeightDecay(model, FIRST, largest=LARGEST, per="all" if kind == "fixed" else kind)
    learner = HyperLearner(
        model,
        "cross_entropy",
        decay,
        optimizer=optimizer,
        recipe=Neumann(TERMS),
        hyper_optimizer=partial(torch.optim.RMSprop, lr=HYPER_RATE),
        on_failure="ignore",  # the sum before the residual rose is taken
    )
    found = Run(0 if kind == "fixed" else decay.log_decay.numel())
    start = time.perf_counter()
    for step in range(steps):
        optimizer.zero_grad()
        learner.loss(train).backward()
        optimizer.step()
        if kind != "fixed":
            learner.step(valid)
        found.validation.append(accuracy(model, *valid))
        if found.validation[-1] == 1.0 and found.first is None:
            found.first = step + 1
    found.seconds = time.perf_counter() - start
    found.training, found.test = accuracy(model, *train), accuracy(model, v, z)
    return found


def draw(runs: dict[tuple[str, str], list[Run]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(model for model, _ in runs))
    figure, axes = plt.subplots(
        1, len(models), figsize=(3.2 * len(models), 3.2), sharey=True, squeeze=False
    )
    for axis, model in zip(axes[0], models, strict=True):
        for kind in KINDS:
            curves = torch.tensor([r.validation for r in runs[model, kind]])
            # Points as far apart as the logarithmic axis shows them: the picture stays small.
            steps = np.unique(np.geomspace(1, curves.shape[1], 120).astype(int))
            axis.plot(steps, curves.mean(0)[steps - 1], label=NAMES[kind])
        axis.set(title=model, xscale="log", xlabel="steps")
    axes[0, 0].set_ylabel("validation accuracy")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="the linear model, 150 steps, a seed")
    parser.add_argument("--figure", type=Path, help="draw the curves (needs matplotlib)")
    options = parser.parse_args()
    steps, seeds = (150, 1) if options.small else (options.steps, options.seeds)
    models = {"linear": MODELS["linear"]} if options.small else MODELS
    data = images()
    runs: dict[tuple[str, str], list[Run]] = {}
    print(f"{steps} steps, means of {seeds} seeds, accuracies in percent")
    print(
        f"{'model':16} {'decays':16} {'number':>8} {'validation':>10} {'100 % at step':>15} "
        f"{'training':>9} {'test':>6} {'ms a step':>10}"
    )
    for model, hidden in models.items():
        for kind in KINDS:
            found = [run(hidden, kind, steps, seed, data) for seed in range(seeds)]
            runs[model, kind] = found
            firsts = [str(r.first) if r.first else "never" for r in found]
            print(
                f"{model:16} {NAMES[kind]:16} {found[0].hypers:8,} "
                f"{100 * mean(r.validation[-1] for r in found):10.1f} {' '.join(firsts):>15} "
                f"{100 * mean(r.training for r in found):9.1f} "
                f"{100 * mean(r.test for r in found):6.1f} "
                f"{1e3 * mean(r.seconds for r in found) / steps:10.1f}",
                flush=True,
            )
    if options.figure is not None:
        draw(runs, options.figure)
        print(f"drawn: {options.figure.name}")


if __name__ == "__main__":
    main()
