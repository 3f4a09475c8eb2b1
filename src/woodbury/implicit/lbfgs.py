"""L-BFGS for batches of problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.implicit.descent import Descent

__all__ = ["LBFGS"]


@dataclass(frozen=True)
class LBFGS(Descent):
    r"""Limited-memory BFGS: $D = -H_k G$, with $H_k$ from the last ``memory`` changes.

    $H_k$ is built from pairs $s = x^+ - x$, $y = g^+ - g$ by the two-loop recursion, scaled by
    $\langle s, y\rangle/\langle y, y\rangle$. Pairs without $\langle s, y\rangle > 0$ are left out,
    so it stays positive definite without a search for the curvature condition. Every row of a batch
    has its own pairs and its own line search, halving from 1.

    Args:
        tol: converged when $\|\nabla f\| \le$ ``tol`` $\max(1, \|\nabla f(x_0)\|)$.
        max_steps: limit of gradient evaluations.
        batched: ``f`` returns ``[B]``, one value for each row of ``x [B, ...]``.
        memory: how many pairs are kept.

    Raises:
        ArgumentError: a setting makes no sense.

    Cost: one gradient per step, memory of ``2 memory`` vectors.

    Source: Nocedal and Wright, "Numerical Optimization" (2nd ed.), algorithms 7.4 and 7.5.

    Example:
        >>> import torch
        >>> from woodbury.implicit import LBFGS
        >>> rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> LBFGS().run(rosenbrock, torch.tensor([-1.2, 1.0]).double()).value
        tensor([1.0000, 1.0000], dtype=torch.float64)
    """

    memory: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ArgumentError(f"memory is {self.memory}; at least one pair is kept")

    def _memory(self, X: Tensor, evaluate: Any) -> Any:
        # S, Y [m, B, n] and 1 / <s, y> [m, B, 1], zero where a row has no pair there.
        empty = X.new_zeros(self.memory, *X.shape)
        return [empty, empty.clone(), X.new_zeros(self.memory, X.shape[0], 1)]

    def _turn(self, memory: Any, G: Tensor, moved: Tensor, X: Tensor, old: Tensor) -> Tensor:
        S, Y, rho = memory
        s, y = X - old[0], G - old[1]
        sy, yy = (s * y).sum(1, keepdim=True), (y * y).sum(1, keepdim=True)
        good = moved[:, None] & (sy > torch.finfo(X.dtype).eps * yy.clamp_min(1e-300))
        # Rows shift their own pairs; where there is no new one they keep what they have.
        for kept, new in ((S, s), (Y, y), (rho, 1 / torch.where(good, sy, 1.0))):
            kept.copy_(torch.where(good, torch.cat([kept[1:], new[None]]), kept))
        Q = G.clone()
        alphas = []
        for i in reversed(range(self.memory)):
            alpha = rho[i] * (S[i] * Q).sum(1, keepdim=True)
            Q -= alpha * Y[i]
            alphas.append(alpha)
        size = (Y[-1] ** 2).sum(1, keepdim=True)
        known = rho[-1] > 0
        Q *= torch.where(known, 1 / torch.where(known, rho[-1] * size, 1.0), 1.0)
        for i, alpha in zip(range(self.memory), reversed(alphas), strict=True):
            Q += (alpha - rho[i] * (Y[i] * Q).sum(1, keepdim=True)) * S[i]
        return -Q
