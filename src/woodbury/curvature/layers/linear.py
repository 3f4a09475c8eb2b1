"""Linear maps: ``linear``, ``matmul`` and ``addmm`` with a weight, ``embedding``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature.layers.references import References
from woodbury.curvature.layers.uses import MatrixUse, Piece

__all__ = ["EmbeddingUse", "addmm_use", "embedding_use", "linear_use", "matmul_use"]


def linear_use(refs: References, given: Mapping[str, Any], parts: Any) -> MatrixUse | None:
    """``linear(input, weight, bias)``."""
    return _matrix(refs, given["input"], given["weight"], given.get("bias"), parts, turned=False)


def matmul_use(refs: References, given: Mapping[str, Any], parts: Any) -> MatrixUse | None:
    """``input @ weight`` with the weight ``[in, out]``."""
    if given["other"].dim() != 2:
        return None
    return _matrix(refs, given["input"], given["other"], None, parts, turned=True)


def addmm_use(refs: References, given: Mapping[str, Any], parts: Any) -> MatrixUse | None:
    """``input + mat1 @ mat2`` with the weight ``[in, out]``."""
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1 or given["input"].dim() != 1:
        return None
    return _matrix(refs, given["mat1"], given["mat2"], given["input"], parts, turned=True)


def _matrix(
    refs: References, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Any, *, turned: bool
) -> MatrixUse | None:
    """A use of ``weight [out, in]``, or ``[in, out]`` where ``turned``."""
    if x.dim() < 2 or refs.owner(x) is not None:
        return None
    found, found_bias = refs.find(weight), refs.find(bias)
    if found is None and refs.owner(weight) is not None:
        return None  # a view that is no set of rows
    if found_bias is None and refs.owner(bias) is not None:
        return None
    # A transposed view of a stored [in, out] is an [out, in], and the other way around.
    transposed = turned != (found is not None and found[1])
    reference = None if found is None else found[0]
    bias_reference = None if found_bias is None else found_bias[0]
    if reference is None and bias_reference is None:
        return None
    out = weight.shape[1] if turned else weight.shape[0]
    if bias_reference is not None and bias is not None and bias.shape != (out,):
        return None
    pieces = [Piece(reference, bias_reference, slice(0, out))]
    if parts is not None and not transposed:  # the projections of attention, packed in one
        step = parts
        pieces = [
            Piece(
                None if reference is None else reference.part(start, start + step),
                None if bias_reference is None else bias_reference.part(start, start + step),
                slice(start, start + step),
            )
            for start in range(0, out, step)
        ]
    shape = torch.Size((*x.shape[:-1], out))
    return MatrixUse(shape, None, 0, x.detach(), pieces, transposed)


@dataclass
class EmbeddingUse(MatrixUse):
    """Rows of a table, looked up: a linear map of one-hot vectors.

    Attributes:
        padding: the index whose row gets no gradient.
    """

    padding: int | None = None

    def mask(self) -> Tensor | None:
        """Positions that are not padding."""
        return None if self.padding is None else self.x != self.padding


def embedding_use(refs: References, given: Mapping[str, Any], parts: Any) -> MatrixUse | None:
    """``embedding(input, weight)``."""
    index, weight, found = given["input"], given["weight"], refs.find(given["weight"])
    if found is None or found[1] or given.get("max_norm") is not None:
        return None
    reference = found[0]
    if reference.stop - reference.start != len(weight) or given.get("scale_grad_by_freq"):
        return None
    padding = given.get("padding_idx")
    if padding is not None and padding < 0:
        padding += len(weight)
    pieces = [Piece(reference, None, slice(0, weight.shape[1]))]
    shape = index.shape + weight.shape[1:]
    return EmbeddingUse(shape, None, 0, index.detach(), pieces, True, True, padding)
