"""DataInf: the mean of inverses in the place of the inverse of the mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from woodbury.curvature import Objective
from woodbury.errors import ArgumentError
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

__all__ = ["data_inf"]


def data_inf(
    objective: Objective,
    queries: Any = None,
    *,
    damping: float | None = None,
    measurement: Measurement = "loss",
) -> Scores:
    r"""DataInf: influence with a closed form that needs one pass.

    In every module $l$, $\bigl(\frac1N\sum_i g_i g_i^T + \lambda_l I\bigr)^{-1}$ is replaced by
    $\frac1N \sum_i (g_i g_i^T + \lambda_l I)^{-1}$, so that

    $$ x_q = \frac1{N\lambda_l} \sum_i \Bigl(v_q - \frac{g_i^T v_q}{\lambda_l + \|g_i\|^2}\,g_i
    \Bigr), \qquad s_{qi} = -\frac1N \sum_l x_q^T g_i, \quad v_q = \nabla m_q,\ g_i = \nabla\ell_i.
    $$

    Args:
        objective: of the training data.
        queries: as for :func:`grad_dot`.
        damping: $\lambda_l$, the same for all modules; default $0.1 / (N n_l) \sum_i \|g_i\|^2$ of
            each, the source's.
        measurement: as for :class:`woodbury.Influence`.

    Returns:
        :class:`~woodbury.influence.Scores` ``[Q, N]``.

    Raises:
        ArgumentError: ``damping`` is not positive, or a module whose gradients are all zero leaves
            the default at zero.
        StructureError: the examples depend on each other (mode ``"train"``).

    Cost: three passes over the gradients of the training data, two with a damping; memory of
    ``2 Q`` gradients.

    Source: Kwon, Wu, Wu and Zou, "DataInf: Efficiently estimating data influence in LoRA-tuned LLMs
    and diffusion models" (ICLR 2024), equation 5.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.influence.rivals import data_inf
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> objective = Objective(model, "mse", (x, torch.zeros(2, 1)))  # gradients 2 and 8
        >>> data_inf(objective, damping=1.0).values.round(decimals=3)  # (1/5 + 1/65) / 2 = 0.1077
        tensor([[-0.2150, -0.8620],
                [-0.8620, -3.4460]])
    """
    if damping is not None and not 0 < damping < float("inf"):
        raise ArgumentError(f"damping is {damping}; it must be a positive number")
    asked = asked_of(objective, measurement, queries)
    modules = _modules(objective)
    count = objective.num_examples
    dampings = _default(objective, modules) if damping is None else [damping] * len(modules)
    v = query_gradients(asked)
    taken = torch.zeros_like(v)
    for _, gradients in gradient_chunks(objective, chunk_of(objective)):
        for part, rho in zip(modules, dampings, strict=True):
            g = gradients[:, part]
            weights = (g @ v[:, part].T) / (rho + g.square().sum(1, keepdim=True))
            taken[:, part] += weights.T @ g
    for part, rho in zip(modules, dampings, strict=True):
        v[:, part] = (v[:, part] - taken[:, part] / count) / rho
    values = -against(objective, v) / count
    return as_scores(objective, values, measurement, method="DataInf", damping=dampings)


def _modules(objective: Objective) -> list[slice]:
    """Entries of the modules that own parameters; those of one module lie together."""
    found: dict[str, list[int]] = {}
    start = 0
    for name, size in objective.space.sizes.items():
        module = name.rpartition(".")[0]
        ends = found.setdefault(module, [start, start])
        if ends[1] != start:  # another module lies between: a part of its own
            ends = found.setdefault(name, [start, start])
        start += size
        ends[1] = start
    return [slice(*ends) for ends in found.values()]


def _default(objective: Objective, modules: list[slice]) -> list[float]:
    total = torch.zeros(len(modules), dtype=torch.float64)
    for _, gradients in gradient_chunks(objective, chunk_of(objective)):
        for number, part in enumerate(modules):
            total[number] += float(_square(gradients[:, part]))
    sizes = torch.tensor([part.stop - part.start for part in modules], dtype=torch.float64)
    found: list[float] = (0.1 * total / (objective.num_examples * sizes)).tolist()
    if min(found) <= 0:
        raise ArgumentError("a module has no gradient at all, so no damping follows: give damping")
    return found


def _square(gradients: Tensor) -> Tensor:
    return gradients.square().sum(dtype=torch.float64)
