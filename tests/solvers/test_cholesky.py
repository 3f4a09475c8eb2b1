from __future__ import annotations

import pytest
import torch
from tests.solvers.systems import definite, error_of, function, random, solution_of, with_spectrum

from woodbury import Cholesky, solve
from woodbury.errors import NotPositiveDefiniteError, SingularError
from woodbury.solvers import SolveStatus

F64 = torch.float64


def spd(M: torch.Tensor):
    return function(M, {"positive_definite"})


def test_factor_is_in_float64_whatever_the_dtype() -> None:
    M, b = definite(40, condition=1e5), random(40)
    A = spd(M.float())
    state = Cholesky().prepare(A)
    assert state.factor.dtype == F64
    L = state.factor
    assert torch.allclose(L @ L.T, M.float().double(), atol=1e-14)
    solution = solve(A, b.float(), Cholesky(), state=state)
    # Only the rounding of the answer is left, not that of a factorisation in float32.
    assert error_of(solution.value, solution_of(M.float(), b.float())) < 1e-7


def test_values_in_the_message() -> None:
    M = with_spectrum(torch.tensor([-0.25, 1.0, 2.0, 3.0], dtype=F64))
    message = (
        r"leading minor of order \d is not positive definite: the eigenvalues run from -0.25 to 3;"
        r" add damping above 0.25, for example A \+ 0.5 \* Identity\(4\)"
    )
    with pytest.raises(NotPositiveDefiniteError, match=message):
        Cholesky().prepare(spd(M))


@pytest.mark.parametrize("smallest", [0.0, 1e-17, -1e-17])
def test_singular_to_working_precision(smallest: float) -> None:
    spectrum = torch.linspace(0, 3, 30, dtype=F64)
    spectrum[0] = smallest
    with pytest.raises(SingularError, match=r"run from \S+e-1\d to 3; add damping, or use Eigh"):
        solve(spd(with_spectrum(spectrum)), random(30), Cholesky())


def test_ill_conditioned_in_the_dtype_of_the_operator() -> None:
    b = random(50, dtype=torch.float32)
    M = definite(50, condition=1e5, dtype=torch.float32)
    solution = solve(spd(M), b, Cholesky())
    assert solution.status is SolveStatus.precision
    assert 3e-4 < solution.residual < 1e-2
    M = definite(50, condition=1e9).float()
    solution = solve(spd(M), b, Cholesky(), throw=False)
    assert solution.status is SolveStatus.singular
    assert solution.residual > 0.1


def test_very_small_and_very_large_entries() -> None:
    M, b = definite(), random(24)
    for scale in (1e-150, 1e150):
        solution = solve(spd(scale * M), b, Cholesky())
        assert error_of(solution.value * scale, solution_of(M, b)) < 1e-12
