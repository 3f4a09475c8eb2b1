"""The inverse of a gradient window by rank-one updates, as M-FAC computes it for pruning."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.curvature.window_inverse import OfWindow
from woodbury.errors import ArgumentError

if TYPE_CHECKING:
    from woodbury.curvature.gradient_window import GradientWindow

__all__ = ["WindowRecursion"]


class WindowRecursion(OfWindow):
    r"""$F^{-1}$ of a :class:`~woodbury.GradientWindow` by the static algorithm of M-FAC.

    With $F_0 = \lambda I$ and $F_i = F_{i-1} + \frac1m g_i g_i^T$, in every block,

    $$ h_i = F_{i-1}^{-1} g_i = \tfrac1\lambda g_i - \sum_{j<i} h_j\,\frac{h_j^T g_i}{t_j},
    \qquad t_i = m + g_i^T h_i, \qquad
    F^{-1} x = \tfrac1\lambda x - \sum_j h_j\,\frac{h_j^T x}{t_j}. $$

    The same matrix as ``window.inverse()``, which is the faster one for products. This one reads an
    entry from $m$ numbers, which is what pruning asks for all the time, and can be computed page by
    page: gradients of the pages that are not worked on stay where they are (in memory of the CPU,
    say, while ``device`` computes).

    Args:
        window: $F$, with or without blocks.
        pages: how many pages the gradients are cut into, 1 to $m$. It changes memory, not the
            result.
        device: where pages are worked on; default where the gradients are.

    Raises:
        ArgumentError: ``pages`` is not between 1 and $m$.
        NonFiniteError: a gradient holds NaN or infinity.

    Cost: $m^2 n$ multiplications and memory for $m n$ numbers, once; then $2 m n$ a column, $m$ an
    entry, $m n$ the diagonal.

    Source: Frantar, Kurtic and Alistarh, "M-FAC" (2021), section 3.1 and appendix on paging.

    Example:
        >>> import torch
        >>> from woodbury import GradientWindow
        >>> from woodbury.curvature import WindowRecursion
        >>> inverse = WindowRecursion(GradientWindow(torch.ones(2, 3), damping=1.0), pages=2)
        >>> inverse.diagonal()
        tensor([0.7500, 0.7500, 0.7500])
    """

    def __init__(
        self, window: GradientWindow, *, pages: int = 1, device: torch.device | str | None = None
    ) -> None:
        m = len(window.gradients)
        if not 1 <= pages <= m:
            raise ArgumentError(f"pages is {pages}; {m} gradients make 1 to {m} pages")
        super().__init__(window)
        self.pages = pages
        worker = window.device if device is None else torch.device(device)
        # [blocks, m, B] and [blocks, m]
        self.directions, self.scales = _recursion(window, pages, worker)

    def _matmat(self, X: Tensor) -> Tensor:
        stacked = self.window.stack(X)
        inner = torch.bmm(self.directions, stacked) / self.scales.unsqueeze(2)
        return X / self.window.damping - self.window.unstack(torch.bmm(self.directions.mT, inner))

    def _diagonal(self) -> Tensor:
        taken = (self.directions.square() / self.scales.unsqueeze(2)).sum(1).reshape(-1)
        return 1 / self.window.damping - taken[: self.shape[0]]

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The entries ``[q]`` at index pairs; see :meth:`WindowInverse.entries`. Cost: ``m`` each.

        Raises:
            ShapeError: the indices are not two lists of integers of one length within ``0 .. n-1``.
        """
        return self._read(rows, columns, self._within)

    def _within(self, block: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        width = max(self.window.width, 1)
        left = self.directions[block, :, rows % width]
        right = self.directions[block, :, columns % width]
        taken = (left * right / self.scales[block]).sum(1)
        return (rows == columns).to(self.dtype) / self.window.damping - taken

    def _logdet(self) -> Tensor:
        # A rank-one update multiplies the determinant by t_i / m; what pads a block adds nothing.
        grown = (self.scales / self.window.divisor).log().sum()
        return -(grown + self.shape[0] * math.log(self.window.damping))


def _recursion(window: GradientWindow, pages: int, worker: torch.device) -> tuple[Tensor, Tensor]:
    G = window.gradient_stack().detach()
    blocks, m, _ = G.shape
    H = torch.empty_like(G, memory_format=torch.contiguous_format)
    t = torch.empty(blocks, m, dtype=G.dtype, device=worker)
    step = -(-m // pages)
    for start in range(0, m, step):
        stop = min(start + step, m)
        page = G[:, start:stop].to(worker)
        work = page / window.damping
        for before in range(0, start, step):
            after = min(before + step, m)
            other = H[:, before:after].to(worker)
            weights = torch.bmm(page, other.mT) / t[:, before:after].unsqueeze(1)
            work.baddbmm_(weights, other, alpha=-1)
        for i in range(stop - start):
            if i:
                weights = torch.bmm(work[:, :i], page[:, i].unsqueeze(2)).squeeze(2)
                weights = (weights / t[:, start : start + i]).unsqueeze(1)
                work[:, i] -= torch.bmm(weights, work[:, :i]).squeeze(1)
            t[:, start + i] = window.divisor + (page[:, i] * work[:, i]).sum(1)
        H[:, start:stop] = work.to(H.device)
    return H, t.to(H.device)
