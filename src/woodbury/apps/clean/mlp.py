"""The small network: one hidden layer, left-out predictions by the Gauss-Newton matrix."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from woodbury.apps.clean.lbfgs import minimize
from woodbury.apps.clean.linear import minimize_log_penalty
from woodbury.apps.clean.models import Data, HeldOut, HeldOutScore, Report, principal_components
from woodbury.apps.clean.noise import NoiseModel
from woodbury.curvature import GaussNewton, Jacobian, Objective
from woodbury.influence import leave_one_out
from woodbury.solvers import Cholesky, solve

__all__ = ["Network"]

MOST_INPUTS = 32
LEAST_HIDDEN, MOST_HIDDEN = 4, 32
PARAMETERS = 800
# Leaving rows out takes about N C p^2 multiplications twice; up to this many.
MOST_WORK = 1e11
TRAINING_STEPS = 300
# Below, a row occupies whole parameters, another minimum is near, and one Newton step does not
# tell what a network without the row would be.
CLASSIFICATION_RANGE, REGRESSION_RANGE = (10.0, 1000.0), (2.0, 1000.0)
TUNING_ROWS = 750
FOLDS = 5
SMALLEST_WEIGHT = 1e-6


class Network:
    """One hidden layer of tanh units on leading principal components, with weight decay.

    All rows take part in training up to some ten thousand (fewer with many classes); beyond, a
    sample does, and rows outside it are judged by a network that has not seen them anyway.
    """

    name = "mlp"
    retunes = False

    def __init__(self, data: Data, penalty: float = 30.0) -> None:
        self.data, self.penalty = data, penalty
        X = data.X
        if X.shape[1] > MOST_INPUTS:
            X = principal_components(X, most=MOST_INPUTS, share=1.0)
        self.outputs = max(1, data.classes)
        # Inputs of mean square 1: what the start of the hidden layer is made for.
        scale = X.square().sum() / X.numel()
        self.inputs = X.double() / scale.sqrt().double().clamp_min(1e-12)
        width = (PARAMETERS - self.outputs) / (self.inputs.shape[1] + self.outputs + 1)
        self.hidden = int(min(MOST_HIDDEN, max(LEAST_HIDDEN, width)))
        size = self.hidden * (self.inputs.shape[1] + 1 + self.outputs) + self.outputs
        self._last: Tensor | None = None
        self.rows = int(min(len(X), max(1000, MOST_WORK / (self.outputs * size**2))))

    def settings(self) -> dict[str, float]:
        """The weight decay, as the strength of a penalty on the sum of losses."""
        return {"penalty": self.penalty}

    def restore(self, settings: dict[str, float]) -> None:
        """Take a stored weight decay."""
        self.penalty = settings["penalty"]

    def tune(
        self, rows: Tensor, weights: Tensor, noise: NoiseModel, progress: Report
    ) -> tuple[float, NoiseModel]:
        """Minimise the held-out score over the weight decay."""
        rows = rows[:: -(-len(rows) // min(TUNING_ROWS, self.rows))]
        score = HeldOutScore(self.data.take(rows), noise)

        def objective(penalty: float) -> tuple[float, float]:
            held = self._train(rows, weights[rows], penalty)
            value, slopes = score(held.outputs)
            return value, held.penalty_gradient(slopes)

        self._last = None
        bounds = REGRESSION_RANGE if self.data.regression else CLASSIFICATION_RANGE
        self.penalty, value = minimize_log_penalty(objective, self.penalty, bounds, progress)
        return value, score.noise

    def fold_score(self, rows: Tensor, weights: Tensor, noise: NoiseModel) -> float:
        """The score of predictions by networks trained without a fold of the rows.

        Leaving one out by one Newton step flatters a network, whose minima are many; beside models
        for which it is exact, networks are compared by predictions that saw nothing of the row.
        """
        outputs = torch.empty(len(rows), self.outputs, dtype=torch.float64)
        fold = torch.arange(len(rows)) % FOLDS
        for held_out in range(FOLDS):
            self._last = None
            kept, away = rows[fold != held_out], rows[fold == held_out]
            trained = self._train(kept, weights[kept], self.penalty)
            outputs[fold == held_out] = trained.predict(self.inputs[away])
        self._last = None
        return HeldOutScore(self.data.take(rows), noise)(outputs)[0]

    def fit(self, weights: Tensor, progress: Report) -> HeldOut:
        """Train on all rows, or on a sample, and leave each out.

        From the same start each time, so that a resumed run ends where an undisturbed one does.
        """
        self._last = None
        rows = self.data.sample(self.rows)
        held = self._train(rows, weights[rows], self.penalty)
        progress(0.5)
        _ = held.outputs
        progress(1.0)
        return held if len(rows) == len(weights) else _Extended(held, self.inputs, rows)

    def _train(self, rows: Tensor, weights: Tensor, penalty: float) -> NetworkHeldOut:
        generator = torch.Generator().manual_seed(self.data.seed)
        layers = [
            nn.Linear(self.inputs.shape[1], self.hidden),
            nn.Linear(self.hidden, self.outputs),
        ]
        with torch.no_grad():
            for layer in layers:
                layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()
        model = nn.Sequential(layers[0], nn.Tanh(), layers[1]).double()
        x, y = self.inputs[rows], self.data.observed[rows]
        target = y[:, None] if self.data.regression else y
        criterion = "mse" if self.data.regression else "cross_entropy"
        w = weights.clamp_min(SMALLEST_WEIGHT)
        data = (x, target)
        objective = Objective(model, criterion, data, weights=w, l2=penalty / len(rows))

        def evaluate(flat: Tensor) -> tuple[float, Tensor]:
            theta = flat.detach().requires_grad_()
            outputs = functional_call(model, objective.space.unflatten(theta), x)
            if self.data.regression:
                losses = (outputs - target).square().sum(1)
            else:
                losses = nn.functional.cross_entropy(outputs, target, reduction="none")
            decay = 0.5 * penalty / len(x) * theta.square().sum()
            value = torch.dot(w, losses) / len(x) + decay
            (gradient,) = torch.autograd.grad(value, theta)
            return value.item(), gradient

        start = objective.params_vector() if self._last is None else self._last
        found = minimize(evaluate, start, max_steps=TRAINING_STEPS, tolerance=1e-9)
        self._last = found.place
        return NetworkHeldOut(objective.with_params(found.place), penalty, self.data.regression, w)


class NetworkHeldOut:
    """Held-out outputs of a trained network."""

    def __init__(
        self, objective: Objective, penalty: float, regression: bool, weights: Tensor
    ) -> None:
        self.objective, self.penalty = objective, penalty
        self.regression, self.weights = regression, weights
        self.recipe = Cholesky()
        self.curvature = GaussNewton(objective)
        self._residual = 0.0

    def predict(self, inputs: Tensor) -> Tensor:
        """Outputs of the trained network at other rows ``[m, d]``."""
        theta = {name: value.detach() for name, value in self.objective.leaves().items()}
        hidden = torch.tanh(inputs @ theta["0.weight"].mT + theta["0.bias"])
        return hidden @ theta["2.weight"].mT + theta["2.bias"]

    @cached_property
    def _left_out(self) -> Any:
        return leave_one_out(self.objective, self.recipe, curvature=self.curvature)

    @property
    def outputs(self) -> Tensor:
        """Held-out outputs ``[n, C]``; those of the fit for a row that has none."""
        found = self._left_out
        return torch.where(found.unstable[:, None], found.fitted, found.predictions)

    @property
    def variance(self) -> Tensor | None:
        """For residuals: leverage makes them wider, as in a linear model."""
        if not self.regression:
            return None
        h = self._left_out.leverage.clamp(0, 0.99)
        return 1 + h / ((1 - h) * self.weights)

    @cached_property
    def _jacobian(self) -> Jacobian:
        return Jacobian(self.objective)

    def _pull(self, slopes: Tensor) -> Tensor:
        """$H^{-1} J^T E$ with the mean objective's curvature."""
        right = self._jacobian.T @ slopes.flatten().contiguous()
        solution = solve(self.curvature, right, self.recipe)
        self._residual = float(torch.as_tensor(solution.residual).max())
        return solution.value

    def weight_hypergradient(self, slopes: Tensor) -> Tensor:
        r"""$dF/dw_j = -r_j^T J_j H^{-1} J^T E / N + E_j^T (z_{-j} - z_j) / w_j$, to first order."""
        n = len(slopes)
        moved = (self._jacobian @ self._pull(slopes)).view(n, -1)
        found = self._left_out
        own = (slopes * (self.outputs - found.fitted)).sum(1) / self.weights
        return own - (self._residuals() * moved).sum(1) / n

    def _residuals(self) -> Tensor:
        fitted, target = self._left_out.fitted, self._target()
        if self.regression:
            return 2 * (fitted - target)
        hot = torch.nn.functional.one_hot(target, fitted.shape[1])
        return fitted.softmax(1) - hot

    def _target(self) -> Tensor:
        (batch,) = list(self.objective.batches("targets"))
        return self.objective.target(batch)

    def penalty_gradient(self, slopes: Tensor) -> float:
        """Derivative in the logarithm of the penalty, to first order: leverages are held fixed."""
        _ = self.outputs
        theta = self.objective.params_vector()
        return -(self.penalty / len(slopes)) * torch.dot(self._pull(slopes), theta).item()

    def certificate(self) -> dict[str, Any]:
        """Of the Gauss-Newton leave-one-out."""
        found = self._left_out.certificate()
        return {
            "method": "Gauss-Newton leave-one-out, Cholesky",
            "size": self.objective.space.dim,
            "penalty": self.penalty,
            "effective_dimension": found.pop("effective_parameters"),
            "relative_residual": self._residual,
            **found,
        }


class _Extended:
    """Rows outside the training sample: predicted as they are, with no effect on the others."""

    def __init__(self, held: NetworkHeldOut, inputs: Tensor, rows: Tensor) -> None:
        self._held, self._rows, self._n = held, rows, len(inputs)
        self.outputs = held.predict(inputs)
        self.outputs[rows] = held.outputs
        self.variance = self._spread(held.variance)

    def _spread(self, variance: Tensor | None) -> Tensor | None:
        if variance is None:
            return None
        every = torch.full((self._n,), variance.median().item(), dtype=variance.dtype)
        every[self._rows] = variance
        return every

    def weight_hypergradient(self, slopes: Tensor) -> Tensor:
        """Of the rows in the sample; zero for the others."""
        result = torch.zeros(self._n, dtype=torch.float64)
        result[self._rows] = self._held.weight_hypergradient(slopes[self._rows])
        return result

    def certificate(self) -> dict[str, Any]:
        """Of the sample."""
        return {**self._held.certificate(), "rows_in_training": len(self._rows)}
