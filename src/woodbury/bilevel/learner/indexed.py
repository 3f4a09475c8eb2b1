"""A data set whose examples carry their number."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from woodbury.errors import DataError

__all__ = ["Indexed"]


class Indexed(Dataset):
    """``(inputs, target, index)`` for a data set of ``(inputs, target)``.

    Args:
        dataset: a data set with a length, whose items are pairs, or mappings.

    Raises:
        DataError: at use, an item is neither.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from woodbury.bilevel import Indexed
        >>> pairs = TensorDataset(torch.zeros(4, 2), torch.ones(4))
        >>> inputs, targets, indices = next(iter(DataLoader(Indexed(pairs), batch_size=3)))
        >>> indices
        tensor([0, 1, 2])
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        if isinstance(item, dict):
            return {**item, "indices": index}
        if isinstance(item, tuple | list) and len(item) == 2:
            return (*item, index)
        raise DataError(
            f"item {index} of the data set is a {type(item).__name__}; expected (inputs, target) "
            "or a mapping"
        )
