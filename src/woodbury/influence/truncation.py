"""What the separable form of scores costs: chosen beforehand, measured afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Choice", "Draw", "Truncation", "choose", "falling", "levels", "pair_sizes"]

# Shares of the pairs of a query and an example that may be exact.
_SHARES = (0.0, 0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Truncation:
    r"""What the separable form costs: $\|\hat S - S\|_F / \|S\|_F$ over all scores.

    Found by computing the scores of some pairs of a query and an example exactly, drawn with
    replacement and probabilities in proportion to the squares of the errors expected there.

    Attributes:
        relative: the estimate.
        upper: its upper limit, three standard errors of the square above it.
        sample: how many were drawn.
        terms: of each block.
        exact: share of all pairs that are exact.

    Example:
        >>> from woodbury.influence.truncation import Truncation
        >>> print(Truncation(0.004, 0.005, 1024, {"0": 12}, 0.01))
        relative error 0.004, at most 0.005 (three standard errors, 1024 drawn)
    """

    relative: float
    upper: float
    sample: int
    terms: Mapping[str, int]
    exact: float

    def __str__(self) -> str:
        return (
            f"relative error {self.relative:.2g}, at most {self.upper:.2g} (three standard errors, "
            f"{self.sample} drawn)"
        )


def pair_sizes(values: Tensor, queries: Tensor, rows: Tensor, scale: float) -> Tensor:
    r"""How large an error may be of every pair, up to a factor: $|s_{qi}| + c \|g_q\| \|g_i\|$.

    Gradients have heavy tails: few pairs, of examples that the model gets wrong, carry most of the
    squares of all scores and of all errors. Errors of the leading directions go with the scores,
    those of all the others with the norms of the gradients.

    Args:
        values: scores ``[Q, N]``, which may be rough.
        queries: norms of the gradients of the queries, ``[Q]``.
        rows: of the training examples, ``[N]``.
        scale: $c$.
    """
    return values.abs().addr_(queries, rows, alpha=scale)


@dataclass(frozen=True)
class Choice:
    """How scores are approximated.

    Attributes:
        terms: of each block.
        scale: of :func:`pair_sizes`.
        level: pairs of a larger size are exact.
    """

    terms: Mapping[str, int]
    scale: float
    level: float


@dataclass(frozen=True, eq=False)
class Draw:
    """Pairs drawn with chances in proportion to the squares of expected errors.

    Attributes:
        queries: of every pair, ``[s]``.
        columns: its place among the training examples, ``[s]``.
        chance: of every pair, ``[s]``, float64.
    """

    queries: Tensor
    columns: Tensor
    chance: Tensor

    @classmethod
    def of(cls, sizes: Tensor, seed: int, count: int) -> Draw:
        """Draw ``count`` from ``sizes [Q, N]`` of errors, which are 0 where scores are exact."""
        squares = torch.linalg.vector_norm(sizes, dim=0, dtype=torch.float64).square()
        total = float(squares.sum())
        # A share of even draws, so that a pair whose error is not expected can be met.
        share = 0.9 if total > 0 else 0.0
        factor, even = share / max(total, 5e-324), (1 - share) / sizes.numel()
        generator = torch.Generator(sizes.device).manual_seed(seed)
        columns = _pick(factor * squares + even * len(sizes), count, generator)
        inside = (factor * sizes[:, columns].double().square() + even).T
        queries = _pick(inside, count, generator)
        return cls(queries, columns, inside.gather(1, queries[:, None]).squeeze(1))

    def weights(self) -> Tensor:
        """Of the pairs, so that weighted sums estimate sums over all, ``[s]``."""
        return 1 / (self.chance * len(self.chance))

    def relative(self, errors: Tensor, norm: float) -> tuple[float, float]:
        """Norm of all errors over that of the scores, and its upper limit.

        Args:
            errors: of the pairs that were drawn, ``[s]``.
            norm: Frobenius norm of the approximate scores.
        """
        if not bool(errors.any()):
            return 0.0, 0.0
        squares = (errors.double() / max(norm, 5e-324)).square() / self.chance
        mean = float(squares.mean())
        upper = (mean + 3 * float(squares.std()) / len(squares) ** 0.5) ** 0.5
        # Relative to the exact scores, which may be smaller than the approximate ones.
        return mean**0.5, upper / max(1e-3, 1 - upper)

    def level(self, errors: Tensor, sizes: Tensor, allowed: float) -> float:
        """The largest size so that squared errors of smaller pairs add up to ``allowed``.

        Args:
            errors: of the pairs that were drawn, ``[s]``.
            sizes: of these, ``[s]``.
            allowed: for the sum over all pairs.
        """
        squares = errors.double().square() * self.weights()
        ordered, places = sizes.sort()
        fits = int((squares[places].cumsum(0) <= allowed).sum())
        return float(ordered[fits - 1]) if fits else 0.0


def _pick(chances: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Places in ``chances [n]``, or one in each row of ``[count, n]``, in proportion: ``[count]``.

    (``torch.multinomial`` takes no more than 2^24 of them.)
    """
    sums = chances.cumsum(-1)
    at = torch.rand(count, dtype=sums.dtype, device=sums.device, generator=generator)
    at = at * sums[..., -1]
    places = torch.searchsorted(sums, at if sums.dim() == 1 else at[:, None], right=True)
    return places.view(count).clamp(max=chances.shape[-1] - 1)


def falling(errors: Tensor) -> Tensor:
    """Errors ``[L, r + 1]`` that do not rise with the number of terms, at most too large."""
    return errors.cpu().flip(1).cummax(1).values.flip(1)


def levels(sizes: Tensor) -> Tensor:
    """Sizes above which the shares of pairs lie that may be exact, falling, ``[L]``."""
    flat = sizes.flatten()
    counts = [int(share * len(flat)) for share in _SHARES]
    top = flat.topk(min(len(flat), counts[-1] + 1)).values
    found = [float(top[count]) for count in counts[1:]]
    return torch.tensor([math.inf, *found], dtype=torch.float64, device=sizes.device)


def choose(
    errors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    sizes: Tensor,
    at: Tensor,
    allowed: float,
) -> tuple[dict[str, int], float]:
    """Terms of each block and the level beyond which pairs are exact, at the least cost.

    Args:
        errors: squared error of each block by level and terms, ``[L, r + 1]``, falling.
        shapes: ``(p, m)`` of these blocks.
        sizes: of pairs, ``[Q, n]``.
        at: the levels, ``[L]``.
        allowed: for the sum of squared errors.

    Returns:
        Terms by block, without those that are better exact; and the level.
    """
    best: tuple[float, dict[str, int], float] = math.inf, {}, math.inf
    costs = {name: p + m for name, (p, m) in shapes.items()}
    for number, level in enumerate(at.tolist()):
        curves = {name: curve[number] for name, curve in errors.items()}
        terms = allocate(curves, costs, allowed)
        heavy = sizes > level
        pairs, rows = float(heavy.double().mean()), float(heavy.any(0).double().mean())
        cost, kept = 0.0, {}
        for name, (p, m) in shapes.items():  # in multiplications a pair
            count = terms.get(name, p * m)
            # An example of exact pairs has its gradient computed again, and rotated.
            fast = count * (p + m) + pairs * p * m + rows * (p + m) ** 2 / len(sizes)
            if 2 * fast < p * m:
                kept[name] = count
            cost += min(fast, p * m)
        if cost < best[0]:
            best = cost, kept, level
    return best[1:]


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
