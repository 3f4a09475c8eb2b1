"""``woodbury spectrum`` as users meet it: what it writes, and every kind of bad input."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from click.testing import Result
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from woodbury import Hessian, Objective
from woodbury.apps.spectrum import spectrum
from woodbury.apps.spectrum.charts import density_chart
from woodbury.cli.app import app
from woodbury.errors import DataError

MODULE = """
import torch
from torch import nn

def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

def single():
    return nn.Linear(6, 1).double()

def fails():
    raise ValueError("no such luck")

def number():
    return 3

def frozen():
    return make_model().requires_grad_(False)

text = "not a function"
"""


def command(*words: object) -> Result:
    return CliRunner().invoke(app, ["spectrum", *(str(word) for word in words)])


def refused(result: Result, *words: str) -> None:
    """The user's mistake: exit code 2, one line with the words, no traceback."""
    assert result.exit_code == 2, (result.output, result.exception)
    line = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(line) == 1
    for word in words:
        assert word in line[0]
    assert "Traceback" not in result.output


def stiffness(n: int = 60) -> Any:
    return scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module, weights, data and matrices, and the command run in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(MODULE)
    generator = np.random.default_rng(0)
    X = generator.standard_normal((50, 6))
    np.savez(tmp_path / "data.npz", X=X, y=(X[:, :3]).argmax(1))
    np.savez(tmp_path / "values.npz", X=X, y=X[:, :1])
    scipy.io.mmwrite(tmp_path / "line.mtx", stiffness())
    sys.modules.pop("nets", None)
    yield tmp_path
    sys.modules.pop("nets", None)


def test_a_matrix(folder: Path) -> None:
    result = command("line.mtx", "--out", folder / "out")
    assert result.exit_code == 0, result.output
    assert "60 eigenvalues of line, from 0.00265" in result.stdout
    assert f"Report: {folder / 'out' / 'spectrum.html'}" in result.stdout
    assert "reading ..." in result.stderr
    assert "multiplying ..." in result.stderr
    summary = json.loads((folder / "out" / "summary.json").read_text())
    exact = np.linalg.eigvalsh(stiffness().toarray())
    assert summary["exact"]
    assert summary["products"] == summary["size"] == 60
    assert np.allclose(summary["nodes"][0], exact)
    assert summary["quantities"]["trace"]["value"] == pytest.approx(120)
    assert summary["quantities"]["negative"]["value"] == 0
    assert summary["quantities"]["positive"]["value"] == (exact > summary["smoothing"]).sum()
    page = (folder / "out" / "spectrum.html").read_text()
    assert "60 eigenvalues between 0.002652 and 3.997: 0% of them up to -0.0399, 95% above" in page
    assert page.count("<svg") == 2
    assert not re.search(r'(src|href)\s*=\s*"?(https?:)?//', page)  # it loads nothing


def test_labels_of_the_axis_stay_inside_the_picture() -> None:
    x = np.linspace(-3.24e12, 1.6000001e12, 64)
    picture = str(density_chart(x, np.exp(-((x / 1e12) ** 2)), 1e-3))
    labels = re.findall(r'<text x="([\d.]+)" y="293.0" text-anchor="(\w+)"[^>]*>([^<]*)<', picture)
    assert len(labels) >= 4
    for place, anchor, text in labels:
        right = float(place) + (7 * len(text) / 2 if anchor == "middle" else 0)
        assert right <= 760, text


def test_a_large_compressed_matrix_is_estimated(folder: Path) -> None:
    with gzip.open(folder / "large.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, stiffness(900))
    words = ("large.mtx.gz", "--probes", 6, "--steps", 40, "--seed", 3, "--out")
    assert command(*words, folder / "a").exit_code == 0
    assert command(*words, folder / "b").exit_code == 0
    summaries = [json.loads((folder / name / "summary.json").read_text()) for name in "ab"]
    for summary in summaries:
        summary.pop("seconds")
    assert summaries[0] == summaries[1]  # the same seed, the same answer
    found = summaries[0]
    assert (found["products"], found["exact"], found["seed"]) == (240, False, 3)
    exact = np.linalg.eigvalsh(stiffness(900).toarray())
    low, high = found["outermost"]
    assert exact[0] - 1e-12 <= low < 0.1
    assert 3.9 < high <= exact[-1] + 1e-12
    ends = f"the smallest at most {low:.4g} and the largest at least {high:.4g}: about"
    page = (folder / "a" / "spectrum.html").read_text()
    assert f"900 eigenvalues, {ends}" in page
    assert f"<b>≤ {low:.4g}</b><span>smallest" in page
    trace = found["quantities"]["trace"]
    assert trace["low"] < 1800 < trace["high"]
    assert trace["high"] - trace["low"] < 200
    page = (folder / "a" / "spectrum.html").read_text()
    assert "40 steps from each of 6 random vectors, seed 3" in page


def test_a_figure(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for kind, start in starts.items():
        result = command("line.mtx", "--out", "out", "--figure", f"pictures/line.{kind}")
        assert result.exit_code == 0, result.output
        assert (folder / "pictures" / f"line.{kind}").read_bytes().startswith(start)
    refused(command("line.mtx", "--figure", "line.gif"), "--figure is line.gif", ".png")


def test_default_folder(folder: Path) -> None:
    assert command("line.mtx").exit_code == 0
    assert (folder / "woodbury-spectrum" / "line" / "spectrum.html").exists()


def test_gram_and_symmetric_part(folder: Path) -> None:
    M = np.random.default_rng(1).standard_normal((7, 5))
    scipy.io.mmwrite(folder / "tall.mtx", M)
    assert command("tall.mtx", "--gram", "--out", "out").exit_code == 0
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert np.allclose(summary["nodes"][0][::-1], np.linalg.svd(M)[1] ** 2)
    scipy.io.mmwrite(folder / "square.mtx", M[:5])
    assert command("square.mtx", "--symmetric-part", "--out", "out").exit_code == 0
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert np.allclose(summary["nodes"][0], np.linalg.eigvalsh((M[:5] + M[:5].T) / 2))
    C = scipy.sparse.csr_array(M[:5] + M[:5].T + 1j * (M[:5] - M[:5].T))
    scipy.io.mmwrite(folder / "complex.mtx", C)
    assert command("complex.mtx", "--out", "out").exit_code == 0
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert np.allclose(summary["nodes"][0], np.linalg.eigvalsh(C.toarray()))


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton", "fisher"])
def test_a_model(folder: Path, kind: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    save_file(model.state_dict(), folder / "w.safetensors")
    words = ("--model", "nets:make_model", "--weights", "w.safetensors", "--data", "data.npz")
    result = command(*words, "--matrix", kind, "--l2", 0.01, "--out", "out")
    assert result.exit_code == 0, result.output
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["source"]["parameters"] == 83
    assert summary["source"]["matrix"] == kind
    if kind == "hessian":
        with np.load(folder / "data.npz") as stored:
            data = torch.from_numpy(stored["X"]), torch.from_numpy(stored["y"])
        H = Hessian(Objective(model, "cross_entropy", data, l2=0.01)).to_dense()
        assert np.allclose(summary["nodes"][0], torch.linalg.eigvalsh(H).numpy(), atol=1e-8)
    else:
        assert summary["support"][0] >= 0.01 - 1e-9


def test_other_criteria_and_precisions(folder: Path) -> None:
    words = ("--model", "nets:single", "--data", "values.npz", "--out", "out")
    assert command(*words, "--criterion", "mse").exit_code == 0
    result = command(*words, "--criterion", "mse", "--dtype", "float32")
    assert result.exit_code == 0
    said = " ".join(result.stdout.split())
    assert "Note: No --weights were given" in said
    assert "Note: Products were in single precision" in said
    np.savez(folder / "bits.npz", X=np.ones((4, 6)), y=np.ones((4, 1)))
    words = ("--model", "nets:single", "--data", "bits.npz", "--out", "out")
    assert command(*words, "--criterion", "bce").exit_code == 0


def test_a_budget_below_the_basis_gives_up_orthogonality(folder: Path) -> None:
    n = 40_000
    scipy.io.mmwrite(folder / "wide.mtx", scipy.sparse.eye_array(n).tocsr() * 2.0)
    result = spectrum(folder / "wide.mtx", steps=400, budget="64MiB")
    assert result.summary["method"]["reorthogonalize"] == "none"
    assert any("not reorthogonalised" in note for note in result.summary["notes"])
    assert result.density.support == pytest.approx((2.0, 2.0))


def write(name: str, text: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_text(text)
        return name

    return make


HEADER = "%%MatrixMarket matrix coordinate real general\n"
BAD_MATRICES: dict[str, tuple[Callable[[Path], str], list[str]]] = {
    "missing": (lambda _: "no.mtx", ["There is no file no.mtx"]),
    "other format": (write("a.csv", "1,2"), ["a.csv is not a Matrix Market file", ".mtx.gz"]),
    "folder": (lambda folder: str(folder), ["is not a Matrix Market file"]),
    "broken": (write("b.mtx", "hello"), ["b.mtx cannot be read as Matrix Market"]),
    "cut": (write("c.mtx", HEADER + "3 3 5\n1 1 2.0\n"), ["c.mtx cannot be read"]),
    "not gzip": (write("d.mtx.gz", "plain"), ["d.mtx.gz cannot be read"]),
    "NaN": (
        write("e.mtx", HEADER + "3 3 2\n1 1 1.0\n2 3 nan\n"),
        ["holds nan in row 2, column 3", "Correct the file"],
    ),
    "not symmetric": (
        write("f.mtx", HEADER + "3 3 2\n1 1 1.0\n1 3 2.5\n"),
        ["not symmetric: entry (1, 3) is 2.5 and (3, 1) is 0", "--gram", "--symmetric-part"],
    ),
    "rectangular": (
        write("g.mtx", HEADER + "3 4 1\n1 1 1.0\n"),
        ["3 by 4 and has no eigenvalues", "--gram"],
    ),
}


@pytest.mark.parametrize("what", BAD_MATRICES)
def test_bad_matrices(what: str, folder: Path) -> None:
    make, words = BAD_MATRICES[what]
    refused(command(make(folder), "--out", "out"), *words)
    assert not list((folder / "out").glob("*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), ["Give a matrix", "--model module:factory"]),
        (("line.mtx", "--model", "nets:make_model"), ["Give a matrix"]),
        (("line.mtx", "--data", "data.npz"), ["--data belongs to --model"]),
        (("line.mtx", "--gram", "--symmetric-part"), ["one of --gram and --symmetric-part"]),
        (("line.mtx", "--probes", 1), ["--probes must be at least 2, not 1"]),
        (("line.mtx", "--steps", 0), ["--steps must be at least 1, not 0"]),
        (("line.mtx", "--seed", -1), ["seed must be a whole number"]),
        (("line.mtx", "--budget", "much"), ["'much' is not an amount of memory"]),
        (("line.mtx", "--budget", "1MiB"), ["too small"]),
        (("line.mtx", "--out", "nets.py/out"), ["cannot be written", "--out"]),
        (("--model", "nets:make_model"), ["needs --data FILE.npz"]),
        (("--model", "net.pt2", "--data", "data.npz"), ["can hold code", "safetensors"]),
        (("--model", "nets", "--data", "data.npz"), ["module:factory"]),
        (("--model", "absent:f", "--data", "data.npz"), ["no module 'absent'"]),
        (("--model", "nets:f", "--data", "data.npz"), ["has no 'f'", "make_model"]),
        (("--model", "nets:text", "--data", "data.npz"), ["not a function, but a str"]),
        (("--model", "nets:fails", "--data", "data.npz"), ["ValueError: no such luck"]),
        (("--model", "nets:number", "--data", "data.npz"), ["returned a int", "nn.Module"]),
        (("--model", "nets:frozen", "--data", "data.npz"), ["no parameters that require"]),
        (("--model", "nets:make_model", "--data", "no.npz"), ["There is no file no.npz"]),
        (("--model", "nets:make_model", "--data", "nets.py"), ["cannot be read as NPZ"]),
        (
            ("--model", "nets:make_model", "--data", "data.npz", "--criterion", "hinge"),
            ["--criterion must be one of cross_entropy, mse, bce, not 'hinge'"],
        ),
        (
            ("--model", "nets:make_model", "--data", "data.npz", "--matrix", "inverse"),
            ["--matrix must be one of hessian"],
        ),
        (
            ("--model", "nets:make_model", "--data", "data.npz", "--dtype", "int8"),
            ["--dtype must be one of"],
        ),
        (("--model", "nets:make_model", "--data", "data.npz", "--l2", -1), ["--l2 must be 0"]),
        (("--model", "nets:make_model", "--data", "data.npz", "--gram"), ["are for matrices"]),
        (
            ("--model", "nets:make_model", "--data", "data.npz", "--criterion", "mse"),
            ["returns ['rows', 3], y of data.npz is ['rows']", "Reshape y"],
        ),
        (
            ("--model", "nets:single", "--data", "data.npz"),
            ["classes 0 to 2, the network scores for 0 to 0"],
        ),
        (
            ("--model", "nets:make_model", "--data", "values.npz"),
            ["cross_entropy needs class numbers", "--criterion mse"],
        ),
    ],
)
def test_mistakes(words: tuple[object, ...], said: list[str], folder: Path) -> None:
    refused(command(*words), *said)


def arrays(**stored: np.ndarray) -> dict[str, np.ndarray]:
    X = np.ones((5, 6))
    return {"X": X, "y": np.zeros(5, int), **stored}


BAD_DATA: dict[str, tuple[dict[str, np.ndarray], list[str]]] = {
    "no y": ({"X": np.ones((5, 6))}, ["has no array y; it has X"]),
    "neither": ({"a": np.ones(3)}, ["has no array X and y; it has a"]),
    "objects": (arrays(X=np.array([{}, []], dtype=object)), ["without running code"]),
    "words": (arrays(y=np.array(["a"] * 5)), ["y of bad.npz is <U1; it must hold numbers"]),
    "empty": ({"X": np.ones((0, 6)), "y": np.zeros(0, int)}, ["X of bad.npz is empty"]),
    "NaN": (arrays(X=np.full((5, 6), np.nan)), ["NaN or infinity, first at (0, 0)"]),
    "lengths": (arrays(y=np.zeros(4, int)), ["has 5 rows and y has 4"]),
    "shape": (arrays(X=np.ones((5, 7))), ["The network does not take X of bad.npz ([5, 7]"]),
    "classes": (arrays(y=np.full(5, 3)), ["classes 3 to 3, the network scores for 0 to 2"]),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data(what: str, folder: Path) -> None:
    stored, words = BAD_DATA[what]
    np.savez(folder / "bad.npz", **stored)
    refused(command("--model", "nets:make_model", "--data", "bad.npz"), *words)


def test_bad_weights(folder: Path) -> None:
    good = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double().state_dict()
    call = ("--model", "nets:make_model", "--data", "data.npz", "--weights")
    refused(command(*call, "no.safetensors"), "There is no file no.safetensors")
    refused(command(*call, "nets.py"), "not a safetensors file", "save_file")
    (folder / "junk.safetensors").write_bytes(b"junk")
    refused(command(*call, "junk.safetensors"), "cannot be read as safetensors")
    bad: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "missing": ({k: v for k, v in good.items() if k != "0.bias"}, "missing [0.bias]"),
        "unknown": ({**good, "9.bias": torch.ones(2)}, "unknown [9.bias]"),
        "shape": ({**good, "0.bias": torch.ones(9)}, "0.bias has shape [9], the network needs [8]"),
        "nan": ({**good, "0.bias": good["0.bias"] * torch.nan}, "NaN or infinity in 0.bias"),
    }
    for name, (state, words) in bad.items():
        save_file(state, folder / f"{name}.safetensors")
        refused(command(*call, f"{name}.safetensors"), words)


def test_module_that_needs_another(folder: Path) -> None:
    (folder / "needy.py").write_text("import not_installed_anywhere\n")
    result = command("--model", "needy:f", "--data", "data.npz")
    refused(result, "needy needs the module 'not_installed_anywhere'")
    (folder / "broken_module.py").write_text("1 / 0\n")
    result = command("--model", "broken_module:f", "--data", "data.npz")
    refused(result, "Importing broken_module failed with ZeroDivisionError")


def test_interruption_and_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: BaseException) -> Callable[..., None]:
        def run(*_: Any, **__: Any) -> None:
            raise error

        return run

    monkeypatch.setattr("woodbury.apps.spectrum.job.density", fail(KeyboardInterrupt()))
    result = command("line.mtx")
    assert result.exit_code == 130
    assert "Stopped: Nothing was written." in result.stderr
    monkeypatch.setattr("woodbury.apps.spectrum.job.density", fail(MemoryError("8 GiB")))
    result = command("line.mtx")
    assert result.exit_code == 1
    assert "Out of memory: MemoryError: 8 GiB" in result.stderr
    assert "Traceback" not in result.output
    error = OSError("disk")
    monkeypatch.setattr("woodbury.apps.spectrum.job.density", fail(error))
    monkeypatch.setenv("WOODBURY_DEBUG", "1")
    assert command("line.mtx").exception is error


def test_from_python(folder: Path) -> None:
    result = spectrum("line.mtx")
    assert result.folder is None
    assert result.density.n == 60
    with pytest.raises(DataError, match="no file"):
        spectrum("nothing.mtx")
