"""Data as a sequence of batches that is the same at every pass.

Accepted: one batch (a tensor, a tuple of tensors, a mapping of tensors, a ``TensorDataset``), a
    list
of batches, a ``DataLoader``, or any other object that can be iterated over again and again. A tuple
is one batch, a list is a sequence of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from woodbury.errors import DataError

__all__ = ["Batch", "Batches", "Progress", "batch_size", "is_ordered", "normalize", "split"]

Progress = Callable[[str, int, "int | None"], None]

_TARGET_NAMES = ("labels", "label", "targets", "target", "y")
_INDEX_NAME = "indices"


@dataclass(frozen=True)
class Batch:
    """One batch on the device of the parameters.

    Attributes:
        index: its place in a pass over the data.
        data: the batch as the data gave it.
        size: number of examples.
        rows: places of its examples in the data, a slice or an index tensor ``[size]``.
        resident: whether ``data`` stays in memory anyway, because the caller's data is in memory on
            this device.
    """

    index: int
    data: Any
    size: int
    rows: slice | Tensor
    resident: bool = False

    def places(self) -> Tensor:
        """``rows`` as an index tensor ``[size]``."""
        if isinstance(self.rows, Tensor):
            return self.rows
        return torch.arange(self.rows.start, self.rows.stop)

    def select(self, values: Tensor | None) -> Tensor | None:
        """The entries of ``values`` (one per example of the data) that belong to this batch."""
        return None if values is None else values[self.rows]


def normalize(data: Any) -> Iterable[Any]:
    """An object that gives the same batches each time it is iterated over.

    Args:
        data: see the top of this module.

    Returns:
        A list where everything is in memory; otherwise an object that iterates ``data`` again. The
        random order and the random augmentations of a ``DataLoader`` that torch draws are replayed.

    Raises:
        DataError: ``data`` can be iterated over only once, or is a data set without batches.

    Example:
        >>> import torch
        >>> from woodbury.curvature.batches import normalize
        >>> [len(batch) for batch in normalize((torch.ones(4, 2), torch.ones(4)))]
        [2]
    """
    if _is_single_batch(data):
        return [data]
    if isinstance(data, DataLoader):
        return _Replayed(data)
    if isinstance(data, list | tuple):
        return data
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        tensors = getattr(data, "tensors", None)
        if tensors is not None:
            return [tuple(tensors)]
        raise DataError(
            f"{type(data).__name__} gives single examples, not batches; wrap it: "
            "DataLoader(dataset, batch_size=256)"
        )
    if isinstance(data, Iterator) or not isinstance(data, Iterable):
        raise DataError(
            f"data is a {type(data).__name__}, which cannot be iterated over more than once; "
            "operators pass over the data many times: give list(data), a DataLoader, or an object "
            "whose __iter__ starts again"
        )
    return data


def batch_size(batch: Any) -> int:
    """Number of examples of a batch: the length of its first tensor with at least one axis.

    Raises:
        DataError: the batch holds no such tensor.

    Example:
        >>> import torch
        >>> from woodbury.curvature.batches import batch_size
        >>> batch_size({"input_ids": torch.ones(3, 7), "labels": torch.ones(3)})
        3
    """
    for leaf in tree_leaves(_plain(batch)):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    raise DataError(
        f"a batch of type {type(batch).__name__} holds no tensor with a row per example"
    )


def split(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """``(args, kwargs, target)`` of a batch for ``model(*args, **kwargs)`` and a criterion.

    ``(x, y)`` gives ``model(x)``; a mapping or tuple ``x`` gives ``model(**x)`` or ``model(*x)``.
    In a mapping batch the target is ``labels``, ``label``, ``targets``, ``target`` or ``y`` and the
    rest are keyword arguments. ``(x, y, indices)`` or a key ``indices`` says which rows these are.

    Raises:
        DataError: the batch has none of these forms.

    Example:
        >>> from woodbury.curvature.batches import split
        >>> split({"input_ids": 1, "labels": 2})
        ((), {'input_ids': 1}, 2)
    """
    if isinstance(batch, Mapping):
        name = next((name for name in _TARGET_NAMES if name in batch), None)
        if name is None:
            raise DataError(
                f"a batch with keys {sorted(map(str, batch))} has no target; name it one of "
                f"{', '.join(_TARGET_NAMES)}"
            )
        rest = {key: value for key, value in batch.items() if key not in (name, _INDEX_NAME)}
        return (), rest, batch[name]
    if isinstance(batch, tuple | list) and len(batch) in (2, 3):
        inputs, target = batch[0], batch[1]
        if isinstance(inputs, Mapping):
            return (), dict(inputs), target
        if isinstance(inputs, tuple | list):
            return tuple(inputs), {}, target
        return (inputs,), {}, target
    length = f" of length {len(batch)}" if hasattr(batch, "__len__") else ""
    raise DataError(
        f"a batch is a {type(batch).__name__}{length}; expected (inputs, targets), (inputs, "
        "targets, indices) or a mapping with a key 'labels'. One batch is a tuple, a list is a "
        "sequence of batches; for any other form use Objective.functional"
    )


def is_ordered(data: Any) -> bool:
    """Whether the rows come in the order of the data set, as far as a loader tells."""
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return True
    sampler = data.batch_sampler
    if sampler is None:
        return isinstance(data.sampler, SequentialSampler)
    return type(sampler) is BatchSampler and isinstance(sampler.sampler, SequentialSampler)


class Batches:
    """The batches of some data, on one device, with the rows each of them holds.

    Args:
        data: see :func:`normalize`.
        device: where batches are moved.
        progress: called after each batch with what is done, batches done, batches in all or
            ``None`` where that is not known yet.
        paired: batches have a form that :func:`split` knows; their parts must agree in length, and
            row numbers are looked for.

    Raises:
        DataError: see :func:`normalize`; while iterating: no batch at all, a batch without rows, a
            batch whose targets are fewer or more than its inputs, or data that changed since the
            first pass.
    """

    def __init__(
        self,
        data: Any,
        device: torch.device,
        progress: Progress | None = None,
        *,
        paired: bool = False,
    ) -> None:
        self.device = device
        self.paired = paired
        self.progress = progress
        self.ordered = is_ordered(data)
        self.source = source = normalize(data)
        self.in_memory = isinstance(source, list | tuple)
        self._examples: int | None = None
        self._count: int | None = len(source) if isinstance(source, list | tuple) else None
        self._marks: list[tuple[int, float]] = []
        self._indexed = self._numbered = False

    def passes(self, what: str, start: int = 0) -> Iterator[Batch]:
        """One pass over the batches, without the first ``start`` of them."""
        examples, index = 0, -1
        for index, raw in enumerate(self.source):
            size = self._seen(index, raw)
            if index >= start:
                yield self._batch(raw, index, examples, size)
            examples += size
            if self.progress is not None:
                self.progress(what, index + 1, self._count)
        if examples == 0:
            raise DataError("the data holds no batch")
        if self._count is not None and self._count != index + 1:
            raise DataError(
                f"this pass over the data gave {index + 1} batches, an earlier one {self._count}; "
                "the data must be the same at every pass"
            )
        self._count, self._examples = index + 1, examples

    def first(self) -> Batch:
        """The first batch."""
        for index, raw in enumerate(self.source):
            return self._batch(raw, index, 0, self._checked_size(raw, index))
        raise DataError("the data holds no batch")

    @property
    def num_examples(self) -> int:
        """Number of examples; the first time this is asked it costs a pass over the data."""
        if self._examples is None:
            sizes = [self._seen(index, raw) for index, raw in enumerate(self.source)]
            if not sizes:
                raise DataError("the data holds no batch")
            self._count, self._examples = len(sizes), sum(sizes)
        return self._examples

    @property
    def known_examples(self) -> int | None:
        """The number of examples where it is known or costs nothing to find."""
        return self.num_examples if self.in_memory else self._examples

    @property
    def share(self) -> float:
        """One over the number of batches, or 0 where that is not known."""
        if self._count is not None:
            return 1 / self._count
        try:
            return 1 / len(self.source)  # type: ignore[arg-type]
        except (TypeError, ZeroDivisionError):
            return 0.0

    def require_rows(self, what: str) -> None:
        """Raise unless it is known which row of the data each example is."""
        if self.ordered or (self.num_examples and self._indexed):
            return
        raise DataError(
            f"it must be known which row is which ({what}), and the DataLoader shuffles; make it "
            "with shuffle=False, or let its batches carry row numbers as (inputs, targets, "
            "indices) or under the key 'indices'"
        )

    def require_numbers(self) -> None:
        """Raise unless row numbers, where batches carry them, are those of all rows, each once."""
        if self._numbered:
            return
        found = [self._indices(raw) for raw in self.source]
        given = [part.cpu().long() for part in found if part is not None]
        if given:
            order, count = torch.cat(given).sort().values, self.num_examples
            if len(given) < len(found) or not torch.equal(order, torch.arange(count)):
                raise DataError(
                    f"the indices in the batches go from {int(order[0])} to {int(order[-1])}; they "
                    f"must be the row numbers 0 to {count - 1} of the {count} examples, each once "
                    "(number the rows of a subset anew)"
                )
        self._numbered = True

    def _seen(self, index: int, raw: Any) -> int:
        """The size of a batch, which is the same batch as in earlier passes."""
        size = self._checked_size(raw, index)
        self._indexed = self._indexed or self._indices(raw) is not None
        if not self.in_memory:
            self._compare(index, size, raw)
        return size

    def _checked_size(self, raw: Any, index: int) -> int:
        try:
            size = batch_size(raw)
        except DataError as error:
            raise DataError(f"batch {index}: {error}") from None
        if size == 0:
            raise DataError(f"batch {index} has no rows; leave it out")
        if self.paired:
            target = split(raw)[2]
            if isinstance(target, Tensor) and target.dim() > 0 and len(target) != size:
                raise DataError(
                    f"batch {index} has {size} rows of inputs and {len(target)} targets"
                )
        return size

    def _rows(self, raw: Any, start: int, size: int) -> slice | Tensor:
        indices = self._indices(raw)
        if indices is None:
            return slice(start, start + size)
        return indices.to(self.device, torch.int64)

    def _indices(self, raw: Any) -> Tensor | None:
        indices = None
        if self.paired and isinstance(raw, Mapping):
            indices = raw.get(_INDEX_NAME)
        elif self.paired and len(raw) == 3:
            indices = raw[2]
        if isinstance(indices, Tensor) and not indices.is_floating_point() and indices.dim() == 1:
            return indices
        return None

    def _batch(self, raw: Any, index: int, start: int, size: int) -> Batch:
        plain = _plain(raw)
        data = tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, plain)
        pairs = zip(tree_leaves(plain), tree_leaves(data), strict=True)
        resident = self.in_memory and all(ours is given for given, ours in pairs)
        return Batch(index, data, size, self._rows(raw, start, size), resident)

    def _compare(self, index: int, size: int, raw: Any) -> None:
        """Remember a batch by a few numbers, and notice when another pass gives another batch."""
        total = 0.0
        for leaf in tree_leaves(_plain(raw)):
            if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.numel() > 0:
                total += float(torch.nan_to_num(leaf[0].detach().to(torch.float64)).sum())
        if index == len(self._marks):
            self._marks.append((size, total))
        elif self._marks[index] != (size, total):
            raise DataError(
                f"batch {index} is not what it was in an earlier pass; the data must be the same "
                "at every pass: fix the order and the augmentations, or give list(loader)"
            )


class _Replayed:
    """A loader whose every pass starts from the same state of torch's random numbers."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.state = torch.get_rng_state()
        sampler = loader.batch_sampler
        holders = [loader, loader.sampler, sampler, getattr(sampler, "sampler", None)]
        found = [getattr(holder, "generator", None) for holder in holders]
        generators = {id(g): g for g in found if isinstance(g, torch.Generator)}
        self.generators = [(g, g.get_state()) for g in generators.values()]

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        before = [(generator, generator.get_state()) for generator, _ in self.generators]
        for generator, state in self.generators:
            generator.set_state(state)
        own, batches = self.state, None
        try:
            while True:
                outer = torch.get_rng_state()
                torch.set_rng_state(own)
                try:
                    if batches is None:
                        batches = iter(self.loader)
                    batch = next(batches)
                except StopIteration:
                    return
                finally:
                    own = torch.get_rng_state()
                    torch.set_rng_state(outer)
                yield batch
        finally:
            for generator, state in before:
                generator.set_state(state)


def _is_single_batch(data: Any) -> bool:
    if isinstance(data, Tensor) or (isinstance(data, Mapping) and _holds_tensors(data)):
        return True
    if not isinstance(data, tuple):
        return False
    return any(isinstance(part, Tensor) for part in data)


def _holds_tensors(batch: Mapping) -> bool:
    return any(isinstance(value, Tensor) for value in batch.values())


def _plain(batch: Any) -> Any:
    """Mappings that torch does not look into (such as a tokenizer's output) as dictionaries."""
    if isinstance(batch, Mapping) and not isinstance(batch, dict):
        return dict(batch)
    return batch
