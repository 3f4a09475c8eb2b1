"""Griffe extension: this project's docstrings, as the page generator understands them."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(\s*)Example:\s*$", re.M)
ROLE = re.compile(r":\w+:`(?:~[\w.]+\.)?([^`]+)`")


class Docstrings(griffe.Extension):
    """Show ``Example:`` as a session, and links in the style of Sphinx as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = ROLE.sub(r"`\1`", text)
