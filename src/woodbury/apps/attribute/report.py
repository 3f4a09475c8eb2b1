"""The report: one HTML file that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from woodbury.apps.pages import write_page

__all__ = ["FoundRow", "QueryPage", "ShownToken", "coloured", "write_report"]

TEMPLATE = Path(__file__).parent / "templates" / "attribute.html.j2"

_READING = (
    "Each score says what training on the row once more, with the weight that every row has in the "
    "mean, would do to the loss of the query, to first order. Rows with negative scores lower the "
    "loss: they speak for the query. Taking a row out would do the opposite of its score. Scores "
    "have the unit of the loss: nats, in the mean over the predicted tokens of the query (of a "
    "classifier: of its class).",
    "The score of a row is the sum of the scores of its places. The colour of a token is the score "
    "of its place: of what the layers learn there, which is mostly to predict the next token. (A "
    "model with attention also learns at a place what later places need.) Colours are scaled for "
    "each row: strong means much of this row's score, not much in comparison with other rows.",
    "These are derivatives of a model of the curvature, not experiments: their order is to be "
    "trusted more than their size, and a score larger than the loss itself is far outside of what "
    "a first-order statement covers. Rows at the top of the list are worth reading; whether they "
    "cause what the model says, only training without them tells.",
)


@dataclass(frozen=True)
class ShownToken:
    """A token with its colour.

    Attributes:
        text: as it is printed.
        kind: ``"for"``, ``"against"``, ``"asked"`` (predicted, in a query), or nothing.
        share: strength of the colour, from 0 to 1.
        score: its part of the row's score.
    """

    text: str
    kind: str = ""
    share: float = 0.0
    score: float = 0.0


@dataclass(frozen=True)
class FoundRow:
    """A training row in a list.

    Attributes:
        name: what the reader knows it by.
        score: of the row.
        error: how far the score may be off from that of the matrix; ``None`` where not known.
        tokens: with their colours.
        label: its class, in words; empty where there are none.
    """

    name: str
    score: float
    error: float | None
    tokens: Sequence[ShownToken]
    label: str = ""


@dataclass(frozen=True)
class QueryPage:
    """A query with the rows behind it.

    Attributes:
        name: what the reader knows it by.
        loss: of the query.
        tokens: of the query.
        support: rows that lower its loss, the strongest first.
        oppose: rows that raise it.
        label: its class, in words.
    """

    name: str
    loss: float
    tokens: Sequence[ShownToken]
    support: Sequence[FoundRow]
    oppose: Sequence[FoundRow]
    label: str = ""


def coloured(texts: Sequence[str], scores: Sequence[float]) -> list[ShownToken]:
    """Tokens with colours: negative scores speak for the query, the largest has full strength.

    Args:
        texts: of the tokens.
        scores: of their places.
    """
    largest = max((abs(score) for score in scores), default=0.0)
    if largest == 0:
        return [ShownToken(text) for text in texts]
    return [
        ShownToken(text, "" if not score else "for" if score < 0 else "against", share, score)
        for text, score, share in zip(
            texts, scores, [abs(s) / largest for s in scores], strict=True
        )
    ]


def write_report(
    summary: dict[str, Any],
    queries: Sequence[QueryPage],
    certificate: Sequence[tuple[str, str]],
    path: Path,
) -> Path:
    """Write the report of a run, whole or not at all.

    Args:
        summary: what ``summary.json`` holds.
        queries: in the order of the file.
        certificate: names and sentences: what the scores are worth.
        path: the HTML file.

    Returns:
        The path.
    """
    values = {
        "summary": summary,
        "queries": queries,
        "certificate": certificate,
        "reading": _READING,
        "verdict": _verdict(summary),
    }
    return write_page(path, TEMPLATE, values)


def _verdict(summary: dict[str, Any]) -> str:
    kept = summary["train_rows_scored"]
    text = f"Scores of {kept:,} training rows"
    if kept < summary["train_rows"]:
        text += f" (of {summary['train_rows']:,}, the most similar in words)"
    return f"{text} by {summary['matrix']}."
