"""The inverse of a window of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.errors import ShapeError
from woodbury.operators import LinearOperator
from woodbury.operators.dtypes import precise
from woodbury.operators.factorization import require_finite

if TYPE_CHECKING:
    from woodbury.curvature.gradient_window import GradientWindow

__all__ = ["OfWindow", "WindowInverse"]

# Gradients in single precision are made double in pieces of so many bytes.
_PIECE_BYTES = 64 * 2**20


class OfWindow(LinearOperator):
    """Base of what inverts a :class:`~woodbury.GradientWindow`."""

    def __init__(self, window: GradientWindow) -> None:
        super().__init__(
            window.shape,
            dtype=window.dtype,
            device=window.device,
            tags={"positive_definite"},
            space=window.space,
        )
        require_finite(window.gradients, "the window of gradients")
        self.window = window

    def _read(
        self, rows: Tensor, columns: Tensor, within: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Entries: those ``within(block, rows, columns)`` blocks, zeros elsewhere."""
        rows, columns = _checked_pairs(rows, columns, self.shape[0], self.device)
        width = max(self.window.width, 1)
        block, other = rows // width, columns // width
        values = within(block, rows, columns)
        return torch.where(block == other, values, torch.zeros_like(values)).to(self.dtype)

    def _inverse(self) -> LinearOperator:
        return self.window


class WindowInverse(OfWindow):
    r"""$F^{-1}$ of a :class:`~woodbury.GradientWindow`; made by its ``inverse()``.

    Attributes:
        window: $F$.

    Args:
        window: $F$; factorised here.

    Example:
        >>> import torch
        >>> from woodbury import GradientWindow
        >>> inverse = GradientWindow(torch.ones(1, 3), damping=1.0).inverse()
        >>> inverse.entries(torch.tensor([0, 0]), torch.tensor([0, 1]))
        tensor([ 0.7500, -0.2500])
    """

    def __init__(self, window: GradientWindow) -> None:
        super().__init__(window)
        G = window.gradient_stack()
        # Of the two matrices with the same nonzero spectrum, the smaller one is factorised.
        self.formed = G.shape[2] < G.shape[1]
        small = _gram(G.mT if self.formed else G)
        shift = window.divisor * window.damping
        small = small + shift * torch.eye(small.shape[1], dtype=small.dtype, device=small.device)
        self._factor = torch.linalg.cholesky(small)

    def _matmat(self, X: Tensor) -> Tensor:
        window = self.window
        stacked = window.stack(X)
        if self.formed:
            solved = torch.cholesky_solve(precise(stacked), self._factor) * window.divisor
            return window.unstack(solved.to(self.dtype))
        G = window.gradient_stack()
        inner = torch.cholesky_solve(precise(torch.bmm(G, stacked)), self._factor).to(self.dtype)
        return (X - window.unstack(torch.bmm(G.mT, inner))) / window.damping

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        r"""The entries $(F^{-1})_{k_j l_j}$ for index pairs.

        Args:
            rows: $k$, integers ``[q]``.
            columns: $l$, integers ``[q]``.

        Returns:
            ``[q]``, in the dtype of the operator; 0 where the two are in different blocks.

        Raises:
            ShapeError: the indices are not two lists of integers of one length within ``0 .. n-1``.

        Cost: $2 m^2$ multiplications each (the smaller of ``m`` and ``B``).
        """
        return self._read(rows, columns, self._within)

    def _within(self, block: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        window, width = self.window, max(self.window.width, 1)
        same = (rows == columns).to(self._factor.dtype)
        if self.formed:
            left = torch.nn.functional.one_hot(rows % width, width).to(self._factor.dtype)
            right = torch.nn.functional.one_hot(columns % width, width).to(self._factor.dtype)
        else:
            G = window.gradients
            left, right = precise(G[:, rows].mT), precise(G[:, columns].mT)
        factor = self._factor[block]
        sides = torch.stack([left, right], dim=2)
        whitened = torch.linalg.solve_triangular(factor, sides, upper=False)
        product = (whitened[:, :, 0] * whitened[:, :, 1]).sum(1)
        return product * window.divisor if self.formed else (same - product) / window.damping

    def _diagonal(self) -> Tensor:
        window = self.window
        if self.formed:
            inverses = torch.cholesky_inverse(self._factor)
            values = inverses.diagonal(dim1=1, dim2=2).reshape(-1)[: self.shape[0]]
            return (values * window.divisor).to(self.dtype)
        G = window.gradient_stack()
        pieces = []
        step = max(1, _PIECE_BYTES // (8 * G.shape[0] * G.shape[1]))
        for start in range(0, G.shape[2], step):
            part = precise(G[:, :, start : start + step])
            whitened = torch.linalg.solve_triangular(self._factor, part, upper=False)
            pieces.append(1 - whitened.square().sum(1))
        values = torch.cat(pieces, dim=1).reshape(-1)[: self.shape[0]]
        return (values / window.damping).to(self.dtype)

    def logdet_of_window(self) -> Tensor:
        r"""$\log\det F$ by the determinant lemma."""
        window = self.window
        total = 2 * self._factor.diagonal(dim1=1, dim2=2).log().sum()
        blocks, size = self._factor.shape[:2]
        total = total - blocks * size * math.log(window.divisor)
        padded = blocks * max(window.width, 1)
        # What was factorised has a damping for every row of it; F has one for every parameter.
        outside = window.shape[0] - (padded if self.formed else 0)
        if not self.formed:
            total = total - blocks * size * math.log(window.damping)
        return (total + outside * math.log(window.damping)).to(self.dtype)

    def _logdet(self) -> Tensor:
        return -self.logdet_of_window()


def _gram(G: Tensor) -> Tensor:
    """``G G^T`` of a stack ``[blocks, m, B]`` in float64, a piece of its columns at a time."""
    if G.dtype == torch.float64:
        return torch.bmm(G, G.mT)
    step = max(1, _PIECE_BYTES // (8 * G.shape[0] * max(1, G.shape[1])))
    total = None
    for start in range(0, max(G.shape[2], 1), step):
        part = precise(G[:, :, start : start + step])
        product = torch.bmm(part, part.mT)
        total = product if total is None else total + product
    assert total is not None  # there is at least one piece
    return total


def _checked_pairs(
    rows: Tensor, columns: Tensor, n: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    rows, columns = (torch.as_tensor(index, device=device) for index in (rows, columns))
    for index in (rows, columns):
        if index.dim() != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
            raise ShapeError(
                f"an index has shape {tuple(index.shape)} and dtype {index.dtype}; expected "
                "integers [q]"
            )
    if len(rows) != len(columns):
        raise ShapeError(f"{len(rows)} rows and {len(columns)} columns; they are pairs")
    if len(rows) and (
        min(int(rows.min()), int(columns.min())) < 0
        or max(int(rows.max()), int(columns.max())) >= n
    ):
        raise ShapeError(f"indices run outside of 0 .. {n - 1}")
    return rows.long(), columns.long()
