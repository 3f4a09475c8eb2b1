"""TracIn: products of gradients along training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature import Objective
from woodbury.errors import ArgumentError
from woodbury.influence.measurements import Measurement
from woodbury.influence.rivals.common import against, as_scores, asked_of, query_gradients
from woodbury.influence.scores import Scores

__all__ = ["trac_in"]


def trac_in(
    objective: Objective,
    checkpoints: Sequence[Tensor],
    queries: Any = None,
    *,
    rates: Sequence[float] | float = 1.0,
    measurement: Measurement = "loss",
) -> Scores:
    r"""TracInCP: $s_{qi} = -\frac1N \sum_t \eta_t \nabla m_q(\theta_t)^T \nabla\ell_i(\theta_t)$.

    What the steps of gradient descent between checkpoints did with the example in them, to first
    order, when every step saw all examples and $\eta_t$ is the sum of learning rates of the steps
    that a checkpoint stands for.

    Args:
        objective: of the training data; its own parameters do not matter.
        checkpoints: parameters $\theta_t$, flat ``[n]`` in the order of ``objective.space``
            (``objective.space.flatten`` makes them).
        queries: as for :func:`grad_dot`.
        rates: $\eta_t$, one for each checkpoint or one for all.
        measurement: as for :class:`woodbury.Influence`.

    Returns:
        :class:`~woodbury.influence.Scores` ``[Q, N]``.

    Raises:
        ArgumentError: no checkpoints, or as many rates as do not fit.
        ShapeError: a checkpoint of another size.
        StructureError: the examples depend on each other (mode ``"train"``).

    Cost: :func:`grad_dot` for each checkpoint.

    Source: Pruthi, Liu, Sundararajan and Kale, "Estimating training data influence by tracing
    gradient descent" (NeurIPS 2020), equation 1 and section 3.3.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.influence.rivals import trac_in
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = Objective(model, "mse", (torch.ones(1, 1), torch.zeros(1, 1)))
        >>> trac_in(objective, [torch.ones(1), 0.5 * torch.ones(1)], rates=0.1).values
        tensor([[-0.5000]])
    """
    if not len(checkpoints):
        raise ArgumentError("no checkpoints: give the parameters at some moments of training")
    steps = [float(rates)] * len(checkpoints) if isinstance(rates, int | float) else list(rates)
    if len(steps) != len(checkpoints):
        raise ArgumentError(f"{len(steps)} rates and {len(checkpoints)} checkpoints; give as many")
    total: Tensor | None = None
    for theta, rate in zip(checkpoints, steps, strict=True):
        there = objective.with_params(theta.to(dtype=objective.dtype, device=objective.device))
        asked = asked_of(there, measurement, queries)
        part = -rate / objective.num_examples * against(there, query_gradients(asked))
        total = part if total is None else total + part
    assert total is not None  # there are checkpoints
    return as_scores(
        objective, torch.as_tensor(total), measurement, method="TracIn", checkpoints=len(steps)
    )
