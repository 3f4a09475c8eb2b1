"""Incomplete Cholesky without fill, in NumPy, level by level."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["LevelZero"]

# Pairs of entries looked at together while the updates are listed: 32 MiB or so.
_PAIRS = 2**20


class LevelZero:
    r"""$L$ with the pattern of the lower triangle of $A$ and $(L L^H)_{ij} = a_{ij}$ on it.

    Column ``k`` needs the columns ``j < k`` with $l_{kj} \ne 0$ only, so columns fall into levels
    that are finished one after the other, each in a few vectorised operations: the exact factor,
    with a Python loop over levels (hundreds for the matrices of this house) and not over entries.
    The list of updates $l_{ij} \mathrel{-}= l_{ik} \bar l_{jk}$ depends on the pattern alone and
    serves for every shift.

    Args:
        matrix: hermitian SciPy array with a full diagonal; what is above it is not read.

    Source: Meijerink and van der Vorst (1977); level scheduling: Saad, "Iterative methods for
    sparse linear systems" (2nd ed.), 11.6.
    """

    def __init__(self, matrix: Any) -> None:
        from scipy.sparse import tril

        lower = tril(matrix, format="csc")
        lower.sort_indices()
        self.shape = lower.shape
        self.values = lower.data
        self.starts = lower.indptr.astype(np.int64)  # of each column; its diagonal comes first
        self.rows = lower.indices.astype(np.int64)
        self.counts = np.diff(self.starts) - 1
        self._list_updates()
        self._list_levels()

    def _list_updates(self) -> None:
        """Triples (a, b, target): entry ``target`` loses ``l_b conj(l_a)``, in order of columns."""
        n = self.shape[0]
        columns = np.repeat(np.arange(n), self.counts + 1)
        places = columns * n + self.rows  # ascending
        pairs = np.concatenate([[0], np.cumsum(self.counts * (self.counts + 1) // 2)])
        found: list[tuple[Any, Any, Any]] = []
        first = 0
        while first < n:
            last = int(np.searchsorted(pairs, pairs[first] + _PAIRS, side="right")) - 1
            last = min(n, max(first + 1, last))
            a = _ranges(self.starts[first:last] + 1, self.starts[first + 1 : last + 1])
            lengths = self.starts[columns[a] + 1] - a
            b = _ranges(a, a + lengths)
            a = np.repeat(a, lengths)
            wanted = self.rows[a] * n + self.rows[b]
            target = np.minimum(np.searchsorted(places, wanted), len(places) - 1)
            hit = places[target] == wanted
            found.append((a[hit], b[hit], target[hit]))
            first = last
        small = np.int32 if len(places) < 2**31 else np.int64
        self.left, self.right, self.target = (
            np.concatenate(part).astype(small) for part in zip(*found, strict=True)
        )
        self.update_starts = np.searchsorted(columns[self.left], np.arange(n + 1))

    def _list_levels(self) -> None:
        n = self.shape[0]
        diagonal = self.starts[:-1]
        below = np.ones(len(self.rows), dtype=bool)
        below[diagonal] = False
        waiting = np.bincount(self.rows[below], minlength=n)
        self.levels = []
        ready = np.flatnonzero(waiting == 0)
        while len(ready):
            entries = _ranges(diagonal[ready] + 1, self.starts[ready + 1])
            updates = _ranges(self.update_starts[ready], self.update_starts[ready + 1])
            self.levels.append((ready, entries, updates))
            np.subtract.at(waiting, self.rows[entries], 1)
            touched = np.unique(self.rows[entries])
            ready = touched[waiting[touched] == 0]

    def factorize(self, shift: float) -> tuple[Any, tuple[int, float] | None]:
        r"""The factor of $A + \alpha \operatorname{diag}(A)$ with ``shift`` $\alpha$.

        Returns:
            The factor as a CSC array and ``None``, or ``None`` with the row and the value of the
            first pivot that is not positive.
        """
        from scipy.sparse import csc_array

        values = self.values.copy()
        diagonal = self.starts[:-1]
        values[diagonal] *= 1 + shift
        for columns, entries, updates in self.levels:
            pivots = values[diagonal[columns]].real
            bad = ~(pivots > 0)
            if bad.any():
                first = int(np.argmax(bad))
                return None, (int(columns[first]), float(pivots[first]))
            roots = np.sqrt(pivots)
            values[diagonal[columns]] = roots
            values[entries] /= np.repeat(roots, self.counts[columns])
            change = values[self.right[updates]] * values[self.left[updates]].conj()
            np.subtract.at(values, self.target[updates], change)
        return csc_array((values, self.rows, self.starts), shape=self.shape), None


def _ranges(starts: Any, stops: Any) -> Any:
    """The integers of all ``range(start, stop)``, one after the other."""
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
