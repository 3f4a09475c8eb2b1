"""Projections that sort: the simplex and the l1 ball."""

from __future__ import annotations

import torch
from torch import Tensor

from woodbury.implicit.projections.common import bound, need_real, refuse

__all__ = ["project_l1_ball", "project_simplex"]


def project_simplex(y: Tensor, radius: Tensor | float = 1.0) -> Tensor:
    r"""Euclidean projection onto $\{x \ge 0,\ \sum_i x_i = r\}$.

    $x_i = (y_i - \tau)_+$ with the $\tau$ for which the entries sum to $r$. With the support
    $s = [x > 0]$ the Jacobian is $\operatorname{diag}(s) - s s^T / |s|$ and
    $\partial x / \partial r = s / |s|$. Where an entry is on the point of leaving the support it
    counts as outside: one element of the generalised Jacobian.

    Args:
        y: points ``[..., n]``, float32 or float64.
        radius: $r \ge 0$, a number or a tensor that broadcasts to ``[...]``; differentiable.

    Returns:
        The projections ``[..., n]``.

    Raises:
        ArgumentError: a negative radius: the set is empty.
        DtypeError: ``y`` is not real, or the radius has another dtype.
        ShapeError: ``y`` is a scalar or empty, or the radius does not broadcast.

    Cost: one sort, ``O(n log n)``; exact, no iterations. Derivatives of any order are those of
    the closed form on the support: no sort is differentiated.

    Source: Held, Wolfe and Crowder 1974; Martins and Astudillo 2016, proposition 2 (Jacobian).

    Example:
        >>> import torch
        >>> from woodbury.implicit import project_simplex
        >>> project_simplex(torch.tensor([0.9, 0.5, -1.0]))
        tensor([0.7000, 0.3000, 0.0000])
    """
    need_real(y, "y")
    radius = bound(radius, y, y.shape[:-1], "radius")
    refuse(lambda r: r < 0, "radius is {}; a simplex needs a radius >= 0", radius)
    return _simplex(y, radius)


def project_l1_ball(y: Tensor, radius: Tensor | float = 1.0) -> Tensor:
    r"""Euclidean projection onto $\{\|x\|_1 \le r\}$.

    $y$ itself inside; outside $x = \operatorname{sign}(y) \odot P_\Delta(|y|)$ with the simplex
    $\Delta$ of radius $r$, so that on the support $s$ with signs $\sigma$ the Jacobian is
    $\operatorname{diag}(s) - \sigma \sigma^T / |s|$. On the sphere the identity is taken.

    Args:
        y: points ``[..., n]``, float32 or float64.
        radius: $r \ge 0$, a number or a tensor that broadcasts to ``[...]``; differentiable.

    Returns:
        The projections ``[..., n]``.

    Raises:
        ArgumentError: a negative radius: the set is empty.
        DtypeError: ``y`` is not real, or the radius has another dtype.
        ShapeError: ``y`` is a scalar or empty, or the radius does not broadcast.

    Cost: one sort, ``O(n log n)``; exact, no iterations.

    Source: Duchi, Shalev-Shwartz, Singer and Chandra 2008, figure 1.

    Example:
        >>> import torch
        >>> from woodbury.implicit import project_l1_ball
        >>> project_l1_ball(torch.tensor([2.0, -1.5, 0.1]))
        tensor([ 0.7500, -0.2500,  0.0000])
    """
    need_real(y, "y")
    radius = bound(radius, y, y.shape[:-1], "radius")
    refuse(lambda r: r < 0, "radius is {}; a ball needs a radius >= 0", radius)
    sign = y.detach().sign()
    magnitude = y * sign  # |y| with the derivative that the sign says
    inside = (magnitude.detach().sum(-1) <= radius.detach()).unsqueeze(-1)
    return torch.where(inside, y, sign * _simplex(magnitude, radius))


def _simplex(y: Tensor, radius: Tensor) -> Tensor:
    radius = radius.unsqueeze(-1)
    support = _support(y.detach(), radius.detach())
    return torch.where(support, y - _threshold(y, support, radius), 0)


def _threshold(y: Tensor, support: Tensor, radius: Tensor) -> Tensor:
    # Relative to the largest entry, so that a shift of all of them costs no digits.
    top = y.detach().amax(-1, keepdim=True)
    total = torch.where(support, y - top, 0).sum(-1, keepdim=True)
    return top + (total - radius) / support.sum(-1, keepdim=True)


def _support(y: Tensor, radius: Tensor) -> Tensor:
    """Which entries are positive after the projection ``[..., n]``; at least one is kept."""
    ordered, order = (y - y.amax(-1, keepdim=True)).sort(dim=-1, descending=True)
    count = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    # The entry of rank k stays if it exceeds the threshold that the first k give; by
    # k (y_k - y_j) sums, each exact for the few that decide.
    keep = count * ordered + radius > ordered.cumsum(-1)
    keep = torch.cat([torch.ones_like(keep[..., :1]), keep[..., 1:]], -1)
    keep = keep.cummin(-1).values  # a prefix also where rounding says otherwise
    support = torch.zeros_like(keep).scatter(-1, order, keep)
    # Rounding of the sums can keep an entry that ends at or below zero: it leaves.
    above = support & (y > _threshold(y, support, radius))
    return torch.where(above.any(-1, keepdim=True), above, support)
