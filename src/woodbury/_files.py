"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from woodbury.errors import DataError

__all__ = ["atomic", "load_tensors", "save_tensors"]


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; put it in place when the block succeeds.

    Whoever reads ``path`` sees the old file or the whole new one, never a part: also after a power
    cut, for what was written is on the disk before it gets its name.

    Args:
        path: of the file, in a folder that exists.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from woodbury._files import atomic
        >>> with TemporaryDirectory() as folder:
        ...     with atomic(Path(folder) / "a.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     (Path(folder) / "a.txt").read_text()
        'whole'
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], words: Mapping[str, Any], *, form: str
) -> None:
    """Write tensors and JSON values to one safetensors file, whole or not at all.

    Args:
        path: of the file, in a folder that exists.
        tensors: of any device and layout.
        words: JSON values.
        form: what the file is, with a number that changes when its contents do.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": form, "words": json.dumps(dict(words))}
    with atomic(path) as temporary:
        save_file(plain, temporary, metadata=header)


def load_tensors(path: Path, *, form: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`save_tensors` wrote to ``path`` with the same ``form``.

    Raises:
        DataError: the file is missing, damaged, or of another form.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it and run again") from None
    if header.get("format") != form:
        raise DataError(f"{path} is no file of the form {form!r}; give another path or delete it")
    return tensors, json.loads(header["words"])
