"""``frobenius_norm``: the root of the sum of squares of all entries, from products."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from woodbury.operators.dense import Dense
from woodbury.operators.diagonal import Diagonal
from woodbury.operators.dtypes import precise, working_dtype
from woodbury.operators.function import FunctionOperator
from woodbury.operators.sparse import Sparse
from woodbury.spectra.estimate import Estimate, exactly, of_samples
from woodbury.spectra.hutchinson import Hutchinson
from woodbury.spectra.method import Exact, Method, draw_probes, multiply, seeded, wide, width
from woodbury.spectra.trace import trace

if TYPE_CHECKING:
    from torch import Tensor

    from woodbury.operators.base import LinearOperator

__all__ = ["frobenius_norm", "gram_operator"]


def frobenius_norm(
    A: LinearOperator, method: Method | None = None, *, generator: torch.Generator | None = None
) -> Estimate:
    r"""$\|A\|_F = \sqrt{\operatorname{tr}(A^H A)}$ with its standard error.

    Args:
        A: operator ``[m, n]``, square or not.
        method: of the trace of $A^H A$. By default the entries themselves where the operator holds
            them all, otherwise :class:`Hutchinson`, which takes one product a probe:
            $\|A\|_F^2 = E \|A\,\omega\|^2$. The others take two, with ``A`` and its adjoint, and
            are better by far where the singular values decay: ``XNysTrace(products=60)`` then
            counts 60 products of each.
        generator: draws the probes; the same numbers every time if not given.

    Returns:
        An :class:`Estimate`. Its standard error is that of the square over $2 \|A\|_F$; its
        ``samples`` are those of the square.

    Raises:
        ArgumentError: the method does not estimate traces.
        StructureError: the method needs an adjoint product, and there is none.
        NonFiniteError: a product is NaN or infinite.

    Cost: the ``products`` of the method (twice those of any but ``Hutchinson``); memory as there.

    Source: Martinsson and Tropp, "Randomized numerical linear algebra" (2020), section 4.

    Example:
        >>> import torch
        >>> from woodbury import Dense, FunctionOperator
        >>> from woodbury.spectra import frobenius_norm
        >>> frobenius_norm(Dense(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))).value
        tensor(5., dtype=torch.float64)
        >>> M = torch.randn(300, 200)
        >>> A = FunctionOperator(lambda X: M @ X, (300, 200), dtype=M.dtype)
        >>> low, high = frobenius_norm(A).interval()
        >>> bool(low < M.norm() < high)
        True
    """
    entries = _entries(A) if method is None else None
    if entries is not None:
        return exactly(torch.linalg.vector_norm(precise(entries)).cpu(), Exact())
    method = Hutchinson() if method is None else method
    if isinstance(method, Hutchinson):
        found = _by_norms(A, method, seeded(A, generator))
    else:
        found = trace(gram_operator(A), method, generator=generator)
        found = replace(found, products=2 * found.products)
    value = found.value.real.clamp_min(0).sqrt()
    slope = 0.5 / value if value > 0 else torch.zeros(())
    return replace(
        found, value=value, standard_error=found.standard_error * slope, bias=found.bias * slope
    )


def _entries(A: LinearOperator) -> Tensor | None:
    """A tensor with all entries of the operator that are not zero, where it holds one."""
    if isinstance(A, Dense):
        return A.matrix.detach()
    if isinstance(A, Diagonal | Sparse):
        return A.values.detach()
    return None


def _by_norms(A: LinearOperator, method: Hutchinson, generator: torch.Generator) -> Estimate:
    """The mean of the squared norms of ``A omega``; all columns where they are no more."""
    n = A.shape[1]
    if not method._spares(n):
        units = torch.eye(n, dtype=working_dtype(A.dtype), device=A.device)
        squares = wide(A.out_space.norm(multiply(A, units))).square()
        return exactly(squares.sum(), method, n)
    parts = []
    for start in range(0, method.products, width(A)):
        count = min(width(A), method.products - start)
        Y = multiply(A, draw_probes(A, count, method.probes, generator))
        parts.append(wide(A.out_space.norm(Y)).square())
    samples = torch.cat(parts)
    rounding = 2 * torch.finfo(A.dtype).eps * float(samples.max())
    return of_samples(samples, bias=rounding, products=method.products, method=method)


def gram_operator(A: LinearOperator) -> LinearOperator:
    """``A^H A``, with no structure to be seen."""
    return FunctionOperator(
        lambda X: A.rmatmat(A @ X),
        (A.shape[1], A.shape[1]),
        tags={"positive_semidefinite"},
        dtype=A.dtype,
        device=A.device,
        space=A.space,
    )
