r"""Softmax models linear in their parameters: a linear model, the last layer of a network.

The Jacobian of their outputs is $I_C \otimes a_i^T$ with the inputs $a_i$ of the layer, so that
the curvature and the block leverages of all rows come from a few products of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.curvature import FactoredGradients, Objective
from woodbury.curvature.batches import Batch
from woodbury.curvature.layers import MatrixBlock, MatrixGradients
from woodbury.errors import WoodburyError
from woodbury.influence.glm import CoupledCurvature
from woodbury.operators import Dense
from woodbury.operators.memory import available_bytes

__all__ = ["LinearRows", "fits"]


@dataclass(frozen=True, eq=False)
class LinearRows:
    r"""The rows of $\frac1N \sum_i w_i \ell_i(\theta a_i) + \frac12 \lambda \|\theta\|^2$.

    Attributes:
        block: where $\theta$ ``[C, m]`` is in the flat vector.
        inputs: $a$ of every batch, ``[b, m]``, with a one for the bias.
        outputs: logits $\theta a$ of every batch, ``[b, C]``.
        shares: $w_i / N$ of every batch, ``[b]`` in float64.
        places: the rows of every batch.
    """

    block: MatrixBlock
    inputs: list[Tensor]
    outputs: list[Tensor]
    shares: list[Tensor]
    places: list[Tensor]

    @classmethod
    def of(cls, objective: Objective) -> LinearRows | None:
        """The rows, or ``None`` where the outputs are seen not to be of this form.

        Cost: two passes over the outputs and one over the gradients.
        """
        shapes = [tuple(shape) for shape in objective.space.shapes.values()]
        if len(shapes) > 2 or max(map(len, shapes)) != 2:
            return None
        factored = FactoredGradients(objective)
        try:
            blocks = list(factored.blocks.values())
        except WoodburyError:  # the general way says what is wrong, if anything is
            return None
        block = blocks[0]
        if len(blocks) > 1 or not isinstance(block, MatrixBlock) or block.one_hot:
            return None
        if block.weight is None or block.size(objective.space) != objective.space.dim:
            return None
        found = cls(block, [], [], [], [])
        theta = objective.params_vector()[block.positions(objective.space)].view(block.p, block.m)
        params = {name: tensor.detach() for name, tensor in objective.leaves().items()}
        batches = objective.batches("inputs of the layer")
        for batch, gradients in zip(batches, factored.passes("leave one out"), strict=True):
            layer = gradients.blocks.get(block.name)
            if not isinstance(layer, MatrixGradients) or layer.inputs.shape[1] != 1:
                return None
            with torch.no_grad():
                outputs = objective.outputs(params, batch)
            inputs, slope = layer.inputs[:, 0], layer.grads[:, 0]
            if not _is_softmax_of(objective, batch, inputs @ theta.mT, outputs, slope):
                return None
            weights = torch.ones(batch.size) if gradients.weights is None else gradients.weights
            found.inputs.append(inputs)
            found.outputs.append(outputs)
            found.shares.append(weights.double().to(outputs.device) / objective.num_examples)
            found.places.append(gradients.rows)
        return found

    def curvature(self, l2: float) -> CoupledCurvature:
        """The Hessian with the regulariser, factorised."""
        X, P = torch.cat(self.inputs), torch.cat(self.outputs).softmax(1)
        penalty = torch.full((X.shape[1],), l2, dtype=torch.float64, device=X.device)
        return CoupledCurvature.of(X, P, torch.cat(self.shares), penalty)

    def operator(self, curvature: CoupledCurvature, objective: Objective) -> Dense:
        """The Hessian in the order of the flat vector, float64."""
        order = self.block.positions(objective.space).argsort()
        matrix = curvature.matrix[order][:, order]
        matrix = matrix.add(matrix.mT).mul_(0.5)  # of products in single precision
        return Dense(matrix, tags={"positive_definite"})


def fits(objective: Objective) -> bool:
    """Whether the matrix, its factor and its inverse take at most half of the free memory."""
    return 4 * 8 * objective.space.dim**2 <= available_bytes(objective.device) // 2


def _is_softmax_of(
    objective: Objective, batch: Batch, made: Tensor, outputs: Tensor, slope: Tensor
) -> bool:
    """Whether the outputs are those of the layer, and the criterion their cross-entropy."""
    if outputs.shape != made.shape:
        return False
    leaf = outputs.detach().requires_grad_()
    criterion, target = objective.criterion, objective.target(batch)
    with torch.enable_grad():
        (own,) = torch.autograd.grad(criterion.losses(leaf, target, batch.size).sum(), leaf)
    P = outputs.softmax(1)
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(P.shape, generator=generator, dtype=P.dtype).to(P.device)
    bend = criterion.curvature(outputs, target, None)(V[None].contiguous())[0]
    expected = P * (V - (P * V).sum(1, keepdim=True))
    pairs = ((made, outputs), (slope, own), (bend, expected))
    return all(_equal(a, b) for a, b in pairs)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Up to rounding."""
    room = torch.finfo(a.dtype).eps ** 0.75 * float(torch.maximum(a.abs().max(), b.abs().max()))
    return bool(((a - b).abs() <= room).all())
