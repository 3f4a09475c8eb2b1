"""Rows of a JSON Lines file, checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from woodbury.errors import DataError

__all__ = ["Record", "read_records"]

_SHOWN = 5


@dataclass(frozen=True)
class Record:
    """One row of text.

    Attributes:
        line: its number in the file, from 1.
        prompt: text that is read and not predicted; empty where there is none.
        text: text that is predicted, or classified.
        label: what the file says of its class; ``None`` where it says nothing.
        name: what the file calls the row (field ``id``), else ``None``.
    """

    line: int
    prompt: str
    text: str
    label: str | int | None = None
    name: str | None = None


def read_records(path: Path, *, text: str = "text", label: str | None = None) -> list[Record]:
    """The rows of ``path``: one JSON object a line.

    Args:
        path: the file.
        text: the field with the text. A row may have ``prompt`` and ``completion`` instead: then
            only the completion is predicted.
        label: the field with the class; ``None`` where there are no classes.

    Raises:
        DataError: the file is missing, empty or not UTF-8; a line is not a JSON object, or lacks a
            field or holds something else in it. The message has the number of the line.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    records = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    records.append(_record(line, number, path.name, text, label))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name} is not UTF-8 text (byte {error.start} of its buffer); convert it, for "
            "example with iconv -t UTF-8."
        ) from None
    if not records:
        raise DataError(f"{path.name} has no rows; it needs one JSON object a line.")
    return records


def _record(line: str, number: int, file: str, text: str, label: str | None) -> Record:
    where = f"Line {number} of {file}"
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error.msg} at column {error.colno}). Every line must be one "
            f'object, like {{"{text}": "..."}}.'
        ) from None
    if not isinstance(found, dict):
        raise DataError(
            f"{where} is a {type(found).__name__}; every line must be an object, like "
            f'{{"{text}": "..."}}.'
        )
    prompt = ""
    if text not in found and "completion" in found:
        prompt = _string(found.get("prompt", ""), "prompt", where)
        body = _string(found["completion"], "completion", where)
    elif text in found:
        body = _string(found[text], text, where)
    else:
        raise DataError(
            f"{where} has no field {text!r}; it has {_some(found)}. Name the field of the text "
            "with --text, or give prompt and completion."
        )
    if not body.strip():
        raise DataError(f"{where} has no text; take the row out.")
    name = found.get("id")
    return Record(
        line=number,
        prompt=prompt,
        text=body,
        label=_label(found, label, where),
        name=None if name is None else str(name),
    )


def _string(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} is a {type(value).__name__}, not text.")
    return value


def _label(found: dict[str, Any], field: str | None, where: str) -> str | int | None:
    if field is None:
        return None
    if field not in found:
        raise DataError(
            f"{where} has no field {field!r}, and a classifier needs the class of every row; it "
            f"has {_some(found)}. Name the field with --label."
        )
    value = found[field]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(
            f"{where}: {field!r} is {value!r}; a class is its name or its number, 0, 1, 2, ..."
        )
    return value


def _some(found: dict[str, Any]) -> str:
    names = list(found)
    return (", ".join(map(repr, names[:_SHOWN])) or "none") + (", ..." * (len(names) > _SHOWN))
