"""The Lanczos tridiagonalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.decompositions.lanczos_batch import lanczos_batch, require_hermitian, tridiagonal
from woodbury.errors import ArgumentError, ShapeError

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["Lanczos", "lanczos"]


@dataclass(frozen=True, eq=False)
class Lanczos:
    r"""$A Q = Q T + \beta_m q_{m+1} e_m^H$ with orthonormal $Q$ and real tridiagonal $T$.

    Attributes:
        basis: $Q$, ``[n, m]``.
        diagonal: of $T$, ``[m]``, float64 on the CPU.
        off_diagonal: of $T$, ``[m - 1]``, float64 on the CPU.
        remainder: $\beta_m$; 0 where the Krylov space is exhausted, so that $T$ holds exact
            eigenvalues.
        products: columns that ``A`` was multiplied by.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.decompositions import lanczos
        >>> A = Diagonal(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
        >>> values, _, errors = lanczos(A, 3, start=torch.ones(3).double()).ritz()
        >>> values
        tensor([1.0000, 2.0000, 4.0000], dtype=torch.float64)
    """

    basis: Tensor
    diagonal: Tensor
    off_diagonal: Tensor
    remainder: float
    products: int

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Eigenvalues $\theta$ of $T$ (ascending), their eigenvectors, and error bounds.

        Within $\beta_m |s_{mi}|$ of every $\theta_i$ there is an eigenvalue of ``A``.
        """
        values, vectors = torch.linalg.eigh(tridiagonal(self.diagonal, self.off_diagonal))
        return values, vectors, self.remainder * vectors[-1].abs()


def lanczos(
    A: LinearOperator,
    steps: int,
    *,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Lanczos:
    r"""Tridiagonalise a hermitian operator on the Krylov space $\{v, Av, \dots, A^{m-1}v\}$.

    With full reorthogonalisation, twice where needed, so that $Q$ is orthonormal to rounding.

    Args:
        A: hermitian operator ``[n, n]``.
        steps: $m$; fewer are taken where the space is exhausted.
        start: $v$, ``[n]``; standard normal by default.
        generator: draws ``start``; the same numbers every time if not given.

    Returns:
        A :class:`Lanczos` factorisation.

    Raises:
        TagError: ``A`` is not tagged hermitian.
        ArgumentError: ``steps`` is less than 1, or ``start`` is zero.
        ShapeError: ``start`` is not ``[n]``.
        NonFiniteError: a product is NaN or infinite.

    Cost: ``m`` products, $4 n m^2$ multiplications, memory of ``m`` vectors.

    Source: Golub and Van Loan, "Matrix Computations" (4th ed.), 10.1 and 10.3.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.decompositions import lanczos
        >>> A = Diagonal(torch.tensor([1.0, 2.0, 7.0], dtype=torch.float64))
        >>> lanczos(A, 3).ritz()[0]
        tensor([1.0000, 2.0000, 7.0000], dtype=torch.float64)
    """
    require_hermitian(A, "lanczos")
    n = A.shape[0]
    work = torch.float32 if A.dtype.itemsize == 2 else A.dtype
    v = draw(n, 1, A, generator).squeeze(1) if start is None else start.to(work)
    if v.shape != (n,):
        raise ShapeError(f"start has shape {tuple(v.shape)}, expected [{n}]")
    size = A.space.norm(v).item()
    if not size > 0:
        raise ArgumentError(f"start has norm {size}; it must not be zero")
    found = lanczos_batch(A, steps, v.unsqueeze(1))
    assert found.bases is not None  # kept with full reorthogonalisation
    return Lanczos(
        basis=found.bases[0],
        diagonal=found.diagonal[0],
        off_diagonal=found.off_diagonal[0],
        remainder=found.remainder[0].item(),
        products=found.products,
    )


def draw(n: int, k: int, A: LinearOperator, generator: torch.Generator | None) -> Tensor:
    """Standard normal block in the dtype of the work; the same numbers if there is no generator."""
    work = torch.float32 if A.dtype.itemsize == 2 else A.dtype
    if generator is None:
        generator = torch.Generator(A.device).manual_seed(0)
    return torch.randn(n, k, dtype=work, device=A.device, generator=generator)
