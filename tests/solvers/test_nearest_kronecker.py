"""The nearest Kronecker product against the singular value decomposition it is defined by."""

from __future__ import annotations

import math

import pytest
import scipy.sparse
import torch
from tests.solvers.systems import (
    DTYPES,
    definite,
    error_of,
    function,
    random,
    residual_of,
    wide,
)

from woodbury import CG, Dense, Identity, Jacobi, Kronecker, NearestKronecker, Sparse, solve
from woodbury.errors import ArgumentError, NonFiniteError, NotPositiveDefiniteError, ShapeError
from woodbury.solvers import SolveStatus

F64 = torch.float64
P, Q = 4, 6


def pair(dtype: torch.dtype = F64) -> tuple[torch.Tensor, torch.Tensor]:
    return definite(P, condition=8, dtype=dtype, seed=1), definite(
        Q, condition=8, dtype=dtype, seed=2
    )


def reference(M: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The best product by a full singular value decomposition of the rearrangement."""
    rows = [
        M[i * Q : (i + 1) * Q, j * Q : (j + 1) * Q].reshape(-1) for i in range(P) for j in range(P)
    ]
    U, S, Vh = torch.linalg.svd(torch.stack(rows))
    fit = torch.kron(S[0] * U[:, 0].view(P, P), Vh[0].view(Q, Q).contiguous())
    return fit, float((M - fit).norm() / M.norm())


def operators(M: torch.Tensor, tags=frozenset({"positive_definite"})):
    return {
        "dense": Dense(M, tags=tags),
        "sparse": Sparse(scipy.sparse.csr_array(M.numpy()), tags=tags),
        "function": function(M, tags),
    }


@pytest.mark.parametrize("kind", ["dense", "sparse", "function"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kronecker_product_is_found_exactly(dtype: torch.dtype, kind: str) -> None:
    B, C = pair(dtype)
    M = torch.kron(B, C)
    A = operators(M)[kind]
    rounding = 1e-4 if dtype in (torch.float32, torch.complex64) else 1e-10
    state = NearestKronecker(sizes=(P, Q)).prepare(A)
    assert state.error < math.sqrt(rounding) / 10
    assert error_of(state.fit.to_dense(), wide(M)) < rounding
    assert error_of(state.preconditioner.to_dense(), torch.linalg.inv(wide(M))) < 50 * rounding
    assert "positive_definite" in state.preconditioner.tags
    assert state.products == (0 if kind == "sparse" else P * Q)
    solution = solve(A, random(P * Q, 2, dtype=dtype), NearestKronecker(sizes=(P, Q), rtol=1e-3))
    assert solution.steps == 1


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_it_is_the_nearest(dtype: torch.dtype) -> None:
    B, C = pair(dtype)
    M = torch.kron(B, C) + 0.2 * definite(P * Q, dtype=dtype, seed=5)
    want, error = reference(M)
    for A in operators(M).values():
        state = NearestKronecker(sizes=(P, Q)).prepare(A)
        assert error_of(state.fit.to_dense(), want) < 1e-6
        assert state.error == pytest.approx(error, rel=1e-8)
        for factor in state.fit.factors:
            dense = factor.to_dense()
            assert error_of(dense, dense.mH) < 1e-12
            assert torch.linalg.eigvalsh(dense)[0] > 0
    general = Dense(random(P * Q, P * Q, dtype=dtype))
    want, error = reference(general.to_dense())
    state = NearestKronecker(sizes=(P, Q)).prepare(general)
    assert state.error == pytest.approx(error, rel=1e-3)
    assert "hermitian" not in state.preconditioner.tags
    assert want.shape == general.shape


def test_a_multiple_of_the_identity_is_kept_apart() -> None:
    B, C = pair()
    H = function(torch.kron(B, C), {"positive_semidefinite"})
    A = H + 0.3 * Identity(P * Q, dtype=F64)
    state = NearestKronecker(sizes=(P, Q)).prepare(A)
    M = torch.kron(B, C) + 0.3 * torch.eye(P * Q, dtype=F64)
    assert error_of(state.preconditioner.to_dense(), torch.linalg.inv(M)) < 1e-9
    b = random(P * Q)
    recipe = CG(rtol=1e-10, preconditioner=NearestKronecker(sizes=(P, Q)))
    assert solve(A, b, recipe).steps <= 2


def test_it_saves_steps_where_the_operator_is_nearly_one() -> None:
    m = 16
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(m, m))
    mass = scipy.sparse.diags_array([1.0, 4.0, 1.0], offsets=[-1, 0, 1], shape=(m, m))
    weights = scipy.sparse.diags_array(0.02 * random(m * m).abs().numpy())
    matrix = scipy.sparse.csr_array(scipy.sparse.kron(line, mass) + weights)
    A, b = Sparse(matrix, tags={"positive_definite"}), random(m * m, 2)
    recipe = NearestKronecker(sizes=(m, m))
    fitted = solve(A, b, CG(rtol=1e-8, preconditioner=recipe))
    assert (residual_of(A.to_dense(), fitted.value, b) <= 1.01e-8).all()
    assert fitted.steps < solve(A, b, CG(rtol=1e-8, preconditioner=Jacobi())).steps / 2


def test_a_structured_inverse_preconditions_without_a_fit() -> None:
    B, C = pair()
    tags = {"positive_definite"}
    structure = Kronecker(Dense(B, tags=tags), Dense(C, tags=tags)) + 0.1 * Identity(
        P * Q, dtype=F64
    )
    M = structure.to_dense() + 1e-3 * definite(P * Q, seed=4)
    A, b = Dense(M, tags=tags), random(P * Q)
    helped = solve(A, b, CG(rtol=1e-10, preconditioner=structure.inverse()))
    assert helped.ok
    assert helped.steps < solve(A, b, CG(rtol=1e-10)).steps / 2


def test_bad_input() -> None:
    A = operators(torch.kron(*pair()))["dense"]
    with pytest.raises(ShapeError, match="4 and 5, whose product is 20"):
        solve(A, random(P * Q), NearestKronecker(sizes=(4, 5)))
    with pytest.raises(ArgumentError, match="two numbers"):
        NearestKronecker(sizes=(0, 5))
    with pytest.raises(ArgumentError, match="two numbers"):
        NearestKronecker(sizes=(1, 2, 3))
    false = function(-torch.kron(*pair()), {"positive_definite"})
    with pytest.raises(NotPositiveDefiniteError, match="factor of the nearest"):
        NearestKronecker(sizes=(P, Q)).prepare(false)
    bad = torch.kron(*pair())
    bad[0, 0] = math.nan
    for kind in ("function", "dense"):
        operator = operators(bad, set())[kind]
        with pytest.raises(NonFiniteError):
            NearestKronecker(sizes=(P, Q)).prepare(operator)
    zero = Dense(torch.zeros(P * Q, P * Q, dtype=F64))
    found = solve(zero, random(P * Q), NearestKronecker(sizes=(P, Q)), throw=False)
    assert found.status is SolveStatus.singular
    assert NearestKronecker(sizes=(P, Q)) == NearestKronecker(sizes=[P, Q])
    one = Dense(torch.tensor([[3.0]], dtype=F64), tags={"positive_definite"})
    assert solve(one, random(1), NearestKronecker(sizes=(1, 1))).steps == 1
