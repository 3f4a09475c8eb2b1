"""One penalty per feature: scikit-learn's checks, exact identities, differences."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.linear_model
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris, load_wine
from sklearn.model_selection import GridSearchCV, ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor

from woodbury import CG
from woodbury.bilevel import TunedElasticNet, TunedLogisticRegression, TunedRidge
from woodbury.bilevel.tuned.elastic_net import ElasticNet, ElasticNetFolds
from woodbury.bilevel.tuned.logistic import LogisticFolds, Softmax, contrasts
from woodbury.bilevel.tuned.ridge import RidgeFolds, RidgeLeaveOneOut, Squares
from woodbury.bilevel.tuned.search import PenaltySearch
from woodbury.errors import ArgumentError, DataError
from woodbury.implicit import attach, prox_elastic_net, proximal_gradient

DOUBLE = torch.float64
KINDS = [TunedRidge, TunedElasticNet, TunedLogisticRegression]
X, Y = load_diabetes(return_X_y=True)
X, Y = X[:120], Y[:120]
FLOWERS, KIND = load_iris(return_X_y=True)


@parametrize_with_checks(
    [TunedRidge(), TunedRidge(cv=3), TunedElasticNet(), TunedLogisticRegression()]
)
def test_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


def draw(n: int = 30, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=DOUBLE)
    noise = torch.randn(n, generator=generator, dtype=DOUBLE)
    return rows, rows[:, 0] - 2 * rows[:, 1] + 0.5 * noise + 3


def by_differences(problem: Any, alpha: Tensor) -> Tensor:
    found, h = torch.zeros_like(alpha), 1e-4
    for j in range(len(alpha)):
        move = torch.zeros_like(alpha)
        move[j] = h
        up, down = (problem.evaluate(alpha * (s * move).exp())[0] for s in (1, -1))
        found[j] = (up - down) / (2 * h)
    return found


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("shape", [(30, 5), (10, 40)])
def test_leave_one_out_is_that_of_refits(intercept: bool, shape: tuple[int, int]) -> None:
    rows, y = draw(*shape)
    alpha = torch.logspace(-3, 0, shape[1], dtype=DOUBLE)
    problem = RidgeLeaveOneOut(Squares.of(rows, y, intercept), intercept, None)
    n = len(y)
    errors = []
    for i in range(n):
        keep = torch.arange(n) != i
        A = torch.cat([rows[keep], torch.ones(n - 1, 1)], 1) if intercept else rows[keep]
        # The mean of n rows: leaving one out divides the sum over the others by n as well.
        penalty = torch.cat([alpha, torch.zeros(1)]) if intercept else alpha
        w = torch.linalg.solve(A.mT @ A + n * torch.diag(penalty), A.mT @ y[keep])
        full = torch.cat([rows[i], torch.ones(1)]) if intercept else rows[i]
        errors.append((y[i] - full @ w).item())
    expected = float(np.mean(np.square(errors)))
    value, gradient = problem.evaluate(alpha)
    assert abs(value / expected - 1) < 1e-10
    error = gradient - by_differences(problem, alpha)
    assert error.abs().max() < 1e-6 * gradient.abs().max()


def test_the_woodbury_identity_and_the_gram_matrix_agree() -> None:
    rows, y = draw(10, 40)
    alpha = torch.logspace(-3, 0, 40, dtype=DOUBLE)
    squares = Squares.of(rows, y, True)
    wide = squares.coefficients(alpha, None)
    matrix = squares.X.mT @ squares.X / 10 + torch.diag(alpha)
    expected = torch.linalg.solve(matrix, squares.X.mT @ squares.y / 10)
    torch.testing.assert_close(wide, expected, rtol=1e-10, atol=1e-12)
    by_cg = squares.coefficients(alpha, CG(rtol=1e-12))
    torch.testing.assert_close(by_cg, expected, rtol=1e-8, atol=1e-10)


def folds(count: int) -> list[tuple[Tensor, Tensor]]:
    order = torch.arange(count)
    return [(order[order % 3 != k], order[order % 3 == k]) for k in range(3)]


def test_hypergradients_of_folds_by_differences() -> None:
    rows, y = draw()
    alpha = torch.logspace(-2, -0.5, 5, dtype=DOUBLE)
    ridge = RidgeFolds(
        [(Squares.of(rows[a], y[a], True), rows[b], y[b]) for a, b in folds(30)], None
    )
    net = ElasticNetFolds(
        [
            (ElasticNet(Squares.of(rows[a], y[a], True), 0.5, None), rows[b], y[b])
            for a, b in folds(30)
        ]
    )
    classes = torch.eye(3, dtype=DOUBLE)[(y.argsort().argsort() // 10)]
    ones = torch.cat([rows, torch.ones(30, 1)], 1)
    soft = LogisticFolds(
        [(Softmax(ones[a], classes[a], True, None), ones[b], classes[b]) for a, b in folds(30)]
    )
    for problem in (ridge, net, soft):
        _, gradient = problem.evaluate(alpha)
        assert gradient.norm() > 1e-4
        error = gradient - by_differences(problem, alpha)
        assert error.abs().max() < 1e-6 * gradient.abs().max()


def test_elastic_net_is_scikit_learns_and_its_derivative_that_of_the_proximal_condition() -> None:
    rows, y = draw(25, 8)
    alpha = torch.full((8,), 0.3, dtype=DOUBLE)
    net = ElasticNet(Squares.of(rows, y, True), 0.6, None)
    w = net.coefficients(alpha)
    peer = sklearn.linear_model.ElasticNet(alpha=0.3, l1_ratio=0.6, tol=1e-14, max_iter=100_000)
    np.testing.assert_allclose(w.numpy(), peer.fit(rows.numpy(), y.numpy()).coef_, atol=1e-8)
    assert 0 < int((w != 0).sum()) < 8
    gram, slope = net.gram, net.slope

    def smooth(w: Tensor, theta: Tensor) -> Tensor:
        return 0.5 * w @ (gram @ w) - slope @ w + 0 * theta.sum()

    leaf = alpha.clone().requires_grad_()
    F = proximal_gradient(smooth, prox_elastic_net, 0.3)
    attached = attach(F, w, torch.zeros(1, dtype=DOUBLE), 0.6 * leaf, 0.4 * leaf)
    weights = torch.arange(8, dtype=DOUBLE)
    (expected,) = torch.autograd.grad(attached @ weights, leaf)
    q = net.on_support(w, alpha, weights)
    torch.testing.assert_close(-q * (0.6 * w.sign() + 0.4 * w), expected, rtol=1e-8, atol=1e-10)


def test_elastic_net_on_a_path_with_columns_that_depend_on_each_other() -> None:
    rows, y = draw(25, 8)
    rows = torch.cat([rows, rows[:, :3] + rows[:, 3:6], torch.zeros(25, 1)], 1)
    net = ElasticNet(Squares.of(rows, y, True), 0.9, None)
    for a in torch.logspace(0.5, -4, 12, dtype=DOUBLE):
        w = net.coefficients(a.expand(12))
        peer = sklearn.linear_model.ElasticNet(alpha=a.item(), l1_ratio=0.9, tol=1e-14)
        peer.set_params(max_iter=1_000_000).fit(rows.numpy(), y.numpy())
        np.testing.assert_allclose(w.numpy(), peer.coef_, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_is_scikit_learns(classes: int) -> None:
    keep = classes > KIND
    n = int(keep.sum())
    rows, labels = FLOWERS[keep], KIND[keep]
    # Bounds this close leave one shared penalty.
    model = TunedLogisticRegression(bounds=(0.01, 0.0100001), cv=3).fit(rows, labels)
    scaler = StandardScaler().fit(rows)
    peer = sklearn.linear_model.LogisticRegression(C=100 / n, tol=1e-10, max_iter=10_000)
    peer.fit(scaler.transform(rows), labels)
    np.testing.assert_allclose(model.coef_ * model.scale_, peer.coef_, atol=1e-4)
    expected = peer.predict_proba(scaler.transform(rows))
    np.testing.assert_allclose(model.predict_proba(rows), expected, atol=1e-4)
    assert (model.predict(rows) == peer.predict(scaler.transform(rows))).all()


def test_contrasts_span_what_sums_to_zero() -> None:
    for classes in (3, 7):
        Q = contrasts(classes)
        torch.testing.assert_close(Q.mT @ Q, torch.eye(classes - 1, dtype=DOUBLE))
        assert Q.sum(0).abs().max() < 1e-14


@pytest.mark.parametrize("cv", [None, 3])
def test_equal_penalties_are_scikit_learns_ridge(cv: int | None) -> None:
    model = TunedRidge(bounds=(0.1, 0.1000001), cv=cv).fit(X, Y)
    scaler = StandardScaler().fit(X)
    peer = sklearn.linear_model.Ridge(alpha=0.1 * len(Y)).fit(scaler.transform(X), Y)
    np.testing.assert_allclose(model.predict(X), peer.predict(scaler.transform(X)), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_the_search_improves_on_the_shared_penalty(kind: Any, optimizer: str) -> None:
    rng = np.random.default_rng(0)
    rows = np.hstack([X[:, :3], rng.normal(size=(len(X), 6))])
    target = Y if kind is not TunedLogisticRegression else np.where(np.median(Y) < Y, "up", "down")
    model = kind(optimizer=optimizer, max_iter=15, cv=3, random_state=0).fit(rows, target)
    assert model.criterion_ < model.shared_criterion_
    assert model.criterion_path_[0] == pytest.approx(model.shared_criterion_, rel=1e-10)
    assert model.criterion_ in model.criterion_path_
    assert 1 <= model.n_iter_ <= 15
    again = clone(model).fit(rows, target)
    np.testing.assert_array_equal(again.alpha_, model.alpha_)
    np.testing.assert_array_equal(again.coef_, model.coef_)


def test_irrelevant_features_get_larger_penalties() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(150, 30)) * rng.uniform(0.1, 10, 30)
    y = rows[:, :4] @ (1 / rows[:, :4].std(0)) + rng.normal(size=150)
    model = TunedRidge(spread=1e-4).fit(rows, y)
    assert np.median(model.alpha_[4:]) > 10 * model.alpha_[:4].max()
    # The unit of a feature does not matter.
    other = TunedRidge(spread=1e-4).fit(rows * 1e3, y)
    np.testing.assert_allclose(other.predict(rows * 1e3), model.predict(rows), rtol=1e-4)


def test_a_large_spread_leaves_the_shared_penalty() -> None:
    model = TunedRidge(spread=1e8).fit(X, Y)
    np.testing.assert_allclose(model.alpha_, model.shared_alpha_, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_early_stopping_watches_rows_of_their_own(kind: Any) -> None:
    target = Y if kind is not TunedLogisticRegression else np.median(Y) < Y
    model = kind(early_stopping=True, n_iter_no_change=1, random_state=0, max_iter=30)
    short = model.fit(X, target)
    assert short.n_iter_ <= 30
    assert np.isfinite(short.coef_).all()


def test_an_early_stop_ends_where_the_monitor_says() -> None:
    rows, y = draw(40, 6)
    problem = RidgeLeaveOneOut(Squares.of(rows, y, True), True, None)
    seen: list[Tensor] = []

    def monitor(alpha: Tensor) -> float:
        seen.append(alpha)
        return float(len(seen))  # worse with every step

    found = PenaltySearch("lbfgs", 50, 0.0, 0.0, 3).run(problem, 6, (1e-6, 1e3), monitor)
    assert len(found.path) == len(seen) == 4  # the start, and three steps of patience
    torch.testing.assert_close(found.alpha, torch.full((6,), found.shared, dtype=DOUBLE))


def test_validation_split_pipelines_and_grids() -> None:
    split = ShuffleSplit(1, test_size=0.3, random_state=0)
    rows, labels = load_wine(return_X_y=True)
    model = TunedLogisticRegression(cv=split, max_iter=10).fit(rows, labels)
    assert model.score(rows, labels) > 0.95
    assert model.decision_function(rows).shape == (len(rows), 3)
    np.testing.assert_allclose(model.predict_proba(rows).sum(1), 1, rtol=1e-12)
    pipeline = make_pipeline(StandardScaler(), TunedRidge(max_iter=3))
    grid = GridSearchCV(pipeline, {"tunedridge__spread": [1e-3, 1.0]}, cv=2).fit(X, Y)
    assert grid.best_params_["tunedridge__spread"] in (1e-3, 1.0)
    assert model.set_params(spread=0.1).get_params()["spread"] == 0.1


@pytest.mark.parametrize("kind", [TunedRidge, TunedElasticNet])
def test_degenerate_targets_and_features(kind: Any) -> None:
    rows = np.hstack([X[:, :2], np.ones((len(X), 1)), np.zeros((len(X), 1))])
    model = kind(max_iter=3).fit(rows, Y)
    assert (np.abs(model.coef_[2:]) < 1e-9).all()
    flat = kind(max_iter=3).fit(X, np.full(len(X), 7.0))
    np.testing.assert_allclose(flat.predict(X), 7.0, rtol=1e-9)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"bounds": (1.0, 0.1)}, "low < high"),
        ({"bounds": (0.0, 0.1)}, "low < high"),
        ({"optimizer": "newton"}, "optimizer is 'newton'"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"tol": -1.0}, "tol is -1.0"),
        ({"spread": float("nan")}, "spread nan"),
        ({"early_stopping": True, "validation_fraction": 1.5}, "validation_fraction is 1.5"),
        ({"early_stopping": True, "n_iter_no_change": 0}, "n_iter_no_change is 0"),
        ({"cv": 1}, "cv is 1"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_make_no_sense(kind: Any, settings: dict[str, Any], word: str) -> None:
    target = Y if kind is not TunedLogisticRegression else np.median(Y) < Y
    with pytest.raises(ArgumentError, match=word):
        kind(**settings).fit(X, target)


def test_data_that_cannot_be_used() -> None:
    with pytest.raises(ArgumentError, match="l1_ratio is 0"):
        TunedElasticNet(l1_ratio=0).fit(X, Y)
    with pytest.raises(DataError, match="one class only"):
        TunedLogisticRegression().fit(X, np.zeros(len(X)))
    with pytest.raises(DataError, match="smallest class has 1 row"):
        TunedLogisticRegression().fit(X, np.arange(len(X)) == 0)
    halves = [(np.arange(10), np.arange(10, 20))]
    with pytest.raises(DataError, match="no row of one of the classes"):
        TunedLogisticRegression(cv=halves).fit(X[:20], np.arange(20) >= 10)
    with pytest.raises(DataError, match="no fold"):
        TunedRidge(cv=[]).fit(X, Y)


def test_without_scikit_learn_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from woodbury.bilevel import hypergradient\n"
        "try:\n    from woodbury.bilevel import TunedRidge\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "woodbury[app]"' in run.stdout


def test_the_benchmark_runs(root: Path) -> None:
    script = root / "benchmarks" / "tuned_penalties.py"
    command = [sys.executable, str(script), "--small", "--kinds", "ridge"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(run.stdout.splitlines()) == 3  # the header, without and with noise
