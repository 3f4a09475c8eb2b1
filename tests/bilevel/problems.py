"""The problem that the spec calls T0: everything about it in closed form."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

N = 12


class T0:
    """g = 0.5 w'(A + diag(exp L))w - b'w, f = 0.5 |C w - e|^2: everything in closed form."""

    def __init__(self, seed: int = 0) -> None:
        gen = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen, dtype=torch.float64)

        factor = randn(N, N)
        self.A = factor @ factor.T / N
        self.b, self.C, self.e, self.L = randn(N), randn(5, N), randn(5), 0.5 * randn(N) - 2

    def inner(self, w: Tensor, L: Tensor) -> Tensor:
        return 0.5 * w @ self.A @ w + 0.5 * (L.exp() * w**2).sum() - self.b @ w

    def outer(self, w: Tensor, L: Tensor) -> Tensor:
        return 0.5 * (self.C @ w - self.e).square().sum() + 0.1 * L.square().sum()

    @property
    def H(self) -> Tensor:
        return self.A + torch.diag(self.L.exp())

    @property
    def w_star(self) -> Tensor:
        return torch.linalg.solve(self.H, self.b)

    def exact(self, inverse: Tensor | None = None) -> Tensor:
        inverse = torch.linalg.inv(self.H) if inverse is None else inverse
        a = self.C.T @ (self.C @ self.w_star - self.e)
        return 0.2 * self.L - self.L.exp() * self.w_star * (inverse @ a)


def written(state: dict[str, Any]) -> dict[str, Any]:
    """What a file gives back that may hold tensors, numbers and words only."""
    file = io.BytesIO()
    torch.save(state, file)
    found: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return found
