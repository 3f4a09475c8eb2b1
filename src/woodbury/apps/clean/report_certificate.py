"""The certificate of the inverse that was used, in words."""

from __future__ import annotations

from typing import Any

__all__ = ["certificate_lines"]

# What the numbers of a certificate mean to someone who does not know the library.
WORDS: dict[str, tuple[str, str]] = {}


def certificate_lines(certificate: dict[str, Any]) -> list[dict[str, str]]:
    """Flatten a certificate to lines of name, value and explanation.

    Args:
        certificate: JSON values, possibly nested.

    Returns:
        For each entry ``name``, ``value``, ``meaning`` (may be empty).

    Example:
        >>> certificate_lines({"relative_residual": 1e-9})[0]["value"]
        '1e-09'
    """
    lines = []
    for key, value in _flat(certificate, ""):
        name, meaning = WORDS.get(key, (key.replace("_", " ").replace(".", ": "), ""))
        lines.append({"name": name, "value": _show(value), "meaning": meaning})
    return lines


def _flat(value: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            found += _flat(item, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", item))
    return found


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(_show(item) for item in value[:12]) + (" …" if len(value) > 12 else "")
    return "–" if value is None else str(value)
