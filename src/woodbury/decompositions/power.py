"""The ends of the spectrum, from a few products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from woodbury.decompositions.lanczos import Lanczos, draw, lanczos
from woodbury.errors import ArgumentError, NonFiniteError, NotPositiveDefiniteError, TagError

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["ExtremeEigenvalues", "extreme_eigenvalues"]


@dataclass(frozen=True)
class ExtremeEigenvalues:
    r"""Estimates of $\lambda_{min}$ and $\lambda_{max}$, from inside the spectrum.

    Attributes:
        smallest: an upper bound of $\lambda_{min}$.
        largest: a lower bound of $\lambda_{max}$.
        smallest_error: within this of ``smallest`` there is an eigenvalue.
        largest_error: within this of ``largest`` there is an eigenvalue.
        products: columns that the operator was multiplied by.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.decompositions import extreme_eigenvalues
        >>> found = extreme_eigenvalues(Diagonal(torch.linspace(1.0, 3.0, 100)), 30)
        >>> round(found.smallest, 3), round(found.largest, 3)
        (1.0, 3.0)
    """

    smallest: float
    largest: float
    smallest_error: float
    largest_error: float
    products: int

    @property
    def radius(self) -> float:
        r"""Estimate of an upper bound of $\max |\lambda|$: the errors are added."""
        return max(self.largest + self.largest_error, -self.smallest + self.smallest_error)


def extreme_eigenvalues(
    A: LinearOperator,
    steps: int = 10,
    *,
    preconditioner: LinearOperator | None = None,
    generator: torch.Generator | None = None,
) -> ExtremeEigenvalues:
    r"""The extreme Ritz values after a few Lanczos steps from a random vector, with error bounds.

    With a preconditioner $M$ those of $M A$, which are real: Lanczos runs on $M^{1/2} A M^{1/2}$ in
    the form that needs products with $M$ only.

    Where a power iteration of as many products gives $\lambda_{max}$ to a relative error of order
    $1/m$, Lanczos gives both ends to order $1/m^2$.

    Args:
        A: hermitian operator ``[n, n]``.
        steps: products.
        preconditioner: $M$, hermitian positive definite ``[n, n]``.
        generator: draws the first vector; the same one every time if not given.

    Returns:
        :class:`ExtremeEigenvalues`. ``largest + largest_error`` is an upper bound of the whole
        spectrum with high probability, not with certainty.

    Raises:
        TagError: ``A`` is not tagged hermitian.
        ArgumentError: ``steps`` is less than 1.
        NonFiniteError: a product is NaN or infinite.
        NotPositiveDefiniteError: $x^H M x \le 0$ was met.

    Cost: ``steps`` products, memory of as many vectors; with a preconditioner ``steps + 1``
    products with it, and twice the memory.

    Source: Zhou and Li, "Bounding the spectrum of large Hermitian matrices" (2011); Kuczynski and
    Wozniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms" (1992).

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.decompositions import extreme_eigenvalues
        >>> found = extreme_eigenvalues(Diagonal(torch.linspace(1.0, 5.0, 50)))
        >>> 4.5 < found.largest <= 5.0 <= found.radius
        True
    """
    if preconditioner is None:
        factor = lanczos(A, steps, generator=generator)
    else:
        factor = _lanczos(A, preconditioner, steps, generator)
    values, _, errors = factor.ritz()
    return ExtremeEigenvalues(
        smallest=values[0].item(),
        largest=values[-1].item(),
        smallest_error=errors[0].item(),
        largest_error=errors[-1].item(),
        products=factor.products,
    )


def _lanczos(
    A: LinearOperator, M: LinearOperator, steps: int, generator: torch.Generator | None
) -> Lanczos:
    """Lanczos on ``M A``, which is hermitian in the inner product ``<x, M^-1 y>``."""
    for name, operator in (("A", A), ("the preconditioner", M)):
        if "hermitian" not in operator.tags:
            raise TagError(
                f"the eigenvalues of M A are bounded for hermitian operators only, {name} has tags "
                f"{sorted(operator.tags)}; promise 'hermitian' where it is made if it holds"
            )
    if steps < 1:
        raise ArgumentError(f"steps is {steps}; it must be at least 1")
    space = A.space
    v = draw(A.shape[0], 1, A, generator)
    residuals: list[torch.Tensor] = []  # v_i, orthonormal to the z_j = M v_j
    images: list[torch.Tensor] = []
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    scale, size = 0.0, math.nan
    for m in range(min(steps, A.shape[0])):
        z = (M @ v.to(M.dtype)).to(v.dtype)
        square = space.inner(v, z).real.item()
        if not math.isfinite(square):
            raise NonFiniteError(f"a product with {type(M).__name__} holds NaN or infinity")
        size = math.sqrt(max(square, 0.0))
        if m and size <= 10 * torch.finfo(v.dtype).eps * scale:
            size = 0.0
            break
        if square <= 0:
            raise NotPositiveDefiniteError(
                f"x^H M x = {square:.3g} was found: the preconditioner {type(M).__name__} is not "
                "positive definite; drop it, or give one that is"
            )
        if m:
            off_diagonal.append(size)
        residuals.append(v / size)
        images.append(z / size)
        v = (A @ images[-1].to(A.dtype)).to(v.dtype)
        V, Z = torch.cat(residuals, 1), torch.cat(images, 1)
        inside = space.gram(Z, v)
        diagonal.append(inside[m, 0].real.item())
        if not math.isfinite(diagonal[-1]):
            raise NonFiniteError(f"a product with {type(A).__name__} holds NaN or infinity")
        v = v - V @ inside
        v = v - V @ space.gram(Z, v)
        scale = max(scale, abs(diagonal[-1]), size if m else 0.0)
    else:
        size = math.sqrt(max(space.inner(v, (M @ v.to(M.dtype)).to(v.dtype)).real.item(), 0.0))
    return Lanczos(
        basis=torch.cat(images, 1),
        diagonal=torch.tensor(diagonal, dtype=torch.float64),
        off_diagonal=torch.tensor(off_diagonal, dtype=torch.float64),
        remainder=size,
        products=len(diagonal),
    )
