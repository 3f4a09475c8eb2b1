"""The Gaussian (radial basis function) kernel and a length to start it from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, DataError, ShapeError

__all__ = ["RBF", "median_lengthscale"]


@dataclass(frozen=True)
class RBF:
    r"""$k(x, z) = \exp\left(-\|x - z\|^2 / 2\ell^2\right)$, for :class:`woodbury.Kernel`.

    Args:
        lengthscale: $\ell > 0$, in the unit of the points.

    Raises:
        ArgumentError: ``lengthscale`` is not a positive number.

    Cost: ``b c (d + 2)`` multiplications; no temporary of the size of the result without gradients,
    two with them.

    Example:
        >>> import torch
        >>> from woodbury.kernels import RBF
        >>> RBF(lengthscale=1.0)(torch.zeros(1, 1), torch.tensor([[0.0], [2.0]]))
        tensor([[1.0000, 0.1353]])
    """

    lengthscale: float

    def __post_init__(self) -> None:
        if not 0 < self.lengthscale < float("inf"):
            raise ArgumentError(f"lengthscale is {self.lengthscale}; it must be positive")

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Evaluate $k$ between ``[b, d]`` and ``[c, d]``: ``[b, c]``."""
        if torch.is_grad_enabled() and (x.requires_grad or z.requires_grad):
            return squared_distances(x, z).mul(-0.5 / self.lengthscale**2).exp()
        return self.write(x, z, x.new_empty(x.shape[0], z.shape[0]))

    def write(self, x: Tensor, z: Tensor, out: Tensor) -> Tensor:
        """Evaluate into ``out`` ``[b, c]``, without gradients."""
        _require_points(x, z)
        # -|x - z|^2 / 2 = <(x, -|x|^2 / 2, 1), (z, 1, -|z|^2 / 2)>: one product does it.
        # In powers of two, whose function is three times as fast on CPUs.
        scale = math.sqrt(math.log2(math.e)) / self.lengthscale
        center = z.mean(0)
        left = (x - center) * scale
        right = left if z is x else (z - center) * scale
        torch.mm(_extended(left, 1), _extended(right, 0).mT, out=out).clamp_max_(0)
        if z is x:
            out.fill_diagonal_(0)
        return out.exp2_()

    def diagonal(self, x: Tensor, z: Tensor) -> Tensor:
        """$k(x_i, z_i)$, ``[b]``."""
        return (x - z).square().sum(1).mul(-0.5 / self.lengthscale**2).exp()


def squared_distances(x: Tensor, z: Tensor) -> Tensor:
    r"""$\|x_i - z_j\|^2$, ``[b, c]``, by one matrix product; exactly 0 where ``x is z``, ``i=j``.

    Both are centred first, which halves the digits lost to cancellation.
    """
    _require_points(x, z)
    center = z.mean(0)
    left = x - center
    right = left if z is x else z - center
    distances = torch.addmm(right.square().sum(1)[None, :], left, right.mT, alpha=-2.0)
    distances = distances.add(left.square().sum(1)[:, None]).clamp_min(0)
    if z is x and not distances.requires_grad:
        distances.fill_diagonal_(0)
    return distances


def _require_points(x: Tensor, z: Tensor) -> None:
    if x.dim() != 2 or z.dim() != 2 or x.shape[1] != z.shape[1]:
        raise ShapeError(
            f"points have shapes {tuple(x.shape)} and {tuple(z.shape)}; they must be [b, d] and "
            "[c, d]"
        )


def _extended(points: Tensor, one_at: int) -> Tensor:
    """Points with two more coordinates: half their squared norms, negative, and ones."""
    squares = (points * points) @ points.new_full((points.shape[1], 1), -0.5)
    ones = torch.ones_like(squares)
    return torch.cat([points, *((squares, ones) if one_at else (ones, squares))], dim=1)


def median_lengthscale(
    X: Tensor, *, rows: int = 1000, generator: torch.Generator | None = None
) -> float:
    r"""The median distance between different rows, where a tuning of $\ell$ may begin.

    Args:
        X: points ``[n, d]``.
        rows: on how many of them it is taken.
        generator: draws them; the same ones every time if not given.

    Returns:
        $\ell$; the root mean square distance where more than half of the distances are zero, and 1
        where all rows are equal.

    Raises:
        DataError: there are fewer than two rows.

    Cost: ``rows^2 d`` multiplications.

    Source: Garreau, Jitkrittum and Kanagawa, "Large sample analysis of the median heuristic"
    (2017).

    Example:
        >>> import torch
        >>> from woodbury.kernels import median_lengthscale
        >>> median_lengthscale(torch.tensor([[0.0], [1.0], [3.0]]))
        2.0
    """
    n = X.shape[0]
    if n < 2:
        raise DataError(f"a median distance needs two rows, X has {n}")
    if n > rows:
        if generator is None:
            generator = torch.Generator(X.device).manual_seed(0)
        X = X[torch.randperm(n, generator=generator, device=X.device)[:rows]]
    squares = squared_distances(X.double(), X.double())
    upper = torch.triu_indices(len(X), len(X), offset=1, device=X.device)
    apart = squares[upper[0], upper[1]]
    apart = apart.where(apart > 1e-12 * apart.amax(), 0.0)  # equal rows, to rounding
    square = apart.median().item() or apart.mean().item()
    return float(square**0.5) or 1.0
