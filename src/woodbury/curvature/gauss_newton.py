"""The Gauss-Newton matrix of an objective."""

from __future__ import annotations

from torch import Tensor

from woodbury.curvature.batches import Batch
from woodbury.curvature.finite import finite_outputs
from woodbury.curvature.linearization import Cache
from woodbury.curvature.losses import Product
from woodbury.curvature.matrix import (
    OutputCurvature,
    Params,
    Setting,
    semidefinite_tags,
)
from woodbury.curvature.objective import Objective

__all__ = ["GaussNewton"]


class GaussNewton(OutputCurvature):
    r"""The generalised Gauss-Newton matrix of the mean objective.

    $$ G = \frac1N \sum_i w_i J_i^T H_i J_i + \operatorname{diag}(\lambda), $$

    where $J_i$ is the Jacobian of the outputs of example $i$ and $H_i$ the Hessian of its loss in
    the outputs. It approximates the Hessian of the *mean* objective **with** its regulariser, which
    is added as it is. Tags: positive semidefinite where the criterion is known to be convex in the
    outputs and no weight is negative; positive definite where moreover all of ``l2`` is positive.

    Args:
        objective: what is approximated, at its parameters of this moment.
        cache: what may be kept between products: ``"auto"`` (half of the memory available at the
            first product), a number of bytes, or ``None``, 0 or ``"off"``. Results agree to
            rounding whatever it is.

    Raises:
        ArgumentError: ``cache`` is none of these.
        StructureError: the objective gives no outputs, or the criterion is linear in them.
        GradientError: at a product: the outputs do not depend on a parameter, or a parameter was
            changed in place since the operator was made.
        NonDeterministicError, NonFiniteError, DataError: at a product; see
            :class:`~woodbury.Objective`.

    Cost: every column about 1.2 gradients; less than one for networks of linear layers with few
    outputs, whose signals are then kept (as many backward passes in the first product as there are
    outputs). Beyond the budget about 2 gradients.

    Source: N. Schraudolph, "Fast curvature matrix-vector products" (2002), section 3.

    Example:
        >>> import torch
        >>> from woodbury import GaussNewton, Objective
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> GaussNewton(Objective(model, "mse", (x, y), l2=0.25)).to_dense()
        tensor([[1.2500, 0.0000],
                [0.0000, 4.2500]])
    """

    def __init__(self, objective: Objective, cache: Cache = "auto") -> None:
        convex = objective.criterion.convex
        super().__init__(objective, cache, semidefinite_tags(objective, convex=convex))

    def _setting(self, batch: Batch) -> Setting:
        objective = self.objective

        def evaluate(params: Params) -> Tensor:
            return finite_outputs(objective.outputs(params, batch), batch)

        def middle(z: Tensor) -> Product:
            target, weights = objective.target(batch), objective.batch_weights(batch)
            return objective.criterion.curvature(z, target, weights)

        return evaluate, middle
