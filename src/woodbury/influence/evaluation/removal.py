"""What leaving rows out does, by training again: one row, groups, and the rows scores name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, ShapeError
from woodbury.influence.evaluation.datamodeling import of_queries, predictions
from woodbury.influence.evaluation.retraining import Measure, Settings, Train, retrain
from woodbury.influence.evaluation.statistics import (
    Interval,
    bootstrap,
    mean_correlation,
    pearson,
    spearman,
)
from woodbury.influence.scores import Scores, Side

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Agreement",
    "Counterfactuals",
    "RemovalEffects",
    "counterfactual_removal",
    "leave_one_out_retraining",
    "removal_effects",
]


@dataclass(frozen=True, eq=False)
class Agreement:
    """Correlation of predicted and retrained effects, over groups, for every query.

    Attributes:
        pearson: ``[Q]``, NaN where a side is constant.
        spearman: ``[Q]``, likewise.
        mean_pearson: over queries, with a bootstrap interval over groups and queries.
        mean_spearman: likewise.

    Example:
        >>> import torch
        >>> from woodbury.influence.evaluation import leave_one_out_retraining
        >>> x = torch.tensor([1.0, 2.0, 4.0, 8.0])
        >>> effects = leave_one_out_retraining(
        ...     lambda rows, seed: x[rows].mean(), lambda mean: mean[None], 4
        ... )
        >>> scores = (x - x.mean())[None] / 4  # what adding a row does to a mean
        >>> round(effects.agreement(scores).mean_pearson.value, 3)
        1.0
    """

    pearson: Tensor
    spearman: Tensor
    mean_pearson: Interval
    mean_spearman: Interval


@dataclass(frozen=True, eq=False)
class RemovalEffects:
    """Changes of measurements when groups of rows are left out.

    Attributes:
        groups: row numbers of each group, ``G`` tensors.
        changes: ``[G, R, Q]``: without the group minus with all rows, both of one seed.
        full: measurements with all rows, ``[R, Q]``.

    Example:
        >>> import torch
        >>> from woodbury.influence.evaluation import removal_effects
        >>> x = torch.tensor([1.0, 2.0, 4.0, 8.0])
        >>> removal_effects(
        ...     lambda rows, seed: x[rows].sum(), lambda total: total[None], [[0, 3]], 4
        ... ).means()
        tensor([[-9.]], dtype=torch.float64)
    """

    groups: tuple[Tensor, ...]
    changes: Tensor
    full: Tensor

    def means(self) -> Tensor:
        """The mean over seeds, ``[G, Q]``."""
        return self.changes.mean(1)

    def standard_errors(self) -> Tensor:
        """Standard errors of :meth:`means` over seeds, ``[G, Q]``; NaN with a single seed."""
        runs = self.changes.shape[1]
        if runs == 1:
            return torch.full_like(self.changes[:, 0], torch.nan)
        return self.changes.std(1) / runs**0.5

    def agreement(
        self,
        scores: Scores | Tensor,
        *,
        weights: Tensor | None = None,
        level: float = 0.95,
        resamples: int = 1000,
        generator: torch.Generator | None = None,
    ) -> Agreement:
        r"""How well scores predict these effects: $-\sum_{i \in g} w_i s_{qi}$ beside the change.

        Args:
            scores: of the same queries; a tensor is ``[Q, N]``.
            weights: of the examples in the objective, ``[N]``; default 1.
            level: of the intervals.
            resamples: of the bootstrap.
            generator: draws the resamples.

        Raises:
            ShapeError: the numbers of queries differ, or weights do not fit.
            ArgumentError: fewer than 3 groups, or a row without a score.
        """
        measured = self.means().T.contiguous()
        values, rows = of_queries(scores, len(measured))
        if len(self.groups) < 3:
            raise ArgumentError(f"{len(self.groups)} groups; a correlation needs 3 at least")
        if weights is not None:
            if weights.shape != values.shape[1:]:
                raise ShapeError(
                    f"weights have shape {tuple(weights.shape)}, expected [{values.shape[1]}]"
                )
            values = values * weights.to(values)
        predicted = -predictions(values, rows, self.groups)
        drawn: dict[str, Any] = {"level": level, "resamples": resamples, "generator": generator}
        return Agreement(
            pearson(predicted, measured),
            spearman(predicted, measured),
            mean_correlation(pearson, predicted, measured, **drawn),
            mean_correlation(spearman, predicted, measured, **drawn),
        )


def removal_effects(
    train: Train,
    measure: Measure,
    groups: Sequence[Tensor | Sequence[int]],
    num_examples: int,
    **settings: Unpack[Settings],
) -> RemovalEffects:
    """What leaving out each group of rows does to measurements, by training again.

    The same seeds with and without the group: what the randomness of training has in common
    cancels.

    Args:
        train: as for :func:`retrain`.
        measure: as for :func:`retrain`.
        groups: row numbers, one list for each group.
        num_examples: $N$; models are trained on all of them, and on all but those of a group.
        settings: ``seeds`` ``[R]``, ``folder``, ``key``, ``group``, ``processes`` and ``progress``
            of :func:`retrain`.

    Returns:
        :class:`RemovalEffects`.

    Raises:
        ArgumentError: a group that names rows outside of ``0 .. N-1``, or all rows; and as
            :func:`retrain`.

    Cost: ``(G + 1) R`` trainings.

    Example:
        >>> import torch
        >>> from woodbury.influence.evaluation import removal_effects
        >>> x = torch.arange(5.0)
        >>> removal_effects(
        ...     lambda rows, seed: x[rows].mean(), lambda mean: mean[None], [[0], [4]], 5
        ... ).means()
        tensor([[ 0.5000],
                [-0.5000]], dtype=torch.float64)
    """
    if unknown := sorted(set(settings) - set(Settings.__annotations__)):
        names = ", ".join(Settings.__annotations__)
        raise TypeError(f"there is no setting {unknown[0]!r}; there are {names}")
    everything = torch.arange(num_examples)
    left_out = [torch.as_tensor(rows).long().cpu() for rows in groups]
    subsets = [everything]
    for number, rows in enumerate(left_out):
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= num_examples):
            raise ArgumentError(f"group {number} names rows outside of 0 .. {num_examples - 1}")
        kept = torch.ones(num_examples, dtype=torch.bool)
        kept[rows] = False
        if not bool(kept.any()):
            raise ArgumentError(f"group {number} is all {num_examples} rows: nothing is left")
        subsets.append(everything[kept])
    found = retrain(train, measure, subsets, **settings)
    return RemovalEffects(tuple(left_out), found.values[1:] - found.values[:1], found.values[0])


def leave_one_out_retraining(
    train: Train,
    measure: Measure,
    num_examples: int,
    *,
    rows: Tensor | Sequence[int] | None = None,
    **settings: Unpack[Settings],
) -> RemovalEffects:
    """What leaving out each row does to measurements: :func:`removal_effects` of single rows.

    Args:
        train: as for :func:`retrain`.
        measure: as for :func:`retrain`.
        num_examples: $N$.
        rows: which rows are left out in turn; default all.
        settings: as for :func:`removal_effects`. One row moves a network less than another seed
            does: give several ``seeds`` and look at the standard errors.

    Returns:
        :class:`RemovalEffects`, one group for each row.

    Raises:
        ArgumentError: as :func:`removal_effects`.

    Cost: one training for each row and seed.

    Example:
        >>> import torch
        >>> from woodbury.influence.evaluation import leave_one_out_retraining
        >>> x = torch.arange(3.0)
        >>> leave_one_out_retraining(
        ...     lambda rows, seed: x[rows].sum(), lambda total: total[None], 3
        ... ).means().T
        tensor([[ 0., -1., -2.]], dtype=torch.float64)
    """
    chosen = torch.arange(num_examples) if rows is None else torch.as_tensor(rows).long()
    return removal_effects(train, measure, list(chosen.view(-1, 1)), num_examples, **settings)


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """What removing the rows that scores name does to each query, beside random rows.

    Attributes:
        sizes: how many rows were removed, ``K`` numbers.
        changes: of each query's own measurement, ``[Q, K]``, the mean over seeds.
        random: the same with random rows removed, the mean over draws, ``[Q, K]``.
        mean_change: over queries, one interval for each size.
        mean_random: likewise.

    Example:
        >>> import torch
        >>> from woodbury.influence.evaluation import counterfactual_removal
        >>> x = torch.tensor([1.0, 2.0, 4.0, 8.0])
        >>> found = counterfactual_removal(
        ...     x[None], lambda rows, seed: x[rows].sum(), lambda total: total[None], [1, 2]
        ... )
        >>> found.changes
        tensor([[ -8., -12.]], dtype=torch.float64)
    """

    sizes: tuple[int, ...]
    changes: Tensor
    random: Tensor
    mean_change: tuple[Interval, ...]
    mean_random: tuple[Interval, ...]


def counterfactual_removal(
    scores: Scores | Tensor,
    train: Train,
    measure: Measure,
    sizes: Sequence[int],
    *,
    side: Side = "support",
    draws: int = 1,
    level: float = 0.95,
    generator: torch.Generator | None = None,
    **settings: Unpack[Settings],
) -> Counterfactuals:
    """Remove the rows that scores name for each query, train again, and look at that query.

    Args:
        scores: of the queries, with a score for every row; a tensor is ``[Q, N]`` whose large
            values speak for the prediction.
        train: as for :func:`retrain`.
        measure: as for :func:`retrain`; of the same queries.
        sizes: how many rows are removed.
        side: which rows are named, as for :meth:`Scores.top`. Where a loss is measured, removing
            ``"support"`` should raise it.
        draws: how many random groups of each size stand beside.
        level: of the intervals, over queries.
        generator: draws the random groups; the same ones every time if not given.
        settings: as for :func:`removal_effects`.

    Returns:
        :class:`Counterfactuals`.

    Raises:
        ArgumentError: a size that is not between 1 and ``N - 1``, scores of some rows only, or as
            :func:`retrain`.
        ShapeError: the numbers of queries differ.

    Cost: ``(Q K + K draws + 1) R`` trainings.

    Source: Bae, Lin, Lorraine and Grosse, "Training data attribution via approximate unrolled
    differentiation" (2024), section 5.2, as kronfluence's examples do it.

    Example:
        >>> import torch
        >>> from woodbury.influence.evaluation import counterfactual_removal
        >>> x = torch.tensor([1.0, 2.0, 4.0, 8.0])
        >>> counterfactual_removal(
        ...     x[None], lambda rows, seed: x[rows].sum(), lambda total: total[None], [1]
        ... ).mean_change[0].value
        -8.0
    """
    if not isinstance(scores, Scores):
        scores = Scores(scores, torch.arange(scores.shape[1]), support=1)
    count = scores.values.shape[1]
    if not torch.equal(scores.rows.cpu(), torch.arange(count)):
        raise ArgumentError("the scores are of some rows only; score all rows of the training data")
    for size in sizes:
        if not 1 <= size < count:
            raise ArgumentError(f"sizes hold {size}; {count} rows allow 1 to {count - 1}")
    if draws < 1 or not sizes:
        raise ArgumentError(f"draws is {draws} and sizes {list(sizes)}; give at least one of each")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    queries = len(scores.values)
    named = scores.top(max(sizes), side).rows.cpu()
    groups = [named[q, :size] for q in range(queries) for size in sizes]
    for size in sizes:
        groups += [torch.randperm(count, generator=generator)[:size] for _ in range(draws)]
    effects = removal_effects(train, measure, groups, count, **settings)
    means = effects.means()
    if means.shape[1] != queries:
        raise ShapeError(f"{queries} queries have scores and {means.shape[1]} were measured")
    split = queries * len(sizes)
    own = torch.arange(queries)
    changes = means[:split].view(queries, len(sizes), queries)[own, :, own]
    random = means[split:].view(len(sizes), draws, queries).mean(1).T.contiguous()
    intervals = [
        tuple(_mean(table[:, k], level) for k in range(len(sizes))) for table in (changes, random)
    ]
    return Counterfactuals(tuple(sizes), changes, random, intervals[0], intervals[1])


def _mean(values: Tensor, level: float) -> Interval:
    return bootstrap(
        lambda index: float(values[index].mean()),
        (len(values),),
        level=level,
        resamples=1000,
        generator=None,
    )
