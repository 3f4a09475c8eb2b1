"""Heavy columns of a Fisher matrix, and the preconditioner that takes EK-FAC for the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from woodbury import CG, EKFAC, KFAC, GaussNewton, Identity, Objective, solve
from woodbury.curvature import curvature_preconditioner, damping_for_steps, heavy_columns
from woodbury.errors import ArgumentError, BudgetError
from woodbury.solvers import SolveStatus

F64 = torch.float64


class Words(nn.Module):
    """Layers of every kind: one-hot inputs, several positions, tied weights, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.mix = nn.Embedding(6, 3), nn.LayerNorm(3), nn.Linear(3, 3)

    def forward(self, tokens):
        h = self.norm(torch.tanh(self.embed(tokens)))
        return (self.mix(h) @ self.embed.weight.T).mean(1)


def root(p: torch.Tensor) -> torch.Tensor:
    """Rows whose outer products add up to ``diag(p) - p p^T``, orthogonal ones."""
    values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
    return (vectors * values.clamp(min=0).sqrt()).T


def made(name: str, **options) -> Objective:
    torch.manual_seed(0)
    if name == "words":
        x, y, model = torch.randint(6, (9, 4)), torch.randint(6, (9,)), Words().double()
    else:
        x, y = torch.randn(12, 1, 5, 5, dtype=F64), torch.randint(3, (12,))
        layers = nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
        model = nn.Sequential(*layers).double()
    return Objective(model, "cross_entropy", (x, y), **options)


def columns_one_by_one(objective: Objective) -> torch.Tensor:
    """All columns of the Gauss-Newton matrix ``[n, N C]``, by reverse mode example by example."""
    model, x = objective._predict.model, objective._batches.first().data[0]
    params, found = dict(model.named_parameters()), []
    for i in range(len(x)):
        outputs = model(x[i : i + 1])[0]
        for row in root(outputs.detach().softmax(0)):
            parts = torch.autograd.grad(outputs @ row, list(params.values()), retain_graph=True)
            found.append(torch.cat([part.reshape(-1) for part in parts]))
    V = torch.stack(found, 1)
    weights = objective.weights
    if weights is not None:
        V = V * weights.sqrt().repeat_interleave(V.shape[1] // len(x))
    return V / len(x) ** 0.5


@pytest.mark.parametrize("name", ["words", "image"])
@pytest.mark.parametrize("weighted", [False, True])
def test_all_columns_make_the_matrix(name, weighted):
    count = 9 if name == "words" else 12
    weights = torch.linspace(0, 2, count, dtype=F64) if weighted else None
    objective = made(name, weights=weights)
    V = heavy_columns(EKFAC(objective, "exact"), 10**6)
    reference = columns_one_by_one(objective)
    wanted = GaussNewton(objective).to_dense()
    assert (reference @ reference.T - wanted).norm() <= 1e-12 * wanted.norm()
    assert (V @ V.T - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.parametrize("name", ["words", "image"])
def test_they_are_the_largest_ones_however_the_data_is_cut(name):
    whole = made(name)
    x, y = whole._batches.first().data
    model = whole._predict.model
    cut = Objective(model, "cross_entropy", [(x[i : i + 2], y[i : i + 2]) for i in range(0, 9, 2)])
    one = Objective(model, "cross_entropy", (x[: cut.num_examples], y[: cut.num_examples]))
    all_columns = heavy_columns(EKFAC(one, "exact"), 10**6)
    norms = all_columns.norm(dim=0)
    assert bool((norms.diff() <= 1e-12).all())
    assert norms[-1] > 0
    for objective in (one, cut):
        few = heavy_columns(EKFAC(objective, "exact"), 5)
        assert few.shape == (objective.space.dim, 5)
        wanted = all_columns[:, :5] @ all_columns[:, :5].T
        assert (few @ few.T - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
def test_trace_of_columns_and_rest_is_that_of_the_whole(kind):
    """What EK-FAC says of the rest is exact on its diagonal: nothing is cut off at zero."""
    E = EKFAC(made("image"), kind)
    shift, steps, count = 1e-3, 30, 7
    V = heavy_columns(E, count)
    M = curvature_preconditioner(E, shift, steps, columns=count).inverse()
    scale = shift / damping_for_steps(shift, steps, accuracy=0.1)
    n = E.shape[0]
    rest = float(M.trace()) - float(V.square().sum()) - shift * n
    wanted = scale * (float(E.trace()) - float(V.square().sum()))
    assert rest == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", ["words", "image"])
def test_with_all_columns_it_is_the_inverse(name):
    objective = made(name, l2=0.01)
    n = objective.space.dim
    A = GaussNewton(objective) + 1e-3 * Identity(n, dtype=F64)
    M = curvature_preconditioner(EKFAC(objective, "exact"), 1e-3, 40, columns=10**6)
    eye = torch.eye(n, dtype=F64)
    assert (M.to_dense() @ A.to_dense() - eye).norm() <= 1e-10 * n**0.5
    assert "positive_definite" in M.tags


def test_without_columns_it_is_the_damped_inverse():
    E = EKFAC(made("image"), "exact")
    damping = damping_for_steps(1e-3, 40, accuracy=0.1)
    wanted = damping / 1e-3 * E.damped_inverse(damping).to_dense()
    found = curvature_preconditioner(E, 1e-3, 40, columns=0).to_dense()
    assert (found - wanted).norm() <= 1e-13 * wanted.norm()


@pytest.mark.parametrize("matrix", [KFAC, EKFAC])
def test_against_the_dense_formula(matrix):
    """With a regulariser for each layer, which is added to the shift there."""
    objective = made("image")
    sizes, l2 = objective.space.sizes, []
    for name, size in sizes.items():
        l2 += [0.002 if name.startswith("0") else 0.0] * size
    l2 = torch.tensor(l2, dtype=F64)
    objective = made("image", l2=l2)
    K, V, n = matrix(objective, "exact"), None, objective.space.dim
    V = heavy_columns(K, 6)
    shift, steps = 1e-3, 25
    total = torch.zeros(n, n, dtype=F64)
    start = 0
    places = K.permutation.to_dense()
    for name, block in K.blocks.items():
        size = block.shape[0]
        P = places[:, start : start + size]
        start += size
        Q = block.basis.to_dense()
        own = 0.002 if name.startswith("0") else 0.0
        left = block.values - own - (Q.T @ P.T @ V).square().sum(1)
        mu = shift + own
        values = mu * (1 + left.clamp(min=0) / damping_for_steps(mu, steps, accuracy=0.1))
        total += P @ Q @ torch.diag(values) @ Q.T @ P.T
    wanted = torch.linalg.inv(total + V @ V.T)
    found = curvature_preconditioner(K, shift, steps, columns=6).to_dense()
    assert (found - wanted).norm() <= 1e-10 * wanted.norm()


def test_in_front_of_conjugate_gradients():
    """Most rows are fitted; the few that are not make the spectrum."""
    torch.manual_seed(0)
    x, y = torch.randn(300, 10, dtype=F64), torch.randint(3, (300,))
    model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 3)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=40)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    objective = Objective(model, "cross_entropy", (x, y))
    A = GaussNewton(objective) + 1e-5 * Identity(objective.space.dim, dtype=F64)
    b = torch.randn(objective.space.dim, dtype=F64)
    E = EKFAC(objective, "exact")
    plain = solve(A, b, CG(rtol=1e-6, max_steps=5000))
    layers = E.damped_inverse(damping_for_steps(1e-5, 60))
    before = solve(A, b, CG(rtol=1e-6, max_steps=5000, preconditioner=layers))
    M = curvature_preconditioner(E, 1e-5, 60, columns=150)
    after = solve(A, b, CG(rtol=1e-6, max_steps=5000, preconditioner=M))
    assert {plain.status, before.status, after.status} == {SolveStatus.converged}
    assert 5 * after.steps < min(before.steps, plain.steps)
    assert (after.value - plain.value).norm() <= 1e-3 * plain.value.norm()


def test_float32_and_zero_columns():
    x, y = torch.zeros(4, 3), torch.zeros(4, 2)
    objective = Objective(nn.Linear(3, 2, bias=False), "mse", (x, y))  # no gradient anywhere
    E = EKFAC(objective, "exact")
    assert heavy_columns(E, 3).shape == (6, 0)
    M = curvature_preconditioner(E, 0.5, 10, columns=3)
    assert M.dtype == torch.float32
    assert torch.allclose(M.to_dense(), 2 * torch.eye(6))


def test_refused(monkeypatch):
    E = EKFAC(made("image"), "exact")
    for count in (-1, 2.0, True):
        with pytest.raises(ArgumentError, match="count is"):
            heavy_columns(E, count)
    with pytest.raises(ArgumentError, match="shift"):
        curvature_preconditioner(E, 0.0, 10)
    with pytest.raises(ArgumentError, match="steps"):
        curvature_preconditioner(E, 1e-3, -1)
    monkeypatch.setattr("woodbury.curvature.preconditioning.available_bytes", lambda _: 1000)
    with pytest.raises(BudgetError, match="fewer columns"):
        heavy_columns(E, 5)


@pytest.mark.parametrize("name", ["words", "image"])
def test_the_largest_of_all_columns_are_kept(name):
    objective = made(name)
    reference = columns_one_by_one(objective)
    norms = reference.norm(dim=0).sort(descending=True)
    wanted = reference[:, norms.indices[:6]]
    found = heavy_columns(EKFAC(objective, "exact"), 6)
    assert torch.allclose(found.norm(dim=0), norms.values[:6], rtol=1e-12)
    wanted = wanted @ wanted.T
    assert (found @ found.T - wanted).norm() <= 1e-11 * wanted.norm()


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_columns_are_those_that_eigenvalues_were_corrected_with(kind):
    objective = made("image")
    E = EKFAC(objective, kind)
    squares = heavy_columns(E, 10**6).square().sum(1)
    for name, block in E.layers.items():
        wanted = float(E.blocks[name].trace())
        assert wanted > 0
        assert float(squares[block.positions(objective.space)].sum()) == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_columns_are_those_that_factors_were_made_of(kind):
    """Without Kronecker form blocks are exact: sums over the very same columns."""
    objective = made("image")
    K = KFAC(objective, kind, dense=list(objective.space.sizes))
    V = heavy_columns(K, 10**6)
    whole, start = K.to_dense(), 0
    for size in objective.space.sizes.values():
        own = slice(start, start + size)
        start += size
        wanted = whole[own, own]
        assert wanted.norm() > 0
        assert (V[own] @ V[own].T - wanted).norm() <= 1e-12 * wanted.norm()
