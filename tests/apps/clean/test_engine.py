"""The loop: it finds planted errors, keeps its promises, and resumes to the same result."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from woodbury.apps.clean import engine
from woodbury.apps.clean.checkpoint import Checkpoint, State
from woodbury.apps.clean.engine import EngineResult, new_weights, run
from woodbury.errors import ArgumentError, BudgetError, DataError


def clouds(n: int = 240, C: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, true and given classes (15 % wrong)."""
    draw = np.random.default_rng(seed)
    centers = draw.normal(size=(C, 4)) * 3
    truth = draw.integers(0, C, n)
    X = (centers[truth] + draw.normal(size=(n, 4))).astype(np.float32)
    wrong = draw.random(n) < 0.15
    given = np.where(wrong, (truth + draw.integers(1, C, n)) % C, truth)
    return X, truth, given


def curve(n: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    X = draw.uniform(-3, 3, size=(n, 2)).astype(np.float32)
    truth = 50 + 10 * np.sin(X[:, 0]) + 3 * X[:, 1]
    given = truth + 0.3 * draw.normal(size=n)
    wrong = draw.random(n) < 0.08
    given[wrong] = draw.permutation(given)[wrong]
    return X, truth, given


def classify(X: np.ndarray, y: np.ndarray, C: int, **options: Any) -> EngineResult:
    return run(X, y, task="classification", n_classes=C, **options)


@pytest.mark.parametrize("model", ["linear", "kernel", "mlp", "auto"])
def test_planted_wrong_classes_are_found(model: str) -> None:
    X, truth, given = clouds()
    found = classify(X, given, 3, model=model)
    wrong = given != truth
    assert average_precision_score(wrong, found.error_probability) > 0.95
    assert (found.suggested == truth).mean() > 0.95
    assert found.error_probability.mean() == pytest.approx(wrong.mean(), abs=0.05)
    assert ((found.weight >= 0) & (found.weight <= 1)).all()
    assert found.weight[wrong].mean() < 0.3 < 0.8 < found.weight[~wrong].mean()
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-9)
    certificate = found.certificate
    assert certificate["relative_residual"] < 1e-4
    assert certificate["rounds"] == len(found.history)
    assert certificate["settled"] in (True, False)
    candidates = {"linear", "kernel", "mlp"} if model == "auto" else {model}
    assert set(certificate["held_out_score_by_model"]) == candidates
    assert certificate["model"] in candidates


@pytest.mark.parametrize("model", ["linear", "kernel", "mlp"])
def test_planted_wrong_quantities_are_found(model: str) -> None:
    X, truth, given = curve()
    found = run(X, given, task="regression", n_classes=0, model=model)
    far = np.abs(given - truth) > 3
    assert average_precision_score(far, found.error_probability) > (
        0.4 if model == "linear" else 0.9
    )
    assert found.probabilities is None
    if model != "linear":
        assert np.median(np.abs(found.suggested - truth)) < 1.0


def test_an_absurd_quantity_is_found_and_hides_no_other() -> None:
    X, truth, given = curve()
    given[7] = 1e9
    found = run(X, given, task="regression", n_classes=0, model="kernel")
    assert found.error_probability[7] > 0.99
    others = np.abs(given - truth) > 3
    assert average_precision_score(others, found.error_probability) > 0.9


def test_auto_takes_the_best_held_out_score() -> None:
    X, _, given = clouds(n=90)
    certificate = classify(X, given, 3, model="auto").certificate
    scores = certificate["held_out_score_by_model"]
    assert certificate["model"] == min(scores, key=scores.get)


def test_same_seed_same_result() -> None:
    X, _, given = clouds(n=90)
    first, second = (classify(X, given, 3, model="mlp", seed=3) for _ in range(2))
    assert np.array_equal(first.error_probability, second.error_probability)


class InterruptedRunError(Exception):
    pass


@pytest.mark.parametrize("model", ["linear", "kernel", "mlp"])
@pytest.mark.parametrize("where", ["round 1", "tuning again", "round 3"])
def test_resumed_run_ends_where_an_undisturbed_one_does(
    tmp_path: Path, model: str, where: str
) -> None:
    X, _, given = clouds(n=120, seed=2)
    stages: list[str] = []

    def kill(stage: str, fraction: float) -> None:
        stages.append(stage)
        if stage == where and fraction > 0:
            raise InterruptedRunError

    def note(stage: str, fraction: float) -> None:
        stages.append(stage)

    whole = classify(X, given, 3, model=model)
    path = tmp_path / "checkpoint"
    with contextlib.suppress(InterruptedRunError):  # some runs end before that stage
        classify(X, given, 3, model=model, progress=kill, checkpoint=path)
    stages.clear()
    resumed = classify(
        X,
        given,
        3,
        model=model,
        checkpoint=path,
        resume=True,
        progress=lambda s, f: stages.append(s),
    )
    assert "choosing the model" not in stages
    assert np.array_equal(resumed.error_probability, whole.error_probability)
    assert np.array_equal(resumed.weight, whole.weight)
    assert resumed.history == whole.history
    assert resumed.certificate == whole.certificate


def test_without_a_checkpoint_resume_begins_anew(tmp_path: Path) -> None:
    X, _, given = clouds(n=60)
    path = tmp_path / "checkpoint"
    fresh = classify(X, given, 3, model="linear", checkpoint=path, resume=True)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"cut short")
    again = classify(X, given, 3, model="linear", checkpoint=path, resume=True)
    assert np.array_equal(fresh.weight, again.weight)


def test_checkpoint_returns_what_was_stored(tmp_path: Path) -> None:
    store = Checkpoint(tmp_path / "state")
    assert store.load(3) is None
    state = State(
        "linear", {"penalty": 0.1}, {"linear": 1.0}, 1, torch.rand(3).double(), [{"a": 1}]
    )
    store.save(state)
    found = store.load(3)
    assert found is not None
    assert (found.model, found.settings, found.history) == ("linear", {"penalty": 0.1}, [{"a": 1}])
    assert torch.equal(found.weights, state.weights)
    assert found.error is None
    assert store.load(4) is None  # of another table
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_trusted_rows_are_right_and_count_fully() -> None:
    X, truth, given = clouds(seed=4)
    trusted = (given == truth) & (np.arange(len(given)) % 3 == 0)
    for model in ("linear", "kernel"):
        found = classify(X, given, 3, model=model, trusted=trusted)
        assert (found.error_probability[trusted] == 0).all()
        assert (found.weight[trusted] == 1).all()
        wrong = given != truth
        assert average_precision_score(wrong, found.error_probability) > 0.95


def test_trusted_rows_overrule_a_wrong_majority() -> None:
    """Most of one region is mislabeled alike: only trusted rows can tell."""
    draw = np.random.default_rng(0)
    X = draw.normal(size=(400, 2)).astype(np.float32)
    truth = (X[:, 0] > 0).astype(int)
    wrong = (X[:, 0] > 0) & (X[:, 1] > 0) & (draw.random(400) < 0.7)
    given = np.where(wrong, 0, truth)
    trusted = ~wrong & (draw.random(400) < 0.25)
    alone = classify(X, given, 2, model="kernel")
    helped = classify(X, given, 2, model="kernel", trusted=trusted)
    scores = [average_precision_score(wrong, found.error_probability) for found in (alone, helped)]
    assert scores[1] > scores[0] + 0.1


def test_new_weights_are_posterior_odds_times_what_the_row_does_to_others() -> None:
    X, _, given = clouds(n=50)
    data, _ = engine._data(X, given, "classification", 3, 0, 2**30, None)
    error = torch.linspace(0.1, 0.9, 50).double()

    class Held:
        def weight_hypergradient(self, slopes: torch.Tensor) -> torch.Tensor:
            return slopes[:, 0]

    slopes = torch.full((50, 3), 0.5).double()
    judged = engine.Judgement(error, error, slopes, error, None)
    found = new_weights(data, Held(), judged)  # type: ignore[arg-type]
    odds = found / (1 - found)
    torch.testing.assert_close(odds, (1 - error) / error * np.exp(-0.25))


@pytest.mark.parametrize("model", ["linear", "kernel", "mlp"])
@pytest.mark.parametrize(
    ("n", "C"), [(12, 2), (50, 10), (40, 2)], ids=["tiny", "five rows a class", "two classes"]
)
def test_small_tables_do_not_break(model: str, n: int, C: int) -> None:
    X, _, given = clouds(n, C)
    found = classify(X, given, C, model=model)
    assert np.isfinite(found.error_probability).all()
    assert ((found.error_probability >= 0) & (found.error_probability <= 1)).all()


@pytest.mark.parametrize("model", ["linear", "kernel"])
def test_rare_classes_and_equal_rows_do_not_break(model: str) -> None:
    X, truth, _ = clouds(120)
    X[:30] = X[0]
    given = truth.copy()
    given[:30] = 0
    given[50] = 3  # the only row of its class
    given[51] = 3
    found = classify(X, given, 4, model=model)
    assert np.isfinite(found.error_probability).all()
    assert found.error_probability[50] > 0.3


def test_constant_columns_and_targets_do_not_break() -> None:
    X = np.zeros((40, 3), dtype=np.float32)
    y = np.arange(40) % 2
    found = classify(X, y, 2, model="linear")
    assert np.isfinite(found.error_probability).all()
    target = np.full(40, 3.0)
    target[5] = 4.0
    X[:, 0] = np.arange(40)
    flat = run(X, target, task="regression", n_classes=0, model="linear")
    assert flat.error_probability.argmax() == 5


def test_progress_runs_from_stage_to_stage() -> None:
    X, _, given = clouds(n=60)
    seen: list[tuple[str, float]] = []
    classify(X, given, 3, model="linear", progress=lambda s, f: seen.append((s, f)))
    assert all(0 <= fraction <= 1 for _, fraction in seen)
    names = list(dict.fromkeys(stage for stage, _ in seen))
    assert names[:4] == ["choosing the model", "round 1", "tuning again", "round 2"]


def test_mistakes_are_named() -> None:
    X, _, given = clouds(n=30)
    with pytest.raises(ArgumentError, match="task is 'ranking'"):
        run(X, given, task="ranking", n_classes=3)
    with pytest.raises(ArgumentError, match="model is 'forest'"):
        classify(X, given, 3, model="forest")
    with pytest.raises(DataError, match="the table has 1 rows"):
        classify(X[:1], given[:1], 3)
    with pytest.raises(DataError, match="1 classes; at least two"):
        classify(X, given * 0, 1)
    with pytest.raises(BudgetError, match="30 rows and 3 classes take .* Raise --budget"):
        classify(X, given, 3, budget_bytes=7000)
