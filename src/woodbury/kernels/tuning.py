"""Penalty and length scale by the gradient of a leave-one-out score."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from woodbury.errors import BudgetError, NonFiniteError
from woodbury.kernels.exact import ExactFit, Gram
from woodbury.kernels.rbf import RBF
from woodbury.kernels.ridge import EXACT_MATRICES, KernelRidge, KernelRidgeState

__all__ = ["Score", "Tuned", "squared_error", "tune"]

#: From held-out predictions ``[n, C]`` to a mean score (less is better) and its slope ``[n, C]``.
Score = Callable[[Tensor], tuple[float, Tensor]]

# How far tuning may move from its start: factors of the length scale and of the penalty.
LENGTH_RANGE = 12.0
PENALTY_RANGE = 1e4


def squared_error(Y: Tensor) -> Score:
    """The mean squared error of held-out predictions, as a score.

    Args:
        Y: targets ``[n, C]``.

    Returns:
        A function for :func:`tune`.

    Example:
        >>> import torch
        >>> from woodbury.kernels import squared_error
        >>> squared_error(torch.zeros(2, 1))(torch.ones(2, 1))[0]
        1.0
    """
    targets = Y.double()

    def score(predictions: Tensor) -> tuple[float, Tensor]:
        gap = predictions - targets
        return gap.square().mean().item(), 2 * gap / gap.numel()

    return score


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` found.

    Attributes:
        ridge: the settings with the best score.
        score: that score.
        evaluations: how many settings were tried.
        gradient: derivatives of the score in the logarithms of length scale and penalty there.

    Example:
        >>> import torch
        >>> from woodbury.kernels import RBF, KernelRidge, tune
        >>> x = torch.linspace(0, 6, 40).double()[:, None]
        >>> tuned = tune(KernelRidge(RBF(0.1), penalty=0.1), x, torch.sin(x))
        >>> tuned.ridge.kernel.lengthscale > 0.1, tuned.evaluations <= 16
        (True, True)
    """

    ridge: KernelRidge
    score: float
    evaluations: int
    gradient: tuple[float, float]


def tune(
    ridge: KernelRidge,
    X: Tensor,
    Y: Tensor,
    weights: Tensor | None = None,
    *,
    score: Score | None = None,
    max_evaluations: int = 16,
    gtol: float = 1e-3,
    progress: Callable[[float], None] | None = None,
) -> Tuned:
    r"""Minimise a score of the leave-one-out predictions over length scale and penalty.

    The gradient is closed form: for $\dot K = dK / d\log\ell$ and $V = G^{-1} (E / d)$, where $E$
    is the slope of the score and $d = \mathrm{diag}(G^{-1})$,
    $\dot F = \langle V, \dot K \alpha \rangle - \sum_i u_i [G^{-1} \dot K G^{-1}]_{ii}$ with
    $u_i = \langle E_i, \alpha_i \rangle / d_i^2$, and likewise for $\lambda$. L-BFGS-B on both
    logarithms, within factors of 12 and 10,000 of the start.

    Args:
        ridge: where to start; its ``landmarks`` are kept for later fits but tuning is exact, so
            give a subset of a large table.
        X: points ``[n, d]``.
        Y: targets ``[n, C]``.
        weights: ``[n]``, of the fit; the score sees all rows alike.
        score: held-out predictions to value and slope; mean squared error if not given.
        max_evaluations: most fits.
        gtol: stop where both derivatives are below this.
        progress: called with the fraction done.

    Returns:
        :class:`Tuned`.

    Raises:
        BudgetError: the exact fit of these rows exceeds ``ridge.budget_bytes``.
        NonFiniteError: the score or its slope is NaN or infinite.

    Cost: $4 n^3$ multiplications in float64 an evaluation.

    Source: Sundararajan and Keerthi, "Predictive approaches for choosing hyperparameters in
    Gaussian processes" (2001), for gradients of leave-one-out scores; this form is derived here.

    Example:
        >>> import torch
        >>> from woodbury.kernels import RBF, KernelRidge, squared_error, tune
        >>> x = torch.linspace(0, 6, 40).double()[:, None]
        >>> start = KernelRidge(RBF(0.1), penalty=0.1)
        >>> before = squared_error(torch.sin(x))(start.fit(x, torch.sin(x)).leave_one_out())[0]
        >>> tune(start, x, torch.sin(x)).score < 0.01 * before
        True
    """
    need = (EXACT_MATRICES + 2) * len(X) ** 2 * 8
    if need > ridge.budget_bytes:
        raise BudgetError(
            f"tuning on {len(X)} rows takes {need / 2**20:.0f} MiB and the budget is "
            f"{ridge.budget_bytes / 2**20:.0f} MiB; give fewer rows"
        )
    score = squared_error(Y) if score is None else score
    exact = replace(ridge, landmarks=None)
    tried: list[tuple[float, np.ndarray, np.ndarray]] = []

    def objective(place: np.ndarray) -> tuple[float, np.ndarray]:
        length, penalty = math.exp(place[0]), math.exp(place[1])
        at = replace(exact, kernel=RBF(length), penalty=penalty)
        gram = Gram.of(X, at.kernel)
        fit = at.fit(X, Y, weights, state=KernelRidgeState(gram, None)).fit
        assert isinstance(fit, ExactFit)
        value, slope = score(fit.leave_one_out())
        if not (math.isfinite(value) and bool(torch.isfinite(slope).all())):
            raise NonFiniteError(
                f"the score is {value} at length scale {length:.3g} and penalty {penalty:.3g}"
            )
        gradient = np.array(fit.hyper_gradient(slope))
        tried.append((value, place.copy(), gradient))
        if progress is not None:
            progress(min(1.0, len(tried) / max_evaluations))
        return value, gradient

    start = np.log([ridge.kernel.lengthscale, ridge.penalty])
    reach = np.log([LENGTH_RANGE, PENALTY_RANGE])
    minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(start - reach, start + reach, strict=True)),
        options={"maxfun": max_evaluations, "gtol": gtol, "ftol": 1e-5},
    )
    value, place, gradient = min(tried, key=lambda item: item[0])
    best = replace(ridge, kernel=RBF(math.exp(place[0])), penalty=math.exp(place[1]))
    return Tuned(best, value, len(tried), (gradient[0].item(), gradient[1].item()))
