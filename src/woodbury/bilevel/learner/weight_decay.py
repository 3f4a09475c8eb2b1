"""Learned weight decay: one strength per weight, per tensor or for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from woodbury.bilevel.learner.hyper import Hyper, own, unwrapped
from woodbury.curvature.functions import Selection, select_parameters
from woodbury.errors import ArgumentError
from woodbury.spaces import Space

__all__ = ["WeightDecay"]


class WeightDecay(Hyper):
    r"""The penalty $\tfrac12 \sum_i e^{\lambda_i} w_i^2$, with a $\lambda$ for every weight.

    $e^{\lambda}$ is the number that the optimizers of torch call ``weight_decay``: the penalty adds
    $e^{\lambda_i} w_i$ to the gradient. Set that of the optimizer to 0. The mixed derivative
    $e^{\lambda_i} w_i$ is diagonal, so a hypergradient of millions of decays costs no pass through
    the network beyond those of the linear solve.

    Args:
        model: whose weights are penalised.
        initial: $e^{\lambda}$ at the start, positive.
        largest: bound of $e^{\lambda}$, kept after every step. Gradient descent of step $\alpha$
            leaves for infinity where a decay is beyond $2 / \alpha$; a bound of $1 / \alpha$ is
            safe.
        per: ``"weight"`` for one decay per entry of every parameter, ``"tensor"`` for one per
            parameter tensor, ``"all"`` for a single one.
        params: which parameters: names, a list of parameters, or a function
            ``(name, parameter) -> bool``; default all that require a gradient.

    Raises:
        ArgumentError: ``initial`` is not positive or above ``largest``, ``per`` is none of these,
            or ``params`` names what the model does not have.
        GradientError: no parameter is selected.

    Cost: with ``per="weight"`` memory of two vectors of the parameters (the decays and their
    logarithms); three passes over them in every training step.

    Source: Lorraine, Vicol and Duvenaud, "Optimizing Millions of Hyperparameters by Implicit
    Differentiation" (AISTATS 2020), section 4.1; their penalty is without the factor one half.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import WeightDecay
        >>> model = torch.nn.Linear(3, 2)
        >>> [len(WeightDecay(model, 1e-2, per=per).log_decay) for per in ("weight", "tensor")]
        [8, 2]
        >>> WeightDecay(model, 0.5, per="all").decays()["bias"]
        tensor([0.5000, 0.5000])
    """

    def __init__(
        self,
        model: nn.Module,
        initial: float = 1e-4,
        *,
        largest: float = math.inf,
        per: Literal["weight", "tensor", "all"] = "weight",
        params: Selection = None,
    ) -> None:
        super().__init__()
        if not 0 < initial < math.inf:
            raise ArgumentError(
                f"initial is {initial}; a decay exp(lambda) is positive: for almost none give 1e-8"
            )
        if not initial <= largest:
            raise ArgumentError(f"largest is {largest}; it must be at least initial, {initial}")
        selected = select_parameters(unwrapped(model), params)
        self.space = Space.of(selected)
        sizes = {"weight": self.space.dim, "tensor": len(selected), "all": 1}
        if per not in sizes:
            raise ArgumentError(f"per is {per!r}; use 'weight', 'tensor' or 'all'")
        self.per, self.largest = per, largest
        like = next(iter(selected.values()))
        self.log_decay = own(like.new_full((sizes[per],), math.log(initial)))
        self._cached: tuple[Tensor, int, Tensor] | None = None

    def project(self) -> None:
        """Bring the decays back to ``largest``."""
        if self.largest < math.inf:
            self.log_decay.clamp_(max=math.log(self.largest))

    def flat(self) -> Tensor:
        r"""$e^{\lambda}$ in the shape of ``log_decay``, not to be changed."""
        key = self.log_decay
        if (
            self._cached is None
            or self._cached[0] is not key
            or self._cached[1] != key._version  # an optimizer has changed them in place
        ):
            self._cached = key, key._version, key.detach().exp()
        return self._cached[2]

    def decays(self) -> dict[str, Tensor]:
        r"""$e^{\lambda}$ by name of the parameter, in its shape."""
        return self._spread(self.flat())

    def penalty(self, params: Mapping[str, Tensor]) -> Tensor:
        r"""$\tfrac12 \sum_i e^{\lambda_i} w_i^2$, differentiable in ``params`` by name."""
        parts = [_Penalty.apply(params[name], decay) for name, decay in self.decays().items()]
        return torch.stack(parts).sum()

    def add_gradient(self, params: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
        r"""Add $e^{\lambda} w$ to ``out``; with a vector in place of $w$, the Hessian product."""
        for name, decay in self.decays().items():
            out[name].addcmul_(decay, params[name])

    def mixed(self, params: Mapping[str, Tensor], q: Mapping[str, Tensor]) -> Tensor:
        r"""$\partial_\lambda \langle e^\lambda w, q\rangle$, in the shape of ``log_decay``."""
        if self.per == "weight":
            result = torch.empty_like(self.log_decay)
            for name, out in self._spread(result).items():
                torch.mul(params[name], q[name], out=out)
            return result.mul_(self.flat())
        sums = [torch.vdot(params[n].flatten(), q[n].flatten()) for n in self.space.shapes]
        each = torch.stack(sums)
        return (each if self.per == "tensor" else each.sum().view(1)) * self.flat()

    def _spread(self, values: Tensor) -> dict[str, Tensor]:
        if self.per == "weight":
            return self.space.unflatten(values)
        several = values if self.per == "tensor" else values.expand(len(self.space.shapes))
        shapes = self.space.shapes.items()
        return {name: v.expand(s) for (name, s), v in zip(shapes, several, strict=True)}


class _Penalty(torch.autograd.Function):
    """``0.5 * sum(decay * w**2)`` that keeps nothing but ``w``."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, decay: Tensor) -> Tensor:
        ctx.save_for_backward(w, decay)
        return 0.5 * torch.vdot((decay * w).flatten(), w.flatten())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        w, decay = ctx.saved_tensors
        return decay * w * gradients[0], None
