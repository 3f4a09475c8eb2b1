"""How wrong is a derivative when its solution is: implicit and unrolled, against the iterate error.

Blondel et al. (2022, theorem 1): where the condition is smooth and its Jacobian well conditioned,
the implicit Jacobian at an iterate x_t is off by at most a constant times |x_t - x*|. The unrolled
Jacobian lags behind the iterate: for gradient descent its error falls like t q^t where that of the
iterate falls like q^t.

One penalty per feature, theta, on the diabetes data (442 rows, 10 features): ridge regression,
1/2 |X x - y|^2 + 1/2 sum theta_i x_i^2, where dx/dtheta = -(X^T X + diag theta)^-1 diag(x) and the
constant is 1 over the smallest eigenvalue; and logistic regression of y above its median, where
the curvature depends on x too. Solved by gradient descent from zero with the step 1/L. Printed are
errors in the Frobenius norm, all relative to that of the solution; slopes are those of a line
through the logarithms where the iterate is off by less than 0.1.

    python benchmarks/jacobian_error.py [--steps 800] [--figure PATH]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from woodbury.implicit import LBFGS, StationarityWarning, minimize

Objective = Callable[[Tensor, Tensor], Tensor]
PENALTY = 0.05


def problems() -> dict[str, tuple[Objective, float]]:
    """Objectives f(x, theta) and bounds L of their curvature."""
    from sklearn.datasets import load_diabetes

    data, target = load_diabetes(return_X_y=True)
    X, y = torch.from_numpy(data), torch.from_numpy(target)
    y = (y - y.mean()) / y.std()
    signs = torch.where(y > y.median(), 1.0, -1.0).to(X.dtype)
    largest = torch.linalg.eigvalsh(X.T @ X)[-1].item()

    def ridge(x: Tensor, theta: Tensor) -> Tensor:
        return 0.5 * ((X @ x - y) ** 2).sum() + 0.5 * (theta * x * x).sum()

    def logistic(x: Tensor, theta: Tensor) -> Tensor:
        margin = signs * (X @ x)
        return (
            torch.logaddexp(-margin, torch.zeros_like(margin)).sum() + 0.5 * (theta * x * x).sum()
        )

    return {"ridge": (ridge, largest + PENALTY), "logistic": (logistic, largest / 4 + PENALTY)}


def descend(f: Objective, step: float) -> Callable[..., Tensor]:
    """Gradient descent with a number of steps; it can be differentiated through."""
    slope = torch.func.grad(f)

    def run(x0: Tensor, theta: Tensor, *, steps: int) -> Tensor:
        x = x0
        for _ in range(steps):
            x = x - step * slope(x, theta)
        return x

    return run


def measure(f: Objective, L: float, steps: int) -> tuple[list[dict[str, float]], float, float]:
    """Errors after 1, 2, 3, 4, 6, ... steps, the condition, the constant that ridge's proof has."""
    theta = torch.full((10,), PENALTY, dtype=torch.float64)
    zero = torch.zeros_like(theta)
    star = LBFGS(tol=1e-13, max_steps=5000).run(f, zero, theta, throw=False).value
    for _ in range(3):  # to the last digits
        H = torch.func.jacrev(torch.func.grad(f))(star, theta)
        star = star - torch.linalg.solve(H, torch.func.grad(f)(star, theta))
    H = torch.func.jacrev(torch.func.grad(f))(star, theta)
    exact = -torch.linalg.solve(H, torch.diag(star))
    solver = minimize(f, descend(f, 1 / L))
    rows = []
    counts = [t for k in range(30) for t in (2**k, 3 * 2**k // 2) if 1 <= t <= steps]
    for count in sorted(set(counts)):
        found: dict[str, Any] = {"steps": count}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StationarityWarning)  # early iterates are not solutions
            x = solver(zero, theta, steps=count).detach()
            found["iterate"] = ((x - star).norm() / star.norm()).item()
            for mode in ("implicit", "unrolled"):
                solve = solver.with_mode(mode)
                J = torch.func.jacrev(lambda t, s=solve, k=count: s(zero, t, steps=k))(theta)
                found[mode] = ((J - exact).norm() / exact.norm()).item()
        rows.append(found)
    smallest = torch.linalg.eigvalsh(H)[0].item()
    return rows, L / smallest, (star.norm() / exact.norm() / smallest).item()


def slope(rows: list[dict[str, float]], name: str) -> float:
    """Of log error against log iterate error, by least squares."""
    kept = [row for row in rows if 1e-12 < row["iterate"] < 0.1]
    x = torch.tensor([row["iterate"] for row in kept]).double().log()
    y = torch.tensor([row[name] for row in kept]).double().log()
    return (((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()


def figure(path: Path, found: dict[str, list[dict[str, float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 4))
    for ax, (name, rows) in zip(axes, found.items(), strict=True):
        errors = [row["iterate"] for row in rows]
        ax.loglog(errors, [row["unrolled"] for row in rows], "x-", color="C3", label="unrolled")
        ax.loglog(errors, [row["implicit"] for row in rows], "o-", color="C0", label="implicit")
        ax.loglog(errors, errors, color="k", lw=0.6, label="slope 1")
        ax.invert_xaxis()
        ax.set_title(name)
        ax.set_xlabel("error of the iterate")
        ax.set_ylabel("error of its Jacobian")
        ax.legend()
    pictures.tight_layout()
    pictures.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    everything = {}
    for name, (f, L) in problems().items():
        rows, condition, constant = measure(f, L, options.steps)
        everything[name] = rows
        bound = f", ratio of implicit at most {constant:.2f}" if name == "ridge" else ""
        print(f"\n{name}, condition {condition:.0f}{bound}")
        print(
            f"{'steps':>5} {'iterate':>9} {'implicit':>9} {'ratio':>7} {'unrolled':>9} {'ratio':>7}"
        )
        for row in rows:
            print(
                f"{row['steps']:5.0f} {row['iterate']:9.1e} {row['implicit']:9.1e} "
                f"{row['implicit'] / row['iterate']:7.2f} {row['unrolled']:9.1e} "
                f"{row['unrolled'] / row['iterate']:7.1f}"
            )
        print(
            f"slope: implicit {slope(rows, 'implicit'):.3f}, unrolled {slope(rows, 'unrolled'):.3f}"
        )
    if options.figure is not None:
        figure(options.figure, everything)


if __name__ == "__main__":
    main()
