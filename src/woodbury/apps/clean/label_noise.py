"""How class labels go wrong: a calibrated prediction of the true class, then a change of class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from woodbury.apps.clean.lbfgs import minimize
from woodbury.apps.clean.noise import FIT_ROWS, Judgement

__all__ = ["Changes", "LabelNoise", "Likelihood"]

Changes = Literal["uniform", "by class"]

# Pseudo-counts that hold each row of the transition matrix: 9 labels kept, 1 changed anyhow.
PRIOR_KEPT, PRIOR_CHANGED = 9.0, 1.0
BIAS_RIDGE = 1e-2
# On the sum of losses, so that few rows mix little.
MIXING_RIDGE = 5.0
# The logits of one class help to predict another where there are rows enough to learn that.
MOST_MIXED_CLASSES, ROWS_PER_MIXING = 30, 10
FIT_STEPS = 200
# In nats a row.
FIT_TOLERANCE = 2e-6


@dataclass(frozen=True, eq=False)
class LabelNoise:
    r"""$p(o \mid x) = \sum_y \mathrm{softmax}(W^T z_{-i}(x) + c)_y\, T_{yo}$.

    $W = \beta I + M$ and offsets $c$ make held-out logits $z_{-i}$ into probabilities of the true
    class $y$, and $T$ says how often one class is written for another. All maximise the likelihood
    of the observed labels $o$ (with pseudo-counts on $T$ and a ridge on $M$, $c$); a trusted row
    counts with $T = I$. The probability of an error is $1 - P(y = o \mid x, o)$.

    Attributes:
        log_scale: $\log\beta$.
        mixing: $M$, ``[C, C]``.
        offsets: $c$, ``[C]``.
        log_transition: $\log T$, ``[C, C]``.
        changes: the form of $T$: ``uniform`` has one parameter, ``by class`` all.
    """

    log_scale: float
    mixing: Tensor
    offsets: Tensor
    log_transition: Tensor
    changes: Changes = "by class"

    @classmethod
    def start(cls, outputs: Tensor) -> LabelNoise:
        """Nine labels in ten right, and a scale that suits the spread of the outputs."""
        C = outputs.shape[1]
        prior = _prior(C)
        transition = prior / prior.sum(1, keepdim=True)
        scale = math.log(2.0 / max(outputs.std().item(), 1e-12))
        zeros = torch.zeros(C, C, dtype=torch.float64)
        return cls(scale, zeros, zeros[0], transition.log())

    @property
    def weight(self) -> Tensor:
        """$W$, ``[C, C]``."""
        return math.exp(self.log_scale) * torch.eye(len(self.offsets)).double() + self.mixing

    def fit(
        self,
        outputs: Tensor,
        observed: Tensor,
        variance: Tensor | None = None,
        trusted: Tensor | None = None,
    ) -> LabelNoise:
        """Maximise the likelihood by L-BFGS, with changes by class and no mixing.

        Few parameters, from the present ones: what models are tuned and compared with.

        Args:
            outputs: held-out logits ``[n, C]``.
            observed: labels ``[n]``.
            variance: not used.
            trusted: rows whose label is right, bool ``[n]``.
        """
        problem = Likelihood(*_sample(outputs, observed, trusted), "by class", mixed=False)
        return problem.maximise(self)

    def choose(
        self,
        outputs: Tensor,
        observed: Tensor,
        variance: Tensor | None = None,
        trusted: Tensor | None = None,
    ) -> LabelNoise:
        """Fit uniform changes and changes by class, each without and with mixing; take the best.

        Classes that the model confuses look like classes whose labels were exchanged. Mixing says
        the first, changes by class the second, and each has to explain the labels better by more
        than its parameters would by chance: half the logarithm of the number of rows for a rate or
        a transition of which a label is expected (the Bayesian information criterion), and one
        for a number of the mixing (Akaike's), as models do confuse classes. Arguments as for
        :meth:`fit`.
        """
        part = _sample(outputs, observed, trusted)
        found, by_class = [], self
        for mixed in (False, True):
            by_class = Likelihood(*part, "by class", mixed=mixed).maximise(by_class)
            uniform = Likelihood(*part, "uniform", mixed=mixed).maximise(by_class)
            found += [uniform, by_class]
        return min(found, key=lambda model: model._criterion(*part))

    def _criterion(self, outputs: Tensor, observed: Tensor, trusted: Tensor | None) -> float:
        """Minus the logarithm of the evidence, apart from what all forms share."""
        judged = self.judge(outputs, observed, None, trusted)
        assert judged.posterior is not None
        counts = torch.zeros_like(self.log_transition).index_add_(0, observed, judged.posterior)
        changed = int((counts.fill_diagonal_(0) > 1).sum())
        rates = changed if self.changes == "by class" else 1
        numbers = self.mixing.numel() - len(self.mixing) if bool(self.mixing.any()) else 0
        return judged.losses.sum().item() + 0.5 * rates * math.log(len(observed)) + numbers

    def judge(
        self,
        outputs: Tensor,
        observed: Tensor,
        variance: Tensor | None = None,
        trusted: Tensor | None = None,
    ) -> Judgement:
        """Judge rows; arguments as for :meth:`fit`."""
        weight = self.weight
        log_p = (outputs.double() @ weight + self.offsets).log_softmax(1)
        joint = log_p + _log_channel(self.log_transition, observed, trusted)
        total = joint.logsumexp(1)
        posterior = (joint - total[:, None]).exp()
        p = log_p.exp()
        keep = posterior.gather(1, observed[:, None]).squeeze(1)
        error = (1 - keep).clamp(0, 1)
        suggested = torch.where(error > 0.5, _other(posterior, observed), observed)
        slopes = (p - posterior) @ weight.mT
        return Judgement(error, -total, slopes, suggested, p, posterior)

    def certificate(self) -> dict[str, object]:
        """The form of changes, and the share of labels kept by class."""
        return {
            "confusion": "mixing" if bool(self.mixing.any()) else "none",
            "logit_scale": math.exp(self.log_scale),
            "changes": self.changes,
            "labels_kept_by_class": self.log_transition.diagonal().exp().tolist(),
        }


def _prior(C: int) -> Tensor:
    keep = torch.eye(C, dtype=torch.float64)
    return PRIOR_KEPT * keep + PRIOR_CHANGED * (1 - keep) / max(1, C - 1)


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
    kept = torch.full_like(log_transition, -torch.inf).fill_diagonal_(0.0)[observed]
    return torch.where(trusted[:, None], kept, channel)


class Likelihood:
    """Mean penalised negative log-likelihood and its gradient, of a flat vector.

    The vector holds the logarithm of the scale, the offsets, the parameters of the changes (the
    logit of a rate, or logits of each row of $T$) and, with rows enough, the mixing in units of
    the spread of the logits.
    """

    def __init__(
        self,
        outputs: Tensor,
        observed: Tensor,
        trusted: Tensor | None,
        changes: Changes,
        *,
        mixed: bool = True,
    ) -> None:
        self.z, self.observed, self.trusted, self.changes = outputs, observed, trusted, changes
        self.count, self.C = outputs.shape
        doubtful = torch.ones(self.count, dtype=torch.float64)
        self.doubtful = doubtful if trusted is None else doubtful * ~trusted
        # A single rate needs little to hold it: one row for all classes together.
        self.prior = _prior(self.C) / (1 if changes == "by class" else 10 * self.C)
        enough = self.C <= MOST_MIXED_CLASSES and self.count >= ROWS_PER_MIXING * self.C**2
        self.mixed = mixed and enough
        self.ridge = MIXING_RIDGE / self.count
        self.spread = max(outputs.std().item(), 1e-12)
        self.sizes = [1, self.C, self.C**2 if changes == "by class" else 1]
        self.sizes.append(self.C**2 if self.mixed else 0)

    def maximise(self, start: LabelNoise) -> LabelNoise:
        """The most likely parameters, from those of ``start``."""
        C = self.C
        parts = [torch.tensor([start.log_scale], dtype=torch.float64), start.offsets]
        if self.changes == "by class":
            parts.append(start.log_transition.flatten())
        else:
            kept = start.log_transition.diagonal().exp().mean().clamp(0.5, 0.999)
            parts.append((1 - kept).logit().reshape(1))
        if self.mixed:
            parts.append((start.mixing * self.spread).flatten())
        found = minimize(self, torch.cat(parts), max_steps=FIT_STEPS, tolerance=FIT_TOLERANCE).place
        log_scale, offsets, changes, mixing = found.split(self.sizes)
        log_T = self._log_transition(changes)
        M = mixing.view(C, C) / self.spread if self.mixed else torch.zeros_like(start.mixing)
        return LabelNoise(log_scale.item(), M, offsets.clone(), log_T, self.changes)

    def _log_transition(self, parameters: Tensor) -> Tensor:
        if self.changes == "by class":
            return parameters.view(self.C, self.C).log_softmax(1)
        keep = torch.eye(self.C, dtype=torch.float64)
        rate = parameters.sigmoid()
        return (keep * (1 - rate) + (1 - keep) * rate / max(1, self.C - 1)).log()

    def __call__(self, theta: Tensor) -> tuple[float, Tensor]:
        """Value, and gradient of the shape of ``theta``."""
        C, m = self.C, self.count
        log_scale, offsets, changes, mixing = theta.split(self.sizes)
        scale = log_scale.exp()
        log_T = self._log_transition(changes)
        u = scale * self.z + offsets
        if self.mixed:
            u = torch.addmm(u, self.z, mixing.view(C, C) / self.spread)
        log_p = u.log_softmax(1)
        joint = log_p + _log_channel(log_T, self.observed, self.trusted)
        total = joint.logsumexp(1)
        posterior = (joint - total[:, None]).exp()
        pull = log_p.exp() - posterior
        value = -total.sum() / m + BIAS_RIDGE * offsets.square().sum()
        slopes = [
            scale * (pull * self.z).sum() / m,
            pull.sum(0) / m + 2 * BIAS_RIDGE * offsets,
        ]
        value = value - (self.prior * log_T).sum() / m
        slopes.append(self._slopes_of_changes(log_T, posterior).flatten() / m)
        if self.mixed:
            value = value + self.ridge * mixing.square().sum()
            bent = (self.z.mT @ pull).flatten() / (m * self.spread)
            slopes.append(bent + 2 * self.ridge * mixing)
        return value.item(), torch.cat(slopes)

    def _slopes_of_changes(self, log_T: Tensor, posterior: Tensor) -> Tensor:
        """Expected minus counted changes, pseudo-counts included."""
        counts = torch.zeros(self.C, self.C, dtype=torch.float64)
        counts.index_add_(0, self.observed, posterior * self.doubtful[:, None])
        counts = counts.mT + self.prior
        if self.changes == "by class":
            return log_T.exp() * counts.sum(1, keepdim=True) - counts
        rate = 1 - log_T[0, 0].exp()
        return rate * counts.sum() - (counts.sum() - counts.trace())
