r"""Forms in which a query's gradient of one layer is held, with the inverse applied.

With $X_q = A^{-1}\nabla m_q$ of a matrix block, ``[p, m]``, and a training example
$D_i = \sum_t g_t a_t^T$, a score is $\langle X_q, D_i\rangle = \sum_t g_t^T X_q a_t$. Of rank $r$,
$X_q \approx U_q V_q^T$, it is $\sum_t (g_t^T U_q)(V_q^T a_t)$, for all queries at once two products
with all $U$ and all $V$ side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from woodbury.curvature.layers import MatrixGradients
from woodbury.decompositions import range_finder
from woodbury.influence.eigenbasis import EigenBlock, MatrixQueries
from woodbury.operators import Dense

__all__ = ["DenseQueries", "FactorQueries", "LowRankQueries", "TokenQueries"]

_BYTES = 128 * 2**20
# Columns beyond the rank and power steps of the range finder, as Halko, Martinsson and Tropp advise
# for spectra that decay slowly.
_OVERSAMPLING, _POWER_STEPS = 10, 2


def _parts(count: int, bytes_each: int) -> Iterator[slice]:
    """Slices of so many queries that what they need fits into a fixed memory."""
    step = max(1, _BYTES // max(1, bytes_each))
    return (slice(start, start + step) for start in range(0, count, step))


class FactorQueries:
    """Gradients as they come, by their factors; exact, ``t (p + m)`` numbers a query.

    Args:
        queries: in the eigenbasis.
    """

    def __init__(self, queries: MatrixQueries) -> None:
        self.queries = queries

    def __len__(self) -> int:
        return len(self.queries)

    def scores(self, gradients: MatrixGradients) -> Tensor:
        """``[Q, b]``. Matrices are formed for some queries at a time, and not kept."""
        g, a, eigen = self.queries.g, self.queries.a, self.queries.eigen
        if g.shape[1] == gradients.grads.shape[1] == 1:
            return self.queries.exact(gradients)
        inputs, grads = eigen.rotate(gradients)
        rotated = MatrixGradients(replace(eigen.block, one_hot=False), inputs, grads)
        W, found = eigen.inverse, []
        for part in _parts(len(self), W.numel() * W.element_size()):
            found.append(rotated.inner(torch.bmm(g[part].mT, a[part]).mul_(W)))
        return torch.cat(found)


class DenseQueries:
    """Matrices; exact, ``p m`` numbers a query.

    Args:
        matrices: $X$ in the basis of the parameters, ``[Q, p, m]``.
    """

    def __init__(self, matrices: Tensor) -> None:
        self.matrices = matrices

    @classmethod
    def join(cls, parts: Sequence[DenseQueries]) -> DenseQueries:
        """Queries of several batches."""
        return cls(torch.cat([part.matrices for part in parts]))

    def __len__(self) -> int:
        return len(self.matrices)

    def scores(self, gradients: MatrixGradients) -> Tensor:
        """``[Q, b]``."""
        return gradients.inner(self.matrices)


class TokenQueries:
    r"""Columns of the tokens that a query has; exact, ``t (p + 1)`` numbers a query.

    For inputs that are one-hot, whose basis is the identity: all other columns of $X_q$ are zero.

    Args:
        tokens: ``[Q, t]``.
        columns: a part of the column of each, ``[Q, t, p]``; those of a token add up.
    """

    def __init__(self, tokens: Tensor, columns: Tensor) -> None:
        self.tokens, self.columns = tokens, columns

    @classmethod
    def of(cls, eigen: EigenBlock, gradients: MatrixGradients) -> TokenQueries:
        """With the inverse applied."""
        left = eigen.left
        g = gradients.grads if left is None else gradients.grads @ left
        solved = g * eigen.inverse.T[gradients.inputs]
        return cls(gradients.inputs, solved if left is None else solved @ left.T)

    @classmethod
    def join(cls, parts: Sequence[TokenQueries]) -> TokenQueries:
        """Queries of several batches, of any lengths."""
        most = max(part.tokens.shape[1] for part in parts)
        tokens = [pad(part.tokens, (0, most - part.tokens.shape[1])) for part in parts]
        columns = [pad(part.columns, (0, 0, 0, most - part.columns.shape[1])) for part in parts]
        return cls(torch.cat(tokens), torch.cat(columns))

    def __len__(self) -> int:
        return len(self.tokens)

    def scores(self, gradients: MatrixGradients) -> Tensor:
        """``[Q, b]``: products of the columns of the tokens that both have."""
        shared = gradients.inputs.unique()
        shared = shared[torch.isin(shared, self.tokens)]
        p, found = self.columns.shape[2], self.columns.new_zeros(len(self), len(gradients))
        each = (len(self) + len(gradients)) * p * found.element_size()
        for part in _parts(len(shared), each):
            own = _spread(self.tokens, self.columns, shared[part])
            found += own @ _spread(gradients.inputs, gradients.grads, shared[part]).T
        return found


def _spread(tokens: Tensor, columns: Tensor, wanted: Tensor) -> Tensor:
    """Sums of the columns of some tokens, ascending: ``[n, u p]``."""
    n, p = len(tokens), columns.shape[2]
    place = torch.searchsorted(wanted, tokens.contiguous()).clamp(max=len(wanted) - 1)
    hit = wanted[place] == tokens
    place = place + len(wanted) * torch.arange(n, device=tokens.device)[:, None]
    out = columns.new_zeros(n * len(wanted), p)
    return out.index_add_(0, place[hit], columns[hit]).view(n, -1)


class LowRankQueries:
    r"""$X_q \approx U_q V_q^T$, ``r (p + m)`` numbers a query.

    Args:
        left: $U$, ``[p, Q, r]``, in the basis of the parameters.
        right: $V$, ``[m, Q, r]``.
        error: $\|X_q - U_q V_q^T\|_F$, ``[Q]``, float64.
        norm: $\|X_q\|_F$, ``[Q]``, float64.
    """

    def __init__(self, left: Tensor, right: Tensor, error: Tensor, norm: Tensor) -> None:
        self.left, self.right, self.error, self.norm = left, right, error, norm

    @classmethod
    def of(cls, queries: MatrixQueries, rank: int) -> LowRankQueries:
        r"""The leading part of $d_S\, X_q\, d_A$ in the eigenbasis, with the weights taken back.

        What counts is the error of scores, and gradients of training examples are larger in some
        directions than in others: of the size $(\lambda + \rho)^{1/2} = W^{-1/2}$, as the damped
        matrix says. Of that $d^S_j = \operatorname{mean}_k(W^{-1}_{jk})^{1/2}$ and $d^A_k$ likewise
        are the separable part. (Without the weights the error of scores is more than twice as
        large at rank 32: `benchmarks/low_rank_queries.py`.)
        """
        eigen = queries.eigen
        size = eigen.inverse.reciprocal()
        left, right = size.mean(1).sqrt()[:, None], size.mean(0).sqrt()[:, None]
        pieces = []
        for part in _parts(len(queries), size.numel() * size.element_size()):
            matrices = torch.bmm(queries.g[part].mT, queries.a[part]).mul_(eigen.inverse)
            for X in matrices:
                U, V = leading(left * X * right.T, rank)
                U, V = U / left, V / right
                error, norm = (X - U @ V.T).double().norm(), X.double().norm()
                pieces.append((U, V, error, norm))
        U, V, errors, norms = (torch.stack(piece) for piece in zip(*pieces, strict=True))
        U = U if eigen.left is None else eigen.left @ U
        V = V if eigen.right is None else eigen.right @ V
        return cls(U.transpose(0, 1).contiguous(), V.transpose(0, 1).contiguous(), errors, norms)

    @classmethod
    def join(cls, parts: Sequence[LowRankQueries]) -> LowRankQueries:
        """Queries of several batches."""
        left, right = (torch.cat([getattr(p, s) for p in parts], 1) for s in ("left", "right"))
        error, norm = (torch.cat([getattr(p, s) for p in parts]) for s in ("error", "norm"))
        return cls(left, right, error, norm)

    def __len__(self) -> int:
        return self.left.shape[1]

    @property
    def rank(self) -> int:
        """``r``."""
        return self.left.shape[2]

    def scores(self, gradients: MatrixGradients) -> Tensor:
        """``[Q, b]``, by the factors, or by matrices where fewer multiplications are needed so."""
        (p, count, rank), m = self.left.shape, len(self.right)
        b, t, _ = gradients.grads.shape
        nbytes = p * m * self.left.element_size()
        if not gradients.one_hot:
            passes = -(-count * nbytes // _BYTES)
            by_factors = count * b * t * rank * (p + m)
            by_matrices = passes * b * t * p * m + count * (rank + b) * p * m
            if by_matrices < by_factors:
                return torch.cat(
                    [gradients.inner(self._matrices(part)) for part in _parts(count, nbytes)]
                )
        return self._by_factors(gradients)

    def _matrices(self, part: slice) -> Tensor:
        left, right = self.left[:, part].transpose(0, 1), self.right[:, part].permute(1, 2, 0)
        return torch.bmm(left, right)

    def _by_factors(self, gradients: MatrixGradients) -> Tensor:
        b, t, p = gradients.grads.shape
        g = gradients.grads.reshape(b * t, p)
        found = []
        each = 2 * b * t * self.rank * g.element_size()
        for part in _parts(len(self), each):
            left, right = self.left[:, part].flatten(1), self.right[:, part].flatten(1)
            if gradients.one_hot:
                other = right[gradients.inputs.flatten()]
            else:
                other = gradients.inputs.reshape(b * t, -1) @ right
            products = (g @ left).mul_(other)
            found.append(products.view(b, t, -1, self.rank).sum((1, 3)).T)
        return torch.cat(found)


def leading(Y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""$U \sqrt\sigma$ ``[p, r]`` and $V \sqrt\sigma$ ``[m, r]`` of the leading singular triples.

    By a randomised range finder, whose probes are the same every time; by LAPACK where it would
    need half of all columns.
    """
    probes = rank + _OVERSAMPLING
    if 2 * probes >= min(Y.shape):
        U, values, V = torch.linalg.svd(Y, full_matrices=False)
    else:
        basis = range_finder(Dense(Y), probes, power=_POWER_STEPS).basis
        small, values, V = torch.linalg.svd(basis.T @ Y, full_matrices=False)
        U = basis @ small
    root = values[:rank].sqrt()
    left, right = U[:, :rank] * root, V[:rank].T * root
    missing = rank - left.shape[1]  # the range of a zero gradient has no columns
    if missing:
        left, right = (pad(side, (0, missing)) for side in (left, right))
    return left, right
