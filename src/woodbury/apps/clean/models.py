"""What every model of ``woodbury clean`` offers the loop, and the data they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from woodbury.apps.clean.noise import NoiseModel

__all__ = ["Data", "HeldOut", "HeldOutScore", "Model", "principal_components"]

Report = Callable[[float], None]
# No share of the variance below this is dropped where columns have to be condensed.
KEPT_VARIANCE = 0.85


@dataclass(frozen=True, eq=False)
class Data:
    """A prepared table.

    Attributes:
        X: float32 ``[n, d]``, centred, of total variance 1.
        observed: classes ``[n]`` (int64), or targets ``[n]`` (float64) of robust deviation 1.
        classes: $C$, 0 for regression.
        trusted: rows whose label is right, bool ``[n]``, or None.
        seed: of what draws.
        budget_bytes: memory besides ``X``.
    """

    X: Tensor
    observed: Tensor
    classes: int
    trusted: Tensor | None
    seed: int
    budget_bytes: int

    @property
    def regression(self) -> bool:
        """Whether the label is a quantity."""
        return self.classes == 0

    def targets(self) -> Tensor:
        r"""What least squares is fitted to: one-hot minus $1/C$, or the target; ``[n, C]``."""
        if self.regression:
            return self.observed[:, None]
        hot = torch.nn.functional.one_hot(self.observed, self.classes).double()
        return hot - 1 / self.classes

    def sample(self, rows: int) -> Tensor:
        """Indices of up to ``rows`` rows, drawn without regard to labels, in order."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(len(self.X), generator=generator)[:rows].sort().values

    def take(self, index: Tensor) -> Data:
        """These rows only."""
        trusted = None if self.trusted is None else self.trusted[index]
        return Data(
            self.X[index],
            self.observed[index],
            self.classes,
            trusted,
            self.seed,
            self.budget_bytes,
        )


class HeldOutScore:
    """Mean loss of held-out predictions under the noise model that suits them best.

    The noise model is fitted anew at each call, from the last one; at its optimum the derivative
    of the score in the predictions is the partial one (the envelope theorem).
    """

    def __init__(self, data: Data, noise: NoiseModel) -> None:
        self.data, self.noise = data, noise

    def __call__(self, outputs: Tensor) -> tuple[float, Tensor]:
        """Score and slope ``[n, C]`` of held-out outputs ``[n, C]``."""
        observed, trusted = self.data.observed, self.data.trusted
        self.noise = self.noise.fit(outputs, observed, None, trusted)
        judged = self.noise.judge(outputs, observed, None, trusted)
        return judged.losses.mean().item(), judged.slopes / len(observed)


class HeldOut(Protocol):
    """A weighted fit as every row sees it that is left out."""

    @property
    def outputs(self) -> Tensor:
        """Logits or predictions ``[n, C]``, float64."""
        ...

    @property
    def variance(self) -> Tensor | None:
        """Relative variance of held-out residuals ``[n]``; regression only."""
        ...

    def weight_hypergradient(self, slopes: Tensor) -> Tensor:
        """$dF/dw$, ``[n]``, of an outer loss with these slopes ``[n, C]`` in the outputs."""
        ...

    def certificate(self) -> dict[str, Any]:
        """The inverse that was used and what it is worth; plain numbers and words."""
        ...


class Model(Protocol):
    """A model with settings, for one table."""

    name: str
    #: Whether to tune again once rows have weights: they let a linear model use a smaller penalty.
    #: A kernel can fit any row closely, and would come to trust its own weights too far.
    retunes: bool

    def settings(self) -> dict[str, float]:
        """What :meth:`tune` chose, to be stored."""
        ...

    def restore(self, settings: dict[str, float]) -> None:
        """Take stored settings."""
        ...

    def tune(
        self, rows: Tensor, weights: Tensor, noise: NoiseModel, progress: Report
    ) -> tuple[float, NoiseModel]:
        """Minimise the held-out score on these rows; the score, and the noise model there."""
        ...

    def fit(self, weights: Tensor, progress: Report) -> HeldOut:
        """Fit all rows with weights ``[n]``."""
        ...


def principal_components(X: Tensor, *, most: int, share: float = KEPT_VARIANCE) -> Tensor:
    """Scores ``[n, r]`` on the leading principal components of centred rows ``[n, d]``.

    As many as hold ``share`` of the variance, and at most ``most``.
    """
    gram = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    for part in X.split(65_536):
        gram += part.mT @ part
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    within = values.cumsum(0) < share * values.sum()
    rank = min(most, int(within.sum()) + 1, X.shape[1])
    return X @ vectors[:, :rank].to(X.dtype)
