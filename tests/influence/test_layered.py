"""Scores layer by layer against the dense inverse of the same matrix, in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.influence.models import Tied
from torch import Tensor, nn

from woodbury import CG, EKFAC, Influence, Objective
from woodbury.curvature import RelativeDamping
from woodbury.curvature.layers import MatrixBlock, MatrixGradients
from woodbury.errors import ArgumentError, DataError, NonFiniteError, SingularError
from woodbury.influence import layered
from woodbury.influence.eigenbasis import EigenBlock, MatrixQueries, Spectrum
from woodbury.influence.truncation import Draw, choose, pair_sizes


class Picture(nn.Module):
    """A grouped convolution and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).flatten(1))


def problem(kind: str, count: int, seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "rows": lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
        "tokens": lambda: Tied(7, 4, 6),
        "picture": Picture,
    }
    model = models[kind]().double()
    gen = torch.Generator().manual_seed(seed)
    if kind == "tokens":
        tokens = torch.randint(7, (count, 5), generator=gen)
        return model, (tokens, torch.randint(7, (count, 5), generator=gen))
    shape = (count, 5) if kind == "rows" else (count, 2, 4, 4)
    x = torch.randn(shape, generator=gen, dtype=torch.float64)
    return model, (x, torch.randint(3, (count,), generator=gen))


def gradients(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    found = []
    for x, y in zip(*data, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[None]), y[None]).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["rows", "tokens", "picture"])
@pytest.mark.parametrize("matrix", ["kfac", "ekfac"])
def test_scores_are_those_of_the_dense_inverse(kind: str, matrix: str) -> None:
    model, train = problem(kind, 24, 1)
    _, queries = problem(kind, 5, 2)
    objective = Objective(model, "cross_entropy", train)
    influence = Influence(objective, matrix=matrix, damping=RelativeDamping(1e-3), tolerance=0.0)  # type: ignore[arg-type]
    scores = influence.scores(queries, modules=True)
    dense = torch.linalg.inv(influence.system.operator.to_dense())
    g, q = gradients(model, train), gradients(model, queries)
    truth = -q @ dense @ g.T / 24
    cosine = nn.functional.cosine_similarity(scores.values.flatten(), truth.flatten(), dim=0)
    assert cosine >= 1 - 1e-10
    torch.testing.assert_close(scores.values, truth, rtol=1e-6, atol=1e-6 * truth.abs().max())
    assert scores.modules is not None
    torch.testing.assert_close(scores.modules.sum(0), scores.values)
    torch.testing.assert_close(scores.gradient_norms, g.norm(dim=1) / 24)
    assert scores.solves["ok"]
    own = influence.self_influence()
    truth = -torch.einsum("in,nm,im->i", g, dense, g) / 24
    torch.testing.assert_close(own.values, truth, rtol=1e-6, atol=1e-9)
    assert set(scores.settings["damping"]) == set(influence.system.inverses or {})


@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_cuts_of_data_and_queries_and_a_recipe_give_the_same(kind: str) -> None:
    model, train = problem(kind, 24, 1)
    _, queries = problem(kind, 5, 2)
    objective = Objective(model, "cross_entropy", train)
    kwargs: dict[str, Any] = {"damping": 0.05, "tolerance": 0.0}
    matrix = EKFAC(objective, "exact")
    whole = Influence(objective, matrix=matrix, **kwargs).scores(queries)
    batches = [(train[0][a:b], train[1][a:b]) for a, b in ((0, 11), (11, 12), (12, 24))]
    halves = [(queries[0][:2], queries[1][:2]), (queries[0][2:], queries[1][2:])]
    cut = Influence(Objective(model, "cross_entropy", batches), matrix=matrix, **kwargs)
    torch.testing.assert_close(cut.scores(halves).values, whole.values)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled = [(train[0][part], train[1][part], part) for part in order.split(7)]
    mixed = Influence(Objective(model, "cross_entropy", shuffled), matrix=matrix, **kwargs)
    torch.testing.assert_close(mixed.scores(queries).values, whole.values)
    few = mixed.scores(queries, rows=torch.tensor([20, 3, 11]))
    torch.testing.assert_close(few.values, whole.values[:, [3, 11, 20]])
    solved = Influence(objective, "loss", CG(rtol=1e-12), matrix=matrix, **kwargs)
    torch.testing.assert_close(solved.scores(queries).values, whole.values, rtol=1e-8, atol=1e-10)


def test_a_margin_layer_by_layer() -> None:
    model, train = problem("rows", 24, 1)
    _, queries = problem("rows", 5, 2)
    matrix = EKFAC(Objective(model, "cross_entropy", train), "exact")
    both = [
        Influence(
            Objective(model, "cross_entropy", train),
            "margin",
            recipe,
            matrix=matrix,
            damping=0.1,
            tolerance=0.0,
        ).scores(queries)
        for recipe in (None, CG(rtol=1e-12))
    ]
    torch.testing.assert_close(both[0].values, both[1].values, rtol=1e-8, atol=1e-10)


def wide_problem(trained: bool = True) -> tuple[Objective, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(120, 160), nn.ReLU(), nn.Linear(160, 100), nn.ReLU(), nn.Linear(100, 4)
    )
    gen = torch.Generator().manual_seed(1)
    scale = 1 / torch.arange(1, 121) ** 0.7  # inputs as data have them: some directions matter
    x = torch.randn(500, 120, generator=gen) * scale * 3
    y = (x[:, :4] + 0.5 * torch.randn(500, 4, generator=gen)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60 if trained else 0):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:400]), y[:400]).backward()
        optimizer.step()
    objective = Objective(model, "cross_entropy", [(x[:150], y[:150]), (x[150:400], y[150:400])])
    return objective, (x[400:440], y[400:440])


@pytest.mark.parametrize("tolerance", [0.1, 0.04])
def test_the_separable_form_keeps_what_it_promises(tolerance: float) -> None:
    objective, queries = wide_problem()
    exact = Influence(objective, matrix="ekfac", tolerance=0.0).scores(queries)
    fast = Influence(objective, matrix="ekfac", tolerance=tolerance).scores(queries)
    error = ((fast.values - exact.values).norm() / exact.values.norm()).item()
    assert fast.solves["terms"]  # it is approximate
    assert 1e-5 < error <= fast.solves["truncation_error_at_most"] <= tolerance
    # Of the 16,000 pairs those that were drawn are exact afterwards, and they are the worst.
    assert error <= 1.1 * fast.solves["truncation_error"]
    with pytest.raises(ArgumentError, match="certificate"):
        fast.error()
    assert "truncation_error" not in exact.solves
    assert bool((exact.error() == 0).all())


def test_what_the_terms_do_not_reach_is_exact() -> None:
    objective, queries = wide_problem()
    exact = Influence(objective, matrix="ekfac", tolerance=0.0).scores(queries)
    fast = Influence(objective, matrix="ekfac", tolerance=1e-6).scores(queries)
    error = ((fast.values - exact.values).norm() / exact.values.norm()).item()
    assert error <= max(1e-6, fast.solves.get("truncation_error_at_most", 0.0))


@pytest.mark.parametrize("queried", [1, 40])
def test_the_largest_pairs_are_exact(queried: int) -> None:
    objective, (x, y) = wide_problem()
    queries = x[:queried], y[:queried]
    exact = Influence(objective, matrix="ekfac", tolerance=0.0).scores(queries, modules=True)
    fast = Influence(objective, matrix="ekfac", tolerance=0.1).scores(queries, modules=True)
    assert fast.solves["terms"]  # it is approximate
    share = fast.solves["exact_pairs"]
    assert 0 < share < 0.3 if queried > 1 else share == 0  # of one query terms are cheaper
    difference = (fast.values - exact.values).abs().flatten()
    scale = exact.values.abs().max()
    top = exact.values.abs().flatten().topk(max(1, int(share * exact.values.numel() / 4))).indices
    if share:
        assert difference[top].max() <= 1e-5 * scale
    assert difference.max() > 1e-4 * scale
    assert fast.modules is not None
    torch.testing.assert_close(fast.modules.sum(0), fast.values, rtol=1e-4, atol=1e-5 * scale)


def test_terms_and_exact_pairs_of_a_block() -> None:
    gen = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    p, m, count = 40, 110, 7
    left, right = (torch.linalg.qr(random(n, n)).Q for n in (p, m))
    values = random(p, m).exp() * torch.linspace(4, -4, p, dtype=torch.float64).exp()[:, None]
    block = MatrixBlock("layer", p, m, None)
    eigen = EigenBlock(block, left, right, (values + 0.5).reciprocal(), values)
    queried = MatrixGradients(block, random(5, 1, m), random(5, 1, p))
    queries, sample = (
        MatrixQueries(eigen, queried),
        MatrixGradients(block, random(11, 1, m), random(11, 1, p)),
    )
    basis = torch.kron(left, right)  # not by the code that is tested
    solved = basis @ ((basis.T @ queried.dense().T) * eigen.inverse.view(-1, 1))
    truth = solved.T @ sample.dense().T
    pairs = torch.ones(5, 11).nonzero(as_tuple=True)
    torch.testing.assert_close(queries.scores(sample), truth)
    torch.testing.assert_close(queries.pairs(sample, *pairs).view(5, 11), truth)
    spectrum = Spectrum.of([queries])
    assert spectrum is not None
    terms = spectrum.terms()
    assert len(terms.u) == 40
    queries.use_terms(terms.leading(count))
    rough = queries.scores(sample)
    assert (rough - truth).norm() > 1e-3 * truth.norm()
    torch.testing.assert_close(queries.pairs(sample, *pairs).view(5, 11), truth)
    weights = torch.rand(2, 55, generator=gen, dtype=torch.float64)
    errors = queries.errors(terms, sample, *pairs, weights)
    assert errors.shape == (2, 41)
    torch.testing.assert_close(errors[:, 0], weights @ truth.flatten().square())
    torch.testing.assert_close(errors[:, count], weights @ (rough - truth).flatten().square())
    assert errors[:, 40].max() < 1e-16 * errors[:, 0].max()  # all of them are W
    queries.use_terms(None)
    torch.testing.assert_close(queries.scores(sample), truth)


@pytest.mark.parametrize("relative", [0.01, 1.0])
@pytest.mark.parametrize("trained", [True, False])
def test_the_certificate_holds_for_other_dampings_and_networks(
    relative: float, trained: bool
) -> None:
    objective, queries = wide_problem(trained)
    both = [
        Influence(
            objective, matrix="ekfac", damping=RelativeDamping(relative), tolerance=tolerance
        ).scores(queries)
        for tolerance in (0.0, 0.05)
    ]
    error = ((both[1].values - both[0].values).norm() / both[0].values.norm()).item()
    assert error <= both[1].solves.get("truncation_error_at_most", 0.0) + 1e-6 <= 0.05 + 1e-6


def test_queries_in_batches_and_a_single_row() -> None:
    objective, (x, y) = wide_problem()
    matrix = EKFAC(objective, "empirical")
    exact = Influence(objective, matrix=matrix, tolerance=0.0).scores((x, y)).values
    fast = Influence(objective, matrix=matrix, tolerance=0.05)
    batches = [(x[:9], y[:9]), (x[9:30], y[9:30]), (x[30:], y[30:])]
    for queries in ((x, y), batches):
        scores = fast.scores(queries, modules=True)
        error = ((scores.values - exact).norm() / exact.norm()).item()
        assert scores.solves["terms"]
        assert 1e-5 < error <= scores.solves["truncation_error_at_most"] <= 0.05
        assert scores.modules is not None
        torch.testing.assert_close(scores.modules.sum(0), scores.values, rtol=1e-3, atol=1e-6)
    for rows in (torch.tensor([399]), torch.tensor([7, 160, 161])):
        some = fast.scores((x, y), rows=rows).values
        assert (some - exact[:, rows]).norm() <= 0.05 * exact[:, rows].norm()


def test_a_convolution_is_exact_and_the_layer_behind_it_takes_terms() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(216, 120), nn.ReLU()
    )
    model.append(nn.Linear(120, 3))
    gen = torch.Generator().manual_seed(1)
    x, y = torch.randn(140, 1, 6, 6, generator=gen), torch.randint(3, (140,), generator=gen)
    x = x + 2 * torch.randn(3, 1, 6, 6, generator=gen)[y]
    objective = Objective(model, "cross_entropy", [(x[:50], y[:50]), (x[50:120], y[50:120])])
    matrix = EKFAC(objective, "empirical")
    queries = x[120:], y[120:]
    exact, fast = (
        Influence(objective, matrix=matrix, tolerance=t).scores(queries, modules=True)
        for t in (0.0, 0.05)
    )
    assert "0" not in fast.solves["terms"]
    assert "3" in fast.solves["terms"]
    assert exact.modules is not None
    assert fast.modules is not None
    torch.testing.assert_close(fast.modules[0], exact.modules[0])
    error = ((fast.values - exact.values).norm() / exact.values.norm()).item()
    assert error <= fast.solves["truncation_error_at_most"] <= 0.05


def test_more_pairs_are_exact_where_the_first_do_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, queries = wide_problem()
    matrix = EKFAC(objective, "empirical")
    exact = Influence(objective, matrix=matrix, tolerance=0.0).scores(queries).values
    passes: list[str] = []
    own = layered.Layered._pass

    def counted(self: layered.Layered, groups: Any, name: str) -> Any:
        passes.append(name)
        return own(self, groups, name)

    def careless(errors: dict[str, Tensor], *_: Any) -> tuple[dict[str, int], float]:
        return {name: min(terms, curve.shape[1] - 1) for name, curve in errors.items()}, math.inf

    monkeypatch.setattr(layered.Layered, "_pass", counted)
    monkeypatch.setattr(layered, "choose", careless)
    monkeypatch.setattr(layered, "_MOST", 1.0)
    for terms, tolerance, most in ((6, 0.05, 1), (1, 0.001, 3)):  # noqa: B007
        passes.clear()
        scores = Influence(objective, matrix=matrix, tolerance=tolerance).scores(queries)
        error = ((scores.values - exact).norm() / exact.norm()).item()
        assert error <= scores.solves["truncation_error_at_most"] <= tolerance
        assert scores.solves["exact_pairs"] > 0.01
        assert len(passes) <= most
    monkeypatch.setattr(layered, "_MOST", 0.0)  # none, then: the last attempt is exact
    passes.clear()
    scores = Influence(objective, matrix=matrix, tolerance=0.001).scores(queries)
    assert passes == ["scores-0", "scores-1", "scores-2"]
    assert "terms" not in scores.solves
    torch.testing.assert_close(scores.values, exact)


def test_pairs_that_are_drawn_estimate_the_error_of_the_others() -> None:
    gen = torch.Generator().manual_seed(0)
    rows = torch.rand(400, generator=gen, dtype=torch.float64) ** 4
    asked = torch.rand(8, generator=gen, dtype=torch.float64) ** 2
    exact = torch.randn(8, 400, generator=gen, dtype=torch.float64) * rows * asked[:, None]
    noise = torch.randn(8, 400, generator=gen, dtype=torch.float64) * rows * asked[:, None]
    rough = exact + 0.05 * noise
    scale = float(rough.norm() / (rows.norm() * asked.norm()))
    sizes = pair_sizes(rough, asked, rows, scale)
    torch.testing.assert_close(sizes, rough.abs() + scale * asked[:, None] * rows)
    heavy = sizes > sizes.flatten().topk(100).values[-1]
    rough[heavy] = exact[heavy]
    sizes[heavy] = 0
    true = ((rough - exact).norm() / exact.norm()).item()
    for seed in range(20):
        draw = Draw.of(sizes, seed, 1024)
        errors = (exact - rough)[draw.queries, draw.columns]
        relative, upper = draw.relative(errors, float(rough.norm()))
        assert relative == pytest.approx(true, rel=0.1)
        assert true <= upper <= 1.4 * true
    # Weighted sums estimate sums over all pairs, and so does the level of what may be left.
    assert float(draw.weights().sum()) == pytest.approx(8 * 400, rel=0.3)
    allowed = 0.25 * float((rough - exact).square().sum())
    level = draw.level(errors, sizes[draw.queries, draw.columns], allowed)
    left = float((rough - exact)[sizes <= level].square().sum())
    assert left == pytest.approx(allowed, rel=0.2)
    assert draw.level(errors, sizes[draw.queries, draw.columns], 0.0) == 0.0
    even = Draw.of(torch.zeros(3, 5), 0, 1024)  # nothing is expected: drawn evenly
    assert torch.unique(even.chance).tolist() == pytest.approx([1 / 15])
    assert len(torch.unique(5 * even.queries + even.columns)) == 15
    assert even.relative(torch.zeros(1024), 0.0) == (0.0, 0.0)


def test_what_is_chosen_costs_least() -> None:
    levels_, sizes = torch.tensor([math.inf, 2.0]), torch.ones(10, 100)
    sizes[0, :5] = 3.0  # half a percent of the pairs
    # Without exact pairs 20 terms are needed, with them 4.
    falls = torch.tensor([[1.0] * 20 + [0.0] * 5, [1.0] * 4 + [0.0] * 21]).double()
    shapes = {"a": (100, 200)}
    assert choose({"a": falls}, shapes, sizes, levels_, 0.5) == ({"a": 4}, 2.0)
    sizes[:, ::2] = 3.0  # half of all: more terms are cheaper
    assert choose({"a": falls}, shapes, sizes, levels_, 0.5) == ({"a": 20}, math.inf)
    never = torch.ones(2, 25).double()
    assert choose({"a": never}, shapes, sizes, levels_, 0.5)[0] == {}  # exact


class KilledError(Exception):
    """Stands for a signal."""


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layered, "SECONDS_BETWEEN_PIECES", 0.0)
    model, train = problem("rows", 24, 1)
    _, queries = problem("rows", 5, 2)
    batches = [(train[0][a : a + 4], train[1][a : a + 4]) for a in range(0, 24, 4)]
    objective = Objective(model, "cross_entropy", batches)
    matrix = EKFAC(objective, "exact")
    truth = Influence(objective, matrix=matrix).scores(queries)
    own = Influence(objective, matrix=matrix).self_influence()
    for stop in (1, 3, 6):
        calls: list[float] = []

        def progress(stage: str, fraction: float, stop: int = stop, calls: Any = calls) -> None:
            calls.append(fraction)
            if len(calls) == stop:
                raise KilledError

        killed = Influence(objective, matrix=matrix, progress=progress)
        with pytest.raises(KilledError):
            killed.scores(queries, folder=tmp_path / f"a{stop}")
        calls.clear()
        with pytest.raises(KilledError):
            killed.self_influence(folder=tmp_path / f"b{stop}")
        again = Influence(objective, matrix=matrix)
        assert torch.equal(again.scores(queries, folder=tmp_path / f"a{stop}").values, truth.values)
        assert torch.equal(again.self_influence(folder=tmp_path / f"b{stop}").values, own.values)
    with pytest.raises(DataError, match="tolerance was"):
        Influence(objective, matrix=matrix, tolerance=0.5).scores(queries, folder=tmp_path / "a1")


def test_half_precision_is_computed_in_float32_and_said() -> None:
    model, train = problem("rows", 24, 1)
    _, queries = problem("rows", 5, 2)
    half = model.to(torch.bfloat16)
    x, q = train[0].to(torch.bfloat16), queries[0].to(torch.bfloat16)
    objective = Objective(half, "cross_entropy", (x, train[1]))
    for matrix in ("ekfac", "gauss_newton"):
        scores = Influence(objective, matrix=matrix, damping=0.1).scores((q, queries[1]))  # type: ignore[arg-type]
        assert scores.values.dtype == torch.float32
        assert "float32" in scores.settings["computed_in"]
        same = Objective(half.float(), "cross_entropy", (x.float(), train[1]))
        truth = Influence(same, matrix=matrix, damping=0.1).scores((q.float(), queries[1]))  # type: ignore[arg-type]
        torch.testing.assert_close(scores.values, truth.values, rtol=1e-5, atol=1e-6)
        half.to(torch.bfloat16)


def test_bad_input() -> None:
    model, train = problem("rows", 24, 1)
    objective = Objective(model, "cross_entropy", train)
    with pytest.raises(ArgumentError, match=r"tolerance is 1\.0"):
        Influence(objective, matrix="ekfac", tolerance=1.0)
    with pytest.raises(ArgumentError, match="kfac"):
        Influence(objective, damping=RelativeDamping(0.1)).scores()
    dead = train[0].clone()
    dead[:, 0] = 0  # an input that is never there
    with pytest.raises(SingularError, match="add damping"):
        Influence(
            Objective(model, "cross_entropy", (dead, train[1])), matrix="ekfac", damping=0.0
        ).scores()
    queries = train[0][:3].clone(), train[1][:3]
    queries[0][1, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="batch 0"):
        Influence(objective, matrix="ekfac").scores(queries)


def test_of_sequences_no_gradients_are_gathered_to_choose_terms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is no separable form of a sum over places, whatever the tolerance."""
    torch.manual_seed(0)
    model = torch.nn.Linear(70, 70).double()
    data = torch.randn(6, 5, 70).double(), torch.randn(6, 5, 70).double()
    objective = Objective(model, "mse", data)
    K = EKFAC(objective, "exact")

    def refuse(_: Any) -> None:
        raise AssertionError("gradients of a sample of the training data were asked for")

    monkeypatch.setattr(layered.Layered, "_pilot", refuse)
    kwargs: dict[str, Any] = {"matrix": K, "damping": 1e-2}
    exact = Influence(objective, tolerance=0.0, **kwargs).scores(data)
    found = Influence(objective, tolerance=0.01, **kwargs).scores(data)
    torch.testing.assert_close(found.values, exact.values, rtol=1e-12, atol=0)
    assert "terms" not in found.solves
    flat = data[0][:, 0], data[1][:, 0]
    with pytest.raises(AssertionError, match="were asked for"):
        Influence(Objective(model, "mse", flat), tolerance=0.01, **kwargs).scores(flat)
