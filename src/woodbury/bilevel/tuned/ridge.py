"""Ridge regression with one penalty per feature: exact leave-one-out, and folds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.operators import Dense, Diagonal, LinearOperator, LowRank
from woodbury.solvers import Cholesky, Recipe, solve

__all__ = ["RidgeFolds", "RidgeLeaveOneOut", "Squares"]


@dataclass(frozen=True, eq=False)
class Squares:
    r"""Rows of a least squares problem, centred: $\frac1{2n}\|y - Xw\|^2$.

    Attributes:
        X: ``[n, d]``, its columns without their means where there is an intercept.
        y: ``[n]``, likewise.
        mean: those of the columns ``[d]``, zero without an intercept.
        target: that of ``y``.
    """

    X: Tensor
    y: Tensor
    mean: Tensor
    target: Tensor

    @classmethod
    def of(cls, X: Tensor, y: Tensor, intercept: bool) -> Squares:
        """Centre, where there is an intercept."""
        mean = X.mean(0) if intercept else torch.zeros_like(X[0])
        target = y.mean() if intercept else torch.zeros_like(y[0])
        return cls(X - mean, y - target, mean, target)

    def errors(self, w: Tensor, X: Tensor, y: Tensor) -> Tensor:
        """Target minus prediction for other rows, by coefficients of these."""
        return y - self.target - (X - self.mean) @ w

    def ridge(self, alpha: Tensor, B: Tensor, recipe: Recipe | None) -> Tensor:
        r"""$(X^T X/n + \operatorname{diag}\alpha)^{-1} B$, differentiable in $\alpha$."""
        n, d = self.X.shape
        A: LinearOperator
        if d > 2 * n and recipe is None:  # the Woodbury identity factorises [n, n]
            A = Diagonal(alpha, tags={"positive_definite"}) + LowRank(self.X.mT / math.sqrt(n))
            return solve(A, B).value
        matrix = self.X.mT @ self.X / n + torch.diag(alpha)
        A = Dense((matrix + matrix.mT) / 2, tags={"positive_definite"})
        return solve(A, B, Cholesky() if recipe is None else recipe).value

    def coefficients(self, alpha: Tensor, recipe: Recipe | None) -> Tensor:
        """The minimiser ``[d]``."""
        return self.ridge(alpha, self.X.mT @ self.y / len(self.y), recipe)


@dataclass(frozen=True, eq=False)
class RidgeLeaveOneOut:
    r"""The mean square of $e_i = (y_i - \hat y_i)/(1 - h_i)$, the errors of ``n`` refits, exact.

    $h_i = \frac1n x_i^T (X^T X/n + \operatorname{diag}\alpha)^{-1} x_i$, and $1/n$ more where there
    is an intercept.
    """

    rows: Squares
    intercept: bool
    recipe: Recipe | None

    def evaluate(self, alpha: Tensor) -> tuple[float, Tensor]:
        """The criterion and its gradient in the logarithms."""
        X, y = self.rows.X, self.rows.y
        n = len(y)
        logs = alpha.log().requires_grad_()
        B = self.rows.ridge(logs.exp(), X.mT / n, self.recipe)
        leverage = (X.mT * B).sum(0) + self.intercept / n
        errors = (y - X @ (B @ y)) / (1 - leverage)
        value = (errors**2).mean()
        (gradient,) = torch.autograd.grad(value, logs)
        return value.item(), gradient


@dataclass(frozen=True, eq=False)
class RidgeFolds:
    """The mean square of errors on rows that a fit has not seen.

    Attributes:
        folds: for each, the rows it is fitted on and those it is judged by.
        recipe: how to solve with the Hessian.
    """

    folds: list[tuple[Squares, Tensor, Tensor]]
    recipe: Recipe | None

    def evaluate(self, alpha: Tensor) -> tuple[float, Tensor]:
        """The criterion and its gradient in the logarithms."""
        logs = alpha.log().requires_grad_()
        count = sum(len(y) for _, _, y in self.folds)
        parts = [
            (rows.errors(rows.coefficients(logs.exp(), self.recipe), X, y) ** 2).sum() / count
            for rows, X, y in self.folds
        ]
        value = torch.stack(parts).sum()
        (gradient,) = torch.autograd.grad(value, logs)
        return value.item(), gradient
