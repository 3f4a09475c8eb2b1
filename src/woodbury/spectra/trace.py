"""``trace``: the sum of the eigenvalues, from products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from woodbury.operators.dtypes import precise
from woodbury.spectra.estimate import Estimate, exactly
from woodbury.spectra.method import Exact, Method, require_square, seeded
from woodbury.spectra.structure import by_products, knows_trace
from woodbury.spectra.xnystrace import XNysTrace
from woodbury.spectra.xtrace import XTrace

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["trace"]


def trace(
    A: LinearOperator, method: Method | None = None, *, generator: torch.Generator | None = None
) -> Estimate:
    r"""$\operatorname{tr} A$ with its standard error.

    Args:
        A: square operator ``[n, n]``.
        method: :class:`XTrace` (any operator), :class:`XNysTrace` (positive semidefinite),
            :class:`HutchPlusPlus`, :class:`Hutchinson`. By default the structure of the operator
            where it knows its trace, otherwise ``XNysTrace()`` where it is tagged positive
            semidefinite and ``XTrace()`` where it is not. Where ``n`` products are no more than the
            method would take, the diagonal is summed instead, exactly.
        generator: draws the probes; the same numbers every time if not given.

    Returns:
        An :class:`Estimate`; its value is real where ``A`` is real or hermitian.

    Raises:
        ShapeError: ``A`` is not square.
        TagError: the method needs a tag that ``A`` does not have.
        NonFiniteError: a product is NaN or infinite.

    Cost: the ``products`` of the method, in blocks of at most 256 MiB.

    Source: see the methods.

    Example:
        >>> import torch
        >>> from woodbury import FunctionOperator, Kronecker, Dense
        >>> from woodbury.spectra import XTrace, trace
        >>> values = 1 / torch.arange(1, 1001).double() ** 2
        >>> A = FunctionOperator(
        ...     lambda X: values[:, None] * X, (1000, 1000), dtype=values.dtype, tags={"symmetric"}
        ... )
        >>> found = trace(A, XTrace(products=60))
        >>> abs(found.value - values.sum()) < 3 * found.standard_error < 0.01
        tensor(True)
        >>> B = Dense(torch.ones(3, 3))
        >>> trace(Kronecker(B, B))  # its structure knows
        Estimate(9, standard_error=0, products=0, method=Exact())
    """
    require_square(A, "trace()")
    if method is None and knows_trace(A):
        return exactly(precise(A.trace()).cpu(), Exact())
    if method is None:
        method = XNysTrace() if "positive_semidefinite" in A.tags else XTrace()
    if not method._spares(A.shape[0]):
        diagonal, products = by_products(A)
        total = precise(diagonal).sum().cpu()
        rounding = torch.finfo(diagonal.dtype).eps * float(diagonal.abs().sum())
        return exactly(total, method, products, rounding)
    return method._trace(A, seeded(A, generator))
