"""Products and solves of structured operators against dense matrices and SciPy, in one run.

Prints the shortest time of several, the ratio to the other way, and the bytes each keeps.

    python benchmarks/operators.py [--threads 1] [--repeats 7]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import scipy.sparse
import torch
from torch import Tensor

from woodbury import BlockDiagonal, Dense, Diagonal, Identity, Kernel, Kronecker, LowRank, Sparse


def shortest(function: Callable[[], object], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def report(name: str, ours: float, peer: str, theirs: float, kept: int, peers: int) -> None:
    print(
        f"{name:44} {1e3 * ours:9.3f} ms   {peer:22} {1e3 * theirs:9.3f} ms   "
        f"ratio {theirs / ours:8.2f}   bytes {kept:12,} against {peers:14,}"
    )


def kronecker(repeats: int) -> None:
    for size, k in [(64, 1), (64, 32), (512, 1), (512, 8)]:
        A, B, X = torch.randn(size, size), torch.randn(size, size), torch.randn(size**2, k)
        operator, kept = Kronecker(A, B), 4 * 2 * size**2
        ours = shortest(lambda operator=operator, X=X: operator @ X, repeats)
        if size == 64:  # the dense matrix fits
            dense = torch.kron(A, B)
            theirs = shortest(lambda dense=dense, X=X: dense @ X, repeats)
            report(f"Kronecker {size} x {size}, k = {k}", ours, "dense", theirs, kept, 4 * size**4)
        blocks = X.numpy().reshape(size, size, k)
        a, b = A.numpy(), B.numpy()

        def columns(a=a, b=b, blocks=blocks) -> None:
            for column in range(blocks.shape[2]):
                a @ blocks[:, :, column] @ b.T

        theirs = shortest(columns, repeats)
        report(f"Kronecker {size} x {size}, k = {k}", ours, "NumPy A X B^T", theirs, kept, kept)


def shifted_kronecker(repeats: int) -> None:
    factors = []
    for size in (48, 64):
        root = torch.randn(size, size)
        factors.append(Dense(root @ root.T / size, tags={"positive_semidefinite"}))
    operator, b = Kronecker(*factors) + 1e-2 * Identity(48 * 64), torch.randn(48 * 64)
    dense = Dense(operator.to_dense(), tags={"positive_definite"})
    ours = shortest(lambda: operator.solve(b), repeats)
    theirs = shortest(lambda: Dense(dense.matrix, tags={"positive_definite"}).solve(b), 1)
    kept, peers = 4 * (48**2 + 64**2), 4 * (48 * 64) ** 2
    report("(Kronecker 48 x 64 + c I)^-1 b", ours, "dense Cholesky", theirs, kept, peers)


def block_diagonal(repeats: int) -> None:
    for count, size, k in [(64, 64, 1), (64, 64, 16)]:
        stack, X = torch.randn(count, size, size), torch.randn(count * size, k)
        operator, n = BlockDiagonal(stack), count * size
        ours = shortest(lambda operator=operator, X=X: operator @ X, repeats)
        name = f"BlockDiagonal of {count} x {size}, k = {k}"
        listed = BlockDiagonal(list(stack))
        theirs = shortest(lambda listed=listed, X=X: listed @ X, repeats)
        report(name, ours, "a list of blocks", theirs, 4 * stack.numel(), 4 * stack.numel())
        dense = operator.to_dense()
        theirs = shortest(lambda dense=dense, X=X: dense @ X, repeats)
        report(name, ours, "dense", theirs, 4 * stack.numel(), 4 * n * n)
        sparse, x = scipy.sparse.block_diag(list(stack.numpy()), format="csr"), X.numpy()
        theirs = shortest(lambda sparse=sparse, x=x: sparse @ x, repeats)
        report(name, ours, "SciPy CSR", theirs, 4 * stack.numel(), 8 * sparse.nnz)


def low_rank_update(repeats: int) -> None:
    n, rank = 3000, 50
    U, d, b = torch.randn(n, rank), torch.rand(n) + 1, torch.randn(n)
    operator = Diagonal(d, tags={"positive_definite"}) + LowRank(U)
    ours = shortest(lambda: operator.solve(b), repeats)
    dense = operator.to_dense()
    theirs = shortest(lambda: Dense(dense, tags={"positive_definite"}).solve(b), 1)
    report(
        f"(D + U U^T)^-1 b, n = {n}, r = {rank}",
        ours,
        "dense Cholesky",
        theirs,
        4 * n * (rank + 1),
        4 * n * n,
    )


def sparse(repeats: int) -> None:
    n = 20_000
    matrix = scipy.sparse.random(n, n, density=5e-4, format="csr", dtype="float32", random_state=0)
    operator = Sparse(matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR tensors beta
        parts = torch.from_numpy(matrix.indptr), torch.from_numpy(matrix.indices)
        csr = torch.sparse_csr_tensor(*parts, torch.from_numpy(matrix.data), size=matrix.shape)
    for k in (1, 8):
        X = torch.randn(n, k)
        kept = 8 * matrix.nnz + 4 * n
        ours = shortest(lambda X=X: operator @ X, repeats)
        theirs = shortest(lambda X=X: csr @ X, repeats)
        report(f"Sparse, {matrix.nnz:,} entries, k = {k}", ours, "torch CSR", theirs, kept, kept)


def rbf(x: Tensor, z: Tensor) -> Tensor:
    squares = torch.addmm(z.square().sum(1).unsqueeze(0), x, z.T, alpha=-2.0)
    return squares.add_(x.square().sum(1, keepdim=True)).mul_(-1e-3).exp_()


def kernel_product(kind: str, repeats: int) -> tuple[float, int]:
    """Time of a product with a kernel matrix that is evaluated each time, and peak memory."""
    n, d, k = 8000, 64, 8
    x, V = torch.randn(n, d), torch.randn(n, k)
    with torch.no_grad():
        rbf(x[:64], x[:64]) @ V[:64]
        before = peak_bytes()
        operator = Kernel(x, kernel=rbf)
        product = (lambda: operator @ V) if kind == "blocks" else (lambda: rbf(x, x) @ V)
        seconds = shortest(product, repeats)
    return seconds, peak_bytes() - before


def peak_bytes() -> int:
    """Peak memory of this process (Linux; ``ru_maxrss`` would include the parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status does not say the peak memory")


def kernel(threads: int, repeats: int) -> None:
    """Each way in a process of its own, because peak memory never goes down."""
    figures = {}
    for kind in ("blocks", "formed"):
        arguments = ["--threads", str(threads), "--repeats", str(repeats), "--kernel", kind]
        command = [sys.executable, __file__, *arguments]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, peak = output.split()
        figures[kind] = float(seconds), int(peak)
    (ours, kept), (theirs, peers) = figures["blocks"], figures["formed"]
    report(
        "Kernel, n = 8000, d = 64, k = 8 (peak bytes)", ours, "formed whole", theirs, kept, peers
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kernel", choices=["blocks", "formed"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.kernel:
        print(*kernel_product(arguments.kernel, min(arguments.repeats, 3)))
        return
    kronecker(arguments.repeats)
    shifted_kronecker(arguments.repeats)
    block_diagonal(arguments.repeats)
    low_rank_update(arguments.repeats)
    sparse(arguments.repeats)
    kernel(arguments.threads, arguments.repeats)


if __name__ == "__main__":
    main()
