"""Estimators of scikit-learn that tune one penalty per feature by hypergradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from woodbury.bilevel.tuned.base import TunedPenalties
from woodbury.bilevel.tuned.elastic_net import ElasticNet, ElasticNetFolds
from woodbury.bilevel.tuned.logistic import LogisticFolds, Softmax
from woodbury.bilevel.tuned.ridge import RidgeFolds, RidgeLeaveOneOut, Squares
from woodbury.bilevel.tuned.search import InnerProblem, Optimizer
from woodbury.errors import ArgumentError, DataError
from woodbury.solvers import Recipe

__all__ = ["TunedElasticNet", "TunedLogisticRegression", "TunedRidge"]


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


class TunedLogisticRegression(ClassifierMixin, TunedPenalties):
    r"""Logistic regression with one penalty per feature, tuned by hypergradients.

    $\min_{W, b} \frac1n\sum_i -\log p(y_i \mid x_i) + \frac12\sum_j \alpha_j \sum_c W_{jc}^2$ with
    $p = \operatorname{softmax}(x^T W + b)$, for features divided by their standard deviations; for
    two classes $p$ is the logistic function of $x^T w + b$ and the penalty
    $\frac12\sum_j\alpha_j w_j^2$. With all penalties equal that is scikit-learn's
    ``LogisticRegression(C=1 / (n * alpha))`` after ``StandardScaler``. The penalties minimise what
    :class:`TunedRidge` does, $F$ being the mean of $-\log p(y_i)$ on rows that were left out.

    Args:
        cv: ``None`` for five shuffled, stratified folds; a number of them (fewer where the smallest
            class has not as many rows); or a splitter or iterable.
        fit_intercept: whether there is $b$, which is not penalised.
        bounds: of each penalty.
        optimizer: of the logarithms: ``"lbfgs"`` or ``"adam"``.
        max_iter: outer steps.
        tol: the search ends where a step lowers its objective by less than this part.
        spread: $\rho$, what holds the penalties together; more than for :class:`TunedRidge`, since
            classes that are nearly separable make $F$ vanish as penalties do.
        early_stopping: watch rows that have no part in $F$.
        validation_fraction: of the rows, for ``early_stopping``.
        n_iter_no_change: patience of ``early_stopping``.
        recipe: how to solve with the inner Hessian, of order ``(d + 1)(C - 1)``; by default
            :class:`~woodbury.Cholesky`.
        random_state: of the shuffles of folds and of the rows that are held out.

    Attributes:
        classes_: the classes ``[C]``.
        coef_: $W^T$ ``[C, d]``, ``[1, d]`` for two classes, for the features as they were given.
        intercept_: $b$ ``[C]``, ``[1]`` for two classes.
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
        DataError: there is one class, or too few rows to leave some out.
        NonFiniteError: an inner problem could not be solved.

    Cost: for each evaluation a few Newton steps per fold: $n d^2 C^2/2$ multiplications for the
    Hessian, $(dC)^3/3$ for its factor.

    Source: Hastie, Tibshirani and Friedman, "The elements of statistical learning" (2nd ed.), 4.4;
    the hypergradient: Lorraine, Vicol and Duvenaud (2020), equation 2.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from woodbury.bilevel import TunedLogisticRegression
        >>> X, y = load_iris(return_X_y=True)
        >>> model = TunedLogisticRegression(random_state=0).fit(X, y)
        >>> model.predict_proba(X).shape, bool(model.score(X, y) > 0.95)
        ((150, 3), True)
    """

    def __init__(
        self,
        *,
        cv: Any = None,
        fit_intercept: bool = True,
        bounds: tuple[float, float] = (1e-6, 1e3),
        optimizer: Optimizer = "lbfgs",
        max_iter: int = 100,
        tol: float = 1e-6,
        spread: float = 1.0,
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

    def _stratified(self) -> bool:
        return True

    def _targets(self, y: Any) -> Tensor:
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(f"y has one class only, {self.classes_[0]!r}; two are needed")
        units = torch.eye(len(self.classes_), dtype=torch.float64)
        return units[torch.from_numpy(codes)]

    def _rows(self, X: Tensor) -> Tensor:
        return torch.cat([X, X.new_ones(len(X), 1)], 1) if self.fit_intercept else X

    def _softmax(self, X: Tensor, Y: Tensor) -> Softmax:
        if bool((Y.sum(0) == 0).any()):
            raise DataError("a fold has no row of one of the classes; use stratified folds")
        return Softmax(self._rows(X), Y, self.fit_intercept, self.recipe)

    def _problem(self, X: Tensor, Y: Tensor, folds: list[tuple[Tensor, Tensor]]) -> InnerProblem:
        return LogisticFolds(
            [(self._softmax(X[a], Y[a]), self._rows(X[b]), Y[b]) for a, b in folds]
        )

    def _loss(self, alpha: Tensor, X: Tensor, Y: Tensor, part: tuple[Tensor, Tensor]) -> float:
        a, b = part
        fit = self._softmax(X[a], Y[a])
        return fit.loss(fit.coefficients(alpha), self._rows(X[b]), Y[b])[0].item() / len(b)

    def _last(self, alpha: Tensor, X: Tensor, Y: Tensor) -> tuple[Any, Any]:
        fit = self._softmax(X, Y)
        V = fit.coefficients(alpha)
        W = (V if len(self.classes_) == 2 else V @ fit.Q.mT).numpy().T
        d = X.shape[1]
        intercept = W[:, d] if self.fit_intercept else np.zeros(len(W))
        return np.ascontiguousarray(W[:, :d]), intercept.copy()

    def decision_function(self, X: Any) -> Any:
        """Logits ``[n, C]``, or log odds of the second class ``[n]`` for two."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        scores = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_log_proba(self, X: Any) -> Any:
        """Logarithms of the probabilities ``[n, C]``."""
        scores = torch.from_numpy(self.decision_function(X))
        if scores.dim() == 1:
            scores = torch.stack([torch.zeros_like(scores), scores], 1)
        return torch.log_softmax(scores, 1).numpy()

    def predict_proba(self, X: Any) -> Any:
        """Probabilities ``[n, C]`` in the order of ``classes_``."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> Any:
        """The most probable class ``[n]``."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return self.classes_[(scores > 0).astype(int)]
        return self.classes_[scores.argmax(1)]
