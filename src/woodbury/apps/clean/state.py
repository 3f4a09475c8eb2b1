"""The folder a run writes to: found writable before work starts, and resumable after a kill.

``DIR/state/run.json`` holds the settings, a hash of the input and how the run ended;
``DIR/state/checkpoint`` belongs to the engine.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from woodbury._files import atomic
from woodbury.apps.files import writable_folder
from woodbury.errors import DataError

__all__ = ["OUTPUTS", "RunFolder"]

OUTPUTS = (
    "rows.csv",
    "rows.parquet",
    "cleaned.csv",
    "cleaned.tsv",
    "cleaned.parquet",
    "cleaned.npz",
    "summary.json",
    "report.html",
)
FORMAT = 1


@dataclass
class RunFolder:
    """The output folder of one run.

    Attributes:
        path: the folder.
        resume: whether ``--resume`` was given.
        replaces: an earlier run is being replaced.
        resumed: an earlier run of the same settings is being continued.
    """

    path: Path
    resume: bool
    replaces: bool = False
    resumed: bool = False

    @classmethod
    def open(cls, path: Path, resume: bool) -> RunFolder:
        """Create the folder, and make sure that it can be written and is ours to write.

        A folder that is missing or empty is taken; that of a run that finished or failed is
        written anew; that of a run that was killed needs ``resume``, so that no work is lost; any
        other is refused.

        Raises:
            DataError: it cannot be written, holds other files, or a run that was killed.
        """
        writable_folder(path)
        folder = cls(path, resume)
        earlier = folder.read()
        if earlier is None:
            strange = sorted(item.name for item in path.iterdir() if item.name != "state")
            if strange:
                raise DataError(
                    f"The output folder {path} is not empty ({strange[0]!r}, {len(strange)} files) "
                    "and was not written by woodbury. Choose a new folder with --out."
                )
        elif not resume and earlier["ended"] == "killed":
            raise DataError(
                f"{path} holds an unfinished run of {earlier['input']['name']}. Add --resume to go "
                "on with it, choose another folder with --out, or delete this one."
            )
        return folder

    @property
    def state(self) -> Path:
        """The file of settings."""
        return self.path / "state" / "run.json"

    @property
    def checkpoint(self) -> Path:
        """Where the engine keeps its state."""
        return self.path / "state" / "checkpoint"

    def read(self) -> dict[str, Any] | None:
        """The stored state, or None where there is none."""
        try:
            state = json.loads(self.state.read_text(encoding="utf-8"))
            return state if state["format"] == FORMAT and state["ended"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self, settings: dict[str, Any], source: dict[str, Any]) -> None:
        """Compare with the stored run, or store this one and remove what an earlier run left.

        Args:
            settings: what the result depends on, JSON values.
            source: ``name`` and ``sha256`` of the input (and ``trusted_sha256``).

        Raises:
            DataError: ``resume`` with other settings or another input.
        """
        earlier = self.read()
        for left in self.path.glob(".*.tmp.*"):  # of a killed run
            left.unlink()
        if earlier is not None and self.resume:
            self._compare(earlier, settings, source)
            self.resumed = True
            return
        self.replaces = earlier is not None
        self._store(settings, source, "killed")  # until it ends in another way
        for name in OUTPUTS:
            (self.path / name).unlink(missing_ok=True)
        for left in self.state.parent.glob(f"{self.checkpoint.name}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def end(self, how: str) -> None:
        """Mark the run as ``"finished"`` (its outputs are complete) or ``"failed"``."""
        state = self.read()
        if state is not None:
            self._store(state["settings"], state["input"], how)

    def _store(self, settings: dict[str, Any], source: dict[str, Any], ended: str) -> None:
        self.state.parent.mkdir(exist_ok=True)
        state = {"format": FORMAT, "ended": ended, "settings": settings, "input": source}
        with atomic(self.state) as temporary:
            temporary.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def _compare(
        self, earlier: dict[str, Any], settings: dict[str, Any], source: dict[str, Any]
    ) -> None:
        differences = [
            f"{key} was {earlier['settings'].get(key)!r} and is {value!r}"
            for key, value in settings.items()
            if earlier["settings"].get(key) != value
        ]
        if earlier["input"].get("sha256") != source["sha256"]:
            differences.append(f"the content of {source['name']} is not the same")
        if earlier["input"].get("trusted_sha256") != source.get("trusted_sha256"):
            differences.append("the trusted rows are not the same")
        if differences:
            raise DataError(
                f"Cannot resume in {self.path}: {'; '.join(differences)}. Give the settings and "
                "the table of the first run, or choose another folder with --out."
            )
