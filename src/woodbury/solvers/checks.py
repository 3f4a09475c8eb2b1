"""What is looked at before any work is done."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    GradientError,
    NonFiniteError,
    ShapeError,
)
from woodbury.operators.base import LinearOperator

if TYPE_CHECKING:
    from woodbury.solvers.recipe import Recipe, State

__all__ = ["check_state", "check_system", "largest_entries"]


def check_system(A: LinearOperator, b: Tensor, x0: Tensor | None) -> None:
    """Raise unless ``A x = b`` makes sense: ``b`` of the rows of ``A``, ``x0`` of its columns."""
    if not isinstance(A, LinearOperator):
        raise DtypeError(f"A is {type(A).__name__}, not an operator; wrap a matrix in Dense(A)")
    for name, x, n in (("b", b, A.shape[0]), ("x0", x0, A.shape[1])):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} is {type(x).__name__}, expected a torch.Tensor")
        if x.dim() not in (1, 2) or x.shape[0] != n:
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}, A has shape {A.shape}: expected [{n}] or "
                f"[{n}, k]"
            )
        if x.dtype != A.dtype:
            raise DtypeError(
                f"{name} is {x.dtype}, A is {A.dtype}; nothing is promoted silently: convert with "
                f".to({A.dtype})"
            )
        if x.device != A.device:
            raise DeviceError(f"{name} is on {x.device}, A on {A.device}; move it with .to(...)")
    if x0 is None:
        return
    if x0.shape[1:] != b.shape[1:]:
        raise ShapeError(
            f"x0 has shape {tuple(x0.shape)}, b {tuple(b.shape)}: their columns must agree"
        )
    if torch.is_grad_enabled() and x0.requires_grad:
        raise GradientError(
            "x0 requires a gradient, but the solution does not depend on it: detach"
        )


def check_state(state: State, recipe: Recipe, A: LinearOperator) -> None:
    """Raise unless the state was prepared by this kind of recipe for this kind of operator."""
    if type(state.recipe) is not type(recipe):
        raise ArgumentError(f"the state was prepared by {state.recipe!r}, the recipe is {recipe!r}")
    if (state.shape, state.dtype, state.device) != (A.shape, A.dtype, A.device):
        raise ShapeError(
            f"the state is for an operator {state.shape} of {state.dtype} on {state.device}, this "
            f"one is {A.shape} of {A.dtype} on {A.device}; prepare a new one"
        )


def largest_entries(X: Tensor, name: str) -> list[float]:
    """The largest modulus in each column; raises where an entry is not finite."""
    if X.shape[0] == 0 or X.shape[1] == 0:
        return [0.0] * X.shape[1]
    largest: list[float] = X.abs().amax(dim=0).tolist()
    if all(math.isfinite(size) for size in largest):
        return largest
    finite = torch.isfinite(X)
    if bool(finite.all()):  # a complex modulus overflowed
        return [min(size, torch.finfo(X.dtype).max) for size in largest]
    bad = int((~finite).sum())
    row, column = (~finite).nonzero()[0].tolist()
    raise NonFiniteError(
        f"{bad} of {X.numel()} entries of {name} are NaN or infinite, the first in row {row}, "
        f"column {column}; nothing was solved"
    )
