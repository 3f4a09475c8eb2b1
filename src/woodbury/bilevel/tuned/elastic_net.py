"""The elastic net with one penalty per feature, solved to rounding, and its hypergradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from woodbury.bilevel.tuned.ridge import Squares
from woodbury.errors import NonFiniteError
from woodbury.implicit import AcceleratedProximalGradient, prox_elastic_net
from woodbury.operators import Dense
from woodbury.solvers import Cholesky, Recipe, solve

__all__ = ["ElasticNet", "ElasticNetFolds"]

_ROUNDS = 240
_NEWTON = 8  # Newton steps may cycle: every so often the support comes from a descent
_STEPS = 200


@dataclass(eq=False)
class ElasticNet:
    r"""$\min_w \frac1{2n}\|y - Xw\|^2 + \sum_j \alpha_j(r|w_j| + \frac{1-r}2 w_j^2)$.

    On a guess of the support and its signs the solution is one linear system; where that satisfies
    the optimality conditions it is the minimum, to rounding. Otherwise a proximal step from there
    is the next guess (semismooth Newton), and now and then, lest it cycles, accelerated proximal
    gradient. Along a path of penalties the last guess mostly holds.
    """

    rows: Squares
    ratio: float
    recipe: Recipe | None
    last: Tensor = field(init=False)

    def __post_init__(self) -> None:
        X, y = self.rows.X, self.rows.y
        self.gram = X.mT @ X / len(y)
        self.slope = X.mT @ y / len(y)
        self.length = 1 / max(torch.linalg.eigvalsh(self.gram)[-1].item(), 1e-12)
        self.last = torch.zeros_like(self.slope)

    def on_support(self, w: Tensor, alpha: Tensor, b: Tensor) -> Tensor:
        """The inverse of the Hessian on the support of ``w`` times ``b [d]``, zero elsewhere."""
        S = w.nonzero().squeeze(1)
        found = torch.zeros_like(b)
        if len(S):
            matrix = self.gram[S][:, S] + torch.diag((1 - self.ratio) * alpha[S])
            A = Dense((matrix + matrix.mT) / 2, tags={"positive_definite"})
            found[S] = solve(A, b[S], Cholesky() if self.recipe is None else self.recipe).value
        return found

    def coefficients(self, alpha: Tensor) -> Tensor:
        """The minimiser ``[d]``.

        Raises:
            NonFiniteError: no support was found that satisfies the optimality conditions.
        """
        guess = self.last
        size = self.slope.abs().max().clamp_min(torch.finfo(alpha.dtype).tiny)
        for attempt in range(1, _ROUNDS + 1):
            w = self.on_support(guess, alpha, self.slope - self.ratio * alpha * guess.sign())
            off = guess == 0
            rest = (self.slope - self.gram @ w).abs() - self.ratio * alpha
            if bool((w.sign() == guess.sign()).all()) and not bool((rest[off] > 1e-9 * size).any()):
                self.last = w
                return w
            guess = self._guess(w, alpha) if attempt % _NEWTON else self._descend(guess, alpha)
        raise NonFiniteError(
            f"no support satisfies the optimality conditions after {_ROUNDS // _NEWTON * _STEPS} "
            "proximal steps: columns may depend on each other to rounding; lower l1_ratio or raise "
            "the smallest penalty (bounds)"
        )

    def _guess(self, w: Tensor, alpha: Tensor) -> Tensor:
        """One proximal step: with the solution on its support that is a semismooth Newton step."""
        l1, l2 = self.ratio * alpha, (1 - self.ratio) * alpha
        moved = w + self.length * (self.slope - self.gram @ w)
        return prox_elastic_net(moved, l1, l2, step=self.length)

    def _descend(self, start: Tensor, alpha: Tensor) -> Tensor:
        solver = AcceleratedProximalGradient(
            prox=prox_elastic_net, step=self.length, tol=1e-14, max_steps=_STEPS
        )

        def smooth(w: Tensor, gram: Tensor) -> Tensor:
            return 0.5 * w @ (gram @ w) - self.slope @ w

        l1, l2 = self.ratio * alpha, (1 - self.ratio) * alpha
        return solver.run(smooth, start, self.gram, l1, l2, throw=False).value


@dataclass(frozen=True, eq=False)
class ElasticNetFolds:
    r"""The mean square of errors on rows that a fit has not seen.

    The hypergradient is implicit: on the support $S$, with $H = X_S^T X_S/n +
    \operatorname{diag}((1-r)\alpha_S)$ and $q = H^{-1}\partial_w f$, it is
    $-q_j (r \operatorname{sign} w_j + (1-r) w_j)$ in $\alpha_j$, zero elsewhere: what the
    derivative of the proximal gradient fixed point comes to.
    """

    folds: list[tuple[ElasticNet, Tensor, Tensor]]

    def evaluate(self, alpha: Tensor) -> tuple[float, Tensor]:
        """The criterion and its gradient in the logarithms."""
        count = sum(len(y) for _, _, y in self.folds)
        value, gradient = 0.0, torch.zeros_like(alpha)
        for net, X, y in self.folds:
            w = net.coefficients(alpha)
            errors = net.rows.errors(w, X, y)
            value += (errors**2).sum().item() / count
            outer = -2 * (X - net.rows.mean).mT @ errors / count
            q = net.on_support(w, alpha, outer)
            gradient -= alpha * q * (net.ratio * w.sign() + (1 - net.ratio) * w)
        return value, gradient
