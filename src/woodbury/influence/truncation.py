"""What the separable form of scores costs: chosen beforehand, measured afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Draw", "Truncation", "allocate", "heaviest"]

_SAMPLE = 64
# One in so many queries and training examples are heavy: exact scores cost the product.
_QUERIES, _ROWS = 4, 8


@dataclass(frozen=True)
class Truncation:
    r"""What the separable form costs: $\|\hat S - S\|_F / \|S\|_F$ over all scores.

    Found by computing the scores of some training examples exactly, drawn with replacement and
    probabilities in proportion to the squares of their scores, but for those that are exact.

    Attributes:
        relative: the estimate.
        upper: its upper limit, three standard errors of the square above it.
        sample: examples drawn.
        terms: of each block.

    Example:
        >>> from woodbury.influence.truncation import Truncation
        >>> print(Truncation(0.004, 0.005, 64, {"0": 12}))
        relative error 0.004, at most 0.005 (three standard errors, 64 examples drawn)
    """

    relative: float
    upper: float
    sample: int
    terms: Mapping[str, int]

    def __str__(self) -> str:
        return (
            f"relative error {self.relative:.2g}, at most {self.upper:.2g} (three standard errors, "
            f"{self.sample} examples drawn)"
        )


def heaviest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of scores ``[Q, N]`` with the largest norms, a share of each, ascending.

    Sizes of gradients have heavy tails: examples that the model gets wrong carry most of the
    squares of all scores, and so most of the error. Exact scores where they meet, a small share of
    all, allow the terms to be fewer for all the others.
    """
    squares = values.double().square()
    queries = squares.sum(1).topk(-(-len(values) // _QUERIES)).indices.sort().values
    return queries, squares.sum(0).topk(values.shape[1] // _ROWS).indices.sort().values


@dataclass(frozen=True, eq=False)
class Draw:
    """Training examples drawn with chances in proportion to the squares of their scores.

    Attributes:
        unique: columns that were drawn, each once, ascending.
        inverse: which of them every draw is.
        chance: of every draw.
        total: squared Frobenius norm of the approximate scores.
    """

    unique: Tensor
    inverse: Tensor
    chance: Tensor
    total: float

    @classmethod
    def of(cls, values: Tensor, exact: tuple[Tensor, Tensor]) -> Draw | None:
        """Draw from the columns of scores ``[Q, N]``; ``None`` where all are zero.

        Args:
            values: the scores.
            exact: rows and columns where they are exact: without a weight in the chances.
        """
        squares = values.double().square()
        total = float(squares.sum())
        if total == 0:
            return None
        squares[exact[0][:, None], exact[1]] = 0
        chance, even = squares.sum(0), 1 / squares.shape[1]
        rest = chance.sum()
        # A share of even draws, so that an example whose scores are missed altogether can be met.
        chance = 0.9 * chance / rest + 0.1 * even if rest > 0 else torch.full_like(chance, even)
        generator = torch.Generator(chance.device).manual_seed(0)
        drawn = torch.multinomial(chance, _SAMPLE, replacement=True, generator=generator)
        unique, inverse = drawn.unique(return_inverse=True)
        return cls(unique, inverse, chance[drawn], total)

    def weights(self) -> Tensor:
        """Of the columns drawn, so that weighted sums estimate sums over all, ``[u]``."""
        found = torch.zeros(len(self.unique), dtype=torch.float64, device=self.chance.device)
        return found.index_add_(0, self.inverse, 1 / (self.chance * len(self.chance)))

    def truncation(
        self, exact: Tensor, approximate: Tensor, terms: Mapping[str, int]
    ) -> Truncation:
        """From scores ``[Q, u]`` of the columns that were drawn."""
        errors = (exact - approximate).double().square().sum(0)[self.inverse] / self.chance
        mean = float(errors.mean())
        limit = mean + 3 * float(errors.std()) / len(errors) ** 0.5
        upper = (limit / self.total) ** 0.5
        # Relative to the exact scores, which may be smaller than the approximate ones.
        upper /= max(1e-3, 1 - upper)
        return Truncation((mean / self.total) ** 0.5, upper, len(errors), terms)


def allocate(
    errors: Mapping[str, Tensor], costs: Mapping[str, int], allowed: float
) -> dict[str, int]:
    """Terms of each block so that squared errors add up to ``allowed``, at the least cost.

    Args:
        errors: squared error of each block with 0, 1, ... terms, ``[r + 1]``, falling.
        costs: of a term.
        allowed: for the sum.

    Returns:
        Terms by block; blocks for which all terms are too few are left out.
    """
    terms = dict.fromkeys(errors, 1)

    def steepest(name: str) -> tuple[float, int]:
        """The largest gain for its cost that more terms can have, and how many."""
        curve, place = errors[name], terms[name]
        if place + 1 >= len(curve):
            return 0.0, 0
        more = torch.arange(1, len(curve) - place, dtype=torch.float64)
        gains = (curve[place] - curve[place + 1 :]) / (more * costs[name])
        best = int(gains.argmax())
        return float(gains[best]), best + 1

    while sum(float(errors[name][count]) for name, count in terms.items()) > allowed:
        found = {name: steepest(name) for name in terms}
        best = max(found, key=lambda name: found[name][0], default=None)
        if best is None:
            break
        if found[best][0] <= 0:  # exact, then: for the block that is furthest off
            del terms[max(terms, key=lambda name: float(errors[name][terms[name]]))]
            continue
        terms[best] += found[best][1]
    return terms
