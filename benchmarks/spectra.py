"""Spectral estimators: errors, coverage of their intervals, and matfree beside them.

Prints
- the error of XTrace, XNysTrace, Hutch++ and Hutchinson at 60 products on spectra that decay;
- how often 95 % intervals hold the truth, for every estimator, over 200 runs, and how often those
  of matfree's standard errors do (leave-one-out estimators, value -+ 1.96 standard errors);
- the 1-Wasserstein distance between the density and the exact eigenvalues of the Hessian of a
  trained network of 3,000 parameters, from 10 probes of 80 steps;
- the log-determinant of a Laplacian beside matfree (JAX, CPU, compiled): time and error;
- eigenpairs of a Laplacian beside SciPy's eigsh and lobpcg: products, time, true residual.

    python benchmarks/spectra.py [--threads 1] [--runs 200] [--repeats 5] [--only errors,coverage]

matfree is run by the interpreter in WOODBURY_PEERS_PYTHON, by default .venv-peers/bin/python.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
N = 300
GRIDS = (32, 100)  # 1,024 and 10,000 points
PROBES, STEPS = 20, 40
SPECTRA: dict[str, np.ndarray] = {
    "1/i^2": np.arange(1, N + 1.0) ** -2,
    "1/i": 1 / np.arange(1, N + 1.0),
    "flat": 1 + np.arange(1, N + 1.0) / N,
    "0.8^i": 0.8 ** np.arange(1, N + 1.0),
    "step": np.where(np.arange(1, N + 1) <= 20, 1.0, 1e-3),
}


def matrix(name: str) -> np.ndarray:
    """A symmetric matrix with the spectrum and random eigenvectors."""
    Q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))
    M = (Q * SPECTRA[name]) @ Q.T
    return (M + M.T) / 2


def shifted_laplacian_eigenvalues(side: int) -> np.ndarray:
    """Of the five-point stencil with Dirichlet boundary plus 0.1 of the identity."""
    one = 2 - 2 * np.cos(np.pi * np.arange(1, side + 1) / (side + 1))
    return (one[:, None] + one[None, :] + 0.1).ravel()


def shortest(repeats: int, job: Callable[[int], Any]) -> tuple[float, list[Any]]:
    """The shortest time, and what each run returned."""
    best, found = math.inf, []
    for seed in range(repeats):
        start = time.perf_counter()
        found.append(job(seed))
        best = min(best, time.perf_counter() - start)
    return best, found


# --------------------------------------------------------------------- woodbury


def operator(M: np.ndarray, tags: set[str]) -> Any:
    import torch

    from woodbury import FunctionOperator

    T = torch.from_numpy(M)
    return FunctionOperator(lambda X: T @ X, T.shape, dtype=T.dtype, tags=tags)


def errors(runs: int) -> None:
    import torch

    from woodbury.spectra import Hutchinson, HutchPlusPlus, XNysTrace, XTrace, trace

    methods = (Hutchinson(60), HutchPlusPlus(60), XTrace(60), XNysTrace(60))
    print(f"root mean square error of the trace over {runs} seeds, 60 products, n = {N}")
    print(f"{'spectrum':10}" + "".join(f"{type(m).__name__:>16}" for m in methods))
    for name in SPECTRA:
        M = matrix(name)
        A, truth, row = operator(M, {"positive_semidefinite"}), np.trace(M), []
        for method in methods:
            squares = 0.0
            for seed in range(runs):
                generator = torch.Generator().manual_seed(seed)
                squares += (float(trace(A, method, generator=generator).value) - truth) ** 2
            row.append(math.sqrt(squares / runs))
        print(f"{name:10}" + "".join(f"{error:16.3e}" for error in row), end="")
        target = " (target 10)" if name == "1/i^2" else ""
        print(f"   Hutchinson / XTrace = {row[0] / row[2]:.1f}{target}")


def coverage(runs: int, theirs: dict[str, Any]) -> None:
    import torch

    from woodbury import spectra as s

    slq = s.SLQ(probes=20, steps=14)
    jobs: dict[str, Callable[[Any, Any], Any]] = {
        "trace Hutchinson(60)": lambda A, g: s.trace(A, s.Hutchinson(60), generator=g),
        "trace HutchPlusPlus(60)": lambda A, g: s.trace(A, s.HutchPlusPlus(60), generator=g),
        "trace XTrace(60)": lambda A, g: s.trace(A, s.XTrace(60), generator=g),
        "trace XNysTrace(60)": lambda A, g: s.trace(A, s.XNysTrace(60), generator=g),
        "diagonal Hutchinson(60)": lambda A, g: s.diagonal(A, s.Hutchinson(60), generator=g),
        "diagonal XDiag(60)": lambda A, g: s.diagonal(A, s.XDiag(60), generator=g),
        "frobenius_norm(60)": lambda A, g: s.frobenius_norm(A, s.Hutchinson(60), generator=g),
        "logdet 20 x 14": lambda A, g: s.logdet(A, slq, generator=g),
        "logdet 20 x 14, rank 40": lambda A, g: s.logdet(A, slq, rank=40, generator=g),
        "logdet 20 x 14, lower": lambda A, g: s.logdet(A, slq, lower=0.0099, generator=g),
        "effective_dimension": lambda A, g: s.effective_dimension(A, 0.1, slq, generator=g),
        "density.moment(2)": lambda A, g: s.density(A, slq, generator=g).moment(2),
    }
    print(f"\nshare of 95 % intervals that hold the truth, {runs} runs, in % (target 90 to 99)")
    print(f"{'':34}" + "".join(f"{name:>9}" for name in SPECTRA))
    for job, run in jobs.items():
        row = []
        for name in SPECTRA:
            shifted = 0.01 if job.startswith(("logdet", "eff", "dens")) else 0.0
            M = matrix(name) + shifted * np.eye(N)
            A, T = operator(M, {"positive_definite"}), torch.from_numpy(M)
            values = torch.from_numpy(SPECTRA[name] + shifted)
            what = job.split()[0].split("(")[0]
            truth = {
                "trace": values.sum(),
                "diagonal": T.diagonal(),
                "frobenius_norm": values.norm(),
                "logdet": values.log().sum(),
                "effective_dimension": (values / (values + 0.1)).sum(),
                "density.moment": values.square().mean(),
            }[what]
            inside = 0.0
            for seed in range(runs):
                low, high = run(A, torch.Generator().manual_seed(seed)).interval()
                inside += float(((low <= truth) & (truth <= high)).double().mean())
            row.append(100 * inside / runs)
        print(f"{job:34}" + "".join(f"{share:9.1f}" for share in row), flush=True)
    for job, shares in theirs.items():
        print(f"{'matfree ' + job:34}" + "".join(f"{100 * x:9.1f}" for x in shares))


def hessian_density() -> None:
    import torch

    from woodbury import Hessian, Objective
    from woodbury.spectra import SLQ, density

    torch.manual_seed(0)
    sizes = (20, 60, 28, 3)
    layers: list[torch.nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [torch.nn.Linear(a, b), torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers[:-1]).double()
    x = torch.randn(512, 20, dtype=torch.float64)
    y = (x[:, :3] + 0.5 * torch.randn(512, 3, dtype=torch.float64)).argmax(1)
    print("\ndensity of the Hessian of a network, 10 probes of 80 steps, against its eigenvalues")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epochs in (0, 300):
        for _ in range(epochs):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        H = Hessian(Objective(model, "cross_entropy", (x, y)))
        exact = torch.linalg.eigvalsh(H.to_dense())
        spread = float(exact[-1] - exact[0])
        for kind in ("full", "selective", "none"):
            start = time.perf_counter()
            found = density(H, SLQ(probes=10, steps=80, reorthogonalize=kind))
            seconds = time.perf_counter() - start
            distance = found.wasserstein(exact) / spread
            print(
                f"{H.shape[0]} parameters, {epochs:3} epochs, {kind:10} W1 / range = "
                f"{100 * distance:.3f} % (target 1 %), {found.products} products, {seconds:.2f} s"
            )


def logdets(repeats: int, theirs: dict[str, Any]) -> None:
    import torch

    from woodbury import FunctionOperator
    from woodbury.spectra import SLQ, logdet

    print(f"\nlog-determinant of a Laplacian, {PROBES} probes of {STEPS} steps")
    for side in GRIDS:

        def product(X: torch.Tensor, side: int = side) -> torch.Tensor:
            U = X.view(side, side, -1)
            Y = 4.1 * U
            Y[1:] -= U[:-1]
            Y[:-1] -= U[1:]
            Y[:, 1:] -= U[:, :-1]
            Y[:, :-1] -= U[:, 1:]
            return Y.view(X.shape)

        n = side * side
        A = FunctionOperator(product, (n, n), dtype=torch.float64, tags={"positive_definite"})
        truth = float(np.log(shifted_laplacian_eigenvalues(side)).sum())
        for kind in ("full", "none"):
            method = SLQ(PROBES, STEPS, kind)
            seconds, found = shortest(
                repeats,
                lambda seed, A=A, method=method: logdet(
                    A, method, generator=torch.Generator().manual_seed(seed)
                ),
            )
            rms = math.sqrt(sum((float(f.value) - truth) ** 2 for f in found) / len(found))
            line = (
                f"n = {n:6}, reorthogonalize {kind:5} {1e3 * seconds:8.1f} ms, relative error "
                f"{rms / abs(truth):.1e}"
            )
            peer = theirs.get(f"{side} {kind}")
            if peer:
                line += (
                    f"   matfree {1e3 * peer['seconds']:8.1f} ms, {peer['error']:.1e}"
                    f"   time over matfree's {seconds / peer['seconds']:.2f}"
                )
            print(line, flush=True)


def pairs(repeats: int) -> None:
    import scipy.sparse
    import scipy.sparse.linalg

    from woodbury import Sparse
    from woodbury.spectra import LOBPCG, eigenpairs

    side, k = 60, 6
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(side, side))
    eye = scipy.sparse.eye_array(side)
    # Another length in each direction, so that no eigenvalue is double.
    L = (scipy.sparse.kron(line, eye) + 1.3 * scipy.sparse.kron(eye, line)).tocsr()
    n = L.shape[0]
    A = Sparse(L, tags={"positive_definite"})
    factor = scipy.sparse.linalg.splu((L + 0.01 * eye_of(n)).tocsc())
    count = 0

    def counted(x: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1 if x.ndim == 1 else x.shape[1]
        return L @ x

    operator = scipy.sparse.linalg.LinearOperator((n, n), counted, matmat=counted, dtype=float)
    solver = scipy.sparse.linalg.LinearOperator((n, n), factor.solve, matmat=factor.solve)
    shifted = Sparse((L + 0.01 * eye_of(n)).tocsr(), tags={"positive_definite"}).inverse()
    start = np.random.default_rng(0).standard_normal((n, k + 3))

    def eigsh(which: str) -> Any:
        return scipy.sparse.linalg.eigsh(operator, k, which=which, tol=1e-8, v0=start[:, 0])

    def lobpcg(_: int) -> Any:
        return scipy.sparse.linalg.lobpcg(
            operator, start[:, :k].copy(), M=solver, tol=1e-8 * 0.01, maxiter=200, largest=False
        )

    def ours(which: str, method: Any = None) -> Any:
        return eigenpairs(A, k, which, method, throw=False)

    rows: list[tuple[str, Callable[[int], Any], Callable[[int], Any]]] = [
        ("largest, eigsh", lambda _: eigsh("LA"), lambda _: ours("largest")),
        ("both ends, eigsh", lambda _: eigsh("BE"), lambda _: ours("both")),
        (
            "smallest, preconditioned, lobpcg",
            lobpcg,
            lambda _: ours("smallest", LOBPCG(1e-8, preconditioner=shifted)),
        ),
    ]
    print(f"\n{k} eigenpairs of a Laplacian of {n} points to 1e-8, beside SciPy")
    for name, theirs, mine in rows:
        count = 0
        their_time, (values, vectors) = shortest(repeats, theirs)[0], theirs(0)
        count_of_one = count // (repeats + 1)
        their_residual = np.linalg.norm(L @ vectors - vectors * values, axis=0).max()
        seconds, found = shortest(repeats, mine)
        print(
            f"{name:34} SciPy {count_of_one:5} products {1e3 * their_time:8.1f} ms, residual "
            f"{their_residual:.0e}   woodbury {found[0].products:5} {1e3 * seconds:8.1f} ms, "
            f"{float(found[0].residuals.max()):.0e} {found[0].status.name}   time over SciPy's "
            f"{seconds / their_time:.2f}",
            flush=True,
        )


def eye_of(n: int) -> Any:
    import scipy.sparse

    return scipy.sparse.eye_array(n)


# ---------------------------------------------------------------------- matfree


def peer(runs: int, repeats: int, asked: list[str]) -> dict[str, Any]:
    """Coverage of matfree's standard errors, and its log-determinant."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    from matfree import decomp, funm, stochtrace

    found: dict[str, Any] = {"coverage": {}, "logdet": {}}
    example = jnp.ones(N)
    integrands = {
        "xtrace, 60 products": (stochtrace.leave_one_out_xtrace(), 30),
        "xnystrace, 60 products": (stochtrace.leave_one_out_xnystrace(), 60),
    }
    for job, (integrand, num) in integrands.items() if "coverage" in asked else ():
        sampler = stochtrace.sampler_normal(example, num=num)
        estimator = stochtrace.estimator_leave_one_out_mean_and_sem(integrand, sampler)
        estimate = jax.jit(lambda M, key, e=estimator: e(lambda v, P: P @ v, key, M))
        shares = []
        for name in SPECTRA:
            M, truth = jnp.asarray(matrix(name)), SPECTRA[name].sum()
            inside = 0
            for seed in range(runs):
                mean, sem = estimate(M, jax.random.PRNGKey(seed))
                inside += abs(float(mean) - truth) <= 1.96 * float(sem)
            shares.append(inside / runs)
        found["coverage"][job] = shares
    for side in GRIDS if "logdet" in asked else ():
        n = side * side

        def product(x: Any, side: int = side) -> Any:
            U = jnp.pad(x.reshape(side, side), 1)
            near = U[2:, 1:-1] + U[:-2, 1:-1] + U[1:-1, 2:] + U[1:-1, :-2]
            return (4.1 * U[1:-1, 1:-1] - near).ravel()

        truth = float(np.log(shifted_laplacian_eigenvalues(side)).sum())
        sampler = stochtrace.sampler_signs(jnp.ones(n), num=PROBES)
        for kind in ("full", "none"):
            tridiag = decomp.tridiag_sym(STEPS, reortho=kind)
            integrand = funm.monte_carlo_funm_sym_logdet(tridiag)
            estimator = stochtrace.estimator_monte_carlo(integrand, sampler)
            estimate = jax.jit(lambda key, e=estimator, p=product: e(p, key))
            estimate(jax.random.PRNGKey(0)).block_until_ready()  # compiled here
            seconds, values = shortest(
                repeats, lambda seed, e=estimate: float(e(jax.random.PRNGKey(seed)))
            )
            rms = math.sqrt(sum((value - truth) ** 2 for value in values) / len(values))
            found["logdet"][f"{side} {kind}"] = {"seconds": seconds, "error": rms / abs(truth)}
    return found


def of_peer(arguments: argparse.Namespace, asked: set[str]) -> dict[str, Any]:
    nothing: dict[str, Any] = {"coverage": {}, "logdet": {}}
    default = str(ROOT / ".venv-peers/bin/python")
    python = os.environ.get("WOODBURY_PEERS_PYTHON", default)
    if not Path(python).exists():
        print(f"no matfree: there is no interpreter at {python}")
        return nothing
    command = [python, __file__, "--peer", f"--threads={arguments.threads}"]
    command += [f"--runs={arguments.runs}", f"--repeats={arguments.repeats}"]
    command += [f"--only={','.join(asked)}"]
    environment = dict(os.environ)
    if arguments.threads == 1:
        environment["XLA_FLAGS"] = (
            "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        said = run.stderr.strip().splitlines()
        print(f"no matfree: {said[-1] if said else 'it failed'}")
        return nothing
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="errors,coverage,hessian,logdet,eigenpairs")
    parser.add_argument("--peer", action="store_true", help="run matfree, print JSON")
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(peer(arguments.runs, arguments.repeats, arguments.only.split(","))))
        return
    import torch

    torch.set_num_threads(arguments.threads)
    parts = arguments.only.split(",")
    asked = {"coverage", "logdet"} & set(parts)
    theirs = of_peer(arguments, asked) if asked else {}
    if "errors" in parts:
        errors(arguments.runs)
    if "coverage" in parts:
        coverage(arguments.runs, theirs["coverage"])
    if "hessian" in parts:
        hessian_density()
    if "logdet" in parts:
        logdets(arguments.repeats, theirs["logdet"])
    if "eigenpairs" in parts:
        pairs(arguments.repeats)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    main()
