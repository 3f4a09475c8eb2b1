"""Models that several tests of influence take."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tied(nn.Module):
    """An embedding that is also the output layer, a norm, and two layers on sequences."""

    def __init__(self, words: int, width: int, inner: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(words, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        h = h + self.down(torch.tanh(self.up(self.norm(h))))
        return (h @ self.embed.weight.T).transpose(1, 2)
