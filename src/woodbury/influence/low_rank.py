"""Scores layer by layer with the gradients of queries kept as matrices of low rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from woodbury.curvature import FactoredGradients, Objective
from woodbury.curvature.layers import MatrixGradients, VectorGradients
from woodbury.errors import BudgetError
from woodbury.influence.eigenbasis import EigenBlock, MatrixQueries
from woodbury.influence.forecast import query_bytes
from woodbury.influence.layered import Inverses, Layered, Queries, each, summed
from woodbury.influence.pairwise import Say
from woodbury.influence.query_forms import (
    DenseQueries,
    FactorQueries,
    LowRankQueries,
    TokenQueries,
)
from woodbury.influence.rows import Gradients, joined, rows_of_data
from woodbury.influence.runs import Run
from woodbury.influence.truncation import Draw, Truncation
from woodbury.operators.memory import in_words

__all__ = ["LowRank"]

# Of so many training examples or fewer the exact scores of all tell the error.
_FEW = 64
Piece = Gradients | DenseQueries | LowRankQueries | TokenQueries


class LowRank(Layered):
    r"""One run with $X_q = A^{-1}\nabla m_q$ of every matrix block in the form that takes least.

    With $t$ positions of the query and a block ``[p, m]``: its factors, $t (p + m)$ numbers, or the
    matrix, $p m$, where they are no more than the $r (p + m)$ of a matrix of rank $r$; these are
    exact. Otherwise $U_q V_q^T$ of rank $r$. Of inputs that are one-hot the columns of the tokens,
    exact. Queries of several batches, whatever their lengths, are scored together.

    The error of a score is at most
    $\frac1N \sum_l \|X_q^l - U_q^l V_q^{lT}\|_F \|\nabla_l \ell_i\|$, by Cauchy and Schwarz.

    Args:
        objective: of the training data.
        inverses: of every block.
        rank: $r$.
        memory: bytes that the queries may take.
        rows: the training examples that are scored, ascending.
        run: where finished pieces are.
        parts: keep the scores of every block.
        say: progress.

    Attributes:
        ranks: of the blocks that are approximate.
        error: $\|X_q - U_q V_q^T\|_F$ of these, ``[Q, R]``, float64.
        relative: of each of these the largest $\|X_q - U_q V_q^T\|_F / \|X_q\|_F$.
        norms: $\|\nabla_l \ell_i\|$ of these, ``[N, R]``; of all together where there are none.
    """

    def __init__(
        self,
        objective: Objective,
        inverses: Inverses,
        rank: int,
        memory: int,
        rows: Tensor,
        run: Run,
        parts: bool,
        say: Say,
    ) -> None:
        super().__init__(objective, inverses, 0.0, rows, run, parts, say)
        self.rank, self.memory = rank, memory
        self.ranks: dict[str, int] = {}
        self.relative: dict[str, float] = {}
        self.error = torch.zeros(0, 0, dtype=torch.float64)

    def scores(self, asked: Objective) -> tuple[Tensor, Tensor | None, Truncation | None]:
        """Scores ``[Q, N]``, parts ``[M, Q, N]``, and what the rank cost."""
        places, group = self._kept(asked)
        order = torch.cat(places).argsort()
        self.error = self.error[order.cpu()]
        if self.ranks:
            self.norms = self.norms.new_zeros(len(self.rows), len(self.ranks))
        values, parts = self._pass([group], "scores-low-rank")
        truncation = self._measured(asked, values) if self.ranks else None
        return values[order], None if parts is None else parts[:, order], truncation

    def words(self, truncation: Truncation | None) -> dict[str, Any]:
        """What a certificate says."""
        found = super().words(truncation)
        for word in ("terms", "exact_pairs"):
            found.pop(word, None)
        return {**found, "query_rank": self.rank, "query_errors": self.relative}

    def errors(self, queries: int, truncation: Truncation | None) -> Tensor | None:
        """What times ``norms`` bounds the error of every score: ``[Q, R]``."""
        return self.error if self.ranks else super().errors(queries, truncation)

    def _sizes_of(self, blocks: Mapping[str, Gradients]) -> Tensor:
        """Norms of the gradients of the approximate blocks, ``[b, R]``."""
        if not self.ranks:
            return super()._sizes_of(blocks)
        nothing = torch.zeros_like(next(iter(blocks.values())).squared_norms())
        squares = [blocks[k].squared_norms() if k in blocks else nothing for k in self.ranks]
        return torch.stack(squares, 1).sqrt()

    # -------------------------------------------------------------- queries

    def _kept(self, asked: Objective) -> tuple[list[Tensor], dict[str, Queries]]:
        """Places of the queries, batch by batch, and the forms of all of them."""
        places: list[Tensor] = []
        pieces: dict[str, list[Piece]] = {}
        for batch in FactoredGradients(asked, dense=self.factored.dense).passes("queries"):
            if not places:
                self._require_memory(asked, batch.blocks)
            places.append(batch.rows)
            for name, gradients in batch.blocks.items():
                pieces.setdefault(name, []).append(self._piece(name, gradients))
            self.say("preparing the queries", sum(map(len, places)) / asked.num_examples)
        errors = []
        for name, found in pieces.items():
            if not any(isinstance(piece, LowRankQueries) for piece in found):
                continue
            sizes = [_sizes(piece) for piece in found]
            error, norm = (torch.cat(part) for part in zip(*sizes, strict=True))
            errors.append(error.cpu())
            self.ranks[name] = self.rank
            self.relative[name] = float((error / norm).where(norm > 0, 0).amax())
        count = sum(map(len, places))
        self.error = torch.stack(errors, 1) if errors else self.error.new_zeros(count, 0)
        return places, {name: self._joined(name, found) for name, found in pieces.items()}

    def _require_memory(self, asked: Objective, blocks: Mapping[str, Gradients]) -> None:
        needed = query_bytes(blocks, asked.num_examples, self.rank)
        if needed > self.memory:
            raise BudgetError(
                f"{in_words(needed)} are needed for {asked.num_examples} queries of rank "
                f"{self.rank}, {in_words(self.memory)} are left beside the scores; raise memory, "
                "lower query_rank, or ask fewer queries at a time"
            )

    def _piece(self, name: str, gradients: Gradients) -> Piece:
        """The form of some queries that takes least; gradients where their factors do."""
        inverse = self.inverses.get(name)
        if not isinstance(gradients, MatrixGradients) or not isinstance(inverse, EigenBlock):
            return gradients
        if _sparse(inverse, gradients):
            return TokenQueries.of(inverse, gradients)
        p, m = inverse.inverse.shape
        least = min(p * m, self.rank * (p + m))
        if gradients.grads.shape[1] * (p + m) <= least:
            return gradients
        queries = MatrixQueries(inverse, gradients)
        if p * m <= least:
            return DenseQueries(queries.matrices())
        return LowRankQueries.of(queries, self.rank)

    def _joined(self, name: str, pieces: Sequence[Piece]) -> Queries:
        """One form of all queries of a block, or several where short and long ones differ."""
        found: list[Queries] = []
        for kind, some in groupby(pieces, type):
            parts: Any = list(some)
            if issubclass(kind, DenseQueries | TokenQueries | LowRankQueries):
                found.append(kind.join(parts))
            else:
                found.append(self._whole(name, _padded(parts)))
        return found[0] if len(found) == 1 else Several(found)

    def _whole(self, name: str, gradients: Gradients) -> Queries:
        """Gradients of queries without any approximation."""
        inverse = self.inverses.get(name)
        if isinstance(inverse, EigenBlock) and _sparse(inverse, gradients):
            return TokenQueries.of(inverse, gradients)  # type: ignore[arg-type]
        found = self._queries(name, gradients)
        return FactorQueries(found) if isinstance(found, MatrixQueries) else found

    # ---------------------------------------------------------- certificate

    def _measured(self, asked: Objective, values: Tensor) -> Truncation:
        """The error over all scores, from exact ones of some training examples, or of a few all."""
        norms = values.norm(dim=0, keepdim=True)  # of a column, with all queries, for one pair
        draw = Draw.of(norms, 0, _FEW) if norms.shape[1] > _FEW else None
        drawn = torch.arange(norms.shape[1], device=values.device) if draw is None else draw.columns
        columns, inverse = drawn.unique(return_inverse=True)
        pieces = [
            self._scored({n: self._whole(n, g) for n, g in batch.blocks.items()}, columns)
            for batch in FactoredGradients(asked, dense=self.factored.dense).passes("queries")
        ]
        exact = torch.cat(pieces).double()
        errors = (exact - values[:, columns]).norm(dim=0)[inverse]
        if draw is None:
            norm = exact.norm()
            relative = upper = float(errors.norm() / norm) if norm > 0 else 0.0
        else:
            relative, upper = draw.relative(errors, float(values.double().norm()))
        return Truncation(relative, upper, len(errors), self.ranks, 0.0)

    def _scored(self, group: Mapping[str, Queries], columns: Tensor) -> Tensor:
        """Scores of some columns, ascending: ``[Q, u]``."""
        wanted = self.rows[columns]
        found = self.norms.new_zeros(len(next(iter(group.values()))), len(wanted))
        subset = rows_of_data(self.objective, wanted)
        order = torch.searchsorted(wanted, torch.cat([rows for rows, _ in subset]))
        few = self.objective.with_data([data for _, data in subset])
        start = 0
        for batch in FactoredGradients(few, dense=self.factored.dense).passes("exact scores"):
            places = order[start : start + batch.size]
            found[:, places] = self.factor * summed(each(group, batch.blocks))
            start += batch.size
        return found


class Several:
    """Queries of a block in different forms, one after another."""

    def __init__(self, parts: Sequence[Queries]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def scores(self, gradients: Gradients) -> Tensor:
        """``[Q, b]``."""
        return torch.cat([part.scores(gradients) for part in self.parts])


def _sparse(inverse: EigenBlock, gradients: Gradients) -> bool:
    """Whether the queries of this block have columns for their own tokens only."""
    return isinstance(gradients, MatrixGradients) and gradients.one_hot and inverse.right is None


def _sizes(piece: Piece) -> tuple[Tensor, Tensor]:
    """Error and norm of every query; an error of zero where a form is exact."""
    if isinstance(piece, LowRankQueries):
        return piece.error, piece.norm
    one = piece.values if isinstance(piece, VectorGradients) else piece
    nothing = torch.zeros(len(one), dtype=torch.float64)
    return nothing, nothing


def _padded(pieces: Sequence[Gradients]) -> Gradients:
    """Gradients of several batches as one, with positions of zeros behind the shorter ones."""
    matrices = [piece for piece in pieces if isinstance(piece, MatrixGradients)]
    if not matrices:
        return joined(pieces)
    most = max(piece.grads.shape[1] for piece in matrices)
    longer = []
    for piece in matrices:
        behind = most - piece.grads.shape[1]
        places = (0, behind) if piece.one_hot else (0, 0, 0, behind)
        grads = pad(piece.grads, (0, 0, 0, behind))
        longer.append(MatrixGradients(piece.block, pad(piece.inputs, places), grads))
    return joined(longer)
