"""CUR: a matrix from some of its own columns and rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from woodbury.decompositions.lanczos import draw
from woodbury.decompositions.meta import MetaFactor, pseudo_inverse
from woodbury.decompositions.meta import meta_factorization as by_projections
from woodbury.decompositions.range_finder import require_rank
from woodbury.decompositions.two_sided import TwoSided, default_rcond
from woodbury.errors import ArgumentError, NonFiniteError, RankError

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["CURCore", "cur"]

CURCore = Literal["projection", "intersection"]


def cur(
    A: LinearOperator,
    rank: int | None = None,
    *,
    columns: Tensor | None = None,
    rows: Tensor | None = None,
    core: CURCore = "projection",
    oversampling: int = 10,
    generator: torch.Generator | None = None,
) -> MetaFactor:
    r"""$A \approx C\,G\,R$ with columns $C = A_{:J}$ and rows $R = A_{I:}$ of ``A`` itself.

    In the reconstruction equation $F = C$ and $H = R^*$. ``"projection"`` tests with them, too:
    $G = C^+ A R^+$, the best core for these columns and rows. ``"intersection"`` tests with the
    coordinates, $B = P_I$ and $D = P_J$: $G = A_{IJ}^+$, which needs no further product.

    The columns are the pivots of an LU factorisation of a Gaussian sketch $\Omega A$, and the rows
    those of the columns. Where the pivots show a rank below the one asked for, fewer are taken.

    Args:
        A: operator ``[m, n]`` with an adjoint product.
        rank: how many columns and rows, 1 to ``min(m, n)``; not needed where both are given.
        columns: $J$, integers ``[k]``; chosen where not given.
        rows: $I$, integers ``[l]``; chosen where not given.
        core: ``"projection"`` or ``"intersection"``.
        oversampling: rows of $\Omega$ beyond ``rank``.
        generator: draws $\Omega$; the same one every time if not given.

    Returns:
        A :class:`MetaFactor` with ``left`` $C$, ``right`` $R^*$, and the ``columns`` and ``rows``.

    Raises:
        RankError: ``rank`` is missing or not between 1 and ``min(m, n)``.
        ArgumentError: ``core`` is unknown, ``oversampling`` negative, or an index out of range.
        NonFiniteError: a product is NaN or infinite.

    Cost: ``rank + oversampling`` adjoint products to choose, ``rank`` columns and ``rank`` rows,
    and as many products for the projection core; $O((m + n) k^2)$ multiplications, memory of four
    blocks. Where ``A`` is dense or sparse columns and rows are read off, but count.

    Source: Dong and Martinsson, "Simpler is better: a comparative study of randomized pivoting
    algorithms for CUR and interpolative decompositions" (2023); Karpowicz, "Meta-factorization"
    (2021) for the equation.

    Example:
        >>> import torch
        >>> from woodbury import Dense
        >>> from woodbury.decompositions import cur
        >>> M = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 4.0))
        >>> found = cur(Dense(M), 1)
        >>> found.columns, found.rows  # of the largest entries
        (tensor([2]), tensor([3]))
        >>> torch.allclose(found.operator.to_dense(), M, atol=1e-5)
        True
    """
    if rank is None and (columns is None or rows is None):
        raise RankError("rank is not given: it is needed unless columns and rows both are")
    if rank is not None:
        require_rank(rank, A)
    if core not in get_args(CURCore):
        raise ArgumentError(f"core is {core!r}; it must be one of {get_args(CURCore)}")
    if oversampling < 0:
        raise ArgumentError(f"oversampling is {oversampling}; it must be at least 0")
    m, n = A.shape
    products = 0
    if columns is None:
        assert rank is not None
        size = min(rank + oversampling, m)
        sketch = A.rmatmat(draw(m, size, A, generator).to(A.dtype))
        columns = _pivots(sketch, rank, A)
        products += size
    J = _index(columns, n, "columns", A)
    C = _work(A.columns(J))
    products += len(J)
    if rows is None:
        rows = _pivots(C, len(J), A)
    I = _index(rows, m, "rows", A)  # noqa: E741 (the name in the literature)
    R = _work(A.H.columns(I))
    products += len(I)
    for block in (C, R):
        if not bool(torch.isfinite(block).all()):
            raise NonFiniteError(f"columns or rows of {type(A).__name__} hold NaN or infinity")
    if core == "projection":
        found = by_projections(A, C, R)
        return MetaFactor(
            C, found.core, R, found.operator, products + found.products, rows=I, columns=J
        )
    wide = torch.complex128 if C.is_complex() else torch.float64
    rcond = default_rcond((len(I), len(J)), A.dtype)
    G = pseudo_inverse(C[I].to(wide), rcond).to(C.dtype)
    operator = TwoSided(C, G, R, space=A.space, out_space=A.out_space)
    return MetaFactor(C, G, R, operator, products, rows=I, columns=J)


def _pivots(block: Tensor, rank: int, A: LinearOperator) -> Tensor:
    """Rows of a block that span the others, by partial pivoting; fewer where it has no more."""
    work = _work(block)
    if not bool(torch.isfinite(work).all()):
        raise NonFiniteError(f"a product with {type(A).__name__} holds NaN or infinity")
    wide = torch.complex128 if work.is_complex() else torch.float64
    factor, pivots, _ = torch.linalg.lu_factor_ex(work.to(wide))  # may be singular
    order = list(range(work.shape[0]))
    for step, pivot in enumerate((pivots - 1).tolist()):
        order[step], order[pivot] = order[pivot], order[step]
    sizes = torch.diagonal(factor).abs()[:rank]
    floor = 10 * torch.finfo(A.dtype).eps * (work.abs().amax().item() if work.numel() else 0.0)
    low = (sizes <= floor).nonzero()
    kept = int(low[0]) if len(low) else len(sizes)
    return torch.tensor(order[:kept], device=A.device, dtype=torch.long)


def _index(index: Tensor, size: int, name: str, A: LinearOperator) -> Tensor:
    found = torch.as_tensor(index, device=A.device)
    whole = found.dim() == 1 and not found.is_floating_point() and found.dtype != torch.bool
    if not whole or (len(found) and (int(found.min()) < 0 or int(found.max()) >= size)):
        raise ArgumentError(f"{name} must be a list of integers from 0 to {size - 1}")
    return found.long()


def _work(block: Tensor) -> Tensor:
    return block.float() if block.dtype.itemsize == 2 else block
