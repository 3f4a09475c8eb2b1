"""Parts of a fit, made by processes that share files only: merged they are the fit of one."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tests.curvature.test_drawn_labels import CASES, case, cut
from tests.curvature.test_kfac import Kill, KilledError
from torch import nn

from woodbury import EKFAC, KFAC, Objective
from woodbury.curvature import PartitionedFit
from woodbury.errors import ArgumentError, DataError

F64 = torch.float64


def merged(fit: PartitionedFit):
    for part in range(fit.parts):
        fit.fit_factors(part)
    fit.aggregate_factors()
    if fit.method.corrected:
        for part in range(fit.parts):
            fit.fit_corrections(part)
        fit.aggregate_corrections()
    return fit.matrix()


def gap(mine, wanted) -> float:
    mine, wanted = mine.to_dense(), wanted.to_dense()
    return float((mine - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("parts", [1, 3, 11])
@pytest.mark.parametrize("method", [KFAC, EKFAC])
@pytest.mark.parametrize("name", CASES)
def test_the_merged_fit_is_that_of_one_process(tmp_path, name, method, parts):
    make, (x, y) = case(name)
    objective = make(cut(x, y, 3))  # eight batches, so that of eleven parts three have none
    fit = PartitionedFit(objective, tmp_path, parts, method)
    mine = merged(fit)
    assert type(mine) is method
    assert gap(mine, method(objective)) <= 1e-12
    read = method(objective, checkpoint=tmp_path / "merged")
    assert torch.equal(read.to_dense(), mine.to_dense())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_settings_are_those_of_the_method(tmp_path, kind):
    make, (x, y) = case("tokens")
    options = {"sharing": "reduce", "side_limit": 5, "block_limit": 3, "dense": "head.weight"}
    fit = PartitionedFit(make(cut(x, y, 5)), tmp_path / "new", 2, kind=kind, **options)
    assert gap(merged(fit), EKFAC(make((x, y)), kind, **options)) <= 1e-12


def test_seeds_and_samples(tmp_path):
    make, (x, y) = case("classes")
    fits = [PartitionedFit(make(cut(x, y, 5)), tmp_path / str(s), 2, seed=s) for s in (0, 5)]
    first, second = (merged(fit) for fit in fits)
    assert gap(second, first) > 0.01
    generator = torch.Generator().manual_seed(5)
    assert gap(second, EKFAC(make((x, y)), generator=generator)) <= 1e-12
    many = merged(PartitionedFit(make(cut(x, y, 5)), tmp_path / "many", 3, samples=3))
    assert gap(many, EKFAC(make((x, y)), samples=3)) <= 1e-12


def test_half_precision_is_fitted_in_float32(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(8, 3).bfloat16(), torch.randint(2, (8,))
    objective = Objective(nn.Linear(3, 2).bfloat16(), "cross_entropy", cut(x, y, 2))
    mine = merged(PartitionedFit(objective, tmp_path, 2))
    assert mine.dtype == torch.float32
    assert "float32" in mine.note
    assert gap(mine, EKFAC(objective)) < 1e-5


SCRIPT = """
import sys, torch
from tests.curvature.test_drawn_labels import case, cut
from woodbury.curvature import PartitionedFit
torch.manual_seed(int(sys.argv[2]))  # no matter
make, (x, y) = case("regression")
fit = PartitionedFit(make(cut(x, y, 4)), sys.argv[1], 2, samples=2)
for step in sys.argv[3:]:
    name, _, part = step.partition("-")
    getattr(fit, name)(*([int(part)] if part else []))
"""


def test_processes_share_nothing_but_files(tmp_path):
    def run(*steps):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(len(steps)), *steps]
        subprocess.run(command, check=True)

    run("fit_factors-1")
    run("fit_factors-0", "aggregate_factors", "fit_corrections-0")
    run("fit_corrections-1", "aggregate_corrections")
    make, (x, y) = case("regression")
    mine = PartitionedFit(make(cut(x, y, 4)), tmp_path, 2, samples=2).matrix()
    assert gap(mine, EKFAC(make((x, y)), samples=2)) <= 1e-12


@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_part_goes_on_where_it_was(tmp_path, after):
    make, (x, y) = case("classes")
    steps = ["fit_factors", "fit_corrections"]

    def prepared(folder, progress):
        objective = make(cut(x, y, 3))
        objective._batches.progress = progress
        return PartitionedFit(objective, folder, 2, save_every=0)

    wanted = merged(prepared(tmp_path / "whole", None))
    for step in steps:
        for part in range(2):
            with pytest.raises(KilledError):
                getattr(prepared(tmp_path / "fit", Kill(after + part)), step)(part)
            if step == "fit_factors":
                with pytest.raises(DataError, match=rf"not finished are \[{part}\]"):
                    prepared(tmp_path / "fit", None).aggregate_factors()
            rest = Kill(None)
            getattr(prepared(tmp_path / "fit", rest), step)(part)
            done = Kill(None)
            getattr(prepared(tmp_path / "fit", done), step)(part)
            assert not [w for w, _ in done.seen if w in ("factors", "corrected eigenvalues")]
        aggregate = step.replace("fit", "aggregate")
        getattr(prepared(tmp_path / "fit", None), aggregate)()
    mine = prepared(tmp_path / "fit", None).matrix()
    assert torch.equal(mine.to_dense(), wanted.to_dense())


def test_what_is_missing_is_named(tmp_path):
    make, (x, y) = case("classes")
    fit = PartitionedFit(make(cut(x, y, 3)), tmp_path, 4)
    with pytest.raises(DataError, match=r"aggregate_corrections\(\) first"):
        fit.matrix()
    with pytest.raises(DataError, match=r"aggregate_factors\(\) first"):
        fit.fit_corrections(0)
    for part in (0, 2):
        fit.fit_factors(part)
    with pytest.raises(DataError, match=r"factors in 4 parts .*missing are \[1, 3\]; run fit_fac"):
        fit.aggregate_factors()
    for part in (1, 3):
        fit.fit_factors(part)
    fit.aggregate_factors()
    fit.fit_corrections(3)
    with pytest.raises(DataError, match=r"corrections in 4 parts .*missing are \[0, 1, 2\]"):
        fit.aggregate_corrections()
    plain = PartitionedFit(make(cut(x, y, 3)), tmp_path / "kfac", 1, KFAC)
    with pytest.raises(DataError, match=r"aggregate_factors\(\) first"):
        plain.matrix()
    for step in (lambda: plain.fit_corrections(0), plain.aggregate_corrections):
        with pytest.raises(ArgumentError, match="KFAC has no corrections"):
            step()


def test_parts_that_do_not_fit_together_are_refused(tmp_path):
    make, (x, y) = case("classes")
    objective = make(cut(x, y, 3))
    fit = PartitionedFit(objective, tmp_path, 2)
    fit.fit_factors(0)
    fit.fit_factors(1)
    first, second = (tmp_path / f"factors-{part}-of-2.safetensors" for part in range(2))
    kept = second.read_bytes()
    shutil.copy(first, second)  # the same part twice
    with pytest.raises(DataError, match="holds part 0 of 2"):
        fit.aggregate_factors()
    PartitionedFit(objective, tmp_path / "three", 3).fit_factors(1)
    shutil.copy(tmp_path / "three" / "factors-1-of-3.safetensors", second)
    with pytest.raises(DataError, match="holds part 1 of 3"):
        fit.aggregate_factors()
    second.write_bytes(kept)
    other = case("classes")[0](cut(x + 1, y, 3))
    for changed in (
        PartitionedFit(other, tmp_path, 2),
        PartitionedFit(objective, tmp_path, 2, seed=1),
        PartitionedFit(objective, tmp_path, 2, kind="empirical"),
        PartitionedFit(objective, tmp_path, 2, KFAC),
    ):
        with pytest.raises(DataError, match="fingerprint"):
            changed.aggregate_factors()
    fit.aggregate_factors()
    fit.fit_corrections(0)
    bases = tmp_path / "eigenbases.safetensors"
    turned = PartitionedFit(objective, tmp_path, 2)
    tensors, _ = turned._bases.load(turned._mark)
    bases.unlink()
    name = next(key for key in tensors if key.endswith("/Q_S"))
    turned._save(turned._bases, {**tensors, name: tensors[name].flip(1)})  # as good a basis
    turned.fit_corrections(1)
    with pytest.raises(DataError, match=r"corrections-0-of-2.*other eigenvectors"):
        turned.aggregate_corrections()
    second.write_bytes(b"half of")
    with pytest.raises(DataError, match="cannot be read"):
        PartitionedFit(objective, tmp_path, 2).fit_factors(1)


@pytest.mark.parametrize(("change", "trouble"), [("twice", "row 3 .*parts"), ("less", "22 of the")])
def test_every_row_is_in_one_part(tmp_path, change, trouble):
    make, (x, y) = case("classes")
    fit = PartitionedFit(make(cut(x, y, 3)), tmp_path, 2)
    fit.fit_factors(0)
    fit.fit_factors(1)
    file = fit._file("factors", 0)
    tensors, words = file.load(fit._mark)
    assert tensors["rows"].tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20]
    if change == "twice":
        tensors["rows"][0] = 3
    else:
        tensors["rows"] = tensors["rows"][1:]
    file.save(tensors, words)
    with pytest.raises(DataError, match=trouble):
        fit.aggregate_factors()


def test_bad_arguments(tmp_path):
    make, data = case("classes")
    objective = make(data)
    for parts in (0, -1, 1.5, True):
        with pytest.raises(ArgumentError, match="parts is"):
            PartitionedFit(objective, tmp_path, parts)
    with pytest.raises(ArgumentError, match="method"):
        PartitionedFit(objective, tmp_path, 2, nn.Linear)
    with pytest.raises(ArgumentError, match="sharing"):
        PartitionedFit(objective, tmp_path, 2, sharing="some")
    with pytest.raises(TypeError, match="checkpoint"):
        PartitionedFit(objective, tmp_path, 2, checkpoint="fit")
    with pytest.raises(ArgumentError, match="negative"):
        PartitionedFit(objective.with_weights(-objective.weights), tmp_path, 2)
    fit = PartitionedFit(objective, tmp_path, 2)
    for step in (fit.fit_factors, fit.fit_corrections):
        for part in (-1, 2, 0.5, False):
            with pytest.raises(ArgumentError, match="numbered 0 to 1"):
                step(part)
    assert not list(tmp_path.iterdir())


def test_files_hold_sums(tmp_path):
    """What is written is what the documentation says: factors of a layer and their rows."""
    make, (x, y) = case("classes")
    fit = PartitionedFit(make((x, y)), tmp_path, 1, kind="empirical")
    fit.fit_factors(0)
    found = load_file(tmp_path / "factors-0-of-1.safetensors")
    a = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
    assert torch.allclose(found["0/A"], a.T @ (fit.objective.weights[:, None] * a))
    assert torch.equal(found["rows"], torch.arange(len(x)))
