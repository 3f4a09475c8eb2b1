"""Projections without a sort: l2 and linf balls, box, halfspace."""

from __future__ import annotations

import torch
from torch import Tensor

from woodbury.errors import ShapeError
from woodbury.implicit.projections.common import bound, need_real, refuse

__all__ = ["project_box", "project_halfspace", "project_l2_ball", "project_linf_ball"]


def project_l2_ball(y: Tensor, radius: Tensor | float = 1.0) -> Tensor:
    r"""Euclidean projection onto $\{\|x\|_2 \le r\}$.

    $y$ itself inside, $r y / \|y\|$ outside, where the Jacobian is
    $\frac{r}{\|y\|} (I - \hat y \hat y^T)$, $\hat y = y / \|y\|$. On the sphere the identity is
    taken, an element of the generalised Jacobian.

    Args:
        y: points ``[..., n]``, float32 or float64.
        radius: $r \ge 0$, a number or a tensor that broadcasts to ``[...]``; differentiable.

    Returns:
        The projections ``[..., n]``.

    Raises:
        ArgumentError: a negative radius: the set is empty.
        DtypeError: ``y`` is not real, or the radius has another dtype.
        ShapeError: ``y`` is a scalar or empty, or the radius does not broadcast.

    Cost: ``O(n)``; exact.

    Source: Parikh and Boyd 2014, section 6.5.1.

    Example:
        >>> import torch
        >>> from woodbury.implicit import project_l2_ball
        >>> project_l2_ball(torch.tensor([3.0, 4.0]), 2.0)
        tensor([1.2000, 1.6000])
    """
    need_real(y, "y")
    radius = bound(radius, y, y.shape[:-1], "radius")
    refuse(lambda r: r < 0, "radius is {}; a ball needs a radius >= 0", radius)
    outside = (torch.linalg.vector_norm(y.detach(), dim=-1) > radius.detach()).unsqueeze(-1)
    # Inside, another point stands in for y, so that the branch not taken has a derivative, too.
    stand_in = torch.where(outside, y, 1)
    norm = torch.linalg.vector_norm(stand_in, dim=-1, keepdim=True)
    return torch.where(outside, radius.unsqueeze(-1) * (stand_in / norm), y)


def project_linf_ball(y: Tensor, radius: Tensor | float = 1.0) -> Tensor:
    r"""Euclidean projection onto $\{\|x\|_\infty \le r\}$: the box $[-r, r]^n$.

    Args:
        y: points ``[..., n]``, float32 or float64.
        radius: $r \ge 0$, a number or a tensor that broadcasts to ``[...]``; differentiable.

    Returns:
        The projections ``[..., n]``.

    Raises:
        ArgumentError: a negative radius: the set is empty.
        DtypeError: ``y`` is not real, or the radius has another dtype.
        ShapeError: ``y`` is a scalar or empty, or the radius does not broadcast.

    Cost: ``O(n)``; exact.

    Source: Parikh and Boyd 2014, section 6.2.4.

    Example:
        >>> import torch
        >>> from woodbury.implicit import project_linf_ball
        >>> project_linf_ball(torch.tensor([3.0, -0.5]))
        tensor([ 1.0000, -0.5000])
    """
    need_real(y, "y")
    radius = bound(radius, y, y.shape[:-1], "radius")
    refuse(lambda r: r < 0, "radius is {}; a ball needs a radius >= 0", radius)
    wide = radius.unsqueeze(-1).expand(y.shape)
    return _clipped(y, -wide, wide)


def project_box(y: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
    r"""Euclidean projection onto the box $\{l \le x \le u\}$.

    $x_i = \min(\max(y_i, l_i), u_i)$. The derivative is 1 with respect to whichever of the three
    the entry is; where $y_i$ lies on a bound it is $y_i$.

    Args:
        y: points ``[..., n]``, float32 or float64.
        lower: $l$, a number or a tensor that broadcasts to ``[..., n]``; ``-inf`` for none.
        upper: $u$, likewise; ``inf`` for none.

    Returns:
        The projections ``[..., n]``.

    Raises:
        ArgumentError: a lower bound exceeds its upper bound, or is NaN: the set is empty.
        DtypeError: ``y`` is not real, or a bound has another dtype.
        ShapeError: ``y`` is a scalar or empty, or a bound does not broadcast.

    Cost: ``O(n)``; exact.

    Source: Parikh and Boyd 2014, section 6.2.4.

    Example:
        >>> import torch
        >>> from woodbury.implicit import project_box
        >>> project_box(torch.tensor([-1.0, 0.5, 2.0]), 0.0, float("inf"))
        tensor([0.0000, 0.5000, 2.0000])
    """
    need_real(y, "y")
    low, high = bound(lower, y, y.shape, "lower"), bound(upper, y, y.shape, "upper")
    message = "lower is {} where upper is {}: the box is empty"
    refuse(lambda below, above: ~(below <= above), message, low, high)
    return _clipped(y, low, high)


def _clipped(y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.where(y < low, low, torch.where(y > high, high, y))


def project_halfspace(y: Tensor, normal: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    r"""Euclidean projection onto $\{x : \langle a, x\rangle \le b\}$.

    $x = y - \frac{(\langle a, y\rangle - b)_+}{\|a\|^2} a$; where the constraint is active the
    Jacobian is $I - a a^T / \|a\|^2$. On the plane itself the identity is taken.

    Args:
        y: points ``[..., n]``, float32 or float64.
        normal: $a$, broadcasts to ``[..., n]``; differentiable.
        offset: $b$, a number or a tensor that broadcasts to ``[...]``; differentiable.

    Returns:
        The projections ``[..., n]``.

    Raises:
        ArgumentError: ``a = 0`` with ``b < 0``: the set is empty.
        DtypeError: ``y`` is not real, or an argument has another dtype.
        ShapeError: ``y`` is a scalar or empty, or an argument does not broadcast.

    Cost: ``O(n)``; exact.

    Source: Parikh and Boyd 2014, section 6.2.1.

    Example:
        >>> import torch
        >>> from woodbury.implicit import project_halfspace
        >>> project_halfspace(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]), 4.0)
        tensor([2., 1.])
    """
    need_real(y, "y")
    if not isinstance(normal, Tensor):
        raise ShapeError(f"normal is {type(normal).__name__}; it must be a tensor [..., n]")
    normal = bound(normal, y, y.shape, "normal")
    offset = bound(offset, y, y.shape[:-1], "offset")
    size = normal.detach().abs().amax(-1)
    message = "normal is {} in every entry and offset is {}: no point satisfies 0 <= offset"
    refuse(lambda a, b: (a == 0) & (b < 0), message, size, offset)
    excess = (normal * y).sum(-1) - offset
    active = (excess.detach() > 0) & (size > 0)
    # Divided by the largest entry first: the square of a small normal would be zero.
    unit = normal / torch.where(active, size, 1).unsqueeze(-1)
    square = torch.where(active, (unit * unit).sum(-1), 1) * torch.where(active, size, 1)
    shift = torch.where(active, excess / square, 0)
    return y - shift.unsqueeze(-1) * unit
