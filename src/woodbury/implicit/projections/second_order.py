"""Projection onto the second-order cone."""

from __future__ import annotations

import torch
from torch import Tensor

from woodbury.errors import ShapeError
from woodbury.implicit.projections.common import need_real

__all__ = ["project_second_order_cone"]


def project_second_order_cone(y: Tensor) -> Tensor:
    r"""Euclidean projection onto $\{(t, z) : \|z\|_2 \le t\}$, the first entry being $t$.

    $y$ itself where $\|z\| \le t$, zero where $\|z\| \le -t$, and otherwise
    $\frac{1}{2}(1 + t / \|z\|)\, (\|z\|, z)$, whose Jacobian is
    $\frac12 \begin{pmatrix} 1 & \hat z^T \\ \hat z & (1 + t/\|z\|) I
    - \frac{t}{\|z\|} \hat z \hat z^T \end{pmatrix}$. On the boundary of the cone the identity is
    taken, on that of its polar zero, and the identity at the origin.

    Args:
        y: points ``[..., n]``, ``n >= 2``, float32 or float64.

    Returns:
        The projections ``[..., n]``.

    Raises:
        DtypeError: ``y`` is not real.
        ShapeError: ``n < 2``.

    Cost: ``O(n)``; exact.

    Source: Parikh and Boyd 2014, section 6.3.2; Kanzow, Ferenczi and Fukushima 2009 (Jacobian).

    Example:
        >>> import torch
        >>> from woodbury.implicit import project_second_order_cone
        >>> project_second_order_cone(torch.tensor([0.0, 3.0, 4.0]))
        tensor([2.5000, 1.5000, 2.0000])
    """
    need_real(y, "y")
    if y.shape[-1] < 2:
        raise ShapeError(f"y has shape {tuple(y.shape)}; the cone (t, z) needs at least 2 entries")
    t, z = y[..., :1], y[..., 1:]
    size = torch.linalg.vector_norm(z.detach(), dim=-1, keepdim=True)
    inside = size <= t.detach()
    below = (size <= -t.detach()) & ~inside
    between = ~(inside | below)
    stand_in = torch.where(between, z, 1)  # the branch not taken has a derivative, too
    norm = torch.linalg.vector_norm(stand_in, dim=-1, keepdim=True)
    half = (norm + t) / 2
    edge = torch.cat([half, half * (stand_in / norm)], -1)
    return torch.where(inside, y, torch.where(below, 0, edge))
