"""What processes that train one model together agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from woodbury.errors import ArgumentError, DataError, NonFiniteError

__all__ = ["Processes"]


class Processes:
    """The processes of a ``DistributedDataParallel`` model; one for every other model."""

    def __init__(self, model: nn.Module) -> None:
        parallel = isinstance(model, nn.parallel.DistributedDataParallel)
        self.group: Any = getattr(model, "process_group", None)
        self.count = dist.get_world_size(self.group) if parallel else 1
        self.device = next(model.parameters()).device

    def mean(self, x: Tensor) -> Tensor:
        """The mean over processes; ``x`` itself where there is one."""
        if self.count == 1:
            return x
        total = x.contiguous().clone()
        dist.all_reduce(total, group=self.group)
        return total.div_(self.count)

    def mean_of(self, value: float) -> float:
        """The same of a number."""
        if self.count == 1:
            return value
        return self.mean(torch.tensor([value], dtype=torch.float64, device=self.device)).item()

    def shares(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """What a mean over local rows counts in the mean over processes, for each batch.

        Raises:
            DataError: some process has no rows; all of them raise.
        """
        if self.count == 1:
            return dict.fromkeys(sizes, 1.0)
        empty = sum(size == 0 for size in sizes.values())
        mine = torch.tensor([*sizes.values(), empty], dtype=torch.float64, device=self.device)
        means = self.mean(mine).tolist()
        if means[-1] > 0:
            raise DataError("a process was given a batch without rows; give each of them some")
        return {what: sizes[what] / mean for what, mean in zip(sizes, means, strict=False)}

    def require_finite(self, loss: Tensor, what: str) -> None:
        """Raise in all processes if the loss of one is NaN or infinite."""
        if self.count > 1 and not torch.isfinite(self.mean(loss.detach())).item():
            raise NonFiniteError(f"the {what} loss of a process is NaN or infinite")

    @torch.no_grad()
    def start_alike(self, tensors: list[Tensor]) -> None:
        """Give all processes the values of the first.

        Raises:
            ArgumentError: they have tensors of other sizes.
        """
        if self.count == 1:
            return
        sizes = torch.tensor([float(tensor.numel()) for tensor in tensors], device=self.device)
        if not torch.equal(self.mean(sizes), sizes):
            raise ArgumentError(
                f"the hyperparameters of this process have sizes {sizes.int().tolist()}, others "
                "have other sizes; make them of all the data in every process, not of a part"
            )
        source = dist.get_global_rank(self.group, 0)
        for tensor in tensors:
            dist.broadcast(tensor, source, group=self.group)
