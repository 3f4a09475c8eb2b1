"""Systems with a bounded condition number, and references from LAPACK in float64 by SciPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import scipy.sparse
import torch
from torch import Tensor

from woodbury import Dense, Diagonal, FunctionOperator, Identity, Kronecker, LinearOperator, Sparse
from woodbury.operators.low_rank import LowRank

N = 24
REAL = (torch.float64, torch.float32)
DTYPES = (*REAL, torch.complex128, torch.complex64)


def wide(X: Tensor) -> Tensor:
    return X.detach().to(torch.complex128 if X.is_complex() else torch.float64)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Normal numbers, the same for each dtype of a kind up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(*shape, dtype=drawn, generator=generator).to(dtype)


def with_spectrum(
    eigenvalues: Tensor, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """A hermitian matrix with the eigenvalues given and random eigenvectors."""
    n = len(eigenvalues)
    drawn = torch.complex128 if dtype.is_complex else torch.float64
    Q, _ = torch.linalg.qr(random(n, n, dtype=drawn, seed=seed))
    M = (Q * eigenvalues.to(drawn)) @ Q.mH
    return ((M + M.mH) / 2).to(dtype)


def definite(
    n: int = N, *, condition: float = 50.0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """A hermitian positive definite matrix with eigenvalues from 1 / condition to 1."""
    spectrum = torch.logspace(-float(np.log10(condition)), 0, n, dtype=torch.float64)
    return with_spectrum(spectrum, dtype=dtype, seed=seed)


def function(M: Tensor, tags: set[str]) -> FunctionOperator:
    """The same matrix with no structure to be seen."""
    return FunctionOperator(
        lambda X: M @ X,
        (M.shape[0], M.shape[1]),
        rmatmat=lambda Y: M.mH @ Y,
        tags=tags,
        dtype=M.dtype,
    )


def eye(n: int = N) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def solution_of(M: Tensor, b: Tensor) -> Tensor:
    """The exact solution, by LAPACK in double precision."""
    return torch.from_numpy(
        scipy.linalg.solve(wide(M).resolve_conj().numpy(), wide(b).resolve_conj().numpy())
    )


def residual_of(M: Tensor, x: Tensor, b: Tensor) -> Tensor:
    """Relative residuals of the columns, in double precision."""
    r = wide(b) - wide(M) @ wide(x)
    return torch.linalg.vector_norm(r, dim=0) / torch.linalg.vector_norm(wide(b), dim=0)


def error_of(x: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((wide(x) - exact).norm() / exact.norm())


def _dense(dtype: torch.dtype) -> LinearOperator:
    return Dense(definite(dtype=dtype), tags={"hermitian", "positive_definite"})


def _function(dtype: torch.dtype) -> LinearOperator:
    return function(definite(dtype=dtype), {"positive_definite"})


def _shifted(dtype: torch.dtype) -> LinearOperator:
    H = function(definite(dtype=dtype), {"positive_semidefinite"})
    return H + 1e-2 * Identity(N)


def _diagonal(dtype: torch.dtype) -> LinearOperator:
    values = torch.linspace(0.1, 3, N, dtype=torch.float64).to(dtype)
    return Diagonal(values, tags={"positive_definite"})


def _kronecker(dtype: torch.dtype) -> LinearOperator:
    parts = [definite(n, condition=6, dtype=dtype, seed=n) for n in (4, 6)]
    return Kronecker(*[Dense(M, tags={"positive_definite"}) for M in parts])


def _sparse(dtype: torch.dtype) -> LinearOperator:
    laplacian = scipy.sparse.diags_array([-1.0, 2.5, -1.0], offsets=[-1, 0, 1], shape=(N, N))
    numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
    return Sparse(laplacian.astype(numpy_dtype), tags={"hermitian", "positive_definite"})


def _low_rank_update(dtype: torch.dtype) -> LinearOperator:
    return LowRank(random(N, 3, dtype=dtype)) + 2.0 * Identity(N)


KINDS: dict[str, Callable[[torch.dtype], LinearOperator]] = {
    "dense": _dense,
    "function": _function,
    "shifted": _shifted,
    "diagonal": _diagonal,
    "kronecker": _kronecker,
    "sparse": _sparse,
    "low_rank_update": _low_rank_update,
}
