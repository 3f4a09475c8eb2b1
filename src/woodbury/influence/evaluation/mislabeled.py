"""Do scores find wrong labels?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, NonFiniteError, ShapeError
from woodbury.influence.evaluation.statistics import Interval, bootstrap, ranks

__all__ = ["Detection", "flip_labels", "label_margin", "mislabel_detection"]


@dataclass(frozen=True, eq=False)
class Detection:
    """How well a ranking of rows finds those with wrong labels.

    Attributes:
        average_precision: with a bootstrap interval over rows.
        auroc: likewise; the chance that a wrong row ranks above a right one.
        found: share of the wrong rows among the first ``k``, for ``k = 1 .. N``, ``[N]``.

    Example:
        >>> import torch
        >>> from woodbury.influence.evaluation import mislabel_detection
        >>> wrong = torch.tensor([True, False, False, True])
        >>> mislabel_detection(torch.tensor([3.0, 1.0, 2.0, 0.0]), wrong).found
        tensor([0.5000, 0.5000, 0.5000, 1.0000], dtype=torch.float64)
    """

    average_precision: Interval
    auroc: Interval
    found: Tensor


def flip_labels(
    labels: Tensor,
    share: float = 0.1,
    *,
    classes: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Give a share of the rows another label, uniformly over the other classes.

    Args:
        labels: class numbers ``[N]``.
        share: of the rows, rounded.
        classes: how many classes; default one more than the largest label.
        generator: draws; the same rows every time if not given.

    Returns:
        New labels ``[N]``, and which of them are wrong, ``[N]`` booleans.

    Raises:
        ShapeError: labels are not integers ``[N]``.
        ArgumentError: fewer than 2 classes, or a share outside of 0 to 1.

    Example:
        >>> import torch
        >>> from woodbury.influence.evaluation import flip_labels
        >>> noisy, wrong = flip_labels(torch.zeros(10, dtype=torch.long), 0.2, classes=2)
        >>> int(wrong.sum()), torch.equal(noisy.bool(), wrong)
        (2, True)
    """
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ShapeError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected class numbers [N]"
        )
    classes = int(labels.max()) + 1 if classes is None and len(labels) else classes
    if classes is None or classes < 2 or not 0 <= share <= 1:
        raise ArgumentError(f"{classes} classes and a share of {share}: give 2 classes, 0 to 1")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    count = round(share * len(labels))
    chosen = torch.randperm(len(labels), generator=generator)[:count].to(labels.device)
    step = torch.randint(1, classes, (count,), generator=generator).to(labels)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + step) % classes
    wrong = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    wrong[chosen] = True
    return noisy, wrong


def label_margin(logits: Tensor, labels: Tensor) -> Tensor:
    r"""How many times more probable another class is than the label: a suspicion that it is wrong.

    $\max_{c \ne y} \log\bar p_c - \log\bar p_y$, with the mean $\bar p$ over models of the softmax
    of logits; of one model a difference of logits. Give it predictions of models that did not see
    the row, for example those of :func:`~woodbury.leave_one_out`: a model that has seen a wrong
    label believes it.

    Args:
        logits: ``[N, C]``, or of several models ``[M, N, C]``. Of a network that starts at random,
            five models find more wrong labels than one.
        labels: class numbers $y$, ``[N]``.

    Returns:
        Suspicions ``[N]`` in nats, float64; positive where another class is more probable.

    Raises:
        ShapeError: the two do not fit, there is one class only, or labels are not integers of
            ``0 .. C-1``.
        NonFiniteError: a logit is NaN or infinite.

    Source: margins of folds are due to Northcutt, Jiang and Chuang, "Confident learning: estimating
    uncertainty in dataset labels" (JAIR 2021), as differences of probabilities; logarithms tell
    apart what is all but certain, and leave-one-out needs no folds.

    Example:
        >>> import torch
        >>> from woodbury.influence.evaluation import label_margin
        >>> logits = torch.tensor([[0.0, 1.0], [3.0, 3.0], [0.0, 9.0]])
        >>> label_margin(logits, torch.tensor([1, 1, 0]))
        tensor([-1.,  0.,  9.], dtype=torch.float64)
    """
    shape = tuple(logits.shape)
    if logits.dim() not in (2, 3) or shape[-1] < 2 or shape[-2:-1] != tuple(labels.shape):
        raise ShapeError(
            f"logits have shape {shape} and labels {tuple(labels.shape)}; expected [N, C] or "
            "[M, N, C] with 2 classes or more, and [N]"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ShapeError(f"labels are {labels.dtype}; expected class numbers [N]")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < shape[-1]:
        raise ShapeError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, and there are logits of "
            f"{shape[-1]} classes"
        )
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("a logit is NaN or infinite")
    logs = logits.detach().double().log_softmax(-1)
    if logs.dim() == 3:
        logs = logs.logsumexp(0)
    place = labels.long()[:, None].to(logs.device)
    own = logs.gather(1, place).squeeze(1)
    return logs.scatter(1, place, -torch.inf).amax(1) - own


def mislabel_detection(
    suspicion: Tensor,
    wrong: Tensor,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> Detection:
    """Average precision and area under the ROC curve of a ranking of rows.

    Args:
        suspicion: ``[N]``, larger is more suspicious: minus the self-influence of
            :meth:`woodbury.Influence.self_influence` (what adding a row does to its own loss), the
            :func:`label_margin` of leave-one-out predictions, one minus a self-confidence.
        wrong: which labels are wrong, ``[N]`` booleans.
        level: of the intervals.
        resamples: of the bootstrap.
        generator: draws the resamples; the same ones every time if not given.

    Returns:
        :class:`Detection`. Rows of equal suspicion are taken together, so that their order does not
        matter.

    Raises:
        ShapeError: the two do not fit.
        NonFiniteError: a suspicion is NaN.
        ArgumentError: no label is wrong, or none is right.

    Cost: a sort of ``N`` numbers for every resample.

    Source: Davis and Goadrich, "The relationship between precision-recall and ROC curves" (2006).

    Example:
        >>> import torch
        >>> from woodbury.influence.evaluation import mislabel_detection
        >>> wrong = torch.tensor([True, False, False, True])
        >>> found = mislabel_detection(torch.tensor([3.0, 1.0, 2.0, 0.0]), wrong)
        >>> found.average_precision.value, found.auroc.value
        (0.75, 0.5)
    """
    suspicion, wrong = suspicion.detach().cpu().double(), wrong.detach().cpu()
    if suspicion.dim() != 1 or wrong.shape != suspicion.shape or wrong.dtype != torch.bool:
        raise ShapeError(
            f"suspicion has shape {tuple(suspicion.shape)}, wrong is {wrong.dtype} of shape "
            f"{tuple(wrong.shape)}; expected [N] numbers and [N] booleans"
        )
    if bool(suspicion.isnan().any()):
        raise NonFiniteError(f"{int(suspicion.isnan().sum())} rows have a suspicion of NaN")
    count = int(wrong.sum())
    if not 0 < count < len(wrong):
        raise ArgumentError(f"{count} of {len(wrong)} labels are wrong; there is nothing to find")
    intervals = [
        bootstrap(
            lambda index, measure=measure: measure(suspicion[index], wrong[index]),
            (len(wrong),),
            level=level,
            resamples=resamples,
            generator=generator,
        )
        for measure in (_average_precision, _auroc)
    ]
    order = suspicion.argsort(descending=True, stable=True)
    found = wrong[order].double().cumsum(0) / count
    return Detection(intervals[0], intervals[1], found)


def _average_precision(suspicion: Tensor, wrong: Tensor) -> float:
    """The mean over wrong rows of the precision at their threshold."""
    if not bool(wrong.any()):
        return float("nan")
    ordered, order = suspicion.sort(descending=True)
    hits = wrong[order].double().cumsum(0)
    # A threshold takes all rows that are equal: the last of each run of them counts.
    last = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)])
    hits, taken = hits[last], torch.arange(1, len(ordered) + 1).double()[last]
    gained = torch.diff(hits, prepend=hits.new_zeros(1))
    return float((gained * hits / taken).sum() / hits[-1])


def _auroc(suspicion: Tensor, wrong: Tensor) -> float:
    """By ranks, as Mann and Whitney."""
    positive = int(wrong.sum())
    negative = len(wrong) - positive
    if not positive or not negative:
        return float("nan")
    total = float(ranks(suspicion)[wrong].sum())
    return (total - positive * (positive + 1) / 2) / (positive * negative)
