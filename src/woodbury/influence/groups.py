"""What leaving out a group of training examples does, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, ShapeError
from woodbury.influence.scores import Scores, membership

__all__ = ["GroupEffects", "leave_group_out"]


@dataclass(frozen=True, eq=False)
class GroupEffects:
    """Estimated changes of what is measured when groups are left out.

    Attributes:
        values: of each query and group, ``[Q, G]``, in the unit of the measurement.
        standard_error: of ``values``, ``[Q, G]``; NaN where one example or one model tells nothing.
        models: how many models the estimate is a mean of.
        sizes: examples in each group, ``[G]``.

    Example:
        >>> import torch
        >>> from woodbury.influence import Scores, leave_group_out
        >>> scores = Scores(torch.tensor([[1.0, 3.0, -2.0]]), torch.arange(3))
        >>> found = leave_group_out(scores, [[0, 1], [2]])
        >>> found.values, found.standard_error
        (tensor([[-4.,  2.]]), tensor([[2., nan]]))
    """

    values: Tensor
    standard_error: Tensor
    models: int
    sizes: Tensor


def leave_group_out(
    scores: Scores | Sequence[Scores],
    groups: Tensor | Sequence[Sequence[int]],
    *,
    weights: Tensor | None = None,
) -> GroupEffects:
    r"""The change of the measurement when a group $S$ is left out, $-\sum_{i \in S} w_i s_{qi}$.

    To first order in the weights: the effect of a large or coherent group is larger than this says,
    because without it the curvature is smaller, too.

    The standard error depends on what is given:

    - Scores of $K$ models, trained alike from different seeds: values are the mean over models,
      with the standard error of a mean of $K$. That is how far training noise goes.
    - Scores of one model: $\sqrt{|S|}$ times the standard deviation of $w_i s_{qi}$ in the group:
      how much the sum would vary over groups of that size, drawn from where this one came from.

    Args:
        scores: of one model, or of several for the same queries and rows.
        groups: as for :meth:`Scores.grouped`.
        weights: $w$ of every column, ``[N]``; 1 by default.

    Returns:
        :class:`GroupEffects`.

    Raises:
        ArgumentError: no scores, or a row that has none.
        ShapeError: scores of other queries or rows, or weights of another size.

    Source: Koh, Ang, Teo and Liang, "On the accuracy of influence functions for measuring group
    effects" (NeurIPS 2019), for what sums of first-order effects miss.

    Example:
        >>> import torch
        >>> from woodbury.influence import Scores, leave_group_out
        >>> a = Scores(torch.tensor([[1.0, 3.0]]), torch.arange(2))
        >>> b = Scores(torch.tensor([[1.0, 5.0]]), torch.arange(2))
        >>> found = leave_group_out([a, b], [[0, 1]])
        >>> found.values, found.standard_error
        (tensor([[-5.]]), tensor([[1.]]))
    """
    every = [scores] if isinstance(scores, Scores) else list(scores)
    if not every:
        raise ArgumentError("no scores are given")
    first = every[0]
    for other in every[1:]:
        if other.values.shape != first.values.shape or not torch.equal(other.rows, first.rows):
            raise ShapeError(
                f"scores of shapes {tuple(first.values.shape)} and {tuple(other.values.shape)}, or "
                "of other rows; all models must be asked the same"
            )
    values = [one.values for one in every]
    if weights is not None:
        if weights.shape != first.rows.shape:
            raise ShapeError(
                f"weights have shape {tuple(weights.shape)}, expected [{len(first.rows)}]"
            )
        values = [value * weights.to(value) for value in values]
    member = membership(groups, first.rows).to(values[0])
    sizes = member.sum(1)
    if len(every) > 1:
        sums = torch.stack([-(value @ member.T) for value in values])
        error = sums.std(0) / math.sqrt(len(every))
        return GroupEffects(sums.mean(0), error, len(every), sizes.long())
    value = values[0]
    mean = value @ member.T / sizes
    # Two passes: the difference of two sums of squares would lose the digits.
    squares = torch.stack(
        [((value - mean[:, g, None]).square() @ row) for g, row in enumerate(member)], dim=1
    )
    error = (sizes * squares / (sizes - 1)).sqrt()  # 0 / 0 is NaN: one example says nothing
    return GroupEffects(-(value @ member.T), error, 1, sizes.long())
