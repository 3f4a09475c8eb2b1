"""The density and the distribution function as inline SVG, colored by the page's theme."""

from __future__ import annotations

import math

import numpy as np
from markupsafe import Markup, escape

__all__ = ["density_chart", "distribution_chart"]

WIDTH, HEIGHT = 760, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 18, 44
# An upper bound of the width of a character of a tick label, in the units of the picture.
_CHARACTER = 7


def density_chart(x: np.ndarray, y: np.ndarray, floor: float) -> Markup:
    """The smoothed density on a logarithmic axis.

    Args:
        x: places ``[k]``.
        y: densities ``[k]``.
        floor: what the axis begins with, positive.
    """
    low, high = math.log10(floor), math.log10(max(float(y.max()), 10 * floor))
    values = np.log10(np.maximum(y, floor))
    body = []
    for power in range(math.ceil(low), math.floor(high) + 1):
        place = _down((power - low) / (high - low))
        body += [_line(LEFT, place, WIDTH - RIGHT, place), _text(LEFT - 8, place + 4, f"1e{power}")]
    ends = float(x[0]), float(x[-1])
    points = _points(x, (values - low) / (high - low), ends)
    bottom = HEIGHT - BOTTOM
    body.append(
        f'<polygon points="{LEFT},{bottom} {points} {WIDTH - RIGHT},{bottom}" class="area"/>'
    )
    body.append(f'<polyline points="{points}" class="curve"/>')
    body += _axis(ends)
    return _svg(
        body, "Spectral density on a logarithmic scale", f"from {ends[0]:.4g} to {ends[1]:.4g}"
    )


def distribution_chart(nodes: np.ndarray, weights: np.ndarray) -> Markup:
    """The share of eigenvalues below a place, as a staircase.

    Args:
        nodes: ``[k]``, ascending.
        weights: ``[k]``, which sum to 1.
    """
    margin = 0.02 * (nodes[-1] - nodes[0]) or 0.02 * abs(nodes[0]) or 1.0
    ends = float(nodes[0] - margin), float(nodes[-1] + margin)
    body = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        place = _down(share)
        body += [
            _line(LEFT, place, WIDTH - RIGHT, place),
            _text(LEFT - 8, place + 4, f"{share:.0%}"),
        ]
    x = np.concatenate([[ends[0]], np.repeat(nodes, 2), [ends[1]]])
    total = np.concatenate([[0.0], np.cumsum(weights)])
    y = np.repeat(total, 2)
    body.append(f'<polyline points="{_points(x, y, ends)}" class="curve"/>')
    body += _axis(ends)
    return _svg(body, "Share of eigenvalues below a value", f"{len(nodes)} nodes")


def _axis(ends: tuple[float, float]) -> list[str]:
    bottom = HEIGHT - BOTTOM
    body = [_line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis")]
    for tick in _ticks(*ends):
        place = LEFT + (WIDTH - LEFT - RIGHT) * (tick - ends[0]) / (ends[1] - ends[0])
        text = f"{tick:.3g}"
        # A label under the right end reaches as far as the picture and no further.
        room = WIDTH - place
        over = _CHARACTER * len(text) / 2 > room
        body.append(
            _text(WIDTH - 2 if over else place, bottom + 17, text, "end" if over else "middle")
        )
    if ends[0] < 0 < ends[1]:
        place = LEFT + (WIDTH - LEFT - RIGHT) * -ends[0] / (ends[1] - ends[0])
        body.append(_line(place, TOP, place, bottom, "zero"))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "eigenvalue", "middle", "label"))
    return body


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [k * step for k in range(first, last + 1)]


def _points(x: np.ndarray, heights: np.ndarray, ends: tuple[float, float]) -> str:
    across = LEFT + (WIDTH - LEFT - RIGHT) * (x - ends[0]) / (ends[1] - ends[0])
    down = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * np.clip(heights, 0, 1)
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True))


def _down(share: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def _svg(body: list[str], title: str, description: str) -> Markup:
    return Markup(
        f'<svg class="chart wide" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}, {escape(description)}">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "end", kind: str = "tick") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'
