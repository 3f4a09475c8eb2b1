"""Draws the picture of `docs/concepts/choosing-a-solver.md`: residuals against products.

One system for all iterative recipes: the five-point Laplacian of a square plus a multiple of the
identity, condition number about 70, to a relative residual of 1e-8. Prints steps and products of
each. The products are those that Solution.products counts: with `A` and `A.H`, preparation
included; one for each sweep of a projection method.

    python benchmarks/convergence.py [--output docs/concepts/convergence.svg]

Needs matplotlib, which the extra `plot` installs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import scipy.sparse
import torch

from woodbury import (
    CG,
    GMRES,
    LSMR,
    LSQR,
    MINRES,
    SOR,
    SSOR,
    BiCGSTAB,
    BlockJacobi,
    Chebyshev,
    Deflation,
    GaussSeidel,
    IncompleteCholesky,
    IncompleteLU,
    Jacobi,
    Kaczmarz,
    NearestKronecker,
    Neumann,
    Nystrom,
    Richardson,
    SketchPrecondition,
    SketchProject,
    Solution,
    Sparse,
    solve,
)
from woodbury.solvers import BlockCG, Recipe

RTOL = 1e-8
SIDE = 24
LIMIT = 1000  # products shown
SHIFT = 0.1
POINTS = 40  # of a curve, at most: the picture stays small


def system() -> tuple[Sparse, torch.Tensor]:
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(SIDE, SIDE))
    n = SIDE * SIDE
    matrix = scipy.sparse.kronsum(line, line) + SHIFT * scipy.sparse.eye_array(n)
    b = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Sparse(scipy.sparse.csr_array(matrix), tags={"positive_definite"}), b


def best_omega() -> float:
    """Young's value: the spectral radius of Jacobi's method is known for this matrix."""
    radius = 4 * math.cos(math.pi / (SIDE + 1)) / (4 + SHIFT)
    return 2 / (1 + math.sqrt(1 - radius**2))


class Run(NamedTuple):
    """One curve."""

    name: str
    recipe: Recipe
    before: int = 0  # systems solved before with the same state
    columns: int = 1  # right-hand sides: the worst residual against products per column


def panels() -> dict[str, list[Run]]:
    omega = best_omega()
    krylov: list[Recipe] = [CG(), MINRES(), GMRES(restart=30), BiCGSTAB(), LSMR(), LSQR()]
    return {
        "Krylov methods, no preconditioner": [
            *(Run(type(recipe).__name__, recipe) for recipe in krylov),
            Run("BlockCG, 8 columns", BlockCG(), columns=8),
            Run("Deflation, third system", Deflation(rank=20), before=2),
        ],
        "Stationary and polynomial methods": [
            Run("Richardson", Richardson()),
            Run("Neumann", Neumann(terms=LIMIT)),
            Run("Jacobi", Jacobi()),
            Run("BlockJacobi, lines", BlockJacobi(size=SIDE)),
            Run("GaussSeidel", GaussSeidel()),
            Run("SSOR", SSOR(omega=omega)),
            Run("SOR, best omega", SOR(omega=omega)),
            Run("Chebyshev", Chebyshev()),
        ],
        "CG with preconditioners": [
            Run("BlockJacobi, lines", CG(preconditioner=BlockJacobi(size=SIDE))),
            Run("SSOR", CG(preconditioner=SSOR(omega=1.5))),
            Run("Nystrom, rank 60", CG(preconditioner=Nystrom(rank=60))),
            Run("NearestKronecker", CG(preconditioner=NearestKronecker(sizes=(SIDE, SIDE)))),
            Run("IC, level 0", CG(preconditioner=IncompleteCholesky(drop=None))),
            Run("IC, threshold", CG(preconditioner=IncompleteCholesky())),
            Run("GMRES with ILU", GMRES(preconditioner=IncompleteLU(drop=1e-2))),
        ],
        "Sketches and projections": [
            Run("Kaczmarz", Kaczmarz()),
            Run("Kaczmarz, 24 rows", Kaczmarz(block=SIDE)),
            Run("SketchProject, energy", SketchProject(metric="energy")),
            Run("SketchProject, 24 rows", SketchProject(metric="energy", block=SIDE)),
            Run("SketchPrecondition", SketchPrecondition()),
        ],
    }


def run(A: Sparse, b: torch.Tensor, case: Run) -> Solution:
    recipe = case.recipe
    fields = {"rtol": RTOL} if hasattr(recipe, "rtol") else {}
    if hasattr(recipe, "max_steps") and not isinstance(recipe, (Kaczmarz, SketchProject)):
        fields["max_steps"] = LIMIT
    recipe = replace(recipe, **fields)
    state = None
    for seed in range(case.before):
        other = torch.randn(
            len(b), dtype=b.dtype, generator=torch.Generator().manual_seed(1 + seed)
        )
        state = solve(A, other, recipe, state=state).state
    if case.columns > 1:
        generator = torch.Generator().manual_seed(0)
        b = torch.randn(len(b), case.columns, dtype=b.dtype, generator=generator)
    return solve(A, b, recipe, state=state, history=True, throw=False)


def curve(solution: Solution) -> tuple[list[float], list[float]]:
    """Products and residuals, thinned out; products are spread evenly over the steps."""
    assert solution.history is not None
    columns = solution.residual.numel()
    history = solution.history.reshape(len(solution.history), columns).amax(1).tolist()
    if len(history) < 2:  # solved by what was prepared
        return [float(solution.products)], [max(float(solution.residual), RTOL / 1.5)]
    prepared = 0 if solution.state is None else solution.state.products
    each = (solution.products - prepared) / columns / max(1, len(history) - 1)
    last = len(history) - 1
    steps = sorted({0, last, *(round(last ** (i / POINTS)) for i in range(POINTS + 1))})
    kept = [k for k in steps if prepared + each * k <= LIMIT]
    return [max(1.0, prepared + each * k) for k in kept], [max(history[k], 1e-16) for k in kept]


def draw(found: dict[str, list[tuple[str, Solution]]], output: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "woodbury", "font.size": 8})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 7), sharex=True, sharey=True)
    styles: Sequence[str] = ("-", "--", ":", "-.")
    for axis, (title, runs) in zip(axes.flat, found.items(), strict=True):
        for i, (name, solution) in enumerate(runs):
            x, y = curve(solution)
            style = styles[i % 4] if len(x) > 1 else "o"
            axis.loglog(x, y, style, label=name, linewidth=1.3)
        axis.set_title(title)
        axis.set_ylim(1e-13, 3)  # room for the legend below the tolerance
        axis.set_xlim(1, LIMIT)
        axis.axhline(RTOL, color="grey", linewidth=0.7)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower left", fontsize=7, ncol=2)
    for axis in axes[1]:
        axis.set_xlabel("products with A or its adjoint")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative residual")
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None, "Creator": None})
    text = output.read_text(encoding="utf-8")
    output.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", "utf-8")


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=root / "docs/concepts/convergence.svg")
    options = parser.parse_args()
    torch.set_num_threads(1)
    A, b = system()
    eigenvalues = torch.linalg.eigvalsh(A.to_dense())
    print(f"n = {A.shape[0]}, condition number {float(eigenvalues[-1] / eigenvalues[0]):.1f}")
    found: dict[str, list[tuple[str, Solution]]] = {}
    for title, runs in panels().items():
        print(title)
        found[title] = [(case.name, run(A, b, case)) for case in runs]
        for name, solution in found[title]:
            print(
                f"  {name:26} {solution.steps:6} steps {solution.products:6} products, residual "
                f"{float(solution.residual.max()):8.1e}, {solution.status.name}"
            )
    draw(found, options.output)
    print(f"drawn: {options.output.name}, {options.output.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
