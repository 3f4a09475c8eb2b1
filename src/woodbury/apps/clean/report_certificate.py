"""What a run measured about itself, in words: the inverse, the model, and the errors it learned."""

from __future__ import annotations

from typing import Any

__all__ = ["certificate_groups"]

INVERSE, FIT = "Certificate of the inverse", "The model"

# Name and meaning of what engines report, for someone who does not know the library.
WORDS: dict[str, tuple[str, str, str]] = {
    "method": (INVERSE, "method", ""),
    "size": (INVERSE, "size", "unknowns of the matrix that was inverted"),
    "rank": (INVERSE, "rank", "directions the approximation keeps"),
    "relative_residual": (
        INVERSE,
        "relative residual",
        "how far the inverse is off, measured by multiplying back; 0 is exact, and below 0.001 "
        "it changes no ranking",
    ),
    "effective_dimension": (
        INVERSE,
        "effective dimension",
        "how many independent directions the fit really uses, out of its size",
    ),
    "solve_status": (INVERSE, "solve", "how the last system of equations ended"),
    "solve_products": (INVERSE, "products", "multiplications by the matrix in the last solve"),
    "status": (INVERSE, "solve", "how the last system of equations ended"),
    "stationarity": (
        INVERSE,
        "stationarity",
        "slope of the loss where the fit stopped, relative to where it began; 0 is exact",
    ),
    "suboptimality": (INVERSE, "suboptimality", "how far the loss is from its optimum"),
    "suboptimality_per_row": (
        INVERSE,
        "suboptimality",
        "how far the fit is from its optimum, in units of the loss of one row",
    ),
    "largest_leverage": (
        INVERSE,
        "largest leverage",
        "how much the most influential row decides its own prediction",
    ),
    "unstable_rows": (INVERSE, "unstable rows", "rows too influential to be left out by a formula"),
    "features_kept_in_memory": (
        INVERSE,
        "kept in memory",
        "no: it was computed again in every pass, to stay within the budget",
    ),
    "model": (FIT, "model", "the one with the best predictions of held-out rows"),
    "held_out_score_by_model": (
        FIT,
        "held-out loss",
        "of each model that was tried; less is better",
    ),
    "rounds": (FIT, "rounds", "of fitting and re-weighting"),
    "settled": (FIT, "settled", "whether another round would have changed next to nothing"),
    "columns": (FIT, "columns", "numbers that describe a row"),
    "components": (FIT, "components", "directions the columns were condensed to"),
    "penalty": (FIT, "penalty", "holds the fit back from following single rows; tuned"),
    "lengthscale": (FIT, "length scale", "how far similarity between rows reaches; tuned"),
    "noise.logit_scale": (FIT, "scale of confidence", "makes the probabilities honest; fitted"),
    "noise.confusion": (
        FIT,
        "confusion between classes",
        "mixing: the model confuses some classes, and is corrected for it",
    ),
    "noise.changes": (
        FIT,
        "how labels were changed",
        "uniform: to any other class alike; by class: each class to others in its own way",
    ),
    "noise.residual_deviation": (
        FIT,
        "usual deviation",
        "of right values from their predictions, relative to the spread of all values",
    ),
    "noise.wrong_share": (FIT, "share of wrong values", "fitted to the deviations"),
    "noise.degrees_of_freedom": (
        FIT,
        "tails of right values",
        "degrees of freedom of their distribution: 2.5 has frequent large deviations, 30 few",
    ),
    "rows_in_training": (FIT, "rows in training", "a sample; the others were predicted by it"),
}
METHODS = {
    "exact Cholesky": "the whole matrix was factorized: exact up to rounding",
    "Nystrom": "the matrix was approximated from a sample of the rows and never formed whole",
    "block leverage": "each row is left out by one Newton step, all classes together",
    "class-wise leverage": "each row is left out by one Newton step, class by class",
    "leverage": "closed form: exact up to rounding",
    "Gauss-Newton leave-one-out, Cholesky": "each row is left out by one Gauss-Newton step",
}
# Shown elsewhere in the report, or said by others already; all of it is in summary.json.
HIDDEN = {
    "noise.labels_kept_by_class",
    "calls",
    "failed_columns",
    "failures",
    "meaning",
    "ok",
    "recipe",
    "residual",
    "steps",
}


def certificate_groups(certificate: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Sort a certificate into groups of lines.

    Args:
        certificate: JSON values, possibly nested.

    Returns:
        For each group that is not empty its lines, each with ``name``, ``value`` and ``meaning``
        (which may be empty). What is not known here stands under the inverse, under its own name.

    Example:
        >>> groups = certificate_groups({"relative_residual": 1e-9})
        >>> groups["Certificate of the inverse"][0]["value"]
        '1e-09'
    """
    groups: dict[str, list[dict[str, str]]] = {INVERSE: [], FIT: []}
    flat = _flat(certificate, "")
    for key in sorted(flat, key=lambda name: list(WORDS).index(name) if name in WORDS else 99):
        if key in HIDDEN:
            continue
        plain = key.replace("_", " ").replace(".", ": ")
        group, name, meaning = WORDS.get(key, (INVERSE, plain, ""))
        value = flat[key]
        if key == "method":
            meaning = METHODS.get(str(value), "")
        groups[group].append({"name": name, "value": _show(value), "meaning": meaning})
    return {group: lines for group, lines in groups.items() if lines}


def _flat(value: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict) and name not in WORDS:
            found |= _flat(item, f"{name}.")
        else:
            found[name] = item
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
    if isinstance(value, dict):
        return ", ".join(f"{name} {_show(item)}" for name, item in value.items())
    text = "–" if value is None else str(value)
    return text.replace("_", " ").lower() if text.isupper() else text
