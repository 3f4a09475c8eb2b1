"""What every method of estimation is, and the products all of them take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, NonFiniteError, ShapeError, TagError
from woodbury.operators.dtypes import working_dtype

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator
    from woodbury.spectra.estimate import Estimate

__all__ = ["Exact", "Method", "Probes"]

Probes = Literal["sign", "sphere", "gaussian"]

# Columns of one product: as many as fit into this, so that a block never exceeds it.
_BLOCK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Method:
    """How to estimate: a frozen description that holds no data of any operator.

    A subclass gives ``_trace`` or ``_diagonal``.

    Example:
        >>> from woodbury.spectra import XTrace
        >>> XTrace() == XTrace(products=60)
        True
    """

    def _trace(self, A: LinearOperator, generator: torch.Generator) -> Estimate:
        raise ArgumentError(f"{type(self).__name__} does not estimate traces")

    def _diagonal(self, A: LinearOperator, generator: torch.Generator) -> Estimate:
        raise ArgumentError(f"{type(self).__name__} does not estimate diagonals")

    def _spares(self, n: int) -> bool:
        """Whether ``n`` products, which give the exact answer, are more than this would take."""
        return getattr(self, "products", 0) < n


@dataclass(frozen=True)
class Exact(Method):
    """The structure of the operator gave the answer, without chance and without products.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.spectra import trace
        >>> trace(Diagonal(torch.tensor([1.0, 2.0]))).method
        Exact()
    """


def require_products(products: int, least: int, what: str) -> None:
    """Raise unless a method may take enough products to do anything."""
    if products < least:
        raise ArgumentError(f"products is {products}; {what} needs at least {least}")


def require_square(A: LinearOperator, what: str) -> None:
    """Raise unless ``A`` is square."""
    if not A.is_square:
        raise ShapeError(f"{what} needs a square operator, this one is {A.shape}")


def require_tag(A: LinearOperator, tag: str, what: str) -> None:
    """Raise unless ``A`` has a tag."""
    if tag not in A.tags:
        raise TagError(
            f"{what} needs the tag {tag!r}, {type(A).__name__} has {sorted(A.tags)}; if it holds, "
            "promise it where the operator is made"
        )


def seeded(A: LinearOperator, generator: torch.Generator | None) -> torch.Generator:
    """The generator, or one that draws the same numbers every time."""
    return torch.Generator(A.device).manual_seed(0) if generator is None else generator


def draw_probes(A: LinearOperator, count: int, kind: Probes, generator: torch.Generator) -> Tensor:
    r"""A block ``[n, count]`` of isotropic vectors, $E\,\omega\omega^H = I$.

    Signs (phases for a complex dtype), points of the sphere of radius $\sqrt n$, or normal numbers.
    """
    n, dtype = A.shape[1], working_dtype(A.dtype)
    if kind == "sign" and not dtype.is_complex:
        signs = torch.randint(0, 2, (n, count), device=A.device, generator=generator)
        return signs.to(dtype).mul_(2).sub_(1)
    if kind == "sign":
        angles = torch.rand(n, count, dtype=dtype.to_real(), device=A.device, generator=generator)
        return torch.polar(torch.ones_like(angles), angles.mul_(2 * torch.pi))
    block = torch.randn(n, count, dtype=dtype, device=A.device, generator=generator)
    if kind == "sphere":
        block *= n**0.5 / A.space.norm(block)
    return block


def require_probes(kind: str) -> None:
    """Raise unless it is a kind of probe."""
    if kind not in ("sign", "sphere", "gaussian"):
        raise ArgumentError(f"probes is {kind!r}; it must be 'sign', 'sphere' or 'gaussian'")


def width(A: LinearOperator) -> int:
    """Columns of one product: as many as fit into 256 MiB."""
    return max(1, _BLOCK_BYTES // (max(A.shape) * working_dtype(A.dtype).itemsize))


def multiply(A: LinearOperator, X: Tensor, *, adjoint: bool = False) -> Tensor:
    """``A X`` or ``A^H X`` in blocks of at most 256 MiB, in the dtype of ``X``, finite."""
    with torch.no_grad():
        parts = [
            (A.rmatmat if adjoint else A.__matmul__)(part.contiguous().to(A.dtype)).to(X.dtype)
            for part in X.split(width(A), dim=1)
        ]
    Y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if not bool(torch.isfinite(Y).all()):
        raise NonFiniteError(f"a product with {type(A).__name__} holds NaN or infinity")
    return Y


def wide(X: Tensor) -> Tensor:
    """A small tensor in double precision on the CPU."""
    return X.to(device="cpu", dtype=torch.complex128 if X.is_complex() else torch.float64)


def real_if_hermitian(values: Tensor, A: LinearOperator) -> Tensor:
    """Real parts where theory says that there is nothing else."""
    return values.real if values.is_complex() and "hermitian" in A.tags else values
