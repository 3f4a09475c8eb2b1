"""How labels go wrong: transitions between classes, or residuals of a second kind.

Both are fitted to held-out predictions, so that the probability of an error is calibrated: the
model never judges a label by a prediction that has seen it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from woodbury.apps.clean.lbfgs import minimize

__all__ = ["Judgement", "LabelNoise", "NoiseModel", "ResidualNoise"]

# Pseudo-counts that hold each row of the transition matrix: 9 labels kept, 1 changed anyhow.
PRIOR_KEPT, PRIOR_CHANGED = 9.0, 1.0
BIAS_RIDGE = 1e-2
# The noise model has few parameters; more rows than this do not make it better.
FIT_ROWS = 20_000
FIT_STEPS = 200
# In nats a row.
FIT_TOLERANCE = 1e-6
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
    """

    error: Tensor
    losses: Tensor
    slopes: Tensor
    suggested: Tensor
    probabilities: Tensor | None


class NoiseModel(Protocol):
    """A fitted noise model."""

    def fit(
        self, outputs: Tensor, observed: Tensor, variance: Tensor | None, trusted: Tensor | None
    ) -> NoiseModel:
        """Fit again, from these parameters."""
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
class LabelNoise:
    r"""$p(o \mid x) = \sum_y \mathrm{softmax}(\beta z_{-i}(x) + c)_y\, T_{yo}$.

    Scale $\beta$, offsets $c$ and transition matrix $T$ maximise the likelihood of the observed
    labels $o$ (with pseudo-counts on $T$); a trusted row counts with $T = I$. The probability of an
    error is $1 - P(y = o \mid x, o)$.

    Attributes:
        log_scale: $\log\beta$.
        offsets: $c$, ``[C]``.
        log_transition: $\log T$, ``[C, C]``.
    """

    log_scale: float
    offsets: Tensor
    log_transition: Tensor

    @classmethod
    def start(cls, outputs: Tensor) -> LabelNoise:
        """Nine labels in ten right, and a scale that suits the spread of the outputs."""
        C = outputs.shape[1]
        keep = torch.eye(C, dtype=torch.float64)
        prior = PRIOR_KEPT * keep + PRIOR_CHANGED * (1 - keep) / max(1, C - 1)
        transition = prior / prior.sum(1, keepdim=True)
        scale = float(np.log(2.0 / max(outputs.std().item(), 1e-12)))
        return cls(scale, torch.zeros(C, dtype=torch.float64), transition.log())

    def fit(
        self,
        outputs: Tensor,
        observed: Tensor,
        variance: Tensor | None = None,
        trusted: Tensor | None = None,
    ) -> LabelNoise:
        """Maximise the likelihood by L-BFGS, from the parameters this model has.

        Args:
            outputs: held-out logits ``[n, C]``.
            observed: labels ``[n]``.
            variance: not used.
            trusted: rows whose label is right, bool ``[n]``.
        """
        problem = _Likelihood(*_sample(outputs, observed, trusted))
        C = outputs.shape[1]
        scale = torch.tensor([self.log_scale], dtype=torch.float64)
        start = torch.cat([scale, self.offsets, self.log_transition.flatten()])
        found = minimize(problem, start, max_steps=FIT_STEPS, tolerance=FIT_TOLERANCE).place
        transition = found[1 + C :].view(C, C).log_softmax(1)
        return LabelNoise(found[0].item(), found[1 : 1 + C].clone(), transition)

    def judge(
        self,
        outputs: Tensor,
        observed: Tensor,
        variance: Tensor | None = None,
        trusted: Tensor | None = None,
    ) -> Judgement:
        """Judge rows; arguments as for :meth:`fit`."""
        scale = float(np.exp(self.log_scale))
        log_p = (scale * outputs.double() + self.offsets).log_softmax(1)
        joint = log_p + _log_channel(self.log_transition, observed, trusted)
        total = joint.logsumexp(1)
        posterior = (joint - total[:, None]).exp()
        p = log_p.exp()
        keep = posterior.gather(1, observed[:, None]).squeeze(1)
        error = (1 - keep).clamp(0, 1)
        suggested = torch.where(error > 0.5, _other(posterior, observed), observed)
        return Judgement(error, -total, scale * (p - posterior), suggested, p)

    def certificate(self) -> dict[str, object]:
        """Scale of the logits and the share of labels kept, by class."""
        return {
            "logit_scale": float(np.exp(self.log_scale)),
            "labels_kept_by_class": self.log_transition.diagonal().exp().tolist(),
        }


def _other(posterior: Tensor, observed: Tensor) -> Tensor:
    """The most probable class that is not the observed one."""
    return posterior.scatter(1, observed[:, None], -1.0).argmax(1)


def _sample(
    outputs: Tensor, observed: Tensor, trusted: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    step = max(1, -(-len(observed) // FIT_ROWS))
    rows = slice(None, None, step)
    return outputs[rows].double(), observed[rows], None if trusted is None else trusted[rows]


def _log_channel(log_transition: Tensor, observed: Tensor, trusted: Tensor | None) -> Tensor:
    r"""$\log T_{yo}$ of each row, ``[n, C]``; $\log I$ where the label is known to be right."""
    channel = log_transition.mT[observed]
    if trusted is None or not bool(trusted.any()):
        return channel
    own = torch.nn.functional.one_hot(observed, len(log_transition)).bool()
    known = torch.where(own, 0.0, -torch.inf).to(channel.dtype)
    return torch.where(trusted[:, None], known, channel)


class _Likelihood:
    """Mean penalised negative log-likelihood and its gradient, of a flat vector."""

    def __init__(self, outputs: Tensor, observed: Tensor, trusted: Tensor | None) -> None:
        self.z, self.observed, self.trusted = outputs, observed, trusted
        self.count, self.C = outputs.shape
        doubtful = torch.ones(self.count, dtype=torch.float64)
        self.doubtful = doubtful if trusted is None else doubtful * ~trusted
        keep = torch.eye(self.C, dtype=torch.float64)
        self.prior = PRIOR_KEPT * keep + PRIOR_CHANGED * (1 - keep) / max(1, self.C - 1)

    def __call__(self, theta: Tensor) -> tuple[float, Tensor]:
        C, m = self.C, self.count
        scale, offsets = theta[0].exp(), theta[1 : 1 + C]
        log_T = theta[1 + C :].view(C, C).log_softmax(1)
        log_p = (scale * self.z + offsets).log_softmax(1)
        joint = log_p + _log_channel(log_T, self.observed, self.trusted)
        total = joint.logsumexp(1)
        posterior = (joint - total[:, None]).exp()
        pull = log_p.exp() - posterior
        counts = torch.zeros(C, C, dtype=torch.float64)
        counts.index_add_(0, self.observed, posterior * self.doubtful[:, None])
        counts = counts.mT + self.prior
        value = -total.sum() - (self.prior * log_T).sum()
        value = value / m + BIAS_RIDGE * offsets.square().sum()
        slopes = [
            (scale * (pull * self.z).sum() / m).reshape(1),
            pull.sum(0) / m + 2 * BIAS_RIDGE * offsets,
            ((log_T.exp() * counts.sum(1, keepdim=True) - counts) / m).flatten(),
        ]
        return value.item(), torch.cat(slopes)


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
