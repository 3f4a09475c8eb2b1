"""What the three estimators share: data, folds, the search, the last fit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.model_selection import KFold, StratifiedKFold, check_cv
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data
from torch import Tensor

from woodbury.bilevel.tuned.search import InnerProblem, Optimizer, Penalties, PenaltySearch
from woodbury.errors import ArgumentError, DataError
from woodbury.solvers import Recipe

__all__ = ["TunedPenalties"]


class TunedPenalties(BaseEstimator):
    """Base of the estimators that tune one penalty per feature."""

    def __init__(
        self,
        *,
        cv: Any = None,
        fit_intercept: bool = True,
        bounds: tuple[float, float] = (1e-6, 1e3),
        optimizer: Optimizer = "lbfgs",
        max_iter: int = 100,
        tol: float = 1e-6,
        spread: float = 1e-3,
        early_stopping: bool = False,
        validation_fraction: float = 0.2,
        n_iter_no_change: int = 5,
        recipe: Recipe | None = None,
        random_state: Any = None,
    ) -> None:
        self.cv = cv
        self.fit_intercept = fit_intercept
        self.bounds = bounds
        self.optimizer = optimizer
        self.max_iter = max_iter
        self.tol = tol
        self.spread = spread
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.recipe = recipe
        self.random_state = random_state

    @abstractmethod
    def _targets(self, y: Any) -> Tensor:
        """``y`` as the inner problem takes it."""

    @abstractmethod
    def _problem(self, X: Tensor, Y: Tensor, folds: list[tuple[Tensor, Tensor]]) -> InnerProblem:
        """Fits on the folds of scaled rows."""

    @abstractmethod
    def _loss(self, alpha: Tensor, X: Tensor, Y: Tensor, part: tuple[Tensor, Tensor]) -> float:
        """The mean loss on the second rows of a fit on the first."""

    @abstractmethod
    def _last(self, alpha: Tensor, X: Tensor, Y: Tensor) -> tuple[Any, Any]:
        """Coefficients and intercept of all scaled rows, as the estimator has them."""

    def _folds(self, X: Any, y: Any) -> list[tuple[Tensor, Tensor]]:
        """Rows of the fits and of their judgement; none for leave-one-out."""
        if self.cv is None or isinstance(self.cv, Integral):
            splitter = self._splitter(y, 5 if self.cv is None else int(self.cv))
        else:
            splitter = check_cv(self.cv, y, classifier=self._stratified())
        found = [
            (torch.from_numpy(np.asarray(a)), torch.from_numpy(np.asarray(b)))
            for a, b in splitter.split(X, y)
        ]
        if not found or any(len(a) == 0 or len(b) == 0 for a, b in found):
            raise DataError("cv gives no fold, or one without rows")
        return found

    def _stratified(self) -> bool:
        return False

    def _splitter(self, y: Any, count: int) -> Any:
        """Shuffled folds; fewer where there are not as many rows, or rows of a class."""
        if count < 2:
            raise ArgumentError(f"cv is {count}; at least 2 folds are needed")
        rows = len(y)
        if self._stratified():
            rows = int(np.unique(y, return_counts=True)[1].min())
        if rows < 2:
            what = "its smallest class has 1 row" if self._stratified() else "it has 1 sample"
            raise DataError(f"the data cannot be split into folds, {what}; give cv a splitter")
        kind = StratifiedKFold if self._stratified() else KFold
        random = check_random_state(self.random_state)
        return kind(min(count, rows), shuffle=True, random_state=random.randint(2**31 - 1))

    def _range(self, X: Tensor, Y: Tensor) -> tuple[float, float]:
        """The least and the largest penalty."""
        low, high = self.bounds
        if not 0 < low < high < np.inf:
            raise ArgumentError(f"bounds are {self.bounds}; expected 0 < low < high")
        return low, high

    def fit(self, X: Any, y: Any) -> TunedPenalties:
        """Choose the penalties and fit.

        Args:
            X: features ``[n, d]``.
            y: target ``[n]``.

        Returns:
            The estimator itself.
        """
        search = PenaltySearch(
            self.optimizer, self.max_iter, self.tol, self.spread, self.n_iter_no_change
        )
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=not self._stratified())
        if len(X) < 2:
            raise DataError(f"{type(self).__name__} needs at least 2 rows, X has 1 sample")
        Y = self._targets(y)
        mean = X.mean(0) if self.fit_intercept else np.zeros(X.shape[1])
        scale = np.sqrt(((X - mean) ** 2).mean(0))
        scale[scale <= 1e-12 * np.abs(X).max(0)] = 1.0  # a constant column has no scale
        scaled = torch.from_numpy((X - mean) / scale)
        bounds = self._range(scaled, Y)
        found = self._search(search, scaled, y, Y, bounds)
        coefficients, intercept = self._last(found.alpha, scaled, Y)
        self.coef_ = coefficients / scale
        self.intercept_ = intercept - self.coef_ @ mean
        self.alpha_ = found.alpha.numpy()
        self.scale_ = scale
        self.criterion_ = found.criterion
        self.shared_alpha_ = found.shared
        self.shared_criterion_ = found.shared_criterion
        self.criterion_path_ = np.array(found.path)
        self.n_iter_ = max(1, len(found.path) - 1)
        return self

    def _search(
        self,
        search: PenaltySearch,
        X: Tensor,
        y: Any,
        Y: Tensor,
        bounds: tuple[float, float],
    ) -> Penalties:
        rows, monitor = np.arange(len(y)), None
        if self.early_stopping:
            rows, monitor = self._held_out(X, y, Y)
        folds = self._folds(X[rows], y[rows])
        problem = self._problem(X[rows], Y[rows], folds)
        return search.run(problem, X.shape[1], bounds, monitor)

    def _held_out(self, X: Tensor, y: Any, Y: Tensor) -> tuple[Any, Callable[[Tensor], float]]:
        """Rows that are left for the search, and the loss on the others."""
        from sklearn.model_selection import train_test_split

        if not 0 < self.validation_fraction < 1:
            raise ArgumentError(
                f"validation_fraction is {self.validation_fraction}; it must be in (0, 1)"
            )
        kept, held = train_test_split(
            np.arange(len(y)),
            test_size=self.validation_fraction,
            random_state=check_random_state(self.random_state).randint(2**31 - 1),
            stratify=y if self._stratified() else None,
        )
        part = torch.from_numpy(np.sort(kept)), torch.from_numpy(np.sort(held))
        return part[0].numpy(), lambda alpha: self._loss(alpha, X, Y, part)
