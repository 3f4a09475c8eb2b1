"""`Auto` beside the best recipe picked by hand, in products, on systems of all kinds.

    python benchmarks/auto.py [--rtol 1e-6]

Every recipe that fits a system is run on it; the best one is that with the fewest products among
those whose answer is certified: a relative residual within the tolerance, recomputed here, or,
where there is no solution, a gradient of least squares within it. Forming a matrix counts as n
products. Printed are the products of `Auto` and of the best, their ratio, and what `Auto` chose.
Reads the matrices of the data folder (WOODBURY_DATA, by default ../shared/data beside the
repository).
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from solvers import load
from torch import Tensor

from woodbury import (
    CG,
    Auto,
    Dense,
    Diagonal,
    Eigh,
    FunctionOperator,
    GaussNewton,
    Hessian,
    Identity,
    Kernel,
    Kronecker,
    LinearOperator,
    LowRank,
    Nystrom,
    Objective,
    Sparse,
    solve,
)
from woodbury.errors import WoodburyError
from woodbury.kernels import RBF
from woodbury.solvers import (
    GMRES,
    LDL,
    LSMR,
    LU,
    MINRES,
    QR,
    BiCGSTAB,
    Cholesky,
    IncompleteCholesky,
    IncompleteLU,
    Jacobi,
    Recipe,
    Structural,
)

F64 = torch.float64
System = tuple[str, LinearOperator, Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(spectrum: Tensor, seed: int = 1) -> Tensor:
    Q, _ = torch.linalg.qr(draw(len(spectrum), len(spectrum), seed=seed))
    M = (Q * spectrum) @ Q.mT
    return (M + M.mT) / 2


def hidden(M: Tensor, *tags: str) -> FunctionOperator:
    """A matrix with no structure to be seen."""
    shape = (M.shape[0], M.shape[1])
    return FunctionOperator(lambda X: M @ X, shape, lambda Y: M.mT @ Y, tags=tags, dtype=F64)


def hidden_sparse(matrix: Any, *tags: str) -> FunctionOperator:
    A = Sparse(matrix)
    return FunctionOperator(A._matmat, A.shape, A._rmatmat, tags=tags, dtype=F64)


def definite_systems() -> Iterator[System]:
    n = 400
    pd = "positive_definite"
    yield (
        "SPD, condition 10",
        hidden(with_spectrum(torch.linspace(0.1, 1, n, dtype=F64)), pd),
        draw(n),
    )
    yield (
        "SPD, condition 1e3",
        hidden(with_spectrum(torch.logspace(-3, 0, n, dtype=F64)), pd),
        draw(n),
    )
    yield (
        "SPD, condition 1e8",
        hidden(with_spectrum(torch.logspace(-8, 0, n, dtype=F64)), pd),
        draw(n),
    )
    clustered = torch.cat([torch.ones(n - 5), torch.logspace(1, 5, 5)]).to(F64)
    yield "SPD, five outliers", hidden(with_spectrum(clustered), pd), draw(n)
    yield (
        "SPD, block of 8",
        hidden(with_spectrum(torch.logspace(-2, 0, n, dtype=F64)), pd),
        draw(n, 8),
    )
    even = with_spectrum(torch.linspace(1, 3, n, dtype=F64))
    yield "SPD, block of 64", hidden(even, pd), draw(n, 64)
    yield (
        "SPD, dense",
        Dense(with_spectrum(torch.logspace(-5, 0, n, dtype=F64)), tags={pd}),
        draw(n),
    )
    semi = with_spectrum(torch.cat([torch.zeros(100), torch.linspace(1, 2, n - 100)]).to(F64))
    yield "PSD, singular, consistent", hidden(semi, "positive_semidefinite"), semi @ draw(n)
    yield "PSD, singular, inconsistent", hidden(semi, "positive_semidefinite"), draw(n)
    false = with_spectrum(torch.linspace(-0.1, 2, n, dtype=F64))
    yield "tagged PSD, is not", hidden(false, "positive_semidefinite"), draw(n)


def hermitian_systems() -> Iterator[System]:
    n = 400
    two = torch.cat([torch.linspace(-2, -1, 200), torch.linspace(1, 2, 200)]).to(F64)
    yield "indefinite, a gap around 0", hidden(with_spectrum(two), "hermitian"), draw(n)
    near = torch.linspace(-1, 1, n, dtype=F64)
    yield "indefinite, near 0", hidden(with_spectrum(near), "hermitian"), draw(n)
    singular = two.clone()
    singular[150:200] = 0
    M = with_spectrum(singular)
    yield "indefinite, singular, consistent", hidden(M, "hermitian"), M @ draw(n)
    yield "indefinite, singular, inconsistent", hidden(M, "hermitian"), draw(n)


def general_systems() -> Iterator[System]:
    n = 300
    near = torch.eye(n, dtype=F64) + 0.3 * draw(n, n) / n**0.5
    yield "nonsymmetric, near I", hidden(near), draw(n)
    yield "nonsymmetric, random", hidden(draw(n, n)), draw(n)
    upper = torch.triu(draw(n, n), 1) / n**0.5 + torch.diag(torch.linspace(1, 4, n, dtype=F64))
    yield "nonsymmetric, triangular", hidden(upper), draw(n)
    yield "nonsymmetric, dense", Dense(draw(n, n)), draw(n)
    left = draw(n, n)
    left[:, :20] = left[:, 20:40]
    yield "nonsymmetric, singular, consistent", hidden(left), left @ draw(n, seed=5)


def rectangular_systems() -> Iterator[System]:
    U, _ = torch.linalg.qr(draw(600, 200))
    V, _ = torch.linalg.qr(draw(200, 200, seed=3))
    easy = (U * torch.linspace(1, 5, 200, dtype=F64)) @ V.mT
    hard = (U * torch.logspace(-4, 0, 200, dtype=F64)) @ V.mT
    yield "over-determined, condition 5", hidden(easy), draw(600, seed=7)
    yield "over-determined, condition 1e4", hidden(hard), draw(600, seed=7)
    yield "over-determined, consistent", hidden(easy), easy @ draw(200, seed=8)
    yield "under-determined, condition 5", hidden(easy.mT), draw(200, seed=7)
    deficient = easy @ torch.diag((torch.arange(200) < 150).to(F64)) @ draw(200, 200) / 14
    yield "over-determined, rank 150", hidden(deficient), draw(600, seed=7)


def sparse_systems(folder: Path | None) -> Iterator[System]:
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(30, 30))
    eye = scipy.sparse.eye_array(30)
    poisson = scipy.sparse.kron(line, eye) + scipy.sparse.kron(eye, line)
    wind = scipy.sparse.diags_array([-1.0, 1.0], offsets=[-1, 0], shape=(30, 30))
    flow = poisson + 2.0 * scipy.sparse.kron(eye, wind)
    yield "Poisson, sparse", Sparse(poisson, tags={"positive_definite"}), draw(900)
    yield "Poisson, products only", hidden_sparse(poisson, "positive_definite"), draw(900)
    yield "convection, sparse", Sparse(flow), draw(900)
    yield "convection, products only", hidden_sparse(flow), draw(900)
    noise = scipy.sparse.random_array((500, 500), density=0.01, rng=np.random.default_rng(0))
    random = noise + 2.0 * scipy.sparse.eye_array(500)
    yield "random sparse, products only", hidden_sparse(random), draw(500)
    if folder is None:
        return
    for name, tags in (
        ("bcsstk01", ("positive_definite",)),
        ("bcsstk13", ("positive_definite",)),
        ("west0067", ()),
        ("olm1000", ()),
    ):
        matrix = load(folder, name)
        yield f"{name}, sparse", Sparse(matrix, tags=tags), Sparse(matrix) @ draw(matrix.shape[0])
    stiffness = load(folder, "bcsstk01")
    A = hidden_sparse(stiffness, "positive_definite")
    yield "bcsstk01, products only", A, A @ draw(A.shape[0])


def structured_systems() -> Iterator[System]:
    n = 1000
    x = draw(n, 3)
    K = Kernel(x, kernel=RBF(lengthscale=2.0), tags={"positive_semidefinite"})
    yield "RBF kernel, ridge 1e-2", K + 1e-2 * Identity(n, dtype=F64), draw(n)
    yield "RBF kernel, ridge 10", K + 10.0 * Identity(n, dtype=F64), draw(n)
    rough = Kernel(draw(n, 8), kernel=RBF(lengthscale=1.0), tags={"positive_semidefinite"})
    yield "rough RBF kernel, ridge 0.1", rough + 0.1 * Identity(n, dtype=F64), draw(n)
    parts = [Dense(with_spectrum(torch.logspace(-2, 0, 20, dtype=F64))) for _ in range(2)]
    yield "Kronecker", Kronecker(*parts), draw(400)
    yield "Kronecker + shift", Kronecker(*parts) + 0.1 * Identity(400, dtype=F64), draw(400)
    spread = Diagonal(torch.linspace(1, 9, n, dtype=F64), tags={"positive_definite"})
    yield "low rank + diagonal", LowRank(draw(n, 10)) + spread, draw(n)
    decay = hidden(with_spectrum(torch.logspace(0, -9, 500, dtype=F64)), "positive_semidefinite")
    yield "fast decay, shift 1e-4", decay + 1e-4 * Identity(500, dtype=F64), draw(500)


def network_systems() -> Iterator[System]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    model = model.to(F64)
    data = (draw(200, 8), torch.randint(0, 4, (200,)))
    for l2 in (1e-1, 1e-3):
        objective = Objective(model, torch.nn.CrossEntropyLoss(), data, l2=l2)
        n = objective.space.dim
        yield f"Gauss-Newton, l2 {l2:g}", GaussNewton(objective), draw(n)
        yield f"Hessian, l2 {l2:g}", Hessian(objective), draw(n)


def by_hand(A: LinearOperator, rtol: float) -> list[Recipe]:
    """Every recipe that one would try by hand."""
    least: list[Recipe] = [LSMR(rtol=rtol), QR()]
    if not A.is_square:
        return least
    n = A.shape[0]
    found: list[Recipe] = [*least, LU(), GMRES(rtol=rtol, restart=n), GMRES(rtol=rtol, restart=50)]
    found.append(BiCGSTAB(rtol=rtol))
    if A.has_inverse:
        found.append(Structural())
    if "hermitian" in A.tags:
        found += [MINRES(rtol=rtol), CG(rtol=rtol), Eigh(), LDL(), Cholesky()]
        ranks = (10, 20, 40, 80, 160)
        found += [CG(rtol=rtol, preconditioner=Nystrom(rank=r)) for r in ranks if r < n]
        found.append(CG(rtol=rtol, preconditioner=Jacobi()))
    if isinstance(A, Sparse):
        found.append(GMRES(rtol=rtol, preconditioner=IncompleteLU()))
        if "hermitian" in A.tags:
            found.append(CG(rtol=rtol, preconditioner=IncompleteCholesky()))
    return found


def certified(A: LinearOperator, b: Tensor, x: Tensor, rtol: float) -> bool:
    """A small residual, or, if there is none to be had, a small gradient of least squares."""
    with torch.no_grad():
        r = b - A @ x
        if not bool(torch.isfinite(x).all()):
            return False
        small = r.norm(dim=0) <= 1.01 * rtol * b.norm(dim=0)
        M = A.to_dense()
        normal = (M.mT @ r).norm(dim=0)
        flat = normal <= 2 * rtol * torch.linalg.matrix_norm(M, 2) * r.norm(dim=0)
        return bool((small | flat).all())


def run(A: LinearOperator, b: Tensor, recipe: Recipe, rtol: float) -> Any:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            solution = solve(A, b, recipe, throw=False)
    except WoodburyError:
        return None
    return solution if certified(A, b, solution.value, rtol) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rtol", type=float, default=1e-6)
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    folder: Path | None = Path(os.environ.get("WOODBURY_DATA", root / "../shared/data"))
    folder = folder.resolve() / "matrices"  # type: ignore[union-attr]
    if not folder.is_dir():
        print(f"without the matrices of {folder}, which is missing: set WOODBURY_DATA")
        folder = None
    sources: list[Callable[[], Iterator[System]]] = [
        definite_systems,
        hermitian_systems,
        general_systems,
        rectangular_systems,
        lambda: sparse_systems(folder),
        structured_systems,
        network_systems,
    ]
    print(f"{'system':36} {'Auto':>6} {'best':>6} {'ratio':>6}  Auto's recipe / best by hand")
    within = answered = count = 0
    for source in sources:
        for name, A, b in source():
            count += 1
            auto = run(A, b, Auto(rtol=arguments.rtol), arguments.rtol)
            hand: tuple[float, str] = (float("inf"), "none")
            for recipe in by_hand(A, arguments.rtol):
                found = run(A, b, recipe, arguments.rtol)
                if found is not None and found.products < hand[0]:
                    hand = found.products, label(recipe)
            if auto is None:
                print(f"{name:36} {'-':>6} {hand[0]:6.0f} {'-':>6}  not certified / {hand[1]}")
                continue
            ratio = auto.products / hand[0]
            answered += 1
            within += ratio <= 2
            chosen = label(auto.state.chosen)
            print(
                f"{name:36} {auto.products:6} {hand[0]:6.0f} {ratio:6.2f}  {chosen} / {hand[1]}",
                flush=True,
            )
    print(f"certified: {answered} of {count}; within twice the best: {within} of {count}")


def label(recipe: Recipe) -> str:
    inner = getattr(recipe, "preconditioner", None)
    name = type(recipe).__name__
    if isinstance(inner, Nystrom):
        return f"{name} + Nystrom({inner.rank}{'..' if inner.tolerance else ''})"
    if inner is not None:
        return f"{name} + {type(inner).__name__}"
    return name


if __name__ == "__main__":
    main()
