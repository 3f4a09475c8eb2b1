"""Ridge regression on explicit features, in passes over blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.errors import BudgetError, NotPositiveDefiniteError
from woodbury.kernels.rbf import RBF

__all__ = ["FeatureFit", "Features", "NystromFeatures"]

Report = Callable[[float], None]

# Diagonal added to the kernel matrix of the landmarks (whose own diagonal is 1): a map that leaves
# the model well defined, small beside any penalty that the tuning may choose.
JITTER = 1e-5
SMALLEST_BLOCK = 64


class Features:
    r"""Features $\Phi$ ``[n, m]`` in blocks of rows, given as a matrix.

    Args:
        matrix: $\Phi$.
        block_bytes: memory of the temporaries of one block.
    """

    def __init__(self, matrix: Tensor, *, block_bytes: int = 64 * 2**20) -> None:
        self.rows, self.width = matrix.shape
        self.dtype, self.device = matrix.dtype, matrix.device
        self._kept: Tensor | None = matrix
        self._block = _rows_per_block(self.width, matrix.element_size(), block_bytes)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows and their features."""
        for start in range(0, self.rows, self._block):
            part = slice(start, min(self.rows, start + self._block))
            yield part, self._evaluate(part)

    def _evaluate(self, part: slice) -> Tensor:
        assert self._kept is not None
        return self._kept[part]

    def at(self, X: Tensor) -> Tensor:
        """Features of other rows ``[b, d]``."""
        return X.to(self.dtype)


class NystromFeatures(Features):
    r"""$\Phi = K_{nm} L^{-T}$ with $K_{mm} + \epsilon I = L L^T$, so that $\Phi \Phi^T \approx K$.

    Args:
        X: points ``[n, d]``; features are in their dtype, the factor $L$ in float64.
        kernel: the kernel function.
        landmarks: indices of the landmark rows, ``[m]``.
        keep_bytes: features are kept between passes if they take no more than this.
        block_bytes: memory of the temporaries of one block.
    """

    def __init__(
        self,
        X: Tensor,
        kernel: RBF,
        landmarks: Tensor,
        *,
        keep_bytes: int,
        block_bytes: int = 64 * 2**20,
    ) -> None:
        self._points, self.kernel, self.landmarks = X, kernel, X[landmarks].contiguous()
        self.rows, self.width = X.shape[0], len(landmarks)
        self.dtype, self.device = X.dtype, X.device
        self._block = _rows_per_block(self.width, X.element_size(), block_bytes)
        own = self.landmarks.double()
        core = kernel(own, own)
        core.diagonal().add_(JITTER)
        eye = torch.eye(self.width, dtype=torch.float64, device=X.device)
        inverse = torch.linalg.solve_triangular(_factor(core), eye, upper=False)
        self.whitener = inverse.mT.contiguous()
        self._map = self.whitener.to(X.dtype)
        self._kept = None
        self.kept = self.rows * self.width * X.element_size() <= keep_bytes
        if self.kept:
            self._kept = torch.empty(self.rows, self.width, dtype=self.dtype, device=self.device)
            for start in range(0, self.rows, self._block):
                self._kept[start : start + self._block] = self.at(X[start : start + self._block])

    def _evaluate(self, part: slice) -> Tensor:
        return self.at(self._points[part]) if self._kept is None else self._kept[part]

    def at(self, X: Tensor) -> Tensor:
        """Features of other points ``[b, d]``."""
        return self.kernel(X.to(self.dtype), self.landmarks) @ self._map


@dataclass(frozen=True, eq=False)
class FeatureFit:
    r"""A fitted ridge regression $\beta = A^{-1} \Phi^T W Y$, $A = \Phi^T W \Phi + \lambda I$.

    Attributes:
        features: $\Phi$.
        targets: $Y$, ``[n, C]``.
        weights: $w$, ``[n]``.
        penalty: $\lambda$.
        coefficients: $\beta$, ``[m, C]``, float64.
        inverse: $A^{-1}$, ``[m, m]``, float64.
        fitted: $\Phi \beta$, ``[n, C]``.
        reach: $\phi_i^T A^{-1} \phi_i$, ``[n]``; times $w_i$ it is the leverage.
        stationarity: $\|\Phi^T W (Y - \Phi\beta) - \lambda\beta\| / \|\Phi^T W Y\|$, measured.
    """

    features: Features
    targets: Tensor
    weights: Tensor
    penalty: float
    coefficients: Tensor
    inverse: Tensor
    fitted: Tensor
    reach: Tensor
    stationarity: float

    @classmethod
    def of(
        cls,
        features: Features,
        targets: Tensor,
        weights: Tensor,
        penalty: float,
        report: Report | None = None,
    ) -> FeatureFit:
        """Two passes: the normal equations, then what they say of every row."""
        targets, weights = targets.double(), weights.double()
        note = _halves(report, features.rows)
        shape = (features.width, features.width)
        gram = torch.zeros(shape, dtype=torch.float64, device=features.device)
        right = gram.new_zeros(features.width, targets.shape[1])
        for part, phi in features.blocks():
            weighted = phi * weights[part, None].to(phi.dtype)
            gram += phi.mT @ weighted
            right += weighted.mT @ targets[part].to(phi.dtype)
            note(0, part)
        gram.diagonal().add_(penalty)
        inverse = torch.cholesky_inverse(_factor(gram))
        coefficients = inverse @ right
        half = torch.linalg.cholesky(inverse).to(features.dtype)
        fitted, reach = torch.empty_like(targets), torch.empty_like(weights)
        rest = -penalty * coefficients
        for part, phi in features.blocks():
            fitted[part] = (phi @ coefficients.to(phi.dtype)).double()
            reach[part] = (phi @ half).square().sum(1).double()
            gap = weights[part, None] * (targets[part] - fitted[part])
            rest += phi.mT @ gap.to(phi.dtype)
            note(1, part)
        stationarity = (rest.norm() / right.norm().clamp_min(1e-300)).item()
        return cls(
            features, targets, weights, penalty, coefficients, inverse, fitted, reach, stationarity
        )

    @property
    def leverage(self) -> Tensor:
        """How far each row pulls its own fitted value, ``[n]`` in [0, 1)."""
        return (self.weights * self.reach).clamp(0, 1 - 1e-9)

    @property
    def relative_variance(self) -> Tensor:
        """Variance of ``y_i - f_-i`` in units of the noise variance of a row of weight 1."""
        return 1 + self.reach / (1 - self.leverage)

    def leave_one_out(self) -> Tensor:
        """Predictions of each row without it, ``[n, C]``."""
        h = self.leverage[:, None]
        return (self.fitted - h * self.targets) / (1 - h)

    def predict(self, X: Tensor) -> Tensor:
        """Predictions at new points ``[b, d]``."""
        return (self.features.at(X) @ self.coefficients.to(self.features.dtype)).double()

    def residual(self) -> float:
        """The measured relative residual of the normal equations."""
        return self.stationarity

    def weight_hypergradient(self, slope: Tensor, report: Report | None = None) -> Tensor:
        """$dF/dw$ of $F$ with slope $dF/df_{-i}$, ``[n, C]`` to ``[n]``, in two passes."""
        note = _halves(report, self.features.rows)
        h = self.leverage
        pushed = slope.double() / (1 - h)[:, None]
        gap = self.targets - self.fitted
        turn = -self.weights * (pushed * gap).sum(1) / (1 - h)
        moved = torch.zeros_like(self.coefficients)
        bend = torch.zeros_like(self.inverse)
        for part, phi in self.features.blocks():
            moved += phi.mT @ pushed[part].to(phi.dtype)
            bend += phi.mT @ (phi * turn[part, None].to(phi.dtype))
            note(0, part)
        direction = (self.inverse @ moved).to(self.features.dtype)
        bend = (self.inverse @ bend @ self.inverse).to(self.features.dtype)
        result = self.reach.square() * turn - self.reach * (gap * pushed).sum(1)
        for part, phi in self.features.blocks():
            result[part] += (gap[part] * (phi @ direction).double()).sum(1)
            result[part] -= ((phi @ bend) * phi).sum(1).double()
            note(1, part)
        return result

    def penalty_gradient(self, slope: Tensor) -> float:
        """Derivative of $F$ in the logarithm of the penalty."""
        slope, h, lam = slope.double(), self.leverage, self.penalty
        step = (-lam * (self.inverse @ self.coefficients)).to(self.features.dtype)
        square = (self.inverse @ self.inverse).to(self.features.dtype)
        total = 0.0
        left_out = self.leave_one_out()
        for part, phi in self.features.blocks():
            moved = (phi @ step).double()
            dh = -lam * self.weights[part] * ((phi @ square) * phi).sum(1).double()
            moved += dh[:, None] * (left_out[part] - self.targets[part])
            total += (slope[part] * moved / (1 - h[part])[:, None]).sum().item()
        return total


def _factor(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise NotPositiveDefiniteError(
            f"a matrix of size {len(matrix)} has no Cholesky factor (minor {int(info)}); raise the "
            "penalty, or use float64 points"
        )
    return factor


def _rows_per_block(width: int, itemsize: int, block_bytes: int) -> int:
    rows = block_bytes // max(1, 3 * width * itemsize)
    if rows < 1:
        raise BudgetError(
            f"block_bytes is {block_bytes}; a row of {width} features needs {3 * width * itemsize}"
        )
    return max(SMALLEST_BLOCK, rows)


def _halves(report: Report | None, rows: int) -> Callable[[int, slice], None]:
    """Progress of two passes as one fraction."""

    def note(half: int, part: slice) -> None:
        if report is not None:
            report((half + part.stop / rows) / 2)

    return note
