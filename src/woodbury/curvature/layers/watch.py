"""Sees every use of a parameter while a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from woodbury.curvature.layers.convolution import convolution_use
from woodbury.curvature.layers.elementwise import norm_use, scale_use, shift_use
from woodbury.curvature.layers.linear import addmm_use, embedding_use, linear_use, matmul_use
from woodbury.curvature.layers.references import References
from woodbury.curvature.layers.uses import MatrixUse, Use

__all__ = ["Watch"]

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_PAIR = ("input", "other")
# Functions whose gradient has a known form, and the names of their arguments.
_MATRIX: dict[Any, tuple[Any, tuple[str, ...]]] = {
    F.linear: (linear_use, ("input", "weight", "bias")),
    torch.addmm: (addmm_use, ("input", "mat1", "mat2")),
    F.embedding: (embedding_use, ("input", "weight", "padding_idx", "max_norm", "norm_type")),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), (matmul_use, _PAIR)),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), (convolution_use, _CONVOLUTION)),
}
_NORMS: dict[Any, tuple[str, ...]] = {
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.batch_norm: (
        *("input", "running_mean", "running_var", "weight", "bias", "training"),
        *("momentum", "eps"),
    ),
}
_SCALES = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_SHIFTS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}

# Attention in one function, as torch has it, but such that what it calls can be seen.
_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda *_: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


class Watch(TorchFunctionMode):
    """Notes what the functions of torch do with some parameters.

    Args:
        leaves: the parameters.
        shared: numbers of uses whose output is the same for all examples of a batch (positions):
            it is repeated for each of them, so that gradients per example exist.
        size: examples in the batch.

    Attributes:
        uses: those with a known form, in the order of the calls.
        other: names of parameters that were used in another way.
        pieces: width of the projections packed in a parameter of attention.
    """

    def __init__(
        self, leaves: Mapping[str, Tensor], shared: Iterable[int] = (), size: int = 1
    ) -> None:
        super().__init__()
        self.refs = References(leaves)
        self.shared, self.size = frozenset(shared), size
        self.uses: list[Use] = []
        self.other: set[str] = set()
        self.packed: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            self._note_packed(args, kwargs)
            with self:
                return _attention(*args, **kwargs)
        owners = self._owners((*args, *kwargs.values()))
        result = func(*args, **kwargs)
        if not owners or not _has_gradient(result):
            return result
        if isinstance(result, Tensor):
            if self.refs.owner(result) is not None:
                return result  # a view of a parameter
            use = self._use(func, args, kwargs, result)
            if use is not None:
                return self._noted(use, result)
        elif isinstance(result, tuple | list) and all(self.refs.owner(r) for r in result):
            return result
        self.other |= owners
        return result

    def _owners(self, values: Iterable[Any]) -> set[str]:
        """Names of the parameters among some arguments."""
        found: set[str] = set()
        for value in values:
            if isinstance(value, list | tuple):
                found |= self._owners(value)
            elif isinstance(value, Tensor) and value.requires_grad:
                owner = self.refs.owner(value)
                if owner is not None:
                    found.add(owner[0])
        return found

    def _use(self, func: Any, args: Sequence[Any], kwargs: Any, result: Tensor) -> Use | None:
        if func in _MATRIX:
            make, names = _MATRIX[func]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            owner = self.refs.owner(given.get("weight"))
            use: Use | None = make(self.refs, given, self.packed.get(owner[0]) if owner else None)
            return use
        if func in _NORMS:
            given = {**dict(zip(_NORMS[func], args, strict=False)), **kwargs}
            return norm_use(self.refs, func, given)
        if func in _SCALES or func in _SHIFTS:
            make = scale_use if func in _SCALES else shift_use
            given = {**dict(zip(_PAIR, args, strict=False)), **kwargs}
            return make(self.refs, given, result.shape) if {*_PAIR} <= {*given} else None
        return None

    def _noted(self, use: Use, result: Tensor) -> Tensor:
        use.number = len(self.uses)
        if use.number in self.shared:
            result, lead = _repeated(result, self.size)
            if isinstance(use, MatrixUse):
                use.x = _repeated(use.x, self.size, lead)[0]
        # The edge, not the tensor: an operation in place behind the layer would change the tensor.
        use.shape, use.edge = result.shape, get_gradient_edge(result)
        self.uses.append(use)
        return result

    def _note_packed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        names = ("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        owner = self.refs.owner(given.get("in_proj_weight"))
        if owner is not None:
            self.packed[owner[0]] = len(owner[1]) // 3


def _repeated(tensor: Tensor, size: int, lead: bool | None = None) -> tuple[Tensor, bool]:
    """``tensor`` for each of ``size`` examples, and whether it had an axis for that."""
    lead = tensor.dim() > 1 and tensor.shape[0] == 1 if lead is None else lead
    rest = tensor.shape[1:] if lead else tensor.shape
    return tensor.expand(size, *rest), lead


def _has_gradient(result: Any) -> bool:
    if isinstance(result, Tensor):
        return result.requires_grad
    return isinstance(result, tuple | list) and any(_has_gradient(part) for part in result)
