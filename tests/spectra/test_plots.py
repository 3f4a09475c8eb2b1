from __future__ import annotations

import sys

import pytest
import torch
from tests.spectra.problems import F64, hidden, semidefinite

from woodbury.spectra import SLQ, Hutchinson, density, diagonal, eigenpairs, trace

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


@pytest.fixture(autouse=True)
def _closed():
    yield
    pyplot.close("all")


def test_everything_plots_itself() -> None:
    A, _ = semidefinite("1/i", 150)
    scalar = trace(A, Hutchinson(20)).plot()
    assert scalar.get_title() == "Hutchinson, 20 products"
    assert "150 eigenvalues" in density(A, SLQ(5, 10)).plot().get_title()
    assert diagonal(A, Hutchinson(20)).plot().get_xlabel() == "entry"
    assert "converged" in eigenpairs(A, 3).plot().get_title()


def test_on_axes_of_the_caller() -> None:
    figure, axes = pyplot.subplots()
    found = density(hidden(torch.linspace(0, 1, 200, dtype=F64))[0], SLQ(5, 10))
    assert found.plot(axes, smoothing=0.05, log=False) is axes
    assert axes.get_yscale() == "linear"
    assert "0.05" in axes.get_xlabel()
    x, y = axes.lines[0].get_data()
    assert torch.trapezoid(torch.as_tensor(y), torch.as_tensor(x)) == pytest.approx(1, abs=1e-2)
    assert len(figure.axes) == 1


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    A, _ = semidefinite("1/i", 150)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "woodbury\[plot\]"'):
        trace(A).plot()
