"""What Hessian, Gauss-Newton and Fisher have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature.batches import Batch
from woodbury.curvature.graphs import ForwardJacobian, GraphJacobian, Layout, Linearized, Room
from woodbury.curvature.linearization import Cache, CacheReport, Linearizations
from woodbury.curvature.losses import Product
from woodbury.curvature.objective import Objective
from woodbury.curvature.signals import make_signals
from woodbury.operators import LinearOperator
from woodbury.operators.tags import Tags

__all__ = ["BatchedCurvature", "LinearizedOutputs", "OutputCurvature", "empty_rows", "rows_of"]

Params = dict[str, Tensor]
# What is linearised, z(params), and the matrix between its Jacobians as a function of z.
Setting = tuple[Callable[[Params], Tensor], Callable[[Tensor], Product]]


# Transposing piece by piece, each within the cache, is twice as fast as all at once.
_PIECE_BYTES = 256 * 2**10


# Rows start where vector instructions like them to.
_ALIGNMENT = 64


def rows_of(X: Tensor) -> Tensor:
    """``X [n, k]`` as rows ``[k, n]``, each contiguous."""
    n, k = X.shape
    if X.stride(0) == 1:
        return X.t()
    rows = empty_rows(k, X)
    step = max(1, _PIECE_BYTES // (k * X.element_size()))
    if X.device.type != "cpu":
        step = n
    for start in range(0, n, step):
        rows[:, start : start + step] = X[start : start + step].t()
    return rows


def empty_rows(k: int, X: Tensor) -> Tensor:
    """Memory for ``k`` rows as long as the columns of ``X [n, ...]``."""
    n, pad = X.shape[0], _ALIGNMENT // X.element_size()
    return X.new_empty(k, -(-n // pad) * pad)[:, :n]


class Differentiable(torch.autograd.Function):
    """A product with a constant operator whose derivative is the product with its transpose."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, forward: Any, backward: Any) -> Tensor:
        ctx.products = forward, backward
        return forward(X.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        forward, backward = ctx.products
        return Differentiable.apply(gradients[0], backward, forward), None, None


class BatchedCurvature(LinearOperator):
    """A symmetric matrix that is a sum over batches, divided by ``N``, plus the regulariser."""

    def __init__(self, objective: Objective, cache: Cache, tags: Tags) -> None:
        n = objective.space.dim
        super().__init__(
            (n, n), dtype=objective.dtype, device=objective.device, tags=tags, space=objective.space
        )
        self.objective = objective
        self._layout = Layout(objective.space)
        self._linearizations = Linearizations(objective, self._linearize, cache)

    def cache_report(self) -> CacheReport:
        """What is kept between products, and why; ``print`` it to read it."""
        return self._linearizations.report(self._method())

    def _linearize(self, batch: Batch, room: Room, columns: int) -> Linearized:
        raise NotImplementedError

    def _method(self) -> str:
        raise NotImplementedError

    def _matmat(self, X: Tensor) -> Tensor:
        if X.requires_grad and torch.is_grad_enabled():
            return Differentiable.apply(X, self._product, self._product)
        return self._product(X)

    def _product(self, X: Tensor) -> Tensor:
        rows = rows_of(X.detach())
        out = empty_rows(len(rows), X)
        what = f"{type(self).__name__} product"
        # Dividing before the sum costs nothing where N is known; half precision might underflow.
        count = self.objective.known_examples if torch.finfo(self.dtype).bits >= 32 else None
        factor = 1.0 if count is None else 1 / count
        for index, batch in enumerate(self._linearizations.passes(what, len(rows))):
            batch.apply(rows, out, factor, add=index > 0)
        if count is None:
            out /= self.objective.num_examples
        l2 = self.objective.l2
        if isinstance(l2, Tensor):
            out.addcmul_(rows, l2)
        elif l2:
            out.add_(rows, alpha=l2)
        return out.t()


def semidefinite_tags(objective: Objective, *, convex: bool) -> Tags:
    """Tags of ``sum_i w_i J_i^T M_i J_i / N + diag(l2)``, ``M_i`` semidefinite if ``convex``."""
    weights, l2 = objective.weights, torch.as_tensor(objective.l2)
    if not convex or (weights is not None and bool((weights < 0).any())) or bool((l2 < 0).any()):
        return frozenset({"symmetric"})
    definite = bool((l2 > 0).all())
    return frozenset({"positive_definite" if definite else "positive_semidefinite"})


class LinearizedOutputs:
    """Linearises ``z(params)`` of a batch in the way that suits the budget and the model.

    With a budget: by signals where the model allows it, otherwise by graphs. Without: in forward
    mode for a single vector where torch can, otherwise by graphs that are dropped after use.
    """

    def __init__(
        self, objective: Objective, layout: Layout, setting: Callable[[Batch], Setting]
    ) -> None:
        self.objective, self.layout, self.setting = objective, layout, setting
        self.forward_mode = True
        self.try_signals = True
        self.method = "differentiate the kept graphs of the outputs and of their pullback"

    def __call__(self, batch: Batch, room: Room, columns: int) -> Linearized:
        """The linearisation of ``batch`` for a product with so many ``columns``."""
        if room.left == 0 and columns == 1 and self.forward_mode:
            return _OneVector(self, batch)
        if room.left > 0 and self.try_signals:
            evaluate, make_middle = self.setting(batch)
            signals = make_signals(
                evaluate,
                self.objective.leaves(),
                self.layout,
                make_middle,
                self.objective.resident(batch),
                room,
            )
            if signals is not None:
                self.method = "multiply the kept inputs and signals of the linear layers"
                return signals
            self.try_signals = False
        return self.graph(batch)

    def graph(self, batch: Batch) -> GraphJacobian:
        """By graphs, which every model allows."""
        evaluate, make_middle = self.setting(batch)
        leaves = self.objective.leaves()
        z = evaluate(leaves)
        result = GraphJacobian(z, leaves, self.layout, make_middle(z.detach()))
        result.measure(self.objective.resident(batch))
        return result


class _OneVector(Linearized):
    """Forward mode, or graphs from the first time on that torch cannot do that."""

    def __init__(self, ways: LinearizedOutputs, batch: Batch) -> None:
        self.ways, self.batch = ways, batch

    def apply(self, rows: Tensor, out: Tensor, factor: float, *, add: bool) -> None:
        """``factor * J^T M J`` times the one row there is."""
        with torch.enable_grad():  # solvers multiply under no_grad
            self._apply(rows, out, factor, add=add)

    def _apply(self, rows: Tensor, out: Tensor, factor: float, *, add: bool) -> None:
        way: Linearized
        if self.ways.forward_mode:
            objective, layout = self.ways.objective, self.ways.layout
            evaluate, make_middle = self.ways.setting(self.batch)
            way = ForwardJacobian(evaluate, objective.leaves(), layout, make_middle)
            try:
                way.apply(rows, out, factor, add=add)
                self.used = way.used
                return
            except (NotImplementedError, RuntimeError):
                self.ways.forward_mode = False
        way = self.ways.graph(self.batch)
        way.apply(rows, out, factor, add=add)
        self.used = way.used


class OutputCurvature(BatchedCurvature):
    """``sum_i J_i^T M_i J_i / N`` plus the regulariser, with ``J_i`` the Jacobian of ``z_i``."""

    def __init__(self, objective: Objective, cache: Cache, tags: Tags) -> None:
        super().__init__(objective, cache, tags)
        self._outputs = LinearizedOutputs(objective, self._layout, self._setting)

    def _setting(self, batch: Batch) -> Setting:
        raise NotImplementedError

    def _linearize(self, batch: Batch, room: Room, columns: int) -> Linearized:
        return self._outputs(batch, room, columns)

    def _method(self) -> str:
        return self._outputs.method
