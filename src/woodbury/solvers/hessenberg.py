"""The small least-squares problems of GMRES, for all columns of a block at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Hessenberg"]

Array = NDArray[np.inexact]


class Hessenberg:
    r"""$\min_y \|\beta e_1 - H_i y\|$ for Hessenberg matrices that grow by a column a step.

    ``Q`` collects the rotations that make them triangular: $Q H = R$ ``[k, length + 1, length]``.

    Args:
        length: columns at most.
        betas: norm of the first residual of each column of the block.
        complex_: whether entries are complex.
    """

    def __init__(self, length: int, betas: Sequence[float], *, complex_: bool) -> None:
        k, dtype = len(betas), np.complex128 if complex_ else np.float64
        self.Q: Array = np.zeros((k, length + 1, length + 1), dtype=dtype)
        self.R: Array = np.zeros((k, length, length), dtype=dtype)
        self.Q[:, 0, 0] = 1
        self.betas: Array = np.asarray(betas, dtype=np.float64)
        self.scale: Array = np.zeros(k)  # largest norm of a column: |A M| from below
        self.exhausted = np.zeros(k, dtype=bool)
        self.singular = np.zeros(k, dtype=bool)

    def extend(self, i: int, parts: Tensor, rest: Sequence[float], *, eps: float) -> list[float]:
        """Take column ``i``: parts along the basis ``[k, i + 1]``, and the norm of what is left.

        Returns the norms of the residuals.
        """
        H = np.atleast_2d(parts.resolve_conj().cpu().numpy()).astype(self.Q.dtype)
        below = np.asarray(rest, dtype=np.float64)
        column = (self.Q[:, : i + 1, : i + 1] @ H[:, :, None])[:, :, 0]
        diagonal = column[:, i]
        gamma = np.hypot(np.abs(diagonal), below)
        self.scale = np.maximum(self.scale, np.sqrt((np.abs(H) ** 2).sum(1) + below**2))
        noise = 20 * eps * self.scale
        self.exhausted = below <= noise
        self.singular = gamma <= noise
        nothing = gamma == 0  # not a number stays one
        safe = np.where(nothing, 1.0, gamma)
        with np.errstate(invalid="ignore"):  # infinity over infinity
            c = np.where(nothing, 1.0, diagonal / safe)[:, None]
            s = (below / safe)[:, None]
        Q = self.Q
        Q[:, i + 1, : i + 1] = -s * Q[:, i, : i + 1]
        Q[:, i + 1, i + 1] = c[:, 0]
        Q[:, i, : i + 1] *= c.conj()
        Q[:, i, i + 1] = s[:, 0]
        self.R[:, :i, i] = column[:, :i]
        self.R[:, i, i] = gamma
        found: list[float] = (self.betas * np.abs(Q[:, i + 1, 0])).tolist()
        return found

    def solve(self, size: int, columns: Sequence[int]) -> Array:
        """The minimisers ``[columns, size]``; 0 in the last place where that step is singular."""
        found = np.zeros((len(columns), size), dtype=self.Q.dtype)
        for place, j in enumerate(columns):
            used = size - 1 if self.singular[j] else size
            if used:
                right = self.betas[j] * self.Q[j, :used, 0]
                found[place, :used] = np.linalg.solve(self.R[j, :used, :used], right)
        return found

    def keep(self, columns: NDArray[np.intp]) -> None:
        """Drop all but some columns of the block."""
        self.Q, self.R = self.Q[columns], self.R[columns]
        self.betas, self.scale = self.betas[columns], self.scale[columns]
        self.exhausted, self.singular = self.exhausted[columns], self.singular[columns]
