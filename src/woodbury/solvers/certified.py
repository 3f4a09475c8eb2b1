"""Statuses of least-squares answers from their true residuals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.solvers.columns import norms
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from woodbury.solvers.recipe import Problem

__all__ = ["normal_residuals", "statuses_of"]


def normal_residuals(problem: Problem, R: Tensor, G: Tensor, norm: float) -> list[float]:
    r"""$\|A^H r\| / (\|A\| \|r\|)$ of each column, from ``R`` and ``G`` $= A^H R$.

    Where the product shows that the norm given is too small, it is the one shown.
    """
    found = []
    gradients = norms(problem.A.space, G)
    if not all(0 < size < math.inf for size in gradients):
        # Squares may have left the range of the dtype, and zero would prove a minimum.
        block = G.unsqueeze(1) if G.dim() == 1 else G
        largest = block.abs().amax(dim=0) if block.shape[0] else block.abs().sum(dim=0)
        safe = torch.where(largest > 0, largest, torch.ones_like(largest))
        sizes = norms(problem.A.space, (block / safe).contiguous())
        gradients = [a * b for a, b in zip(sizes, largest.tolist(), strict=True)]
    pairs = zip(gradients, norms(problem.A.out_space, R), strict=True)
    for gradient, residual in pairs:
        scale = max(norm * residual, gradient)
        found.append(gradient / scale if scale > 0 else (0.0 if scale == 0 else math.nan))
    return found


def statuses_of(
    residuals: Sequence[float],
    allowed: Sequence[float],
    normal: Sequence[float],
    rtol: float,
    otherwise: SolveStatus,
) -> list[SolveStatus]:
    """What true residuals and normal residuals prove; ``otherwise`` where they prove nothing."""
    found = []
    for residual, limit, gradient in zip(residuals, allowed, normal, strict=True):
        if not math.isfinite(residual):
            found.append(SolveStatus.non_finite)
        elif residual <= limit:
            found.append(SolveStatus.converged)
        elif gradient <= rtol:
            found.append(SolveStatus.least_squares)
        else:
            found.append(otherwise)
    return found
