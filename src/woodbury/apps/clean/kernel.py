"""The kernel model: kernel ridge regression on one-hot labels, or on the quantity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from woodbury.apps.clean.models import Data, HeldOut, HeldOutScore, Report
from woodbury.apps.clean.noise import NoiseModel
from woodbury.kernels import RBF, KernelRidge, KernelRidgeFit, median_lengthscale, tune
from woodbury.kernels.ridge import EXACT_MATRICES

__all__ = ["KernelModel"]

EXACT_ROWS = 5000
# Landmarks m are such that n m^2 is about this: passes of equal length, whatever the table.
PASS_WORK = 2.5e11
MOST_LANDMARKS, LEAST_LANDMARKS = 3000, 200
TUNING_ROWS = 1500
TUNING_EVALUATIONS = 12
# Of the median distance, where tuning begins.
FIRST_LENGTH = 0.45


class KernelModel:
    """Kernel ridge regression, exact up to a few thousand rows and by Nystrom beyond."""

    name = "kernel"
    retunes = False

    def __init__(self, data: Data) -> None:
        self.data = data
        n = len(data.X)
        self.landmarks = None if exact_fits(n, data.budget_bytes) else landmarks(n, data)
        generator = torch.Generator().manual_seed(data.seed)
        length = FIRST_LENGTH * median_lengthscale(data.X, generator=generator)
        penalty = 0.1 if data.regression else 1.0
        self.ridge = KernelRidge(RBF(length), penalty, self.landmarks, data.budget_bytes)
        self._state: tuple[RBF, Any] | None = None

    def settings(self) -> dict[str, float]:
        """Length scale and penalty."""
        return {"lengthscale": self.ridge.kernel.lengthscale, "penalty": self.ridge.penalty}

    def restore(self, settings: dict[str, float]) -> None:
        """Take stored settings."""
        self.ridge = KernelRidge(
            RBF(settings["lengthscale"]),
            settings["penalty"],
            self.landmarks,
            self.data.budget_bytes,
        )

    def tune(
        self, rows: Tensor, weights: Tensor, noise: NoiseModel, progress: Report
    ) -> tuple[float, NoiseModel]:
        """Minimise the held-out score over length scale and penalty, exactly on these rows."""
        rows = rows[:: -(-len(rows) // TUNING_ROWS)]
        part = self.data.take(rows)
        score = HeldOutScore(part, noise)
        tuned = tune(
            self.ridge,
            part.X,
            part.targets(),
            weights[rows],
            score=score,
            max_evaluations=TUNING_EVALUATIONS,
            progress=progress,
        )
        self.ridge = tuned.ridge
        return tuned.score, score.noise

    def fit(self, weights: Tensor, progress: Report) -> HeldOut:
        """Fit all rows."""
        data = self.data
        if self._state is None or self._state[0] != self.ridge.kernel:
            self._state = None  # frees the last one before the next is made
            generator = torch.Generator().manual_seed(data.seed)
            self._state = (self.ridge.kernel, self.ridge.prepare(data.X, generator=generator))
        fit = self.ridge.fit(
            data.X, data.targets(), weights, state=self._state[1], progress=progress
        )
        return KernelHeldOut(fit, data.regression)


class KernelHeldOut:
    """Held-out predictions of a kernel ridge regression."""

    def __init__(self, fit: KernelRidgeFit, regression: bool) -> None:
        self._fit = fit
        self.outputs = fit.leave_one_out()
        self.variance = fit.relative_variance if regression else None

    def weight_hypergradient(self, slopes: Tensor) -> Tensor:
        """Closed form, through the same inverse."""
        return self._fit.weight_hypergradient(slopes)

    def certificate(self) -> dict[str, Any]:
        """Of the fit."""
        return dict(self._fit.certificate())


def exact_fits(n: int, budget_bytes: int) -> bool:
    """Whether the whole kernel matrix is formed."""
    return n <= EXACT_ROWS and EXACT_MATRICES * n * n * 8 <= budget_bytes


def landmarks(n: int, data: Data) -> int:
    """As many landmarks as work and memory allow."""
    within = (data.budget_bytes / 2 / (EXACT_MATRICES * 8)) ** 0.5
    wanted = max(LEAST_LANDMARKS, min(MOST_LANDMARKS, (PASS_WORK / n) ** 0.5))
    return int(max(1, min(n, wanted, within)))
