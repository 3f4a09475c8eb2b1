"""Tensors and words in one file, written such that a kill never leaves half of one."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from woodbury._files import load_tensors, save_tensors
from woodbury.errors import DataError

__all__ = ["Keeper", "TensorFile", "fingerprint"]

_FORM = "woodbury layers 1"


class TensorFile:
    """A safetensors file with a JSON header.

    Args:
        path: where; ``.safetensors`` is added where it is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = Path(path)
        self.path = given if given.suffix == ".safetensors" else Path(f"{given}.safetensors")

    def save(self, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
        """Write; whoever reads sees what was there before, or all of this."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(self.path, tensors, words, form=_FORM)

    def load(self, mark: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved with the word ``fingerprint`` equal to ``mark``; ``None`` for no file.

        Raises:
            DataError: the file is no such file, or of another model, data or setting.
        """
        if not self.path.is_file():
            return None
        tensors, words = load_tensors(self.path, form=_FORM)
        if words.get("fingerprint") != mark:
            raise DataError(
                f"{self.path.name} was written for other parameters, data or settings (fingerprint "
                f"{words.get('fingerprint', 'none')[:12]}, now {mark[:12]}); give another path, or "
                "remove the file"
            )
        return tensors, words


class Keeper:
    """Writes what a pass over the data has so far, every few seconds.

    Args:
        file: where; ``None`` keeps nothing.
        mark: the fingerprint of model, data and settings.
        every: seconds between writes.
        words: what else is written.
    """

    def __init__(
        self,
        file: TensorFile | None,
        mark: str,
        every: float,
        words: Mapping[str, Any] | None = None,
    ) -> None:
        self.file, self.mark, self.every = file, mark, every
        self.words = dict(words or {})
        self.last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return self.file is not None and time.monotonic() - self.last >= self.every

    def save(
        self, tensors: Mapping[str, Tensor], phase: str, batch: int, *, now: bool = False
    ) -> None:
        """Write, if it is time or ``now``: the pass is before ``batch`` of ``phase``."""
        if self.file is None or not (now or self.due):
            return
        self.file.save(
            tensors, {"fingerprint": self.mark, "phase": phase, "next": batch, **self.words}
        )
        self.last = time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], str, int]:
        """What was written: tensors, phase and the next batch; of a new run nothing."""
        found = None if self.file is None else self.file.load(self.mark)
        if found is None:
            return {}, "factors", 0
        tensors, words = found
        return tensors, words["phase"], words["next"]


def fingerprint(tensors: Iterable[Any], words: Any) -> str:
    """A hash of tensors (leaves of any structure) and of what JSON can write."""
    digest = hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode())
    for tree in tensors:  # one after the other: they may be batches that are made as they come
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
                plain = leaf.detach().cpu().contiguous().reshape(-1)
                digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()
