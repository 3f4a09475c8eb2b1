"""Regression with one penalty per feature, tuned by hypergradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from woodbury.bilevel.tuned.base import TunedPenalties
from woodbury.bilevel.tuned.elastic_net import ElasticNet, ElasticNetFolds
from woodbury.bilevel.tuned.ridge import RidgeFolds, RidgeLeaveOneOut, Squares
from woodbury.bilevel.tuned.search import InnerProblem, Optimizer
from woodbury.errors import ArgumentError
from woodbury.solvers import Recipe

__all__ = ["TunedElasticNet", "TunedRidge"]


class _Linear(RegressorMixin, TunedPenalties):
    """Regression: the target is a vector, the loss the square."""

    def _targets(self, y: Any) -> Tensor:
        return torch.from_numpy(np.asarray(y, dtype=np.float64).copy())

    def predict(self, X: Any) -> Any:
        """The prediction ``[n]`` for rows ``[n, d]``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return X @ self.coef_ + self.intercept_


class TunedRidge(_Linear):
    r"""Ridge regression with one penalty per feature, tuned by hypergradients.

    $\min_{w, b} \frac1{2n}\sum_i (y_i - x_i^T w - b)^2 + \frac12\sum_j \alpha_j w_j^2$ for features
    divided by their standard deviations. The penalties minimise

    $$F(\alpha)/F(\alpha_0) + \rho\,\frac1d\sum_j(\log\alpha_j - \log\alpha_0)^2,$$

    where $F$ is the mean square of the errors on rows that were left out, by default one at a time
    in closed form, and $\alpha_0$ the best shared penalty of a grid, where the search starts.
    A feature that does not help gets a large penalty. With all penalties equal it is
    ``Ridge(alpha=n * alpha)`` of scikit-learn, after ``StandardScaler``.

    Args:
        cv: ``None`` for exact leave-one-out; a number of shuffled folds; or a splitter or iterable
            of scikit-learn's, a single split for a validation set.
        fit_intercept: whether there is $b$, which is not penalised.
        bounds: of each penalty.
        optimizer: of the logarithms: ``"lbfgs"`` (SciPy's, with bounds) or ``"adam"`` (rate 0.1).
        max_iter: outer steps.
        tol: the search ends where a step lowers its objective by less than this part.
        spread: $\rho$, what holds the penalties together: 0 for none; ``d`` penalties can fit the
            noise of the criterion.
        early_stopping: watch rows that have no part in $F$ and stop where their loss has not
            improved for ``n_iter_no_change`` steps.
        validation_fraction: of the rows, for ``early_stopping``; the last fit has all rows.
        n_iter_no_change: patience of ``early_stopping``.
        recipe: how to solve with the inner Hessian; by default :class:`~woodbury.Cholesky`, and
            the Woodbury identity where there are more than twice as many features as rows.
        random_state: of the shuffles of folds and of the rows that are held out.

    Attributes:
        coef_: $w$ ``[d]``, for the features as they were given.
        intercept_: $b$.
        alpha_: penalties ``[d]``, of coefficients of features divided by ``scale_``.
        scale_: standard deviations of the features ``[d]``.
        criterion_: $F$ at the penalties.
        shared_alpha_: $\alpha_0$.
        shared_criterion_: $F(\alpha_0)$.
        criterion_path_: $F$ after each outer step, from $\alpha_0$ on.
        n_iter_: outer steps.
        n_features_in_: ``d``.
        feature_names_in_: names of the columns, where there are.

    Raises:
        ArgumentError: a setting makes no sense.
        DataError: there are too few rows to leave some out.

    Cost: for each evaluation one factorisation of order ``d`` per fold; leave-one-out $n d^2$ more.

    Source: exact leave-one-out: Allen, "The relationship between variable selection and data
    augmentation" (1974); its gradient in the penalties: the implicit function theorem, as
    Lorraine, Vicol and Duvenaud (2020), equation 2.

    Example:
        >>> import numpy as np
        >>> from woodbury.bilevel import TunedRidge
        >>> rng = np.random.default_rng(0)
        >>> X = rng.normal(size=(60, 20))
        >>> y = X[:, 0] - X[:, 1] + 0.5 * rng.normal(size=60)
        >>> model = TunedRidge().fit(X, y)
        >>> bool(model.alpha_[:2].max() < model.alpha_[2:].min())
        True
        >>> bool(model.criterion_ < model.shared_criterion_)
        True
    """

    def _folds(self, X: Any, y: Any) -> list[tuple[Tensor, Tensor]]:
        return [] if self.cv is None else super()._folds(X, y)

    def _problem(self, X: Tensor, Y: Tensor, folds: list[tuple[Tensor, Tensor]]) -> InnerProblem:
        if not folds:
            rows = Squares.of(X, Y, self.fit_intercept)
            return RidgeLeaveOneOut(rows, self.fit_intercept, self.recipe)
        parts = [(Squares.of(X[a], Y[a], self.fit_intercept), X[b], Y[b]) for a, b in folds]
        return RidgeFolds(parts, self.recipe)

    def _loss(self, alpha: Tensor, X: Tensor, Y: Tensor, part: tuple[Tensor, Tensor]) -> float:
        a, b = part
        rows = Squares.of(X[a], Y[a], self.fit_intercept)
        w = rows.coefficients(alpha, self.recipe)
        return (rows.errors(w, X[b], Y[b]) ** 2).mean().item()

    def _last(self, alpha: Tensor, X: Tensor, Y: Tensor) -> tuple[Any, Any]:
        rows = Squares.of(X, Y, self.fit_intercept)
        w = rows.coefficients(alpha, self.recipe)
        return w.numpy(), (rows.target - rows.mean @ w).item()


class TunedElasticNet(_Linear):
    r"""The elastic net with one penalty per feature, tuned by hypergradients.

    $\min_{w, b} \frac1{2n}\sum_i (y_i - x_i^T w - b)^2
    + \sum_j \alpha_j\big(r|w_j| + \frac{1-r}2 w_j^2\big)$ for features divided by their standard
    deviations: scikit-learn's ``ElasticNet`` where all penalties are equal. The penalties minimise
    what :class:`TunedRidge` does, with folds. Inner problems are solved to rounding; the
    hypergradient is the implicit one of the proximal gradient fixed point. It is zero for a feature
    whose coefficient is zero, so a feature that is out stays out.

    Args:
        l1_ratio: $r$ in $(0, 1]$.
        cv: ``None`` for five shuffled folds; a number of them; or a splitter or iterable.
        fit_intercept: whether there is $b$, which is not penalised.
        bounds: of each penalty, in units of the smallest shared penalty at which all coefficients
            are zero.
        optimizer: of the logarithms: ``"lbfgs"`` or ``"adam"``.
        max_iter: outer steps.
        tol: the search ends where a step lowers its objective by less than this part.
        spread: $\rho$, what holds the penalties together.
        early_stopping: watch rows that have no part in $F$.
        validation_fraction: of the rows, for ``early_stopping``.
        n_iter_no_change: patience of ``early_stopping``.
        recipe: how to solve with the Hessian on the support; by default
            :class:`~woodbury.Cholesky`.
        random_state: of the shuffles of folds and of the rows that are held out.

    Attributes:
        coef_: $w$ ``[d]``, for the features as they were given.
        intercept_: $b$.
        alpha_: penalties ``[d]``, of coefficients of features divided by ``scale_``.
        scale_: standard deviations of the features ``[d]``.
        criterion_: $F$ at the penalties.
        shared_alpha_: $\alpha_0$.
        shared_criterion_: $F(\alpha_0)$.
        criterion_path_: $F$ after each outer step, from $\alpha_0$ on.
        n_iter_: outer steps.
        n_features_in_: ``d``.
        feature_names_in_: names of the columns, where there are.

    Raises:
        ArgumentError: a setting makes no sense.
        DataError: there are too few rows to leave some out.
        NonFiniteError: an inner problem could not be solved.

    Cost: for each evaluation one or two factorisations of the order of the support per fold, and
    proximal steps where the support changed.

    Source: Zou and Hastie, "Regularization and variable selection via the elastic net" (2005); the
    hypergradient: Bertrand et al., "Implicit differentiation of Lasso-type models" (2020).

    Example:
        >>> import numpy as np
        >>> from woodbury.bilevel import TunedElasticNet
        >>> rng = np.random.default_rng(0)
        >>> X = rng.normal(size=(60, 20))
        >>> y = X[:, 0] - X[:, 1] + 0.5 * rng.normal(size=60)
        >>> model = TunedElasticNet(random_state=0).fit(X, y)
        >>> bool(model.criterion_ < model.shared_criterion_)
        True
    """

    def __init__(
        self,
        *,
        l1_ratio: float = 0.5,
        cv: Any = None,
        fit_intercept: bool = True,
        bounds: tuple[float, float] = (1e-4, 2.0),
        optimizer: Optimizer = "lbfgs",
        max_iter: int = 100,
        tol: float = 1e-6,
        spread: float = 0.1,
        early_stopping: bool = False,
        validation_fraction: float = 0.2,
        n_iter_no_change: int = 5,
        recipe: Recipe | None = None,
        random_state: Any = None,
    ) -> None:
        super().__init__(
            cv=cv,
            fit_intercept=fit_intercept,
            bounds=bounds,
            optimizer=optimizer,
            max_iter=max_iter,
            tol=tol,
            spread=spread,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
            recipe=recipe,
            random_state=random_state,
        )
        self.l1_ratio = l1_ratio

    def _range(self, X: Tensor, Y: Tensor) -> tuple[float, float]:
        if not 0 < self.l1_ratio <= 1:
            raise ArgumentError(f"l1_ratio is {self.l1_ratio}; it must be in (0, 1]")
        low, high = super()._range(X, Y)
        net = self._net(X, Y)
        least = net.slope.abs().max().item() / self.l1_ratio
        least = least if least > 0 else 1.0
        return low * least, high * least

    def _net(self, X: Tensor, Y: Tensor) -> ElasticNet:
        return ElasticNet(Squares.of(X, Y, self.fit_intercept), self.l1_ratio, self.recipe)

    def _problem(self, X: Tensor, Y: Tensor, folds: list[tuple[Tensor, Tensor]]) -> InnerProblem:
        return ElasticNetFolds([(self._net(X[a], Y[a]), X[b], Y[b]) for a, b in folds])

    def _loss(self, alpha: Tensor, X: Tensor, Y: Tensor, part: tuple[Tensor, Tensor]) -> float:
        a, b = part
        net = self._net(X[a], Y[a])
        return (net.rows.errors(net.coefficients(alpha), X[b], Y[b]) ** 2).mean().item()

    def _last(self, alpha: Tensor, X: Tensor, Y: Tensor) -> tuple[Any, Any]:
        net = self._net(X, Y)
        w = net.coefficients(alpha)
        return w.numpy(), (net.rows.target - net.rows.mean @ w).item()
