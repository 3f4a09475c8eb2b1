r"""Curvature and leave-one-out of a weighted multinomial logistic model, as pure functions.

The objective is the sum $\sum_i w_i \ell_i(\theta) + \frac12 \sum_{jc} \pi_j \theta_{jc}^2$ with
$\ell_i$ the cross-entropy of $z_i = \theta^T x_i$, $p_i = \mathrm{softmax}(z_i)$ and
$S_i = \mathrm{diag}(p_i) - p_i p_i^T$. Its Hessian is $H = \sum_i w_i S_i \otimes x_i x_i^T + \Pi$.
The *leverage* of a row is the block $L_i = (I_C \otimes x_i)^T H^{-1} (I_C \otimes x_i)$, and by
the Woodbury identity one Newton step on the objective without row $i$ predicts

$$ z_{-i} = z_i + (I - w_i L_i S_i)^{-1} w_i L_i r_i, \qquad r_i = p_i - y_i. $$

:class:`CoupledCurvature` keeps all of $H$. :class:`ClasswiseCurvature` keeps its diagonal blocks
only, one for each class, for many classes: $C d^2$ numbers instead of $C^2 d^2$.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.errors import NotPositiveDefiniteError

__all__ = [
    "ClasswiseCurvature",
    "CoupledCurvature",
    "classwise_bend",
    "left_out_logits",
    "push_slopes",
    "without_row",
]

_BLOCK_BYTES = 64 * 2**20
_SOLVE_ROWS = 50_000


@dataclass(frozen=True, eq=False)
class CoupledCurvature:
    """The whole Hessian, factorised in float64.

    Attributes:
        matrix: $H$ in the order (class, feature), ``[C d, C d]``.
        factor: its Cholesky factor.
        classes: $C$.
    """

    matrix: Tensor
    factor: Tensor
    classes: int

    @classmethod
    def of(cls, X: Tensor, P: Tensor, weights: Tensor, penalty: Tensor) -> CoupledCurvature:
        r"""Form and factorise $H$.

        Args:
            X: rows ``[n, d]``; products are taken in their dtype and summed in float64.
            P: probabilities ``[n, C]``.
            weights: $w$, ``[n]``.
            penalty: $\pi$, ``[d]``.

        Cost: $2 n C^2 d^2$ multiplications, in blocks of rows.

        Raises:
            NotPositiveDefiniteError: the penalty is too small to make the Hessian invertible.
        """
        (_, d), C = X.shape, P.shape[1]
        matrix = torch.zeros(C * d, C * d, dtype=torch.float64, device=X.device)
        size = torch.zeros(C * d, dtype=torch.float64, device=X.device)
        for part in _blocks(X, C * d):
            x = X[part] * weights[part, None].sqrt().to(X.dtype)
            spread = (P[part].to(X.dtype)[:, :, None] * x[:, None, :]).reshape(len(x), C * d)
            matrix -= spread.mT @ spread
            own = (spread.mT @ x).double().view(C, d, d)
            for c in range(C):
                matrix[c * d : (c + 1) * d, c * d : (c + 1) * d] += own[c]
            size += own.diagonal(dim1=1, dim2=2).flatten()
        matrix.diagonal().add_(penalty.double().repeat(C))
        return cls(matrix, _factor(matrix, torch.finfo(X.dtype).eps * size.amax()), C)

    def solve(self, G: Tensor) -> Tensor:
        """$H^{-1}$ times a block of parameters ``[d, C]``."""
        flat = G.double().mT.reshape(-1, 1)
        return torch.cholesky_solve(flat, self.factor).view(self.classes, -1).mT

    def leverage(self, X: Tensor) -> Tensor:
        """$L_i$ of rows ``[n, d]``: ``[n, C, C]`` in their dtype."""
        (n, d), C = X.shape, self.classes
        inverse = torch.cholesky_inverse(self.factor).view(C, d, C, d)
        first, second = torch.triu_indices(C, C)
        pairs = inverse[first, :, second, :].to(X.dtype)  # [pairs, d, d]
        stacked = pairs.permute(1, 0, 2).reshape(d, -1)
        result = X.new_empty(n, C, C)
        for part in _blocks(X, stacked.shape[1]):
            turned = (X[part] @ stacked).view(-1, len(first), d)
            values = (turned @ X[part, :, None]).squeeze(2)
            result[part, first, second] = values
            result[part, second, first] = values
        return result


@dataclass(frozen=True, eq=False)
class ClasswiseCurvature:
    r"""The diagonal blocks $\gamma\sum_i w_i p_{ic} (1 - p_{ic}) x_i x_i^T + \Pi$, one per class.

    $\gamma = C / (C - 1)$ makes up for the coupling that is left out, exactly for two classes.

    Attributes:
        matrices: ``[C, d, d]``, float64.
        factors: their Cholesky factors.
    """

    matrices: Tensor
    factors: Tensor

    @classmethod
    def of(cls, X: Tensor, P: Tensor, weights: Tensor, penalty: Tensor) -> ClasswiseCurvature:
        """Form and factorise the blocks; arguments as for :meth:`CoupledCurvature.of`.

        Cost: $2 n C d^2$ multiplications.
        """
        d, C = X.shape[1], P.shape[1]
        matrices = torch.zeros(C, d, d, dtype=torch.float64, device=X.device)
        for part in _blocks(X, 2 * d):
            x = X[part]
            scale = (weights[part, None] * classwise_bend(P[part])).to(X.dtype)
            for c in range(C):
                matrices[c] += x.mT @ (x * scale[:, c, None])
        rounding = torch.finfo(X.dtype).eps * matrices.diagonal(dim1=1, dim2=2).amax()
        matrices.diagonal(dim1=1, dim2=2).add_(penalty.double())
        return cls(matrices, _factor(matrices, rounding))

    def solve(self, G: Tensor) -> Tensor:
        """The inverse of the blocks times a block of parameters ``[d, C]``."""
        return torch.cholesky_solve(G.double().mT[:, :, None], self.factors).squeeze(2).mT

    def leverage(self, X: Tensor) -> Tensor:
        """The diagonals of $L_i$ of rows ``[n, d]``: ``[n, C]`` in their dtype."""
        result = X.new_empty(X.shape[0], len(self.factors))
        for c, factor in enumerate(self.factors):
            inverse = torch.cholesky_inverse(factor).to(X.dtype)
            for part in _blocks(X, 2 * X.shape[1]):
                result[part, c] = ((X[part] @ inverse) * X[part]).sum(1)
        return result


def classwise_bend(P: Tensor) -> Tensor:
    r"""$\gamma\,p (1 - p)$ with $\gamma = C / (C - 1)$: the diagonal that stands for $S_i$."""
    return P * (1 - P) * (P.shape[1] / max(1, P.shape[1] - 1))


def without_row(
    coupled: Tensor, right: Tensor, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    r"""$(I - K_i)^{-1} b_i$ of every row: what leaving it out of the fit does to its outputs.

    With the block leverage $L_i$ (times the row's weight), the Hessian $S_i$ of its loss in the
    outputs and its gradient $r_i$ there, $K_i = L_i S_i$ and $b_i = L_i r_i$ give the change of
    the outputs by one Newton step without the row, by the Woodbury identity.

    Args:
        coupled: $K$, ``[n, C, C]``.
        right: $b$, ``[n, C]``.
        transposed: solve with $(I - K_i)^T$.

    Returns:
        The solutions ``[n, C]``, and ``[n]`` integers that are not 0 where the system is singular.

    Example:
        >>> import torch
        >>> from woodbury.influence.glm import without_row
        >>> without_row(torch.tensor([[[0.75]]]), torch.tensor([[1.0]]))[0]
        tensor([[4.]])
    """
    eye = torch.eye(coupled.shape[1], dtype=coupled.dtype, device=coupled.device)
    system = eye - (coupled.mT if transposed else coupled)
    moved, info = torch.linalg.solve_ex(system, right)
    return moved, info


def left_out_logits(
    logits: Tensor, P: Tensor, residual: Tensor, weights: Tensor, leverage: Tensor
) -> Tensor:
    r"""$z_{-i} = z_i + (I - w_i L_i S_i)^{-1} w_i L_i r_i$.

    Args:
        logits: $z$, ``[n, C]``.
        P: their softmax.
        residual: $r = p - y$, ``[n, C]``.
        weights: $w$, ``[n]``.
        leverage: ``[n, C, C]``, or ``[n, C]`` for its diagonal; then
            :func:`classwise_bend` stands for $S_i$.

    Returns:
        ``[n, C]``, float64.

    Example:
        >>> import torch
        >>> from woodbury.influence.glm import left_out_logits
        >>> z, p = torch.zeros(1, 2), torch.full((1, 2), 0.5)
        >>> left_out_logits(z, p, p - torch.tensor([[1.0, 0.0]]), torch.ones(1), torch.ones(1, 2))
        tensor([[-1.,  1.]], dtype=torch.float64)
    """
    result = logits.double().clone()
    for part in torch.arange(len(logits)).split(_SOLVE_ROWS):
        w, L = weights[part].double(), leverage[part].double()
        r, p = residual[part].double(), P[part].double()
        if L.dim() == 2:
            result[part] += w[:, None] * L * r / (1 - w[:, None] * L * classwise_bend(p))
        else:
            step = w[:, None] * (L @ r[:, :, None]).squeeze(2)
            result[part] += _regular(part, *without_row(_coupled(L, p, w), step))
    return result


def push_slopes(slopes: Tensor, P: Tensor, weights: Tensor, leverage: Tensor) -> Tensor:
    r"""$(I - w_i L_i S_i)^{-T} E_i$: slopes in $z_{-i}$ as slopes in the shared parameters.

    A change of the parameters by $\delta$ through another row's weight moves $z_{-i}$ by
    $(I - w_i L_i S_i)^{-1} \delta^T x_i$, with the curvature held fixed.

    Args:
        slopes: $E$, ``[n, C]``.
        P: probabilities ``[n, C]``.
        weights: ``[n]``.
        leverage: ``[n, C, C]`` or ``[n, C]``.
    """
    result = torch.empty_like(slopes, dtype=torch.float64)
    for part in torch.arange(len(slopes)).split(_SOLVE_ROWS):
        w, L = weights[part].double(), leverage[part].double()
        E, p = slopes[part].double(), P[part].double()
        if L.dim() == 2:
            result[part] = E / (1 - w[:, None] * L * classwise_bend(p))
        else:
            result[part] = _regular(part, *without_row(_coupled(L, p, w), E, transposed=True))
    return result


def _coupled(L: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """$w L S$ of every row."""
    bent = L * p[:, None, :] - (L @ p[:, :, None]) * p[:, None, :]
    return w[:, None, None] * bent


def _regular(rows: Tensor, solved: Tensor, info: Tensor) -> Tensor:
    if bool((info != 0).any()):
        raise NotPositiveDefiniteError(
            f"without row {int(rows[info.cpu() != 0][0])} the Hessian of the logistic model is "
            "singular; raise the penalty"
        )
    return solved


def _factor(matrix: Tensor, rounding: Tensor) -> Tensor:
    """Cholesky factor; where rounding of the products has made it indefinite, that is added."""
    for _ in range(4):
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not bool((info != 0).any()):
            return factor
        matrix.diagonal(dim1=-2, dim2=-1).add_(rounding)
        rounding = 10 * rounding
    raise NotPositiveDefiniteError(
        "the Hessian of the logistic model is singular to working precision; raise the penalty"
    )


def _blocks(X: Tensor, width: int) -> Iterator[slice]:
    rows = max(64, _BLOCK_BYTES // max(1, 3 * width * X.element_size()))
    for start in range(0, X.shape[0], rows):
        yield slice(start, min(X.shape[0], start + rows))
