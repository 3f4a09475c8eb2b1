"""Every derivative of a function, by every way to ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

__all__ = ["check_derivatives", "dense_jacobian"]


def check_derivatives(function: Callable[..., Any], *inputs: Tensor, batched: bool = True) -> None:
    """Compare first and second derivatives with finite differences, reverse, forward, batched."""
    at = [t.detach().clone().requires_grad_() for t in inputs]
    assert gradcheck(
        function,
        at,
        check_forward_ad=True,
        check_batched_grad=batched,
        check_batched_forward_grad=batched,
    )
    assert gradgradcheck(function, at, check_fwd_over_rev=True)


def dense_jacobian(F: Callable[..., Tensor], x: Tensor, *args: Tensor, wrt: int = 0) -> Tensor:
    """``dx*/d args[wrt]`` ``[n, ...]`` by LAPACK from the condition's Jacobians, all dense."""
    A = torch.func.jacrev(F)(x, *args)
    B = torch.func.jacrev(F, argnums=wrt + 1)(x, *args)
    n = x.numel()
    return -torch.linalg.solve(A.reshape(n, n), B.reshape(n, -1)).reshape(B.shape)
