"""Do influence scores predict the response they are the derivative of? Recipes on digits.

A 64-32-10 network on scikit-learn's digits, trained; for 50 training rows the proximal Bregman
response of 100 test losses (minimised by L-BFGS in float64) beside influence scores with the same
damping. Prints, for each matrix, the Pearson correlation with the response over rows, mean over
test rows and over 3 models, with a 95 % interval over rows and test rows, the ratio of sizes, and
seconds.

    python benchmarks/bregman.py
"""

from __future__ import annotations

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from woodbury import CG, EKFAC, KFAC, GaussNewton, Influence, Objective
from woodbury.curvature import diagonal_curvature
from woodbury.influence import rivals
from woodbury.influence.evaluation import bregman_response
from woodbury.influence.evaluation.statistics import bootstrap, pearson


def trained(x: Tensor, y: Tensor, seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        index = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return model


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--damping", type=float, default=1e-2)
    parser.add_argument("--small", action="store_true", help="few rows and one model")
    options = parser.parse_args(arguments)
    rows, queries, count, models = (60, 10, 6, 1) if options.small else (1000, 100, 50, 3)
    digits = load_digits()
    x, y = torch.as_tensor(digits.data) / 16, torch.as_tensor(digits.target)
    asked = x[-queries:], y[-queries:]
    x, y = x[:rows], y[:rows]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(rows, generator=generator)[:count].sort().values
    damping = options.damping
    found: dict[str, list] = {}
    response_seconds, converged = 0.0, 0
    for seed in range(models):
        model = trained(x, y, seed, 600)
        objective = Objective(model, "cross_entropy", (x, y))
        start = time.perf_counter()
        response = bregman_response(objective, asked, damping=damping, rows=chosen)
        response_seconds += time.perf_counter() - start
        converged += int(response.converged.sum())
        truth = response.scores.values
        for name, matrix in matrices(objective, seed).items():
            start = time.perf_counter()
            recipe = CG(rtol=1e-8) if name.startswith("Gauss-Newton") else None
            scores = Influence(objective, "loss", recipe, matrix=matrix(), damping=damping)
            values = scores.scores(asked, rows=chosen).values
            found.setdefault(name, []).append((values, truth, time.perf_counter() - start))
        start = time.perf_counter()
        values = rivals.data_inf(objective, asked, damping=damping).values[:, chosen]
        found.setdefault("DataInf", []).append((values, truth, time.perf_counter() - start))
    print(
        f"digits, {rows} rows, 2,410 parameters, damping {damping:g}: response of {count} rows in "
        f"{models} models {response_seconds:.0f} s, {converged} of {models * count} converged"
    )
    table = {}
    for name, runs in found.items():
        values = torch.cat([run[0] for run in runs])
        truth = torch.cat([run[1] for run in runs])

        def statistic(index: Tensor, lines: Tensor, values=values, truth=truth) -> float:
            return float(pearson(values[lines][:, index], truth[lines][:, index]).nanmean())

        interval = bootstrap(
            statistic, (count, len(values)), level=0.95, resamples=500, generator=None
        )
        scale = float((values * truth).sum() / truth.square().sum())
        seconds = sum(run[2] for run in runs) / len(runs)
        table[name] = interval.value
        print(f"{name:32s} Pearson {interval}   size {scale:5.2f}   {seconds:6.2f} s")
    return table


def matrices(objective: Objective, seed: int) -> dict:
    make = torch.Generator().manual_seed
    return {
        "Gauss-Newton, CG": lambda: GaussNewton(objective),
        "EK-FAC": lambda: EKFAC(objective, "exact"),
        "EK-FAC, one label drawn": lambda: EKFAC(objective, "sampled", generator=make(seed)),
        "K-FAC": lambda: KFAC(objective, "exact"),
        "diagonal": lambda: diagonal_curvature(objective),
        "empirical Fisher": lambda: "empirical_fisher",
        "identity": lambda: "identity",
    }


if __name__ == "__main__":
    main()
