"""Charts of the report as inline SVG and HTML, colored by the page's light or dark theme."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

__all__ = ["calibration_chart", "histogram", "matrix", "scatter", "thumbnail"]

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 20, 40
MAX_CLASSES = 15
MAX_POINTS = 1200


def _svg(body: list[str], title: str, description: str) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}. {escape(description)}">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def histogram(
    values: np.ndarray, low: float, high: float, *, title: str, label: str, mark_from: float = 2.0
) -> Markup:
    """Bars of how many values fall into each tenth of a range, on a logarithmic scale.

    Args:
        values: ``[n]``, clipped into the range.
        low: where the range begins.
        high: where it ends.
        title: for those who do not see it.
        label: under the axis.
        mark_from: bars from here on are in the color of suspects.
    """
    edges = np.linspace(low, high, 11)
    counts = np.histogram(np.clip(values, low, high), edges)[0]
    top = max(1.0, math.log10(1 + counts.max()))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    floor = HEIGHT - BOTTOM
    body = []
    for power in range(int(top) + 1):
        y = floor - height * math.log10(1 + 10**power) / top
        if y >= TOP - 1:
            body += [
                _line(LEFT, y, WIDTH - RIGHT, y),
                _text(LEFT - 6, y + 4, f"{10**power:,}", "end"),
            ]
    step = width / 10
    for b, count in enumerate(counts):
        tall = height * math.log10(1 + count) / top
        x = LEFT + b * step
        kind = "bar suspect" if edges[b] >= mark_from - 1e-9 else "bar"
        if count:
            body.append(
                f'<rect x="{x + 1.5:.1f}" y="{floor - tall:.1f}" width="{step - 3:.1f}" '
                f'height="{tall:.1f}" rx="2" class="{kind}"/>'
            )
            body.append(_text(x + step / 2, floor - tall - 4, _short(int(count)), kind="count"))
    body.append(_line(LEFT, floor, WIDTH - RIGHT, floor, "axis"))
    for b in range(0, 11, 2):
        body.append(_text(LEFT + b * step, floor + 15, f"{edges[b]:.3g}"))
    body.append(_text(LEFT + width / 2, HEIGHT - 6, label, kind="label"))
    described = ", ".join(
        f"{edges[b]:.3g} to {edges[b + 1]:.3g}: {count:,}"
        for b, count in enumerate(counts)
        if count
    )
    return _svg(body, title, f"Number of rows by range. {described}")


def _short(count: int) -> str:
    if count < 10_000:
        return f"{count:,}" if count < 1000 else f"{count}"
    return f"{count / 1000:.0f}k" if count < 1_000_000 else f"{count / 1e6:.1f}M"


def scatter(given: np.ndarray, suggested: np.ndarray, suspect: np.ndarray) -> Markup:
    """Given against suggested targets ``[n]``; suspects stand out; at most 1,200 other rows."""
    low, high = np.quantile(np.concatenate([given, suggested]), [0.002, 0.998])
    span = (high - low) or 1.0
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        u, v = (min(1.0, max(0.0, (z - low) / span)) for z in (x, y))
        return LEFT + width * u, TOP + height * (1 - v)

    start, end = place(low, low), place(high, high)
    body = [_line(*start, *end, "axis")]
    plain = np.flatnonzero(~suspect)
    for rows, kind in (
        (plain[:: max(1, len(plain) // MAX_POINTS)], "dot"),
        (np.flatnonzero(suspect)[:MAX_POINTS], "dot suspect"),
    ):
        for i in rows:
            x, y = place(float(given[i]), float(suggested[i]))
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" class="{kind}"/>')
    for tick in np.linspace(low, high, 5):
        x, y = place(float(tick), float(tick))
        body += [
            _text(x, HEIGHT - BOTTOM + 15, f"{tick:.3g}"),
            _text(LEFT - 6, y + 4, f"{tick:.3g}", "end"),
        ]
    body += [
        _line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"),
        _text(LEFT + width / 2, HEIGHT - 6, "value in the table", kind="label"),
        _text(LEFT - 40, 11, "suggested", "start", "label"),
    ]
    return _svg(
        body,
        "Values in the table against suggested values",
        f"{int(suspect.sum()):,} of {len(given):,} rows are suspects and lie far from the diagonal",
    )


def calibration_chart(bins: Sequence[dict[str, float]]) -> Markup:
    """Stated against true share of errors; on the diagonal, probabilities mean what they say."""
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    floor = HEIGHT - BOTTOM
    body = [_line(LEFT, floor, WIDTH - RIGHT, TOP, "axis")]
    for i in range(6):
        share = i / 5
        y = floor - height * share
        body += [
            _line(LEFT, y, WIDTH - RIGHT, y),
            _text(LEFT - 6, y + 4, f"{share:.0%}", "end"),
            _text(LEFT + width * share, floor + 15, f"{share:.0%}"),
        ]
    most = max(item["rows"] for item in bins)
    for item in bins:
        radius = 3 + 7 * math.sqrt(item["rows"] / most)
        x, y = LEFT + width * item["stated"], floor - height * item["true"]
        body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="dot suspect"/>')
    body += [
        _text(LEFT + width / 2, HEIGHT - 6, "stated error probability", kind="label"),
        _text(LEFT - 40, 11, "truly wrong", "start", "label"),
    ]
    described = ", ".join(f"stated {b['stated']:.0%}, true {b['true']:.0%}" for b in bins)
    return _svg(body, "Calibration", described)


def matrix(
    given: np.ndarray, suggested: np.ndarray, classes: Sequence[Any]
) -> dict[str, Any] | None:
    """Count suspects by given and suggested label, for the classes that occur most among them.

    Args:
        given: labels of the suspects ``[s]``.
        suggested: their suggestions ``[s]``.
        classes: all classes ``[C]``.

    Returns:
        ``classes``, ``rows`` of ``(class, cells)`` with ``count`` and ``heat`` in [0, 1], and
        ``left_out``, the number of classes not shown; None where there are no suspects.
    """
    if len(given) == 0:
        return None
    index = {value: i for i, value in enumerate(classes)}
    a = np.array([index[value] for value in given])
    b = np.array([index[value] for value in suggested])
    totals = np.bincount(a, minlength=len(index)) + np.bincount(b, minlength=len(index))
    involved = np.flatnonzero(totals)
    kept = involved
    if len(involved) > MAX_CLASSES:
        kept = np.sort(involved[np.argsort(-totals[involved], kind="stable")[:MAX_CLASSES]])
    counts = np.zeros((len(index), len(index)), dtype=int)
    np.add.at(counts, (a, b), 1)
    counts = counts[np.ix_(kept, kept)]
    most = max(1, counts.max())
    rows = [
        (
            classes[int(kept[i])],
            [{"count": int(c), "heat": round(0.75 * float(c) / most, 3)} for c in counts[i]],
        )
        for i in range(len(kept))
    ]
    return {
        "classes": [classes[int(k)] for k in kept],
        "rows": rows,
        "left_out": len(involved) - len(kept),
    }


def thumbnail(image: np.ndarray, low: float, high: float) -> str:
    """An image ``[h, w]`` or ``[h, w, 3]`` as a PNG data URI, ``low`` black and ``high`` white.

    Example:
        >>> import numpy as np
        >>> thumbnail(np.eye(2), 0.0, 1.0)[:22]
        'data:image/png;base64,'
    """
    scaled = (image.astype(np.float64) - low) * (255.0 / ((high - low) or 1.0))
    pixels = np.clip(np.round(scaled), 0, 255).astype(np.uint8)
    h, w = pixels.shape[:2]
    color = 2 if pixels.ndim == 3 else 0
    lines = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(pixels))
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", w, h, 8, color, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    ):
        checksum = zlib.crc32(kind + data)
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
