"""Leave-one-out predictions against refits without the row."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from woodbury import CG, Cholesky, Eigh, Objective, leave_one_out
from woodbury.curvature import GaussNewton
from woodbury.errors import (
    ArgumentError,
    NotPositiveDefiniteError,
    ShapeError,
    SingularError,
    StructureError,
)
from woodbury.implicit import newton_cg
from woodbury.influence.linear_rows import LinearRows
from woodbury.operators import Dense


def linear(features: int, outputs: int, theta: Tensor | None = None) -> nn.Linear:
    model = nn.Linear(features, outputs, bias=False).double()
    if theta is not None:
        with torch.no_grad():
            model.weight.copy_(theta.view(outputs, features))
    return model


def fitted(objective: Objective) -> Objective:
    return objective.with_params(newton_cg(objective, gtol=1e-12))


def data(rows: int, features: int, seed: int = 0) -> tuple[Tensor, torch.Generator]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=gen, dtype=torch.float64), gen


@pytest.mark.parametrize("l2", [0.0, 1e-3])
@pytest.mark.parametrize("weighted", [False, True])
def test_squared_error_of_a_linear_model_is_exact(l2: float, weighted: bool) -> None:
    x, gen = data(15, 4)
    y = torch.randn(15, 2, generator=gen, dtype=torch.float64)
    weights = torch.rand(15, generator=gen, dtype=torch.float64) if weighted else None
    w = torch.ones(15).double() if weights is None else weights

    def refit(keep: Tensor) -> Tensor:  # mean over two outputs and 15 rows, kept when one is out
        gram = (x[keep] * w[keep, None]).T @ x[keep] / 15 + l2 * torch.eye(4).double()
        return torch.linalg.solve(gram, (x[keep] * w[keep, None]).T @ y[keep] / 15)

    everything = torch.ones(15, dtype=torch.bool)
    model = linear(4, 2, refit(everything).T)
    objective = Objective(model, "mse", (x, y), weights=weights, l2=l2)
    result = leave_one_out(objective, Cholesky())
    for i in range(15):
        keep = everything.clone()
        keep[i] = False
        torch.testing.assert_close(result.predictions[i], x[i] @ refit(keep), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(result.fitted, model(x).detach())
    torch.testing.assert_close(result.losses, (result.predictions - y).square().mean(1))
    assert result.stationarity < 1e-12
    assert result.report.ok
    if l2 == 0 and not weighted:
        assert result.leverage.sum().item() == pytest.approx(8, rel=1e-9)


def refit_correlation(rows: int, classes: int, chosen: range, l2: float) -> float:
    digits = load_digits()
    keep = torch.as_tensor(digits.target) < classes
    x = (torch.as_tensor(digits.data)[keep] / 16)[:rows]
    y = torch.as_tensor(digits.target)[keep][:rows]
    model = linear(64, classes)
    objective = fitted(Objective(model, "cross_entropy", (x, y), l2=l2))
    result = leave_one_out(objective)
    assert result.report.ok
    approximate, exact = [], []
    for i in chosen:
        weights = torch.ones(rows, dtype=torch.float64)
        weights[i] = 0
        theta = newton_cg(objective.with_weights(weights), gtol=1e-10)
        logits = x[i] @ theta.view(classes, 64).T
        exact.append(logits.log_softmax(0))
        approximate.append(result.predictions[i].log_softmax(0))
    stacked = torch.stack([torch.stack(approximate).flatten(), torch.stack(exact).flatten()])
    return torch.corrcoef(stacked)[0, 1].item()


def test_logistic_regression_follows_refits() -> None:
    assert refit_correlation(80, 3, range(0, 80, 4), 1e-3) > 0.999


@pytest.mark.slow
def test_digits_500_rows_follow_refits() -> None:
    assert refit_correlation(500, 10, range(0, 500, 5), 1e-3) > 0.999


def test_leaving_out_moves_away_from_the_label() -> None:
    digits = load_digits()
    x, y = torch.as_tensor(digits.data)[:100] / 16, torch.as_tensor(digits.target)[:100]
    objective = fitted(Objective(linear(64, 10), "cross_entropy", (x, y), l2=1e-3))
    result = leave_one_out(objective)
    before = nn.functional.cross_entropy(result.fitted, y, reduction="none")
    assert (result.losses > before).all()
    assert result.leverage.min() > 0
    assert not result.unstable.any()


def test_networks_use_the_gauss_newton_form() -> None:
    torch.manual_seed(0)
    x, _ = data(12, 3)
    y = torch.randint(0, 3, (12,))
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    objective = Objective(model, "cross_entropy", [(x[:7], y[:7]), (x[7:], y[7:])], l2=0.1)
    result = leave_one_out(objective, CG(rtol=1e-12), chunk_bytes=4000)
    params = {name: value.detach() for name, value in model.named_parameters()}
    n = objective.space.dim

    def outputs(flat: Tensor, i: int) -> Tensor:
        named = objective.space.unflatten(flat)
        return torch.func.functional_call(model, named, (x[i : i + 1],))[0]

    theta = objective.space.flatten(params)
    J = torch.stack([torch.func.jacrev(outputs)(theta, i) for i in range(12)])
    p = model(x).detach().softmax(1)
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    H = (J.mT @ S @ J).sum(0) / 12 + 0.1 * torch.eye(n).double()
    r = p - nn.functional.one_hot(y, 3)
    for i in range(12):
        H_i = H - J[i].T @ S[i] @ J[i] / 12
        moved = torch.linalg.solve(H_i, J[i].T @ r[i] / 12)
        expected = outputs(theta, i) + J[i] @ moved
        torch.testing.assert_close(result.predictions[i], expected, rtol=1e-8, atol=1e-10)
    # the same with the curvature given, formed here
    again = leave_one_out(objective, curvature=Dense(H, tags={"positive_definite"}))
    torch.testing.assert_close(again.predictions, result.predictions, rtol=1e-8, atol=1e-10)
    assert result.stationarity > 1e-3  # not trained: reported, not hidden
    assert result.certificate()["suboptimality"] > 0


def test_a_model_vmap_cannot_vectorise() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3).double())

        def forward(self, x: Tensor) -> Tensor:
            rows = [row @ self.weight * (2.0 if row.sum().item() > 0 else 1.0) for row in x]
            return torch.stack(rows)

    x, gen = data(6, 3)
    y = torch.randn(6, generator=gen, dtype=torch.float64)
    result = leave_one_out(Objective(Branching(), "mse", (x, y), l2=0.1))
    scaled = x * torch.where(x.sum(1) > 0, 2.0, 1.0)[:, None]
    same = leave_one_out(
        Objective(linear(3, 1, torch.ones(3)), "mse", (scaled, y[:, None]), l2=0.1)
    )
    torch.testing.assert_close(result.predictions, same.predictions[:, 0])


def test_a_singular_curvature_needs_the_pseudo_inverse() -> None:
    """Softmax without a penalty: adding a constant to all logits changes nothing."""
    x, _ = data(40, 2)
    y = torch.arange(40) % 3
    model = linear(2, 3)
    objective = Objective(model, "cross_entropy", (x, y))
    with pytest.raises((NotPositiveDefiniteError, SingularError)):
        leave_one_out(objective, Cholesky())
    result = leave_one_out(objective, Eigh())
    slight = leave_one_out(Objective(model, "cross_entropy", (x, y), l2=1e-9), Cholesky())
    torch.testing.assert_close(
        result.predictions.log_softmax(1), slight.predictions.log_softmax(1), rtol=1e-5, atol=1e-6
    )


def test_a_row_that_alone_determines_a_direction_is_marked() -> None:
    x = torch.eye(2, dtype=torch.float64)[[0, 1, 1]]
    y = torch.zeros(3, 1).double()
    result = leave_one_out(Objective(linear(2, 1), "mse", (x, y)), Cholesky())
    assert result.unstable.tolist() == [True, False, False]
    assert result.certificate()["unstable_rows"] == 1


def test_bad_input() -> None:
    x, _ = data(6, 3)
    y = torch.zeros(6, 2).double()
    objective = Objective(linear(3, 2), "mse", (x, y), l2=0.1)
    with pytest.raises(ArgumentError, match="chunk_bytes is 0"):
        leave_one_out(objective, chunk_bytes=0)
    with pytest.raises(ShapeError, match="6 parameters"):
        leave_one_out(objective, curvature=Dense(torch.eye(3).double()))
    with pytest.raises(StructureError, match="given as a loss only"):
        leave_one_out(Objective.functional(lambda p, b: p["w"].sum(), {"w": y}, [x]))
    with pytest.raises(StructureError, match="eval"):
        leave_one_out(Objective(linear(3, 2), "mse", (x, y), mode="train"))
    images = Objective(nn.Conv1d(1, 1, 1).double(), "mse", (x[:, None], x[:, None]), l2=0.1)
    with pytest.raises(ShapeError, match="one prediction per row"):
        leave_one_out(images)


def test_a_given_operator_is_used() -> None:
    x, _ = data(6, 3)
    objective = Objective(linear(3, 2), "mse", (x, torch.zeros(6, 2).double()), l2=0.1)
    stiff = 1e6 * GaussNewton(objective)
    result = leave_one_out(objective, CG(), curvature=stiff)
    torch.testing.assert_close(result.predictions, result.fitted, rtol=1e-4, atol=1e-5)


class Features(nn.Module):
    """A network whose last layer is asked about, with a bias or without."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4).double()
        self.head = nn.Linear(4, 3, bias=bias).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_last_layer_is_left_out_of_as_by_general_solves(bias: bool, weighted: bool) -> None:
    torch.manual_seed(0)
    x, gen = data(25, 3)
    y = torch.randint(0, 3, (25,), generator=gen)
    weights = torch.rand(25, generator=gen, dtype=torch.float64) if weighted else None
    names = ["head.weight", *(["head.bias"] if bias else [])]
    batches = [(x[:9], y[:9]), (x[9:], y[9:])]
    objective = Objective(
        Features(bias), "cross_entropy", batches, params=names, weights=weights, l2=1e-2
    )
    assert LinearRows.of(objective) is not None
    found = leave_one_out(objective)
    general = leave_one_out(objective, Eigh())
    for name in ("predictions", "fitted", "losses", "leverage", "unstable"):
        torch.testing.assert_close(getattr(found, name), getattr(general, name))
    assert found.suboptimality == pytest.approx(general.suboptimality, rel=1e-8)
    assert found.stationarity == pytest.approx(general.stationarity)
    assert found.report.ok
    assert found.report.residual < 1e-12
    torch.testing.assert_close(leave_one_out(objective, Cholesky()).losses, found.losses)


def test_what_is_not_a_softmax_of_a_layer_goes_the_general_way() -> None:
    x, gen = data(12, 3)
    y = torch.randint(0, 3, (12,), generator=gen)
    layer = linear(3, 3, torch.randn(9, generator=gen, dtype=torch.float64))
    smooth = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double())

    def rows(model: nn.Module, criterion: object, target: Tensor, **options: object) -> object:
        return LinearRows.of(Objective(model, criterion, (x, target), l2=0.1, **options))

    assert rows(layer, "cross_entropy", y) is not None
    assert rows(nn.Sequential(layer, nn.Tanh()), "cross_entropy", y) is None
    assert rows(nn.Sequential(nn.Tanh(), layer), "cross_entropy", y) is not None
    assert rows(layer, smooth, y) is None
    assert rows(layer, "mse", x) is None
    assert rows(nn.Sequential(layer, linear(3, 3)), "cross_entropy", y) is None
    embedded = nn.Sequential(nn.Embedding(5, 3)).double()
    tokens = torch.arange(12) % 5
    assert LinearRows.of(Objective(embedded, "cross_entropy", (tokens, y), l2=0.1)) is None


def test_single_precision_is_enough_for_the_last_layer() -> None:
    digits = load_digits()
    x, y = torch.as_tensor(digits.data)[:200] / 16, torch.as_tensor(digits.target)[:200]
    objective = fitted(Objective(linear(64, 10), "cross_entropy", (x, y), l2=1e-3))
    theta = objective.params_vector()
    model = nn.Linear(64, 10, bias=False)
    with torch.no_grad():
        model.weight.copy_(theta.view(10, 64))
    single = leave_one_out(Objective(model, "cross_entropy", (x.float(), y), l2=1e-3))
    double = leave_one_out(objective, Eigh())
    assert single.predictions.dtype == torch.float32
    assert (single.predictions.double() - double.predictions).abs().max() < 1e-3
