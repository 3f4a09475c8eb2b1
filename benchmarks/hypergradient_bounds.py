"""Every estimator of a hypergradient on a problem in closed form: its error beside its bound.

g = 1/2 w'(A + diag(exp L))w - b'w, f = 1/2 |C w - e|^2, 40 unknowns, condition number about 200, in
float64, all of it by formulas and LAPACK. With J = diag(exp L * w*) the error of a hypergradient is
J times that of the adjoint q = H^-1 a, so that each bound below is |J| |a| times one of the
approximate inverse. Printed: the largest ratio of error and bound over all draws, which must not
exceed 1, beside the relative error and what it took.

    python benchmarks/hypergradient_bounds.py [--draws 20] [--small] [--figure bounds.svg]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from woodbury import CG, Cholesky, Neumann, Nystrom
from woodbury.bilevel import (
    Bilevel,
    FiniteDifference,
    UnrolledDescent,
    estimate_hypergradient,
)
from woodbury.implicit import OneStep, Phantom, Truncated
from woodbury.solvers.nystrom import NystromState

RTOL = 1e-6
DAMPING = 1e-2


class T0:
    """The problem and everything about it."""

    def __init__(self, n: int, seed: int) -> None:
        gen = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen, dtype=torch.float64)

        rotation = torch.linalg.qr(randn(n, n)).Q
        spectrum = torch.logspace(0, -3, n, dtype=torch.float64)
        self.n = n
        self.A = rotation @ torch.diag(spectrum) @ rotation.T
        self.b, self.C, self.e, self.L = randn(n), randn(5, n), randn(5), randn(n) - 5
        self.H = self.A + torch.diag(self.L.exp())
        self.w = torch.linalg.solve(self.H, self.b)
        self.a = self.C.T @ (self.C @ self.w - self.e)
        self.q = torch.linalg.solve(self.H, self.a)
        self.J = self.L.exp() * self.w
        self.eigenvalues = torch.linalg.eigvalsh(self.H)
        self.step = 1 / self.eigenvalues[-1].item()
        self.exact = -self.J * self.q
        # |M| of the gradient step, and |J| |a| or |J| |q|, which errors of the inverse multiply
        self.contraction = 1 - self.step * self.eigenvalues[0].item()
        largest = self.J.abs().max().item()
        self.of_a, self.of_q = largest * self.a.norm().item(), largest * self.q.norm().item()

    def inner(self, w: Tensor, L: Tensor) -> Tensor:
        return 0.5 * w @ self.A @ w + 0.5 * (L.exp() * w**2).sum() - self.b @ w

    def outer(self, w: Tensor, L: Tensor) -> Tensor:
        return 0.5 * (self.C @ w - self.e).square().sum()

    def bilevel(self) -> Bilevel:
        return Bilevel(self.inner, self.outer, self.w.clone(), self.L.clone())

    def rounding(self) -> float:
        """Of backward-stable solves: the condition number times the rounding unit, generously."""
        condition = (self.eigenvalues[-1] / self.eigenvalues[0]).item()
        return 100 * self.n * torch.finfo(torch.float64).eps * condition * self.of_q


@dataclass
class Row:
    name: str
    estimator: Callable[[T0], object]
    bound: Callable[[T0], float]
    formula: str


def tail(t0: T0, rank: int) -> float:
    """|(H_k + r)^-1 - H^-1| |a| / |q| for a sketch H_k below H: (1/r) max(|H - H_k|, r)."""
    # The seed is in the recipe, so this is the sketch of the estimate.
    state = Nystrom(rank=rank, damping=DAMPING).prepare(t0.bilevel().linearize().hessian)
    assert isinstance(state, NystromState)
    basis, values = state.factor.basis, state.factor.eigenvalues
    left = torch.linalg.matrix_norm(t0.H - basis @ torch.diag(values) @ basis.T, 2).item()
    return max(left, DAMPING) / DAMPING


def rows(n: int) -> list[Row]:
    found = [Row("Cholesky", lambda t: Cholesky(), T0.rounding, "rounding")]
    smallest = lambda t: t.eigenvalues[0].item()  # noqa: E731
    for rtol in (1e-3, RTOL):
        found.append(
            Row(
                f"CG, rtol {rtol:g}",
                lambda t, rtol=rtol: CG(rtol=rtol),
                lambda t, rtol=rtol: rtol * t.of_a / smallest(t),
                "rtol |a| / m",
            )
        )
    for terms in (0, 1, 5, 20, 100):
        found.append(
            Row(
                f"Neumann, {terms} terms",
                lambda t, k=terms: Neumann(k, step=t.step),
                lambda t, k=terms: t.contraction ** (k + 1) * t.of_q,
                "|M|^(K+1) |q|",
            )
        )
    for name, make in (
        ("Truncated", lambda t: Truncated(steps=21, step=t.step)),
        ("UnrolledDescent", lambda t: UnrolledDescent(steps=21, step=t.step)),
        ("Phantom, damping 1/2", lambda t: Phantom(steps=21, damping=0.5, step=2 * t.step)),
    ):
        bound = lambda t: t.contraction**21 * t.of_q  # noqa: E731
        found.append(Row(f"{name}, 21 steps", make, bound, "|M|^21 |q|"))
    found.append(
        Row(
            "OneStep",
            lambda t: OneStep(step=t.step),
            lambda t: t.contraction * t.of_q,
            "|M| |q|",
        )
    )
    found.append(
        Row(
            f"Nystrom, rank {n}, damping {DAMPING:g}",
            lambda t: Nystrom(rank=n, damping=DAMPING),
            lambda t: DAMPING / (smallest(t) + DAMPING) * t.of_q,
            "r / (m + r) |q|",
        )
    )
    for rank in (n // 8, n // 2):
        found.append(
            Row(
                f"Nystrom, rank {rank}, damping {DAMPING:g}",
                lambda t, k=rank: Nystrom(rank=k, damping=DAMPING),
                lambda t, k=rank: tail(t, k) * t.of_q,
                "max(|H - H_k|, r) / r |q|",
            )
        )
    found.append(
        Row(
            f"FiniteDifference(CG, rtol {RTOL:g})",
            lambda t: FiniteDifference(CG(rtol=RTOL)),
            lambda t: 2 * RTOL * t.of_a / smallest(t),
            "2 rtol |a| / m",
        )
    )
    return found


@dataclass
class Line:
    name: str
    error: float
    ratio: float
    products: float
    status: str
    formula: str


def measure(n: int, draws: int) -> list[Line]:
    problems = [T0(n, seed) for seed in range(draws)]
    lines = []
    for row in rows(n):
        errors, ratios, products, statuses = [], [], [], set()
        for t0 in problems:
            problem = t0.bilevel()
            found = estimate_hypergradient(problem, row.estimator(t0))  # type: ignore[arg-type]
            error = (found.value - t0.exact).norm().item()  # type: ignore[operator]
            errors.append(error / t0.exact.norm().item())
            ratios.append(error / row.bound(t0))
            counts = problem.counts
            products.append(counts.inner_gradients + counts.hessian_products)
            statuses.add("-" if found.solution is None else found.solution.status.name)
        lines.append(
            Line(
                row.name,
                sorted(errors)[draws // 2],
                max(ratios),
                sum(products) / draws,
                "/".join(sorted(statuses)),
                row.formula,
            )
        )
    return lines


def draw(lines: list[Line], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for line in lines:
        axis.scatter(line.products, max(line.error, 1e-16), s=18)
        axis.annotate(line.name, (line.products, max(line.error, 1e-16)), fontsize=7)
    axis.set(xscale="log", yscale="log", ylabel="relative error of the hypergradient")
    axis.set_xlabel("inner gradients and Hessian products")
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="16 unknowns, 3 draws")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    n, draws = (16, 3) if options.small else (40, options.draws)
    lines = measure(n, draws)
    condition = max((t := T0(n, s).eigenvalues)[-1] / t[0] for s in range(draws))
    print(f"{n} unknowns, condition numbers up to {condition:.0f}, {draws} draws")
    head = f"{'estimator':<32} {'median error':>12} {'products':>8} {'error/bound':>11}"
    print(f"{head}  bound, status")
    for line in lines:
        print(
            f"{line.name:<32} {line.error:12.1e} {line.products:8.0f} {line.ratio:11.2f}  "
            f"{line.formula}, {line.status}"
        )
    if not all(line.ratio <= 1 for line in lines):
        raise SystemExit("a bound does not hold")
    print("every bound holds in every draw")
    if options.figure is not None:
        draw(lines, options.figure)


if __name__ == "__main__":
    main()
