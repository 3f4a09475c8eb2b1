"""The folder of a run: what is finished stays finished when the run is killed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from woodbury._files import atomic
from woodbury.curvature import Objective
from woodbury.errors import DataError
from woodbury.influence.files import load_tensors, save_tensors

__all__ = ["Run", "fingerprint"]


def fingerprint(objective: Objective) -> str:
    """A hash of the parameters and the data of an objective: the same run, or another.

    Cost: a pass over the data, without the model.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.influence.runs import fingerprint
        >>> model = torch.nn.Linear(2, 1)
        >>> one = Objective(model, "mse", (torch.ones(3, 2), torch.ones(3, 1)))
        >>> other = Objective(model, "mse", (torch.ones(3, 2), torch.zeros(3, 1)))
        >>> fingerprint(one) == fingerprint(one), fingerprint(one) == fingerprint(other)
        (True, False)
    """
    found = hashlib.sha256()
    found.update(repr(objective.space).encode())
    _add(found, objective.params_vector())
    for batch in objective.batches("fingerprint"):
        for leaf in tree_leaves(batch.data):
            if isinstance(leaf, Tensor):
                _add(found, leaf)
            else:
                found.update(repr(leaf).encode())
    return found.hexdigest()[:32]


def _add(found: Any, tensor: Tensor) -> None:
    found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    found.update(plain.view(torch.uint8).numpy() if plain.numel() else b"")


class Run:
    """Finished pieces of one run, by name; pieces of another run are refused.

    Args:
        path: the folder, or ``None`` to keep nothing.
        words: all that the result depends on, JSON values.

    Raises:
        DataError: the folder holds another run, or something else, or cannot be written.
    """

    def __init__(self, path: str | Path | None, words: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        given = json.loads(json.dumps(dict(words)))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            earlier = self._earlier()
            if earlier is None:
                with atomic(self.path / "run.json") as temporary:
                    temporary.write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")
                return
        except OSError as error:
            raise DataError(
                f"the folder {self.path} cannot be written ({error.strerror or error}); choose "
                "another"
            ) from None
        differences = [
            f"{key} was {earlier.get(key)!r} and is {given.get(key)!r}"
            for key in {**earlier, **given}
            if earlier.get(key) != given.get(key)
        ]
        if differences:
            raise DataError(
                f"{self.path} holds another run ({'; '.join(differences)}); give the model, data "
                "and settings of that run, choose another folder, or delete this one"
            )

    def _earlier(self) -> dict[str, Any] | None:
        assert self.path is not None  # seen by the caller
        file = self.path / "run.json"
        if file.is_file():
            try:
                found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
                return found
            except ValueError:
                raise DataError(f"{file} is damaged; delete the folder {self.path}") from None
        strange = sorted(item.name for item in self.path.iterdir() if ".tmp" not in item.name)
        if strange:
            raise DataError(
                f"the folder {self.path} holds {strange[0]!r} and no run of woodbury; choose an "
                "empty one"
            )
        return None

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A finished piece, or ``None``."""
        if self.path is None or not (file := self.path / f"{name}.safetensors").is_file():
            return None
        return load_tensors(file)

    def keep(self, name: str, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
        """Write a finished piece."""
        if self.path is not None:
            save_tensors(self.path / f"{name}.safetensors", tensors, words)
