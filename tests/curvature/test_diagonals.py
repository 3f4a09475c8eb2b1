from __future__ import annotations

import pytest
import torch
from tests.curvature.reference import (
    classification,
    cross_entropy,
    dense_gauss_newton,
    flat_parameters,
    mlp,
    network,
)
from torch import nn
from torch.autograd.functional import hessian

from woodbury import CG, BlockDiagonal, Diagonal, Fisher, GaussNewton, Objective, solve
from woodbury.curvature import block_curvature, diagonal_curvature
from woodbury.errors import ArgumentError, BudgetError, DataError, StructureError

F64 = torch.float64
SIZES = (3, 4, 2)
KINDS = ("gauss_newton", "fisher", "empirical_fisher", "hessian")


class Setting:
    """A network with weights and a regulariser, and its matrices from a loss written by hand."""

    def __init__(self, weighted: bool = True) -> None:
        self.model = network(SIZES)
        self.x, self.y = classification(9, 3, 2)
        self.flat = flat_parameters(self.model)
        n = len(self.flat)
        self.w = torch.linspace(0.2, 2, 9, dtype=F64) if weighted else torch.ones(9, dtype=F64)
        self.l2 = torch.linspace(0.1, 1, n, dtype=F64) if weighted else torch.zeros(n, dtype=F64)
        batches = [(self.x[:4], self.y[:4]), (self.x[4:], self.y[4:])]
        self.objective = Objective(
            self.model,
            "cross_entropy",
            batches,
            weights=self.w if weighted else None,
            l2=self.l2 if weighted else 0.0,
        )

    def dense(self, kind: str) -> torch.Tensor:
        def losses(t):
            return cross_entropy(mlp(t, self.x, SIZES, torch.tanh), self.y)

        if kind == "hessian":
            M = hessian(lambda t: (self.w * losses(t)).sum() / 9, self.flat)
        elif kind == "empirical_fisher":
            G = torch.autograd.functional.jacobian(losses, self.flat)
            M = G.T @ (self.w[:, None] * G) / 9
        else:
            M = dense_gauss_newton(
                lambda t: mlp(t, self.x, SIZES, torch.tanh),
                lambda z: (self.w * cross_entropy(z, self.y)).sum() / 9,
                self.flat,
            )
        return M + torch.diag(self.l2)


def blocks_of(M: torch.Tensor, sizes) -> torch.Tensor:
    parts, start = [], 0
    for size in sizes:
        parts.append(M[start : start + size, start : start + size])
        start += size
    return torch.block_diag(*parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_exact_forms_are_parts_of_the_dense_matrix(kind, weighted):
    setting = Setting(weighted)
    want = setting.dense(kind)
    D = diagonal_curvature(setting.objective, kind)
    assert isinstance(D, Diagonal)
    torch.testing.assert_close(D.values, want.diagonal(), rtol=1e-9, atol=1e-10)
    B = block_curvature(setting.objective, kind)
    assert isinstance(B, BlockDiagonal)
    per_tensor = [p.numel() for p in setting.model.parameters()]
    torch.testing.assert_close(B.to_dense(), blocks_of(want, per_tensor), rtol=1e-9, atol=1e-10)
    names = [name for name, _ in setting.model.named_parameters()]
    layers = block_curvature(setting.objective, kind, blocks=[names[:2], names[2:]])
    want = blocks_of(want, [sum(per_tensor[:2]), sum(per_tensor[2:])])
    torch.testing.assert_close(layers.to_dense(), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("samples", [1, 4])
def test_drawn_labels_are_those_of_the_sampled_fisher_matrix(samples):
    setting = Setting()
    make = torch.Generator().manual_seed
    want = Fisher(setting.objective, "sampled", samples=samples, generator=make(5)).to_dense()
    for kind in ("gauss_newton", "fisher"):
        options = {"method": "sampled", "samples": samples}
        D = diagonal_curvature(setting.objective, kind, generator=make(5), **options)
        torch.testing.assert_close(D.values, want.diagonal(), rtol=1e-9, atol=1e-10)
        B = block_curvature(setting.objective, kind, generator=make(5), **options)
        sizes = [p.numel() for p in setting.model.parameters()]
        torch.testing.assert_close(B.to_dense(), blocks_of(want, sizes), rtol=1e-9, atol=1e-10)


def test_probes_of_the_hessian_approach_its_diagonal():
    setting = Setting()
    want = setting.dense("hessian").diagonal()
    gaps = []
    for samples in (10, 1000):
        D = diagonal_curvature(setting.objective, "hessian", method="sampled", samples=samples)
        gaps.append(float((D.values - want).norm() / want.norm()))
    assert gaps[1] < 0.05
    assert gaps[1] < gaps[0] / 3


def test_squared_error_of_several_outputs():
    torch.manual_seed(1)
    x, y = torch.randn(6, 3, dtype=F64), torch.randn(6, 2, dtype=F64)
    objective = Objective(nn.Linear(3, 2).double(), "mse", (x, y))
    want = GaussNewton(objective).to_dense()
    torch.testing.assert_close(diagonal_curvature(objective).values, want.diagonal())
    torch.testing.assert_close(block_curvature(objective).to_dense(), blocks_of(want, [6, 2]))


def test_tags_follow_from_the_matrix():
    plain, weighted = Setting(False), Setting()
    assert "positive_definite" in block_curvature(weighted.objective).tags
    assert "positive_definite" in diagonal_curvature(weighted.objective).tags
    assert "positive_semidefinite" in block_curvature(plain.objective, "empirical_fisher").tags
    assert "positive_semidefinite" not in block_curvature(plain.objective, "hessian").tags
    signed = plain.objective.with_weights(torch.linspace(-1, 1, 9, dtype=F64))
    assert "positive_semidefinite" not in block_curvature(signed).tags


def test_both_precondition_and_have_an_inverse():
    objective = Setting().objective
    G, b = GaussNewton(objective), objective.gradient()
    exact = torch.linalg.solve(G.to_dense(), b)
    for approximation in (diagonal_curvature(objective), block_curvature(objective)):
        recipe = CG(rtol=1e-12, preconditioner=approximation.inverse())
        torch.testing.assert_close(solve(G, b, recipe).value, exact, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(
            approximation.solve(b), torch.linalg.solve(approximation.to_dense(), b)
        )


class Unvectorizable(nn.Module):
    def __init__(self, inner) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        scale = 1.0 if x.sum().item() < torch.inf else 0.0  # .item() is not for vmap
        return scale * self.inner(x)


def test_models_that_cannot_be_vectorized_give_the_same():
    setting = Setting(False)
    data = setting.x, setting.y
    other = Objective(Unvectorizable(setting.model), "cross_entropy", data)
    plain = Objective(setting.model, "cross_entropy", data)
    torch.testing.assert_close(block_curvature(other).to_dense(), block_curvature(plain).to_dense())


def test_what_cannot_be_done_is_refused():
    objective = Setting().objective
    for function in (diagonal_curvature, block_curvature):
        with pytest.raises(ArgumentError, match="kind is 'kfac'"):
            function(objective, "kfac")
        with pytest.raises(ArgumentError, match="method"):
            function(objective, method="guess")
        with pytest.raises(ArgumentError, match="samples"):
            function(objective, method="sampled", samples=0)
        with pytest.raises(ArgumentError, match="nothing to draw"):
            function(objective, "empirical_fisher", method="sampled")
        x, y = classification(9, 3, 2)
        margin = Objective(network(SIZES), nn.MultiMarginLoss(), (x, y))
        for options in ({"kind": "fisher"}, {"method": "sampled"}):
            with pytest.raises(StructureError, match="likelihood"):
                function(margin, **options)
        train = Objective(network(SIZES), "cross_entropy", (x, y), mode="train")
        with pytest.raises(DataError, match="mode='eval'"):
            function(train)
    with pytest.raises(ArgumentError, match="exact only"):
        block_curvature(objective, "hessian", method="sampled")
    names = list(objective.space.sizes)
    for blocks in ([names[::-1]], [names[:2]], [names, []], [names, names]):
        with pytest.raises(ArgumentError, match="each once"):
            block_curvature(objective, blocks=blocks)
    with pytest.raises(BudgetError, match="smaller blocks"):
        block_curvature(objective, memory=100)
