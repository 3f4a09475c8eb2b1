"""How much memory there is."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["available_bytes", "in_words"]

_FALLBACK = 2 * 2**30


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be had on a device.

    Args:
        device: a CUDA device is asked through torch; for the CPU it is what the kernel calls
            available, limited by the control group the process is in.

    Returns:
        Bytes; 2 GiB where the system does not tell.

    Example:
        >>> import torch
        >>> from woodbury.operators.memory import available_bytes
        >>> available_bytes(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    known = [amount for amount in (_kernel_bytes(), _group_bytes()) if amount is not None]
    return max(0, min(known)) if known else _FALLBACK


def _kernel_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _group_bytes() -> int | None:
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        return int(limit) - int((root / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or the limit is "max"
        return None


def in_words(amount: float) -> str:
    """Bytes for people: ``'1.5 GiB'``.

    Example:
        >>> from woodbury.operators.memory import in_words
        >>> in_words(3 * 2**29)
        '1.5 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
