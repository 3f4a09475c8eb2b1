"""The ends of the spectrum, from a few products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from woodbury.decompositions.lanczos import lanczos

if TYPE_CHECKING:
    import torch

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
    A: LinearOperator, steps: int = 10, *, generator: torch.Generator | None = None
) -> ExtremeEigenvalues:
    r"""The extreme Ritz values after a few Lanczos steps from a random vector, with error bounds.

    Where a power iteration of as many products gives $\lambda_{max}$ to a relative error of order
    $1/m$, Lanczos gives both ends to order $1/m^2$.

    Args:
        A: hermitian operator ``[n, n]``.
        steps: products.
        generator: draws the first vector; the same one every time if not given.

    Returns:
        :class:`ExtremeEigenvalues`. ``largest + largest_error`` is an upper bound of the whole
        spectrum with high probability, not with certainty.

    Raises:
        TagError: ``A`` is not tagged hermitian.
        ArgumentError: ``steps`` is less than 1.
        NonFiniteError: a product is NaN or infinite.

    Cost: ``steps`` products, memory of as many vectors.

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
    factor = lanczos(A, steps, generator=generator)
    values, _, errors = factor.ritz()
    return ExtremeEigenvalues(
        smallest=values[0].item(),
        largest=values[-1].item(),
        smallest_error=errors[0].item(),
        largest_error=errors[-1].item(),
        products=factor.products,
    )
