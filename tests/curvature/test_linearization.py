from __future__ import annotations

import gc

import pytest
import torch
from tests.curvature.peak import PeakMemory
from tests.curvature.reference import apart, classification, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from woodbury import Fisher, GaussNewton, Hessian, Jacobian, Objective
from woodbury.curvature import memory
from woodbury.operators import memory as operators_memory

F64 = torch.float64
KINDS = {
    "hessian": Hessian,
    "gauss-newton": GaussNewton,
    "empirical": lambda o, cache="auto": Fisher(o, "empirical", cache=cache),
    "jacobian": lambda o, cache="auto": Jacobian(o, cache=cache),
}


def setting(sizes=(3, 5, 2), count: int = 4):
    model = network(sizes)
    batches = [classification(6, sizes[0], sizes[-1]) for _ in range(count)]
    return model, batches, Objective(model, "cross_entropy", batches)


@pytest.mark.parametrize("kind", KINDS)
class TestBudget:
    def test_as_many_batches_are_kept_as_fit(self, kind: str) -> None:
        _, _, objective = setting()
        x = torch.ones(objective.space.dim, dtype=F64)
        whole = KINDS[kind](objective)
        expected = whole @ x
        full = whole.cache_report()
        assert (full.cached, full.streamed) == (4, 0)
        each = full.nbytes // 4
        for budget, kept in [(4 * each, 4), (4 * each - 1, 3), (each, 1), (each - 1, 0), (0, 0)]:
            operator = KINDS[kind](objective, cache=budget)
            for _ in range(2):
                assert apart(operator @ x, expected) < 1e-12
            report = operator.cache_report()
            assert (report.cached, report.streamed) == (kept, 4 - kept)
            assert report.nbytes == kept * each
            assert report.budget == budget

    def test_what_is_counted_is_what_is_kept(self, kind: str) -> None:
        _, _, objective = setting((3, 40, 41, 2))
        x = torch.ones(objective.space.dim, dtype=F64)
        objective.value()
        with PeakMemory() as peak:
            operator = KINDS[kind](objective)
            _ = operator @ x
            del _
            gc.collect()
            live = peak.live
        counted = operator.cache_report().nbytes
        assert counted <= live
        # beside it: small tensors such as targets and the output curvature
        assert live - counted < 0.15 * counted + 10_000

    def test_nothing_is_kept_when_off(self, kind: str) -> None:
        _, _, objective = setting((3, 40, 41, 2))
        x = torch.ones(objective.space.dim, dtype=F64)
        objective.value()
        operator = KINDS[kind](objective, cache="off")
        _ = operator @ x
        with PeakMemory() as peak:
            _ = operator @ x
            del _
            gc.collect()
            assert peak.live == 0

    def test_a_loader_that_shuffles_with_indices(self, kind: str) -> None:
        model = network((3, 5, 2))
        x, y = classification(11, 3, 2)
        weights = torch.rand(11, dtype=F64)
        plain = KINDS[kind](Objective(model, "cross_entropy", (x, y), weights=weights))
        loader = DataLoader(TensorDataset(x, y, torch.arange(11)), batch_size=3, shuffle=True)
        v = torch.randn(plain.shape[1], dtype=F64)
        for cache in ("auto", 1000, 0):
            objective = Objective(model, "cross_entropy", loader, weights=weights)
            operator = KINDS[kind](objective, cache=cache)
            for _ in range(2):
                assert apart(operator @ v, plain @ v) < 1e-12

    def test_kept_batches_do_not_ask_for_data(self, kind: str) -> None:
        class Source:
            passes = 0

            def __iter__(self):
                Source.passes += 1
                return iter(batches)

        model, batches, _ = setting()
        operator = KINDS[kind](Objective(model, "cross_entropy", Source()))
        v = torch.ones(operator.shape[1], dtype=F64)
        _ = operator @ v
        before = Source.passes
        _ = operator @ v
        assert Source.passes == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["auto", 0])
def test_products_under_no_grad(kind: str, cache) -> None:
    _, _, objective = setting()
    operator = KINDS[kind](objective, cache=cache)
    x = torch.randn(objective.space.dim, dtype=F64)
    expected = KINDS[kind](objective) @ x
    with torch.no_grad():
        for _ in range(2):
            assert apart(operator @ x, expected) < 1e-12
        assert objective.gradient().abs().max() > 0
        gradients = torch.cat([g for _, g in objective.per_example_gradients()])
        assert gradients.abs().max() > 0


class TestReport:
    def test_words(self) -> None:
        _, _, objective = setting()
        x = torch.ones(objective.space.dim, dtype=F64)
        operator = Hessian(objective)
        assert str(operator.cache_report()).startswith("Nothing is linearised before the first")
        _ = operator @ x
        words = str(operator.cache_report())
        assert words.startswith("4 of 4 batches are kept linearised, in ")
        assert "(half of the " in words
        assert words.endswith("Products differentiate the kept graph of the gradient.")

    def test_words_for_a_budget_that_is_too_small(self) -> None:
        _, _, objective = setting()
        x = torch.ones(objective.space.dim, dtype=F64)
        each = Hessian(objective)
        _ = each @ x
        operator = Hessian(objective, cache=int(1.5 * each.cache_report().nbytes / 4))
        _ = operator @ x
        words = str(operator.cache_report())
        assert "1 of 4 batches are kept linearised" in words
        assert "3 are recomputed at every product: batch 1 takes" in words
        assert "(as asked)" in words

    def test_words_when_off(self) -> None:
        _, _, objective = setting()
        operator = GaussNewton(objective, cache="off")
        _ = operator @ torch.ones(objective.space.dim, dtype=F64)
        words = str(operator.cache_report())
        assert "0 of 4 batches" in words
        assert "cache is off" in words


class TestPeak:
    """Memory of the products themselves, counted."""

    def gradient(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
        with PeakMemory() as peak:
            loss = nn.functional.cross_entropy(model(x), y)
            torch.autograd.grad(loss, list(model.parameters()))
        return peak.bytes

    def test_a_kept_hessian_needs_at_most_three_times_the_gradient(self) -> None:
        model = network((64, 48, 48, 10), nn.ReLU)
        x, y = classification(256, 64, 10)
        base = self.gradient(model, x, y)
        objective = Objective(model, "cross_entropy", (x, y))
        objective.value()
        v = torch.randn(objective.space.dim, dtype=F64)
        with PeakMemory() as peak:
            H = Hessian(objective)
            _ = H @ v
            _ = H @ v
        assert peak.bytes < 3 * base

    @pytest.mark.parametrize("kind", ["hessian", "gauss-newton", "empirical"])
    def test_streaming_needs_no_more_for_more_batches(self, kind: str) -> None:
        peaks = []
        for count in (2, 6):
            _, _, objective = setting((16, 40, 41, 3), count)
            objective.value()
            operator = KINDS[kind](objective, cache="off")
            v = torch.randn(objective.space.dim, dtype=F64)
            _ = operator @ v
            with PeakMemory() as peak:
                _ = operator @ v
            peaks.append(peak.bytes)
        assert peaks[1] <= 1.05 * peaks[0]


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = 2 * x
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class TestMemory:
    def test_auto_is_half_of_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(operators_memory, "_kernel_bytes", lambda: 3000)
        monkeypatch.setattr(operators_memory, "_group_bytes", lambda: None)
        _, _, objective = setting()
        operator = Hessian(objective)
        _ = operator @ torch.ones(objective.space.dim, dtype=F64)
        report = operator.cache_report()
        assert report.budget == 1500
        assert report.nbytes <= 1500
        assert 0 < report.streamed < 4 or report.cached == 0

    @pytest.mark.parametrize("shows_data", [True, False])
    def test_graphs_of_custom_functions(
        self, shows_data: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memory, "_SHOWS_DATA", shows_data)
        x = torch.randn(100, dtype=F64, requires_grad=True)
        parts = torch.stack([Double.apply(x).exp(), x])  # keeps 2 x, exp(2 x)
        assert memory.graph_bytes([parts.sum()], [x]) == 800 + 800 + 8

    def test_graphs(self) -> None:
        x = torch.randn(100, dtype=F64, requires_grad=True)
        y = x.exp()  # keeps its result
        z = y.sin().sum()  # keeps y again
        assert memory.graph_bytes([z]) == 800 + 8
        assert memory.graph_bytes([z], [y]) == 8
        assert memory.graph_bytes([x.detach()]) == 800
