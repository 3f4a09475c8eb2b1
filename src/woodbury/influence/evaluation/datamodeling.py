"""The linear datamodeling score: do scores predict what random halves of the data give?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, DataError, ShapeError
from woodbury.influence.evaluation.retraining import Retrained
from woodbury.influence.evaluation.statistics import Interval, mean_correlation, spearman
from woodbury.influence.scores import Scores

__all__ = ["DatamodelingScore", "linear_datamodeling_score"]


@dataclass(frozen=True, eq=False)
class DatamodelingScore:
    """Rank correlation of predicted and retrained measurements.

    Attributes:
        per_query: ``[Q]``; NaN where a query's prediction or measurement is the same for all
            subsets.
        mean: over the queries that are not NaN, with a bootstrap interval.
        undefined: how many are NaN.

    Example:
        >>> from woodbury.influence.evaluation import DatamodelingScore, Interval
        >>> import torch
        >>> print(DatamodelingScore(torch.ones(2), Interval(1.0, 1.0, 1.0, 0.95), 0).mean)
        1.000 (95 %: 1.000 to 1.000)
    """

    per_query: Tensor
    mean: Interval
    undefined: int


def linear_datamodeling_score(
    scores: Scores | Tensor,
    retrained: Retrained,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> DatamodelingScore:
    r"""The linear datamodeling score (LDS) of influence scores.

    For every query $q$, the Spearman correlation over subsets $S$ between the prediction
    $\sum_{i \in S} s_{qi}$ and the measurement of the models trained on $S$ (the mean over their
    seeds); then the mean over queries. Scores follow the convention of
    :class:`~woodbury.influence.Scores`: a positive one raises the measurement, so a good method has
    a **positive** LDS whatever is measured. The scale of scores does not matter.

    The interval is of the mean: subsets and queries are both drawn again.

    Args:
        scores: of the queries that were measured, for every row that is in a subset; a tensor is
            ``[Q, N]`` with row numbers as columns.
        retrained: what :func:`retrain` measured.
        level: of the interval.
        resamples: of the bootstrap.
        generator: draws the resamples; the same ones every time if not given.

    Returns:
        :class:`DatamodelingScore`.

    Raises:
        ShapeError: the numbers of queries differ.
        ArgumentError: fewer than 3 subsets, a row of a subset without a score, or a level that
            makes no sense.
        DataError: models of other shares are missing.

    Cost: sorting ``Q S`` numbers once for every resample.

    Source: Park, Georgiev, Ilyas, Leclerc and Madry, "TRAK: Attributing model behavior at scale"
    (ICML 2023), definition 2.4; Ilyas et al., "Datamodels" (ICML 2022).

    Example:
        >>> import torch
        >>> from woodbury.influence.evaluation import (
        ...     half_subsets, linear_datamodeling_score, retrain
        ... )
        >>> x = torch.arange(8.0)
        >>> truth = retrain(lambda rows, seed: x[rows].sum(), lambda s: s[None], half_subsets(8, 9))
        >>> linear_datamodeling_score(x[None], truth).mean.value
        1.0
    """
    measured = retrained.means().T.contiguous()
    values, rows = of_queries(scores, len(measured))
    if bool(measured.isnan().any()):
        raise DataError("some models are not trained yet: run the other shares first")
    if len(retrained.subsets) < 3:
        raise ArgumentError(
            f"{len(retrained.subsets)} subsets; a rank correlation needs 3 at least, better 100"
        )
    predicted = predictions(values, rows, retrained.subsets)
    per_query = spearman(predicted, measured)
    drawn: dict[str, Any] = {"level": level, "resamples": resamples, "generator": generator}
    mean = mean_correlation(spearman, predicted, measured, **drawn)
    return DatamodelingScore(per_query, mean, int(per_query.isnan().sum()))


def of_queries(scores: Scores | Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """Values ``[Q, N]`` and row numbers of scores of so many queries."""
    values, rows = (scores.values, scores.rows) if isinstance(scores, Scores) else (scores, None)
    if values.dim() != 2 or len(values) != count:
        raise ShapeError(
            f"scores have shape {tuple(values.shape)}, and {count} queries were measured"
        )
    return values, rows


def predictions(values: Tensor, rows: Tensor | None, subsets: tuple[Tensor, ...]) -> Tensor:
    """Sums of scores over the rows of each subset, ``[Q, S]`` in float64."""
    count = values.shape[1]
    place = torch.arange(count)
    if rows is not None:
        place = torch.full((int(rows.max()) + 1 if len(rows) else 0,), -1)
        place[rows.cpu()] = torch.arange(count)
    member = torch.zeros(len(subsets), count, dtype=torch.float64)
    for i, subset in enumerate(subsets):
        known = (subset >= 0) & (subset < len(place))
        columns = place[subset[known]]
        if not bool(known.all()) or bool((columns < 0).any()):
            raise ArgumentError(f"subset {i} holds rows that have no score; score all rows")
        member[i].index_add_(0, columns, torch.ones(len(columns), dtype=torch.float64))
    return values.detach().cpu().double() @ member.T
