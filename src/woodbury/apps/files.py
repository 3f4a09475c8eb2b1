"""The folder of a run, and what every job writes there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from woodbury._files import atomic
from woodbury.errors import DataError

__all__ = ["plain", "writable_folder", "write_json"]


def writable_folder(path: Path) -> Path:
    """Create the folder if it is missing, and make sure that it can be written: before work starts.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".woodbury-probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise DataError(
            f"The output folder {path} cannot be written ({error.strerror or error}). Choose "
            "another with --out, or free this one."
        ) from None
    return path


def write_json(content: dict[str, Any], path: Path) -> Path:
    """Write strict JSON: NumPy numbers as numbers, NaN and infinity as null."""
    with atomic(path) as temporary:
        text = json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def plain(value: Any) -> Any:
    """A value as what JSON can hold."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
