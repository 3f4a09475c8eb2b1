"""Linearisations of one batch by automatic differentiation, for any model.

A product needs no forward pass: the graphs below are built once and differentiated again for every
vector. Blocks are ``[k, n]`` here, one vector a row, so that a row splits into parameters by views.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from woodbury.curvature.losses import Product
from woodbury.curvature.memory import graph_bytes
from woodbury.spaces import Space

__all__ = ["ForwardJacobian", "GraphHessian", "GraphJacobian", "Layout", "Linearized"]


class Layout:
    """How a flat vector splits into parameters."""

    def __init__(self, space: Space) -> None:
        self.names = list(space.shapes)
        self.sizes = list(space.sizes.values())
        self.shapes = list(space.shapes.values())

    def views(self, flat: Tensor) -> list[Tensor]:
        """One view of a contiguous ``[n]`` per parameter."""
        parts = flat.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def write(
        self, parts: Sequence[Tensor | None], row: Tensor, factor: float = 1.0, *, add: bool
    ) -> None:
        """Write ``factor`` times parameter-shaped ``parts`` into ``row [n]``; ``None`` is zero."""
        for view, part in zip(self.views(row), parts, strict=True):
            if part is None:
                if not add:
                    view.zero_()
            elif add:
                view.add_(part, alpha=factor)
            else:
                torch.mul(part, factor, out=view)


@dataclass(frozen=True)
class Room:
    """Bytes for the linearisation of one batch.

    Attributes:
        left: what is left of the budget; 0 where nothing more is kept.
        share: its part of the whole budget, were it divided among all examples.
    """

    left: int
    share: int


class Linearized:
    """One batch, linearised: what it costs to keep, and where its rows are.

    Attributes:
        nbytes: what it keeps alive beyond the parameters and data in memory.
        used: names of the parameters that matter to it.
        rows: places of its examples in the data.
    """

    nbytes: int = 0
    used: frozenset[str] = frozenset()
    rows: slice | Tensor = slice(0)

    def apply(self, rows: Tensor, out: Tensor, factor: float, *, add: bool) -> None:
        """``factor`` times the matrix of this batch times ``rows [k, n]``, into ``out [k, n]``."""
        raise NotImplementedError


class JacobianLinearized(Linearized):
    """Outputs ``z`` of one batch to first order, and a matrix ``M`` between them.

    :meth:`apply` multiplies by ``J^T M J``.
    """

    middle: Product

    def jvp(self, rows: Tensor) -> Tensor:
        """``J`` times every row of ``[k, n]``: ``[k, *z.shape]``."""
        raise NotImplementedError

    def vjp(self, U: Tensor, out: Tensor, *, add: bool) -> None:
        """``J^T`` times ``U [k, *z.shape]``, written or added to ``out [k, n]``."""
        raise NotImplementedError

    def apply(self, rows: Tensor, out: Tensor, factor: float, *, add: bool) -> None:
        """``factor * J^T M J`` times every row."""
        self.vjp(self.middle(self.jvp(rows)) * factor, out, add=add)


class GraphJacobian(JacobianLinearized):
    """``J`` by differentiating the graph of ``z``, and the graph of its pullback.

    ``u -> J^T u`` is linear, so its derivative in ``u`` along ``v`` is ``J v``: one more backward
    pass, that of a forward pass in cost. (The trick is J. Townsend's of 2017.)
    """

    def __init__(
        self, output: Tensor, leaves: dict[str, Tensor], layout: Layout, middle: Product
    ) -> None:
        self.output, self.layout, self.middle = output, layout, middle
        self.shape = output.shape
        self.leaves: list[Tensor] = []
        self.slots: list[int] = []
        self.edges: list[Any] = []
        if not output.requires_grad:
            return
        self.dummy = torch.zeros_like(output).requires_grad_()
        parts = torch.autograd.grad(
            output, list(leaves.values()), self.dummy, create_graph=True, allow_unused=True
        )
        self.slots = [i for i, part in enumerate(parts) if part is not None]
        self.used = frozenset(layout.names[i] for i in self.slots)
        self.leaves = [list(leaves.values())[i] for i in self.slots]
        pulled = [part for part in parts if part is not None]
        # An edge into the graph is enough; the value of the pullback at zero is of no use.
        self.edges = [get_gradient_edge(part) for part in pulled]
        self.roots = [output, *pulled]

    def measure(self, ignore: Sequence[Tensor]) -> None:
        """Find ``nbytes``; once, before the first product."""
        if self.edges:
            self.nbytes = graph_bytes(self.roots, [*ignore, *self.roots[1:]])
            self.roots = []

    def jvp(self, rows: Tensor) -> Tensor:
        """``J`` times every row of ``[k, n]``."""
        result = torch.zeros(rows.shape[0], *self.shape, dtype=rows.dtype, device=rows.device)
        for row, target in zip(rows, result, strict=True):
            if not self.edges:
                break
            views = self.layout.views(row)
            (part,) = torch.autograd.grad(
                self.edges,
                [self.dummy],
                [views[i] for i in self.slots],
                retain_graph=True,
                allow_unused=True,
            )
            if part is not None:
                target.copy_(part)
        return result

    def vjp(self, U: Tensor, out: Tensor, *, add: bool) -> None:
        """``J^T`` times ``U``."""
        for u, row in zip(U, out, strict=True):
            parts: list[Tensor | None] = [None] * len(self.layout.names)
            if self.edges:
                found = torch.autograd.grad(self.output, self.leaves, u, retain_graph=True)
                for i, part in zip(self.slots, found, strict=True):
                    parts[i] = part
            self.layout.write(parts, row, add=add)


@functools.cache
def _load_forward_mode() -> None:
    """Let torch load what forward mode needs, which warns of a deprecation of its own making."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


class ForwardJacobian(JacobianLinearized):
    """``J^T M J`` times one vector with nothing kept: forward mode, then one backward pass.

    Raises whatever torch raises where an operation of the model has no forward-mode derivative.
    """

    def __init__(
        self,
        evaluate: Callable[[dict[str, Tensor]], Tensor],
        leaves: dict[str, Tensor],
        layout: Layout,
        make_middle: Callable[[Tensor], Product],
    ) -> None:
        self.evaluate, self.leaves = evaluate, leaves
        self.layout, self.make_middle = layout, make_middle

    def push(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` (with its graph) and ``J row``."""
        _load_forward_mode()
        with forward_ad.dual_level():
            views = self.layout.views(row)
            duals = {
                name: forward_ad.make_dual(leaf, view)
                for (name, leaf), view in zip(self.leaves.items(), views, strict=True)
            }
            z, dz = forward_ad.unpack_dual(self.evaluate(duals))
            return z, torch.zeros_like(z) if dz is None else dz.detach()

    def apply(self, rows: Tensor, out: Tensor, factor: float, *, add: bool) -> None:
        """``factor * J^T M J`` times the one row there is."""
        z, dz = self.push(rows[0])
        # Outside the dual level, or torch would push the backward pass forward, too.
        cotangent = self.make_middle(z.detach())(dz[None])[0] * factor
        parts: Sequence[Tensor | None] = [None] * len(self.leaves)
        if z.requires_grad:
            leaves = list(self.leaves.values())
            parts = torch.autograd.grad(z, leaves, cotangent, allow_unused=True)
        names = self.layout.names
        self.used = frozenset(n for n, p in zip(names, parts, strict=True) if p is not None)
        self.layout.write(parts, out[0], add=add)


class GraphHessian(Linearized):
    """The Hessian of a loss by differentiating the graph of its gradient."""

    def __init__(self, loss: Tensor, leaves: dict[str, Tensor], layout: Layout) -> None:
        self.layout = layout
        self.leaves = list(leaves.values())
        self.slots: list[int] = []
        self.roots: list[Tensor] = []
        if loss.requires_grad:
            parts = torch.autograd.grad(loss, self.leaves, create_graph=True, allow_unused=True)
            names = [name for name, part in zip(leaves, parts, strict=True) if part is not None]
            self.used = frozenset(names)
            # A parameter in which the loss is linear has a gradient that depends on nothing.
            curved = [i for i, part in enumerate(parts) if part is not None and part.requires_grad]
            self.slots, self.roots = curved, [parts[i] for i in curved]
        self.edges = [get_gradient_edge(root) for root in self.roots]

    def measure(self, ignore: Sequence[Tensor]) -> None:
        """Find ``nbytes``; once, before the first product."""
        self.nbytes = graph_bytes(self.roots, [*ignore, *self.roots])
        self.roots = []

    def apply(self, rows: Tensor, out: Tensor, factor: float, *, add: bool) -> None:
        """``factor`` times the Hessian times every row."""
        for row, target in zip(rows, out, strict=True):
            parts: Sequence[Tensor | None] = [None] * len(self.leaves)
            if self.edges:
                views = self.layout.views(row)
                parts = torch.autograd.grad(
                    self.edges,
                    self.leaves,
                    [views[i] for i in self.slots],
                    retain_graph=True,
                    allow_unused=True,
                )
            self.layout.write(parts, target, factor, add=add)
