"""Proximal operators with closed-form derivatives.

``prox(y, ..., step)`` is ``argmin_x 1/2 ||x - y||^2 + step h(x)``. All act on the last dimension or
entry by entry, and differentiate with respect to every tensor they are given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.implicit.projections.common import bound, need_real, refuse

__all__ = [
    "prox_elastic_net",
    "prox_group_lasso",
    "prox_l1",
    "prox_log",
    "prox_nonnegative",
    "prox_ridge",
]


def prox_l1(y: Tensor, penalty: Tensor | float = 1.0, step: float = 1.0) -> Tensor:
    r"""Soft threshold: the proximal operator of $h(x) = \sum_i \lambda_i |x_i|$.

    $x_i = \operatorname{sign}(y_i)\,(|y_i| - \eta\lambda_i)_+$; $\partial x_i / \partial y_i$ is 1
    where $|y_i| > \eta \lambda_i$ and 0 elsewhere, the kink included;
    $\partial x_i / \partial \lambda_i = -\eta \operatorname{sign}(y_i)$ on the support.

    Args:
        y: points ``[..., n]``, float32 or float64.
        penalty: $\lambda \ge 0$, broadcasts to ``[..., n]``; differentiable.
        step: $\eta > 0$.

    Returns:
        The proximal points ``[..., n]``.

    Raises:
        ArgumentError: a negative penalty, or a step that is not positive.
        DtypeError: ``y`` is not real, or the penalty has another dtype.
        ShapeError: ``y`` is a scalar or empty, or the penalty does not broadcast.

    Cost: ``O(n)``; exact.

    Source: Parikh and Boyd 2014, section 6.5.2.

    Example:
        >>> import torch
        >>> from woodbury.implicit import prox_l1
        >>> prox_l1(torch.tensor([2.0, -0.5, -3.0]), 1.0)
        tensor([ 1.,  0., -2.])
    """
    need_real(y, "y")
    return _soft(y, step * _weight(y, penalty, y.shape, "penalty", step))


def prox_elastic_net(
    y: Tensor, penalty: Tensor | float = 1.0, ridge: Tensor | float = 1.0, step: float = 1.0
) -> Tensor:
    r"""Proximal operator of $h(x) = \sum_i \lambda_i |x_i| + \frac12 \gamma_i x_i^2$.

    The soft threshold of :func:`prox_l1` divided by $1 + \eta \gamma_i$.

    Args:
        y: points ``[..., n]``, float32 or float64.
        penalty: $\lambda \ge 0$, broadcasts to ``[..., n]``; differentiable.
        ridge: $\gamma \ge 0$, likewise.
        step: $\eta > 0$.

    Returns:
        The proximal points ``[..., n]``.

    Raises:
        ArgumentError: a negative penalty, or a step that is not positive.
        DtypeError: ``y`` is not real, or a penalty has another dtype.
        ShapeError: ``y`` is a scalar or empty, or a penalty does not broadcast.

    Cost: ``O(n)``; exact.

    Source: Parikh and Boyd 2014, section 6.5.3.

    Example:
        >>> import torch
        >>> from woodbury.implicit import prox_elastic_net
        >>> prox_elastic_net(torch.tensor([2.0, -0.5, -3.0]), 1.0, 1.0)
        tensor([ 0.5000,  0.0000, -1.0000])
    """
    need_real(y, "y")
    thresholded = _soft(y, step * _weight(y, penalty, y.shape, "penalty", step))
    return thresholded / (1 + step * _weight(y, ridge, y.shape, "ridge", step))


def prox_group_lasso(y: Tensor, penalty: Tensor | float = 1.0, step: float = 1.0) -> Tensor:
    r"""Proximal operator of $h(x) = \lambda \|x\|_2$, each row of the last dimension a group.

    $x = (1 - \eta\lambda / \|y\|)_+\, y$, with Jacobian
    $(1 - \eta\lambda/\|y\|) I + \frac{\eta\lambda}{\|y\|} \hat y \hat y^T$ where
    $\|y\| > \eta\lambda$, and zero elsewhere, the kink included.

    Args:
        y: groups ``[..., n]``, float32 or float64.
        penalty: $\lambda \ge 0$, broadcasts to ``[...]``; differentiable.
        step: $\eta > 0$.

    Returns:
        The proximal points ``[..., n]``.

    Raises:
        ArgumentError: a negative penalty, or a step that is not positive.
        DtypeError: ``y`` is not real, or the penalty has another dtype.
        ShapeError: ``y`` is a scalar or empty, or the penalty does not broadcast.

    Cost: ``O(n)``; exact.

    Source: Parikh and Boyd 2014, section 6.5.4.

    Example:
        >>> import torch
        >>> from woodbury.implicit import prox_group_lasso
        >>> prox_group_lasso(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
    """
    need_real(y, "y")
    weight = (step * _weight(y, penalty, y.shape[:-1], "penalty", step)).unsqueeze(-1)
    norm = torch.linalg.vector_norm(y.detach(), dim=-1, keepdim=True)
    kept = norm > weight.detach()
    stand_in = torch.where(kept, y, 1)
    unit = stand_in / torch.linalg.vector_norm(stand_in, dim=-1, keepdim=True)
    return torch.where(kept, stand_in - weight * unit, 0)


def prox_log(y: Tensor, penalty: Tensor | float = 1.0, step: float = 1.0) -> Tensor:
    r"""Proximal operator of the barrier $h(x) = -\sum_i \lambda_i \log x_i$.

    $x_i = \frac12 (y_i + \sqrt{y_i^2 + 4 \eta\lambda_i})$, with derivative
    $x_i / \sqrt{y_i^2 + 4\eta\lambda_i}$; computed without the cancellation at negative $y_i$.

    Args:
        y: points ``[..., n]``, float32 or float64.
        penalty: $\lambda > 0$, broadcasts to ``[..., n]``; differentiable.
        step: $\eta > 0$.

    Returns:
        The proximal points ``[..., n]``, positive.

    Raises:
        ArgumentError: a penalty or a step that is not positive.
        DtypeError: ``y`` is not real, or the penalty has another dtype.
        ShapeError: ``y`` is a scalar or empty, or the penalty does not broadcast.

    Cost: ``O(n)``; exact to rounding.

    Source: Parikh and Boyd 2014, section 6.1.3.

    Example:
        >>> import torch
        >>> from woodbury.implicit import prox_log
        >>> prox_log(torch.tensor([0.0, 1.5]))
        tensor([1., 2.])
    """
    need_real(y, "y")
    weight = step * _weight(y, penalty, y.shape, "penalty", step)
    refuse(lambda w: w == 0, "step * penalty is {}; the barrier needs it positive", weight)
    sign = torch.where(y.detach() < 0, -1, 1)
    root = torch.hypot(y, 2 * weight.sqrt())
    large = (y * sign + root) / 2  # the root of x^2 - y x = weight with the larger modulus
    return torch.where(sign < 0, weight / large, large)


def prox_ridge(y: Tensor, ridge: Tensor | float = 1.0, step: float = 1.0) -> Tensor:
    r"""Proximal operator of $h(x) = \frac12 \sum_i \gamma_i x_i^2$.

    $x_i = y_i / (1 + \eta\gamma_i)$.

    Args:
        y: points ``[..., n]``, float32 or float64.
        ridge: $\gamma \ge 0$, broadcasts to ``[..., n]``; differentiable.
        step: $\eta > 0$.

    Returns:
        The proximal points ``[..., n]``.

    Raises:
        ArgumentError: a negative penalty, or a step that is not positive.
        DtypeError: ``y`` is not real, or the penalty has another dtype.
        ShapeError: ``y`` is a scalar or empty, or the penalty does not broadcast.

    Cost: ``O(n)``; exact.

    Source: Parikh and Boyd 2014, section 6.1.1.

    Example:
        >>> import torch
        >>> from woodbury.implicit import prox_ridge
        >>> prox_ridge(torch.tensor([2.0, -4.0]), 1.0)
        tensor([ 1., -2.])
    """
    need_real(y, "y")
    return y / (1 + step * _weight(y, ridge, y.shape, "ridge", step))


def prox_nonnegative(y: Tensor, penalty: Tensor | float = 0.0, step: float = 1.0) -> Tensor:
    r"""Proximal operator of $h(x) = \sum_i \lambda_i x_i$ on $x \ge 0$, infinite elsewhere.

    $x_i = (y_i - \eta\lambda_i)_+$: the projection onto the nonnegative vectors for
    $\lambda = 0$, otherwise the nonnegative lasso. At the kink the derivative is 0.

    Args:
        y: points ``[..., n]``, float32 or float64.
        penalty: $\lambda \ge 0$, broadcasts to ``[..., n]``; differentiable.
        step: $\eta > 0$.

    Returns:
        The proximal points ``[..., n]``.

    Raises:
        ArgumentError: a negative penalty, or a step that is not positive.
        DtypeError: ``y`` is not real, or the penalty has another dtype.
        ShapeError: ``y`` is a scalar or empty, or the penalty does not broadcast.

    Cost: ``O(n)``; exact.

    Source: Parikh and Boyd 2014, sections 6.2.4 and 6.5.2.

    Example:
        >>> import torch
        >>> from woodbury.implicit import prox_nonnegative
        >>> prox_nonnegative(torch.tensor([2.0, -4.0]), 0.5)
        tensor([1.5000, 0.0000])
    """
    need_real(y, "y")
    moved = y - step * _weight(y, penalty, y.shape, "penalty", step)
    return torch.where(moved.detach() > 0, moved, 0)


def _weight(y: Tensor, value: Tensor | float, shape: torch.Size, what: str, step: float) -> Tensor:
    if not step > 0:
        raise ArgumentError(f"step is {step}; a step must be positive")
    weight = bound(value, y, shape, what)
    refuse(lambda w: ~(w >= 0), what + " is {}; it must not be negative", weight)
    return weight


def _soft(y: Tensor, shift: Tensor) -> Tensor:
    kept = y.detach().abs() > shift.detach()
    return torch.where(kept, y - y.detach().sign() * shift, 0)
