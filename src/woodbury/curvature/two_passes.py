"""The two passes of a fit over the same gradients, which are computed once where memory allows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from woodbury.curvature.batches import Batch
from woodbury.curvature.capture import FactoredBatch, FactoredGradients
from woodbury.curvature.layers import MatrixGradients, VectorGradients
from woodbury.curvature.linearization import Cache, checked_budget
from woodbury.curvature.memory import storage_bytes
from woodbury.curvature.objective import Objective
from woodbury.operators.memory import available_bytes

__all__ = ["TwoPasses"]

# What cache="auto" keeps: at most so much, and at most this share of what is available.
_AUTO_BYTES, _AUTO_FRACTION = 2**30, 0.25


class TwoPasses:
    """Gradients for the factors, and those for the corrected eigenvalues.

    Batches of the second pass that fit into the cache are computed in the first one: with the same
    labels they are the same gradients, with other labels drawn they take a backward pass and no
    forward pass. What does not fit is computed when its turn comes, with the same result.

    Args:
        objective: whose examples.
        kind: of the gradients, see :class:`~woodbury.curvature.FactoredGradients`.
        samples: labels drawn per example.
        seeds: of the labels in the two passes.
        dense: parameters whose gradients are taken one by one.
        cache: bytes that may be kept for the second pass; ``"auto"``: 1 GiB, or a quarter of what
            is available if that is less; ``None``, 0 or ``"off"`` where there is no second pass.
    """

    def __init__(
        self,
        objective: Objective,
        kind: str,
        samples: int,
        seeds: tuple[int, int],
        dense: tuple[str, ...],
        cache: Cache,
    ) -> None:
        first, second = (torch.Generator().manual_seed(seed) for seed in seeds)
        self.objective = objective
        self.gradients = FactoredGradients(
            objective, kind, samples=samples, generator=first, dense=dense
        )
        self._second = second
        self._again: FactoredGradients | None = None
        budget = checked_budget(cache)
        if budget is None:
            budget = min(_AUTO_BYTES, int(_AUTO_FRACTION * available_bytes(objective.device)))
        self._left, self._open = budget, budget > 0
        self._kept: dict[int, list[_Kept]] = {}

    def factors(self, start: int, part: tuple[int, int]) -> Iterator[FactoredBatch]:
        """The first pass from batch ``start`` on; of several processes, the share of one."""
        drawn = self.gradients.backprop.kind == "sampled"
        for batch in self.gradients.selected("factors", start, part):
            graph = self.gradients.run(batch)
            ahead, kept = drawn and self._open, list[_Kept]()
            for found in self.gradients.columns(batch, graph, keep=ahead):
                yield found
                if not drawn:
                    self._keep(batch, found, kept)
            if ahead:
                for found in self.again.columns(batch, graph):
                    self._keep(batch, found, kept)
                    if not self._open:
                        break
            if self._open:
                self._kept[batch.index] = kept
            del graph, found  # before there is another one

    def corrections(self, start: int, part: tuple[int, int]) -> Iterator[FactoredBatch]:
        """The second pass."""
        for batch in self.again.selected("corrected eigenvalues", start, part):
            kept = self._kept.pop(batch.index, [])
            if kept and not any(each.changed() for each in kept):
                yield from (each.found for each in kept)
            else:
                yield from self.again.columns(batch, self.again.run(batch))

    @property
    def again(self) -> FactoredGradients:
        """The gradients of the second pass."""
        if self._again is None:
            same = self.gradients.backprop.kind != "sampled"
            self._again = self.gradients if same else self.gradients.redrawn(self._second)
        return self._again

    def _keep(self, batch: Batch, found: FactoredBatch, kept: list[_Kept]) -> None:
        """Keep one column of a batch; nothing more is kept once there is too little room."""
        if not self._open:
            return
        size = storage_bytes(_tensors(found))
        ahead = found.columns - found.column  # with those that are to come
        if size * ahead > self._left:
            self._open = False
            kept.clear()
            return
        kept.append(_Kept(found if batch.resident else _apart(found, batch)))
        self._left -= size


class _Kept:
    """A batch of gradients, and whether its inputs are what they were."""

    def __init__(self, found: FactoredBatch) -> None:
        self.found = found
        self.versions = [tensor._version for tensor in _tensors(found)]

    def changed(self) -> bool:
        """Whether the model wrote into one of them (a buffer that it uses in every pass)."""
        pairs = zip(_tensors(self.found), self.versions, strict=True)
        return any(tensor._version != version for tensor, version in pairs)


def _tensors(found: FactoredBatch) -> list[Tensor]:
    tensors = []
    for gradients in found.blocks.values():
        if isinstance(gradients, MatrixGradients):
            tensors += [gradients.inputs, gradients.grads]
        else:
            tensors.append(gradients.values)
    return tensors


def _apart(found: FactoredBatch, batch: Batch) -> FactoredBatch:
    """With copies of inputs that are the data itself, which a loader may write over."""
    leaves = [leaf for leaf in tree_leaves(batch.data) if isinstance(leaf, Tensor)]
    data = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    blocks: dict[str, MatrixGradients | VectorGradients] = {}
    for name, gradients in found.blocks.items():
        blocks[name] = gradients
        if isinstance(gradients, MatrixGradients):
            inputs = gradients.inputs
            if inputs.untyped_storage().data_ptr() in data:
                blocks[name] = MatrixGradients(gradients.block, inputs.clone(), gradients.grads)
    return FactoredBatch(**{**vars(found), "blocks": blocks})
