"""The inner loss to second order at one point: gradient, Hessian, mixed derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from woodbury.bilevel.oracles import Joint
from woodbury.bilevel.parts import Parts, leaves, rows_of
from woodbury.curvature import Hessian
from woodbury.curvature.batches import Batch
from woodbury.errors import GradientError
from woodbury.operators import LinearOperator

if TYPE_CHECKING:
    from woodbury.bilevel.problem import Bilevel

__all__ = ["BatchLinearization", "DataLinearization", "Linearization"]


class Linearization:
    """The inner loss to second order.

    Attributes:
        value: the loss.
        gradient: its gradient in ``params``, flat ``[p]``.
        hessian: its Hessian in ``params`` as an operator; products are counted.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import Bilevel
        >>> inner = lambda w, a: 0.5 * (a * w.square()).sum()
        >>> problem = Bilevel(inner, lambda w, a: w.sum(), torch.ones(2), torch.tensor([1.0, 3.0]))
        >>> point = problem.linearize()
        >>> point.gradient, point.hessian @ torch.ones(2)
        (tensor([1., 3.]), tensor([1., 3.]))
    """

    value: float
    gradient: Tensor
    hessian: LinearOperator

    def mixed_parts(self, v: Tensor) -> Parts:
        """The mixed derivative times ``v [p]`` by name, ``None`` where there is none."""
        raise NotImplementedError


class BatchLinearization(Linearization):
    """One batch (or a loss without data), by differentiating the graph of its gradient again.

    The graph stays until this is dropped; a product is one backward pass through it, and that of
    the mixed derivative comes with it for little.
    """

    def __init__(self, problem: Bilevel, batch: Batch | None) -> None:
        self.problem = problem
        self.size = rows_of(batch)
        self.leaves = leaves(problem.params)
        self.hyper_leaves = leaves(problem.hyper)
        self.versions = self._versions()
        with torch.enable_grad():
            result = problem.call("inner", self.leaves, self.hyper_leaves, batch)
            self.value = result.item()
            parts: Sequence[Tensor | None] = [None] * len(self.leaves)
            if result.requires_grad:
                inputs = list(self.leaves.values())
                parts = torch.autograd.grad(result, inputs, create_graph=True, allow_unused=True)
        by_name = dict(zip(self.leaves, parts, strict=True))
        problem.require_used("inner", by_name)
        problem.counts.inner_gradients += self.size
        self.gradient = problem.flat_params(by_name)
        # A parameter in which the loss is linear has a gradient that depends on nothing.
        # Edges into the graph are enough: the gradient itself is flat above.
        self.roots = {
            name: get_gradient_edge(part)
            for name, part in by_name.items()
            if part is not None and part.requires_grad
        }
        self.hessian = _BatchHessian(self)

    def joint(self, v: Tensor) -> Joint:
        """Everything from one backward pass."""
        product, mixed = self.joint_parts(v)
        return Joint(self.value, self.gradient, product, self.problem.flat_hyper(mixed))

    def joint_parts(self, v: Tensor) -> tuple[Tensor, Parts]:
        """The Hessian times ``v``, and :meth:`mixed_parts`, from one backward pass."""
        inputs = [*self.leaves.values(), *self.hyper_leaves.values()]
        found = self._pull(v, inputs)
        cut = len(self.leaves)
        self.problem.counts.hessian_products += self.size
        self.problem.counts.mixed_products += self.size
        of_params = dict(zip(self.leaves, found[:cut], strict=True))
        of_hyper = dict(zip(self.hyper_leaves, found[cut:], strict=True))
        return self.problem.flat_params(of_params), self.problem.reduced(of_hyper)

    def hessian_product(self, v: Tensor) -> Tensor:
        """The Hessian times ``v [p]``."""
        found = self._pull(v, list(self.leaves.values()))
        self.problem.counts.hessian_products += self.size
        return self.problem.flat_params(dict(zip(self.leaves, found, strict=True)))

    def mixed_parts(self, v: Tensor) -> Parts:
        """The mixed derivative times ``v [p]`` by name, ``None`` where there is none."""
        found = self._pull(v, list(self.hyper_leaves.values()))
        self.problem.counts.mixed_products += self.size
        return self.problem.reduced(dict(zip(self.hyper_leaves, found, strict=True)))

    def _pull(self, v: Tensor, inputs: list[Tensor]) -> Sequence[Tensor | None]:
        if self._versions() != self.versions:
            raise GradientError(
                "params or hyper were changed in place since they were linearised; a linearisation "
                "stands for one point: make a new one after each step"
            )
        if not self.roots:
            return [None] * len(inputs)
        views = self.problem.space.unflatten(v.detach().contiguous())
        return torch.autograd.grad(
            list(self.roots.values()),
            inputs,
            [views[name] for name in self.roots],
            retain_graph=True,
            allow_unused=True,
        )

    def _versions(self) -> list[int]:
        tensors = [*self.problem.params.values(), *self.problem.hyper.values()]
        return [tensor._version for tensor in tensors]


class DataLinearization(Linearization):
    """All of the data, batch by batch; the graphs are kept while a budget of memory lasts."""

    def __init__(self, problem: Bilevel, cache: int | str | None) -> None:
        self.problem = problem
        self.value, self.gradient, _ = problem.gradient_parts("inner")
        self.hessian = _Counted(problem, Hessian(problem.inner_objective(), cache=cache))

    def mixed_parts(self, v: Tensor) -> Parts:
        """The mixed derivative times ``v [p]`` by name, ``None`` where there is none."""
        return self.problem.mixed_parts(v)


class _BatchHessian(LinearOperator):
    """The Hessian of one batch."""

    def __init__(self, linearization: BatchLinearization) -> None:
        space = linearization.problem.space
        super().__init__(
            (space.dim, space.dim),
            dtype=linearization.gradient.dtype,
            device=linearization.gradient.device,
            tags=frozenset({"symmetric"}),
            space=space,
        )
        self.linearization = linearization

    def _matvec(self, x: Tensor) -> Tensor:
        return self.linearization.hessian_product(x)

    def _matmat(self, X: Tensor) -> Tensor:
        return torch.stack([self._matvec(column) for column in X.unbind(1)], dim=1)


class _Counted(LinearOperator):
    """A Hessian over the data whose products are counted and reduced over processes."""

    def __init__(self, problem: Bilevel, hessian: Hessian) -> None:
        super().__init__(
            hessian.shape,
            dtype=hessian.dtype,
            device=hessian.device,
            tags=hessian.tags,
            space=hessian.space,
        )
        self.problem, self.inner = problem, hessian
        data = problem.data["inner"]
        self.size = 1 if data is None else data.num_examples

    def _matmat(self, X: Tensor) -> Tensor:
        self.problem.counts.hessian_products += self.size * X.shape[1]
        return self.problem.reduce(self.inner @ X)
