"""TRAK: a linear model of projected gradients, averaged over trained models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature import Objective
from woodbury.errors import ArgumentError, ShapeError
from woodbury.influence.chunks import gradient_chunks
from woodbury.influence.measurements import Measurement
from woodbury.influence.rivals.common import as_scores, asked_of, chunk_of
from woodbury.influence.scores import Scores
from woodbury.operators import Dense, Identity
from woodbury.solvers import Cholesky, solve

__all__ = ["trak"]


def trak(
    objectives: Objective | Sequence[Objective],
    queries: Any = None,
    *,
    dim: int = 512,
    damping: float = 0.0,
    measurement: Measurement = "margin",
    seed: int = 0,
) -> Scores:
    r"""TRAK with $M$ models.

    With the margins $f = \log p_y/(1-p_y)$, features $\phi_i = P^T \nabla f_i / \sqrt{n}$ of every
    training example by a Gaussian projection $P$ (its own for each model), $\Phi$ their matrix, and
    $Q = \operatorname{diag}(1 - p_i)$,

    $$ s_q = \Bigl[\tfrac1M \sum_m \phi_q^T (\Phi_m^T\Phi_m + \rho I)^{-1}\Phi_m^T\Bigr]
       \Bigl[\tfrac1M \sum_m Q_m\Bigr], $$

    with $\phi_q$ of the gradient of what is measured. Adding the example raises a margin by about
    so much; the scale is that of the method, which leaves $p(1-p)$ out of its matrix. Its last step
    for language models, a soft threshold, is not taken.

    Args:
        objectives: of the same training data, one for each trained model; with cross-entropy.
        queries: as for :func:`grad_dot`.
        dim: columns of $P$.
        damping: $\rho \ge 0$, in the unit of $\Phi^T\Phi$.
        measurement: as for :class:`woodbury.Influence`; the margin of a query by default, for which
            the method was made.
        seed: of the projections.

    Returns:
        :class:`~woodbury.influence.Scores` ``[Q, N]``.

    Raises:
        ArgumentError: no models, ``dim`` less than 1, or a negative damping.
        ShapeError: models with different numbers of examples or parameters.
        StructureError: the criterion has no margin, or examples depend on each other.
        SingularError, NotPositiveDefiniteError: the features of the training data have a rank below
            ``dim``: lower it, or add damping.

    Cost: for each model the gradients of the margins, and ``2 n dim`` multiplications each.

    Source: Park, Georgiev, Ilyas, Leclerc and Madry, "TRAK: Attributing model behavior at scale"
    (ICML 2023), equations 13 to 17.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.influence.rivals import trak
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.3]])
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> objective = Objective(model, "cross_entropy", (x, torch.tensor([0, 0, 1, 1])))
        >>> trak(objective, dim=2).values.diagonal() > 0  # each speaks for itself
        tensor([True, True, True, True])
    """
    models = [objectives] if isinstance(objectives, Objective) else list(objectives)
    _check(models, dim, damping)
    count, n = models[0].num_examples, models[0].space.dim
    generator = torch.Generator().manual_seed(seed)
    total: Tensor | None = None
    doubt = torch.zeros(count, dtype=models[0].dtype, device=models[0].device)
    for objective in models:
        asked = asked_of(objective, measurement, queries)
        margins = asked_of(objective, "margin", None)
        P = torch.randn(n, dim, generator=generator, dtype=objective.dtype).to(objective.device)
        P /= n**0.5
        features, wanted = _projected(margins, P), _projected(asked, P)
        gram = features.T @ features
        A = Dense(gram, tags={"positive_definite"})
        matrix = A + damping * Identity(dim) if damping else A
        solved = solve(matrix, wanted.T.contiguous(), Cholesky())
        part = solved.value.T @ features.T
        total = part if total is None else total + part
        doubt += torch.sigmoid(-margins.per_example_losses())
    assert total is not None  # there are models
    values = total / len(models) * (doubt / len(models))
    return as_scores(
        models[0],
        values,
        measurement,
        method="TRAK",
        models=len(models),
        projection=dim,
        damping=damping,
    )


def _projected(objective: Objective, P: Tensor) -> Tensor:
    """Projected gradients of the losses of an objective, ``[N, dim]``."""
    pieces: list[Any] = [
        (places, gradients @ P)
        for places, gradients in gradient_chunks(objective, chunk_of(objective))
    ]
    return objective.in_order(pieces)


def _check(models: list[Objective], dim: int, damping: float) -> None:
    if not models:
        raise ArgumentError("no models: give an objective, or one for each trained model")
    sizes = {(model.num_examples, model.space.dim) for model in models}
    if len(sizes) > 1:
        raise ShapeError(f"the models have examples and parameters {sorted(sizes)}; give equals")
    if dim < 1 or not 0 <= damping < float("inf"):
        raise ArgumentError(f"dim is {dim} and damping {damping}; give dim >= 1, damping >= 0")
    if not damping and dim > models[0].num_examples:
        raise ArgumentError(
            f"dim is {dim} and there are {models[0].num_examples} examples, so the features have "
            "no inverse: lower dim, or give damping > 0"
        )
