"""The checker must pass what is right and fail what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from woodbury import Cholesky, Neumann, check_hypergradient
from woodbury.errors import DataError, DtypeError

X = torch.linspace(-1, 1, 24, dtype=torch.float64)[:, None] ** torch.arange(5)
Y = torch.sin(3 * X[:, 1])


def inner(w: Tensor, decay: Tensor) -> Tensor:
    return (X[::2] @ w - Y[::2]).square().mean() + (decay.exp() * w**2).sum() + 0.1 * (w**4).sum()


def outer(w: Tensor, decay: Tensor) -> Tensor:
    return (X[1::2] @ w - Y[1::2]).square().mean() + 0.01 * decay.square().sum()


START = torch.zeros(5, dtype=torch.float64)
DECAY = torch.full((5,), -2.0, dtype=torch.float64)


def test_agrees_on_a_nonquadratic_problem() -> None:
    check = check_hypergradient(inner, outer, START, DECAY, Cholesky(), unroll=400)
    assert check.ok
    assert check.error.max() < 1e-6
    assert check.unrolled is not None
    torch.testing.assert_close(check.unrolled, check.implicit, rtol=1e-3, atol=1e-6)
    assert "agrees" in str(check)
    assert check.hypergradient.stationarity < 1e-9


def test_a_poor_inverse_is_found_out() -> None:
    check = check_hypergradient(inner, outer, START, DECAY, Neumann(terms=0))
    assert not check.ok
    assert "DISAGREES" in str(check)


def test_own_solver_is_used() -> None:
    calls = []

    def solve_inner(decay: Tensor) -> Tensor:
        calls.append(decay)
        return torch.full((5,), 0.3, dtype=torch.float64)  # not a minimiser

    check = check_hypergradient(
        inner, outer, START, DECAY, Cholesky(), solve_inner=solve_inner, directions=2
    )
    assert len(calls) == 9
    assert not check.ok
    assert check.hypergradient.stationarity > 0.1


def test_named_structures() -> None:
    check = check_hypergradient(
        lambda p, h: inner(p["w"], h["decay"]),
        lambda p, h: outer(p["w"], h["decay"]),
        {"w": START},
        {"decay": DECAY},
        Cholesky(),
        directions=1,
    )
    assert check.ok


def test_bad_arguments() -> None:
    with pytest.raises(DtypeError, match="float64"):
        check_hypergradient(inner, outer, START.float(), DECAY)
    with pytest.raises(DataError, match="directions"):
        check_hypergradient(inner, outer, START, DECAY, directions=0)
