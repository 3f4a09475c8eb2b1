from __future__ import annotations

import pytest
import torch
from tests.solvers.systems import KINDS, definite, error_of, function, random, solution_of, wide

from woodbury import Dense, Diagonal, solve
from woodbury.errors import SingularError, StructureError
from woodbury.solvers import SolveStatus, Structural

F64 = torch.float64


@pytest.mark.parametrize("kind", ["dense", "diagonal", "kronecker", "sparse", "low_rank_update"])
def test_structure_is_what_solves(kind: str) -> None:
    A, b = KINDS[kind](F64), random(24, 2)
    solution = solve(A, b)
    assert solution.recipe == Structural()
    assert solution.status is SolveStatus.converged
    assert error_of(solution.value, solution_of(wide(A.to_dense()), b)) < 1e-12
    # No column for the solution, one for the residual.
    assert solution.products == 2


def test_without_structure() -> None:
    with pytest.raises(StructureError, match="no structural inverse"):
        solve(function(definite(), set()), random(24), Structural())


def test_singular() -> None:
    A = Diagonal(torch.tensor([1.0, 0.0], dtype=F64))
    with pytest.raises(SingularError, match="entry 1 of the diagonal"):
        solve(A, torch.ones(2, dtype=F64))
    assert solve(A, torch.ones(2, dtype=F64), throw=False).status is SolveStatus.singular


def test_ill_conditioned_is_completed_with_its_residual() -> None:
    M = definite(60, condition=1e12)
    solution = solve(Dense(M, tags={"positive_definite"}), random(60))
    assert solution.status is SolveStatus.completed
    assert 1e-8 < solution.residual < 1e-2
    assert solution.ok
