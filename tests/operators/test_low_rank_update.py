from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance, wide

from woodbury import BlockDiagonal, Dense, Diagonal, FunctionOperator, Identity, Kronecker, LowRank
from woodbury.errors import NonFiniteError, SingularError, StructureError
from woodbury.operators import LowRankUpdate, Sum

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)


def definite(n, dtype):
    root = torch.randn(n, n, dtype=dtype)
    return root @ root.mH / n + torch.eye(n, dtype=dtype)


class TestLowRankUpdate(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            U, V = torch.randn(6, 2, dtype=dtype), torch.randn(6, 3, dtype=dtype)
            C = torch.randn(2, 3, dtype=dtype) / 4
            d = torch.rand(6).to(dtype) + 1
            A, B = definite(2, dtype), definite(3, dtype)
            stack = torch.stack([definite(3, dtype), definite(3, dtype)])
            bases = [
                (Diagonal(d, tags={"positive_definite"}), torch.diag(wide(d))),
                (2.0 * Identity(6, dtype=dtype), 2 * torch.eye(6)),
                (
                    Kronecker(
                        Dense(A, tags={"positive_definite"}), Dense(B, tags={"positive_definite"})
                    ),
                    torch.kron(wide(A), wide(B)),
                ),
                (BlockDiagonal(stack), torch.block_diag(*wide(stack))),
                (Dense(torch.kron(A, B)), torch.kron(wide(A), wide(B))),
            ]
            for base, M in bases:
                cases += [
                    (base + LowRank(U), M + wide(U) @ wide(U).mH),
                    (LowRank(U, C, V) + base, M + wide(U) @ wide(C) @ wide(V).mH),
                ]
            base, M = bases[0]
            # A singular C, a rank-deficient U and a downdate.
            singular = torch.diag(torch.tensor([1.0, 0.0])).to(dtype)
            doubled = U[:, :1].expand(6, 2).contiguous()
            cases += [
                (base + LowRank(U, singular), M + wide(U) @ wide(singular) @ wide(U).mH),
                (base + LowRank(doubled), M + wide(doubled) @ wide(doubled).mH),
                (base - 0.05 * LowRank(U), M - 0.05 * wide(U) @ wide(U).mH),
            ]
        assert all(isinstance(A, LowRankUpdate) for A, _ in cases)
        return [
            (A, wide(M.to(A.dtype.to_complex()) if A.dtype.is_complex else M)) for A, M in cases
        ]

    def gradients(self):
        U, C = torch.randn(3, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64) / 4
        d = torch.rand(3, dtype=torch.float64) + 1
        return [
            (lambda U, d: LowRank(U) + Diagonal(d), (U, d)),
            (lambda U, C, d: LowRank(U, C) + Diagonal(d), (U, C, d)),
        ]


def test_the_inverse_is_of_the_same_kind():
    A = LowRank(torch.randn(5, 2)) + Diagonal(torch.ones(5), tags={"positive_definite"})
    assert "positive_definite" in A.tags
    inverse = A.inverse()
    assert isinstance(inverse, LowRankUpdate)
    assert isinstance(inverse.inverse(), LowRankUpdate)
    assert "positive_definite" in inverse.tags
    assert inverse.low_rank.U is inverse.low_rank.V  # one thin block, not two
    assert inverse.low_rank.U.shape == (5, 2)


def test_small_damping_in_float64():
    """At damping 1e-8 a wrong identity is wrong by eight orders of magnitude."""
    U = torch.randn(30, 4, dtype=torch.float64)
    A = LowRank(U) + 1e-8 * Identity(30)
    # A general inverse would lose nine digits here: the reference splits off the range of U.
    Q, R = torch.linalg.qr(U)
    eye = torch.eye(30, dtype=torch.float64)
    inner = torch.linalg.inv(R @ R.mT + 1e-8 * eye[:4, :4])
    want = (eye - Q @ Q.mT) / 1e-8 + Q @ inner @ Q.mT
    got = A.inverse().to_dense()
    assert float((got - want).norm() / want.norm()) < 1e-12
    # Also where the answer is small: in the range of U the inverse is of size one.
    x = U[:, 0]
    assert float((A.solve(A @ x) - x).norm() / x.norm()) < 1e-6


def test_the_core_is_factorised_in_float64():
    """In float32, I + U^T U / c rounds away the one; its float64 factorisation does not."""
    torch.manual_seed(1)
    U = torch.randn(200, 3) * 100
    A = LowRank(U) + 1e-2 * Identity(200)
    want = torch.linalg.slogdet(
        U.double() @ U.double().mT + 1e-2 * torch.eye(200, dtype=torch.float64)
    ).logabsdet
    torch.testing.assert_close(A.logdet(), want.float(), rtol=1e-6, atol=0)
    y = torch.randn(200)
    exact = torch.linalg.solve(
        U.double() @ U.double().mT + 1e-2 * torch.eye(200, dtype=torch.float64), y.double()
    )
    torch.testing.assert_close(
        A.solve(y).double(), exact, rtol=0, atol=float(exact.abs().max()) * 1e-5
    )


def test_further_terms_join_the_base_or_the_low_rank_term():
    U, W = torch.randn(4, 2), torch.randn(4, 1)
    A = LowRank(U) + Diagonal(torch.ones(4)) + LowRank(W) + 0.5 * Identity(4)
    assert isinstance(A, LowRankUpdate)
    assert isinstance(A.base, Diagonal)
    assert A.low_rank.U.shape == (4, 3)
    B = A + A
    assert isinstance(B, LowRankUpdate)
    torch.testing.assert_close(B.to_dense(), 2 * A.to_dense())
    assert isinstance(Identity(4) + LowRank(U) + Identity(4), LowRankUpdate)


def test_a_dense_base_takes_any_further_term():
    M, U = definite(4, torch.float64), torch.randn(4, 1, dtype=torch.float64)
    A = Dense(M) + 0.5 * Identity(4) + LowRank(U)
    want = M + 0.5 * torch.eye(4, dtype=torch.float64) + U @ U.mT
    torch.testing.assert_close(A.inverse().to_dense(), torch.linalg.inv(want))
    torch.testing.assert_close(A.logdet(), torch.logdet(want))


def test_what_has_no_structural_inverse_stays_a_sum():
    S = FunctionOperator(lambda X: 2 * X, (4, 4), tags={"positive_definite"})
    A = S + LowRank(torch.ones(4, 1))
    assert isinstance(A, Sum)
    assert not A.has_inverse
    with pytest.raises(StructureError, match="no structural inverse to update"):
        LowRankUpdate(S, LowRank(torch.ones(4, 1)))


def test_a_singular_sum_is_refused():
    e = torch.zeros(3, 1)
    e[0] = 1.0
    with pytest.raises(SingularError, match="singular"):
        (Identity(3) - LowRank(e)).inverse()
    with pytest.raises(SingularError, match="singular"):
        (Identity(3) - LowRank(e)).logdet()
    with pytest.raises(SingularError, match="entry 0"):
        (Diagonal(torch.zeros(3)) + LowRank(e)).inverse()


def test_non_finite_factors_are_found():
    U = torch.ones(3, 1)
    U[1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"first at \(1, 0\)"):
        (Identity(3) + LowRank(U)).inverse()
