"""The passes over the data that K-FAC and EK-FAC take, resumable and shared among processes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from woodbury.curvature.draws import make_seed
from woodbury.curvature.factors import Corrections, FactorSums, Sums
from woodbury.curvature.layer_store import Keeper, TensorFile, fingerprint
from woodbury.curvature.layers import Block, MatrixBlock
from woodbury.curvature.linearization import Cache, checked_budget
from woodbury.curvature.objective import Objective
from woodbury.curvature.two_passes import TwoPasses
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


def fit_settings(
    kind: str,
    *,
    corrected: bool,
    generator: torch.Generator | None = None,
    sharing: str = "expand",
    samples: int = 1,
    side_limit: int = 8192,
    block_limit: int = 1024,
    dense: Iterable[str] = (),
) -> FitSettings:
    """The settings for arguments of :class:`~woodbury.KFAC`."""
    return FitSettings(
        kind,
        sharing,
        samples,
        draw_seeds(kind, generator),
        corrected,
        side_limit,
        block_limit,
        (dense,) if isinstance(dense, str) else tuple(dense),
    )


def fit_layers(
    objective: Objective,
    settings: FitSettings,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    group: Any = None,
    cache: Cache = "auto",
) -> LayerFit:
    """Factors in one pass, eigenbases in float64, corrected eigenvalues in a second pass."""
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    require_weights(objective)
    mark = fit_fingerprint(objective, settings, world) if checkpoint is not None else ""
    whole = Keeper(None if checkpoint is None else TensorFile(checkpoint), mark, save_every)
    own = whole
    if checkpoint is not None and world > 1:
        own = Keeper(TensorFile(f"{checkpoint}.part{rank}of{world}"), mark, save_every)
    checked_budget(cache)  # a mistake is one without a second pass, too
    chosen = (settings.kind, settings.samples, settings.seeds, settings.dense)
    passes = TwoPasses(objective, *chosen, cache if settings.corrected else "off")
    blocks = passes.gradients.blocks
    state = whole.load()
    if world > 1 and state[1] != "done":
        state = own.load()
    tensors, phase, start = _agreed(state, group)
    if phase == "done":
        tensors = _placed(tensors, objective.device)
        return LayerFit(blocks, tensors, objective.num_examples, objective.dtype)
    part = (rank, world)
    if phase == "factors":
        sums = factor_sums(objective, settings, blocks, tensors)
        for batch in passes.factors(start, part):
            sums.add(batch)
            if batch.column + 1 == batch.columns:
                own.save(sums.sums, "factors", batch.index + 1)
        tensors = eigenbases(blocks, _reduced(sums.sums, group), objective)
        own.save(tensors, "corrections", 0, now=True)
        start = 0
    tensors = _placed(tensors, objective.device)
    if settings.corrected:
        known = {key: tensors.pop(key) for key in list(tensors) if key.endswith("/corrected")}
        second = corrections(objective, blocks, tensors, known)
        for batch in passes.corrections(start, part):
            second.add(batch)
            if batch.column + 1 == batch.columns:
                own.save({**tensors, **second.sums}, "corrections", batch.index + 1)
        correct(tensors, _reduced(second.sums, group), objective)
    if rank == 0:
        whole.save(tensors, "done", 0, now=True)
    return LayerFit(blocks, tensors, objective.num_examples, objective.dtype)


def require_weights(objective: Objective) -> None:
    """Raise unless sums with these weights are semidefinite."""
    if objective.weights is not None and bool((objective.weights < 0).any()):
        raise ArgumentError("a weight is negative, and factors of such sums are not semidefinite")


def factor_sums(
    objective: Objective, settings: FitSettings, blocks: Mapping[str, Block], known: Sums
) -> FactorSums:
    """The sums of the first pass, from zero or from what is known."""
    limits = settings.side_limit, settings.block_limit
    sums = FactorSums(blocks, objective.space, settings.sharing, *limits, objective.device)
    if known:
        sums.sums = _placed(known, objective.device)
    return sums


def corrections(
    objective: Objective, blocks: Mapping[str, Block], tensors: Sums, known: Sums
) -> Corrections:
    """The sums of the second pass in the eigenbases of ``tensors``, from zero or what is known."""
    bases = {key: value for key, value in tensors.items() if key.endswith(("/Q_A", "/Q_S"))}
    second = Corrections(
        blocks, _placed(bases, objective.device), objective.dtype, objective.device
    )
    second.sums.update(_placed(known, objective.device))
    return second


def correct(tensors: Sums, sums: Sums, objective: Objective) -> None:
    """Put the corrected eigenvalues in the place of the products."""
    for key, value in sums.items():
        name = key.removesuffix("/corrected")
        tensors[f"{name}/values"] = value.reshape(-1) / objective.num_examples


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


def _agreed(state: tuple[Sums, str, int], group: Any) -> tuple[Sums, str, int]:
    """Where all processes go on: one that was stopped in an earlier phase gets what it missed."""
    if group is None:
        return state
    phases: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(phases, state[1], group=group)
    last = max(phases, key=("factors", "corrections", "done").index)
    if all(phase == last for phase in phases):
        return state
    sums = {k: v for k, v in state[0].items() if not k.endswith("/corrected")}
    box = [sums if state[1] == last else None]
    dist.broadcast_object_list(
        box, src=dist.get_global_rank(group, phases.index(last)), group=group
    )
    return state if state[1] == last or box[0] is None else (box[0], last, 0)


def _reduced(sums: Sums, group: Any) -> Sums:
    """Summed over the processes."""
    if group is not None:
        for key in sorted(sums):
            dist.all_reduce(sums[key], group=group)
    return sums


def _placed(tensors: Mapping[str, Tensor], device: torch.device) -> Sums:
    return {key: value.to(device) for key, value in tensors.items()}


def fit_fingerprint(objective: Objective, settings: FitSettings, world: int) -> str:
    """What a file of ``world`` parts of such a fit is known by."""
    data = (batch.data for batch in objective.batches("fingerprint"))
    tensors = itertools.chain([objective.identity()], data)
    shapes = {name: list(shape) for name, shape in objective.space.shapes.items()}
    return fingerprint(tensors, [asdict(settings), shapes, objective.num_examples, world])
