"""Numbers of a batch seen to be finite, or the row named that is not."""

from __future__ import annotations

import torch
from torch import Tensor

from woodbury.curvature.batches import Batch
from woodbury.errors import NonFiniteError

__all__ = ["finite_outputs", "first_bad"]


def first_bad(values: Tensor, batch: Batch) -> str:
    """Words for the first example of ``values [B, ...]`` with NaN or infinity; empty without one.

    Example:
        >>> import torch
        >>> from woodbury.curvature.batches import Batch
        >>> from woodbury.curvature.finite import first_bad
        >>> first_bad(torch.tensor([1.0, torch.nan]), Batch(3, None, 2, slice(6, 8)))
        ', first in its example 1 (row 7 of the data)'
    """
    if values.dim() == 0:
        return ""
    bad = ~torch.isfinite(values.detach()).reshape(len(values), -1).all(1)
    if not bool(bad.any()):
        return ""
    example = int(bad.nonzero()[0])
    return f", first in its example {example} (row {int(batch.places()[example])} of the data)"


def finite_outputs(z: Tensor, batch: Batch) -> Tensor:
    """``z``, seen to be finite.

    Raises:
        NonFiniteError: it is not; the message names batch and row.
    """
    if not bool(torch.isfinite(z.detach()).all()):
        raise NonFiniteError(
            f"the outputs of batch {batch.index} ({batch.size} examples) hold NaN or infinity"
            f"{first_bad(z, batch)}; check that example and the parameters"
        )
    return z
