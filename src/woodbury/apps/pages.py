"""Pages of reports: HTML files that open offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from woodbury._files import atomic

__all__ = ["write_page"]

_STYLE = Path(__file__).parent / "report.css"


def write_page(path: Path, template: Path, values: dict[str, Any]) -> Path:
    """Fill in a template and write the page, whole or not at all.

    Values are escaped, a name that the template has and ``values`` lacks is an error, and the
    style that all reports share is ``style``.

    Args:
        path: the HTML file.
        template: of jinja2.
        values: by name.

    Returns:
        The path.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    style = Markup(_STYLE.read_text(encoding="utf-8"))
    page = environment.get_template(template.name).render(values, style=style)
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
