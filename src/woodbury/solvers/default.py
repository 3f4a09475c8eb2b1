"""The recipe that is used where none is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from woodbury.errors import TagError
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
    """The recipe for an operator about which nothing but tags and size is known.

    Raises:
        TagError: the operator is large, has no structure and is not known to be positive definite.
    """
    if not A.is_square:
        return QR() if A.shape[0] * A.shape[1] <= SMALL**2 else LSMR()
    if A.has_inverse:
        return Structural()
    if A.shape[0] <= SMALL:
        if "positive_definite" in A.tags:
            return Cholesky()
        return Eigh() if "hermitian" in A.tags else LU()
    if "positive_semidefinite" in A.tags:
        return CG()
    raise TagError(
        f"no default recipe for {type(A).__name__} of size {A.shape[0]} with tags "
        f"{sorted(A.tags)}: promise 'positive_definite' where the operator is made if it holds, or "
        "name a recipe: Eigh() or LU() form the matrix, CG() finds negative curvature if there is"
    )
