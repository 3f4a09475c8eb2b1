"""Solve a discretised diffusion equation by conjugate gradients, with and without a preconditioner.

The matrix is sparse and only ever multiplied by. Diffusion is a hundred times faster along one
axis, so the exact inverses of the lines along it make a good preconditioner. The residual that is
printed belongs to the value that is returned: it was computed from it with a product of its own.
"""

from __future__ import annotations

import scipy.sparse
import torch

from woodbury import CG, BlockDiagonal, Sparse, solve

SIDE = 64


def diffusion(side: int, fast: float) -> scipy.sparse.csr_array:
    """Return the five-point matrix of a square grid, symmetric positive definite."""
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(side, side))
    eye = scipy.sparse.eye_array(side)
    return scipy.sparse.csr_array(
        scipy.sparse.kron(line, eye) + scipy.sparse.kron(eye, fast * line)
    )


def main() -> None:
    """Solve twice and print both certificates."""
    matrix = diffusion(SIDE, fast=100.0)
    A = Sparse(matrix, tags={"positive_definite"})
    b = torch.randn(SIDE**2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    line = torch.from_numpy(matrix[:SIDE, :SIDE].toarray())
    lines = BlockDiagonal(line.repeat(SIDE, 1, 1), tags={"positive_definite"})

    for name, recipe in {
        "plain": CG(rtol=1e-8),
        "line by line": CG(rtol=1e-8, preconditioner=lines.inverse()),
    }.items():
        solution = solve(A, b, recipe)
        print(
            f"{name:>12}: {solution.status.name} in {solution.steps} steps, "
            f"{solution.products} products, relative residual {solution.residual:.1e}"
        )


if __name__ == "__main__":
    main()
