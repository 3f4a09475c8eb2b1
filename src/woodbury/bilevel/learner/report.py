"""What one step of the hyperparameters did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from woodbury.solvers import SolveStatus

__all__ = ["HyperReport"]


@dataclass(frozen=True)
class HyperReport:
    r"""A hypergradient of a training loop, and what is known about its error.

    Attributes:
        value: the hypergradient by name of the hyperparameter tensor.
        outer_value: the validation loss.
        inner_value: the training loss of the batch, penalties included; NaN where no hyperparameter
            enters it.
        stationarity: norm of the gradient of the training loss on that batch.
        outer_error: $\langle q, \nabla_w g\rangle$: to first order how far the validation loss is
            from where the training loss is minimal.
        residual: $\|H q - \nabla_w f\| / \|\nabla_w f\|$ of the linear solve, NaN where no product
            was spent on it (see ``certify_every``).
        status: how the solve ended; ``None`` where there was none.
        products: Hessian products.

    Example:
        >>> from woodbury.bilevel import HyperReport
        >>> print(HyperReport({}, 0.5, 0.25, 0.01, 0.0))
        validation loss 0.5, training loss 0.25
    """

    value: dict[str, Tensor]
    outer_value: float
    inner_value: float = math.nan
    stationarity: float = math.nan
    outer_error: float = math.nan
    residual: float = math.nan
    status: SolveStatus | None = None
    products: int = 0

    def certificate(self) -> dict[str, Any]:
        """Plain numbers and sentences, as that of :class:`~woodbury.bilevel.Hypergradient`."""
        return {
            "inner_stationarity": self.stationarity,
            "outer_error_from_inner": self.outer_error,
            "solve_residual": self.residual,
            "solve_status": None if self.status is None else self.status.value,
            "products": self.products,
        }

    def __str__(self) -> str:
        text = f"validation loss {self.outer_value:.4g}"
        if not math.isnan(self.inner_value):
            text += f", training loss {self.inner_value:.4g}"
        if not math.isnan(self.residual):
            text += f", residual {self.residual:.2g}"
        if self.status is not None and not self.status.ok:
            text += f"; {self.status.value}"
        return text
