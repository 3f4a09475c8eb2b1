"""Scores as one HTML page that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from woodbury._files import atomic
from woodbury.errors import ArgumentError

if TYPE_CHECKING:
    from woodbury.influence.scores import Scores, Side

__all__ = ["write_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #222; background: #fff }
table { border-collapse: collapse; width: 100%; table-layout: fixed }
td, th { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top;
  overflow-wrap: anywhere }
td.n, th.n { text-align: right; width: 7rem; font-variant-numeric: tabular-nums }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2rem }
h2 { margin-top: 2.5rem } .bar { height: .5rem; background: #4a7ebb }
.oppose .bar { background: #c0504d }
@media (max-width: 50rem) { .pair { grid-template-columns: 1fr } }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #ddd }
  td, th { border-color: #444 } }
"""

_READING = (
    "A score is what adding the example once more, with the weight 1/N that every example has, "
    "would do to the measurement of the query, to first order, in the unit of the measurement; "
    "leaving the example out would do the opposite. {sign}"
)


def write_report(
    scores: Scores,
    path: Path,
    k: int,
    queries: Sequence[str] | None,
    examples: Sequence[str] | None,
) -> None:
    """Write the page; see :meth:`woodbury.influence.Scores.report`.

    Raises:
        ArgumentError: descriptions are fewer than queries or rows.
    """
    count = scores.values.shape[0]
    if queries is not None and len(queries) != count:
        raise ArgumentError(f"{len(queries)} descriptions are given for {count} queries")
    last = int(scores.rows.max()) if len(scores.rows) else -1
    if examples is not None and len(examples) <= last:
        raise ArgumentError(
            f"{len(examples)} descriptions are given for training rows up to {last}; give one for "
            "each row of the data"
        )
    body = "".join(
        f"<h2>Query {q}</h2>{_described(queries, q)}<div class='pair'>"
        f"{_side(scores, q, k, 'support', examples)}{_side(scores, q, k, 'oppose', examples)}</div>"
        for q in range(count)
    )
    sign = (
        "The measurement is a loss: negative scores lower it and speak for the prediction."
        if scores.support < 0
        else "Positive scores raise the measurement."
    )
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'><title>Influence</title>"
        f"<style>{_STYLE}</style><h1>Which training examples are behind it</h1>"
        f"<p>{_READING.format(sign=sign)}</p>{body}<h2>How far to trust this</h2>"
        f"{_certificate(scores.certificate())}</html>\n"
    )
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _described(names: Sequence[str] | None, place: int) -> str:
    return "" if names is None else f"<p>{escape(names[place])}</p>"


def _side(scores: Scores, query: int, k: int, side: Side, examples: Sequence[str] | None) -> str:
    top = scores.top(k, side)
    sign = scores.support if side == "support" else -scores.support
    pairs = [
        (row, value)
        for row, value in zip(top.rows[query].tolist(), top.values[query].tolist(), strict=True)
        if sign * value > 0
    ]
    largest = max((abs(value) for _, value in pairs), default=1.0)
    lines = "".join(
        f"<tr><td class='n'>{row}</td><td>{escape(examples[row]) if examples is not None else ''}"
        f"<div class='bar' style='width:{100 * abs(value) / largest:.1f}%'></div></td>"
        f"<td class='n'>{value:.3g}</td></tr>"
        for row, value in pairs
    )
    title = "speak for it" if side == "support" else "speak against it"
    return (
        f"<div class='{side}'><h3>Examples that {title}</h3><table><tr><th class='n'>row</th>"
        f"<th>example</th><th class='n'>score</th></tr>{lines}</table></div>"
    )


def _certificate(words: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr><th>{escape(key.replace('_', ' '))}</th><td>{escape(_plain(value))}</td></tr>"
        for key, value in words.items()
    )
    return f"<table>{lines}</table>"


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
