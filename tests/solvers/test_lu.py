from __future__ import annotations

import pytest
import torch
from tests.solvers.systems import DTYPES, error_of, function, random, solution_of

from woodbury import solve
from woodbury.errors import SingularError
from woodbury.solvers import LU, SolveStatus


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_general_matrix_and_its_adjoint(dtype: torch.dtype) -> None:
    M = random(12, 12, dtype=dtype) + 3 * torch.eye(12, dtype=dtype)
    A, B = function(M, set()), random(12, 2, dtype=dtype, seed=3)
    recipe = LU()
    state = recipe.prepare(A)
    bound = 1e-12 if dtype in (torch.float64, torch.complex128) else 1e-5
    solution = solve(A, B, recipe, state=state)
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, solution_of(M, B)) < bound
    adjoint = recipe.adjoint_state(A, state)
    assert adjoint.factor is state.factor
    assert adjoint.products == 0
    solution = solve(A.H, B, recipe, state=adjoint)
    assert error_of(solution.value, solution_of(M.mH.resolve_conj(), B)) < bound
    assert not recipe.adjoint_state(A.H, adjoint).adjoint


def test_zero_on_the_diagonal_is_no_trouble() -> None:
    M = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    solution = solve(function(M, set()), torch.tensor([2.0, 3.0]), LU())
    assert solution.value.tolist() == [3.0, 2.0]


def test_singular() -> None:
    M = random(6, 6)
    M[:, 5] = M[:, :5].sum(dim=1)
    with pytest.raises(SingularError, match=r"the pivots run from \S+ to \S+; add damping"):
        solve(function(M, set()), random(6), LU())
    solution = solve(function(M, set()), random(6), LU(), throw=False)
    assert solution.status is SolveStatus.singular
