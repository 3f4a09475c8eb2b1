"""Projection onto the positive semidefinite matrices, with derivatives of first and second order.

Differentiating an eigendecomposition fails where eigenvalues meet; the derivatives of the
projection do not. Both are written down here by divided differences without a cancellation.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from woodbury.errors import GradientError, ShapeError
from woodbury.implicit.projections.common import need_real

__all__ = ["project_semidefinite"]


def project_semidefinite(Y: Tensor) -> Tensor:
    r"""Projection onto the symmetric positive semidefinite matrices in the Frobenius norm.

    With the eigendecomposition $\frac12 (Y + Y^T) = U \Lambda U^T$ it is $U \Lambda_+ U^T$, with
    derivative $H \mapsto U (B \odot U^T H U) U^T$, where $B_{ij}$ is 1 for two positive
    eigenvalues, 0 for none, and $\lambda_i / (\lambda_i - \lambda_j)$ for
    $\lambda_i > 0 \ge \lambda_j$: no gap between eigenvalues of one sign appears. A zero
    eigenvalue counts as negative, which gives an element of the generalised Jacobian.

    Args:
        Y: matrices ``[..., n, n]``, float32 or float64; the symmetric part is projected.

    Returns:
        The projections ``[..., n, n]``, exactly symmetric.

    Raises:
        DtypeError: ``Y`` is not real.
        ShapeError: ``Y`` is not square.
        GradientError: a third derivative is asked for.

    Cost: an eigendecomposition, ``O(n^3)``, exact to rounding; derivatives a few products of
    matrices each.

    Source: Higham 1988; Malick and Sendov 2006, theorem 2.7 (derivative).

    Example:
        >>> import torch
        >>> from woodbury.implicit import project_semidefinite
        >>> project_semidefinite(torch.tensor([[3.0, 0.0], [0.0, -2.0]]))
        tensor([[3., 0.],
                [0., 0.]])
    """
    need_real(Y, "Y", 2)
    if Y.shape[-1] != Y.shape[-2]:
        raise ShapeError(f"Y has shape {tuple(Y.shape)}; it must be square, [..., n, n]")
    return _symmetric(_Positive.apply(_symmetric(Y))[0])


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.mT) / 2


def _mixed(values: Tensor) -> Tensor:
    """``1 / (|lambda_i| + |lambda_j|)`` for eigenvalues of different sign, else 0."""
    positive, size = values > 0, values.abs()
    apart = positive.unsqueeze(-1) != positive.unsqueeze(-2)
    total = size.unsqueeze(-1) + size.unsqueeze(-2)
    return torch.where(apart, 1 / torch.where(apart, total, 1), 0)


def _first(values: Tensor, U: Tensor, H: Tensor) -> Tensor:
    """The derivative at ``U diag(values) U^T`` in the direction ``H``."""
    up = values.clamp_min(0)
    both = (values > 0).unsqueeze(-1) & (values > 0).unsqueeze(-2)
    weights = torch.where(both, 1, (up.unsqueeze(-1) + up.unsqueeze(-2)) * _mixed(values))
    return U @ (weights * (U.mT @ H @ U)) @ U.mT


def _second(values: Tensor, U: Tensor, H: Tensor, K: Tensor) -> Tensor:
    """The second derivative in the directions ``H`` and ``K``.

    The divided difference of second order is ``|lambda_a| W_ab W_ac`` where ``a`` is the index
    whose sign differs from the other two (``W`` of :func:`_mixed`), and zero where there is none.
    """
    W, size = _mixed(values), values.abs()
    H, K = U.mT @ H @ U, U.mT @ K @ U
    WH, WK = W * H, W * K
    row = size.unsqueeze(-1) * W
    half = row * (WH @ K + WK @ H) + WH @ (size.unsqueeze(-1) * WK)
    return U @ (half + half.mT) @ U.mT


class _Positive(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, U = torch.linalg.eigh(X)
        return (U * values.clamp_min(0).unsqueeze(-2)) @ U.mT, values, U

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        _, values, U = output
        ctx.mark_non_differentiable(values, U)
        ctx.save_for_backward(inputs[0], values, U)
        ctx.save_for_forward(inputs[0], values, U)

    @staticmethod
    def backward(ctx: Any, G: Tensor, *_: Tensor) -> Tensor:
        return _Derivative.apply(*ctx.saved_tensors, _symmetric(G))

    @staticmethod
    def jvp(ctx: Any, H: Tensor) -> tuple[Tensor, None, None]:
        return _Derivative.apply(*ctx.saved_tensors, H), None, None


class _Derivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(X: Tensor, values: Tensor, U: Tensor, H: Tensor) -> Tensor:
        return _first(values, U, H)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None, Tensor]:
        X, values, U, H = ctx.saved_tensors
        G = _symmetric(G)
        return _Curvature.apply(X, values, U, H, G), None, None, _Derivative.apply(X, values, U, G)

    @staticmethod
    def jvp(ctx: Any, K: Tensor | None, _v: Any, _u: Any, dH: Tensor | None) -> Tensor:
        X, values, U, H = ctx.saved_tensors
        parts = []
        if K is not None:
            parts.append(_Curvature.apply(X, values, U, H, K))
        if dH is not None:
            parts.append(_Derivative.apply(X, values, U, dH))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class _Curvature(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(X: Tensor, values: Tensor, U: Tensor, H: Tensor, K: Tensor) -> Tensor:
        return _second(values, U, _symmetric(H), _symmetric(K))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> NoReturn:
        raise _third()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise _third()


def _third() -> GradientError:
    return GradientError(
        "a third derivative of project_semidefinite is not there; detach what needs no derivative, "
        "or take differences of the second"
    )
