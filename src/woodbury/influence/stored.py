"""What rows of a gradient store say: scores of queries, of the examples themselves, and errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from woodbury.curvature import FactoredGradients, Objective
from woodbury.curvature.damping import Damping, damping_of
from woodbury.influence.projection import BlockProjection, Eigenbasis, row_of
from woodbury.influence.shards import Chunk
from woodbury.operators import Dense, LinearOperator
from woodbury.solvers import Cholesky, inverse

__all__ = ["Reader"]

# Norms of what was dropped are stored in float32, rounded up: squares are too large by so much.
_ROUNDED_UP = 4 * torch.finfo(torch.float32).eps


class Reader:
    """Scores from rows.

    Args:
        objective: of the training data.
        factored: its gradients by layers.
        projections: of every block.
        damping: of second moments of rows, where the projections are random.
        chunks: all rows, a few at a time, as often as it is called.
        say: called with the number of rows that are done.
    """

    def __init__(
        self,
        objective: Objective,
        factored: FactoredGradients,
        projections: Mapping[str, BlockProjection],
        damping: Damping,
        chunks: Callable[[], Iterator[Chunk]],
        say: Callable[[int], object],
    ) -> None:
        self.objective, self.factored, self.projections = objective, factored, projections
        self.damping, self.chunks, self.say = damping, chunks, say
        self.sizes = [one.size for one in projections.values()]
        self.eigen = all(isinstance(one, Eigenbasis) for one in projections.values())
        self.inverses = None if self.eigen else self._inverses()

    def rows(self, asked: Objective) -> tuple[Tensor, Tensor]:
        """Rows of the queries ``[Q, K]``, not rounded, and what was dropped of them ``[Q, L]``."""
        places, rows, rests = [], [], []
        factored = FactoredGradients(asked, dense=self.factored.dense)
        for batch in factored.passes("queries"):
            values, dropped = row_of(self.projections, batch)
            places.append(batch.rows)
            rows.append(values)
            rests.append(dropped)
        z, dropped = (
            asked.in_order(list(zip(places, parts, strict=True))) for parts in (rows, rests)
        )
        return z, dropped

    def scores(
        self, z: Tensor, dropped: Tensor, modules: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Of queries with rows ``z [Q, K]`` that were not rounded.

        Args:
            z: the rows.
            dropped: norms of what the projections left out, ``[Q, L]``.
            modules: whether to return the parts.

        Returns:
            Scores ``[Q, N]``, their parts ``[L, Q, N]``, and the factors ``[Q, 2L]`` and
            ``[N, 2L]`` whose products add up to the errors: of rounding, then of the projections.
        """
        x, count = self._solved(z), self.objective.num_examples
        left = [_norms(x, x, self.sizes), dropped if self.eigen else self._doubts(x, z)]
        values = z.new_zeros(len(z), count)
        parts = z.new_zeros(len(self.sizes), len(z), count) if modules else None
        right = torch.zeros(count, 2 * len(self.sizes), dtype=torch.float64, device=z.device)
        done = 0
        for chunk in self.chunks():
            if parts is None:
                values[:, chunk.places] = x @ chunk.values.T / -count
            else:
                pairs = zip(x.split(self.sizes, 1), chunk.values.split(self.sizes, 1), strict=True)
                found = torch.stack([a @ b.T / -count for a, b in pairs])
                parts[:, :, chunk.places], values[:, chunk.places] = found, found.sum(0)
            rest = chunk.dropped
            if not self.eigen:
                rest = _norms(self._solved(chunk.values), chunk.values, self.sizes)
            right[chunk.places] = torch.cat([chunk.errors, rest], 1) / count
            done += len(chunk.places)
            self.say(done)
        return values, parts, torch.cat(left, 1), right

    def self_scores(self) -> tuple[Tensor, Tensor]:
        r"""Of the examples for their own losses: parts and their errors, ``[L, N]``, float64.

        In an eigenbasis the squares of what was dropped are known, and belong to the score: only
        rounding is an error, $2 \|\hat z\| e + e^2$ with $e = \|z - \hat z\|$. With random
        projections it is $2 \|x\| e$ to first order, and the standard error of the projection.
        """
        count, device = self.objective.num_examples, self.objective.device
        shape = len(self.sizes), count
        parts = torch.zeros(shape, dtype=torch.float64, device=device)
        errors = torch.zeros(shape, dtype=torch.float64, device=device)
        done = 0
        for chunk in self.chunks():
            z, e = chunk.values, chunk.errors
            x = self._solved(z)
            squares, sizes = _norms(x, z, self.sizes).square(), _norms(x, x, self.sizes)
            if self.eigen:
                found = squares + chunk.dropped.square()
                error = 2 * sizes * e + e.square() + _ROUNDED_UP * chunk.dropped.square()
            else:
                found = squares
                error = 2 * sizes * e + squares * self._doubt(squares)
            parts[:, chunk.places], errors[:, chunk.places] = found.T / -count, error.T / count
            done += len(chunk.places)
            self.say(done)
        return parts, errors

    # ------------------------------------------------------------ random projections

    def _doubt(self, like: Tensor) -> Tensor:
        doubts = [one.doubt for one in self.projections.values()]
        return torch.tensor(doubts, dtype=torch.float64, device=like.device)

    def _doubts(self, x: Tensor, z: Tensor) -> Tensor:
        return _norms(x, z, self.sizes) * self._doubt(z)

    def _solved(self, z: Tensor) -> Tensor:
        """Rows with the inverse applied; whitened ones have it in them."""
        if self.inverses is None:
            return z
        pairs = zip(self.inverses, z.double().split(self.sizes, 1), strict=True)
        return torch.cat([(A @ piece.T.contiguous()).T for A, piece in pairs], 1).to(z.dtype)

    def _inverses(self) -> list[LinearOperator]:
        """The damped inverse of the second moment of every piece."""
        objective, names = self.objective, list(self.projections)
        moments = [
            torch.zeros(size, size, dtype=torch.float64, device=objective.device)
            for size in self.sizes
        ]
        for chunk in self.chunks():
            weights = objective.weights
            own = None if weights is None else weights.to(chunk.places.device)[chunk.places]
            for M, piece in zip(moments, chunk.values.double().split(self.sizes, 1), strict=True):
                weighted = piece if own is None else piece * own.double()[:, None]
                M += weighted.T @ piece / objective.num_examples
        l2 = objective.l2
        means = {}
        for name, M in zip(names, moments, strict=True):
            if isinstance(l2, Tensor):  # the mean over the block: a projection mixes its entries
                places = self.factored.blocks[name].positions(objective.space)
                M.diagonal().add_(float(l2.cpu()[places].double().mean()))
            else:
                M.diagonal().add_(l2)
            means[name] = float(M.diagonal().mean())
        damping = damping_of(self.damping, means)
        for name, M in zip(names, moments, strict=True):
            M.diagonal().add_(damping[name])
        definite = {"positive_definite"}
        return [inverse(Dense(M, tags=definite), Cholesky()) for M in moments]


def _norms(x: Tensor, z: Tensor, sizes: list[int]) -> Tensor:
    """Roots of the products of the pieces of two rows, ``[b, L]``."""
    pairs = zip(x.double().split(sizes, 1), z.double().split(sizes, 1), strict=True)
    return torch.stack([(a * b).sum(1) for a, b in pairs], 1).clamp(min=0).sqrt()
