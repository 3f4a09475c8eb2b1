r"""Criteria that are negative log-likelihoods: softmax, Gaussian and Bernoulli.

Each is $\sum_e a_e\,(-\log p(y_e \mid f_e))$ up to a constant, with a weight $a_e$ for every
element (a token, a pixel, a regression target). Its Hessian in the outputs is $a_e
\operatorname{Cov}_e$, which is also the Fisher matrix of the likelihood under the same weights:
Gauss-Newton and exact Fisher are one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from woodbury.curvature.draws import Draws
from woodbury.curvature.losses import Criterion, Product, reduce_losses
from woodbury.errors import ShapeError

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood"]


class Likelihood(Criterion):
    """A weighted negative log-likelihood, convex in the outputs."""

    def mass(self, output: Tensor, target: Any) -> Tensor:
        """The weights ``a``, broadcastable to ``output``."""
        raise NotImplementedError

    def covariance(self, output: Tensor) -> Product:
        """The map ``U -> Cov U`` (a new tensor) for ``U`` of shape ``[k, *output.shape]``."""
        raise NotImplementedError

    def root_columns(self, output: Tensor, target: Any) -> Iterator[Tensor]:
        """Tensors ``[*output.shape]``: ``c`` in all, with ``sum_c s_c s_c^T`` the Hessian.

        Each belongs to one element of every example, so that no two elements mix.
        """
        root = (self.mass(output, target) * self._variance(output)).sqrt().expand_as(output)
        for k in range(output[0].numel()):
            column = torch.zeros_like(output)
            column.view(len(output), -1)[:, k] = root.reshape(len(output), -1)[:, k]
            yield column

    def _variance(self, output: Tensor) -> Tensor:
        """The variance of independent targets."""
        raise NotImplementedError

    def score(self, output: Tensor, draws: Draws) -> Tensor:
        """Gradient in the outputs of ``-log p(y | f)`` at a label ``y`` drawn from ``p(. | f)``."""
        raise NotImplementedError

    def curvature(self, output: Tensor, target: Any, weights: Tensor | None) -> Product:
        """``U -> H U`` for ``U [k, *output.shape]``, ``H`` the Hessian of ``sum_i w_i loss_i``."""
        mass, covariance = self.mass(output, target), self.covariance(output)
        if weights is not None:
            mass = mass * weights.view(-1, *[1] * (output.dim() - 1))
        return lambda U: covariance(U).mul_(mass)


class Categorical(Likelihood):
    r"""Softmax cross-entropy, $\operatorname{Cov} = \operatorname{diag}(p) - p p^T$.

    Classes are on axis 1 as torch has it, or on the last axis where ``classes_last`` is set (for
    the ``logits`` of models of Hugging Face style).
    """

    def __init__(self, loss: nn.CrossEntropyLoss) -> None:
        super().__init__(self._elements, loss.reduction, convex=True)
        self.weight = loss.weight
        self.ignore_index = loss.ignore_index
        self.smoothing = loss.label_smoothing
        self.classes_last = False

    def losses(self, output: Tensor, target: Any, size: int) -> Tensor:
        """Losses ``[size]``."""
        losses = self._elements(output, target)
        if self.add or losses.dim() == 1:
            return reduce_losses(losses, size, add=True)
        return reduce_losses(losses * self._share(output, target), size, add=True)

    def mass(self, output: Tensor, target: Any) -> Tensor:
        """The total weight of the classes in each element's target."""
        axis, weight = self._axis(output), self._class_weights(output)
        counted = self._counted(output, target)
        if not target.is_floating_point():
            own = counted
            if weight is not None:
                own = counted * weight[target.where(target != self.ignore_index, 0)]
        else:
            soft = target.to(output.dtype).movedim(axis, -1)
            own = (soft if weight is None else soft * weight).sum(-1)
        mass = own
        if self.smoothing:
            spread = 1.0 if weight is None else weight.mean()
            mass = (1 - self.smoothing) * own + self.smoothing * spread * counted
        if not self.add and mass.dim() > 1:
            mass = mass * self._share(output, target)
        return mass.unsqueeze(axis)

    def covariance(self, output: Tensor) -> Product:
        """``diag(p) - p p^T`` in every element."""
        axis = self._axis(output)
        p = output.detach().softmax(axis)

        def product(U: Tensor) -> Tensor:
            pU = p * U
            return pU.sub_(p * pU.sum(axis + 1, keepdim=True))

        return product

    def score(self, output: Tensor, draws: Draws) -> Tensor:
        """``p - onehot(y)`` with ``y ~ p``."""
        axis = self._axis(output)
        p = output.detach().softmax(axis).movedim(axis, -1)
        y = draws.categorical(p).unsqueeze(-1)
        return p.scatter_add(-1, y, -torch.ones_like(y, dtype=p.dtype)).movedim(-1, axis)

    def root_columns(self, output: Tensor, target: Any) -> Iterator[Tensor]:
        """``sqrt(a_e p_c) (onehot(c) - p)`` in one element ``e`` after the other."""
        axis = self._axis(output)
        p = output.detach().softmax(axis).movedim(axis, -1)
        mass = self.mass(output, target).expand_as(output).movedim(axis, -1)
        root = (mass * p).sqrt().reshape(len(p), -1, p.shape[-1])
        flat = p.reshape(root.shape)
        for element in range(root.shape[1]):
            for c in range(root.shape[2]):
                column = torch.zeros_like(flat)
                column[:, element] = -flat[:, element]
                column[:, element, c] += 1
                column[:, element] *= root[:, element, c, None]
                yield column.view(p.shape).movedim(-1, axis)

    def _axis(self, output: Tensor) -> int:
        if output.dim() < 2:
            raise ShapeError(
                f"outputs have shape {tuple(output.shape)}; cross-entropy needs classes on axis 1"
            )
        return output.dim() - 1 if self.classes_last else 1

    def _elements(self, output: Tensor, target: Tensor) -> Tensor:
        axis = self._axis(output)
        soft = target.is_floating_point()
        expected = output.shape if soft else output.shape[:axis] + output.shape[axis + 1 :]
        if target.shape != expected:
            raise ShapeError(
                f"cross-entropy with outputs {tuple(output.shape)} (classes on axis {axis}) needs "
                f"targets {tuple(expected)}, got {tuple(target.shape)}; classes belong on axis 1, "
                "or on the last axis of an output named 'logits'"
            )
        return F.cross_entropy(
            output.movedim(axis, 1),
            target.to(output.dtype).movedim(axis, 1) if soft else target,
            weight=self._class_weights(output),
            ignore_index=self.ignore_index,
            label_smoothing=self.smoothing,
            reduction="none",
        )

    def _class_weights(self, output: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(output)

    def _counted(self, output: Tensor, target: Tensor) -> Tensor:
        """One for every element that counts, zero for the others."""
        if not target.is_floating_point():
            return (target != self.ignore_index).to(output.dtype)
        return torch.ones_like(output.select(self._axis(output), 0))

    def _share(self, output: Tensor, target: Tensor) -> Tensor:
        """What one element counts in the mean of its example."""
        counted = self._counted(output, target)
        number = counted.flatten(1).sum(1).clamp(min=1)
        return (1 / number).view(-1, *[1] * (counted.dim() - 1))


class Gaussian(Likelihood):
    r"""Squared error $\|f - y\|^2$ (per example: mean or sum over its elements).

    As a likelihood: unit variance and weight $a = 2/K$ for the mean over $K$ elements, $a = 2$ for
    the sum, so that the loss is the negative log-likelihood up to a constant.
    """

    def __init__(self, loss: nn.MSELoss) -> None:
        super().__init__(self._elements, loss.reduction, convex=True)

    def mass(self, output: Tensor, target: Any) -> Tensor:
        """``2``, divided by the number of elements of an example for the mean."""
        elements = 1 if self.add else max(1, output[0].numel())
        return torch.full_like(output[:1], 2 / elements)

    def covariance(self, output: Tensor) -> Product:
        """The identity."""
        return torch.clone

    def _variance(self, output: Tensor) -> Tensor:
        return torch.ones_like(output)

    def score(self, output: Tensor, draws: Draws) -> Tensor:
        """A standard normal tensor."""
        return draws.normal(output.shape[1:]).to(output.dtype)

    def _elements(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - _same_shape(output, target, "mse").to(output.dtype)).square()


class Bernoulli(Likelihood):
    """Binary cross-entropy on logits, ``Cov = p (1 - p)``."""

    def __init__(self, loss: nn.BCEWithLogitsLoss) -> None:
        super().__init__(self._elements, loss.reduction, convex=True)
        self.weight = loss.weight
        self.pos_weight = loss.pos_weight

    def mass(self, output: Tensor, target: Any) -> Tensor:
        """The weight of the label of each element."""
        mass = torch.ones_like(output)
        if self.pos_weight is not None:
            mass = 1 + (self.pos_weight.to(output) - 1) * target
        if self.weight is not None:
            mass = mass * self.weight.to(output)
        return mass if self.add else mass / max(1, output[0].numel())

    def covariance(self, output: Tensor) -> Product:
        """``p (1 - p)`` in every element."""
        variance = self._variance(output)
        return lambda U: variance * U

    def _variance(self, output: Tensor) -> Tensor:
        p = output.detach().sigmoid()
        return p * (1 - p)

    def score(self, output: Tensor, draws: Draws) -> Tensor:
        """``p - y`` with ``y ~ Bernoulli(p)``."""
        p = output.detach().sigmoid()
        return p - draws.bernoulli(p)

    def _elements(self, output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            output,
            _same_shape(output, target, "binary cross-entropy").to(output.dtype),
            weight=None if self.weight is None else self.weight.to(output),
            pos_weight=None if self.pos_weight is None else self.pos_weight.to(output),
            reduction="none",
        )


def _same_shape(output: Tensor, target: Tensor, name: str) -> Tensor:
    if output.shape != target.shape:
        raise ShapeError(
            f"{name} with outputs {tuple(output.shape)} and targets {tuple(target.shape)}: they "
            "must have one shape (a model with one output gives [B, 1]; use target[:, None])"
        )
    return target
