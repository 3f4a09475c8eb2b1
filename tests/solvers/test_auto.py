"""What ``Auto`` chooses, what it leaves, and that its answers hold."""

from __future__ import annotations

import math

import pytest
import torch
from tests.solvers.systems import (
    DTYPES,
    KINDS,
    N,
    definite,
    error_of,
    function,
    random,
    residual_of,
    solution_of,
    wide,
    with_spectrum,
)

from woodbury import CG, Dense, Diagonal, Identity, inverse, solve
from woodbury.errors import ArgumentError, NonFiniteError
from woodbury.solvers import (
    GMRES,
    MINRES,
    Auto,
    SolveStatus,
)

F64 = torch.float64


def names(choices) -> list[str]:
    return [type(choice.recipe).__name__ for choice in choices]


def chosen(solution) -> str:
    return type(solution.state.chosen).__name__


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_operator(kind: str, dtype: torch.dtype) -> None:
    A = KINDS[kind](dtype)
    M = wide(A.to_dense())
    rtol = 1e-9 if dtype in (F64, torch.complex128) else 1e-4
    for shape in ((N,), (N, 1), (N, 4)):
        b = random(*shape, dtype=dtype)
        solution = solve(A, b, Auto(rtol=rtol))
        assert solution.ok
        assert (residual_of(M, solution.value, b) <= 1.01 * rtol).all()
        assert error_of(solution.value, solution_of(M, b)) < 60 * rtol


def test_plans_follow_structure_tags_and_memory() -> None:
    M = definite()
    auto = Auto()
    assert names(auto.plan(Dense(M)))[0] == "Structural"
    assert names(auto.plan(function(M, {"positive_definite"}))) == ["CG", "Cholesky", "Eigh"]
    assert names(auto.plan(function(M, {"hermitian"}))) == ["MINRES", "Eigh", "LSMR"]
    assert names(auto.plan(function(M, set()))) == ["GMRES", "LU", "QR", "LSMR"]
    assert names(auto.plan(function(M[:, :9], set())))[-2:] == ["QR", "LSMR"]
    shifted = function(M, {"positive_semidefinite"}) + 0.1 * Identity(N)
    assert names(auto.plan(shifted)) == ["CG", "CG", "Cholesky", "Eigh"]
    small = Auto(memory=1000)
    assert names(small.plan(function(M, {"hermitian"}))) == ["MINRES", "LSMR"]
    assert names(small.plan(function(M, set()))) == ["GMRES", "LSMR"]
    # For many right-hand sides the matrix is formed at once.
    assert names(auto.plan(function(M, {"positive_definite"}), columns=20)) == ["Cholesky", "Eigh"]


def test_easy_systems_cost_what_the_method_costs() -> None:
    M = definite(200, condition=4)
    b = random(200)
    for tags, recipe in (
        ({"positive_definite"}, CG(rtol=1e-6)),
        ({"hermitian"}, MINRES(rtol=1e-6)),
        (set(), GMRES(rtol=1e-6, restart=200)),
    ):
        A = function(M, tags)
        auto, plain = solve(A, b, Auto(rtol=1e-6)), solve(A, b, recipe)
        assert chosen(auto) == type(recipe).__name__
        assert auto.products <= plain.products + 1
        assert auto.status is SolveStatus.converged


def test_hard_systems_are_left_to_a_factorisation() -> None:
    spectrum = torch.logspace(-9, 0, 200, dtype=F64)
    signs = torch.where(torch.arange(200) % 2 == 0, 1.0, -1.0).double()
    b = random(200)
    for M, tags, last in (
        (with_spectrum(spectrum), {"positive_definite"}, "Cholesky"),
        (with_spectrum(spectrum * signs), {"hermitian"}, "Eigh"),
        (random(200, 200), set(), "LU"),
    ):
        solution = solve(function(M, tags), b, Auto(rtol=1e-6))
        assert chosen(solution) == last
        assert solution.products <= 2 * 200 + 2
        assert residual_of(M, solution.value, b) <= 1e-6
        tried = solution.info["tried"]
        assert len(tried) == 2
        assert "at this rate" in tried[0]["end"] or "not done after" in tried[0]["end"]
        assert sum(entry["products"] for entry in tried) == solution.products


def test_a_shift_that_shows_brings_in_nystrom() -> None:
    H = function(with_spectrum(torch.logspace(2, -28, 400, dtype=F64)), {"positive_semidefinite"})
    A = H + 1e-5 * Identity(400)
    b = random(400)
    solution = solve(A, b, Auto(rtol=1e-8))
    assert chosen(solution) == "CG"
    assert solution.state.chosen.preconditioner is not None
    assert "sketch" in solution.info["why"]
    assert solution.products < solve(A, b, CG(rtol=1e-8)).products / 2


def test_negative_curvature_under_a_false_tag() -> None:
    M = with_spectrum(torch.linspace(-1, 3, 50, dtype=F64))
    b = random(50)
    solution = solve(function(M, {"positive_definite"}), b, Auto())
    assert solution.info["tried"][0]["end"] == "negative_curvature"
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, solution_of(M, b)) < 1e-3


@pytest.mark.parametrize("tags", [{"hermitian"}, {"positive_semidefinite"}, set()])
@pytest.mark.parametrize("consistent", [True, False])
def test_singular_systems(tags: set[str], consistent: bool) -> None:
    M = with_spectrum(torch.cat([torch.zeros(20), torch.linspace(1, 2, 40)]).double())
    b = M @ random(60) if consistent else random(60)
    solution = solve(function(M, tags), b, Auto(rtol=1e-8))
    pinv = torch.linalg.pinv(M, rtol=1e-8) @ b
    assert solution.ok
    if consistent:
        assert solution.status is SolveStatus.converged
        assert residual_of(M, solution.value, b) < 1.01e-8
    else:
        assert solution.status is SolveStatus.least_squares
        r = b - M @ solution.value
        assert float((M @ r).norm() / r.norm()) < 1e-6
    assert error_of(solution.value, pinv) < 1e-6


def test_singular_structure() -> None:
    M = with_spectrum(torch.cat([torch.zeros(5), torch.linspace(1, 2, 15)]).double())
    solution = solve(Dense(M, tags={"hermitian"}), M @ random(20), Auto())
    assert solution.ok
    assert solution.info["tried"][0]["recipe"] == "Structural()"
    zero = solve(Diagonal(torch.tensor([1.0, 0.0])), torch.tensor([2.0, 0.0]), Auto())
    assert zero.ok
    assert torch.allclose(zero.value, torch.tensor([2.0, 0.0]))


@pytest.mark.parametrize("shape", [(40, 15), (15, 40)])
def test_rectangular_systems(shape: tuple[int, int]) -> None:
    M, b = random(*shape), random(shape[0], 2)
    solution = solve(function(M, set()), b, Auto(rtol=1e-9))
    assert solution.ok
    assert error_of(solution.value, torch.linalg.pinv(M) @ b) < 1e-7


def test_budget_of_products() -> None:
    A = function(definite(100, condition=1e6), {"positive_definite"})
    b = random(100)
    found = solve(A, b, Auto(products=20), throw=False)
    assert found.status is SolveStatus.max_steps
    assert found.products <= 22
    assert torch.equal(found.value, solve(A, b, CG(max_steps=19), throw=False).value)
    nothing = solve(A, b, Auto(products=0), throw=False)
    assert (nothing.status, nothing.products) == (SolveStatus.max_steps, 1)
    assert torch.equal(nothing.value, torch.zeros(100, dtype=F64))
    assert solve(A, b, Auto(products=300)).ok


def test_state_knows_what_worked() -> None:
    M = with_spectrum(torch.logspace(-9, 0, 100, dtype=F64))
    A = function(M, {"positive_definite"})
    first = solve(A, random(100), Auto())
    again = solve(A, random(100, seed=4), Auto(), state=first.state)
    assert chosen(again) == chosen(first) == "Cholesky"
    assert again.products <= 3
    P = inverse(A, Auto())
    assert error_of(P @ random(100), solution_of(M, random(100))) < 1e-3


def test_edges() -> None:
    pd = {"positive_definite"}
    for A, b, x in (
        (function(2 * torch.eye(N, dtype=F64), pd), random(N), random(N) / 2),
        (function(torch.full((1, 1), 4.0, dtype=F64), pd), torch.ones(1).double(), None),
        (function(definite(), pd), torch.zeros(N, dtype=F64), torch.zeros(N, dtype=F64)),
        (function(definite(), pd), random(N, 0), random(N, 0)),
    ):
        solution = solve(A, b, Auto())
        assert solution.ok
        if x is not None:
            assert torch.allclose(solution.value, x)
    exact = solution_of(definite(), random(N))
    warm = solve(function(definite(), pd), random(N), Auto(), x0=exact)
    assert (warm.steps, warm.status) == (0, SolveStatus.converged)
    B = random(N, 3)
    B[:, 1] = 0
    block = solve(function(definite(), pd), B, Auto(rtol=1e-8))
    assert error_of(block.value, solution_of(definite(), B)) < 1e-6


def test_not_finite() -> None:
    M = definite()
    M[1, 2] = M[2, 1] = math.nan
    solution = solve(function(M, {"positive_definite"}), random(N), Auto(), throw=False)
    assert not solution.ok
    with pytest.raises(NonFiniteError, match="entries of b"):
        solve(function(definite(), set()), torch.full((N,), math.inf, dtype=F64), Auto())


def test_bad_arguments() -> None:
    for wrong in ({"rtol": -1.0}, {"atol": math.nan}, {"products": -1}, {"memory": -1}):
        with pytest.raises(ArgumentError):
            Auto(**wrong)


def test_explains_itself() -> None:
    H = function(definite(), {"positive_semidefinite"})
    text = Auto().explain(H + 0.1 * Identity(N), random(N))
    assert text.startswith("Sum [24, 24], hermitian, positive_definite")
    for word in (
        "1. CG(",
        "2. CG(",
        "sketch",
        "0.1",
        "3. Cholesky()",
        "After 10 steps",
        "at this rate",
    ):
        assert word in text
    assert "structure has an inverse" in Auto().explain(Dense(definite()))
    assert "no symmetry is promised" in Auto().explain(function(definite(), set()))
    assert "any shape" in Auto().explain(function(random(90, 50), set()), random(90))


def test_progress_and_history_are_of_the_last_recipe() -> None:
    M = with_spectrum(torch.logspace(-9, 0, 100, dtype=F64))
    seen = []
    solve(
        function(M, {"positive_definite"}),
        random(100),
        Auto(),
        progress=lambda step, relative: seen.append(step),
    )
    assert len(seen) >= 12
    A = function(definite(100, condition=4), {"positive_definite"})
    easy = solve(A, random(100), Auto(), history=True)
    assert easy.history.shape == (easy.steps + 1,)


def test_gradients() -> None:
    t = definite(6, condition=4).requires_grad_()
    b = random(6).requires_grad_()
    symmetric = lambda t: (t + t.mT) / 2  # noqa: E731
    for tags in ({"positive_definite"}, set()):
        found = torch.autograd.grad(
            (solve(function(symmetric(t), tags), b, Auto(rtol=1e-12)).value ** 2).sum(), (t, b)
        )
        expected = torch.autograd.grad((torch.linalg.solve(symmetric(t), b) ** 2).sum(), (t, b))
        for a, e in zip(found, expected, strict=True):
            assert error_of(a, e) < 1e-8
