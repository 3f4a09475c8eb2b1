"""Influence scores against the formula with dense float64 matrices, and against refits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from woodbury import (
    CG,
    Cholesky,
    Dense,
    Diagonal,
    Eigh,
    GaussNewton,
    Influence,
    Neumann,
    Nystrom,
    Objective,
)
from woodbury.curvature import diagonal_curvature
from woodbury.errors import (
    ArgumentError,
    BudgetError,
    DataError,
    NonFiniteError,
    ShapeError,
    SolveError,
    StructureError,
)
from woodbury.implicit import newton_cg
from woodbury.influence import pairwise
from woodbury.solvers import SolveStatus

DAMPING = 1e-2


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def rows(count: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=gen, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (count,), generator=gen)


def gradients_one_by_one(model: nn.Module, x: Tensor, y: Tensor, what: str = "loss") -> Tensor:
    """The gradients ``[b, n]``, a backward pass for each row."""
    found = []
    for one, label in zip(x, y, strict=True):
        model.zero_grad()
        logits = model(one[None])[0]
        log_p = logits.log_softmax(0)[label]
        value = -log_p if what == "loss" else log_p - torch.log1p(-log_p.exp())
        value.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    return torch.stack(found)


def gauss_newton_by_hand(model: nn.Module, x: Tensor) -> Tensor:
    """``mean J^T (diag p - p p^T) J`` from Jacobians that autograd writes."""
    params = dict(model.named_parameters())
    total = torch.zeros(())
    for one in x:
        jacobian = torch.autograd.functional.jacobian(
            lambda *values: torch.func.functional_call(
                model,
                dict(zip(params, values, strict=True)),
                (one[None],),
            )[0],
            tuple(params.values()),
        )
        J = torch.cat([part.reshape(3, -1) for part in jacobian], dim=1)
        p = model(one[None])[0].softmax(0).detach()
        total = total + J.T @ (p.diag() - torch.outer(p, p)) @ J
    return total / len(x)


def expected(
    model: nn.Module, train: Any, queries: Any, matrix: Tensor, what: str = "loss"
) -> Tensor:
    g = gradients_one_by_one(model, *train)
    q = gradients_one_by_one(model, *queries, what)
    return -q @ torch.linalg.inv(matrix) @ g.T / len(g)


def damped(matrix: Tensor, damping: float = DAMPING) -> Tensor:
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


@pytest.mark.parametrize("measurement", ["loss", "margin"])
@pytest.mark.parametrize(
    ("recipe", "tolerance"),
    [
        (None, 1e-9),
        (Cholesky(), 1e-9),
        (Eigh(), 1e-9),
        (CG(rtol=1e-12), 1e-8),
        (CG(rtol=1e-12, preconditioner=Nystrom(rank=20)), 1e-8),
        (Nystrom(rank=43), 1e-6),
        (Neumann(terms=1500), 1e-5),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, float) else "",
)
def test_scores_are_the_formula(measurement: str, recipe: Any, tolerance: float) -> None:
    model, train, queries = network(), rows(30, 1), rows(6, 2)
    influence = Influence(
        Objective(model, "cross_entropy", train), measurement, recipe, damping=DAMPING
    )
    scores = influence.scores(queries)
    truth = expected(
        model, train, queries, damped(gauss_newton_by_hand(model, train[0])), measurement
    )
    torch.testing.assert_close(scores.values, truth, rtol=tolerance, atol=tolerance)
    assert scores.solves["ok"]
    assert scores.settings["damping"] == DAMPING
    error = (scores.values - truth).abs()
    assert scores.proven
    assert bool((error <= scores.error() + 1e-13).all())


def test_certificate_bounds_what_a_rough_solve_misses() -> None:
    model, train, queries = network(), rows(40, 1), rows(8, 2)
    objective = Objective(model, "cross_entropy", train)
    truth = expected(model, train, queries, damped(gauss_newton_by_hand(model, train[0])))
    for recipe in (CG(rtol=0.2), Nystrom(rank=8), Neumann(terms=5)):
        scores = Influence(objective, "loss", recipe, damping=DAMPING).scores(queries)
        error = (scores.values - truth).abs()
        assert error.max() > 1e-5  # it is rough
        assert bool((error <= scores.error()).all())
        assert scores.solves["residual"] > 1e-3
        assert scores.certificate()["error_guarantee"] == "bound"


@pytest.mark.parametrize("matrix", ["hessian", "fisher", "empirical_fisher", "diagonal"])
def test_named_matrices(matrix: str) -> None:
    model, train, queries = network(), rows(30, 1), rows(5, 2)
    l2 = 0.3
    objective = Objective(model, "cross_entropy", train, l2=l2)
    g = gradients_one_by_one(model, *train)
    if matrix == "hessian":
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])

        def loss(theta: Tensor) -> Tensor:
            parts = objective.space.unflatten(theta)
            logits = torch.func.functional_call(model, parts, (train[0],))
            return nn.functional.cross_entropy(logits, train[1])

        dense = torch.autograd.functional.hessian(loss, flat)
    elif matrix == "fisher":
        dense = gauss_newton_by_hand(model, train[0])  # for cross-entropy they are one
    elif matrix == "empirical_fisher":
        dense = g.T @ g / len(g)
    else:
        dense = (g**2).mean(0).diag()
    truth = expected(model, train, queries, damped(dense, l2 + DAMPING))
    scores = Influence(objective, matrix=matrix, damping=DAMPING).scores(queries)
    torch.testing.assert_close(scores.values, truth, rtol=1e-8, atol=1e-10)


def test_identity_is_products_of_gradients() -> None:
    model, train, queries = network(), rows(30, 1), rows(5, 2)
    scores = Influence(Objective(model, "cross_entropy", train), matrix="identity").scores(queries)
    g, q = gradients_one_by_one(model, *train), gradients_one_by_one(model, *queries)
    torch.testing.assert_close(scores.values, -q @ g.T / 30)
    assert scores.settings["damping"] == 0


def test_any_operator_and_any_function_of_outputs() -> None:
    model, train, queries = network(), rows(20, 1), rows(4, 2)
    values = torch.rand(43, dtype=torch.float64) + 0.5
    objective = Objective(model, "cross_entropy", train)

    def first_logit(outputs: Tensor, batch: Any) -> Tensor:
        assert len(batch[0]) == len(outputs)
        return outputs[:, 0]

    scores = Influence(objective, first_logit, matrix=Diagonal(values)).scores(queries)
    model.zero_grad()
    q = []
    for one in queries[0]:
        model.zero_grad()
        model(one[None])[0, 0].backward()
        q.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    g = gradients_one_by_one(model, *train)
    torch.testing.assert_close(scores.values, -torch.stack(q) / values @ g.T / 20)
    assert scores.support == 1
    made = Influence(objective, first_logit, matrix=lambda _: Diagonal(values)).scores(queries)
    torch.testing.assert_close(made.values, scores.values)


def test_adding_an_example_changes_the_measurement_as_the_score_says() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=gen, dtype=torch.float64)
    y = (x[:, 0] + torch.randn(40, generator=gen, dtype=torch.float64) > 0).long()
    query = torch.randn(2, 3, generator=gen, dtype=torch.float64), torch.tensor([0, 1])
    model = nn.Linear(3, 2, bias=False).double()
    objective = Objective(model, "cross_entropy", (x, y), l2=1e-2)
    objective = objective.with_params(newton_cg(objective, gtol=1e-12))

    def losses(flat: Tensor) -> Tensor:
        return objective.with_params(flat).with_data(query).per_example_losses()

    for matrix in ("hessian", "gauss_newton"):  # the same for a linear model
        scores = Influence(objective, matrix=matrix, damping=0.0).scores(query)
        for i in (0, 7, 39):
            weights = torch.ones(40, dtype=torch.float64)
            changes = []
            for step in (1e-3, -1e-3):  # a weight of (1 + step) / N, refitted
                weights[i] = 1 + step
                refit = newton_cg(objective.with_weights(weights), gtol=1e-13)
                changes.append(losses(refit))
            slope = (changes[0] - changes[1]) / 2e-3
            torch.testing.assert_close(scores.values[:, i], slope, rtol=1e-5, atol=1e-9)


def test_scores_do_not_depend_on_how_the_data_is_cut() -> None:
    model, train, queries = network(), rows(30, 1), rows(7, 2)
    kwargs: dict[str, Any] = {"damping": DAMPING, "recipe": CG(rtol=1e-13)}
    whole = Influence(Objective(model, "cross_entropy", train), **kwargs).scores(queries)
    loader = DataLoader(TensorDataset(*train), batch_size=7)
    batches = [(train[0][a:b], train[1][a:b]) for a, b in ((0, 11), (11, 12), (12, 30))]
    halves = [(queries[0][:3], queries[1][:3]), (queries[0][3:], queries[1][3:])]
    for data in (loader, batches):
        cut = Influence(Objective(model, "cross_entropy", data), **kwargs).scores(halves)
        torch.testing.assert_close(cut.values, whole.values, rtol=1e-10, atol=1e-12)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    shuffled = [(train[0][part], train[1][part], part) for part in order.split(8)]
    found = Influence(Objective(model, "cross_entropy", shuffled), **kwargs).scores(queries)
    torch.testing.assert_close(found.values, whole.values, rtol=1e-10, atol=1e-12)
    least = 7 * 30 * 8 + 11 * 43 * 8
    for memory in (least, least + 10_000, least + 100_000):  # one query and one example at a time
        tight = Influence(Objective(model, "cross_entropy", train), memory=memory, **kwargs)
        assert tight.forecast(queries).memory <= memory
        torch.testing.assert_close(
            tight.scores(queries).values, whole.values, rtol=1e-10, atol=1e-12
        )
    with pytest.raises(BudgetError, match="raise memory"):
        Influence(Objective(model, "cross_entropy", train), memory=least - 1, **kwargs).scores(
            queries
        )


def test_the_memory_reaches_the_curvature() -> None:
    """What is kept of the linearised curvature is part of the budget of a run."""
    model, train, queries = network(), rows(30, 1), rows(7, 2)
    tight = Influence(
        Objective(model, "cross_entropy", train),
        recipe=CG(rtol=1e-13),
        damping=DAMPING,
        memory=7 * 30 * 8 + 11 * 43 * 8 + 4,
    )
    tight.scores(queries)
    matrix = tight.system.matrix
    assert isinstance(matrix, GaussNewton)
    assert matrix.cache_report().budget == 1


@pytest.mark.parametrize(("matrix", "passes"), [("kfac", 2), ("ekfac", 3), ("diagonal", 2)])
def test_a_forecast_fits_nothing(matrix: Any, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, train, queries = network(), rows(30, 1), rows(4, 2)
    influence = Influence(Objective(model, "cross_entropy", train), matrix=matrix)

    def never(*_: Any) -> None:
        raise AssertionError("the matrix was made")

    monkeypatch.setattr("woodbury.influence.influence.base_operator", never)
    monkeypatch.setattr("woodbury.influence.systems.base_operator", never)
    forecast = influence.forecast(queries)
    assert (forecast.passes, forecast.products) == (passes, 0)
    assert f"{passes} pass{'es' * (passes > 1)} over the gradients of" in str(forecast)
    assert "products" not in str(forecast)  # there are none
    assert forecast.memory > 4 * 30 * 8
    assert forecast.gradient_seconds > 0


def test_chosen_rows_and_modules() -> None:
    model, train, queries = network(), rows(30, 1), rows(4, 2)
    influence = Influence(Objective(model, "cross_entropy", train), damping=DAMPING)
    whole = influence.scores(queries, modules=True)
    assert whole.module_names == ("0", "2")
    assert whole.modules is not None
    torch.testing.assert_close(whole.modules.sum(0), whole.values)
    few = influence.scores(queries, rows=torch.tensor([20, 3, 4]))
    assert few.rows.tolist() == [3, 4, 20]
    torch.testing.assert_close(few.values, whole.values[:, [3, 4, 20]])
    torch.testing.assert_close(influence.scores(queries).values, whole.values)
    # The part of a module is the product of its entries of both gradients.
    matrix = damped(gauss_newton_by_hand(model, train[0]))
    solved = torch.linalg.solve(matrix, gradients_one_by_one(model, *queries).T)
    g = gradients_one_by_one(model, *train)
    torch.testing.assert_close(whole.modules[0], -(solved[:25].T @ g[:, :25].T) / 30)


def test_self_influence_is_the_diagonal_and_negative() -> None:
    model, train = network(), rows(30, 1)
    influence = Influence(Objective(model, "cross_entropy", train), damping=DAMPING)
    found = influence.self_influence()
    pairs = influence.scores()  # the training data are the queries
    torch.testing.assert_close(found.values, pairs.values.diagonal())
    assert bool((found.values < 0).all())
    truth = expected(model, train, train, damped(gauss_newton_by_hand(model, train[0])))
    assert bool(((found.values - truth.diagonal()).abs() <= found.error + 1e-13).all())
    assert found.top(1).item() == found.values.argmin()
    small = Influence(
        Objective(model, "cross_entropy", train), damping=DAMPING, memory=60_000
    ).self_influence()
    torch.testing.assert_close(small.values, found.values)
    assert found.to_frame()["score"].tolist() == found.values.tolist()


def test_default_damping_is_a_tenth_of_the_mean_eigenvalue_and_said() -> None:
    model, train, queries = network(), rows(30, 1), rows(4, 2)
    scores = Influence(Objective(model, "cross_entropy", train)).scores(queries)
    matrix = gauss_newton_by_hand(model, train[0])
    assert scores.settings["damping"] == pytest.approx(0.1 * matrix.trace().item() / 43)
    assert scores.settings["damping_chosen"]
    regularised = Influence(Objective(model, "cross_entropy", train, l2=0.1)).scores(queries)
    assert regularised.settings["damping"] == 0


def test_a_diagonal_that_happens_to_be_positive_is_damped() -> None:
    """Squared gradients of parameters that hardly count are tiny, and their inverses huge."""
    torch.manual_seed(0)
    X = torch.randn(30, 4, dtype=torch.float64) * torch.tensor([1.0, 1.0, 1.0, 1e-6]).double()
    data = X, X @ torch.ones(4, 1, dtype=torch.float64) + 0.1 * torch.randn(30, 1).double()
    model = torch.nn.Linear(4, 1, bias=False).double()
    found = Influence(Objective(model, "mse", data), matrix="diagonal").system
    values = diagonal_curvature(Objective(model, "mse", data), "empirical_fisher").values
    assert bool((values > 0).all())
    assert found.damping == pytest.approx(0.1 * float(values.mean()))
    regularised = Influence(Objective(model, "mse", data, l2=1e-3), matrix="diagonal").system
    assert regularised.damping == 0


class KilledError(Exception):
    """Stands for a signal."""


def test_a_killed_run_goes_on_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairwise, "SECONDS_BETWEEN_PIECES", 0.0)
    model, train, queries = network(), rows(30, 1), rows(7, 2)
    memory = 7 * 30 * 8 * 3 + 11 * 43 * 8 + 4 * 3 * 8 * 43 * 8
    kwargs: dict[str, Any] = {"damping": DAMPING, "recipe": CG(), "memory": memory}
    objective = Objective(model, "cross_entropy", train)
    truth = Influence(objective, **kwargs).scores(queries, modules=True)
    alone = Influence(objective, **kwargs).self_influence()
    for stop in range(1, 60, 3):
        calls: list[str] = []

        def progress(stage: str, fraction: float, stop: int = stop, calls: Any = calls) -> None:
            calls.append(stage)
            if len(calls) == stop:
                raise KilledError

        folder, other = tmp_path / f"pairs{stop}", tmp_path / f"self{stop}"
        try:
            Influence(objective, progress=progress, **kwargs).scores(
                queries, modules=True, folder=folder
            )
        except KilledError:
            pass
        else:
            break
        calls.clear()
        resumed = Influence(objective, progress=progress, **kwargs)
        monkeypatch.setattr(resumed, "_progress", lambda stage, _: calls.append(stage))
        again = resumed.scores(queries, modules=True, folder=folder)
        assert torch.equal(again.values, truth.values)
        assert torch.equal(again.error(), truth.error())
        assert again.modules is not None
        assert truth.modules is not None
        assert torch.equal(again.modules, truth.modules)
        calls.clear()
        try:
            Influence(objective, progress=progress, **kwargs).self_influence(folder=other)
        except KilledError:
            found = Influence(objective, **kwargs).self_influence(folder=other)
            assert torch.equal(found.values, alone.values)
            assert torch.equal(found.error, alone.error)
    assert stop > 10  # there were that many pieces
    finished = Influence(objective, **kwargs).scores(queries, modules=True, folder=folder)
    assert torch.equal(finished.values, truth.values)
    assert not list(tmp_path.rglob("*.tmp*"))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    model, train, queries = network(), rows(30, 1), rows(7, 2)
    Influence(Objective(model, "cross_entropy", train), damping=DAMPING).scores(
        queries, folder=tmp_path / "run"
    )
    others = {
        "model_and_data": Influence(Objective(network(1), "cross_entropy", train), damping=DAMPING),
        "damping": Influence(Objective(model, "cross_entropy", train), damping=1.0),
        "measurement": Influence(
            Objective(model, "cross_entropy", train), "margin", damping=DAMPING
        ),
    }
    for what, influence in others.items():
        with pytest.raises(DataError, match=f"{what} was .* choose another folder"):
            influence.scores(queries, folder=tmp_path / "run")
    with pytest.raises(DataError, match="queries was"):
        Influence(Objective(model, "cross_entropy", train), damping=DAMPING).scores(
            rows(7, 3), folder=tmp_path / "run"
        )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt"):
        Influence(Objective(model, "cross_entropy", train), damping=DAMPING).scores(
            queries, folder=tmp_path / "other"
        )


def test_what_cannot_be_scored_is_refused_with_the_reason() -> None:
    model, train, queries = network(), rows(30, 1), rows(4, 2)
    objective = Objective(model, "cross_entropy", train)
    with pytest.raises(ArgumentError, match="measurement is 'los'"):
        Influence(objective, "los")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"damping is -1\.0"):
        Influence(objective, damping=-1.0)
    with pytest.raises(ArgumentError, match="matrix is 'gn'"):
        Influence(objective, matrix="gn").scores(queries)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="it must return a LinearOperator"):
        Influence(objective, matrix=lambda _: 3).scores(queries)  # type: ignore[arg-type, return-value]
    with pytest.raises(ShapeError, match="43 parameters"):
        Influence(objective, matrix=Dense(torch.eye(2).double())).scores(queries)
    with pytest.raises(StructureError, match="mode='eval'"):
        Influence(Objective(model, "cross_entropy", train, mode="train"))
    loader = DataLoader(TensorDataset(*train), batch_size=7, shuffle=True)
    shuffling = Objective(model, "cross_entropy", loader)
    with pytest.raises(DataError, match="shuffle=False"):
        Influence(shuffling, damping=DAMPING).scores(queries)
    mean = Objective(model, lambda z, y: nn.functional.cross_entropy(z, y), train)
    with pytest.raises(DataError, match="one loss per example"):
        Influence(mean, damping=DAMPING).scores(queries)
    with pytest.raises(ArgumentError, match="name an example twice"):
        Influence(objective, damping=DAMPING).scores(queries, rows=torch.tensor([1, 1]))
    with pytest.raises(ArgumentError, match="of 30"):
        Influence(objective, damping=DAMPING).scores(queries, rows=torch.tensor([30]))
    with pytest.raises(StructureError, match="a margin needs labels"):
        Influence(
            Objective(model, "mse", (train[0], torch.zeros(30, 3).double())), "margin"
        ).scores((queries[0], torch.zeros(4, 3).double()))
    with pytest.raises(SolveError, match="max_steps"):
        Influence(objective, "loss", CG(max_steps=1), damping=DAMPING).scores(queries)
    rough = Influence(objective, "loss", CG(max_steps=1), damping=DAMPING, throw=False)
    assert rough.scores(queries).solves["status"] == SolveStatus.max_steps.name


def test_a_row_of_nan_is_named() -> None:
    model = network()
    x, y = rows(30, 1)
    safe = Objective(model, "cross_entropy", (x, y))
    x = x.clone()
    x[17, 2] = math.nan
    influence = Influence(
        Objective(model, "cross_entropy", [(x[:10], y[:10]), (x[10:], y[10:])]), matrix="identity"
    )
    with pytest.raises(NonFiniteError, match=r"batch 1 .*rows 17"):
        influence.scores(rows(4, 2))
    query = rows(4, 2)
    query[0][1, 0] = math.inf
    with pytest.raises(NonFiniteError):
        Influence(safe, matrix="identity").scores(query)


def test_a_margin_of_tokens_and_of_bits() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x = torch.randn(5, 2, 4).double()
    labels = torch.randint(3, (5, 2))
    labels[0, 1] = -100

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).transpose(1, 2)  # classes on axis 1, as torch has it

    objective = Objective(Transposed(), "cross_entropy", (x, labels))
    scores = Influence(objective, "margin", matrix="identity").scores()
    q = []
    for one, label in zip(x, labels, strict=True):
        model.zero_grad()
        p = model(one).softmax(1)
        kept = label >= 0
        own = p[kept, label[kept]]
        (own.log() - (1 - own).log()).mean().backward()
        q.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    g = torch.cat([grads for _, grads in objective.per_example_gradients()])
    torch.testing.assert_close(scores.values, -torch.stack(q) @ g.T / 5)

    bits = (torch.rand(5, 3) > 0.5).double()
    objective = Objective(model, nn.BCEWithLogitsLoss(), (x[:, 0], bits))
    scores = Influence(objective, "margin", matrix="identity").scores()
    q = []
    for one, label in zip(x[:, 0], bits, strict=True):
        model.zero_grad()
        p = model(one).sigmoid()
        own = torch.where(label > 0, p, 1 - p)
        (own.log() - (1 - own).log()).mean().backward()
        q.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    g = torch.cat([grads for _, grads in objective.per_example_gradients()])
    torch.testing.assert_close(scores.values, -torch.stack(q) @ g.T / 5)


def test_float32_is_close_to_float64() -> None:
    train, queries = rows(30, 1), rows(6, 2)
    truth = Influence(Objective(network(), "cross_entropy", train), damping=DAMPING).scores(queries)
    single = Influence(
        Objective(network(dtype=torch.float32), "cross_entropy", rows(30, 1, torch.float32)),
        damping=DAMPING,
    ).scores(rows(6, 2, torch.float32))
    assert single.values.dtype == torch.float32
    torch.testing.assert_close(single.values.double(), truth.values, rtol=1e-4, atol=1e-5)
