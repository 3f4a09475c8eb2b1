"""Compressed gradients on disk: scores against dense algebra, bounds that cover, kills, kinds."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.influence.models import Tied
from torch import Tensor, nn

from woodbury import EKFAC, Influence, Objective
from woodbury.curvature import FactoredGradients, RelativeDamping
from woodbury.errors import (
    ArgumentError,
    DataError,
    NonFiniteError,
    ShapeError,
    StructureError,
)
from woodbury.influence import EigenProjection, GradientStore, RandomProjection, Scores
from woodbury.influence.shards import at_least, chunks, quantize, read_shard, write_shard

FULL = EigenProjection(1000, 1000)


class Lookup(nn.Module):
    """An embedding with one-hot inputs, and a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)).mean(1))


class Picture(nn.Module):
    """A grouped convolution, a norm, and a layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


KINDS = ("rows", "tokens", "lookup", "picture")


def problem(kind: str, count: int, seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "rows": lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
        "tokens": lambda: Tied(7, 4, 6),
        "lookup": Lookup,
        "picture": Picture,
    }
    model = models[kind]().double()
    gen = torch.Generator().manual_seed(seed)
    if kind == "tokens":
        tokens = torch.randint(7, (count, 5), generator=gen)
        return model, (tokens, torch.randint(7, (count, 5), generator=gen))
    y = torch.randint(3, (count,), generator=gen)
    if kind == "lookup":
        return model, (torch.randint(9, (count, 4), generator=gen), y)
    shape = (count, 5) if kind == "rows" else (count, 2, 4, 4)
    return model, (torch.randn(shape, generator=gen, dtype=torch.float64), y)


def cut(data: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def exact_scores(
    objective: Objective, queries: Any, measurement: Any = "loss", matrix: Any = "ekfac"
) -> Scores:
    return Influence(objective, measurement, matrix=matrix, tolerance=0.0).scores(queries)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measurement", ["loss", "margin"])
def test_all_directions_are_exact_scores(kind: str, measurement: Any, tmp_path: Path) -> None:
    model, train = problem(kind, 24, 1)
    _, queries = problem(kind, 5, 2)
    objective = Objective(model, "cross_entropy", cut(train, 7))
    truth = exact_scores(objective, queries, measurement)
    store = GradientStore(objective, tmp_path, FULL, dtype="float64")
    assert store.width == objective.space.dim
    found = store.scores(queries, measurement)
    torch.testing.assert_close(
        found.values, truth.values, rtol=1e-8, atol=1e-8 * float(truth.values.abs().max())
    )
    assert found.support == truth.support
    assert found.proven
    assert float(found.error().max()) == 0
    assert found.certificate()["error_guarantee"] == "bound"
    own = store.scores()
    assert own.values.shape == (24, 24)
    alone = Influence(objective, matrix="ekfac", tolerance=0.0).self_influence().values
    torch.testing.assert_close(own.values.diagonal(), alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int8"])
def test_the_bound_covers_every_score(kind: str, dtype: Any, tmp_path: Path) -> None:
    model, train = problem(kind, 30, 1)
    _, queries = problem(kind, 6, 2)
    objective = Objective(model, "cross_entropy", cut(train, 11))
    truth = exact_scores(objective, queries).values
    for number, sizes in enumerate([(1, 1, 1), (2, 3, 2), (4, 2, 5), (1000, 1000, 1000)]):
        store = GradientStore(
            objective, tmp_path / str(number), EigenProjection(*sizes), dtype=dtype
        )
        found = store.scores(queries)
        gap = (found.values - truth).abs()
        bound = found.error()
        rounding = 1e-12 * float(truth.abs().max())
        assert bool((gap <= bound + rounding).all())
        if dtype != "float64" or number < 3:
            assert float(bound.min()) > 0
            assert float(gap.max()) > rounding  # something was lost, or the test says nothing
    largest = float(truth.abs().max())
    limits = {"float64": 0.0, "float32": 1e-5, "float16": 2e-2, "int8": 0.5}
    assert float(bound.max()) <= limits[dtype] * largest  # of the last, which keeps everything


@settings(deadline=None, max_examples=30)
@given(
    outputs=st.integers(1, 7),
    inputs=st.integers(1, 7),
    seed=st.integers(0, 10_000),
    damping=st.sampled_from([1e-3, 0.1, 10.0]),
    dtype=st.sampled_from(["float32", "float16", "int8"]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_the_bound_covers_any_draw(
    outputs: int, inputs: int, seed: int, damping: float, dtype: Any, scale: float
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(20, 4).double() * scale, torch.randint(2, (20,))
    objective = Objective(model, "cross_entropy", (x, y))
    rule = RelativeDamping(damping)
    truth = Influence(objective, matrix="ekfac", damping=rule, tolerance=0.0).scores().values
    with tempfile.TemporaryDirectory() as folder:
        sizes = EigenProjection(outputs, inputs)
        found = GradientStore(objective, folder, sizes, dtype=dtype, damping=rule).scores()
    gap = (found.values - truth).abs()
    assert bool((gap <= found.error() + 1e-12 * truth.abs().max()).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_parts_of_layers_and_their_bounds(kind: str, dtype: Any, tmp_path: Path) -> None:
    model, train = problem(kind, 24, 1)
    _, queries = problem(kind, 5, 2)
    objective = Objective(model, "cross_entropy", cut(train, 7))
    exact = Influence(objective, matrix="ekfac", tolerance=0.0).scores(queries, modules=True)
    for name, projection in (("part", EigenProjection(2, 3, vector=3)), ("full", FULL)):
        store = GradientStore(objective, tmp_path / name, projection, dtype=dtype)
        found = store.scores(queries, modules=True)
        assert found.modules is not None
        assert exact.modules is not None
        assert found.module_names == tuple(store.projections)
        assert sorted(found.module_names) == sorted(exact.module_names)
        torch.testing.assert_close(found.modules.sum(0), found.values)
        torch.testing.assert_close(found.values, store.scores(queries).values)
        assert store.scores(queries).modules is None
        left, right, count = found.solve_error, found.gradient_norms, len(found.module_names)
        assert left is not None
        assert right is not None
        for number, layer in enumerate(found.module_names):
            true = exact.modules[exact.module_names.index(layer)]
            columns = [number, count + number]
            bound = left[:, columns] @ right[:, columns].T
            assert bool(((found.modules[number] - true).abs() <= bound + 1e-12).all())
            if (name, dtype) == ("full", "float64"):
                torch.testing.assert_close(found.modules[number], true, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float64", "float16", "int8"])
def test_self_influence_misses_nothing_but_rounding(kind: str, dtype: Any, tmp_path: Path) -> None:
    model, train = problem(kind, 24, 1)
    objective = Objective(model, "cross_entropy", cut(train, 7))
    exact = Influence(objective, matrix="ekfac").self_influence()
    store = GradientStore(objective, tmp_path, EigenProjection(2, 3, vector=3), dtype=dtype)
    found = store.self_influence(modules=True)
    difference = (found.values - exact.values).abs().double()
    assert found.proven
    assert bool((difference <= found.error + 1e-12).all())
    rounding = {"float64": 1e-6, "float16": 1e-2, "int8": 0.1}[dtype]
    assert bool((found.error <= rounding * exact.values.abs()).all())
    if dtype != "float64":
        assert difference.max() > 1e-5 * exact.values.abs().max()  # something was rounded
    assert found.modules is not None
    assert found.module_names == tuple(store.projections)
    torch.testing.assert_close(found.modules.sum(0), found.values)
    assert store.self_influence().modules is None
    assert found.certificate()["error_guarantee"] == "bound"
    # Part by part, against the rows themselves.
    whole = GradientStore(objective, tmp_path / "whole", FULL, dtype="float64")
    for chunk in whole.chunks():
        squares = [piece.square().sum(1) for piece in chunk.values.split(whole.sizes, 1)]
        parts = -torch.stack(squares) / 24
        torch.testing.assert_close(found.modules[:, chunk.places], parts, rtol=rounding, atol=1e-9)


def test_self_influence_of_random_projections(tmp_path: Path) -> None:
    model, train = problem("rows", 24, 1)
    objective = Objective(model, "cross_entropy", cut(train, 7), l2=0.01)
    store = GradientStore(
        objective, tmp_path, RandomProjection(3, 3), dtype="float64", damping=0.05
    )
    found, pairs = store.self_influence(modules=True), store.scores(modules=True)
    assert not found.proven
    torch.testing.assert_close(found.values, pairs.values.diagonal())
    assert found.modules is not None
    assert pairs.modules is not None
    torch.testing.assert_close(found.modules, pairs.modules.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(found.error, pairs.error().diagonal())
    assert bool((found.error > 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int8"])
@pytest.mark.parametrize("projection", [EigenProjection(3, 4, vector=5), RandomProjection(2, 3)])
def test_the_forecast_is_what_the_disk_gets(
    kind: str, dtype: Any, projection: Any, tmp_path: Path
) -> None:
    model, train = problem(kind, 400, 1)
    objective = Objective(model, "cross_entropy", cut(train, 40))
    store = GradientStore(objective, tmp_path, projection, dtype=dtype, shard=2**14)
    forecast = store.forecast()
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"run.json"}  # nothing is fitted or written
    store.write()
    files = [path for path in tmp_path.iterdir() if path.name not in written]
    disk = sum(path.stat().st_size for path in files)
    assert 0.8 * forecast.disk <= disk <= forecast.disk + 4096
    assert forecast.numbers == store.width
    assert forecast.passes == (3 if isinstance(projection, EigenProjection) else 1)
    assert forecast.seconds > 0
    assert forecast.memory > 0
    assert "on disk" in str(forecast)
    again = store.forecast()
    assert (again.disk, again.passes, again.seconds) == (0, 0, 0.0)


def test_the_forecast_of_what_is_left(tmp_path: Path) -> None:
    model, train = problem("rows", 60, 1)
    objective = Objective(model, "cross_entropy", cut(train, 10))
    matrix = EKFAC(objective)
    store = GradientStore(objective, tmp_path, EigenProjection(3, 3), matrix=matrix, shard=1)
    whole = store.forecast()
    assert whole.passes == 1  # the matrix is there
    store.write()
    for number in (4, 5):
        (tmp_path / f"rows-{number:05d}.safetensors").unlink()
    part = store.forecast()
    assert 0 < part.disk < whole.disk / 2
    assert part.passes == 1


def dense(objective: Objective, data: Any) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for batch in FactoredGradients(objective.with_data(data)):
        for name, part in batch.blocks.items():
            found.setdefault(name, []).append(part.dense())
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_random_projections_are_those_of_the_dense_gradients(kind: str, tmp_path: Path) -> None:
    model, train = problem(kind, 24, 1)
    _, queries = problem(kind, 5, 2)
    weights = torch.rand(24, dtype=torch.float64) + 0.5
    objective = Objective(model, "cross_entropy", cut(train, 7), weights=weights, l2=1e-2)
    sizes = RandomProjection(3, 2, vector=3, seed=5)
    store = GradientStore(objective, tmp_path, sizes, dtype="float64", damping=0.05)
    found = store.scores(queries)
    truth = torch.zeros(5, 24, dtype=torch.float64)
    rows, asked = dense(objective, train), dense(objective, queries)
    for name, basis in store.projections.items():
        left, right = basis.left, basis.right  # type: ignore[attr-defined]
        block = FactoredGradients(objective).blocks[name]
        p = getattr(block, "p", rows[name].shape[1])
        m = rows[name].shape[1] // p
        P_S = torch.eye(p).double() if left is None else left
        P_A = torch.eye(m).double() if right is None else right
        z, q = (
            (P_S.T @ part.view(-1, p, m) @ P_A).flatten(1) for part in (rows[name], asked[name])
        )
        assert z.shape[1] == basis.size
        M = (z.T * weights) @ z / 24 + (1e-2 + 0.05) * torch.eye(basis.size).double()
        truth -= q @ torch.linalg.inv(M) @ z.T / 24
    torch.testing.assert_close(found.values, truth, rtol=1e-9, atol=1e-9 * truth.abs().max())
    assert found.certificate()["error_guarantee"] == "estimate"
    assert not found.proven
    # The rounding of int8 is bounded for the scores with the matrix of the rounded rows.
    rounded = GradientStore(objective, tmp_path / "int8", sizes, dtype="int8", damping=0.05)
    gap = (rounded.scores(queries).values - truth).abs()
    assert float(gap.max()) <= 0.1 * float(truth.abs().max())


def test_the_estimate_is_the_spread_of_random_projections(tmp_path: Path) -> None:
    """Products of projected gradients spread as the formula says, at most."""
    torch.manual_seed(0)
    model = nn.Linear(30, 20).double()
    x, y = torch.randn(4, 30).double(), torch.randn(4, 20).double()
    objective = Objective(model, "mse", (x, y))
    rows = dense(objective, (x, y))["weight"]
    truth = rows @ rows.T
    errors = []
    for seed in range(60):
        store = GradientStore(objective, tmp_path / str(seed), RandomProjection(6, 8, seed=seed))
        z = next(iter(store.chunks())).values
        errors.append((z @ z.T - truth) / rows.norm(dim=1).outer(rows.norm(dim=1)))
    spread = torch.stack(errors).square().mean(0).sqrt()
    doubt = store.projections["weight"].doubt
    assert doubt == pytest.approx(((1 + 2 / 6) * (1 + 2 / 8) - 1) ** 0.5)
    assert float(spread.diagonal().max()) <= 1.35 * doubt  # 60 draws
    assert float(spread.diagonal().min()) >= 0.6 * doubt  # and it is no idle limit: u = v meets it
    assert abs(float(torch.stack(errors).mean(0).diagonal().mean())) < 0.15  # unbiased


def test_projections_that_keep_all_are_the_empirical_fisher_matrix(tmp_path: Path) -> None:
    model, train = problem("rows", 40, 1)
    objective = Objective(model, "cross_entropy", train)
    sizes = RandomProjection(100, 100)
    store = GradientStore(objective, tmp_path, sizes, dtype="float64", damping=0.1)
    assert {basis.doubt for basis in store.projections.values()} == {0.0}
    assert float(store.scores().error().max()) == 0
    truth = 0
    for rows in dense(objective, train).values():
        M = rows.T @ rows / 40 + 0.1 * torch.eye(rows.shape[1]).double()
        truth = truth - rows @ torch.linalg.inv(M) @ rows.T / 40
    torch.testing.assert_close(store.scores().values, truth)


class KilledError(Exception):
    """In the place of a kill."""


@pytest.mark.parametrize("projection", [EigenProjection(3, 3), RandomProjection(2, 2)])
def test_a_killed_writer_goes_on_with_the_same_bytes(projection: Any, tmp_path: Path) -> None:
    model, train = problem("rows", 24, 1)
    objective = Objective(model, "cross_entropy", cut(train, 3))
    kwargs: dict[str, Any] = {"dtype": "int8", "shard": 40}
    whole = GradientStore(objective, tmp_path / "whole", projection, **kwargs).write()

    def kill(stage: str, fraction: float) -> None:
        if stage == "writing gradients" and fraction > 0.6:
            raise KilledError

    folder = tmp_path / "killed"
    with pytest.raises(KilledError):
        GradientStore(objective, folder, projection, progress=kill, **kwargs).write()
    names = sorted(path.name for path in (tmp_path / "whole").glob("rows-*"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("rows-*")}
    assert 0 < len(before) < len(names)
    again = GradientStore(objective, folder, projection, **kwargs).write()
    assert sorted(path.name for path in folder.glob("rows-*")) == names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name, stamp in before.items():
        assert (folder / name).stat().st_mtime_ns == stamp  # not written again
    assert torch.equal(again.scores(train).values, whole.scores(train).values)
    assert not list(folder.glob(".*tmp*"))


def test_a_shuffled_loader_with_row_numbers(tmp_path: Path) -> None:
    model, train = problem("rows", 24, 1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    mixed = [(train[0][part], train[1][part], part) for part in order.split(7)]
    matrix = EKFAC(Objective(model, "cross_entropy", train), "exact")
    stores = [
        GradientStore(
            Objective(model, "cross_entropy", data), tmp_path / str(i), FULL, matrix=matrix
        )
        for i, data in enumerate((train, mixed))
    ]
    first, second = (store.scores(train) for store in stores)
    torch.testing.assert_close(first.values, second.values, rtol=1e-6, atol=1e-9)
    truth = exact_scores(Objective(model, "cross_entropy", train), train, matrix=matrix)
    assert bool(((first.values - truth.values).abs() <= first.error() + 1e-12).all())


def test_another_model_other_data_other_settings_are_refused(tmp_path: Path) -> None:
    model, train = problem("rows", 24, 1)
    objective = Objective(model, "cross_entropy", train)
    sizes = EigenProjection(3, 3)
    GradientStore(objective, tmp_path, sizes).write()
    other, _ = problem("rows", 24, 1)
    with torch.no_grad():
        other[0].weight.add_(1e-3)  # type: ignore[index]
    moved = (train[0] + 1e-3, train[1])
    for changed, kwargs in (
        (Objective(other, "cross_entropy", train), {"projection": sizes}),
        (Objective(model, "cross_entropy", moved), {"projection": sizes}),
        (objective, {"projection": EigenProjection(3, 2)}),
        (objective, {"projection": RandomProjection(3, 3)}),
        (objective, {"projection": sizes, "dtype": "int8"}),
        (objective, {"projection": sizes, "damping": 0.3}),
        (objective, {"projection": sizes, "matrix": EKFAC(objective, "exact")}),
    ):
        with pytest.raises(DataError, match="choose another folder, or delete this one"):
            GradientStore(changed, tmp_path, **kwargs)  # type: ignore[arg-type]


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    model, train = problem("rows", 24, 1)
    objective = Objective(model, "cross_entropy", train)
    for wrong in (
        {"dtype": "int4"},
        {"shard": 0},
        {"projection": 3},
        {"projection": RandomProjection(), "matrix": EKFAC(objective)},
    ):
        with pytest.raises(ArgumentError):
            GradientStore(objective, tmp_path, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="positive"):
        EigenProjection(0)
    with pytest.raises(ArgumentError, match="positive"):
        RandomProjection(3, vector=0)
    with pytest.raises(StructureError, match="mode='eval'"):
        GradientStore(Objective(model, "cross_entropy", train, mode="train"), tmp_path)
    bigger = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    with pytest.raises(ShapeError, match="parameters"):
        GradientStore(objective, tmp_path, matrix=EKFAC(Objective(bigger, "cross_entropy", train)))
    assert not list(tmp_path.iterdir())


def test_damaged_files_and_nan_are_named(tmp_path: Path) -> None:
    model, train = problem("rows", 24, 1)
    objective = Objective(model, "cross_entropy", train)
    store = GradientStore(objective, tmp_path / "a", RandomProjection(2, 2)).write()
    (tmp_path / "a" / "rows-00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="delete it"):
        store.scores(train)
    broken = (train[0].clone(), train[1])
    broken[0][17] = torch.nan
    bad = Objective(model, "cross_entropy", broken)
    with pytest.raises(NonFiniteError, match="batch 0"):
        GradientStore(bad, tmp_path / "b", RandomProjection(2, 2)).write()

    class Root(nn.Module):  # a finite loss with a gradient that is not
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).abs().sqrt()

    broken[0][17] = 0
    bad = Objective(Root(), "cross_entropy", broken)
    with pytest.raises(NonFiniteError, match="rows 17"):
        GradientStore(bad, tmp_path / "c", RandomProjection(2, 2)).write()


def test_float32_models_and_half_models(tmp_path: Path) -> None:
    model, train = problem("rows", 24, 1)
    data = (train[0].float(), train[1])
    truth = exact_scores(Objective(model, "cross_entropy", train), train).values
    single = GradientStore(Objective(model.float(), "cross_entropy", data), tmp_path / "f", FULL)
    found = single.scores(data)
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values.double(), truth, rtol=0.05, atol=1e-3)
    half = Objective(model.bfloat16(), "cross_entropy", (train[0].bfloat16(), train[1]))
    assert GradientStore(half, tmp_path / "h", FULL).scores().values.dtype == torch.float32


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "int8"])
def test_errors_of_rounding_are_what_was_lost(kind: Any, tmp_path: Path) -> None:
    gen = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 12, generator=gen, dtype=torch.float64)
    rows[:, :5] *= 1e-9
    rows[3] = 0
    rows[4, 5:] = 1e-60  # a scale below float32
    sizes = (5, 7)
    stored = quantize(rows, sizes, kind)
    shard = write_shard(tmp_path / "x.safetensors", torch.arange(50), stored, torch.ones(50, 2), 1)
    (chunk,) = chunks(shard, sizes, torch.float64, 100, torch.device("cpu"))
    lost = torch.stack([p.norm(dim=1) for p in (chunk.values - rows).split(sizes, 1)], 1)
    assert bool((chunk.errors >= lost).all())
    torch.testing.assert_close(chunk.errors, lost, rtol=1e-6, atol=1e-40)
    limits = {"float64": 0.0, "float32": 1e-7, "float16": 1e-3, "int8": 1e-2}
    relative = lost / torch.stack([p.norm(dim=1) for p in rows.split(sizes, 1)], 1).clamp(1e-30)
    assert float(relative[5:].max()) <= limits[kind]
    assert not bool(chunk.values[3].any())


def test_rounding_up() -> None:
    values = torch.rand(1000, dtype=torch.float64)
    found = at_least(values)
    assert bool((found.double() >= values).all())
    torch.testing.assert_close(found.double(), values, rtol=2e-7, atol=0)
    assert torch.equal(at_least(torch.zeros(3)), torch.zeros(3))


def test_a_slice_of_a_shard_does_not_load_the_rest(tmp_path: Path) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("resident memory is read from /proc")
    rows = torch.ones(4096, 4096)  # 64 MiB
    zeros = torch.zeros(4096, 1)
    write_shard(tmp_path / "x.safetensors", torch.arange(4096), quantize(rows, (4096,), "float32"),
                zeros, 1)  # fmt: skip
    script = f"""
import re, torch
from pathlib import Path
from woodbury.influence.shards import chunks, read_shard
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
shard = read_shard(Path({str(tmp_path / "x.safetensors")!r}))
read = chunks(shard, (4096,), torch.float32, 8, torch.device("cpu"))
next(chunks(shard, (4096,), torch.float32, 8, torch.device("cpu")))
before = resident()
found = next(read)
assert found.values.shape == (8, 4096) and bool((found.values == 1).all())
few = resident() - before
whole = next(chunks(shard, (4096,), torch.float32, 4096, torch.device("cpu")))
assert float(whole.values.sum()) == 4096**2
print(few, resident() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    few, whole = map(float, done.stdout.split())
    assert few < 16  # MiB
    assert whole > 60  # so the measure sees what is loaded
    assert read_shard(tmp_path / "x.safetensors").count == 4096
