"""Batches drawn for stochastic algorithms: unbiased, seeded, resumable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from woodbury.curvature.batches import Batch, Batches
from woodbury.errors import ArgumentError, DataError

__all__ = ["BatchSize", "Sampler"]

BatchSize = int | Literal["all"] | None


class Sampler:
    r"""Draws the batches that a stochastic algorithm sees, and can be stopped and resumed.

    - ``batch_size=None`` draws one of the batches that the data is made of, with probability in
      proportion to its rows, so that the mean loss of a draw is an unbiased estimate. Data that is
      a single batch is drawn whole. A loader gives its batches in its own order, pass after pass.
    - ``batch_size=B`` draws ``B`` rows of data in memory, without replacement until fewer than
      ``B`` are left; then the rows are shuffled anew.
    - ``batch_size="all"`` draws everything, which the oracles then go through batch by batch.

    Made by :meth:`Bilevel.sampler`.

    Args:
        batches: the data; ``None`` for a loss that takes none.
        batch_size: rows in a draw, ``"all"``, or ``None``.
        generator: source of the draws.

    Raises:
        ArgumentError: ``batch_size`` is not one of these, or more than there are rows.
        DataError: rows are asked for of data that is not in memory.

    Cost: data in memory is held on the device of the parameters; with ``batch_size=B`` and data of
    several batches, one more copy of it.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import Bilevel
        >>> x = torch.arange(6.0)
        >>> loss = lambda w, a, batch: (w - a * batch).square().mean()
        >>> problem = Bilevel(loss, loss, torch.ones(1), torch.ones(1), inner_data=x, outer_data=x)
        >>> sampler = problem.sampler("inner", 2, torch.Generator().manual_seed(0))
        >>> sorted(torch.cat([sampler.draw().data for _ in range(3)]).tolist())
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """

    def __init__(
        self,
        batches: Batches | None,
        batch_size: BatchSize,
        generator: torch.Generator,
    ) -> None:
        if isinstance(batch_size, bool) or not (
            batch_size in (None, "all") or (isinstance(batch_size, int) and batch_size >= 1)
        ):
            raise ArgumentError(
                f"batch_size is {batch_size!r}; give a number of rows, 'all', or None for the "
                "batches as they are in the data"
            )
        self.batches = batches
        self.batch_size = batch_size
        self.generator = generator
        self.position = 0
        self._order: Tensor | None = None
        self._stream: Iterator[Batch] | None = None
        self._kept: list[Batch] = []
        self._rows: Any = None
        if batches is None or batch_size == "all":
            return
        if batches.in_memory:
            self._kept = list(batches.passes("draws"))
        if isinstance(batch_size, int):
            self._rows = self._joined(batches, batch_size)

    @property
    def count(self) -> int | None:
        """How many different batches there are to draw; ``None`` where rows are drawn."""
        if self.batches is None or self.batch_size == "all":
            return 1
        return None if isinstance(self.batch_size, int) else len(self._kept) or None

    def draw(self) -> Batch | None:
        """The next batch; ``None`` stands for all of the data, or for a loss without data."""
        if self.batches is None or self.batch_size == "all":
            return None
        if isinstance(self.batch_size, int):
            return self._draw_rows(self.batch_size)
        if not self._kept:
            return self._next_of_stream()
        if len(self._kept) == 1:
            return self._kept[0]
        sizes = torch.tensor([batch.size for batch in self._kept], dtype=torch.float64)
        return self._kept[int(torch.multinomial(sizes, 1, generator=self.generator))]

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs so that the next draws are the same."""
        return {
            "generator": self.generator.get_state(),
            "position": self.position,
            "order": None if self._order is None else self._order.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the sampler stood when ``state`` was taken."""
        self.generator.set_state(state["generator"])
        self.position = int(state["position"])
        order = state["order"]
        self._order = None if order is None else order.clone()
        self._stream = None

    def _joined(self, batches: Batches, batch_size: int) -> Any:
        if not batches.in_memory:
            raise DataError(
                "rows cannot be drawn of data that is not in memory; let the loader make batches "
                "of the size you want, and leave batch_size out"
            )
        total = batches.num_examples
        if batch_size > total:
            raise ArgumentError(f"batch_size is {batch_size}, the data has {total} rows")
        if len(self._kept) == 1:
            return self._kept[0].data

        def join(*parts: Any) -> Any:
            return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]

        return tree_map(join, self._kept[0].data, *(batch.data for batch in self._kept[1:]))

    def _draw_rows(self, size: int) -> Batch:
        total = self.batches.num_examples if self.batches is not None else 0
        if self._order is None or self.position + size > total:
            self._order = torch.randperm(total, generator=self.generator)
            self.position = 0
        rows = self._order[self.position : self.position + size]
        self.position += size

        def pick(leaf: Any) -> Any:
            per_row = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == total
            return leaf[rows.to(leaf.device)] if per_row else leaf

        return Batch(0, tree_map(pick, self._rows), size, rows)

    def _next_of_stream(self) -> Batch:
        assert self.batches is not None  # otherwise there is nothing to stream
        if self._stream is None:
            self._stream = self.batches.passes("draws", start=self.position)
        batch = next(self._stream, None)
        if batch is None:
            self.position = 0
            self._stream = self.batches.passes("draws")
            batch = next(self._stream)
        self.position += 1
        return batch
