"""Which dtypes there are, and in which one works where another would lose too much."""

from __future__ import annotations

import torch
from torch import Tensor

from woodbury.errors import DtypeError

__all__ = ["is_batched", "precise", "real_dtype", "require_dtype", "working_dtype"]

_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


def require_dtype(dtype: torch.dtype) -> None:
    """Raise :class:`DtypeError` unless operators can have this dtype."""
    if dtype not in _DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise DtypeError(f"dtype is {dtype}; an operator needs one of {names}")


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of absolute values: float32 for complex64, the dtype itself where it is real."""
    return dtype.to_real() if dtype.is_complex else dtype


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a matrix of ``dtype`` is factorised in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float64 (complex128); in float32 on devices that have no float64."""
    if tensor.device.type == "mps":
        return tensor.to(torch.complex64 if tensor.dtype.is_complex else torch.float32)
    return tensor.to(torch.complex128 if tensor.dtype.is_complex else torch.float64)


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for a batch inside ``torch.func.vmap``: no value can be looked at."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False
