"""What the report shows: for each query the rows behind it, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from woodbury.apps.attribute.network import Network
from woodbury.apps.attribute.records import Record
from woodbury.apps.attribute.report import FoundRow, QueryPage, ShownToken, coloured
from woodbury.apps.attribute.sequences import IGNORED, Sequences
from woodbury.curvature import KFAC
from woodbury.influence import Influence, Scores, token_scores
from woodbury.influence.scores import Side

__all__ = ["certificate_lines", "query_pages"]

_BYTES = 4  # of a character, at most
Lists = dict[Side, list[tuple[int, float]]]


def query_pages(
    influence: Influence,
    scores: Scores,
    train: Sequences,
    queries: Sequences,
    network: Network,
    rows: Sequence[Record],
    asked: Sequence[Record],
    losses: Sequence[float],
    top: int,
) -> list[QueryPage]:
    """One page a query, with the ``top`` rows of either side."""
    found = _strongest(scores, top)
    places = _places(influence, queries, train, found)
    error = None if scores.solve_error is None else scores.error()
    columns = {int(row): k for k, row in enumerate(scores.rows.tolist())}
    texts = {row: token_texts(network, train.ids[row]) for _, row in places}
    pages = []
    for q, record in enumerate(asked):
        lists: dict[Side, list[FoundRow]] = {"support": [], "oppose": []}
        for side, chosen in found[q].items():
            for row, score in chosen:
                off = 0.0 if error is None else float(error[q, columns[row]])
                own = places[q, row][: len(texts[row])].tolist()
                lists[side].append(
                    FoundRow(
                        _name(rows[row]),
                        score,
                        off or None,
                        coloured(texts[row], own),
                        _label(rows[row]),
                    )
                )
        pages.append(
            QueryPage(
                _name(record),
                losses[q],
                _asked(network, queries, q),
                lists["support"],
                lists["oppose"],
                _label(record),
            )
        )
    return pages


def _strongest(scores: Scores, top: int) -> list[Lists]:
    """Rows and scores of either side of every query, the strongest first."""
    found: list[Lists] = [{} for _ in range(len(scores.values))]
    sides: tuple[tuple[Side, int], ...] = (("support", -1), ("oppose", 1))
    for side, sign in sides:
        best = scores.top(top, side)
        for lists, rows, values in zip(
            found, best.rows.tolist(), best.values.tolist(), strict=True
        ):
            pairs = zip(rows, values, strict=True)
            lists[side] = [(row, score) for row, score in pairs if sign * score > 0]
    return found


def _places(
    influence: Influence,
    queries: Sequences,
    train: Sequences,
    found: Sequence[Lists],
) -> dict[tuple[int, int], Tensor]:
    """Scores of the places of every pair of a query and a row in its lists."""
    pairs = [
        (q, row) for q, sides in enumerate(found) for side in sides.values() for row, _ in side
    ]
    if not pairs:
        return {}
    # Rows of about one length in a batch: less padding to compute with.
    wanted = sorted({row for _, row in pairs}, key=lambda row: len(train.ids[row]))
    number = {row: k for k, row in enumerate(wanted)}
    numbered = torch.tensor([(q, number[row]) for q, row in pairs])
    values = token_scores(influence, queries, train.take(wanted), pairs=numbered).values
    return dict(zip(pairs, values, strict=True))


def _name(record: Record) -> str:
    return record.name if record.name is not None else f"line {record.line}"


def _label(record: Record) -> str:
    return "" if record.label is None else f"class {record.label}"


def token_texts(network: Network, ids: Tensor) -> list[str]:
    """Tokens as text that joins to the sequence, also where characters go over several tokens."""
    texts: list[str] = []
    start = read = 0  # what is read from start on is in front of the tokens that come next
    for stop in range(1, len(ids) + 1):
        before, whole = _text(network, ids[start:read]), _text(network, ids[start:stop])
        # Half a character decodes to a replacement sign: it is shown with its other half.
        if whole.endswith("\ufffd") and stop < len(ids) and stop - read < _BYTES:
            texts.append("")
            continue
        known = whole.startswith(before)
        texts.append(whole[len(before) :] if known else _text(network, ids[read:stop]))
        start, read = read, stop
    return texts


def _text(network: Network, ids: Tensor) -> str:
    return network.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


def _asked(network: Network, queries: Sequences, q: int) -> list[ShownToken]:
    """The query, with the predicted tokens marked."""
    texts = token_texts(network, queries.ids[q])
    labels = queries.labels[q]
    if labels.dim() == 0:
        return [ShownToken(text) for text in texts]
    marked = (labels != IGNORED).tolist()
    if network.kind == "causal":  # labels stand where they are predicted, one place before
        marked = [False, *marked[:-1]]
    else:
        shown = queries.ids[q].where(labels == IGNORED, labels)
        texts = token_texts(network, shown)
    return [
        ShownToken(text, "asked" if flag else "") for text, flag in zip(texts, marked, strict=True)
    ]


def certificate_lines(influence: Influence, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the scores are worth, as names and sentences."""
    found = summary["certificate"]
    lines = [
        ("curvature", summary["matrix"]),
        (
            "parameters",
            f"{summary['parameters']:,}, {summary['share_of_parameters']:.0%} of the model "
            f"(--layers {summary['layers']}); what the others learned from a row is not in its "
            "score",
        ),
        ("damping", _damping(summary["damping"], summary["damping_chosen"])),
    ]
    base = influence.system.matrix
    if isinstance(base, KFAC):
        shares = ", ".join(f"{form} {share:.0%}" for form, share in base.coverage().shares.items())
        lines.append(("represented as", shares))
    rank = summary["query_rank"]
    what = "the faster form" if rank is None else f"queries kept with rank {rank} for each layer"
    if "truncation_error_at_most" in found:
        lines.append(
            (
                f"error of {what}",
                f"{found['truncation_error_at_most']:.2g} of all scores together (measured on "
                "exact ones, upper limit)",
            )
        )
    if "error_over_largest_score" in found:
        lines.append(
            (
                f"error of {'the solves' if rank is None else what} ({found['error_guarantee']})",
                f"{found['error_over_largest_score']:.2g} of the largest score of a query",
            )
        )
    lines.append(
        (
            "not in these numbers",
            "how far curvature by this matrix is from that of the loss, that the model may not be "
            "at a minimum, and that training again differs from its first-order effect. Check it "
            "on your data: woodbury.influence.evaluation trains again without the rows that were "
            "found.",
        )
    )
    return lines


def _damping(damping: float | dict[str, float], chosen: bool) -> str:
    """How much, and by whom."""
    if isinstance(damping, dict):
        low, high = min(damping.values()), max(damping.values())
        text = f"{low:.3g} to {high:.3g}, one for each of {len(damping)} layers"
    else:
        text = f"{damping:.4g}"
    if not chosen:
        return f"{text} (--damping)"
    if not damping:
        return f"{text} (there is no curvature to damp)"
    return (
        f"{text} (a tenth of the mean eigenvalue, the default; more of it brings the scores closer "
        "to products of gradients)"
    )
