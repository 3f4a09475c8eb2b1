"""Fit a weighted multinomial logistic model by preconditioned L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from woodbury.apps.clean.lbfgs import minimize
from woodbury.influence.glm import ClasswiseCurvature, CoupledCurvature
from woodbury.operators import FunctionOperator
from woodbury.solvers import CG, Solution, solve

__all__ = ["SoftmaxFit", "SoftmaxProblem", "UniformCurvature"]

# The curvature that preconditions is of this many rows at most; the fit sees all.
PRECONDITIONER_ROWS = 20_000
REBUILD = 30
# The fit ends this close to the minimum, in nats per row.
TOLERANCE = 1e-8
_BLOCK_ROWS = 65_536


@dataclass(frozen=True, eq=False)
class UniformCurvature:
    r"""The curvature where all classes are equally probable, $(I - 11^T / C) / C \otimes X^T W X$.

    Two factorisations of the size of the columns serve all classes: what a fit from zero starts
    with.
    """

    factor: Tensor
    penalty: Tensor

    @classmethod
    def of(cls, X: Tensor, classes: int, weights: Tensor, penalty: Tensor) -> UniformCurvature:
        """Form and factorise, from rows ``[n, d]``."""
        x = X * (weights / classes).sqrt()[:, None].to(X.dtype)
        gram = (x.mT @ x).double()
        gram.diagonal().add_(penalty)
        return cls(torch.linalg.cholesky(gram), penalty)

    def solve(self, G: Tensor) -> Tensor:
        """The inverse times a block of parameters ``[d, C]``."""
        shared = G.mean(1, keepdim=True)
        return torch.cholesky_solve(G - shared, self.factor) + shared / self.penalty[:, None]


Curvature = CoupledCurvature | ClasswiseCurvature
Start = Curvature | UniformCurvature


@dataclass(frozen=True, eq=False)
class SoftmaxProblem:
    r"""$\sum_i w_i \ell(\theta^T x_i, y_i) + \frac12 \sum_{jc} \pi_j \theta_{jc}^2$.

    Attributes:
        X: rows ``[n, d]``; products are taken in their dtype.
        labels: classes ``[n]``.
        classes: $C$.
        weights: $w$, ``[n]``, float64.
        penalty: $\pi$, ``[d]``, float64.
        coupled: keep the curvature between classes.
    """

    X: Tensor
    labels: Tensor
    classes: int
    weights: Tensor
    penalty: Tensor
    coupled: bool

    def curvature(self, P: Tensor, stride: int = 1) -> Curvature:
        """The factorised curvature at probabilities ``P``, from every ``stride``-th row."""
        kind = CoupledCurvature if self.coupled else ClasswiseCurvature
        rows = slice(None, None, stride)
        # Products in float32 are exact enough for a factor of a well-conditioned Hessian.
        return kind.of(
            self.X[rows].float(), P[rows].float(), self.weights[rows] * stride, self.penalty
        )

    def logits(self, theta: Tensor) -> Tensor:
        r"""$X\theta$, ``[n, C]``, float64."""
        return (self.X @ theta.to(self.X.dtype)).double()

    def value(self, theta: Tensor, log_P: Tensor) -> float:
        """The objective, at the logarithms of probabilities ``[n, C]``."""
        own = log_P.gather(1, self.labels[:, None]).squeeze(1)
        ridge = 0.5 * (self.penalty[:, None] * theta.square()).sum()
        return (ridge - torch.dot(self.weights, own)).item()

    def residual(self, P: Tensor) -> Tensor:
        """$p - y$, ``[n, C]``."""
        r = P.clone()
        r[torch.arange(len(r)), self.labels] -= 1
        return r

    def gradient(self, theta: Tensor, P: Tensor) -> Tensor:
        """Of the objective, ``[d, C]``."""
        pull = self.weights[:, None] * self.residual(P)
        return self.adjoint(pull) + self.penalty[:, None] * theta

    def adjoint(self, V: Tensor) -> Tensor:
        """$X^T V$, ``[d, C]``, float64."""
        return (self.X.mT @ V.to(self.X.dtype)).double()

    def fit(self, start: Tensor | None = None, curvature: Start | None = None) -> SoftmaxFit:
        r"""Minimise from ``start`` (zeros if not given).

        L-BFGS whose first inverse Hessian is that at equal probabilities; should 30 steps not do,
        that of the place reached, from up to 20,000 rows.
        Ends where $\frac12 g^T H^{-1} g$, what is left to gain, is below 1e-8 nats a row.

        Args:
            start: parameters ``[d, C]``.
            curvature: of a similar problem, to begin with instead.
        """
        n = len(self.labels)
        stride = max(1, n // PRECONDITIONER_ROWS)
        P = self.X.new_empty(0)

        def objective(theta: Tensor) -> tuple[float, Tensor]:
            nonlocal P
            log_P = self.logits(theta).log_softmax(1)
            P = log_P.exp()
            return self.value(theta, log_P), self.gradient(theta, P)

        def rebuild() -> Callable[[Tensor], Tensor]:
            return self.curvature(P, stride).solve

        theta = self.X.new_zeros(self.X.shape[1], self.classes, dtype=torch.float64)
        theta = theta if start is None else start
        first = curvature
        if first is None:
            first = UniformCurvature.of(self.X, self.classes, self.weights, self.penalty)
        found = minimize(
            objective,
            theta,
            precondition=first.solve,
            rebuild=rebuild,
            rebuild_every=REBUILD,
            tolerance=TOLERANCE * n,
        )
        logits = self.logits(found.place)
        P = logits.softmax(1)
        return SoftmaxFit(self, found.place, logits, P, found.gain, found.steps, first)


@dataclass(frozen=True, eq=False)
class SoftmaxFit:
    """A fitted model.

    Attributes:
        problem: what was minimised.
        theta: parameters ``[d, C]``, float64.
        logits: of the fit, ``[n, C]``.
        P: their softmax.
        suboptimality: how far the objective is from its minimum, to second order.
        steps: of L-BFGS.
        nearby: the inverse curvature that the fit began with.
    """

    problem: SoftmaxProblem
    theta: Tensor
    logits: Tensor
    P: Tensor
    suboptimality: float
    steps: int
    nearby: Start

    @cached_property
    def curvature(self) -> Curvature:
        """The factorised curvature at the fit, of all rows."""
        return self.problem.curvature(self.P)

    @cached_property
    def residual(self) -> Tensor:
        """$p - y$, ``[n, C]``."""
        return self.problem.residual(self.P)

    def hessian_solve(
        self, right: Tensor, curvature: Start | None = None, rtol: float = 1e-6
    ) -> Solution:
        """Solve with the exact Hessian for ``right`` ``[d, C]``; the value is flat, ``[d C]``.

        Conjugate gradients on products with the data, preconditioned by the factorised curvature:
        the residual it reports is true also where that curvature is an approximation.

        Args:
            right: right-hand side.
            curvature: the preconditioner, that of the fit if not given.
            rtol: relative tolerance.
        """
        M = self.curvature if curvature is None else curvature
        shape = right.shape
        size = right.numel()
        tags = {"positive_definite", "symmetric"}

        def product(V: Tensor) -> Tensor:
            return torch.stack([self._times(v.view(shape)).flatten() for v in V.mT], 1)

        def precondition(V: Tensor) -> Tensor:
            return torch.stack([M.solve(v.view(shape)).flatten() for v in V.mT], 1)

        hessian = FunctionOperator(product, (size, size), tags=tags, dtype=torch.float64)
        inverse = FunctionOperator(precondition, (size, size), tags=tags, dtype=torch.float64)
        recipe = CG(rtol=rtol, max_steps=200, preconditioner=inverse)
        return solve(hessian, right.flatten(), recipe, throw=False)

    def _times(self, V: Tensor) -> Tensor:
        """The Hessian times ``[d, C]``, in blocks of rows."""
        problem = self.problem
        result = problem.penalty[:, None] * V
        for part in torch.arange(len(problem.labels)).split(_BLOCK_ROWS):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            x, p = problem.X[rows], self.P[rows]
            moved = (x @ V.to(x.dtype)).double()
            bent = p * (moved - (p * moved).sum(1, keepdim=True))
            bent *= problem.weights[rows, None]
            result = result + (x.mT @ bent.to(x.dtype)).double()
        return result
