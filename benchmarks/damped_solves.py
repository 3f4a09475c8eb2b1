"""Relative error of a damped Gauss-Newton solve on an MNIST network, product by product.

A trained 784-64-32-10 network, the first 2,000 rows of MNIST, the Gauss-Newton matrix plus ``mu I``
(52,650 parameters), right-hand sides the gradients of two test losses, float64. The reference is
conjugate gradients to a relative residual of 1e-12, checked by its true residual, and reached from
another side without preconditioner. Every recipe is stopped after so many products with the matrix
for each right-hand side; a sketch is counted among them, and the fits are said in gradients. "For
the budget" is ``woodbury.curvature.damping_for_steps`` with the number of products at hand, "for
80" with 80 for all columns: neither has seen a right-hand side or a product.

    python benchmarks/damped_solves.py [--small] [--mu MU] [--epochs EPOCHS]
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from woodbury import (
    CG,
    EKFAC,
    KFAC,
    GaussNewton,
    GradientWindow,
    Identity,
    LowRank,
    Neumann,
    Nystrom,
    Objective,
    solve,
)
from woodbury.curvature import (
    LayerMatrix,
    curvature_preconditioner,
    damping_for_steps,
    heavy_columns,
)
from woodbury.operators import Diagonal
from woodbury.solvers import GMRES, BlockCG

ROOT = Path(__file__).resolve().parent.parent


def rows(train: int, test: int) -> list[torch.Tensor]:
    folder = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data")).resolve()
    if not folder.is_dir():
        raise SystemExit(f"no data folder at {folder}: set WOODBURY_DATA to one with mnist.npz")
    file, found = np.load(folder / "mnist.npz"), []
    for part, n in (("train", train), ("test", test)):
        found.append(torch.from_numpy(file[f"x_{part}"][:n].reshape(n, -1)).float() / 255)
        found.append(torch.from_numpy(file[f"y_{part}"][:n]).long())
    return found


def trained(x: torch.Tensor, y: torch.Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model.double()


def main(small: bool = False, mu: float = 1e-3, epochs: int = 10) -> None:
    torch.set_num_threads(2)
    train, budgets = (200, (2, 5)) if small else (2000, (5, 10, 20, 40, 80))
    x, y, x_test, y_test = rows(train, 2)
    model = trained(x, y, 2 if small else epochs)
    x, x_test = x.double(), x_test.double()
    objective = Objective(model, "cross_entropy", (x, y))
    n = objective.space.dim
    A = GaussNewton(objective) + mu * Identity(n)
    queries = Objective(model, "cross_entropy", (x_test, y_test))
    B = torch.cat([g for _, g in queries.per_example_gradients()]).T.contiguous()

    start = time.perf_counter()
    objective.gradient()
    gradient = time.perf_counter() - start
    start = time.perf_counter()
    K, E = KFAC(objective, "exact"), EKFAC(objective, "exact")
    fit = (time.perf_counter() - start) / gradient
    inverses = {"K-FAC": K.damped_inverse(mu), "EK-FAC": E.damped_inverse(mu)}
    inverses["EK-FAC, default damping"] = E.damped_inverse()
    window = train // 10
    draw = torch.Generator().manual_seed(0)
    F = GradientWindow.from_objective(objective, mu, size=window, rows="sampled", generator=draw)
    inverses[f"M-FAC, {window} drawn gradients"] = F.inverse()
    heavy = LowRank(heavy_columns(E, window)) + mu * Identity(n)
    inverses[f"{window} heavy columns"] = heavy.inverse()
    front = curvature_preconditioner(E, mu, 100, columns=window)
    exact = solve(A, B, CG(rtol=1e-12, preconditioner=front))
    plain = solve(A, B, CG(rtol=1e-9 if small else 1e-11, max_steps=20000))
    truth = plain.value if small else exact.value
    gap = float((plain.value - exact.value).norm() / truth.norm())
    print(
        f"{n:,} parameters, {train:,} rows, {epochs} epochs, mu = {mu:g}; reference: residual "
        f"{float(torch.as_tensor(exact.residual).max()):.1e}; without preconditioner {plain.steps} "
        f"steps to the same point up to {gap:.1e}, with EK-FAC and heavy columns {exact.steps}"
    )
    print(f"both fits together: {fit:.0f} gradients; no products with the matrix")
    jacobi = Diagonal(1 / (E.diagonal() + mu), tags={"positive_definite"})
    recipes = {
        "Neumann": lambda k: Neumann(terms=k),
        "CG": lambda k: CG(rtol=0, max_steps=k),
        "CG, diagonal": lambda k: CG(rtol=0, max_steps=k, preconditioner=jacobi),
        "CG, Nystrom of half the products": lambda k: CG(
            rtol=0, max_steps=k - k // 2, preconditioner=Nystrom(rank=max(1, k // 2))
        ),
        "block CG": lambda k: BlockCG(rtol=0, max_steps=k),
        "GMRES, all directions kept": lambda k: GMRES(rtol=0, max_steps=k, restart=k),
    }
    for name, inverse in inverses.items():
        recipes[f"CG, {name}"] = lambda k, M=inverse: CG(rtol=0, max_steps=k, preconditioner=M)

    def damped(curvature: KFAC, steps: int) -> LayerMatrix:
        return curvature.damped_inverse(damping_for_steps(mu, steps))

    recipes["CG, K-FAC, for the budget"] = lambda k: CG(
        rtol=0, max_steps=k, preconditioner=damped(K, k)
    )
    last = damped(E, budgets[-1])
    recipes[f"CG, EK-FAC, for {budgets[-1]}"] = lambda k: CG(
        rtol=0, max_steps=k, preconditioner=last
    )
    recipes["CG, EK-FAC, for the budget"] = lambda k: CG(
        rtol=0, max_steps=k, preconditioner=damped(E, k)
    )
    recipes[f"CG, EK-FAC and {window} heavy columns"] = lambda k: CG(
        rtol=0,
        max_steps=k,
        preconditioner=curvature_preconditioner(E, mu, k, columns=window),
    )
    recipes["block CG, EK-FAC, for the budget"] = lambda k: BlockCG(
        rtol=0, max_steps=k, preconditioner=damped(E, k)
    )
    print(f"{'relative error after products':<34}" + "".join(f"{k:>10}" for k in (0, *budgets)))
    for name, inverse in inverses.items():
        error = float(((inverse @ B) - truth).norm() / truth.norm())
        print(f"{name + ' alone':<34}{error:>10.1e}", flush=True)
    for name, recipe in recipes.items():
        errors = []
        for k in budgets:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = solve(A, B, recipe(k), throw=False).value
            errors.append(float((value - truth).norm() / truth.norm()))
        print(f"{name:<34}{'':>10}" + "".join(f"{e:>10.1e}" for e in errors), flush=True)


if __name__ == "__main__":
    words = sys.argv
    main(
        "--small" in words,
        float(words[words.index("--mu") + 1]) if "--mu" in words else 1e-3,
        int(words[words.index("--epochs") + 1]) if "--epochs" in words else 10,
    )
