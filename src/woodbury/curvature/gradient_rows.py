"""Gradients of an objective as the rows of a matrix: per example, per batch, at drawn labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from woodbury.curvature.batches import Batch
from woodbury.curvature.fisher import Fisher
from woodbury.curvature.objective import Objective
from woodbury.curvature.per_example import each_row
from woodbury.errors import ArgumentError, DataError

__all__ = ["RowKind", "gradient_rows", "sampled_gradients"]

RowKind = Literal["example", "batch", "sampled"]

_CHUNK_BYTES = 64 * 2**20


def gradient_rows(
    objective: Objective,
    kind: RowKind,
    *,
    size: int | None = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, float]:
    """Rows ``G [m, n]`` and the divisor ``d`` of which ``G^T G / d`` is a Fisher matrix.

    See :meth:`woodbury.GradientWindow.from_objective` for the kinds.

    Raises:
        ArgumentError: the kind is unknown, ``size`` or ``samples`` is out of range, or a weight is
            negative.
    """
    if kind not in get_args(RowKind):
        raise ArgumentError(f"rows is {kind!r}; use one of {', '.join(get_args(RowKind))}")
    weights = objective.weights
    if kind != "batch" and weights is not None and bool((weights < 0).any()):
        worst = int(weights.argmin())
        raise ArgumentError(
            f"the weight of example {worst} is {weights[worst].item():.4g}; a window holds square "
            "roots of weights, which must not be negative"
        )
    if kind == "batch":
        rows = list(_batch_gradients(objective))
        chosen = _draw(len(rows), size, "batches", generator)
        return torch.stack([rows[i] for i in chosen.tolist()]), float(len(chosen))
    objective.require_rows("a window of gradients")
    chosen = _draw(objective.num_examples, size, "examples", generator)
    chosen = chosen.to(objective.device)
    places = torch.full((objective.num_examples,), -1, device=objective.device)
    places[chosen] = torch.arange(len(chosen), device=objective.device)
    per_row = samples if kind == "sampled" else 1
    result = torch.empty(
        len(chosen), per_row, objective.space.dim, dtype=objective.dtype, device=objective.device
    )
    chunks = (
        sampled_gradients(objective, samples, generator)
        if kind == "sampled"
        else ((i, g.unsqueeze(1)) for i, g in objective.per_example_gradients())
    )
    for numbers, gradients in chunks:
        place = places[numbers]
        kept = place >= 0
        if weights is not None:
            gradients = gradients * weights[numbers].sqrt().view(-1, 1, 1)
        result[place[kept]] = gradients[kept]
    return result.view(-1, objective.space.dim), float(len(chosen) * per_row)


def sampled_gradients(
    objective: Objective, samples: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    r"""Gradients $\sqrt{a_i}\,J_i^T s_i$ at labels drawn from the model, in chunks.

    Their mean outer product over samples and examples is ``Fisher(objective, "sampled")`` without
    weights and regulariser.

    Args:
        objective: with a likelihood for a criterion.
        samples: labels drawn per example.
        generator: draws the labels; the same ones every time if not given.

    Returns:
        An iterator over pairs: places in the data ``[b]`` and gradients ``[b, samples, n]``.

    Raises:
        ArgumentError: ``samples`` is less than 1.
        StructureError: the criterion is no likelihood.
        DataError: mode ``"train"``, where a row depends on its batch.

    Cost: ``samples`` gradients where torch can vectorise the model over examples.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    fisher = Fisher(objective, "sampled", samples=samples, generator=generator)
    if objective.replayed:
        raise DataError(
            "in mode 'train' the outputs of a row depend on its batch, so a row has no gradient of "
            "its own; use mode='eval'"
        )
    objective.require_rows("gradients at drawn labels")
    return _sampled_chunks(objective, fisher, samples)


def _sampled_chunks(
    objective: Objective, fisher: Fisher, samples: int
) -> Iterator[tuple[Tensor, Tensor]]:
    n = objective.space.dim
    step = max(1, _CHUNK_BYTES // (torch.finfo(objective.dtype).bits // 8 * n * samples))

    def along(flat: Tensor, single: Batch, scores: Tensor) -> Tensor:
        outputs = objective.outputs(objective.space.unflatten(flat), single)[0]
        return (outputs * scores).flatten(1).sum(1)

    pullbacks = torch.func.jacrev(along)
    for batch in objective.batches("gradients at drawn labels"):
        places = batch.places().to(objective.device)
        with torch.no_grad():
            outputs = objective.outputs(objective._params, batch)
            scores = fisher._scores(outputs, batch)
        for start in range(0, batch.size, step):
            stop = min(start + step, batch.size)
            try:
                rows = each_row(objective, batch, slice(start, stop), pullbacks, scores[start:stop])
            except (RuntimeError, ValueError):  # the model has something that vmap cannot do
                rows = _one_by_one(objective, batch, scores, start, stop)
            yield places[start:stop], rows.detach()


def _one_by_one(
    objective: Objective, batch: Batch, scores: Tensor, start: int, stop: int
) -> Tensor:
    leaves = objective.leaves()
    with torch.enable_grad():
        outputs = objective.outputs(leaves, batch)
    samples = scores.shape[1]
    result = torch.zeros(
        stop - start,
        samples,
        objective.space.dim,
        dtype=objective.dtype,
        device=objective.device,
    )
    for i in range(start, stop):
        for s in range(samples):
            gradients = torch.autograd.grad(
                outputs[i],
                list(leaves.values()),
                scores[i, s],
                retain_graph=True,
                allow_unused=True,
            )
            parts = objective.space.unflatten(result[i - start, s]).values()
            for part, gradient in zip(parts, gradients, strict=True):
                if gradient is not None:
                    part.copy_(gradient)
    return result


def _batch_gradients(objective: Objective) -> Iterator[Tensor]:
    """The gradient of the mean weighted loss of every batch, without the regulariser."""
    for batch in objective.batches("gradients per batch"):
        leaves = objective.leaves()
        with torch.enable_grad():
            loss = objective.batch_loss(leaves, batch) / batch.size
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        flat = torch.zeros(objective.space.dim, dtype=objective.dtype, device=objective.device)
        for part, gradient in zip(objective.space.unflatten(flat).values(), found, strict=True):
            if gradient is not None:
                part.copy_(gradient)
        yield flat


def _draw(count: int, size: int | None, what: str, generator: torch.Generator | None) -> Tensor:
    if size is None:
        return torch.arange(count)
    if not 1 <= size <= count:
        raise ArgumentError(f"size is {size}; the objective has {count} {what}")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    order = torch.randperm(count, generator=generator, device=generator.device)
    return order[:size].sort().values.cpu()
