from __future__ import annotations

import math

import pytest
import torch
from tests.solvers.systems import definite, function, random, wide, with_spectrum
from tests.solvers.test_cg import Weighted

from woodbury import Diagonal, Identity
from woodbury.decompositions import lanczos, lanczos_batch
from woodbury.decompositions.lanczos_batch import tridiagonal
from woodbury.errors import ArgumentError, NonFiniteError, ShapeError, TagError

F64 = torch.float64
DTYPES = [F64, torch.float32, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_defining_identity(dtype: torch.dtype, kind: str, steps: int) -> None:
    M = with_spectrum(torch.logspace(0, -2, 40, dtype=F64), dtype=dtype)
    found = lanczos_batch(
        function(M, {"hermitian"}), steps, random(40, 3, dtype=dtype), reorthogonalize=kind
    )
    bound = 1e-4 if dtype == torch.float32 else 1e-10
    assert found.products == 3 * steps
    T = tridiagonal(found.diagonal, found.off_diagonal)
    assert found.bases is not None
    for j in range(3):
        Q = wide(found.bases[j])
        assert torch.allclose(Q.mH @ Q, torch.eye(steps).to(Q), atol=bound)
        R = wide(M) @ Q - Q @ T[j].to(Q)
        assert float(R[:, :-1].abs().sum()) < 100 * bound
        assert float(R[:, -1].norm()) == pytest.approx(float(found.remainder[j]), abs=bound)


def test_columns_are_those_of_single_runs() -> None:
    A, starts = function(definite(50, condition=1e3), {"hermitian"}), random(50, 4)
    found = lanczos_batch(A, 15, starts)
    for j in range(4):
        alone = lanczos(A, 15, start=starts[:, j])
        assert torch.allclose(found.diagonal[j], alone.diagonal)
        assert torch.allclose(found.off_diagonal[j], alone.off_diagonal)
        assert float(found.norms[j]) == pytest.approx(float(starts[:, j].norm()))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_gauss_rules_are_exact_for_polynomials(steps: int) -> None:
    M = definite(30)
    v = random(30, 2)
    found = lanczos_batch(function(M, {"hermitian"}), steps, v)
    nodes, weights = found.quadrature()
    assert torch.allclose(weights.sum(1), torch.ones(2, dtype=F64))
    for degree in range(2 * steps):
        exact = (v * (torch.linalg.matrix_power(M, degree) @ v)).sum(0) / (v * v).sum(0)
        assert torch.allclose((weights * nodes**degree).sum(1), exact, rtol=1e-10)
    next_one = (v * (torch.linalg.matrix_power(M, 2 * steps) @ v)).sum(0) / (v * v).sum(0)
    assert not torch.allclose((weights * nodes ** (2 * steps)).sum(1), next_one, rtol=1e-10)


def test_shorter_rules_are_those_of_fewer_steps() -> None:
    A, v = function(definite(30), {"hermitian"}), random(30, 2)
    shorter = lanczos_batch(A, 9, v).quadrature(4)
    for mine, other in zip(shorter, lanczos_batch(A, 4, v).quadrature(), strict=True):
        assert torch.allclose(mine, other)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_gauss_and_radau_enclose_the_logarithm(steps: int) -> None:
    M, v = definite(40, condition=1e3), random(40, 5)
    values, U = torch.linalg.eigh(M)
    exact = ((U.T @ v).square() * values.log()[:, None]).sum(0) / v.square().sum(0)
    found = lanczos_batch(function(M, {"hermitian"}), steps, v)
    gaps = []
    for bound, sign in ((float(values[0]) * 0.9, 1), (float(values[-1]) * 1.1, -1)):
        nodes, weights = found.quadrature(radau=bound)
        edge = nodes.min(1).values if sign > 0 else nodes.max(1).values
        assert torch.allclose(edge, torch.full((5,), bound, dtype=F64))
        assert torch.allclose(weights.sum(1), torch.ones(5, dtype=F64))
        gaps.append(sign * (exact - (nodes.log() * weights).sum(1)))
    assert bool((gaps[0] > 0).all())  # a lower bound as a node: too small
    assert bool((gaps[1] > 0).all())  # an upper bound: too large
    nodes, weights = found.quadrature()
    assert bool(((nodes.log() * weights).sum(1) > exact).all())
    with pytest.raises(ArgumentError, match="must bound the spectrum"):
        found.quadrature(radau=float(nodes.mean()))


def test_exhausted_spaces_leave_the_block() -> None:
    A = Diagonal(torch.tensor([1.0, 1.0, 3.0, 3.0, 7.0, 8.0], dtype=F64))
    starts = torch.zeros(6, 3, dtype=F64)
    starts[:4, 0] = 1  # two eigenvalues
    starts[4, 1] = 1  # one
    starts[:, 2] = random(6)  # all four
    found = lanczos_batch(A, 6, starts)
    assert found.sizes == (2, 1, 4)
    assert found.products == 7
    assert found.remainder.tolist() == [0.0, 0.0, 0.0]
    nodes, weights = found.quadrature()
    means = (nodes * weights).sum(1)
    assert means[:2].tolist() == pytest.approx([2.0, 7.0])
    assert bool((weights[:2] > 1e-20).sum(1).tolist() == [2, 1])
    assert bool((nodes >= 1 - 1e-12).all() and (nodes <= 8 + 1e-12).all())
    assert lanczos_batch(2.0 * Identity(5, dtype=F64), 4, random(5, 2)).products == 2
    assert lanczos_batch(0.0 * Identity(5, dtype=F64), 4, random(5, 2)).diagonal.tolist() == [
        [0.0],
        [0.0],
    ]


@pytest.mark.parametrize("kind", ["full", "selective", "none"])
def test_copies_of_converged_eigenvalues(kind: str) -> None:
    """An outlier converges at once, and rounding brings it back unless it is kept out."""
    spectrum = torch.cat([torch.linspace(0, 1, 199), torch.tensor([100.0])]).to(F64)
    A, v = Diagonal(spectrum), random(200, 2)
    found = lanczos_batch(A, 60, v, reorthogonalize=kind)
    nodes, weights = found.quadrature()
    copies = ((nodes - 100).abs() < 1e-6).sum(1)
    assert bool((copies == 1).all()) == (kind != "none")
    # However many copies there are, their weights add up to that of the eigenvalue.
    outlier = (weights * (nodes > 50)).sum(1)
    exact = v[-1].square() / v.square().sum(0)
    assert torch.allclose(outlier, exact, rtol=1e-9)
    full = lanczos_batch(A, 60, v).quadrature()
    for f in (torch.exp, lambda x: x**7, lambda x: 1 / (1 + x)):
        mine, other = ((f(n / 100) * w).sum(1) for n, w in ((nodes, weights), full))
        assert torch.allclose(mine, other, rtol=1e-8)
    assert (found.bases is None) == (kind == "none")


def test_selective_keeps_the_basis_semiorthogonal() -> None:
    """Parlett and Scott: to half the digits, where without it all are lost."""
    A, v = Diagonal(torch.logspace(-6, 0, 300, dtype=F64)), random(300, 1)
    losses = {}
    for kind in ("full", "selective"):
        found = lanczos_batch(A, 120, v, reorthogonalize=kind)
        assert found.bases is not None
        Q = found.bases[0]
        losses[kind] = float((Q.T @ Q - torch.eye(120, dtype=F64)).abs().max())
    assert losses["full"] < 1e-13
    assert losses["selective"] < 1e-6


def test_inner_product_of_the_space() -> None:
    weights = torch.logspace(-1, 1, 20, dtype=F64)
    A = function(definite(20) / weights[:, None], {"hermitian"})
    A.space = A.out_space = Weighted(weights)
    found = lanczos_batch(A, 20, random(20, 2))
    exact = torch.linalg.eigvals(A.to_dense()).real.sort().values
    nodes, _ = found.quadrature()
    assert torch.allclose(nodes, exact.expand(2, -1), atol=1e-8)


def test_progress_and_half_precision() -> None:
    steps: list[int] = []
    A = Diagonal(torch.linspace(1, 2, 50).bfloat16())
    found = lanczos_batch(A, 8, torch.ones(50, 1), progress=steps.append)
    assert steps == list(range(1, 9))
    assert found.bases is not None
    assert found.bases.dtype == torch.float32
    assert found.quadrature()[0].max() == pytest.approx(2.0, abs=0.05)


def test_what_is_refused() -> None:
    A = function(definite(), {"hermitian"})
    v = random(24, 2)
    with pytest.raises(TagError, match="lanczos_batch needs the tag 'hermitian'"):
        lanczos_batch(function(definite(), set()), 3, v)
    with pytest.raises(ArgumentError, match="steps is 0"):
        lanczos_batch(A, 0, v)
    with pytest.raises(ArgumentError, match="reorthogonalize is 'some'"):
        lanczos_batch(A, 3, v, reorthogonalize="some")  # type: ignore[arg-type]
    for wrong in (v[:3], v[:, 0], v[:, :0]):
        with pytest.raises(ShapeError, match=r"expected \[24, p\] with p >= 1"):
            lanczos_batch(A, 3, wrong)
    v[:, 1] = 0
    with pytest.raises(ArgumentError, match="none may be zero"):
        lanczos_batch(A, 3, v)
    with pytest.raises(NonFiniteError, match="the product of step 1 with FunctionOperator"):
        lanczos_batch(function(math.nan * definite(), {"hermitian"}), 3, random(24, 2))
