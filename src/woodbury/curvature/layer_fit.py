"""The passes over the data that K-FAC and EK-FAC take, resumable and shared among processes."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from woodbury.curvature.capture import FactoredGradients
from woodbury.curvature.draws import make_seed
from woodbury.curvature.factors import Corrections, FactorSums, Sums
from woodbury.curvature.layer_store import TensorFile, fingerprint
from woodbury.curvature.layers import Block, MatrixBlock
from woodbury.curvature.objective import Objective
from woodbury.errors import ArgumentError, NonFiniteError

__all__ = ["FitSettings", "LayerFit", "fit_layers"]


@dataclass(frozen=True)
class FitSettings:
    """What is fitted; two fits with equal settings of equal data are equal.

    Attributes:
        kind: ``"exact"``, ``"sampled"`` or ``"empirical"``.
        sharing: ``"expand"`` or ``"reduce"``.
        samples: labels per example.
        seeds: of the labels in the two passes.
        corrected: whether there is a second pass.
        side_limit: see :class:`~woodbury.EKFAC`.
        block_limit: see :class:`~woodbury.EKFAC`.
        dense: parameters whose gradients are taken one by one.
    """

    kind: str
    sharing: str
    samples: int
    seeds: tuple[int, int]
    corrected: bool
    side_limit: int
    block_limit: int
    dense: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.sharing not in ("expand", "reduce"):
            raise ArgumentError(f"sharing is {self.sharing!r}; use 'expand' or 'reduce'")
        for name in ("side_limit", "block_limit"):
            if getattr(self, name) < 0:
                raise ArgumentError(f"{name} is {getattr(self, name)}; it must be >= 0")


@dataclass
class LayerFit:
    """What a fit found.

    Attributes:
        blocks: by name.
        tensors: for a matrix block ``{name}/Q_A`` and ``Q_S`` in the dtype of the objective (one
            that is missing is the identity), ``{name}/values`` ``[p m]`` in float64; for a vector
            block ``{name}/Q`` (or none) and ``{name}/values``.
        examples: $N$.
        dtype: of the bases.
    """

    blocks: dict[str, Block]
    tensors: Sums
    examples: int
    dtype: torch.dtype


def draw_seeds(kind: str, generator: torch.Generator | None) -> tuple[int, int]:
    """Seeds of the labels in the two passes; the same every time without a generator."""
    if kind != "sampled":
        return 0, 0
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    return make_seed(generator), make_seed(generator)


class _Keeper:
    """Writes what a fit has so far, every few seconds."""

    def __init__(self, file: TensorFile | None, mark: str, every: float) -> None:
        self.file, self.mark, self.every = file, mark, every
        self.last = time.monotonic()

    def save(
        self, tensors: Mapping[str, Tensor], phase: str, batch: int, *, now: bool = False
    ) -> None:
        if self.file is None or not (now or time.monotonic() - self.last >= self.every):
            return
        words = {"fingerprint": self.mark, "phase": phase, "next": batch}
        self.file.save(tensors, words)
        self.last = time.monotonic()

    def load(self) -> tuple[Sums, str, int]:
        found = None if self.file is None else self.file.load(self.mark)
        if found is None:
            return {}, "factors", 0
        tensors, words = found
        return tensors, words["phase"], words["next"]


def fit_layers(
    objective: Objective,
    settings: FitSettings,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    group: Any = None,
) -> LayerFit:
    """Factors in one pass, eigenbases in float64, corrected eigenvalues in a second pass."""
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    if objective.weights is not None and bool((objective.weights < 0).any()):
        raise ArgumentError("a weight is negative, and factors of such sums are not semidefinite")
    mark = _fingerprint(objective, settings, world) if checkpoint is not None else ""
    whole = _Keeper(None if checkpoint is None else TensorFile(checkpoint), mark, save_every)
    own = whole
    if checkpoint is not None and world > 1:
        own = _Keeper(TensorFile(f"{checkpoint}.part{rank}of{world}"), mark, save_every)
    gradients = _gradients(objective, settings, settings.seeds[0])
    blocks = gradients.blocks
    tensors, phase, start = whole.load()
    if phase == "done":
        tensors = _placed(tensors, objective.device)
        return LayerFit(blocks, tensors, objective.num_examples, objective.dtype)
    if world > 1:
        tensors, phase, start = own.load()
    part = (rank, world)
    if phase == "factors":
        sums = FactorSums(
            blocks,
            objective.space,
            settings.sharing,
            settings.side_limit,
            settings.block_limit,
            objective.device,
        )
        if tensors:
            sums.sums = _placed(tensors, objective.device)
        for batch in gradients.passes("factors", start, part):
            sums.add(batch)
            if batch.column + 1 == batch.columns:
                own.save(sums.sums, "factors", batch.index + 1)
        tensors = eigenbases(blocks, _reduced(sums.sums, group), objective)
        own.save(tensors, "corrections", 0, now=True)
        start = 0
    tensors = _placed(tensors, objective.device)
    if settings.corrected:
        bases = {key: value for key, value in tensors.items() if key.endswith(("/Q_A", "/Q_S"))}
        second = Corrections(blocks, bases, objective.dtype, objective.device)
        known = {key: tensors.pop(key) for key in list(tensors) if key.endswith("/corrected")}
        second.sums.update(known)
        again = _gradients(objective, settings, settings.seeds[1])
        for batch in again.passes("corrected eigenvalues", start, part):
            second.add(batch)
            if batch.column + 1 == batch.columns:
                own.save({**tensors, **second.sums}, "corrections", batch.index + 1)
        for key, value in _reduced(second.sums, group).items():
            name = key.removesuffix("/corrected")
            tensors[f"{name}/values"] = value.reshape(-1) / objective.num_examples
    if rank == 0:
        whole.save(tensors, "done", 0, now=True)
    return LayerFit(blocks, tensors, objective.num_examples, objective.dtype)


def _gradients(objective: Objective, settings: FitSettings, seed: int) -> FactoredGradients:
    generator = torch.Generator().manual_seed(seed)
    return FactoredGradients(
        objective,
        settings.kind,
        samples=settings.samples,
        generator=generator,
        dense=settings.dense,
    )


def eigenbases(blocks: Mapping[str, Block], sums: Sums, objective: Objective) -> Sums:
    """Eigenvectors in the objective's dtype and eigenvalues in float64 of every block."""
    result: Sums = {}
    count = objective.num_examples
    for name, block in blocks.items():
        if not isinstance(block, MatrixBlock):
            values, Q = _eigh(sums[f"{name}/moment"] / count, name)
            result[f"{name}/values"] = values
            if Q is not None:
                result[f"{name}/Q"] = Q.to(objective.dtype).contiguous()
            continue
        sides = {}
        for side in ("A", "S"):
            sides[side], Q = _eigh(sums[f"{name}/{side}"], name)
            if Q is not None:
                result[f"{name}/Q_{side}"] = Q.to(objective.dtype).contiguous()
        scale = count * sums[f"{name}/n"].clamp(min=torch.finfo(torch.float32).tiny)
        result[f"{name}/values"] = torch.outer(sides["S"], sides["A"]).reshape(-1) / scale
    return result


def _eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(f"the factors of {name!r} hold NaN or infinity")
    if matrix.dim() == 1:
        return matrix, None
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.clamp(min=0), vectors


def _reduced(sums: Sums, group: Any) -> Sums:
    """Summed over the processes."""
    if group is not None:
        for key in sorted(sums):
            dist.all_reduce(sums[key], group=group)
    return sums


def _placed(tensors: Mapping[str, Tensor], device: torch.device) -> Sums:
    return {key: value.to(device) for key, value in tensors.items()}


def _fingerprint(objective: Objective, settings: FitSettings, world: int) -> str:
    data = (batch.data for batch in objective.batches("fingerprint"))
    tensors = itertools.chain([objective.identity()], data)
    shapes = {name: list(shape) for name, shape in objective.space.shapes.items()}
    return fingerprint(tensors, [asdict(settings), shapes, objective.num_examples, world])
