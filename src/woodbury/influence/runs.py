"""The folder of a run: what is finished stays finished when the run is killed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from woodbury._files import atomic
from woodbury.curvature import Objective
from woodbury.errors import DataError
from woodbury.influence.files import load_tensors, save_tensors
from woodbury.operators import LinearOperator

__all__ = ["Run", "fingerprint", "run_of"]

# Numbers that two processes find for the same run differ by rounding, those of another run by more.
_SAME = 1e-4


def fingerprint(objective: Objective) -> str:
    """A hash of an objective: parameters, constants and buffers, criterion, weights, ``l2``, data.

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
    _add_all(found, [*objective.identity(), objective.l2])
    for batch in objective.batches("fingerprint"):
        _add_all(found, batch.data)
    return found.hexdigest()[:32]


def _add_all(found: Any, tree: Any) -> None:
    leaves, structure = tree_flatten(tree)
    found.update(repr(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            _add(found, leaf)
        else:
            found.update(repr(leaf).encode())


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

    def require_same(self, name: str, value: Tensor, what: str) -> None:
        """Keep a value the first time, and later refuse one that differs by more than rounding.

        Raises:
            DataError: it differs.
        """
        if self.path is None:
            return
        kept = self.load(name)
        if kept is None:
            self.keep(name, {"value": value}, {})
            return
        earlier = kept[0]["value"].to(value)
        same = earlier.shape == value.shape
        if same and float((earlier - value).norm()) <= _SAME * float(earlier.norm()):
            return
        raise DataError(
            f"{self.path} holds another run ({what} were other numbers); give the model, "
            "data and settings of that run, choose another folder, or delete this one"
        )

    def keep(self, name: str, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
        """Write a finished piece."""
        if self.path is not None:
            save_tensors(self.path / f"{name}.safetensors", tensors, words)


def run_of(
    path: str | Path | None,
    words: Mapping[str, Any],
    objective: Objective,
    asked: Objective | None = None,
    matrix: LinearOperator | None = None,
) -> Run:
    """The folder of scores, where it is of this objective, these queries and this matrix.

    Functions of the user (a measurement, a loss) cannot be hashed, and an operator need not be
    there: what they give is compared with what they gave when the folder was made.

    Args:
        path: the folder, or ``None`` to keep nothing.
        words: settings, JSON values.
        objective: of the training data.
        asked: the queries.
        matrix: an operator of the user's.

    Raises:
        DataError: as for :class:`Run`.

    Cost: with a folder, a pass over the data without the model, and a forward pass over the
    queries.
    """
    if path is None:
        return Run(None, {})
    words = {**words, "model_and_data": fingerprint(objective)}
    if asked is not None:
        words["queries"] = fingerprint(asked)
    run = Run(path, words)
    if asked is not None:
        run.require_same("measured", asked.per_example_losses(), "what is measured of the queries")
    if matrix is not None:
        probe = torch.linspace(-1, 1, matrix.shape[0], dtype=torch.float64)
        product = matrix @ probe.to(matrix.device, matrix.dtype)
        run.require_same("matrix", product, "products with the matrix")
    return run
