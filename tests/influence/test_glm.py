"""Block leverage of multinomial logistic models against dense Hessians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from woodbury.errors import NotPositiveDefiniteError
from woodbury.influence.glm import (
    ClasswiseCurvature,
    CoupledCurvature,
    classwise_bend,
    left_out_logits,
    push_slopes,
    without_row,
)

N, D, C = 15, 3, 4


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(N, D, generator=generator, dtype=torch.float64)
    theta = torch.randn(D, C, generator=generator, dtype=torch.float64)
    weights = torch.rand(N, generator=generator, dtype=torch.float64)
    weights[2] = 0.0
    return X, theta, weights, torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)


def loss(theta: Tensor, X: Tensor, y: Tensor, weights: Tensor, penalty: Tensor) -> Tensor:
    losses = torch.nn.functional.cross_entropy(X @ theta, y, reduction="none")
    return (weights * losses).sum() + 0.5 * (penalty[:, None] * theta.square()).sum()


def hessian(theta: Tensor, X: Tensor, weights: Tensor, penalty: Tensor) -> Tensor:
    """In the order (feature, class), by differentiation."""
    y = torch.zeros(len(X), dtype=torch.long)
    H = torch.autograd.functional.hessian(lambda t: loss(t, X, y, weights, penalty), theta)
    return H.reshape(D * C, D * C)


def test_solve_and_leverage_equal_the_dense_hessian(rows) -> None:
    X, theta, weights, penalty = rows
    H = hessian(theta, X, weights, penalty)
    curvature = CoupledCurvature.of(X, (X @ theta).softmax(1), weights, penalty)
    G = torch.randn(D, C, dtype=torch.float64)
    expected = torch.linalg.solve(H, G.flatten()).view(D, C)
    torch.testing.assert_close(curvature.solve(G), expected)
    inverse = torch.linalg.inv(H).view(D, C, D, C)
    blocks = torch.einsum("nd,dcef,ne->ncf", X, inverse, X)
    torch.testing.assert_close(curvature.leverage(X), blocks)


def test_left_out_logits_are_a_newton_step_without_the_row(rows) -> None:
    X, theta, weights, penalty = rows
    y = torch.arange(N) % C
    # At a stationary point: the linear term is whatever makes it one, and no row's Hessian has it.
    P = (X @ theta).softmax(1)
    r = P - torch.nn.functional.one_hot(y, C)
    curvature = CoupledCurvature.of(X, P, weights, penalty)
    found = left_out_logits(X @ theta, P, r, weights, curvature.leverage(X))
    for i in (0, 2, 7):
        rest = weights.clone()
        rest[i] = 0
        step = torch.linalg.solve(
            hessian(theta, X, rest, penalty), weights[i] * torch.outer(X[i], r[i]).flatten()
        )
        torch.testing.assert_close(found[i], X[i] @ (theta + step.view(D, C)))
    torch.testing.assert_close(found[2], X[2] @ theta)


def test_pushed_slopes_are_what_other_rows_see(rows) -> None:
    X, theta, weights, penalty = rows
    P = (X @ theta).softmax(1)
    curvature = CoupledCurvature.of(X, P, weights, penalty)
    E = torch.randn(N, C, dtype=torch.float64)
    pushed = push_slopes(E, P, weights, curvature.leverage(X))
    G = torch.randn(D, C, dtype=torch.float64)  # a change of the gradient
    for i in (1, 6):
        rest = weights.clone()
        rest[i] = 0
        without = torch.linalg.solve(hessian(theta, X, rest, penalty), G.flatten()).view(D, C)
        torch.testing.assert_close(E[i] @ (X[i] @ without), pushed[i] @ (X[i] @ curvature.solve(G)))


def test_classwise_is_exact_for_two_classes(rows) -> None:
    X, theta, weights, penalty = rows
    theta = torch.stack([theta[:, 0], -theta[:, 0]], 1)
    P = (X @ theta).softmax(1)
    r = P - torch.nn.functional.one_hot(torch.arange(N) % 2, 2)
    logits = [
        left_out_logits(X @ theta, P, r, weights, kind.of(X, P, weights, penalty).leverage(X))
        for kind in (CoupledCurvature, ClasswiseCurvature)
    ]
    differences = [z[:, 1] - z[:, 0] for z in logits]
    torch.testing.assert_close(*differences)


def test_classwise_solve_and_leverage_equal_dense_blocks(rows) -> None:
    X, theta, weights, penalty = rows
    P = (X @ theta).softmax(1)
    curvature = ClasswiseCurvature.of(X, P, weights, penalty)
    G = torch.randn(D, C, dtype=torch.float64)
    for c in range(C):
        bend = weights * P[:, c] * (1 - P[:, c]) * C / (C - 1)
        block = X.mT @ torch.diag(bend) @ X + torch.diag(penalty)
        torch.testing.assert_close(curvature.solve(G)[:, c], torch.linalg.solve(block, G[:, c]))
        expected = (X @ torch.linalg.inv(block) * X).sum(1)
        torch.testing.assert_close(curvature.leverage(X)[:, c], expected)
    torch.testing.assert_close(classwise_bend(P), P * (1 - P) * 4 / 3)


def test_products_in_float32_still_factorise_at_saturation() -> None:
    X = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    P = (100 * X[:, :3]).double().softmax(1)
    penalty = torch.full((6,), 1e-7, dtype=torch.float64)
    curvature = CoupledCurvature.of(X, P, torch.ones(400).double(), penalty)
    assert torch.isfinite(curvature.leverage(X)).all()


def test_no_penalty_is_refused() -> None:
    X = torch.zeros(5, 2, dtype=torch.float64)
    P = torch.full((5, 2), 0.5, dtype=torch.float64)
    weights, penalty = torch.ones(5).double(), torch.zeros(2).double()
    for kind in (CoupledCurvature, ClasswiseCurvature):
        with pytest.raises(NotPositiveDefiniteError, match="raise the penalty"):
            kind.of(X, P, weights, penalty)


def test_without_row_solves_and_says_where_it_cannot() -> None:
    K = torch.tensor([[[0.5, 0.25], [0.0, 0.75]], [[1.0, 0.0], [0.0, 0.5]]], dtype=torch.float64)
    b = torch.tensor([[1.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    for transposed in (False, True):
        moved, info = without_row(K, b, transposed=transposed)
        K0 = K[0].mT if transposed else K[0]
        torch.testing.assert_close(moved[0] - K0 @ moved[0], b[0])
        assert info[0] == 0
        assert info[1] != 0


def test_a_row_that_holds_a_direction_alone_is_named() -> None:
    P = torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64)
    L = 2 * torch.eye(2, dtype=torch.float64).expand(2, 2, 2)  # L S of row 1 has eigenvalue 1
    r, weights = P - torch.tensor([[1.0, 0.0]]), torch.ones(2, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match="without row 1"):
        left_out_logits(P.log(), P, r, weights, L)
    with pytest.raises(NotPositiveDefiniteError, match="without row 1"):
        push_slopes(r, P, weights, L)
