"""Relative error of a damped Gauss-Newton solve on an MNIST network, product by product.

A trained 784-64-32-10 network, the first 2,000 rows of MNIST, the Gauss-Newton matrix plus ``mu I``
(52,650 parameters), right-hand sides the gradients of two test losses, float64. The reference is
conjugate gradients to a relative residual of 1e-12, checked by its true residual, and reached from
another side without preconditioner. Every recipe is stopped after so many products with the matrix;
a sketch is counted among them, and the fits are said in gradients. One damping of the
preconditioner is chosen beforehand by the residual of another system after 40 steps.

    python benchmarks/damped_solves.py [--small] [--mu MU]
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
    Identity,
    LinearOperator,
    Neumann,
    Nystrom,
    Objective,
    solve,
)
from woodbury.operators import Diagonal

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


def _chosen(E: EKFAC, A: LinearOperator) -> float:
    """The damping of the preconditioner with the smallest residual on a right-hand side of its own.

    After 40 steps; residuals need no reference.
    """
    z = torch.randn(A.shape[1], generator=torch.Generator().manual_seed(1), dtype=A.dtype)
    residuals = {}
    for damping in (0.01, 0.03, 0.1, 0.3, 1.0):
        recipe = CG(rtol=0, max_steps=40, preconditioner=E.damped_inverse(damping))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            residuals[damping] = float(solve(A, A @ z, recipe, throw=False).residual)
    return min(residuals, key=residuals.get)


def main(small: bool = False, mu: float = 1e-3) -> None:
    torch.set_num_threads(2)
    train, budgets = (200, (2, 5)) if small else (2000, (5, 10, 20, 40, 80))
    x, y, x_test, y_test = rows(train, 2)
    model = trained(x, y, 2 if small else 10)
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
    means = E.mean_eigenvalues()
    more = {name: mu + mean for name, mean in means.items()}
    inverses["EK-FAC, mu + layer's mean"] = E.damped_inverse(more)
    chosen = _chosen(E, A)
    inverses[f"EK-FAC, {chosen:g} (chosen)"] = E.damped_inverse(chosen)
    exact = solve(A, B, CG(rtol=1e-12, preconditioner=inverses["EK-FAC"]))
    plain = solve(A, B, CG(rtol=1e-9 if small else 1e-11, max_steps=5000))
    truth = plain.value if small else exact.value
    gap = float((plain.value - exact.value).norm() / truth.norm())
    print(
        f"{n:,} parameters, {train:,} rows, mu = {mu:g}; reference: residual "
        f"{float(torch.as_tensor(exact.residual).max()):.1e}; without preconditioner {plain.steps} "
        f"steps to the same point up to {gap:.1e}, with EK-FAC {exact.steps}"
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
    }
    for name, inverse in inverses.items():
        recipes[f"CG, {name}"] = lambda k, M=inverse: CG(rtol=0, max_steps=k, preconditioner=M)
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
    given = float(sys.argv[sys.argv.index("--mu") + 1]) if "--mu" in sys.argv else 1e-3
    main("--small" in sys.argv, given)
