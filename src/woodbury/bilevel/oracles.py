"""What the oracles of a bilevel problem return, and what they count."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Gradients", "Joint", "OracleCounts"]


@dataclass
class OracleCounts:
    """What was asked of the two losses, in examples: a batch of 32 rows counts 32.

    A loss without data counts as one example. Algorithms that are compared at equal ``total`` have
    had equal work, up to the constant that a product costs more than a gradient.

    Attributes:
        values: forward passes without a gradient.
        inner_gradients: gradients of the inner loss.
        outer_gradients: gradients of the outer loss.
        hessian_products: products with the inner Hessian.
        mixed_products: products with the mixed second derivative.

    Example:
        >>> from woodbury.bilevel import OracleCounts
        >>> OracleCounts(inner_gradients=64, hessian_products=32).total
        96
    """

    values: int = 0
    inner_gradients: int = 0
    outer_gradients: int = 0
    hessian_products: int = 0
    mixed_products: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Gradients:
    """A loss and its gradients at a point.

    Attributes:
        value: the mean loss.
        params: its gradient in the inner variables, flat ``[p]``.
        hyper: its gradient in the hyperparameters, flat ``[h]``.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import Bilevel
        >>> loss = lambda w, a: 0.5 * (w - a).square().sum()
        >>> problem = Bilevel(loss, loss, torch.tensor([3.0]), torch.tensor([1.0]))
        >>> problem.gradients("inner")
        Gradients(value=2.0, params=tensor([2.]), hyper=tensor([-2.]))
    """

    value: float
    params: Tensor
    hyper: Tensor


@dataclass(frozen=True)
class Joint:
    r"""What one forward pass over the inner loss gives.

    Attributes:
        value: $g$.
        gradient: $u = \nabla_w g$, ``[p]``.
        hessian_product: $H v$, ``[p]``.
        mixed_product: $J v = \partial_\lambda\langle\nabla_w g, v\rangle$, ``[h]``.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import Bilevel
        >>> inner = lambda w, a: 0.5 * (a * w.square()).sum()
        >>> problem = Bilevel(inner, lambda w, a: w.sum(), torch.tensor([3.0]), torch.tensor([2.0]))
        >>> problem.joint(torch.ones(1))
        Joint(value=9.0, gradient=tensor([6.]), hessian_product=tensor([2.]),
        mixed_product=tensor([3.]))
    """

    value: float
    gradient: Tensor
    hessian_product: Tensor
    mixed_product: Tensor

    def __mul__(self, factor: float) -> Joint:
        parts = self.gradient, self.hessian_product, self.mixed_product
        return Joint(self.value * factor, *(part * factor for part in parts))

    def __add__(self, other: Joint) -> Joint:
        return Joint(
            self.value + other.value,
            self.gradient + other.gradient,
            self.hessian_product + other.hessian_product,
            self.mixed_product + other.mixed_product,
        )
