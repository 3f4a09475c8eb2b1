"""Operators as SciPy sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from woodbury.errors import DtypeError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

    from woodbury.operators.base import LinearOperator

__all__ = ["scipy_form"]


def scipy_form(operator: LinearOperator) -> ScipyLinearOperator:
    """The same map as a ``scipy.sparse.linalg.LinearOperator``; see ``LinearOperator.to_scipy``."""
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    if operator.dtype == torch.bfloat16:
        raise DtypeError("NumPy has no bfloat16; make the operator in float32 for to_scipy()")
    dtype = torch.empty(0, dtype=operator.dtype).numpy().dtype

    def wrapped(apply: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
        def product(x: Any) -> Any:
            # A copy: SciPy hands out read-only arrays, which torch cannot wrap.
            tensor = torch.from_numpy(np.array(x, dtype=dtype)).to(operator.device)
            return apply(tensor).detach().cpu().resolve_conj().numpy()

        return product

    forward, backward = wrapped(operator.__matmul__), wrapped(operator.rmatmat)
    return ScipyOperator(
        operator.shape,
        matvec=lambda x: forward(x.reshape(-1)),
        rmatvec=lambda y: backward(y.reshape(-1)),
        matmat=forward,
        rmatmat=backward,
        dtype=dtype,
    )
