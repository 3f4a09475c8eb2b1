"""Projection onto the solutions of linear equations."""

from __future__ import annotations

import torch
from torch import Tensor

from woodbury.errors import ShapeError
from woodbury.implicit.projections.common import bound, need_real, refuse

__all__ = ["project_affine"]


def project_affine(y: Tensor, A: Tensor, b: Tensor | float = 0.0) -> Tensor:
    r"""Euclidean projection onto $\{x : A x = b\}$.

    $x = y - A^+ (A y - b)$ with the pseudo-inverse, so that redundant equations do no harm. The
    Jacobian with respect to $y$ is $I - A^+ A$; those with respect to $A$ and $b$ are the ones of
    constant rank (Golub and Pereyra 1973).

    Args:
        y: points ``[..., n]``, float32 or float64.
        A: equations ``[..., m, n]``, broadcast over the leading dimensions; differentiable.
        b: right-hand sides, broadcast to ``[..., m]``; differentiable.

    Returns:
        The projections ``[..., n]``.

    Raises:
        ArgumentError: the equations contradict each other: the set is empty.
        DtypeError: ``y`` is not real, or an argument has another dtype.
        ShapeError: the shapes do not fit.

    Cost: a singular value decomposition of ``A``, ``O(m n min(m, n))``; exact to rounding.

    Source: Parikh and Boyd 2014, section 6.2.1.

    Example:
        >>> import torch
        >>> from woodbury.implicit import project_affine
        >>> project_affine(torch.zeros(3), torch.ones(1, 3), torch.ones(1))
        tensor([0.3333, 0.3333, 0.3333])
    """
    need_real(y, "y")
    need_real(A, "A", 2)
    if A.shape[-1] != y.shape[-1]:
        raise ShapeError(f"A has {A.shape[-1]} columns and y has {y.shape[-1]} entries")
    rows = A.shape[-2]
    A = bound(A, y, torch.Size((*y.shape[:-1], rows, y.shape[-1])), "A")
    b = bound(b, y, torch.Size((*y.shape[:-1], rows)), "b")
    inverse = torch.linalg.pinv(A)
    at_zero = _times(inverse, b)
    wanted = b.detach()
    left = _times(A.detach(), at_zero.detach()) - wanted
    # What rounding leaves of a consistent system, and no more.
    allowed = 100 * max(A.shape[-2:]) * torch.finfo(y.dtype).eps
    scale = wanted.abs().amax(-1) + A.detach().abs().amax((-1, -2)) * at_zero.detach().abs().sum(-1)
    message = "the equations A x = b contradict each other: the smallest |A x - b| is {} (b has {})"
    refuse(lambda r, s: r > allowed * s, message, left.abs().amax(-1), scale)
    moved = y - _times(inverse, _times(A, y))
    # Once more: takes out what rounding left of A x when y is large.
    return moved - _times(inverse, _times(A, moved)) + at_zero


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
