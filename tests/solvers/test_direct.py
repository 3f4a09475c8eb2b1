"""What the factorisations share: the matrix in memory, and the budget for it."""

from __future__ import annotations

import math

import pytest
import torch
from tests.solvers.systems import DTYPES, definite, random, with_spectrum

from woodbury import Cholesky, Dense, Eigh, FunctionOperator, solve
from woodbury.errors import ArgumentError, BudgetError, NonFiniteError, TagError
from woodbury.operators import memory
from woodbury.operators.factorization import reciprocal_condition
from woodbury.solvers import LU
from woodbury.solvers.direct import form

F64 = torch.float64


def untouchable(n: int, m: int | None = None) -> FunctionOperator:
    """An operator whose products would take the machine's memory."""

    def product(X: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a product was taken")

    square = m is None or m == n
    tags = {"positive_definite"} if square else set()
    return FunctionOperator(product, (m or n, n), rmatmat=product, dtype=F64, tags=tags)


FORMING = {Cholesky: 2, Eigh: 4, LU: 2}


@pytest.mark.parametrize("recipe", FORMING)
def test_matrix_that_does_not_fit(recipe) -> None:
    n = 2 * 10**6
    need = FORMING[recipe] * 8 * n * n
    with pytest.raises(BudgetError) as caught:
        solve(untouchable(n), torch.ones(n, dtype=F64), recipe())
    message = str(caught.value)
    assert f"({need:,} bytes)" in message
    assert "are available; use an iterative recipe" in message
    assert "or raise budget_bytes" in message


@pytest.mark.parametrize("recipe", FORMING)
def test_budget_of_the_caller(recipe) -> None:
    A, b = Dense(definite(16), tags={"positive_definite"}), random(16)
    need = FORMING[recipe] * 8 * 16 * 16
    with pytest.raises(BudgetError, match=f"{need:,} bytes.* is the budget"):
        recipe(budget_bytes=need - 1).prepare(A)
    assert solve(A, b, recipe(budget_bytes=need)).ok
    with pytest.raises(ArgumentError, match="budget_bytes is -1"):
        recipe(budget_bytes=-1)


def test_what_is_available_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_kernel_bytes", lambda: 10**8)
    monkeypatch.setattr(memory, "_group_bytes", lambda: None)
    with pytest.raises(BudgetError, match=r"takes 122.0 MiB .* and 95.4 MiB are available"):
        LU().prepare(untouchable(2828))
    with pytest.raises(AssertionError, match="a product was taken"):  # 48 MB are not asked about
        LU().prepare(untouchable(1700))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_form_copies_and_symmetrises(dtype: torch.dtype) -> None:
    M = definite(30, dtype=dtype)
    noise = torch.finfo(dtype).eps * random(30, 30, dtype=dtype)
    A = Dense(M + noise, tags={"hermitian"})
    formed = form(A, hermitian=True)
    assert torch.equal(formed, formed.mH)
    wide = torch.complex128 if dtype.is_complex else F64
    noisy = A.matrix.to(wide)
    assert torch.allclose(formed, (noisy + noisy.mH) / 2, atol=1e-15)
    before = A.matrix.clone()
    form(A, hermitian=False).zero_()
    assert torch.equal(A.matrix, before)


def test_form_by_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from woodbury.solvers import direct

    monkeypatch.setattr(direct, "_BLOCK_BYTES", 7 * 8 * 30)
    M = definite(30) + 1e-12 * random(30, 30)
    made = form(
        FunctionOperator(lambda X: M @ X, (30, 30), tags={"symmetric"}, dtype=F64), hermitian=True
    )
    assert torch.equal(made, made.T)
    assert torch.allclose(made, (M + M.T) / 2, atol=1e-16)
    M[28, 3] += 1
    wrong = FunctionOperator(lambda X: M @ X, (30, 30), tags={"symmetric"}, dtype=F64)
    with pytest.raises(TagError, match=r"entries \((3, 28|28, 3)\) and \((3, 28|28, 3)\) are"):
        form(wrong, hermitian=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_form_refuses_what_is_not_finite(bad: float) -> None:
    M = torch.full((4, 4), 1e308, dtype=F64)  # the sum overflows, the entries do not
    assert torch.equal(form(Dense(M), hermitian=False), M)
    M[1, 2] = M[2, 1] = bad
    with pytest.raises(NonFiniteError, match="2 of 16 entries"):
        form(Dense(M), hermitian=False)


def test_reciprocal_condition() -> None:
    M = with_spectrum(torch.logspace(-5, 0, 20, dtype=F64))
    inverse = torch.linalg.inv(M)
    norm = torch.linalg.matrix_norm(M, 1).item()
    exact = 1 / (norm * torch.linalg.matrix_norm(inverse, 1).item())
    found = reciprocal_condition(norm, lambda B, adjoint: inverse @ B, M)
    assert exact <= found * (1 + 1e-6)
    assert found <= 3 * exact
    assert reciprocal_condition(0.0, lambda B, adjoint: B, M) == 0
    assert reciprocal_condition(1.0, lambda B, adjoint: B * math.inf, M) == 0
    assert reciprocal_condition(0.0, lambda B, adjoint: B, M[:0]) == 1
