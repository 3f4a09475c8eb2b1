"""Tensors and words in one file, written such that a kill never leaves half of one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from woodbury.errors import DataError

__all__ = ["TensorFile", "fingerprint"]

_FORMAT = "woodbury layers 1"


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
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            header = {"format": _FORMAT, "words": json.dumps(dict(words))}
            save_file(held, temporary, metadata=header)
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, mark: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved with the word ``fingerprint`` equal to ``mark``; ``None`` for no file.

        Raises:
            DataError: the file is no such file, or of another model, data or setting.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(f"{self.path.name} cannot be read ({error}); remove it") from None
        if header.get("format") != _FORMAT:
            raise DataError(f"{self.path.name} was not written by this library; remove it")
        words = json.loads(header["words"])
        if words.get("fingerprint") != mark:
            raise DataError(
                f"{self.path.name} was written for other parameters, data or settings (fingerprint "
                f"{words.get('fingerprint', 'none')[:12]}, now {mark[:12]}); give another path, or "
                "remove the file"
            )
        return tensors, words


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
