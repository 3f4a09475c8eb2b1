"""Scores of training examples for their own losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SelfInfluence"]


@dataclass(frozen=True, eq=False)
class SelfInfluence:
    r"""$s_{ii} = -\frac1N \nabla\ell_i^T A^{-1} \nabla\ell_i$ of every training example.

    Attributes:
        values: $s_{ii}$, ``[N]``; in the unit of the loss.
        error: bound (or estimate) of how far each may be off because of the solve or a store,
            ``[N]``.
        proven: whether ``error`` is a bound.
        settings: matrix, damping and recipe, in words.
        solves: certificate of the linear solves.
        modules: parts of the layers, ``[L, N]``, where they were asked for; they add up to
            ``values``.
        module_names: of the ``L`` layers.

    Example:
        >>> import torch
        >>> from woodbury.influence import SelfInfluence
        >>> found = SelfInfluence(torch.tensor([-0.1, -2.0, 0.0]), torch.zeros(3), True)
        >>> found.top(2)  # the examples that the model fits on their own account
        tensor([1, 0])
    """

    values: Tensor
    error: Tensor
    proven: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    solves: Mapping[str, Any] = field(default_factory=dict)
    modules: Tensor | None = None
    module_names: tuple[str, ...] = ()

    def top(self, k: int) -> Tensor:
        """The ``k`` examples with the largest self-influence, largest first.

        Raises:
            ArgumentError: ``k`` is not positive.
        """
        if k < 1:
            raise ArgumentError(f"k is {k}; ask for at least one example")
        return self.values.abs().topk(min(k, len(self.values))).indices

    def certificate(self) -> dict[str, Any]:
        """What a reader needs to trust the scores: plain numbers and words."""
        largest = self.values.abs().amax().item() if self.values.numel() else 0.0
        error = self.error.amax().item() if self.error.numel() else 0.0
        return {
            "examples": len(self.values),
            "error_over_largest_score": error / largest if largest else 0.0,
            "error_guarantee": "bound" if self.proven else "estimate",
            **self.settings,
            **self.solves,
        }

    def to_frame(self) -> pd.DataFrame:
        """A data frame with one line for each training example, in their order."""
        import pandas as pd

        values = self.values.cpu()
        half = values.dtype in (torch.float16, torch.bfloat16)
        return pd.DataFrame(
            {
                "row": torch.arange(len(values)).numpy(),
                "score": (values.float() if half else values).numpy(),
                "error": self.error.numpy(),
            }
        )
