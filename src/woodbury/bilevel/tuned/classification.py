"""Classification with one penalty per feature, tuned by hypergradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from woodbury.bilevel.tuned.base import TunedPenalties
from woodbury.bilevel.tuned.logistic import LogisticFolds, Softmax
from woodbury.bilevel.tuned.search import InnerProblem, Optimizer
from woodbury.errors import DataError
from woodbury.solvers import Recipe

__all__ = ["TunedLogisticRegression"]


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
