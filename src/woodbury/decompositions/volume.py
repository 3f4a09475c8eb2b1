"""Random rows for least squares: determinantal and volume sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, NonFiniteError, RankError, ShapeError, SingularError

__all__ = ["RowSample", "RowSampling", "sample_rows"]

RowSampling = Literal["volume", "dpp", "leverage"]


@dataclass(frozen=True, eq=False)
class RowSample:
    r"""Rows of a least-squares problem, and weights for them.

    Attributes:
        rows: integers ``[k]``; a row may come more than once but for ``"dpp"``.
        weights: $w_i = n / \ell_i$ with the leverage scores $\ell_i$, ``[k]``: what each residual
            squared is multiplied by.

    Example:
        >>> import torch
        >>> from woodbury.decompositions import sample_rows
        >>> X = torch.eye(4, 2, dtype=torch.float64)
        >>> sorted(sample_rows(X, 2, method="dpp").rows.tolist())  # the others hold nothing
        [0, 1]
    """

    rows: Tensor
    weights: Tensor

    def solve(self, X: Tensor, y: Tensor) -> Tensor:
        r"""$\arg\min_\beta \sum_{i \in S} w_i (y_i - x_i^H \beta)^2$, from the rows drawn alone.

        Args:
            X: the matrix ``[m, n]``, of which only the rows drawn are read.
            y: right-hand side ``[m]`` or ``[m, k]``, the same.
        """
        roots = self.weights.sqrt().to(X.dtype).unsqueeze(1)
        right = y[self.rows].unsqueeze(1) if y.dim() == 1 else y[self.rows]
        found = torch.linalg.lstsq(roots * X[self.rows], roots * right).solution
        return found.squeeze(1) if y.dim() == 1 else found


def sample_rows(
    X: Tensor,
    size: int,
    *,
    method: RowSampling = "volume",
    generator: torch.Generator | None = None,
) -> RowSample:
    r"""Rows from which least squares is solved without bias.

    With an orthonormal basis $Q$ of the columns of $X$ and leverage scores $\ell_i = \|q_i\|^2$:

    - ``"dpp"``: ``size = n`` rows with probability $\det(Q_S)^2$, one after the other: a row with
      probability proportional to its squared distance from the span of those drawn.
    - ``"volume"``: volume-rescaled sampling of ``size >= n`` rows with probability proportional to
      $\det(\sum_{i \in S} w_i q_i q_i^H) \prod_{i \in S} \ell_i$: $n$ rows of the ``"dpp"``, the
      others independent with probability $\ell_i / n$, in random order.
    - ``"leverage"``: ``size`` independent rows with probability $\ell_i / n$.

    For the first two the weighted solution (:meth:`RowSample.solve`) is unbiased,
    $E\,\hat\beta = X^+ y$ for every $y$; for independent rows it is not.

    Args:
        X: matrix ``[m, n]`` of full column rank.
        size: rows to draw; ``n`` for ``"dpp"``, at least ``n`` for ``"volume"``.
        method: which.
        generator: draws the rows; the same ones every time if not given.

    Returns:
        A :class:`RowSample`.

    Raises:
        RankError: ``size`` does not fit the method.
        SingularError: ``X`` has not full column rank.
        NonFiniteError: ``X`` holds NaN or infinity.
        ShapeError: ``X`` is not a matrix with at least as many rows as columns.
        ArgumentError: ``method`` is unknown.

    Cost: $O(m n^2)$ multiplications, memory of three matrices ``[m, n]``.

    Source: Derezinski, Warmuth and Hsu, "Unbiased estimators for random design regression" (2022),
    theorems 2 and 6; Nouy and Michel, "Weighted least-squares approximation with determinantal
    point processes and generalized volume sampling" (2023); Hough, Krishnapur, Peres and Virag
    (2006), algorithm 18, for drawing a projection process.

    Example:
        >>> import torch
        >>> from woodbury.decompositions import sample_rows
        >>> X = torch.linspace(-1, 1, 100).double().unsqueeze(1) ** torch.arange(4)
        >>> y = X @ torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
        >>> sample_rows(X, 8).solve(X, y).round(decimals=6)
        tensor([1., 2., 3., 4.], dtype=torch.float64)
    """
    if method not in get_args(RowSampling):
        raise ArgumentError(f"method is {method!r}; it must be one of {get_args(RowSampling)}")
    if X.dim() != 2 or X.shape[0] < X.shape[1] or not X.shape[1]:
        raise ShapeError(f"X has shape {tuple(X.shape)}; it must be [m, n] with m >= n >= 1")
    n = X.shape[1]
    least = 1 if method == "leverage" else n
    if size < least or (method == "dpp" and size > n):
        wanted = f"{n}" if method == "dpp" else f"at least {least}"
        raise RankError(f"size is {size}; method {method!r} for {n} columns needs {wanted}")
    if not bool(torch.isfinite(X).all()):
        raise NonFiniteError("X holds NaN or infinity")
    if generator is None:
        generator = torch.Generator(X.device).manual_seed(0)
    wide = torch.complex128 if X.is_complex() else torch.float64
    Q, R = torch.linalg.qr(X.to(wide))
    values = torch.linalg.svdvals(R)
    if values[-1] <= max(X.shape) * torch.finfo(X.dtype).eps * values[0]:
        raise SingularError(
            f"X has singular values from {values[0].item():.3g} to {values[-1].item():.3g}: it has "
            "not full column rank; drop columns that others span"
        )
    scores = Q.abs().square().sum(1)
    drawn = [_projection_process(Q, generator)] if method != "leverage" else []
    rest = size - sum(len(part) for part in drawn)
    if rest:
        drawn.append(torch.multinomial(scores, rest, replacement=True, generator=generator))
    rows = torch.cat(drawn)
    if method != "dpp":
        rows = rows[torch.randperm(size, device=X.device, generator=generator)]
    return RowSample(rows, n / scores[rows])


def _projection_process(Q: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of an orthonormal ``Q`` with probability ``|det Q_S|^2``."""
    n = Q.shape[1]
    distances = Q.abs().square().sum(1)
    directions = torch.zeros(n, 0, dtype=Q.dtype, device=Q.device)
    found = []
    for _ in range(n):
        row = int(torch.multinomial(distances.clamp_min(0), 1, generator=generator))
        found.append(row)
        new = Q[row].conj()
        for _ in range(2):  # twice is enough
            new = new - directions @ (directions.mH @ new)
        new = new / math.sqrt(float(new.abs().square().sum()))
        directions = torch.cat([directions, new.unsqueeze(1)], dim=1)
        distances = distances - (Q @ new).abs().square()
        distances[found] = 0
    return torch.tensor(found, device=Q.device)
