"""Gradients of queries kept as low rank: against LAPACK in float64, and bounds that hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.influence.models import Tied
from torch import Tensor, nn

from woodbury import CG, EKFAC, Influence, Objective
from woodbury.curvature import FactoredGradients
from woodbury.curvature.layers import MatrixBlock, MatrixGradients
from woodbury.errors import ArgumentError, BudgetError, DataError, NonFiniteError
from woodbury.influence import layered, query_forms
from woodbury.influence.eigenbasis import EigenBlock, MatrixQueries
from woodbury.influence.query_forms import (
    DenseQueries,
    FactorQueries,
    LowRankQueries,
    TokenQueries,
    leading,
)


class Lookup(nn.Module):
    """An embedding with one-hot inputs, attention-like mixing, a layer of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(15, 9), nn.Linear(9, 9), nn.Linear(9, 15)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        h = torch.tanh(h + self.mix(h.cumsum(1)))
        return self.head(h).transpose(1, 2)


class Picture(nn.Module):
    """A grouped convolution, a convolution, and a layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean((2, 3)))


MODELS = {"tied": lambda: Tied(11, 10, 12), "lookup": Lookup, "picture": Picture}
KINDS = tuple(MODELS)
Data = tuple[Tensor, Tensor]


def data(kind: str, count: int, seed: int, length: int = 8) -> Data:
    gen = torch.Generator().manual_seed(seed)
    if kind == "picture":
        x = torch.randn(count, 4, 4, 4, generator=gen, dtype=torch.float64)
        return x, torch.randint(3, (count,), generator=gen)
    tokens = 11 if kind == "tied" else 15
    x, y = (torch.randint(tokens, (count, length), generator=gen) for _ in range(2))
    return x, y


def influence(kind: str, **kwargs: Any) -> tuple[nn.Module, Data, Influence]:
    torch.manual_seed(0)
    model, train = MODELS[kind]().double(), data(kind, 20, 1)
    objective = Objective(model, "cross_entropy", cut(train, 7))
    found = Influence(objective, matrix=EKFAC(objective, "exact"), damping=0.02, **kwargs)
    return model, train, found


def cut(rows: Data, size: int) -> list[Data]:
    return list(zip(rows[0].split(size), rows[1].split(size), strict=True))


def gradients(model: nn.Module, rows: Data) -> Tensor:
    found = []
    for x, y in zip(*rows, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[None]), y[None]).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    return torch.stack(found)


def reference(found: Influence, q: Tensor, g: Tensor, rank: int) -> tuple[Tensor, list[str]]:
    """Scores by the dense inverse, each block of it cut to the rank by LAPACK where that counts."""
    dense = torch.linalg.inv(found.system.operator.to_dense())
    X, cuts = q @ dense, []
    blocks = FactoredGradients(found.objective).blocks
    for name, inverse in (found.system.inverses or {}).items():
        block = blocks[name]
        if not isinstance(inverse, EigenBlock) or not isinstance(block, MatrixBlock):
            continue
        p, m = block.p, block.m
        if block.one_hot or rank * (p + m) >= p * m or (name == "head" and p == 3):
            continue  # exact: columns of tokens, matrices, the one position of the last layer
        cuts.append(name)
        left, right = (
            torch.eye(n).double() if side is None else side
            for n, side in ((p, inverse.left), (m, inverse.right))
        )
        damped = 1 / inverse.inverse
        L = left @ torch.diag(damped.mean(1).sqrt()) @ left.T
        R = right @ torch.diag(damped.mean(0).sqrt()) @ right.T
        places = block.positions(found.objective.space)
        for row in X:
            Y = (L @ row[places].view(p, m) @ R).numpy()
            U, s, V = np.linalg.svd(Y, full_matrices=False)
            kept = torch.from_numpy((U[:, :rank] * s[:rank]) @ V[:rank])
            row[places] = (torch.linalg.solve(L, kept) @ torch.linalg.inv(R)).flatten()
    return -X @ g.T / len(g), cuts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3])
def test_scores_are_those_of_the_cut_matrices(kind: str, rank: int) -> None:
    model, train, found = influence(kind)
    queries = data(kind, 5, 2)
    q, g = gradients(model, queries), gradients(model, train)
    truth, cuts = reference(found, q, g, rank)
    scores = found.scores(queries, query_rank=rank, modules=True)
    assert list(scores.solves["query_errors"]) == cuts != []
    assert all(0 < error < 2 for error in scores.solves["query_errors"].values())
    torch.testing.assert_close(scores.values, truth, rtol=1e-7, atol=1e-9 * truth.abs().max())
    assert scores.modules is not None
    torch.testing.assert_close(scores.modules.sum(0), scores.values)
    assert scores.settings["matrix"] == "EKFAC"
    assert scores.solves["query_rank"] == rank


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_bound_holds_for_every_score(kind: str, rank: int) -> None:
    _, _, found = influence(kind, tolerance=0.0)
    queries = data(kind, 5, 2)
    exact, scores = found.scores(queries), found.scores(queries, query_rank=rank)
    difference = (scores.values - exact.values).abs()
    assert scores.proven
    assert difference.max() > 1e-4 * exact.values.abs().max()  # it is approximate
    assert bool((difference <= scores.error() + 1e-12).all())
    assert scores.certificate()["error_guarantee"] == "bound"
    true = (difference.norm() / exact.values.norm()).item()  # few examples: known, not estimated
    assert scores.solves["truncation_error"] == pytest.approx(true, rel=1e-6)
    assert scores.solves["truncation_error_at_most"] == pytest.approx(true, rel=1e-6)


def test_the_error_of_many_scores_is_estimated() -> None:
    torch.manual_seed(0)
    model, train = Lookup().double(), data("lookup", 300, 1)
    objective = Objective(model, "cross_entropy", cut(train, 100))
    found = Influence(objective, matrix=EKFAC(objective, "exact"), damping=0.02, tolerance=0.0)
    queries = [data("lookup", 3, 2), data("lookup", 3, 3, length=10)]
    exact = found.scores(queries).values
    for rank in (2, 4):
        scores = found.scores(queries, query_rank=rank)
        true = ((scores.values - exact).norm() / exact.norm()).item()
        assert scores.solves["truncation_error"] == pytest.approx(true, rel=0.3)
        assert true <= scores.solves["truncation_error_at_most"] < 3 * true


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [15, 1000])
def test_a_rank_that_is_full_is_exact(kind: str, rank: int) -> None:
    _, _, found = influence(kind, tolerance=0.0)
    queries = data(kind, 5, 2)
    exact, scores = found.scores(queries), found.scores(queries, query_rank=rank)
    torch.testing.assert_close(scores.values, exact.values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scores.gradient_norms, exact.gradient_norms)
    assert bool((scores.error() == 0).all())
    assert scores.solves == {"ok": True, "query_rank": rank, "query_errors": {}}


def test_short_queries_are_exact() -> None:
    _, _, found = influence("lookup", tolerance=0.0)
    queries = data("lookup", 4, 2, length=3)
    exact, scores = found.scores(queries), found.scores(queries, query_rank=3)
    torch.testing.assert_close(scores.values, exact.values, rtol=1e-9, atol=1e-12)
    assert scores.solves["query_errors"] == {}
    assert found.scores(queries, query_rank=2).solves["query_errors"]


@pytest.mark.parametrize("kind", ["tied", "lookup"])
def test_batches_of_several_lengths_are_scored_together(kind: str) -> None:
    _, _, found = influence(kind)
    batches = [data(kind, 3, 5, 8), data(kind, 2, 6, 2), data(kind, 1, 7, 1), data(kind, 2, 8, 12)]
    whole = found.scores(batches, query_rank=3)
    for start, batch in zip((0, 3, 5, 6), batches, strict=True):
        alone, part = found.scores(batch, query_rank=3), slice(start, start + len(batch[0]))
        torch.testing.assert_close(whole.values[part], alone.values, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(whole.error()[part], alone.error(), rtol=1e-9, atol=1e-12)
    order = [torch.tensor([6, 0, 3]), torch.tensor([4, 7]), torch.tensor([1]), torch.tensor([2, 5])]
    numbered = [(*batch, rows) for batch, rows in zip(batches, order, strict=True)]
    mixed = found.scores(numbered, query_rank=3)
    places = torch.cat(order)
    torch.testing.assert_close(mixed.values[places], whole.values)
    torch.testing.assert_close(mixed.error()[places], whole.error())


def test_chosen_rows_and_other_measurements() -> None:
    _, _, found = influence("lookup")
    queries, rows = data("lookup", 4, 2), torch.tensor([17, 2, 9])
    whole = found.scores(queries, query_rank=2)
    few = found.scores(queries, rows=rows, query_rank=2)
    torch.testing.assert_close(few.values, whole.values[:, [2, 9, 17]])
    torch.testing.assert_close(few.error(), whole.error()[:, [2, 9, 17]])

    def nothing(outputs: Tensor, batch: Any) -> Tensor:
        return 0 * outputs.sum((1, 2))

    zero = Influence(found.objective, nothing, matrix=found.system.matrix, damping=0.02)
    scores = zero.scores(queries, query_rank=2)
    assert bool((scores.values == 0).all())
    assert bool((scores.error() == 0).all())
    assert scores.solves["truncation_error"] == 0.0


def test_one_query_and_single_precision() -> None:
    model, train, found = influence("lookup")
    queries = data("lookup", 1, 2)
    truth = found.scores(queries, query_rank=2)
    single = Objective(model.float(), "cross_entropy", train)
    fast = Influence(single, matrix=EKFAC(single, "exact"), damping=0.02)
    scores = fast.scores(queries, query_rank=2)
    assert scores.values.dtype == torch.float32
    torch.testing.assert_close(
        scores.values.double(), truth.values, rtol=1e-3, atol=1e-4 * truth.values.abs().max()
    )


def test_scores_go_to_a_file_and_back(tmp_path: Path) -> None:
    _, _, found = influence("lookup")
    scores = found.scores(data("lookup", 4, 2), query_rank=2)
    scores.save(tmp_path / "scores.safetensors")
    again = type(scores).load(tmp_path / "scores.safetensors")
    assert torch.equal(again.error(), scores.error())
    assert again.certificate() == scores.certificate()


class KilledError(Exception):
    """Stands for a signal."""


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layered, "SECONDS_BETWEEN_PIECES", 0.0)
    _, _, found = influence("lookup")
    queries = data("lookup", 4, 2)
    truth = found.scores(queries, query_rank=2)
    for stop in (1, 2, 3):
        calls: list[str] = []

        def progress(stage: str, fraction: float, stop: int = stop, calls: Any = calls) -> None:
            calls.append(stage)
            if len(calls) == stop:
                raise KilledError

        given: dict[str, Any] = {"matrix": found.system.matrix, "damping": 0.02}
        killed = Influence(found.objective, progress=progress, **given)
        with pytest.raises(KilledError):
            killed.scores(queries, query_rank=2, folder=tmp_path / f"{stop}")
        again = found.scores(queries, query_rank=2, folder=tmp_path / f"{stop}")
        assert torch.equal(again.values, truth.values)
        assert torch.equal(again.error(), truth.error())
    with pytest.raises(DataError, match="query_rank was 2 and is 3"):
        found.scores(queries, query_rank=3, folder=tmp_path / "1")
    with pytest.raises(DataError, match="query_rank was 2 and is None"):
        found.scores(queries, folder=tmp_path / "1")


def test_bad_input() -> None:
    _, train, found = influence("lookup")
    queries = data("lookup", 4, 2)
    with pytest.raises(ArgumentError, match="query_rank is 0"):
        found.scores(queries, query_rank=0)
    with pytest.raises(ArgumentError, match="query_rank is -1"):
        found.forecast(queries, query_rank=-1)
    objective, matrix = found.objective, found.system.matrix
    for other in (
        Influence(objective, damping=0.1),
        Influence(objective, "loss", CG(), matrix=matrix, damping=0.1),
        Influence(objective, matrix=lambda _: matrix + matrix, damping=0.1),
    ):
        with pytest.raises(ArgumentError, match="matrix='kfac'"):
            other.scores(queries, query_rank=2)
    many = data("lookup", 2000, 3)
    tight = Influence(objective, matrix=matrix, damping=0.1, memory=1_500_000)
    with pytest.raises(BudgetError, match="2000 queries of rank 2"):
        tight.scores(many, query_rank=2)
    pictures, labels = data("picture", 3, 2)
    pictures[1, 0, 0, 0] = torch.nan
    _, _, other = influence("picture")
    with pytest.raises(NonFiniteError, match="batch 0"):
        other.scores((pictures, labels), query_rank=2)
    assert len(train[0]) == 20


def test_what_the_forecast_counts_is_what_is_held() -> None:
    _, _, found = influence("lookup")
    queries = data("lookup", 6, 2, length=14)
    at = {rank: found.forecast(queries, query_rank=rank).memory for rank in (None, 1, 3, 50)}
    assert at[1] < at[3] < at[50] < at[None]
    # Per query and rank: the matrices [9, 10] and [15, 10]; the columns of 14 tokens, always.
    assert at[3] - at[1] == 6 * 8 * 2 * (9 + 10 + 15 + 10)
    assert at[50] - at[3] == 6 * 8 * (9 * 10 - 3 * 19 + 15 * 10 - 3 * 25)


# ------------------------------------------------------------------- the forms by themselves


def block(p: int, m: int, one_hot: bool = False, seed: int = 0) -> EigenBlock:
    gen = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=gen, dtype=torch.float64)).Q for n in (p, m)
    )
    moments = torch.rand(p, m, generator=gen, dtype=torch.float64) ** 4
    place = MatrixBlock("layer", p=p, m=m, weight=None, one_hot=one_hot)
    inverse = 1 / (moments + 0.01)
    return EigenBlock(place, left, None if one_hot else right, inverse, moments)


def some(eigen: EigenBlock, count: int, length: int, seed: int) -> MatrixGradients:
    gen = torch.Generator().manual_seed(seed)
    place = eigen.block
    g = torch.randn(count, length, place.p, generator=gen, dtype=torch.float64)
    if place.one_hot:
        return MatrixGradients(place, torch.randint(place.m, (count, length), generator=gen), g)
    a = torch.randn(count, length, place.m, generator=gen, dtype=torch.float64)
    return MatrixGradients(place, a, g)


def solved(eigen: EigenBlock, gradients: MatrixGradients) -> Tensor:
    D = gradients.dense().view(len(gradients), eigen.block.p, eigen.block.m)
    left, right = (
        torch.eye(n).double() if side is None else side
        for n, side in zip(eigen.inverse.shape, (eigen.left, eigen.right), strict=True)
    )
    return left @ ((left.T @ D @ right) * eigen.inverse) @ right.T


@pytest.mark.parametrize("length", [1, 4])
def test_exact_forms(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    eigen = block(6, 7)
    asked, shown = some(eigen, 5, length, 1), some(eigen, 9, 3, 2)
    X = solved(eigen, asked)
    truth = X.flatten(1) @ shown.dense().T
    queries = MatrixQueries(eigen, asked)
    for step in (1, 3, 100):
        monkeypatch.setattr(query_forms, "_BYTES", 6 * 7 * 8 * step)
        torch.testing.assert_close(FactorQueries(queries).scores(shown), truth)
    dense = DenseQueries(queries.matrices())
    torch.testing.assert_close(dense.scores(shown), truth)
    torch.testing.assert_close(dense.matrices, X)


def test_columns_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    eigen = block(5, 20, one_hot=True)
    asked, shown = some(eigen, 4, 6, 1), some(eigen, 8, 7, 2)
    queries = TokenQueries.of(eigen, asked)
    X = solved(eigen, asked)
    truth = X.flatten(1) @ shown.dense().T
    for nbytes in (1, 12 * 5 * 8 * 3, 2**20):
        monkeypatch.setattr(query_forms, "_BYTES", nbytes)
        torch.testing.assert_close(queries.scores(shown), truth)
    strangers = MatrixGradients(eigen.block, torch.full((3, 2), 19), shown.grads[:3, :2])
    asked.inputs.clamp_(max=18)
    none = TokenQueries.of(eigen, asked).scores(strangers)
    assert torch.equal(none, torch.zeros(4, 3).double())


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("length", [1, 30])
def test_factors_and_matrices_give_the_same(
    one_hot: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    eigen = block(30, 40, one_hot)
    queries = LowRankQueries.of(MatrixQueries(eigen, some(eigen, 7, 35, 1)), 6)
    shown = some(eigen, 9, length, 2)
    X = torch.einsum("pqr,mqr->qpm", queries.left, queries.right)
    truth = X.flatten(1) @ shown.dense().T
    for nbytes in (1, 30 * 40 * 8 * 3, 2**27):
        monkeypatch.setattr(query_forms, "_BYTES", nbytes)
        torch.testing.assert_close(queries.scores(shown), truth)
        torch.testing.assert_close(queries._by_factors(shown), truth)
    error = (X - solved(eigen, some(eigen, 7, 35, 1))).flatten(1).norm(dim=1)
    torch.testing.assert_close(queries.error, error)
    assert queries.rank == 6


@pytest.mark.parametrize("shape", [(90, 120), (120, 90), (20, 200)])
def test_the_leading_part_is_near_the_best_there_is(shape: tuple[int, int]) -> None:
    gen = torch.Generator().manual_seed(0)
    p, m = shape
    U, V = (torch.linalg.qr(torch.randn(n, min(shape), generator=gen).double()).Q for n in shape)
    values = 1 / torch.arange(1, min(shape) + 1).double()  # a slow decay
    Y = (U * values) @ V.T
    for rank in (1, 5, 20):
        left, right = leading(Y, rank)
        assert left.shape == (p, rank)
        assert right.shape == (m, rank)
        best = values[rank:].norm()
        assert best * (1 - 1e-12) <= (Y - left @ right.T).norm() <= 1.02 * best + 1e-12


def test_what_has_less_than_the_rank() -> None:
    zero = leading(torch.zeros(60, 70).double(), 8)
    assert all(bool((side == 0).all()) for side in zero)
    assert [side.shape for side in zero] == [(60, 8), (70, 8)]
    a, b = torch.randn(60).double(), torch.randn(70).double()
    left, right = leading(torch.outer(a, b), 8)
    torch.testing.assert_close(left @ right.T, torch.outer(a, b))
    left, right = leading(torch.outer(a[:5], b[:4]), 6)
    assert (left.shape, right.shape) == ((5, 6), (4, 6))
    torch.testing.assert_close(left @ right.T, torch.outer(a[:5], b[:4]))
