"""``diagonal``: the diagonal of an operator, from products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from woodbury.spectra.estimate import Estimate, exactly
from woodbury.spectra.method import Exact, Method, require_square, seeded
from woodbury.spectra.structure import by_products, knows_diagonal
from woodbury.spectra.xdiag import XDiag

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["diagonal"]


def diagonal(
    A: LinearOperator, method: Method | None = None, *, generator: torch.Generator | None = None
) -> Estimate:
    r"""$\operatorname{diag} A$ with a standard error for every entry.

    Args:
        A: square operator ``[n, n]``.
        method: :class:`XDiag` or :class:`Hutchinson`. By default the structure of the operator
            where it knows its diagonal, otherwise ``XDiag()``. Where ``n`` products are no more
            than the method would take, the diagonal is taken from them instead, exactly.
        generator: draws the probes; the same numbers every time if not given.

    Returns:
        An :class:`Estimate` whose value is ``[n]``, real where ``A`` is real or hermitian.

    Raises:
        ShapeError: ``A`` is not square.
        StructureError: ``XDiag`` needs an adjoint product, and there is none.
        NonFiniteError: a product is NaN or infinite.

    Cost: the ``products`` of the method, in blocks of at most 256 MiB.

    Source: see the methods.

    Example:
        >>> import torch
        >>> from woodbury import Dense
        >>> from woodbury.spectra import XDiag, diagonal
        >>> X = torch.randn(200, 200).double() / torch.arange(1, 201)
        >>> A = Dense(X.T @ X)
        >>> found = diagonal(A, XDiag(products=80))
        >>> off = (found.value - A.diagonal()).abs() / found.standard_error
        >>> bool(off.median() < 1), bool(off.quantile(0.95) < 3)
        (True, True)
    """
    require_square(A, "diagonal()")
    if method is None and knows_diagonal(A):
        return exactly(A.diagonal(), Exact())
    method = XDiag() if method is None else method
    if not method._spares(A.shape[0]):
        values, products = by_products(A)
        return exactly(values, method, products)
    return method._diagonal(A, seeded(A, generator))
