"""How a computation of eigenpairs ended."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

__all__ = ["EigenStatus"]


class EigenStatus(Enum):
    """How a computation of eigenpairs ended, from best to worst; a value says what to do next.

    Example:
        >>> from woodbury.spectra import EigenStatus
        >>> EigenStatus.max_products.ok
        False
        >>> print(EigenStatus.max_products.value)
        the product limit came before the tolerance: raise max_products, loosen rtol, ...
    """

    converged = "the true residual is within the tolerance"
    precision = (
        "the residual is above the tolerance, but as small as rounding in this dtype lets it be: "
        "the eigenvalue is that much smaller than the largest one; use float64 for more digits"
    )
    max_products = (
        "the product limit came before the tolerance: raise max_products, loosen rtol, keep a "
        "larger basis, or use LOBPCG with a preconditioner"
    )
    stagnation = (
        "the residual stopped falling above the tolerance: loosen rtol, use float64 or give a "
        "better preconditioner"
    )

    @property
    def ok(self) -> bool:
        """Whether the pair is what was asked for."""
        return self in (EigenStatus.converged, EigenStatus.precision)

    @staticmethod
    def worst(statuses: Iterable[EigenStatus]) -> EigenStatus:
        """The status furthest down the list; ``converged`` if there is none."""
        return max(statuses, key=list(EigenStatus).index, default=EigenStatus.converged)
