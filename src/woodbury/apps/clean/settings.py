"""What a run is told to do, checked before any work starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from woodbury import __version__
from woodbury.errors import DataError

__all__ = ["Settings", "parse_bytes"]

TASKS = ("auto", "classification", "regression")
MODELS = ("auto", "linear", "kernel", "mlp")
FORMATS = ("auto", "csv", "parquet")
UNITS = {"": 1, "b": 1}
UNITS |= {f"{p}{s}": 1024**i for i, p in enumerate("kmgt", 1) for s in ("ib", "")}
UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}


def parse_bytes(text: str | int) -> int:
    """Read an amount of memory.

    Args:
        text: a number of bytes, or a number with kB, MB, GB (powers of 1000) or KiB, MiB, GiB
            (powers of 1024; a bare K, M, G means the same).

    Returns:
        Bytes.

    Raises:
        DataError: it is not such an amount, or under 64 MiB, too little for any work.

    Example:
        >>> parse_bytes("2GiB")
        2147483648
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in UNITS:
        raise DataError(f"{text!r} is not an amount of memory. Write it like 2GiB or 500MB.")
    amount = int(float(match[1]) * UNITS[match[2]])
    if amount < 64 * 1024**2:
        raise DataError(f"A budget of {text} is too small for any work. Give at least 64MiB.")
    return amount


@dataclass(frozen=True)
class Settings:
    """Everything besides the table that the result depends on."""

    label: str | None
    text: tuple[str, ...]
    task: str
    model: str
    seed: int
    budget_bytes: int
    format: str
    version: str = __version__

    @classmethod
    def check(
        cls,
        *,
        label: str | None,
        text: str | Sequence[str] | None,
        task: str,
        model: str,
        seed: Any,
        budget: str | int,
        format: str,
    ) -> Settings:
        """Build the settings, or raise :class:`DataError` with the values that are allowed."""
        for name, value, allowed in (
            ("task", task, TASKS),
            ("model", model, MODELS),
            ("format", format, FORMATS),
        ):
            if value not in allowed:
                raise DataError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise DataError(f"seed must be a whole number from 0 to 2147483647, not {seed!r}.")
        columns = (text,) if isinstance(text, str) else tuple(text or ())
        return cls(label, columns, task, model, seed, parse_bytes(budget), format)

    def as_json(self) -> dict[str, Any]:
        """As JSON values, to be stored and compared."""
        return {**asdict(self), "text": list(self.text)}
