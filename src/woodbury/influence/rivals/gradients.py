"""Scores from gradients alone: their products and their cosines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from woodbury.curvature import Objective
from woodbury.influence.chunks import gradient_chunks
from woodbury.influence.measurements import Measurement
from woodbury.influence.rivals.common import (
    against,
    as_scores,
    asked_of,
    chunk_of,
    query_gradients,
)
from woodbury.influence.scores import Scores

__all__ = ["grad_cos", "grad_dot"]


def grad_dot(
    objective: Objective, queries: Any = None, *, measurement: Measurement = "loss"
) -> Scores:
    r"""$s_{qi} = -\frac1N \nabla m_q^T \nabla\ell_i$: influence with the identity for a matrix.

    Args:
        objective: of the training data.
        queries: data in a form that :class:`~woodbury.Objective` takes; default the training data.
        measurement: as for :class:`woodbury.Influence`.

    Returns:
        :class:`~woodbury.influence.Scores` ``[Q, N]``: what a step of gradient descent of length 1
        with the example in it does to the measurement.

    Raises:
        StructureError: the examples depend on each other (mode ``"train"``).
        NonFiniteError: a gradient is NaN or infinite.

    Cost: the gradients of queries and training data once; memory of ``Q`` gradients.

    Source: Charpiat, Girard, Felardos and Tarabalka, "Input similarity from the neural network
    perspective" (NeurIPS 2019).

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.influence.rivals import grad_dot
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> grad_dot(Objective(model, "mse", (x, torch.zeros(2, 1)))).values  # gradients 2 and 8
        tensor([[ -2.,  -8.],
                [ -8., -32.]])
    """
    asked = asked_of(objective, measurement, queries)
    values = -against(objective, query_gradients(asked)) / objective.num_examples
    return as_scores(objective, values, measurement, method="Grad-Dot")


def grad_cos(
    objective: Objective, queries: Any = None, *, measurement: Measurement = "loss"
) -> Scores:
    r"""$s_{qi} = -\cos(\nabla m_q, \nabla\ell_i)$, 0 where a gradient is 0.

    Scores have no unit: they order, and do not measure.

    Args:
        objective: of the training data.
        queries: as for :func:`grad_dot`.
        measurement: as for :class:`woodbury.Influence`.

    Returns:
        :class:`~woodbury.influence.Scores` ``[Q, N]``, between -1 and 1.

    Raises:
        StructureError: the examples depend on each other (mode ``"train"``).
        NonFiniteError: a gradient is NaN or infinite.

    Cost: as :func:`grad_dot`.

    Source: Charpiat et al. (2019), equation 2.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.influence.rivals import grad_cos
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]])
        >>> grad_cos(Objective(model, "mse", (x, y))).values.round()
        tensor([[-1.,  1.],
                [ 1., -1.]])
    """
    asked = asked_of(objective, measurement, queries)
    columns = _unit(query_gradients(asked))
    pieces: list[Any] = []
    for places, gradients in gradient_chunks(objective, chunk_of(objective)):
        pieces.append((places, _unit(gradients) @ columns.T))
    values = -objective.in_order(pieces).T
    return as_scores(objective, values, measurement, method="Grad-Cos")


def _unit(gradients: Tensor) -> Tensor:
    sizes = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
    return gradients / torch.where(sizes > 0, sizes, torch.ones_like(sizes))
