"""The recipe that is used where none is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from woodbury.solvers.auto import Auto
from woodbury.solvers.cg import CG
from woodbury.solvers.cholesky import Cholesky
from woodbury.solvers.eigh import Eigh
from woodbury.solvers.lsmr import LSMR
from woodbury.solvers.lu import LU
from woodbury.solvers.qr import QR
from woodbury.solvers.structural import Structural

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator
    from woodbury.solvers.recipe import Recipe

__all__ = ["SMALL", "default_recipe"]

# Up to this size the matrix is formed and factorised in well under a second.
SMALL = 2000


def default_recipe(A: LinearOperator) -> Recipe:
    """The recipe for an operator about which nothing but tags, size and structure is known.

    What the structure inverts, it inverts. Small matrices are formed and factorised, large ones are
    left to :class:`CG` and :class:`LSMR` where the tags allow no doubt, and else to :class:`Auto`.
    """
    if not A.is_square:
        return QR() if A.shape[0] * A.shape[1] <= SMALL**2 else LSMR()
    if A.has_inverse:
        return Structural()
    if A.shape[0] <= SMALL:
        if "positive_definite" in A.tags:
            return Cholesky()
        return Eigh() if "hermitian" in A.tags else LU()
    return CG() if "positive_semidefinite" in A.tags else Auto()
