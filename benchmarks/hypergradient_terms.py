"""Lorraine, Vicol and Duvenaud's first study: how good a hypergradient is after K Neumann terms.

Their protocol, on scikit-learn's diabetes data (Boston housing is gone): 90/10 test and 90/10
validation split, columns and target standardised, full batches; 200 epochs of Adam (rate 1e-3) at
fixed penalties sum_i exp(L_i) w_i^2, then 400 with a step of RMSprop on L after each. Models:
linear, and one hidden layer of 16 tanh units. After every 50th of the 400 epochs each estimate is
compared with the hypergradient by the exact inverse (Eigh): the cosine between them and the
distance relative to the exact one, means over all of these and five seeds. Both are taken where
the run is, and at the minimum of the inner loss that Newton's method reaches from there: only at a
minimum is there a hypergradient to be near to, and where the Hessian is indefinite the formula
gives something else. Alpha is 1 / lambda_max (found by 10 Lanczos products), and, as the paper has
it, the inner learning rate.

Claims of the paper: a few terms give a clearly better cosine than none; more are not worse;
conjugate gradients are similar.

    python benchmarks/hypergradient_terms.py [--seeds 5] [--small] [--figure terms.svg]
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from woodbury import CG, Eigh, Neumann, Nystrom
from woodbury.bilevel import AlternatingIFT, Bilevel, estimate_hypergradient
from woodbury.implicit import Implicit
from woodbury.implicit.newton import newton_cg
from woodbury.solvers import Recipe

HIDDEN = 16
TERMS = (0, 1, 5, 10, 20)
RATE = 1e-3
FIRST_PENALTY = -4.0


def split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Standardised training and validation rows."""
    from sklearn.datasets import load_diabetes
    from sklearn.model_selection import train_test_split

    x, y = load_diabetes(return_X_y=True)
    x, _, y, _ = train_test_split(x, y, test_size=0.1, random_state=0)
    x, xv, y, yv = train_test_split(x, y, test_size=0.1, random_state=0)
    mean, scale = x.mean(0), x.std(0)
    level, spread = y.mean(), y.std()

    def tensors(x: Any, y: Any) -> tuple[Tensor, Tensor]:
        return torch.from_numpy((x - mean) / scale), torch.from_numpy((y - level) / spread)

    return tensors(x, y), tensors(xv, yv)


def linear(w: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ w["w"]


def network(w: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ w["first"] + w["bias"]) @ w["second"]


def start(model: str, features: int, seed: int) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64) / shape[0] ** 0.5

    if model == "linear":
        return {"w": randn(features)}
    return {
        "first": randn(features, HIDDEN),
        "bias": torch.zeros(HIDDEN).double(),
        "second": randn(HIDDEN),
    }


def make(model: str, seed: int) -> Bilevel:
    training, validation = split()
    predict = linear if model == "linear" else network
    params = start(model, training[0].shape[1], seed)
    hyper = {name: torch.full_like(part, FIRST_PENALTY) for name, part in params.items()}

    def outer(w: dict[str, Tensor], L: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (predict(w, batch[0]) - batch[1]).square().mean()

    def inner(w: dict[str, Tensor], L: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        penalty = torch.stack([(L[name].exp() * part**2).sum() for name, part in w.items()])
        return outer(w, L, batch) + penalty.sum()

    return Bilevel(inner, outer, params, hyper, inner_data=[training], outer_data=[validation])


def estimators() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {f"Neumann, K = {k}": Neumann(k) for k in TERMS}
    found["Neumann, K = 20, inner rate"] = Neumann(20, step=RATE)
    found["CG, 20 steps"] = CG(rtol=1e-10, max_steps=20)
    found["Nystrom, rank 5, damping 0.1"] = Nystrom(rank=5, damping=0.1, method="column")
    return found


Place = Literal["run", "minimum"]


@dataclass
class Result:
    """What was found at one kind of place."""

    cosines: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    distances: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    smallest: float = math.inf
    gradient: float = 0.0

    def add(self, problem: Bilevel) -> None:
        exact = flat(problem, Eigh())
        point = problem.linearize()
        eigenvalues = torch.linalg.eigvalsh(point.hessian.to_dense())
        self.smallest = min(self.smallest, eigenvalues[0].item())
        self.gradient = max(self.gradient, point.gradient.norm().item())
        for name, recipe in estimators().items():
            estimate = flat(problem, recipe)
            cosine = (estimate @ exact / (estimate.norm() * exact.norm())).item()
            self.cosines[name].append(cosine)
            self.distances[name].append(((estimate - exact).norm() / exact.norm()).item())


def measure(model: str, seeds: int, warm_up: int, epochs: int, every: int) -> dict[Place, Result]:
    adam, rmsprop = partial(torch.optim.Adam, lr=RATE), torch.optim.RMSprop
    found: dict[Place, Result] = {"run": Result(), "minimum": Result()}
    for seed in range(1, seeds + 1):
        problem = make(model, seed)
        # Penalties are learned by one estimator, so that all are compared on one path.
        mode = Implicit(Neumann(20), on_failure="ignore")
        algorithm = AlternatingIFT(problem, mode, inner=adam, outer=rmsprop)
        algorithm.descend(warm_up)
        for epoch in range(epochs):
            algorithm.step()
            if (epoch + 1) % every == 0:
                found["run"].add(problem)
                solved = newton_cg(problem.inner_objective(), gtol=1e-10)
                found["minimum"].add(problem.at(solved))
    return found


def flat(problem: Bilevel, recipe: Recipe) -> Tensor:
    value = estimate_hypergradient(problem, Implicit(recipe, on_failure="ignore")).value
    assert isinstance(value, dict)
    return problem.hyper_space.flatten(value)


def draw(found: dict[str, dict[Place, Result]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for colour, (model, result) in enumerate(found.items()):
        means = {n: statistics.mean(c) for n, c in result["minimum"].cosines.items()}
        series = [means[f"Neumann, K = {k}"] for k in TERMS]
        axis.plot(TERMS, series, "o-", color=f"C{colour}", label=f"{model}, Neumann")
        axis.axhline(means["CG, 20 steps"], ls="--", color=f"C{colour}", label=f"{model}, CG")
    axis.set(xlabel="terms K", ylabel="cosine with the exact hypergradient")
    axis.legend(frameon=False)
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="one seed, 20 and 10 epochs")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    sizes = (1, 20, 10, 10) if options.small else (options.seeds, 200, 400, 50)
    found = {}
    for model in ("linear", "one hidden layer"):
        found[model] = measure(model, *sizes)
        for place, result in found[model].items():
            print(
                f"\n{model}, at the {place}: gradients up to {result.gradient:.1e}, smallest "
                f"eigenvalue {result.smallest:.2g}, {sizes[0]} seeds"
            )
            print(f"  {'estimator':<30} {'cosine':>8} {'worst':>8} {'distance':>9}")
            for name, cosines in result.cosines.items():
                mean, distance = statistics.mean(cosines), statistics.mean(result.distances[name])
                print(f"  {name:<30} {mean:8.4f} {min(cosines):8.4f} {distance:9.2g}")
    if options.figure is not None:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
