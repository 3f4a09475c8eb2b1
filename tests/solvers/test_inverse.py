from __future__ import annotations

import math

import pytest
import torch
from tests.conformance import OperatorConformance
from tests.solvers.systems import N, definite, error_of, eye, function, random, solution_of

from woodbury import CG, Cholesky, Dense, Eigh, Identity, Neumann, Nystrom, inverse, solve
from woodbury.errors import ArgumentError, NotPositiveDefiniteError, SolveError, TagError
from woodbury.solvers import LU, InverseOperator, SolveReport, SolveStatus, SolveWarning
from woodbury.solvers.inverse import AppliedRecipe

F64 = torch.float64


def spd(M: torch.Tensor):
    return function(M, {"positive_definite"})


class TestInverseOperator(OperatorConformance):
    def make(self):
        cases = []
        for dtype in (F64, torch.float32, torch.complex128):
            M = definite(6, condition=5, dtype=dtype)
            general = M + 0.2 * random(6, 6, dtype=dtype)
            exact = M.to(torch.complex128 if dtype.is_complex else F64)
            for recipe in (Cholesky(), Eigh()):
                cases.append((inverse(spd(M), recipe), torch.linalg.inv(exact)))
            cases.append((inverse(function(general, set()), LU()), torch.linalg.inv(general)))
        cases = [(A, wide_(M)) for A, M in cases]
        dense = Dense(definite(6), tags={"positive_definite"})
        return [*cases, (inverse(dense), torch.linalg.inv(dense.matrix))]


class TestAppliedRecipe(OperatorConformance):
    def make(self):
        M = definite(6, condition=5)
        general = M + 0.2 * random(6, 6)
        series = Neumann(terms=3, step=0.5)
        cases = [(spd(M), M, series), (function(general, set()), general, series)]
        cases.append((spd(M), M, Cholesky()))
        made = []
        for A, dense, recipe in cases:
            columns = [solve(A, e, recipe).value for e in eye(6)]
            made.append((AppliedRecipe(A, recipe, recipe.prepare(A)), torch.stack(columns, dim=1)))
            assert dense.shape == (6, 6)
        return made


def wide_(M: torch.Tensor) -> torch.Tensor:
    return M.to(torch.complex128 if M.is_complex() else F64)


def test_prepared_once() -> None:
    calls = []
    M = definite()

    def product(X: torch.Tensor) -> torch.Tensor:
        calls.append(X.shape[1])
        return M @ X

    A = spd(M)
    A._forward = product
    inverse_A = inverse(A, Cholesky())
    assert calls == [N]
    B = random(N, 3)
    assert error_of(inverse_A @ B, solution_of(M, B)) < 1e-12
    assert inverse_A @ B[:, 0] is not None
    assert calls == [N, 3, 1]
    assert isinstance(inverse_A, InverseOperator)


def test_default_recipe_and_structure() -> None:
    A = Dense(definite(), tags={"positive_definite"})
    inverse_A = inverse(A)
    assert torch.allclose(inverse_A.logdet(), -A.logdet())
    assert "positive_definite" in inverse_A.tags
    assert inverse_A.space == A.space
    assert inverse_A.inverse() is A
    state = Eigh().prepare(A)
    assert inverse(A, state=state).recipe == Eigh()


def test_report_is_kept_and_handed_in() -> None:
    A = spd(definite())
    report = SolveReport()
    inverse_A = inverse(A, CG(), report=report)
    assert inverse_A.report is report
    inverse_A @ random(N)
    inverse_A @ random(N, 2)
    assert report.calls == 2
    assert report.last.status is SolveStatus.converged
    assert report.products == sum(solve(A, b, CG()).products for b in (random(N), random(N, 2)))
    certificate = report.certificate()
    assert certificate["calls"] == 2
    assert certificate["ok"]
    assert SolveReport().certificate()["calls"] == 0


@pytest.mark.parametrize("columns", [None, 3])
def test_policies(columns: int | None) -> None:
    A = spd(definite(60, condition=1e4))
    vector = torch.linalg.eigh(definite(60, condition=1e4)).eigenvectors[:, 0]
    easy, hard = vector, random(60)
    B = hard if columns is None else torch.stack([easy, hard, easy], dim=1)
    recipe = CG(max_steps=3)
    with pytest.raises(SolveError, match="max_steps"):
        inverse(A, recipe) @ B
    with pytest.warns(SolveWarning, match="max_steps"):
        warned = inverse(A, recipe, on_failure="warn") @ B
    ignored = inverse(A, recipe, on_failure="ignore") @ B
    assert torch.equal(warned, ignored)
    assert torch.isfinite(ignored).all()
    marked = inverse(A, recipe, on_failure="nan") @ B
    if columns is None:
        assert torch.isnan(marked).all()
    else:
        assert torch.isnan(marked).all(dim=0).tolist() == [False, True, False]
        assert torch.equal(marked[:, [0, 2]], ignored[:, [0, 2]])
    with pytest.raises(ArgumentError, match="on_failure is 'raises'; it must be one of"):
        inverse(A, recipe, on_failure="raises")


def test_policy_holds_in_the_backward_pass() -> None:
    M = definite(60, condition=1e4)
    easy = torch.linalg.eigh(M).eigenvectors[:, 0]
    for on_failure in ("raise", "warn", "nan", "ignore"):
        b = easy.clone().requires_grad_()
        inverse_A = inverse(spd(M), CG(max_steps=3), on_failure=on_failure)
        value = (inverse_A @ b).sum()
        if on_failure == "raise":
            with pytest.raises(SolveError):
                value.backward()
        elif on_failure == "warn":
            with pytest.warns(SolveWarning):
                value.backward()
        else:
            value.backward()
            assert math.isnan(b.grad[0]) == (on_failure == "nan")
        assert inverse_A.report.calls == 2
        assert inverse_A.report.failures == 1


def test_algebra() -> None:
    M, b = definite(), random(N)
    A = spd(M)
    S = inverse(A, Cholesky()) + 2.0 * Identity(N)
    assert error_of(S @ b, solution_of(M, b) + 2 * b) < 1e-12
    assert "positive_definite" in S.tags
    nested = solve(S, b, CG(rtol=1e-10))
    exact = torch.linalg.solve(torch.linalg.inv(M) + 2 * eye(N), b)
    assert error_of(nested.value, exact) < 1e-8


def test_low_rank_approximation_as_an_operator() -> None:
    A = function(definite(), {"positive_semidefinite"}) + 0.1 * Identity(N)
    P = inverse(A, Nystrom(rank=N))
    assert error_of(P @ random(N), solution_of(definite() + 0.1 * eye(N), random(N))) < 1e-10


def test_what_cannot_be_prepared_is_refused_at_once() -> None:
    with pytest.raises(NotPositiveDefiniteError):
        inverse(function(-definite(), {"hermitian"}), Cholesky(), on_failure="ignore")
    with pytest.raises(TagError, match="'hermitian'"):
        inverse(function(definite(), set()), CG())
