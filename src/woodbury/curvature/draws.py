r"""Random numbers that belong to an example, whatever batch and process it is in.

A generator with a state gives other numbers when the data is cut in another way. Here a number is a
function of where it is used: the seed, the row of the data, the sample, and the place in the output
of that row, one index for each axis. With $\phi$ the finaliser of SplitMix64 (a bijection of 64
bits) and $\gamma$ its increment, indices $i_1, i_2, \dots$ are absorbed one after the other,

$$ h_0 = \text{seed}, \qquad h_k = \phi(h_{k-1} + (i_k + 1)\,\gamma) \bmod 2^{64}, $$

so that the numbers along an axis are the stream of one SplitMix64 generator, and those of each row
of a generator of its own. An index of a position does not depend on how many there are: padding
changes no label.

Source: G. Steele, D. Lea and C. Flood, "Fast splittable pseudorandom number generators" (2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Draws", "absorb", "make_seed"]


def _signed(number: int) -> int:
    """The integer of 64 bits with a sign that has the bits of ``number``."""
    return (number + 2**63) % 2**64 - 2**63


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)

# Probabilities that are summed at once.
_CHUNK_BYTES = 64 * 2**20


def make_seed(generator: torch.Generator | None) -> int:
    """A seed drawn from ``generator`` (default: torch's own)."""
    device = None if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def absorb(state: Tensor, index: Tensor) -> Tensor:
    """The output number ``index`` of SplitMix64 from ``state``, entry by entry (int64)."""
    bits = state + (index + 1) * _INCREMENT  # integers of torch wrap around
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (bits >> by) & (2 ** (64 - by) - 1)


@dataclass(frozen=True)
class Draws:
    """The numbers of one sample for some rows.

    Args:
        seed: any integer.
        rows: numbers of the rows in the data ``[B]``, on the device of the numbers.
        sample: which of the samples of each row.

    Example:
        >>> import torch
        >>> from woodbury.curvature.draws import Draws
        >>> whole = Draws(7, torch.arange(6), 0).uniform((3,))
        >>> part = Draws(7, torch.tensor([4, 1]), 0).uniform((2,))
        >>> torch.equal(part, whole[[4, 1], :2])
        True
    """

    seed: int
    rows: Tensor
    sample: int = 0

    def uniform(self, shape: Sequence[int] = ()) -> Tensor:
        """Numbers in the open interval from 0 to 1, ``[B, *shape]``, in float64.

        In float32 on devices without float64.
        """
        state = torch.tensor(_signed(self.seed), device=self.rows.device)
        state = absorb(state, torch.tensor(self.sample, device=self.rows.device))
        state = absorb(state, self.rows)
        for size in shape:
            state = absorb(state.unsqueeze(-1), torch.arange(size, device=self.rows.device))
        wide = torch.float32 if self.rows.device.type == "mps" else torch.float64
        kept = 23 if wide == torch.float32 else 52
        return (_shifted(state, 64 - kept).to(wide) + 0.5) * 2.0**-kept

    def normal(self, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal numbers ``[B, *shape]``: the quantiles of :meth:`uniform`."""
        return torch.special.ndtri(self.uniform(shape))

    def bernoulli(self, p: Tensor) -> Tensor:
        """Ones with probability ``p [B, ...]`` and zeros, in the dtype of ``p``."""
        return (self.uniform(p.shape[1:]) < p).to(p.dtype)

    def categorical(self, p: Tensor) -> Tensor:
        """Classes drawn with probabilities ``p [B, ..., C]``, int64 ``[B, ...]``.

        The first class whose cumulative probability exceeds the uniform number.
        """
        drawn = self.uniform(p.shape[1:-1])
        flat, level = p.reshape(-1, p.shape[-1]), drawn.reshape(-1, 1)
        step = max(1, _CHUNK_BYTES // (p.shape[-1] * level.element_size()))
        parts = []
        for few, own in zip(flat.split(step), level.split(step), strict=True):
            sums = few.to(own.dtype).cumsum(1)
            parts.append(torch.searchsorted(sums, own * sums[:, -1:], right=True))
        found = torch.cat(parts) if parts else level.to(torch.int64)
        return found.clamp(max=p.shape[-1] - 1).view(drawn.shape)
