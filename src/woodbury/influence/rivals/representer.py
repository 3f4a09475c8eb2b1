"""Representer points: the output of the last layer as a sum over training examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from woodbury.curvature import Objective
from woodbury.errors import ArgumentError, StructureError
from woodbury.implicit import newton_cg
from woodbury.influence.measurements import Measurement
from woodbury.influence.rivals.common import against, as_scores, asked_of, query_gradients
from woodbury.influence.scores import Scores

__all__ = ["representer_points"]


def representer_points(
    objective: Objective,
    queries: Any = None,
    *,
    measurement: Measurement = "loss",
    fit: bool = True,
    gtol: float = 1e-6,
) -> Scores:
    r"""RPS: what each example contributes to the last layer, and through it to the measurement.

    At the minimum of $\frac1N \sum_i w_i\ell_i + \frac{\lambda}{2}\|\theta\|^2$ over the parameters
    of a last linear layer, $\theta = -\frac{1}{\lambda N} \sum_i w_i \nabla\ell_i$: a sum over
    examples. The part of example $i$ moves the measurement, to first order, by

    $$ s_{qi} = -\frac{1}{\lambda N} \nabla m_q^T \nabla\ell_i . $$

    For a measurement that is linear in the outputs these add up (with weights) to the measurement
    itself; a bias belongs to the layer and is penalised with it.

    Args:
        objective: of the training data with ``params=`` those of the last layer and ``l2`` a
            positive number $\lambda$.
        queries: as for :func:`grad_dot`.
        measurement: as for :class:`woodbury.Influence`.
        fit: bring the layer to its minimum first (the theorem holds there only), by Newton's
            method; otherwise the parameters are taken as they are.
        gtol: of that fit.

    Returns:
        :class:`~woodbury.influence.Scores` ``[Q, N]``; ``settings["stationarity"]`` is the norm of
        the gradient where they were taken.

    Raises:
        ArgumentError: ``l2`` is not a positive number.
        StructureError: the outputs are not linear in the parameters that were selected.

    Cost: some tens of products with the Hessian of the layer, and :func:`grad_dot` of it.

    Source: Yeh, Kim, Yen and Ravikumar, "Representer point selection for explaining deep neural
    networks" (NeurIPS 2018), theorem 3.1.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.influence.rivals import representer_points
        >>> x, y = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[1.0], [1.0]]).double()
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> objective = Objective(model, "mse", (x, y), l2=1.0)
        >>> output = lambda outputs, batch: outputs[:, 0]
        >>> found = representer_points(objective, measurement=output)
        >>> found.values.sum(1)  # the outputs of the fitted model, whose weight is 1/2
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    penalty = objective.l2
    if isinstance(penalty, Tensor) or not penalty > 0:
        raise ArgumentError(
            "representer points need l2 to be a positive number: Objective(..., params=[names of "
            "the last layer], l2=1e-2)"
        )
    _require_linear(objective)
    if fit:
        objective = objective.with_params(newton_cg(objective, gtol=gtol))
    asked = asked_of(objective, measurement, queries)
    values = -against(objective, query_gradients(asked)) / (penalty * objective.num_examples)
    stationarity = float(objective.space.norm(objective.gradient()))
    return as_scores(
        objective, values, measurement, method="representer points", stationarity=stationarity
    )


def _require_linear(objective: Objective) -> None:
    """Outputs at ``theta + d`` and ``theta - d`` have those at ``theta`` for their mean."""
    theta = objective.params_vector()
    step = torch.ones_like(theta) * max(1.0, float(theta.abs().mean()))
    step[::2] *= -1
    batch = next(iter(objective.batches("outputs")))
    with torch.no_grad():
        here, plus, minus = (
            objective.outputs(objective.space.unflatten(point), batch)
            for point in (theta, theta + step, theta - step)
        )
    gap = ((plus + minus) / 2 - here).abs().max()
    allowed = torch.finfo(objective.dtype).eps ** 0.5 * max(1.0, float(plus.abs().max()))
    if float(gap) > allowed:
        raise StructureError(
            f"the outputs are not linear in {list(objective.space.sizes)} (they bend by "
            f"{float(gap):.3g}): select the last linear layer alone with Objective(..., params=...)"
        )
