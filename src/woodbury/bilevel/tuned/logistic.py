"""Logistic regression with one penalty per feature, by Newton's method, and its hypergradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from woodbury.errors import NonFiniteError
from woodbury.operators import Dense
from woodbury.solvers import Cholesky, Recipe, solve

__all__ = ["LogisticFolds", "Softmax", "contrasts"]

_STEPS = 100


def contrasts(classes: int) -> Tensor:
    r"""An orthonormal basis ``[C, C - 1]`` of the columns that sum to zero.

    Logits $X V Q^T$ are those of coefficients $W = V Q^T$, whose sum over the classes is zero, as
    it is at the minimum of a penalty that treats classes alike, and $\|V\| = \|W\|$; without the
    direction that changes nothing the Hessian is definite. For two classes $Q = (-1/2, 1/2)$, so
    that $V$ is the coefficient of the log odds.
    """
    if classes == 2:
        return torch.tensor([[-0.5], [0.5]], dtype=torch.float64)
    identity = torch.eye(classes, dtype=torch.float64)
    centred = identity - 1 / classes
    Q = torch.linalg.qr(centred[:, :-1])[0]
    return Q


@dataclass(eq=False)
class Softmax:
    r"""Minimise the mean of $-\log p(y_i)$ plus $\frac12\sum_j \alpha_j \|V_j\|^2$ over $V$.

    Attributes:
        X: rows ``[n, d]``; the last column is that of the intercept, if there is one.
        Y: classes as units ``[n, C]``.
        intercept: whether the last column is not penalised.
        recipe: how to solve with the Hessian ``[d (C - 1)]^2``.
        last: where the next fit starts ``[d, C - 1]``.
    """

    X: Tensor
    Y: Tensor
    intercept: bool
    recipe: Recipe | None
    last: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.Q = contrasts(self.Y.shape[1])
        self.last = self.X.new_zeros(self.X.shape[1], self.Q.shape[1])

    def penalties(self, alpha: Tensor) -> Tensor:
        """One for each row of ``V``, ``[d, 1]``."""
        full = torch.cat([alpha, alpha.new_zeros(1)]) if self.intercept else alpha
        return full[:, None]

    def loss(self, V: Tensor, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the losses of rows, and its gradient ``[d, C - 1]``."""
        logs = torch.log_softmax(X @ V @ self.Q.mT, 1)
        return -(Y * logs).sum(), X.mT @ ((logs.exp() - Y) @ self.Q)

    def hessian(self, V: Tensor, alpha: Tensor) -> Dense:
        """That of the objective, ordered by the columns of ``V``."""
        (n, d), k = self.X.shape, self.Q.shape[1]
        P = torch.softmax(self.X @ V @ self.Q.mT, 1)
        PQ = P @ self.Q
        H = self.X.new_zeros(k, d, k, d)
        for a in range(k):
            for b in range(a + 1):
                weights = P @ (self.Q[:, a] * self.Q[:, b]) - PQ[:, a] * PQ[:, b]
                block = self.X.mT @ (weights[:, None] * self.X) / n
                H[a, :, b], H[b, :, a] = block, block.mT
        matrix = H.reshape(k * d, k * d)
        matrix = (matrix + matrix.mT) / 2 + torch.diag(
            self.penalties(alpha).expand(d, k).mT.ravel()
        )
        return Dense(matrix, tags={"positive_definite"})

    def solve(self, H: Dense, G: Tensor) -> Tensor:
        """The inverse Hessian times ``G [d, C - 1]``."""
        recipe = Cholesky() if self.recipe is None else self.recipe
        return solve(H, G.mT.ravel(), recipe).value.reshape(self.Q.shape[1], -1).mT

    def coefficients(self, alpha: Tensor) -> Tensor:
        """The minimiser ``[d, C - 1]``, by Newton's method with halved steps.

        Raises:
            NonFiniteError: the gradient did not fall to 1e-8 of that at zero.
        """
        n, penalties, V = len(self.X), self.penalties(alpha), self.last

        def objective(V: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = self.loss(V, self.X, self.Y)
            return value / n + (penalties * V**2).sum() / 2, gradient / n + penalties * V

        first = torch.linalg.vector_norm(objective(torch.zeros_like(V))[1]).item()
        value, gradient = objective(V)
        norm = torch.linalg.vector_norm(gradient).item()
        for _ in range(_STEPS):
            if norm <= 1e-13 * max(1.0, first):
                break
            step = -self.solve(self.hessian(V, alpha), gradient)
            slope, length = (gradient * step).sum(), 1.0
            while length > 1e-10:
                trial = objective(V + length * step)
                size = torch.linalg.vector_norm(trial[1]).item()
                # Near the minimum the decrease is below rounding: then the gradient decides.
                flat = abs(length * slope) <= 1e-12 * value.clamp_min(1.0)
                if size < norm if flat else trial[0] <= value + 1e-4 * length * slope:
                    break
                length /= 2
            else:
                break
            V, (value, gradient), norm = V + length * step, trial, size
        if norm <= 1e-8 * max(first, 1e-6):
            self.last = V
            return V
        raise NonFiniteError(
            f"Newton's method did not end in {_STEPS} steps, gradient {norm:.1e}: classes may be "
            "separable at penalties this small; raise the smallest penalty (bounds)"
        )


@dataclass(frozen=True, eq=False)
class LogisticFolds:
    r"""The mean of $-\log p(y_i)$ on rows that a fit has not seen.

    Its gradient is $-\alpha_j \langle V_j, q_j\rangle$ in $\log\alpha_j$, $q = H^{-1}\partial_V f$.
    """

    folds: list[tuple[Softmax, Tensor, Tensor]]

    def evaluate(self, alpha: Tensor) -> tuple[float, Tensor]:
        """The criterion and its gradient in the logarithms."""
        count = sum(len(Y) for _, _, Y in self.folds)
        value, gradient = 0.0, torch.zeros_like(alpha)
        for fit, X, Y in self.folds:
            V = fit.coefficients(alpha)
            loss, outer = fit.loss(V, X, Y)
            value += loss.item() / count
            q = fit.solve(fit.hessian(V, alpha), outer / count)
            gradient -= alpha * (V * q).sum(1)[: len(alpha)]
        return value, gradient
