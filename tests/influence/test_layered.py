"""Scores layer by layer against the dense inverse of the same matrix, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from woodbury import CG, EKFAC, Influence, Objective
from woodbury.curvature import RelativeDamping
from woodbury.errors import ArgumentError, DataError, NonFiniteError, SingularError
from woodbury.influence import layered
from woodbury.influence.truncation import Draw, heaviest


class Tokens(nn.Module):
    """Embedding, norm, two layers on sequences, and the embedding again for the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        h = h + self.down(torch.tanh(self.up(self.norm(h))))
        return (h @ self.embed.weight.T).transpose(1, 2)


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
        "tokens": Tokens,
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


def wide_problem() -> tuple[Objective, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(120, 160), nn.ReLU(), nn.Linear(160, 100), nn.ReLU(), nn.Linear(100, 4)
    )
    gen = torch.Generator().manual_seed(1)
    scale = 1 / torch.arange(1, 121) ** 0.7  # inputs as data have them: some directions matter
    x = torch.randn(500, 120, generator=gen) * scale * 3
    y = (x[:, :4] + 0.5 * torch.randn(500, 4, generator=gen)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
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
    assert fast.solves["truncation_error"] == pytest.approx(error, rel=0.5)
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
def test_the_heaviest_pairs_are_exact(queried: int) -> None:
    objective, (x, y) = wide_problem()
    queries = x[:queried], y[:queried]
    exact = Influence(objective, matrix="ekfac", tolerance=0.0).scores(queries, modules=True)
    fast = Influence(objective, matrix="ekfac", tolerance=0.1).scores(queries, modules=True)
    assert fast.solves["terms"]  # it is approximate
    rows, columns = heaviest(exact.values)
    assert (len(rows), len(columns)) == (-(-queried // 4), 50)
    difference = (fast.values - exact.values).abs()
    top = exact.values[rows].square().sum(0).topk(12).indices  # heavy in the rough scores too
    worst = rows[exact.values[rows].square().sum(1).argmax()]
    scale = exact.values.abs().max()
    assert difference[worst, top].max() <= 1e-5 * scale
    assert difference.max() > 1e-4 * scale
    assert fast.modules is not None
    torch.testing.assert_close(fast.modules.sum(0), fast.values, rtol=1e-4, atol=1e-5 * scale)


def test_what_is_drawn_estimates_the_error_outside_the_exact_block() -> None:
    gen = torch.Generator().manual_seed(0)
    sizes = torch.rand(400, generator=gen, dtype=torch.float64) ** 4
    exact = torch.randn(8, 400, generator=gen, dtype=torch.float64) * sizes
    rough = exact * (1 + 0.05 * torch.randn(8, 400, generator=gen, dtype=torch.float64))
    block = heaviest(rough)
    rough[block[0][:, None], block[1]] = exact[block[0][:, None], block[1]]
    draw = Draw.of(rough, block)
    assert draw is not None
    found = draw.truncation(exact[:, draw.unique], rough[:, draw.unique], {})
    true = ((rough - exact).norm() / exact.norm()).item()
    assert found.relative == pytest.approx(true, rel=0.3)
    assert true <= found.upper
    everything = torch.arange(8), torch.arange(400)
    even = Draw.of(rough, everything)  # nothing is left: drawn evenly, without a division by zero
    assert even is not None
    assert even.truncation(rough[:, even.unique], rough[:, even.unique], {}).upper == 0.0
    assert Draw.of(torch.zeros(3, 5), heaviest(torch.zeros(3, 5))) is None


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
