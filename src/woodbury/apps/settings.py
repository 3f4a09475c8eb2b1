"""Settings that several jobs have, checked before any work starts."""

from __future__ import annotations

import re
from typing import Any

from woodbury.errors import DataError

__all__ = ["check_seed", "parse_bytes"]

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


def check_seed(seed: Any) -> int:
    """A seed that every generator takes.

    Raises:
        DataError: it is no such number.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise DataError(f"--seed must be a whole number from 0 to 2147483647, not {seed!r}.")
    return seed
