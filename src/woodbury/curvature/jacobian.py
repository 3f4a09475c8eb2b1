"""The Jacobian of the outputs, or of the losses, of all examples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from woodbury.curvature.batches import Batch
from woodbury.curvature.finite import finite_outputs
from woodbury.curvature.graphs import JacobianLinearized, Layout, Linearized, Room
from woodbury.curvature.linearization import Cache, CacheReport, Linearizations
from woodbury.curvature.losses import per_example
from woodbury.curvature.matrix import (
    Differentiable,
    LinearizedOutputs,
    Params,
    Setting,
    empty_rows,
    rows_of,
)
from woodbury.curvature.objective import Objective
from woodbury.errors import ArgumentError, ShapeError
from woodbury.operators import LinearOperator

__all__ = ["Jacobian"]


class Jacobian(LinearOperator):
    r"""The Jacobian $J = \partial f / \partial\theta$ of what the model says about all examples.

    Args:
        objective: at its parameters of this moment. Weights and regulariser do not enter.
        of: ``"outputs"``: rows are the entries of ``objective.predict()`` ``[N, ...]`` in their
            order in memory, row ``i * C + c`` for output ``c`` of example ``i``. ``"losses"``: row
            ``i`` is the gradient of the loss of example ``i``.
        cache: as for :class:`GaussNewton`.

    Raises:
        ArgumentError: ``of`` or ``cache`` is not valid.
        DataError: a shuffling loader whose batches do not say which rows they hold.
        ShapeError: outputs of another shape in another batch, at a product.
        StructureError: the objective gives no outputs.

    Cost: made with one forward pass over the first batch. ``J v`` about 0.6 gradients, ``J^T u``
    about 0.6; beyond the budget 1.6 and 1.

    Example:
        >>> import torch
        >>> from woodbury import Jacobian, Objective
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> Jacobian(Objective(model, "mse", (x, torch.zeros(2, 1)))).to_dense()
        tensor([[1., 2.],
                [3., 4.]])
    """

    def __init__(self, objective: Objective, of: str = "outputs", *, cache: Cache = "auto") -> None:
        if of not in ("outputs", "losses"):
            raise ArgumentError(f"of is {of!r}; use 'outputs' or 'losses'")
        objective.require_rows("the Jacobian")
        self.objective = objective
        self.of = of
        self._each = torch.Size(()) if of == "losses" else objective.output_shape()
        self._width = math.prod(self._each)
        super().__init__(
            (objective.num_examples * self._width, objective.space.dim),
            dtype=objective.dtype,
            device=objective.device,
            space=objective.space,
        )
        self._outputs = LinearizedOutputs(objective, Layout(objective.space), self._setting)
        self._outputs.forward_mode = False
        self._linearizations = Linearizations(objective, self._linearize, cache)

    def cache_report(self) -> CacheReport:
        """What is kept between products, and why; ``print`` it to read it."""
        return self._linearizations.report(self._outputs.method)

    def _setting(self, batch: Batch) -> Setting:
        objective = self.objective

        def evaluate(params: Params) -> Tensor:
            if self.of == "losses":
                losses = per_example(objective.losses(params, batch), "the Jacobian of losses")
                return finite_outputs(losses, batch)
            z = objective.outputs(params, batch)
            if z.shape[1:] != self._each:
                raise ShapeError(
                    f"outputs of batch {batch.index} have shape {tuple(z.shape)}, those of the "
                    f"first batch [B, {', '.join(map(str, self._each))}]; pad them to one shape"
                )
            return finite_outputs(z, batch)

        return evaluate, lambda z: lambda U: U

    def _linearize(self, batch: Batch, room: Room, columns: int) -> Linearized:
        return self._outputs(batch, room, columns)

    def _matmat(self, X: Tensor) -> Tensor:
        if X.requires_grad and torch.is_grad_enabled():
            return Differentiable.apply(X, self._forward, self._backward)
        return self._forward(X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        if Y.requires_grad and torch.is_grad_enabled():
            return Differentiable.apply(Y, self._backward, self._forward)
        return self._backward(Y)

    def _forward(self, X: Tensor) -> Tensor:
        rows = rows_of(X.detach())
        pieces = []
        for batch in self._linearizations.passes("Jacobian product", len(rows)):
            assert isinstance(batch, JacobianLinearized)  # made by LinearizedOutputs
            pieces.append((batch.rows, batch.jvp(rows).movedim(0, -1)))
        return self.objective.in_order(pieces).reshape(self.shape[0], len(rows))

    def _backward(self, Y: Tensor) -> Tensor:
        k = Y.shape[1]
        U = Y.detach().reshape(self.objective.num_examples, *self._each, k).movedim(-1, 0)
        out = empty_rows(k, Y.new_empty(self.shape[1], 0))
        for index, batch in enumerate(self._linearizations.passes("transposed product", k)):
            assert isinstance(batch, JacobianLinearized)  # made by LinearizedOutputs
            batch.vjp(U[:, batch.rows].contiguous(), out, add=index > 0)
        return out.t()
