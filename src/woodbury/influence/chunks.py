"""Gradients of training examples in chunks whose borders are the same in every run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from woodbury.curvature import Objective
from woodbury.curvature.per_example import ExampleGradients
from woodbury.curvature.probes import require_examplewise_on_some
from woodbury.errors import ArgumentError, NonFiniteError, ShapeError

__all__ = ["chosen_rows", "digest_of_rows", "gradient_chunks", "modules_of"]


def chosen_rows(objective: Objective, rows: Tensor | None) -> Tensor:
    """The numbers of the training examples that are scored, ascending.

    Raises:
        ShapeError, ArgumentError: ``rows`` is not a list of different row numbers.
        DataError: batches carry row numbers that are not those of all rows, each once.
    """
    objective.require_numbers()
    count = objective.num_examples
    if rows is None:
        return torch.arange(count)
    if rows.dim() != 1 or rows.is_floating_point():
        raise ShapeError(f"rows are {rows.dtype} of shape {tuple(rows.shape)}; give row numbers")
    found = rows.cpu().long().sort().values
    if found.numel() and (int(found[0]) < 0 or int(found[-1]) >= count):
        raise ArgumentError(f"rows go from {int(found[0])} to {int(found[-1])} of {count}")
    if bool((found[1:] == found[:-1]).any()):
        raise ArgumentError("rows name an example twice")
    return found


def gradient_chunks(
    objective: Objective, size: int, *, rows: Tensor | None = None, done: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Places in the data ``[b]`` and gradients ``[b, n]``, without the first ``done`` chosen ones.

    Raises:
        NonFiniteError: a gradient is NaN or infinite; the message names its rows.
        DataError: the loss of an example depends on its batch.
    """
    objective.require_rows("influence")
    wanted = None if rows is None else rows.to(objective.device)
    gradients = ExampleGradients(objective)
    passed, probed = 0, False
    for batch in objective.batches("gradients per example"):
        if not probed and batch.size > 1:
            require_examplewise_on_some(objective, batch)
            probed = True
        places = batch.places().to(objective.device)
        index = torch.arange(batch.size, device=objective.device)
        if wanted is not None:
            index = index[torch.isin(places, wanted)]
        for part in index.split(size):
            passed += len(part)
            if passed <= done:
                continue
            whole = len(part) == part[-1] - part[0] + 1
            chosen = slice(int(part[0]), int(part[-1]) + 1) if whole else part
            found = gradients.of(batch, chosen)
            finite = torch.isfinite(found).all(1)
            if not bool(finite.all()):
                bad = places[part][~finite].tolist()
                raise NonFiniteError(
                    f"the gradients of {len(bad)} examples of batch {batch.index} hold NaN or "
                    f"infinity (rows {', '.join(map(str, bad[:8]))}); look at these rows, or leave "
                    "them out"
                )
            yield places[part], found


def modules_of(objective: Objective) -> tuple[tuple[str, ...], list[tuple[int, slice]]]:
    """Names of the modules that own parameters, and which of them owns which entries."""
    names: dict[str, int] = {}
    owner = []
    start = 0
    for name, size in objective.space.sizes.items():
        module = name.rpartition(".")[0] or name
        place = names.setdefault(module, len(names))
        owner.append((place, slice(start, start + size)))
        start += size
    return tuple(names), owner


def digest_of_rows(rows: Tensor) -> str:
    """A hash of row numbers."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]
