r"""Scores in an eigenbasis of Kronecker form: what is exact, and what is fast.

For a block with $A^{-1} = (Q_S \otimes Q_A)\operatorname{diag}(W)(Q_S \otimes Q_A)^T$ and gradients
$\sum_t g_t a_t^T$, in the basis $\tilde g = Q_S^T g$, $\tilde a = Q_A^T a$,

$$ \langle \nabla m_q, A^{-1} \nabla\ell_i\rangle
   = \sum_{jk} W_{jk} \tilde D^q_{jk} \tilde D^i_{jk}, \qquad \tilde D = \sum_t \tilde g_t \tilde
   a_t^T. $$

With one position on both sides and $W \approx \sum_r u_r v_r^T$ it is
$\sum_r \big(\sum_j u_{rj}\tilde g^q_j\tilde g^i_j\big)\big(\sum_k v_{rk}\tilde a^q_k\tilde
a^i_k\big)$: two products of thin matrices a term for all pairs at once, and the bases go to the
queries, so that gradients of training examples are not rotated. The error weighs $W_{jk}$ by the
sizes of both gradients, so the terms are those of the singular value decomposition of
$d^S_j W_{jk} d^A_k$ with $d^S_j = (\mathrm{E}[(\tilde g^q_j)^2]\,\mathrm{E}[(\tilde
g^i_j)^2])^{1/2}$, and $d^A$ likewise.

Terms beyond about the eighth gain little: what is left of $W$ is like noise. But gradients have
heavy tails, so that few pairs of a query and an example make most of the error.
:mod:`woodbury.influence.layered` computes those pairs exactly, and takes terms for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.curvature.layers import MatrixBlock, MatrixGradients, VectorBlock, VectorGradients
from woodbury.decompositions import range_finder
from woodbury.operators import Dense

__all__ = ["EigenBlock", "MatrixQueries", "Spectrum", "Terms", "VectorInverse", "VectorQueries"]

# Terms beyond this many are not looked for: exact pairs gain more by then.
_MAX_TERMS = 48
# Blocks with fewer entries cost nothing anyway.
_SMALL = 2**12
_POWER_STEPS = 2
_DENSE_BYTES = 128 * 2**20
# Pairs of a query and an example are contracted for so many bytes at a time.
_PAIR_BYTES = 16 * 2**20


@dataclass(frozen=True, eq=False)
class EigenBlock:
    """The inverse of a matrix block in its eigenbasis.

    Attributes:
        block: which parameters.
        left: $Q_S$ ``[p, p]``, or ``None`` for the identity.
        right: $Q_A$ ``[m, m]``, or ``None`` for the identity.
        inverse: $W$, ``[p, m]``.
        moments: the eigenvalues without damping, ``[p, m]``: mean squares of gradients.
    """

    block: MatrixBlock
    left: Tensor | None
    right: Tensor | None
    inverse: Tensor
    moments: Tensor

    def rotate(self, gradients: MatrixGradients) -> tuple[Tensor, Tensor]:
        """Inputs ``[b, t, m]`` and gradients at outputs ``[b, t, p]`` in the eigenbasis."""
        rotated = gradients.rotate(self.left, self.right)
        return rotated.dense_inputs(), rotated.grads

    def self_scores(self, gradients: MatrixGradients) -> Tensor:
        r"""$\sum_{jk} W_{jk} \tilde D_{jk}^2$ of every example, ``[b]``."""
        a, g = self.rotate(gradients)
        if g.shape[1] == 1:
            return ((g[:, 0].square() @ self.inverse) * a[:, 0].square()).sum(1)
        step = max(1, _DENSE_BYTES // (self.inverse.numel() * g.element_size()))
        pairs = zip(g.split(step), a.split(step), strict=True)
        return torch.cat(
            [torch.einsum("bpm,pm->b", torch.bmm(x.mT, y).square(), self.inverse) for x, y in pairs]
        )


@dataclass(frozen=True, eq=False)
class VectorInverse:
    """The inverse of a vector block: a matrix ``[n, n]``, or its diagonal ``[n]``."""

    block: VectorBlock
    inverse: Tensor

    def apply(self, values: Tensor) -> Tensor:
        """Rows ``[b, n]`` times the inverse."""
        if self.inverse.dim() == 1:
            return values * self.inverse
        return values @ self.inverse

    def self_scores(self, gradients: VectorGradients) -> Tensor:
        """Squares of the gradients in the inverse, ``[b]``."""
        return (self.apply(gradients.values) * gradients.values).sum(1)


class VectorQueries:
    """Gradients of queries of a vector block, with the inverse applied."""

    def __init__(self, inverse: VectorInverse, gradients: VectorGradients) -> None:
        self.solved = inverse.apply(gradients.values)

    def __len__(self) -> int:
        return len(self.solved)

    def scores(self, gradients: VectorGradients) -> Tensor:
        """``[Q, b]``."""
        return self.solved @ gradients.values.T

    def pairs(self, gradients: VectorGradients, queries: Tensor, rows: Tensor) -> Tensor:
        """Scores of some pairs, ``[n]``."""
        return self.scores(gradients)[queries, rows]


class MatrixQueries:
    """Gradients of queries of a matrix block, prepared for many training examples.

    Args:
        eigen: the inverse.
        gradients: of the queries.
    """

    def __init__(self, eigen: EigenBlock, gradients: MatrixGradients) -> None:
        self.eigen = eigen
        self.a, self.g = eigen.rotate(gradients)  # [Q, t, m], [Q, t, p]
        self.single = self.g.shape[1] == 1
        self._in_parameters: tuple[Tensor, Tensor] | None = None  # queries times terms, [R, Q, .]
        self._dense: Tensor | None = None

    def __len__(self) -> int:
        return len(self.g)

    # ---------------------------------------------------------------- exact

    def exact(self, gradients: MatrixGradients) -> Tensor:
        """``[Q, b]`` without approximation."""
        W = self.eigen.inverse
        if self.single and gradients.grads.shape[1] == 1:
            a, g = (side[:, 0] for side in self.eigen.rotate(gradients))
            if len(W) < len(self.g):  # few outputs: a product of matrices for each
                total = g.new_zeros(len(self.g), len(g))
                for gi, gq, w in zip(g.T, self.g[:, 0].T, W, strict=True):
                    total.addcmul_((self.a[:, 0] * w * gq[:, None]) @ a.T, gi)
                return total
            rows = [
                ((g * gq) @ W).mul_(aq).mul_(a).sum(1)
                for gq, aq in zip(self.g[:, 0], self.a[:, 0], strict=True)
            ]
            return torch.stack(rows)
        step = max(1, _DENSE_BYTES // (W.numel() * W.element_size()))
        if self._dense is None and step >= len(self.g):
            self._dense = self.matrices()  # kept: it serves every batch, which is not rotated
        if self._dense is not None:
            return gradients.inner(self._dense)
        plain = MatrixBlock(**{**vars(self.eigen.block), "one_hot": False})
        rotated = MatrixGradients(plain, *self.eigen.rotate(gradients))
        parts = [slice(start, start + step) for start in range(0, len(self.g), step)]
        return torch.cat([rotated.inner(self._solved(part)) for part in parts])

    def pairs(self, gradients: MatrixGradients, queries: Tensor, rows: Tensor) -> Tensor:
        """Exact scores of some pairs, ``[n]``.

        Args:
            gradients: of some examples.
            queries: of every pair, ``[n]``.
            rows: of every pair its place among the examples, ``[n]``.
        """
        if not (self.single and gradients.grads.shape[1] == 1):
            return self.exact(gradients)[queries, rows]
        W = self.eigen.inverse
        a, g = (side[:, 0] for side in self.eigen.rotate(gradients))
        step = max(1, _PAIR_BYTES // (sum(W.shape) * W.element_size()))
        found = [
            ((g[i] * self.g[q, 0]) @ W).mul_(a[i]).mul_(self.a[q, 0]).sum(1)
            for q, i in zip(queries.split(step), rows.split(step), strict=True)
        ]
        return torch.cat(found)

    def _solved(self, part: slice) -> Tensor:
        """The queries with the inverse applied, in the eigenbasis, ``[Q, p, m]``."""
        return torch.bmm(self.g[part].mT, self.a[part]).mul_(self.eigen.inverse)

    def matrices(self) -> Tensor:
        """The queries with the inverse applied, in the basis of the parameters, ``[Q, p, m]``."""
        D = self._solved(slice(None))
        if self.eigen.left is not None:
            D = self.eigen.left @ D
        return D if self.eigen.right is None else D @ self.eigen.right.T

    # ------------------------------------------------------------ separable

    def use_terms(self, terms: Terms | None) -> None:
        """Scores by these terms from now on, or exact ones."""
        self._in_parameters = None
        if terms is not None:
            g = self.g[:, 0] * terms.u[:, None, :]
            a = self.a[:, 0] * terms.v[:, None, :]
            left, right = self.eigen.left, self.eigen.right
            g, a = (g if left is None else g @ left.T), (a if right is None else a @ right.T)
            self._in_parameters = g, a

    def scores(self, gradients: MatrixGradients) -> Tensor:
        """``[Q, b]``: by the terms where there are any, else exact."""
        if self._in_parameters is None or gradients.grads.shape[1] != 1:
            return self.exact(gradients)
        g, a = gradients.grads[:, 0], gradients.dense_inputs()[:, 0]
        result = g.new_zeros(len(self.g), len(g))
        for gq, aq in zip(*self._in_parameters, strict=True):
            result.addcmul_(gq @ g.T, aq @ a.T)
        return result

    def errors(
        self,
        terms: Terms,
        sample: MatrixGradients,
        queries: Tensor,
        rows: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Weighted squared errors of the scores of some pairs with 0, 1, ... of the terms.

        Args:
            terms: as many as there are.
            sample: gradients of examples.
            queries: of every pair, ``[n]``.
            rows: of every pair its place in the sample, ``[n]``.
            weights: of the squares, ``[L, n]``, float64.

        Returns:
            ``[L, r + 1]``, float64.
        """
        exact = self.pairs(sample, queries, rows)
        a, g = (side[:, 0] for side in self.eigen.rotate(sample))
        left = (g[rows] * self.g[queries, 0]) @ terms.u.T
        right = (a[rows] * self.a[queries, 0]) @ terms.v.T
        errors = exact[:, None] - left.mul_(right).cumsum(1)
        return weights @ torch.cat([exact[:, None], errors], 1).double().square()


@dataclass(frozen=True, eq=False)
class Terms:
    r"""A separable form $W \approx \sum_r u_r v_r^T$.

    Attributes:
        u: ``[R, p]``.
        v: ``[R, m]``.
    """

    u: Tensor
    v: Tensor

    def leading(self, count: int) -> Terms:
        """The first of them."""
        return Terms(self.u[:count], self.v[:count])


@dataclass(frozen=True, eq=False)
class Spectrum:
    r"""Leading singular triples of $d^S_j W_{jk} d^A_k$.

    Attributes:
        inverse: $W$, ``[p, m]``.
        left: $d^S$, ``[p]``.
        right: $d^A$, ``[m]``.
        U: ``[p, r]``.
        values: ``[r]``, float64.
        V: ``[m, r]``.
    """

    inverse: Tensor
    left: Tensor
    right: Tensor
    U: Tensor
    values: Tensor
    V: Tensor

    @classmethod
    def of(cls, queries: Sequence[MatrixQueries]) -> Spectrum | None:
        """For queries of one block, or ``None`` where separable terms are of no use.

        Sizes of the gradients of training examples are those that the eigenvalues say, over all the
        data: a sample would miss directions that are rare. The singular values are those of a
        randomised range finder, whose probes are the same every time.
        """
        eigen = queries[0].eigen
        W, moments = eigen.inverse, eigen.moments.clamp(min=0)
        if W.numel() < _SMALL:
            return None
        g, a = (
            torch.cat(list(parts)) for parts in zip(*((q.g, q.a) for q in queries), strict=True)
        )
        left = (g[:, 0].square().mean(0) * moments.mean(1)).sqrt()
        right = (a[:, 0].square().mean(0) * moments.mean(0)).sqrt()
        X = left[:, None] * W * right
        rank = min(_MAX_TERMS, *X.shape)
        probes = min(rank + 8, *X.shape)
        Q = range_finder(Dense(X), probes, power=_POWER_STEPS).basis
        small, values, V = torch.linalg.svd(Q.T @ X, full_matrices=False)
        rank = min(rank, int((values > torch.finfo(X.dtype).eps * values[:1]).sum()))
        if not rank:
            return None
        return cls(W, left, right, (Q @ small)[:, :rank], values[:rank].double(), V[:rank].T)

    def terms(self) -> Terms:
        r"""All of them.

        $u = W d^A V / \sqrt\sigma$ and $v = W^T d^S U / \sqrt\sigma$ are the singular vectors over
        the weights, without a division by weights that are nearly zero.
        """
        root = self.values.sqrt().to(self.U.dtype)[:, None]
        u = ((self.inverse * self.right) @ self.V).T / root
        v = ((self.inverse.T * self.left) @ self.U).T / root
        return Terms(u.contiguous(), v.contiguous())
