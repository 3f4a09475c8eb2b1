"""Scales and shifts: normalisations, and products and sums with a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from woodbury.curvature.layers.references import Reference, References
from woodbury.curvature.layers.uses import VectorUse

__all__ = ["norm_use", "scale_use", "shift_use"]


def norm_use(refs: References, func: Any, given: Mapping[str, Any]) -> VectorUse | None:
    """``layer_norm``, ``rms_norm``, ``group_norm``, ``batch_norm`` with fixed statistics."""
    x, weight, bias = given["input"], given.get("weight"), given.get("bias")
    if refs.owner(x) is not None or given.get("training"):
        return None
    parameters = [part for part in (weight, bias) if part is not None]
    references = [_whole(refs, part) for part in parameters]
    if any(ref is None and refs.owner(p) for ref, p in zip(references, parameters, strict=True)):
        return None
    by_name = {"weight": _whole(refs, weight), "bias": _whole(refs, bias)}
    if by_name["weight"] is None and by_name["bias"] is None:
        return None
    normalized = None
    if by_name["weight"] is not None:
        plain = {k: v for k, v in given.items() if k not in ("weight", "bias")}
        with torch.no_grad():
            normalized = func(**plain)
    shape = parameters[0].shape
    channels = func in (F.group_norm, F.batch_norm)
    lead = 1 if channels else x.dim() - len(shape)
    pattern = (1,) * lead + tuple(shape) + (1,) * (x.dim() - lead - len(shape))
    return VectorUse(x.shape, None, 0, normalized, by_name["weight"], by_name["bias"], pattern)


def scale_use(refs: References, given: Mapping[str, Any], shape: torch.Size) -> VectorUse | None:
    """``input * other`` where one is a parameter."""
    found = _operands(refs, given)
    if found is None:
        return None
    reference, parameter, x = found
    if not isinstance(x, Tensor):
        x = torch.as_tensor(x, dtype=parameter.dtype, device=parameter.device)
    pattern = _pattern(parameter, shape)
    x = x.detach().expand(shape)
    return VectorUse(shape, None, 0, x, reference, None, pattern)


def shift_use(refs: References, given: Mapping[str, Any], shape: torch.Size) -> VectorUse | None:
    """``input + other`` where one is a parameter."""
    found = _operands(refs, given)
    if found is None or given.get("alpha", 1) != 1:
        return None
    reference, parameter, _ = found
    return VectorUse(shape, None, 0, None, None, reference, _pattern(parameter, shape))


def _operands(refs: References, given: Mapping[str, Any]) -> tuple[Reference, Tensor, Any] | None:
    """The one operand that is a whole parameter, and the other."""
    pair = given["input"], given["other"]
    for mine, other in (pair, pair[::-1]):
        reference = _whole(refs, mine)
        if reference is not None and refs.owner(other) is None:
            return reference, mine, other
    return None


def _whole(refs: References, tensor: Any) -> Reference | None:
    """The reference of a tensor that is a whole parameter, not a view of one."""
    owner = refs.owner(tensor)
    if owner is None or tensor is not owner[1]:
        return None
    return Reference(owner[0], 0, len(tensor) if tensor.dim() else 1)


def _pattern(parameter: Tensor, shape: torch.Size) -> tuple[int, ...]:
    return (1,) * (len(shape) - parameter.dim()) + tuple(parameter.shape)
