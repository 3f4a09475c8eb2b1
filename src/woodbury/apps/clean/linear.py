"""The linear models: multinomial logistic regression, and ridge for quantities."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from woodbury.apps.clean.models import Data, HeldOut, HeldOutScore, Report, principal_components
from woodbury.apps.clean.noise import NoiseModel
from woodbury.apps.clean.softmax import SoftmaxFit, SoftmaxProblem
from woodbury.influence.glm import ClasswiseCurvature, classwise_bend, left_out_logits, push_slopes
from woodbury.kernels.features import FeatureFit, Features

__all__ = ["Logistic", "Ridge"]

# Up to this many parameters the curvature between classes is kept.
COUPLED_PARAMETERS = 1024
# Tables of no more columns than this are never condensed.
FEW_COLUMNS = 64
# Numbers in the class-wise blocks, and columns of the design, at most.
BLOCK_NUMBERS = 2e7
MOST_COLUMNS = 2000
# The intercept is penalised a hundredth as much as the rest: enough to make the Hessian
# invertible, which shifts of all logits would not, and too little to matter.
INTERCEPT = 1e-2
LOGISTIC_RANGE = (1e-2, 1e2)
RIDGE_RANGE = (1e-6, 1e4)
TUNING_EVALUATIONS = 8
SMALLEST_WEIGHT = 1e-6


def minimize_log_penalty(
    objective: Callable[[float], tuple[float, float]],
    start: float,
    bounds: tuple[float, float],
    progress: Report,
) -> tuple[float, float]:
    """The best penalty tried by L-BFGS-B on its logarithm within bounds, and its score."""
    tried: list[tuple[float, float]] = []

    def wrapped(place: np.ndarray) -> tuple[float, np.ndarray]:
        penalty = math.exp(place[0])
        value, slope = objective(penalty)
        tried.append((value, penalty))
        progress(min(1.0, len(tried) / TUNING_EVALUATIONS))
        # A unit of score is much for a unit of the logarithm: the first step is about one.
        return 20 * value, np.array([20 * slope])

    low, high = (math.log(bound) for bound in bounds)
    minimize(
        wrapped,
        [min(max(math.log(start), low), high)],
        jac=True,
        method="L-BFGS-B",
        bounds=[(low, high)],
        options={"maxfun": TUNING_EVALUATIONS, "ftol": 5e-4, "gtol": 6e-2},
    )
    value, penalty = min(tried)
    return penalty, value


class Logistic:
    """Multinomial logistic regression on the columns, or on leading principal components."""

    name = "linear"
    retunes = True

    def __init__(self, data: Data, penalty: float = 0.3) -> None:
        self.data, self.penalty = data, penalty
        d, C = data.X.shape[1], data.classes
        design = data.X
        if d > FEW_COLUMNS and (d + 1) * C > COUPLED_PARAMETERS:
            most = int(min(MOST_COLUMNS, max(8.0, (BLOCK_NUMBERS / C) ** 0.5)))
            design = principal_components(data.X, most=most)
        self.columns = design.shape[1]
        small = design.numel() <= 5_000_000
        self.design = torch.cat([design, torch.ones(len(design), 1)], 1)
        self.design = self.design.double() if small else self.design
        self.coupled = (self.columns + 1) * C <= COUPLED_PARAMETERS and (
            len(design) * C * C * 4 <= data.budget_bytes // 4
        )

    def settings(self) -> dict[str, float]:
        """The penalty."""
        return {"penalty": self.penalty}

    def restore(self, settings: dict[str, float]) -> None:
        """Take a stored penalty."""
        self.penalty = settings["penalty"]

    def _problem(self, rows: Tensor | None, weights: Tensor, penalty: float) -> SoftmaxProblem:
        data = self.data
        pi = torch.full((self.columns + 1,), penalty, dtype=torch.float64)
        pi[-1] *= INTERCEPT
        X, labels = self.design, data.observed
        if rows is not None:
            X, labels = X[rows], labels[rows]
        w = weights.clamp_min(SMALLEST_WEIGHT)
        return SoftmaxProblem(X, labels, data.classes, w, pi, self.coupled)

    def tune(
        self, rows: Tensor, weights: Tensor, noise: NoiseModel, progress: Report
    ) -> tuple[float, NoiseModel]:
        """Minimise the class-wise held-out score over the penalty, then score the best exactly."""
        score = HeldOutScore(self.data.take(rows), noise)
        last: SoftmaxFit | None = None

        def refit(penalty: float) -> SoftmaxFit:
            nonlocal last
            problem = self._problem(rows, weights[rows], penalty)
            last = problem.fit(last.theta, last.nearby) if last else problem.fit()
            return last

        def objective(penalty: float) -> tuple[float, float]:
            return classwise_score(refit(penalty), score)

        self.penalty, _ = minimize_log_penalty(objective, self.penalty, LOGISTIC_RANGE, progress)
        fit = refit(self.penalty)
        value, _ = score(LogisticHeldOut(fit).outputs)
        return value, score.noise

    def fit(self, weights: Tensor, progress: Report) -> HeldOut:
        """Fit all rows; from nothing, so that a resumed run ends where an undisturbed one does."""
        fit = self._problem(None, weights, self.penalty).fit()
        progress(0.5)
        held = LogisticHeldOut(fit, self.data.X.shape[1])
        progress(1.0)
        return held


def classwise_score(fit: SoftmaxFit, score: HeldOutScore) -> tuple[float, float]:
    r"""The score of held-out logits by class-wise leverage, and its derivative in $\log\lambda$.

    The implicit function theorem moves the parameters,
    $d\theta = -H^{-1} \Pi \theta\, d\log\lambda$; with them the probabilities, the curvature
    blocks $B_c$ and the leverages, $d\ell_{ic} = -x_i^T B_c^{-1} dB_c B_c^{-1} x_i$.
    """
    problem, P, r = fit.problem, fit.P, fit.residual
    X, w = problem.X, problem.weights[:, None]
    x = X.float()
    blocks = ClasswiseCurvature.of(x, P, problem.weights, problem.penalty)
    lever, bend = blocks.leverage(x).double(), classwise_bend(P)
    rest = 1 - w * lever * bend
    value, slopes = score(fit.logits + w * lever * r / rest)

    right = problem.penalty[:, None] * fit.theta
    step = -fit.hessian_solve(right, fit.nearby, rtol=1e-3).value.view_as(right)
    dz = problem.logits(step)
    dp = P * (dz - (P * dz).sum(1, keepdim=True))
    C = P.shape[1]
    dbend = dp * (1 - 2 * P) * (C / max(1, C - 1))
    dlever = torch.empty_like(lever)
    for c in range(C):
        inverse = torch.cholesky_inverse(blocks.factors[c])
        dblock = (x.mT @ (x * (w[:, 0] * dbend[:, c]).float()[:, None])).double()
        dblock.diagonal().add_(problem.penalty)
        turned = (inverse @ dblock @ inverse).float()
        dlever[:, c] = -((x @ turned) * x).sum(1)
    change = w * (dlever * r + lever * dp) / rest
    change += w * lever * r * w * (dlever * bend + lever * dbend) / rest.square()
    return value, (slopes * (dz + change)).sum().item()


class LogisticHeldOut:
    """Held-out logits by block leverage."""

    variance = None

    def __init__(self, fit: SoftmaxFit, columns: int | None = None) -> None:
        self._fit, self._columns = fit, columns

    @cached_property
    def _leverage(self) -> Tensor:
        return self._fit.curvature.leverage(self._fit.problem.X.float())

    @cached_property
    def outputs(self) -> Tensor:
        """Held-out logits ``[n, C]``."""
        fit = self._fit
        return left_out_logits(fit.logits, fit.P, fit.residual, fit.problem.weights, self._leverage)

    def weight_hypergradient(self, slopes: Tensor) -> Tensor:
        r"""$dF/dw_j = -r_j^T v^T x_j + E_j^T (z_{-j} - z_j) / w_j$ with $v = H^{-1} X^T E'$.

        One solve serves all rows; $E'$ are the slopes pushed through the leaving-out, and the
        second term takes off what the sum counts of a row on its own held-out prediction.
        """
        fit = self._fit
        problem = fit.problem
        pushed = push_slopes(slopes, fit.P, problem.weights, self._leverage)
        right = problem.adjoint(pushed)
        solution = fit.hessian_solve(right)
        moved = problem.logits(solution.value.view_as(right))
        own = (slopes * (self.outputs - fit.logits)).sum(1) / problem.weights
        return own - (fit.residual * moved).sum(1)

    def certificate(self) -> dict[str, Any]:
        """Block leverage: size, penalty, effective dimension, residual of the solve."""
        fit, problem = self._fit, self._fit.problem
        L, p = self._leverage, fit.P
        if L.dim() == 3:
            q = p.to(L.dtype)
            taken = (L.diagonal(dim1=1, dim2=2) * q).sum(1) - (
                (L @ q[:, :, None])[:, :, 0] * q
            ).sum(1)
        else:
            taken = (L * classwise_bend(p)).sum(1)
        n, d, C = len(p), problem.X.shape[1], problem.classes
        # The solve that says how the parameters follow the penalty; that of weights is alike.
        solution = fit.hessian_solve(problem.penalty[:, None] * fit.theta)
        return {
            "method": "block leverage" if problem.coupled else "class-wise leverage",
            "size": d * C,
            "columns": self._columns,
            "components": d - 1,
            "penalty": problem.penalty[0].item(),
            "effective_dimension": (problem.weights * taken).sum().item(),
            "suboptimality_per_row": fit.suboptimality / n,
            "relative_residual": float(torch.as_tensor(solution.residual).max()),
            "solve_status": solution.status.name,
            "solve_products": solution.products,
        }


class Ridge:
    """Ridge regression, with a column of ones."""

    name = "linear"
    retunes = True

    def __init__(self, data: Data, penalty: float = 0.01) -> None:
        self.data, self.penalty = data, penalty
        X = data.X
        if X.shape[1] > MOST_COLUMNS:
            X = principal_components(X, most=MOST_COLUMNS, share=1.0)
        self.design = torch.cat([X, torch.full((len(X), 1), 1 / INTERCEPT**0.5)], 1)
        if self.design.numel() * 8 <= data.budget_bytes // 4:
            self.design = self.design.double()

    def settings(self) -> dict[str, float]:
        """The penalty."""
        return {"penalty": self.penalty}

    def restore(self, settings: dict[str, float]) -> None:
        """Take a stored penalty."""
        self.penalty = settings["penalty"]

    def _fit(self, rows: Tensor | None, weights: Tensor, penalty: float) -> FeatureFit:
        X, y = self.design, self.data.targets()
        if rows is not None:
            X, y = X[rows], y[rows]
        return FeatureFit.of(Features(X), y, weights, penalty)

    def tune(
        self, rows: Tensor, weights: Tensor, noise: NoiseModel, progress: Report
    ) -> tuple[float, NoiseModel]:
        """Minimise the held-out score over the penalty."""
        score = HeldOutScore(self.data.take(rows), noise)

        def objective(penalty: float) -> tuple[float, float]:
            fit = self._fit(rows, weights[rows], penalty)
            value, slopes = score(fit.leave_one_out())
            return value, fit.penalty_gradient(slopes)

        self.penalty, value = minimize_log_penalty(objective, self.penalty, RIDGE_RANGE, progress)
        return value, score.noise

    def fit(self, weights: Tensor, progress: Report) -> HeldOut:
        """Fit all rows."""
        fit = self._fit(None, weights, self.penalty)
        progress(1.0)
        return RidgeHeldOut(fit)


class RidgeHeldOut:
    """Held-out predictions of a ridge regression on explicit features."""

    def __init__(self, fit: FeatureFit) -> None:
        self._fit = fit
        self.outputs, self.variance = fit.leave_one_out(), fit.relative_variance

    def weight_hypergradient(self, slopes: Tensor) -> Tensor:
        """Closed form."""
        return self._fit.weight_hypergradient(slopes)

    def certificate(self) -> dict[str, Any]:
        """Leverage: size, penalty, effective dimension, measured residual."""
        return {
            "method": "leverage",
            "size": self._fit.features.width,
            "penalty": self._fit.penalty,
            "effective_dimension": self._fit.leverage.sum().item(),
            "relative_residual": self._fit.residual(),
        }
