"""Training again on subsets of the rows: the truth that scores are compared with."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, NonFiniteError, ShapeError
from woodbury.influence.runs import Run

__all__ = ["Retrained", "half_subsets", "retrain"]

Train = Callable[..., Any]
Measure = Callable[[Any], Tensor]
Progress = Callable[[str, float], object]


class Settings(TypedDict, total=False):
    """What functions that call :func:`retrain` hand on to it."""

    seeds: Sequence[int] | Tensor
    folder: str | Path | None
    key: str
    group: int
    processes: int
    progress: Progress | None


@dataclass(frozen=True, eq=False)
class Retrained:
    """What models that were trained on subsets measure.

    Attributes:
        subsets: row numbers of each subset, ``S`` tensors.
        values: measurement ``[S, R, Q]`` of every subset, seed and query, float64.
        seeds: ``[S, R]``, what ``train`` was given.

    Example:
        >>> import torch
        >>> from woodbury.influence.evaluation import retrain
        >>> rows = torch.arange(4.0)
        >>> mean = retrain(lambda index, seed: rows[index].mean(), lambda m: m[None], [[0, 3], [1]])
        >>> mean.means()
        tensor([[1.5000],
                [1.0000]], dtype=torch.float64)
    """

    subsets: tuple[Tensor, ...]
    values: Tensor
    seeds: Tensor

    def means(self) -> Tensor:
        """The mean over seeds, ``[S, Q]``."""
        return self.values.mean(1)

    def standard_errors(self) -> Tensor:
        """Standard error of :meth:`means` over seeds, ``[S, Q]``; NaN with a single seed."""
        runs = self.values.shape[1]
        if runs == 1:
            return torch.full_like(self.values[:, 0], torch.nan)
        return self.values.std(1) / runs**0.5


def half_subsets(
    num_examples: int,
    count: int = 100,
    *,
    fraction: float = 0.5,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Random subsets of the rows, each drawn without replacement.

    Args:
        num_examples: $N$.
        count: how many subsets.
        fraction: of the rows in each, rounded down.
        generator: draws; the same subsets every time if not given.

    Returns:
        ``count`` tensors of ascending row numbers.

    Raises:
        ArgumentError: a number that makes no sense, or a subset would be empty.

    Example:
        >>> from woodbury.influence.evaluation import half_subsets
        >>> [len(subset) for subset in half_subsets(7, 2)]
        [3, 3]
    """
    size = int(num_examples * fraction)
    if count < 1 or not 0 < fraction <= 1 or size < 1:
        raise ArgumentError(
            f"{count} subsets of {fraction} of {num_examples} rows: give at least one subset, and "
            "a fraction in (0, 1] that leaves it a row"
        )
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    return [
        torch.randperm(num_examples, generator=generator)[:size].sort().values for _ in range(count)
    ]


def retrain(
    train: Train,
    measure: Measure,
    subsets: Sequence[Tensor | Sequence[int]],
    *,
    seeds: Sequence[int] | Tensor = (0,),
    folder: str | Path | None = None,
    key: str = "",
    group: int = 1,
    processes: int = 1,
    share: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> Retrained:
    """Train on every subset with every seed, and measure.

    Every finished model leaves its measurements in ``folder``: a run that was killed goes on there,
    runs of several processes or machines share it, and what is asked for again is read.

    Args:
        train: ``train(rows, seed) -> model`` with row numbers ``[K]`` (int64); deterministic given
            both. With ``group > 1`` it is called with lists of both and returns a list of models,
            for trainers that do many at once.
        measure: ``measure(model) -> [Q]``, one number for every query.
        subsets: row numbers, one list for each model.
        seeds: ``[R]`` for all subsets, or ``[S, R]``.
        folder: where results are kept.
        key: words for what ``train`` and ``measure`` depend on (model, data, epochs); a folder of
            another key is refused.
        group: how many models one call of ``train`` makes.
        processes: how many processes train at the same time; with more than one, ``train`` and
            ``measure`` must be picklable (functions of a module), and torch's threads are divided
            between them.
        share: ``(k, of)``: train the k-th of so many shares of the models only (several machines
            with one folder); the others must be in ``folder`` by then, or their values are NaN.
        progress: called as ``progress(stage, fraction)``.

    Returns:
        :class:`Retrained`.

    Raises:
        ArgumentError: no subsets, an empty one, a number that makes no sense, or functions that
            cannot be sent to other processes.
        ShapeError: ``measure`` returns something else than ``[Q]``, or seeds do not fit.
        NonFiniteError: a measurement is NaN or infinite; the message names subset and seed.
        DataError: the folder holds other subsets, seeds or another key.

    Cost: as many trainings as there are subsets and seeds.

    Example:
        >>> import torch
        >>> from woodbury.influence.evaluation import half_subsets, retrain
        >>> x = torch.arange(6.0)
        >>> found = retrain(
        ...     lambda rows, seed: x[rows].sum(), lambda total: total[None], half_subsets(6, 3)
        ... )
        >>> found.values.shape
        torch.Size([3, 1, 1])
    """
    rows = [torch.as_tensor(subset).long().cpu() for subset in subsets]
    table = _seed_table(seeds, len(rows))
    _check(rows, group, processes, share)
    words = {"kind": "retraining", "key": key, "subsets": _digest(rows), "seeds": table.tolist()}
    run = Run(folder, words)
    jobs = [(i, r) for i in range(len(rows)) for r in range(table.shape[1])]
    found: dict[tuple[int, int], Tensor] = {}
    for job in jobs:
        piece = run.load(_name(*job))
        if piece is not None:
            found[job] = piece[0]["values"]
    mine = [job for position, job in enumerate(jobs) if position % share[1] == share[0]]
    todo = [job for job in mine if job not in found]
    for part, values in _results(train, measure, rows, table, todo, group, processes):
        for job, value in zip(part, values, strict=True):
            found[job] = _checked(value, job, table, found)
            run.keep(_name(*job), {"values": found[job]}, {"seed": int(table[job])})
        if progress is not None:
            progress("retraining", len([job for job in mine if job in found]) / len(mine))
    width = len(next(iter(found.values()))) if found else 0
    missing = torch.full((width,), torch.nan, dtype=torch.float64)
    stacked = torch.stack([found.get(job, missing) for job in jobs])
    return Retrained(tuple(rows), stacked.view(len(rows), table.shape[1], width), table)


def _results(
    train: Train,
    measure: Measure,
    rows: list[Tensor],
    table: Tensor,
    todo: list[tuple[int, int]],
    group: int,
    processes: int,
) -> Iterator[tuple[list[tuple[int, int]], list[Tensor]]]:
    """Groups of jobs and what their models measure, as they are finished."""
    parts = [todo[start : start + group] for start in range(0, len(todo), group)]
    given = [
        ([rows[i] for i, _ in part], [int(table[job]) for job in part], group > 1) for part in parts
    ]
    if processes == 1 or len(parts) < 2:
        for part, (subsets, seeds, many) in zip(parts, given, strict=True):
            yield part, _train(train, measure, subsets, seeds, many)
        return
    _require_picklable(train, measure, processes)
    threads = max(1, torch.get_num_threads() // processes)
    context = get_context("spawn")  # a fork would share the threads of torch
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        waiting = {
            pool.submit(_train, train, measure, *arguments): part
            for part, arguments in zip(parts, given, strict=True)
        }
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def _require_picklable(train: Train, measure: Measure, processes: int) -> None:
    for name, function in (("train", train), ("measure", measure)):
        try:
            pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ArgumentError(
                f"{name} cannot be sent to {processes} processes ({error}); define it as a "
                "function of a module (no lambda, nothing inside of a function), or take "
                "processes=1"
            ) from None


def _train(
    train: Train, measure: Measure, subsets: list[Tensor], seeds: list[int], many: bool
) -> list[Tensor]:
    models = train(subsets, seeds) if many else [train(subsets[0], seeds[0])]
    if len(models) != len(subsets):
        raise ShapeError(f"train returned {len(models)} models for {len(subsets)} subsets")
    with torch.no_grad():
        return [torch.as_tensor(measure(model)).detach().double().cpu() for model in models]


def _checked(
    value: Tensor, job: tuple[int, int], table: Tensor, found: dict[tuple[int, int], Tensor]
) -> Tensor:
    width = len(next(iter(found.values()))) if found else None
    if value.dim() != 1 or (width is not None and len(value) != width):
        expected = "[Q]" if width is None else f"[{width}]"
        raise ShapeError(f"measure returned shape {tuple(value.shape)}, expected {expected}")
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(
            f"the model of subset {job[0]} with seed {int(table[job])} measures NaN or infinity: "
            "its training may have diverged"
        )
    return value


def _seed_table(seeds: Sequence[int] | Tensor, count: int) -> Tensor:
    table = torch.as_tensor(seeds).long()
    if table.dim() == 1:
        table = table.expand(count, -1)
    if table.dim() != 2 or len(table) != count or not table.shape[1]:
        raise ShapeError(
            f"seeds have shape {tuple(table.shape)}; expected [R] or [{count}, R] with R >= 1"
        )
    return table.contiguous()


def _check(rows: list[Tensor], group: int, processes: int, share: tuple[int, int]) -> None:
    if not rows:
        raise ArgumentError("no subsets to train on")
    for i, subset in enumerate(rows):
        if subset.dim() != 1 or not len(subset) or bool((subset < 0).any()):
            raise ArgumentError(f"subset {i} has shape {tuple(subset.shape)}; give row numbers [K]")
    if group < 1 or processes < 1:
        raise ArgumentError(f"group is {group} and processes {processes}; both are at least 1")
    if not 0 <= share[0] < share[1]:
        raise ArgumentError(f"share is {share}; give (k, of) with 0 <= k < of")


def _name(subset: int, run: int) -> str:
    return f"subset{subset:05d}-run{run:03d}"


def _digest(rows: list[Tensor]) -> str:
    found = hashlib.sha256()
    for subset in rows:
        found.update(f"{len(subset)}:".encode())
        found.update(subset.numpy().tobytes())
    return found.hexdigest()[:32]
