"""Kernel ridge regression with the whole matrix: one factorisation, and everything it tells."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.errors import NotPositiveDefiniteError
from woodbury.kernels.rbf import RBF, squared_distances

__all__ = ["ExactFit", "Gram"]

# A row of weight 0 takes no part in the fit; the formulas need its square root to divide by.
SMALLEST_WEIGHT = 1e-8


@dataclass(frozen=True, eq=False)
class Gram:
    """A kernel matrix ``[n, n]`` in float64, kept between fits that differ in weights or penalty.

    Attributes:
        points: ``[n, d]``.
        kernel: the kernel function.
        matrix: its values.
    """

    points: Tensor
    kernel: RBF
    matrix: Tensor

    @classmethod
    def of(cls, X: Tensor, kernel: RBF) -> Gram:
        """Evaluate the kernel between all rows."""
        points = X.double()
        return cls(points, kernel, kernel(points, points))


@dataclass(frozen=True, eq=False)
class ExactFit:
    r"""A fitted exact kernel ridge regression; see :class:`KernelRidge` for the formulas.

    With $S = W^{1/2}$, everything is expressed by $B = I + S K S / \lambda$, whose eigenvalues are
    at least 1, so that small weights do no harm: $G^{-1} = S B^{-1} S / \lambda$.
    """

    gram: Gram
    targets: Tensor
    weights: Tensor
    penalty: float
    inverse: Tensor  # B^-1
    scaled: Tensor  # B^-1 S Y

    @classmethod
    def of(cls, gram: Gram, targets: Tensor, weights: Tensor, penalty: float) -> ExactFit:
        """Factorise and solve.

        Raises:
            NotPositiveDefiniteError: the kernel matrix has a large negative eigenvalue.
        """
        weights = weights.double().clamp_min(SMALLEST_WEIGHT)
        roots = weights.sqrt()
        system = gram.matrix * roots
        system *= (roots / penalty)[:, None]
        system.diagonal().add_(1.0)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info):
            raise NotPositiveDefiniteError(
                f"I + S K S / penalty has no Cholesky factor (minor {int(info)}, penalty "
                f"{penalty:.3g}); raise the penalty"
            )
        del system
        inverse = torch.cholesky_inverse(factor)
        scaled = inverse @ (roots[:, None] * targets.double())
        return cls(gram, targets.double(), weights, penalty, inverse, scaled)

    @property
    def roots(self) -> Tensor:
        """$S$, ``[n]``."""
        return self.weights.sqrt()

    @property
    def coefficients(self) -> Tensor:
        r"""$\alpha = G^{-1} Y$, ``[n, C]``."""
        return self.roots[:, None] * self.scaled / self.penalty

    @property
    def leverage(self) -> Tensor:
        """How far each row pulls its own fitted value, ``[n]`` in [0, 1)."""
        return 1 - self.inverse.diagonal()

    @property
    def relative_variance(self) -> Tensor:
        """Variance of ``y_i - f_-i`` in units of the noise variance of a row of weight 1."""
        diagonal = self.inverse.diagonal()
        return 1 + (1 - diagonal) / (diagonal * self.weights)

    def leave_one_out(self) -> Tensor:
        """Predictions of each row without it, ``[n, C]``."""
        return self.targets - self.scaled / (self.roots * self.inverse.diagonal())[:, None]

    def predict(self, X: Tensor) -> Tensor:
        """Predictions at new points ``[b, d]``."""
        return self.gram.kernel(X.double(), self.gram.points) @ self.coefficients

    def residual(self) -> float:
        r"""$\|Y - G \alpha\| / \|Y\|$ of the solve, recomputed."""
        alpha = self.coefficients
        rest = self.targets - self.gram.matrix @ alpha
        rest -= self.penalty * alpha / self.weights[:, None]
        # Rows of tiny weight are weighed as the fit weighs them.
        scale = (self.roots[:, None] * self.targets).norm()
        return ((self.roots[:, None] * rest).norm() / scale.clamp_min(1e-300)).item()

    def weight_hypergradient(self, slope: Tensor) -> Tensor:
        """$dF/dw$ of $F$ with slope $dF/df_{-i}$, ``[n, C]`` to ``[n]``."""
        slope = slope.double()
        diagonal = self.inverse.diagonal()
        pulled = self.inverse @ (slope / (self.roots * diagonal)[:, None])
        cross = (slope * self.scaled).sum(1) / (self.roots * diagonal.square())
        first = (self.scaled * pulled).sum(1)
        return -(first - self.inverse.square() @ cross) / self.weights

    def hyper_gradient(self, slope: Tensor) -> tuple[float, float]:
        """Derivatives of $F$ in the logarithms of the length scale and the penalty."""
        slope = slope.double()
        diagonal = self.inverse.diagonal() * self.weights / self.penalty  # of G^-1
        alpha = self.coefficients
        by_penalty = -(self.weights * self.weight_hypergradient(slope)).sum()
        points, length = self.gram.points, self.gram.kernel.lengthscale
        bend = squared_distances(points, points).mul_(self.gram.matrix).div_(length**2)
        pulled = self._apply_inverse(slope / diagonal[:, None])
        cross = (slope * alpha).sum(1) / diagonal.square()
        rooted = self.inverse * self.roots
        # diag(G^-1 K' G^-1) needs one product of matrices; rows of S B^-1 S.
        turned = ((rooted @ bend) * rooted).sum(1) * self.weights / self.penalty**2
        by_length = (pulled * (bend @ alpha)).sum() - (cross * turned).sum()
        return by_length.item(), by_penalty.item()

    def _apply_inverse(self, V: Tensor) -> Tensor:
        roots = self.roots[:, None]
        return roots * (self.inverse @ (roots * V)) / self.penalty
