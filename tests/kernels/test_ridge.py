"""Kernel ridge regression against refits, dense algebra and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from woodbury.errors import (
    ArgumentError,
    BudgetError,
    NonFiniteError,
    RankError,
    ShapeError,
)
from woodbury.kernels import RBF, KernelRidge, squared_error, tune
from woodbury.kernels.exact import ExactFit, Gram

N, D, C = 24, 3, 2
LANDMARKS = 9


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(N, D, generator=generator, dtype=torch.float64)
    Y = torch.randn(N, C, generator=generator, dtype=torch.float64)
    weights = torch.rand(N, generator=generator, dtype=torch.float64) + 0.05
    return X, Y, weights


def ridge(landmarks: int | None) -> KernelRidge:
    return KernelRidge(RBF(1.3), penalty=0.07, landmarks=landmarks)


def minimizer(K: Tensor, Y: Tensor, weights: Tensor, penalty: float, Kx: Tensor) -> Tensor:
    """The weighted fit from its normal equations, W K a + penalty a = W Y, evaluated at Kx."""
    W = torch.diag(weights)
    alpha = torch.linalg.solve(W @ K + penalty * torch.eye(len(K), dtype=K.dtype), W @ Y)
    return Kx @ alpha


def gaussian(X: Tensor, Z: Tensor) -> Tensor:
    return torch.stack([torch.exp(-((x - Z) ** 2).sum(1) / (2 * 1.3**2)) for x in X])


def refits(X: Tensor, Y: Tensor, weights: Tensor, fit_at) -> Tensor:
    rows = []
    for i in range(len(X)):
        keep = torch.arange(len(X)) != i
        rows.append(fit_at(X[keep], Y[keep], weights[keep], X[i : i + 1])[0])
    return torch.stack(rows)


def test_exact_leave_one_out_equals_refits(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    X, Y, weights = problem
    weights[3] = 1e-7  # takes hardly part: its held-out prediction is the ordinary one
    fit = ridge(None).fit(X, Y, weights)

    def fit_at(x: Tensor, y: Tensor, w: Tensor, new: Tensor) -> Tensor:
        return minimizer(gaussian(x, x), y, w, 0.07, gaussian(new, x))

    expected = refits(X, Y, weights, fit_at)
    torch.testing.assert_close(fit.leave_one_out(), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fit.leave_one_out()[3], fit.predict(X)[3], rtol=1e-5, atol=1e-5)


def test_nystrom_leave_one_out_equals_refits_on_the_same_features(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    X, Y, weights = problem
    weights[3] = 0.0
    settings = ridge(LANDMARKS)
    state = settings.prepare(X)
    fit = settings.fit(X, Y, weights, state=state)
    assert state.features is not None
    Z = state.features.landmarks
    core = gaussian(Z, Z) + 1e-5 * torch.eye(len(Z), dtype=torch.float64)

    def features(x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(
            torch.linalg.cholesky(core), gaussian(x, Z).mT, upper=False
        ).mT

    def fit_at(x: Tensor, y: Tensor, w: Tensor, new: Tensor) -> Tensor:
        phi = features(x)
        A = phi.mT @ (w[:, None] * phi) + 0.07 * torch.eye(len(Z), dtype=torch.float64)
        return features(new) @ torch.linalg.solve(A, phi.mT @ (w[:, None] * y))

    expected = refits(X, Y, weights, fit_at)
    torch.testing.assert_close(fit.leave_one_out(), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fit.predict(X), fit_at(X, Y, weights, X), rtol=1e-8, atol=1e-8)


def test_nystrom_with_all_rows_is_the_exact_fit(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    X, Y, weights = problem
    exact = ridge(None).fit(X, Y, weights)
    every = ridge(N).fit(X, Y, weights)
    # The jitter of the landmarks' matrix is all that is between them.
    torch.testing.assert_close(every.leave_one_out(), exact.leave_one_out(), rtol=0, atol=2e-3)
    torch.testing.assert_close(every.relative_variance, exact.relative_variance, rtol=1e-2, atol=0)


def test_blocks_and_memory_change_nothing(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    X, Y, weights = (torch.cat([part] * 20) for part in problem)
    wide = KernelRidge(RBF(1.3), 0.07, landmarks=LANDMARKS).fit(X, Y, weights)
    tight = KernelRidge(RBF(1.3), 0.07, landmarks=LANDMARKS, budget_bytes=12_000)
    narrow = tight.fit(X, Y, weights)
    assert wide.certificate()["features_kept_in_memory"] is True
    assert narrow.certificate()["features_kept_in_memory"] is False
    torch.testing.assert_close(narrow.leave_one_out(), wide.leave_one_out())


@pytest.mark.parametrize("landmarks", [None, LANDMARKS])
def test_weight_hypergradient_equals_finite_differences(
    problem: tuple[Tensor, Tensor, Tensor], landmarks: int | None
) -> None:
    X, Y, weights = problem
    settings = ridge(landmarks)
    state = settings.prepare(X)
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(N, C, generator=generator, dtype=torch.float64)

    def outer(w: Tensor) -> float:
        return (settings.fit(X, Y, w, state=state).leave_one_out().sin() * direction).sum().item()

    fit = settings.fit(X, Y, weights, state=state)
    found = fit.weight_hypergradient(fit.leave_one_out().cos() * direction)
    step = 1e-5
    expected = torch.tensor(
        [
            (outer(weights + step * e) - outer(weights - step * e)) / (2 * step)
            for e in torch.eye(N, dtype=torch.float64)
        ]
    )
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-7)


def test_hyper_gradient_equals_finite_differences(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    X, Y, weights = problem
    score = squared_error(Y)

    def value(log_length: float, log_penalty: float) -> float:
        kernel = RBF(torch.tensor(log_length).double().exp().item())
        penalty = torch.tensor(log_penalty).double().exp().item()
        return score(ExactFit.of(Gram.of(X, kernel), Y, weights, penalty).leave_one_out())[0]

    fit = ExactFit.of(Gram.of(X, RBF(1.0)), Y, weights, 1.0)
    by_length, by_penalty = fit.hyper_gradient(score(fit.leave_one_out())[1])
    step = 1e-4
    assert by_length == pytest.approx(
        (value(step, 0.0) - value(-step, 0.0)) / (2 * step), rel=1e-5, abs=1e-8
    )
    assert by_penalty == pytest.approx(
        (value(0.0, step) - value(0.0, -step)) / (2 * step), rel=1e-5, abs=1e-8
    )


def test_penalty_gradient_of_features_equals_finite_differences(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    X, Y, weights = problem
    score = squared_error(Y)
    settings = ridge(LANDMARKS)
    state = settings.prepare(X)

    def at(penalty: float):
        return KernelRidge(RBF(1.3), penalty, LANDMARKS).fit(X, Y, weights, state=state).fit

    fit = at(0.07)
    found = fit.penalty_gradient(score(fit.leave_one_out())[1])
    step = 1e-5
    ends = [score(at(0.07 * (1 + s)).leave_one_out())[0] for s in (step, -step)]
    assert found == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


def test_tuning_finds_a_stationary_point_and_a_better_score(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    generator = torch.Generator().manual_seed(3)
    X = torch.rand(80, 1, generator=generator, dtype=torch.float64) * 6
    Y = torch.sin(X) + 0.1 * torch.randn(80, 1, generator=generator, dtype=torch.float64)
    start = KernelRidge(RBF(0.2), penalty=5.0, landmarks=10)
    tuned = tune(start, X, Y, max_evaluations=60)
    assert tuned.ridge.landmarks == 10
    assert tuned.score < 0.015  # the noise has variance 0.01
    assert max(abs(slope) for slope in tuned.gradient) < 5e-3
    assert tuned.evaluations <= 60


def test_certificate_says_what_was_measured(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    X, Y, weights = problem
    exact = ridge(None).fit(X, Y, weights).certificate()
    assert exact["method"] == "exact Cholesky"
    assert float(exact["relative_residual"]) < 1e-12
    # The trace of the hat matrix, by an independent path.
    hat = minimizer(gaussian(X, X), torch.eye(N).double(), weights, 0.07, gaussian(X, X))
    assert exact["effective_dimension"] == pytest.approx(hat.trace().item(), rel=1e-9)
    low = ridge(LANDMARKS).fit(X.float(), Y, weights).certificate()
    assert (low["method"], low["rank"], low["size"]) == ("Nystrom", LANDMARKS, N)
    assert 0 < float(low["relative_residual"]) < 1e-4


def test_same_generator_same_landmarks(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    X = problem[0]
    states = [
        ridge(LANDMARKS).prepare(X, generator=torch.Generator().manual_seed(seed)).features
        for seed in (5, 5, 6)
    ]
    assert torch.equal(states[0].landmarks, states[1].landmarks)
    assert not torch.equal(states[0].landmarks, states[2].landmarks)


def test_mistakes_are_named(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    X, Y, weights = problem
    with pytest.raises(ArgumentError, match="penalty is 0"):
        KernelRidge(RBF(1.0), penalty=0.0)
    with pytest.raises(RankError, match="landmarks is 0"):
        KernelRidge(RBF(1.0), 1.0, landmarks=0)
    with pytest.raises(RankError, match="landmarks is 25, X has 24 rows"):
        ridge(25).prepare(X)
    with pytest.raises(ShapeError, match=r"targets have shape \(24,\)"):
        ridge(None).fit(X, Y[:, 0])
    with pytest.raises(ShapeError, match="weights have shape"):
        ridge(None).fit(X, Y, weights[:5])
    with pytest.raises(ArgumentError, match="a weight is -1"):
        ridge(None).fit(X, Y, -torch.ones(N))
    with pytest.raises(NonFiniteError, match="targets hold NaN"):
        ridge(None).fit(X, Y * torch.nan)
    with pytest.raises(NonFiniteError, match="X holds NaN"):
        ridge(None).fit(X / 0, Y)
    with pytest.raises(BudgetError, match="use landmarks or raise the budget"):
        KernelRidge(RBF(1.0), 1.0, budget_bytes=1000).prepare(X)
    with pytest.raises(BudgetError, match="give fewer rows"):
        tune(KernelRidge(RBF(1.0), 1.0, budget_bytes=1000), X, Y)
    with pytest.raises(NonFiniteError, match="the score is nan"):
        tune(ridge(None), X, Y, score=lambda p: (float("nan"), p))
