"""MkDocs hook: formulas become MathML when the pages are built, so they need no script to show."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.S
)


def _mathml(match: re.Match) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    return convert(html.unescape(match["tex"]).strip(), display=display)


def on_page_content(page_html: str, **_: Any) -> str:
    return FORMULA.sub(_mathml, page_html)
