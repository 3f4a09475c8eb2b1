"""What models of wrong labels have in common, and the one of quantities.

They are fitted to held-out predictions, so that the probability of an error is calibrated: the
model never judges a label by a prediction that has seen it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["FIT_ROWS", "Judgement", "NoiseModel", "ResidualNoise"]

# The noise model has few parameters; more rows than this do not make it better.
FIT_ROWS = 20_000
# Tails of the residuals of right quantities that are tried.
FREEDOMS = (2.5, 4.0, 8.0, 30.0)
# In robust deviations of the target: quantities that are predicted to this are not told apart.
SMALLEST_DEVIATION = 1e-6
EM_STEPS = 100


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a noise model says of rows.

    Attributes:
        error: probability that the label is wrong, ``[n]``.
        losses: negative log-likelihood of the observed label, ``[n]``.
        slopes: derivative of ``losses`` in the held-out predictions, ``[n, C]``.
        suggested: most probable class, or the held-out prediction, ``[n]``.
        probabilities: calibrated probability of each class by the other rows, ``[n, C]``, or None.
        posterior: the same once the label has been seen, ``[n, C]``, or None.
    """

    error: Tensor
    losses: Tensor
    slopes: Tensor
    suggested: Tensor
    probabilities: Tensor | None
    posterior: Tensor | None = None


class NoiseModel(Protocol):
    """A fitted noise model."""

    def fit(
        self, outputs: Tensor, observed: Tensor, variance: Tensor | None, trusted: Tensor | None
    ) -> NoiseModel:
        """Fit again, from these parameters."""
        ...

    def choose(
        self, outputs: Tensor, observed: Tensor, variance: Tensor | None, trusted: Tensor | None
    ) -> NoiseModel:
        """Fit, and choose among forms of noise by the evidence."""
        ...

    def judge(
        self, outputs: Tensor, observed: Tensor, variance: Tensor | None, trusted: Tensor | None
    ) -> Judgement:
        """Judge rows by their held-out outputs."""
        ...

    def certificate(self) -> dict[str, object]:
        """The parameters, in plain numbers."""
        ...


@dataclass(frozen=True, eq=False)
class ResidualNoise:
    r"""Residuals are $(1 - \epsilon)\, t_\nu(0, \sigma^2 v_i) + \epsilon\,\mathrm{Cauchy}(0, 1)$.

    Right targets scatter around the prediction with tails as heavy as the data want, scaled by the
    relative variance $v_i$ of the held-out residual. A wrong target lies anywhere in the range of
    the targets, whose robust deviation is 1, or far outside. The probability of an error is that
    of the second component.

    Attributes:
        deviation: $\sigma$.
        share: $\epsilon$.
        freedom: $\nu$, one of 2.5, 4, 8, 30.
    """

    deviation: float = 1.0
    share: float = 0.05
    freedom: float = 4.0

    def fit(
        self,
        outputs: Tensor,
        observed: Tensor,
        variance: Tensor | None = None,
        trusted: Tensor | None = None,
    ) -> ResidualNoise:
        """Expectation maximisation from a robust start; arguments as for ``LabelNoise.fit``."""
        step = max(1, -(-len(observed) // FIT_ROWS))
        gaps = (observed.double() - outputs[:, 0].double())[::step]
        roots = _roots(gaps, None if variance is None else variance[::step])
        doubtful = torch.ones_like(gaps)
        if trusted is not None:
            doubtful = doubtful * ~trusted[::step]
        found = [_expect(gaps, roots, doubtful, freedom) for freedom in FREEDOMS]
        return max(found, key=lambda model: model._log_likelihood(gaps, roots))

    choose = fit

    def _parts(self, gaps: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of both components at residuals ``[n]``."""
        nu, scale = self.freedom, self.deviation * roots
        constant = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi)
        right = constant - (nu + 1) / 2 * (gaps / scale).square().div(nu).log1p() - scale.log()
        wrong = -math.log(math.pi) - gaps.square().log1p()
        return math.log1p(-self.share) + right, math.log(self.share) + wrong

    def _log_likelihood(self, gaps: Tensor, roots: Tensor) -> float:
        return torch.logaddexp(*self._parts(gaps, roots)).sum().item()

    def judge(
        self,
        outputs: Tensor,
        observed: Tensor,
        variance: Tensor | None = None,
        trusted: Tensor | None = None,
    ) -> Judgement:
        """Judge rows by their residuals."""
        gaps = observed.double() - outputs[:, 0].double()
        roots = _roots(gaps, variance)
        right, wrong = self._parts(gaps, roots)
        if trusted is not None:
            wrong = wrong.masked_fill(trusted, -torch.inf)
        wide = torch.sigmoid(wrong - right)
        nu, square = self.freedom, gaps.square()
        pull = (1 - wide) * (nu + 1) * gaps / (nu * (self.deviation * roots).square() + square)
        pull += wide * 2 * gaps / (1 + square)
        losses = -torch.logaddexp(right, wrong)
        return Judgement(wide, losses, -pull[:, None], outputs[:, 0].double(), None)

    def certificate(self) -> dict[str, object]:
        """Deviation and tails of right targets, share of wrong ones."""
        return {
            "residual_deviation": self.deviation,
            "degrees_of_freedom": self.freedom,
            "wrong_share": self.share,
        }


def _roots(gaps: Tensor, variance: Tensor | None) -> Tensor:
    return torch.ones_like(gaps) if variance is None else variance.double().sqrt()


def _expect(gaps: Tensor, roots: Tensor, doubtful: Tensor, freedom: float) -> ResidualNoise:
    """Expectation maximisation over deviation and share."""
    scaled = (gaps / roots).square()
    typical = (gaps / roots).abs().median().item() / 0.6745
    model = ResidualNoise(max(typical, SMALLEST_DEVIATION), 0.05, freedom)
    for _ in range(EM_STEPS):
        right, wrong = model._parts(gaps, roots)
        wide = torch.sigmoid(wrong - right) * doubtful
        inside = 1 - wide
        light = (freedom + 1) / (freedom + scaled / model.deviation**2)
        deviation = ((inside * light * scaled).sum() / inside.sum().clamp_min(1e-12)).sqrt().item()
        # Nine right rows in ten, as a pseudo-observation of ten rows.
        share = (wide.sum().item() + 1) / (doubtful.sum().item() + 10)
        updated = ResidualNoise(max(deviation, SMALLEST_DEVIATION), min(share, 0.5), freedom)
        settled = abs(updated.share - model.share) < 1e-6
        settled &= abs(updated.deviation - model.deviation) < 1e-6 * model.deviation
        model = updated
        if settled:
            break
    return model
