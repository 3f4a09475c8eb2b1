"""Peak memory of tensors, counted exactly: no timing, no allocator, no noise."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of storages made while it is active: ``bytes`` at most, ``live`` now."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    @property
    def live(self) -> int:
        dead = [key for key, (storage, _) in self.storages.items() if storage.expired()]
        for key in dead:
            del self.storages[key]
        return sum(size for _, size in self.storages.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        for tensor in tree_leaves(result):
            if _is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.storages:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.bytes = max(self.bytes, self.live)
        return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "meta"
