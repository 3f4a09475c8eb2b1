"""Factorisations F G H* from a column basis and a row basis: one equation for the core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.decompositions.lanczos import draw
from woodbury.decompositions.orthonormal import orthonormalize
from woodbury.decompositions.range_finder import range_finder, require_rank
from woodbury.decompositions.two_sided import TwoSided, default_rcond, small_svd
from woodbury.errors import ArgumentError, NonFiniteError, ShapeError

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator
    from woodbury.spaces import Space

__all__ = ["MetaFactor", "generalized_nystrom", "meta_factorization", "utv"]


@dataclass(frozen=True, eq=False)
class MetaFactor:
    r"""$A \approx F G H^*$.

    Attributes:
        left: $F$, ``[m, k]``, a basis of the columns.
        core: $G$, ``[k, l]``.
        right: $H$, ``[n, l]``, a basis of the rows.
        operator: $F G H^*$, evaluated in a way that does not lose digits where $F$ or $H$ are badly
            conditioned; ``operator.pseudo_inverse()`` solves least squares with it.
        products: columns that ``A`` or its adjoint was multiplied by.
        rows: the rows of ``A`` in $H^*$, where it is made of them.
        columns: the columns of ``A`` in $F$, where it is made of them.

    Example:
        >>> import torch
        >>> from woodbury import LowRank
        >>> from woodbury.decompositions import utv
        >>> factor = utv(LowRank(torch.eye(6, 2), V=torch.eye(4, 2)), 2)
        >>> factor.left.shape, factor.core.shape, factor.right.shape
        (torch.Size([6, 2]), torch.Size([2, 2]), torch.Size([4, 2]))
    """

    left: Tensor
    core: Tensor
    right: Tensor
    operator: TwoSided
    products: int
    rows: Tensor | None = None
    columns: Tensor | None = None


def meta_factorization(
    A: LinearOperator,
    left: Tensor,
    right: Tensor,
    *,
    left_test: Tensor | None = None,
    right_test: Tensor | None = None,
    start: Tensor | None = None,
) -> MetaFactor:
    r"""$A \approx F G H^*$ with $G = Y^* A X + W - (Y^* F)\,W\,(H^* X)$.

    $Y^* = (B^*F)^+ B^*$ and $X = D\,(H^*D)^+$ solve the projector equations $F Y^* F = F$ and
    $H^* X H^* = H^*$, if the test matrices $B$ and $D$ see all of $F$ and $H$; they are $F$ and $H$
    themselves where they are not given, and $F G H^*$ is then the best approximation with these
    bases in the Frobenius norm. It equals $A$ if and only if the range of $A$ is in that of $F$ and
    the range of $A^*$ in that of $H$. The term with $W$ vanishes where $F$ and $H$ have full column
    rank, and chooses among the cores that give the same product where they have not. QR, SVD, UTV,
    CUR and generalised Nystrom are special cases: :func:`utv`, :func:`cur`,
    :func:`generalized_nystrom`.

    Args:
        A: operator ``[m, n]``.
        left: $F$, ``[m, k]``.
        right: $H$, ``[n, l]``.
        left_test: $B$, ``[m, p]``.
        right_test: $D$, ``[n, q]``.
        start: $W$, ``[k, l]``; zero by default, which gives the core of smallest norm.

    Returns:
        A :class:`MetaFactor`.

    Raises:
        ShapeError: a block does not fit ``A`` or its partner.
        NonFiniteError: a product is NaN or infinite.

    Cost: ``l`` products, $O((m + n) k^2)$ multiplications, memory of four blocks.

    Source: Karpowicz, "Meta-factorization" (2021).

    Example:
        >>> import torch
        >>> from woodbury import Dense
        >>> from woodbury.decompositions import meta_factorization
        >>> M = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 4.0))
        >>> found = meta_factorization(Dense(M), M[:, :1], M[:1].T)  # CUR by one row and column
        >>> torch.allclose(found.operator.to_dense(), M, atol=1e-5), found.core.shape
        (True, torch.Size([1, 1]))
    """
    m, n = A.shape
    blocks = [("left", left, m), ("right", right, n)]
    blocks += [("left_test", left_test, m)] if left_test is not None else []
    blocks += [("right_test", right_test, n)] if right_test is not None else []
    for name, block, size in blocks:
        if block.dim() != 2 or block.shape[0] != size:
            raise ShapeError(f"{name} has shape {tuple(block.shape)}, expected [{size}, k]")
    Yside = _Side(left, left_test, A.out_space, A.dtype)
    Xside = _Side(right, right_test, A.space, A.dtype)
    X = Xside.test @ Xside.solver.mH.to(right.dtype)
    AX = (A @ X.contiguous().to(A.dtype)).to(X.dtype)
    inner = A.out_space.gram(Yside.test, AX)
    if not bool(torch.isfinite(inner).all()):
        raise NonFiniteError(f"a product with {type(A).__name__} holds NaN or infinity")
    # In the bases Q of F = Q R and P of H = P S the core is R G S^*: nothing is squared.
    core = Yside.solver @ inner.to(Yside.solver.dtype)
    middle = Yside.triangle @ core @ Xside.triangle.mH
    if start is not None:
        if start.shape != (left.shape[1], right.shape[1]):
            raise ShapeError(
                f"start has shape {tuple(start.shape)}, expected "
                f"[{left.shape[1]}, {right.shape[1]}]"
            )
        W = start.to(core.dtype)
        core = core + W - Yside.projector @ W @ Xside.projector.mH
    operator = TwoSided(
        Yside.basis, middle.to(left.dtype), Xside.basis, space=A.space, out_space=A.out_space
    )
    return MetaFactor(left, core.to(left.dtype), right, operator, X.shape[1])


class _Side:
    """One projector equation: ``solver`` is ``(B^* F)^+``, in double precision."""

    def __init__(
        self, block: Tensor, test: Tensor | None, space: Space, dtype: torch.dtype
    ) -> None:
        wide = torch.complex128 if block.is_complex() else torch.float64
        self.basis, R = orthonormalize(block, space)
        self.triangle = R.to(wide)
        # With B = F the equation is solved with Q instead: F^* F would square the condition.
        self.test = self.basis if test is None else test
        inner = self.triangle if test is None else space.gram(test, block).to(wide)
        self.solver = pseudo_inverse(inner, default_rcond(tuple(block.shape), dtype))
        self.projector = self.solver @ inner


def pseudo_inverse(M: Tensor, rcond: float) -> Tensor:
    """``M^+`` of a small matrix."""
    U, s, V = small_svd(M)
    kept = s > rcond * (s[0].item() if len(s) else 0.0)
    return (V[:, kept] / s[kept]) @ U[:, kept].mH


def generalized_nystrom(
    A: LinearOperator,
    rank: int,
    *,
    oversampling: int | None = None,
    generator: torch.Generator | None = None,
) -> MetaFactor:
    r"""$A \approx (A D)\,(B^* A D)^+_\epsilon\,(B^* A)$ with random $D$, and a wider $B$.

    $D$ and $B$ are orthonormal bases of Gaussian blocks. One pass over $A$ and one over its
    adjoint, whose products may be taken at once; of general operators, rectangular too. The
    pseudo-inverse drops singular values of the core at the size of rounding and is never formed:
    $A \approx (A D\,V_\epsilon\Sigma_\epsilon^{-1}) (U_\epsilon^* B^* A)$ for the SVD
    $U \Sigma V^*$ of the core. For Gaussian $D$ and $B$ themselves
    $E\|A - \hat A\|_F \le \sqrt{1 + k/(p - 1)}\,\sqrt{1 + r/(k - r - 1)}\;\|A - A_r\|_F$ with
    $p > 1$ the oversampling, $k$ the rank of the sketch and any $r < k - 1$.

    Args:
        A: operator ``[m, n]`` with an adjoint product.
        rank: $k$, columns of $D$, 1 to ``min(m, n)``.
        oversampling: $p$, by how many columns $B$ has more; by default half of ``rank``, rounded
            up. None at all is unstable.
        generator: draws $D$ and $B$; the same ones every time if not given.

    Returns:
        A :class:`MetaFactor`; its rank is less where ``A`` has no more.

    Raises:
        RankError: ``rank`` is not between 1 and ``min(m, n)``.
        ArgumentError: ``oversampling`` is negative.
        NonFiniteError: a product is NaN or infinite.

    Cost: ``rank`` products and ``rank + oversampling`` with the adjoint, $O((m + n) k^2)$
    multiplications, memory of six blocks.

    Source: Nakatsukasa, "Fast and stable randomized low-rank matrix approximation" (2020),
    algorithms 2.1 and 3.1.

    Example:
        >>> import torch
        >>> from woodbury import LowRank
        >>> from woodbury.decompositions import generalized_nystrom
        >>> A = LowRank(torch.eye(9, 3), V=torch.ones(6, 3))
        >>> found = generalized_nystrom(A, 4).operator.to_dense()
        >>> torch.allclose(found, A.to_dense(), atol=1e-5)
        True
    """
    require_rank(rank, A)
    extra = -(-rank // 2) if oversampling is None else oversampling
    if extra < 0:
        raise ArgumentError(f"oversampling is {extra}; it must be at least 0")
    if generator is None:
        generator = torch.Generator(A.device).manual_seed(0)
    m, n = A.shape
    tall = min(rank + extra, m)
    # Orthonormal bases span the same and are never badly conditioned, as square Gaussian ones are.
    D, _ = orthonormalize(draw(n, rank, A, generator), A.space)
    B, _ = orthonormalize(draw(m, tall, A, generator), A.out_space)
    AD = (A @ D.to(A.dtype)).to(D.dtype)
    BA = A.rmatmat(B.to(A.dtype)).to(B.dtype)
    core = A.out_space.gram(B, AD)
    if not bool(torch.isfinite(core).all()):
        raise NonFiniteError(f"a product with {type(A).__name__} holds NaN or infinity")
    U, s, V = small_svd(core.to(torch.complex128 if core.is_complex() else torch.float64))
    kept = s > 10 * torch.finfo(A.dtype).eps * (s[0].item() if len(s) else 0.0)
    left = AD @ (V[:, kept] / s[kept]).to(AD.dtype)
    right = BA @ U[:, kept].to(BA.dtype)
    return _of_factors(A, left, torch.eye(left.shape[1]).to(left), right, D.shape[1] + B.shape[1])


def utv(
    A: LinearOperator,
    rank: int,
    *,
    power: int = 2,
    generator: torch.Generator | None = None,
) -> MetaFactor:
    r"""$A \approx U T V^*$ with orthonormal $U$ and $V$ and upper triangular $T$.

    $V$ spans the range of $(A^*A)^q A^*\,\Omega$ for a Gaussian $\Omega$, and $A V = U T$: the
    reconstruction equation with $F = U$ and $H = V$, so that $T = U^* A V$. By the power iterations
    the diagonal of $T$ comes close to the leading singular values, at the price of a QR
    factorisation instead of an SVD.

    Args:
        A: operator ``[m, n]`` with an adjoint product.
        rank: columns of $V$, 1 to ``min(m, n)``.
        power: $q$, power iterations.
        generator: draws $\Omega$; the same one every time if not given.

    Returns:
        A :class:`MetaFactor` with ``left`` $U$, ``core`` $T$ and ``right`` $V$; its rank is less
        where ``A`` has no more.

    Raises:
        RankError: ``rank`` is not between 1 and ``min(m, n)``.
        ArgumentError: ``power`` is negative.
        NonFiniteError: a product is NaN or infinite.

    Cost: ``(2 q + 2) rank`` products, $O((m + n) k^2)$ multiplications, memory of four
    blocks.

    Source: Gopal and Martinsson, "The powerURV algorithm for computing rank-revealing full
    factorizations" (2018); Karpowicz, "Meta-factorization" (2021) for the equation.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.decompositions import utv
        >>> found = utv(Diagonal(torch.tensor([4.0, 2.0, 1.0, 0.0])), 2)
        >>> bool(torch.equal(found.core, found.core.triu()))
        True
    """
    require_rank(rank, A)
    rows = range_finder(A.H, rank, power=power, generator=generator)
    V = rows.basis
    U, R = orthonormalize((A @ V.to(A.dtype)).to(V.dtype), A.out_space)
    if not bool(torch.isfinite(R).all()):
        raise NonFiniteError(f"a product with {type(A).__name__} holds NaN or infinity")
    Q, T = torch.linalg.qr(R)  # R is triangular already but in spaces of their own
    return _of_factors(A, U @ Q, T, V, rows.products + V.shape[1])


def _of_factors(
    A: LinearOperator, left: Tensor, core: Tensor, right: Tensor, products: int
) -> MetaFactor:
    operator = TwoSided(left, core, right, space=A.space, out_space=A.out_space)
    return MetaFactor(left, core, right, operator, products)
