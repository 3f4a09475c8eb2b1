"""The report: one HTML file that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from woodbury.apps.pages import write_page
from woodbury.apps.spectrum.charts import density_chart, distribution_chart

if TYPE_CHECKING:
    from woodbury.spectra import SpectralDensity

__all__ = ["write_report"]

TEMPLATE = Path(__file__).parent / "templates" / "spectrum.html.j2"


def write_report(summary: dict[str, Any], found: SpectralDensity, path: Path) -> Path:
    """Write the report of a run, whole or not at all.

    Args:
        summary: what ``summary.json`` holds.
        found: the density.
        path: the HTML file.

    Returns:
        The path.
    """
    return write_page(path, TEMPLATE, _context(summary, found))


def _context(summary: dict[str, Any], found: SpectralDensity) -> dict[str, Any]:
    x, y = found.grid(1024)
    nodes = found.nodes.flatten()
    order = nodes.argsort()
    weights = found.weights.flatten() / len(found.nodes)
    least = 0.1 / (found.n * found.smoothing() * (2 * torch.pi) ** 0.5)
    return {
        "summary": summary,
        "verdict": _verdict(summary),
        "density": density_chart(x.numpy(), y.numpy(), least),
        "distribution": distribution_chart(nodes[order].numpy(), weights[order].numpy()),
        "lines": list(summary["quantities"].values()),
        "how": _how(summary),
        "facts": [(name.replace("_", " "), value) for name, value in summary["source"].items()],
    }


def _verdict(summary: dict[str, Any]) -> str:
    ends, near = summary["outermost"], summary["smoothing"]
    text = f"{summary['size']:,} eigenvalues"
    if summary["exact"]:
        text += f" between {ends[0]:.4g} and {ends[1]:.4g}"
    else:
        text += f", the smallest at most {ends[0]:.4g} and the largest at least {ends[1]:.4g}"
    low, high = (
        summary["quantities"][name]["value"] / summary["size"] for name in ("negative", "positive")
    )
    return (
        f"{text}: {'' if summary['exact'] else 'about '}{low:.0%} of them up to {-near:.3g}, "
        f"{high:.0%} above {near:.3g}, and the rest within 1 % of the range of zero."
    )


def _how(summary: dict[str, Any]) -> str:
    method = summary["method"]
    if summary["exact"]:
        return (
            f"The matrix is small: it was formed with {summary['products']:,} products, and all of "
            "its eigenvalues were computed."
        )
    ends, outer = summary["outermost"], summary["support"]
    return (
        f"Stochastic Lanczos quadrature: {method['steps']} steps from each of {method['probes']} "
        f"random vectors, seed {summary['seed']}, reorthogonalisation: "
        f"{method['reorthogonalize']}. The outermost Ritz values, {ends[0]:.6g} and {ends[1]:.6g}, "
        "lie inside the spectrum up to rounding; moved outwards by their error bounds they are "
        f"{outer[0]:.6g} and {outer[1]:.6g}, often too far. Intervals come from the spread over "
        "the random vectors, and from the quadrature."
    )
