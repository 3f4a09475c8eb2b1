r"""Sums over the data that K-FAC and EK-FAC are made of, one batch after the other.

First pass, for a matrix block with gradients $D_i = \sum_t g_{it} a_{it}^T$:

- ``sharing="expand"``: $A = \sum_{it} w_i a_{it} a_{it}^T$, $S = \sum_{it} w_i g_{it} g_{it}^T$ and
  $n = \sum_{it} w_i$, positions taken as independent;
- ``sharing="reduce"``: the same with one vector for each example,
  $\bar a_i = \frac1T \sum_t a_{it}$ and $\hat g_i = \sum_t g_{it}$.

The block is then $\frac{1}{N n} S \otimes A$. Positions whose output gradient is zero (padding,
ignored labels) are in neither sum, nor in $n$ and $T$. Second pass:
$\Lambda = \frac1N \sum_i w_i (Q_S^T D_i Q_A)^{\odot 2}$, with the sum over positions *before* the
square.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from woodbury.curvature.capture import FactoredBatch
from woodbury.curvature.layers import Block, MatrixBlock, MatrixGradients, VectorGradients
from woodbury.curvature.products import crossed, gram
from woodbury.errors import NonFiniteError
from woodbury.operators.dtypes import precise
from woodbury.spaces import Space

__all__ = ["Corrections", "FactorSums", "Sums"]

Sums = dict[str, Tensor]

# Gradients that are squared and summed at once, such that they stay in the cache.
_CACHE_BYTES = 4 * 2**20
# Gradients with at least so many entries are worth a product of their own.
_LARGE = 2**17


class FactorSums:
    """The first pass.

    Args:
        blocks: by name.
        space: of the parameters.
        sharing: ``"expand"`` or ``"reduce"``.
        side_limit: a side with more entries gets the diagonal of its factor only.
        block_limit: a vector block with more entries gets its diagonal only.

    Attributes:
        sums: ``{block}/A`` and ``{block}/S`` (a matrix or a diagonal), ``{block}/n``, and
            ``{block}/moment`` of vector blocks, in float64.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        space: Space,
        sharing: str,
        side_limit: int,
        block_limit: int,
        device: torch.device,
    ) -> None:
        self.blocks, self.sharing = dict(blocks), sharing
        self.sums: Sums = {}
        self._active: dict[str, Tensor] = {}

        def zeros(*shape: int) -> Tensor:
            return precise(torch.zeros(shape, device=device))

        for name, block in self.blocks.items():
            if isinstance(block, MatrixBlock):
                # One position with a one-hot input has a diagonal; a mean over positions has not.
                wide = block.m > side_limit or (block.one_hot and sharing == "expand")
                self.sums[f"{name}/A"] = zeros(block.m) if wide else zeros(block.m, block.m)
                wide = block.p > side_limit
                self.sums[f"{name}/S"] = zeros(block.p) if wide else zeros(block.p, block.p)
                self.sums[f"{name}/n"] = zeros()
            else:
                n = block.size(space)
                self.sums[f"{name}/moment"] = zeros(n, n) if n <= block_limit else zeros(n)

    def add(self, batch: FactoredBatch) -> None:
        """Add the gradients of a batch (one column of them)."""
        last = batch.column + 1 == batch.columns
        for name, gradients in batch.blocks.items():
            if isinstance(gradients, VectorGradients):
                values = gradients.values
                self._add(batch, f"{name}/moment", values, batch.weights)
                continue
            grads = gradients.grads
            seen = (grads != 0).any(-1)
            if batch.columns > 1:
                seen = seen | self._active[name] if batch.column else seen
                self._active[name] = seen
            if self.sharing == "reduce":
                self._add(batch, f"{name}/S", grads.sum(1), batch.weights)
            else:
                weights = _spread(batch.weights, seen)
                self._add(batch, f"{name}/S", grads.flatten(0, 1), weights)
            if last:
                self._add_inputs(batch, name, gradients, seen)
        if last:
            self._active.clear()

    def _add_inputs(
        self, batch: FactoredBatch, name: str, gradients: MatrixGradients, seen: Tensor
    ) -> None:
        weights = seen.to(gradients.grads.dtype)
        if batch.weights is not None:
            weights = weights * batch.weights.unsqueeze(1)
        if self.sharing == "reduce":
            self._add_means(batch, name, gradients, seen)
            return
        flat = weights.flatten()
        self.sums[f"{name}/n"] += precise(flat).sum()
        if gradients.one_hot:
            A = self.sums[f"{name}/A"]
            A.index_add_(0, gradients.inputs.flatten(), precise(flat).to(A))
            return
        inputs = gradients.inputs.flatten(0, 1)
        everything = bool(seen.all())
        if not everything:
            inputs, flat = inputs[seen.flatten()], flat[seen.flatten()]
        plain = everything and batch.weights is None
        self._add(batch, f"{name}/A", inputs, None if plain else flat)

    def _add_means(
        self, batch: FactoredBatch, name: str, gradients: MatrixGradients, seen: Tensor
    ) -> None:
        inputs = gradients.dense_inputs() * seen.unsqueeze(-1)
        number = seen.sum(1)
        mean = inputs.sum(1) / number.clamp(min=1).unsqueeze(1)
        weights = (number > 0).to(mean.dtype)
        if batch.weights is not None:
            weights = weights * batch.weights
        self.sums[f"{name}/n"] += precise(weights).sum()
        self._add(batch, f"{name}/A", mean, weights)

    def _add(self, batch: FactoredBatch, key: str, rows: Tensor, weights: Tensor | None) -> None:
        """``rows^T diag(weights) rows``, or its diagonal."""
        total = self.sums[key]
        weighted = rows if weights is None else rows * weights.unsqueeze(1)
        part = (weighted * rows).sum(0) if total.dim() == 1 else gram(weighted, rows)
        if not bool(torch.isfinite(part.sum())):
            raise NonFiniteError(
                f"gradients of {key.rpartition('/')[0]!r} in batch {batch.index} ({batch.size} "
                "examples) hold NaN or infinity, or their squares overflow; check that batch and "
                "the parameters"
            )
        total += part


def _spread(weights: Tensor | None, seen: Tensor) -> Tensor | None:
    return None if weights is None else weights.unsqueeze(1).expand(seen.shape).flatten()


class Corrections:
    """The second pass: squares of the gradients in the eigenbasis.

    Args:
        blocks: by name.
        bases: ``{block}/Q_A`` and ``{block}/Q_S``; one that is missing is the identity.
        dtype: of the gradients.
        device: of the gradients.

    Attributes:
        sums: ``{block}/corrected``, ``[p, m]``, in float64.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        bases: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.bases = {key: value.to(dtype) for key, value in bases.items()}
        self.sums: Sums = {
            f"{name}/corrected": precise(torch.zeros(block.p, block.m, device=device))
            for name, block in blocks.items()
            if isinstance(block, MatrixBlock)
        }

    def add(self, batch: FactoredBatch) -> None:
        """Add the gradients of a batch (one column of them)."""
        for name, gradients in batch.blocks.items():
            if isinstance(gradients, MatrixGradients):
                Q_S, Q_A = (self.bases.get(f"{name}/{side}") for side in ("Q_S", "Q_A"))
                total = self.sums[f"{name}/corrected"]
                if gradients.one_hot and Q_A is None:
                    total += _one_hot_squares(gradients.rotate(Q_S, None), batch.weights)
                else:
                    total += _squares(gradients, Q_S, Q_A, batch.weights)


def _squares(
    gradients: MatrixGradients, Q_S: Tensor | None, Q_A: Tensor | None, weights: Tensor | None
) -> Tensor:
    """``sum_i w_i (Q_S^T D_i Q_A)^2``, entry by entry, ``[p, m]``."""
    t, p = gradients.grads.shape[1:]
    m = gradients.block.m
    if t == 1:  # the square of an outer product is one of squares
        other = gradients.rotate(Q_S, Q_A)
        g, a = other.grads.squeeze(1).square(), other.inputs.squeeze(1).square()
        return crossed(g if weights is None else g * weights.unsqueeze(1), a)
    # A side is rotated at every position, or in the gradients where there are more positions than
    # the other side has entries.
    early_S, late_S = (Q_S, None) if t < m else (None, Q_S)
    early_A, late_A = (Q_A, None) if t < p else (None, Q_A)
    total = gradients.grads.new_zeros(p, m)
    other = gradients.rotate(early_S, early_A)
    if late_S is late_A is None and not other.one_hot and p * m >= _LARGE:
        each = zip(other.grads, other.inputs, strict=True)
        for i, (g, a) in enumerate(each):
            D = crossed(g, a)
            total.addcmul_(D, D if weights is None else D * weights[i])
        return total
    start = 0
    for part in other.chunks(_CACHE_BYTES):
        D = part.dense().view(-1, p, m)
        D = D if late_S is None else late_S.T @ D
        D = (D if late_A is None else D @ late_A).square_()
        own = None if weights is None else weights[start : start + len(D)]
        total += D.sum(0) if own is None else torch.tensordot(own, D, 1)
        start += len(D)
    return total


def _one_hot_squares(gradients: MatrixGradients, weights: Tensor | None) -> Tensor:
    """The same for one-hot inputs: only rows that an example looked up have a gradient."""
    b, p, m = len(gradients), gradients.block.p, gradients.block.m
    own = torch.arange(b, device=gradients.grads.device).unsqueeze(1)
    keys, places = torch.unique(gradients.inputs + m * own, return_inverse=True)
    sums = gradients.grads.new_zeros(len(keys), p)
    sums.index_add_(0, places.flatten(), gradients.grads.flatten(0, 1))
    squares = sums.square_()
    if weights is not None:
        squares *= weights[keys // m].unsqueeze(1)
    return gradients.grads.new_zeros(m, p).index_add_(0, keys % m, squares).T
