"""The job behind ``woodbury spectrum``."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from woodbury import __version__
from woodbury._files import atomic
from woodbury.apps.files import writable_folder, write_json
from woodbury.apps.progress import Display
from woodbury.apps.settings import check_seed, parse_bytes
from woodbury.apps.spectrum.matrix import Source, read_matrix
from woodbury.apps.spectrum.model import read_model
from woodbury.apps.spectrum.report import write_report
from woodbury.errors import BudgetError, DataError
from woodbury.operators.base import LinearOperator
from woodbury.spectra import SLQ, Estimate, SpectralDensity, density

__all__ = ["SpectrumResult", "spectrum"]


@dataclass(frozen=True, eq=False)
class SpectrumResult:
    """What a run found.

    Attributes:
        density: nodes and weights, with everything that can be asked of them.
        summary: what ``summary.json`` holds: JSON values.
        folder: where the files are; ``None`` where nothing was written.

    Example:
        >>> import scipy.io, scipy.sparse
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from woodbury.apps.spectrum import spectrum
        >>> line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(50, 50))
        >>> with TemporaryDirectory() as folder:
        ...     scipy.io.mmwrite(Path(folder) / "line.mtx", line)
        ...     result = spectrum(Path(folder) / "line.mtx")
        >>> round(result.density.support[1], 6), result.folder is None
        (3.996207, True)
    """

    density: SpectralDensity
    summary: dict[str, Any]
    folder: Path | None


def spectrum(
    matrix: str | Path | None = None,
    *,
    model: str | None = None,
    weights: str | Path | None = None,
    data: str | Path | None = None,
    criterion: str = "cross_entropy",
    kind: str = "hessian",
    l2: float = 0.0,
    dtype: str = "auto",
    gram: bool = False,
    symmetric_part: bool = False,
    probes: int = 10,
    steps: int = 80,
    seed: int = 0,
    budget: str | int = "2GiB",
    figure: str | Path | None = None,
    out: str | Path | None = None,
    progress: bool = False,
) -> SpectrumResult:
    """Draw the spectral density of a Matrix Market file, or of the curvature of a model.

    Args:
        matrix: a file ``.mtx`` or ``.mtx.gz``; this or ``model``.
        model: ``module:factory``; the module is imported, so name only your own.
        weights: of the model, safetensors.
        data: of the model, NPZ with arrays ``X`` and ``y``.
        criterion: ``"cross_entropy"``, ``"mse"`` or ``"bce"`` (with logits).
        kind: ``"hessian"``, ``"gauss-newton"`` or ``"fisher"``.
        l2: of the regulariser.
        dtype: ``"auto"`` (that of the model), ``"float32"`` or ``"float64"``.
        gram: take the spectrum of $A^H A$ of a matrix.
        symmetric_part: take that of $(A + A^H) / 2$.
        probes: random vectors, at least 2.
        steps: Lanczos steps from each.
        seed: of the random vectors.
        budget: memory for Lanczos vectors and for what a curvature operator keeps.
        figure: file for a picture of the density, ``.png``, ``.svg`` or ``.pdf``; needs matplotlib.
        out: folder for ``spectrum.html`` and ``summary.json``; nothing is written if not given.
        progress: whether to show it.

    Returns:
        A :class:`SpectrumResult`.

    Raises:
        DataError: something about the input is wrong; the message says what to do.
        BudgetError: the budget does not hold the few vectors needed.

    Cost: ``probes * steps`` products; ``n`` where that is less and ``n`` at most 2,000.

    Example:
        >>> from woodbury.apps.spectrum import spectrum
        >>> spectrum("nothing.mtx")
        Traceback (most recent call last):
            ...
        woodbury.errors.DataError: There is no file nothing.mtx.
    """
    started = time.perf_counter()
    if (matrix is None) == (model is None):
        raise DataError(
            "Give a matrix, as in 'woodbury spectrum FILE.mtx', or '--model module:factory'."
        )
    check_seed(seed)
    for name, value, least in (("probes", probes, 2), ("steps", steps, 1)):
        if value < least:
            raise DataError(f"--{name} must be at least {least}, not {value}.")
    memory = parse_bytes(budget)
    picture = None if figure is None else _drawable(Path(figure))
    folder = None if out is None else writable_folder(Path(out))
    with Display(quiet=not progress) as display:
        display("reading", 0.0)
        if matrix is not None:
            _only_for_models(weights=weights, data=data)
            source = read_matrix(Path(matrix), gram=gram, symmetric_part=symmetric_part)
        else:
            assert model is not None  # one of the two is given
            if gram or symmetric_part:
                raise DataError("--gram and --symmetric-part are for matrices in files.")
            source = read_model(
                model,
                weights=None if weights is None else Path(weights),
                data=None if data is None else Path(data),
                criterion=criterion,
                matrix=kind,
                l2=l2,
                dtype=dtype,
                cache=memory // 2,
            )
        method, notes = _method(source.operator, probes, steps, memory // 2)
        generator = torch.Generator(source.operator.device).manual_seed(seed)
        found = density(
            source.operator,
            method,
            generator=generator,
            progress=lambda done, total: display("multiplying", done / total),
        )
        display("writing", 0.0)
        summary = _summary(source, found, seed, [*source.notes, *notes])
        summary["seconds"] = round(time.perf_counter() - started, 3)
        if folder is not None:
            write_json(summary, folder / "summary.json")
            write_report(summary, found, folder / "spectrum.html")
        if picture is not None:
            _draw(found, source.name, picture)
        display("writing", 1.0)
    return SpectrumResult(found, summary, folder)


def _only_for_models(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise DataError(f"--{name} belongs to --model, and a matrix was given.")


def _drawable(path: Path) -> Path:
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise DataError(f"--figure is {path.name}; give a name that ends in .png, .svg or .pdf.")
    if find_spec("matplotlib") is None:
        raise DataError('--figure needs matplotlib. Install it with: pip install "woodbury[plot]"')
    writable_folder(path.parent)
    return path


def _draw(found: SpectralDensity, name: str, path: Path) -> None:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 4.5), layout="constrained")
    found.plot(drawing.subplots()).set_title(name)
    with atomic(path) as temporary:
        drawing.savefig(temporary, dpi=150)


def _method(A: LinearOperator, probes: int, steps: int, memory: int) -> tuple[SLQ, list[str]]:
    """As many probes at a time as fit, without reorthogonalisation where one does not."""
    vector = A.shape[0] * max(4, A.dtype.itemsize)
    chunk = memory // (vector * (min(steps, A.shape[0]) + 3))
    if chunk >= 1:
        return SLQ(probes, steps, chunk=min(chunk, probes)), []
    chunk = memory // (4 * vector)
    if chunk < 1:
        raise BudgetError(
            f"Four vectors of {A.shape[0]:,} numbers do not fit into half of the budget. Raise "
            f"--budget above {8 * vector / 2**20:,.0f} MiB."
        )
    note = (
        f"{steps} vectors do not fit into half of the budget, so the Lanczos vectors were not "
        "reorthogonalised: an eigenvalue may show as several nodes, which share its weight."
    )
    return SLQ(probes, steps, "none", chunk=min(chunk, probes)), [note]


def _summary(source: Source, found: SpectralDensity, seed: int, notes: list[str]) -> dict[str, Any]:
    n, method = found.n, found.method
    x, y = found.grid(1024)
    # Next to zero signs are rounding and noise of the quadrature: what stands out is counted.
    near = found.smoothing()
    below = found.below(near)
    above = replace(below, value=n - below.value, skewness=None)
    if torch.finfo(source.operator.dtype).eps > 1e-10:
        notes.append(
            "Products were in single precision: eigenvalues below about 1e-6 of the largest are "
            "rounding. For models, --dtype float64 helps."
        )
    return {
        "name": source.name,
        "source": source.facts,
        "size": n,
        # Nodes are eigenvalues or Ritz values, which lie between the ends of the spectrum.
        "outermost": [float(found.nodes.min()), float(found.nodes.max())],
        "support": list(found.support),
        "exact": found.run is None,
        "products": found.products,
        "seed": seed,
        "method": {
            "probes": method.probes,
            "steps": method.steps,
            "reorthogonalize": method.reorthogonalize,
        },
        "smoothing": found.smoothing(),
        "quantities": {
            "trace": _line("trace", found.moment(1), n),
            "squares": _line("sum of squares of the eigenvalues", found.moment(2), n),
            "mean": _line("mean eigenvalue", found.moment(1)),
            "negative": _line(f"eigenvalues up to {-near:.3g}", found.below(-near), 1, (0, n)),
            "positive": _line(f"eigenvalues above {near:.3g}", above, 1, (0, n)),
        },
        "grid": {"eigenvalue": x.tolist(), "density": y.tolist()},
        "nodes": found.nodes.tolist(),
        "weights": found.weights.tolist(),
        "notes": notes,
        "version": __version__,
    }


def _line(
    name: str,
    estimate: Estimate,
    scale: int = 1,
    ends: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, Any]:
    low, high = (float(end) * scale for end in estimate.interval(0.95))
    return {
        "name": name,
        "value": float(estimate.value) * scale,
        "low": max(low, ends[0]),
        "high": min(high, ends[1]),
        "standard_error": float(estimate.standard_error) * scale,
        "bias": float(estimate.bias) * scale,
        "exact": estimate.samples is None,
    }
