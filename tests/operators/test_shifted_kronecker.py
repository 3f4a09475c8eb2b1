from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance, wide

from woodbury import Dense, Diagonal, Identity, Kronecker
from woodbury.errors import (
    NonFiniteError,
    NotPositiveDefiniteError,
    SingularError,
    StructureError,
)
from woodbury.operators import Product, ShiftedKronecker, Sum

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)


def hermitian(n, dtype):
    root = torch.randn(n, n, dtype=dtype)
    return (root + root.mH) / 2


def definite(n, dtype):
    root = torch.randn(n, n, dtype=dtype)
    return root @ root.mH / n + torch.eye(n, dtype=dtype)


class TestShiftedKronecker(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            A, B, S = hermitian(2, dtype), hermitian(3, dtype), definite(3, dtype)
            eye = torch.eye(6, dtype=wide(A).dtype)
            loose = [Dense(X, tags={"hermitian"}) for X in (A, B)]
            tight = [Dense(X, tags={"positive_definite"}) for X in (S, S[:2, :2])]
            d = Diagonal(torch.tensor([1.0, 2.0]).to(dtype), tags={"positive_definite"})
            cases += [
                (Kronecker(*loose) + 20.0 * Identity(6), torch.kron(wide(A), wide(B)) + 20 * eye),
                (
                    0.3 * Identity(6) + 2.0 * Kronecker(*tight) + Identity(6),
                    2 * torch.kron(wide(S), wide(S[:2, :2])) + 1.3 * eye,
                ),
                (
                    Kronecker(tight[0], d) + 0.5 * Identity(6),
                    torch.kron(wide(S), torch.diag(wide(d.values))) + 0.5 * eye,
                ),
            ]
        assert all(isinstance(A, ShiftedKronecker) for A, _ in cases)
        return cases

    def gradients(self):
        def build(A, B, c):
            factors = [Dense(X @ X.mT, tags={"positive_semidefinite"}) for X in (A, B)]
            return Kronecker(*factors) + c * Identity(4, dtype=torch.float64)

        A, B = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
        return [(build, (A, B, torch.tensor(0.7, dtype=torch.float64)))]


def test_small_damping_of_a_rank_deficient_kronecker_product():
    """K-FAC at damping 1e-6: exact where adding the root of it to each factor would not be."""
    torch.manual_seed(2)
    a, g = torch.randn(3, 8, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    A, G = a.T @ a, g.T @ g
    K = Kronecker(
        Dense(G, tags={"positive_semidefinite"}), Dense(A, tags={"positive_semidefinite"})
    )
    damped = K + 1e-6 * Identity(40)
    dense = torch.kron(G, A) + 1e-6 * torch.eye(40, dtype=torch.float64)
    x = torch.randn(40, dtype=torch.float64)
    residual = dense @ damped.solve(x) - x
    assert float(residual.norm() / x.norm()) < 1e-7
    want = torch.linalg.eigvalsh(dense).clamp(min=1e-6).log().sum()
    torch.testing.assert_close(damped.logdet(), want, rtol=1e-6, atol=0)
    assert "positive_definite" in damped.inverse().tags


def test_the_inverse_in_float32_has_no_negative_eigenvalues():
    """Eigenvalues of float32 factors in float32 would be off by more than the damping."""
    a = torch.randn(3, 30) * 30
    A = Dense(a.T @ a, tags={"positive_semidefinite"})
    inverse = (Kronecker(A, A) + 1e-3 * Identity(900)).inverse()
    values = inverse.factors[1].values
    assert float(values.min()) > 0
    torch.testing.assert_close(float(values.max()), 1e3, rtol=0.05, atol=0)


def test_the_inverse_is_a_product_of_three_and_takes_further_shifts():
    A = Dense(definite(2, torch.float64), tags={"positive_definite"})
    inverse = (Kronecker(A, A) + 0.1 * Identity(4)).inverse()
    assert isinstance(inverse, Product)
    assert [type(f) for f in inverse.factors] == [Kronecker, Diagonal, Kronecker]
    shifted = inverse + 2.0 * Identity(4)
    assert isinstance(shifted, Product)
    assert isinstance(3.0 * shifted, Product)
    torch.testing.assert_close(
        (3.0 * shifted).inverse().to_dense(),
        torch.linalg.inv(3 * inverse.to_dense() + 6 * torch.eye(4, dtype=torch.float64)),
    )
    torch.testing.assert_close(shifted.trace(), torch.trace(shifted.to_dense()))


def test_factors_that_are_not_hermitian_stay_a_sum():
    K = Kronecker(torch.randn(2, 2), torch.eye(2))
    assert isinstance(K + Identity(4), Sum)
    with pytest.raises(StructureError, match=r"factors \[0, 1\]"):
        ShiftedKronecker(K, 1.0)


def test_what_cannot_be_inverted_says_why():
    A = Dense(torch.tensor([[1.0, 0.0], [0.0, -1.0]]), tags={"symmetric"})
    with pytest.raises(SingularError, match="eigenvalues run from 0"):
        (Kronecker(A, A) + Identity(4)).inverse()
    wrong = Dense(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), tags={"positive_semidefinite"})
    with pytest.raises(NotPositiveDefiniteError, match="has the eigenvalue -1"):
        (Kronecker(wrong, wrong) + Identity(4)).inverse()
    bad = Dense(torch.tensor([[float("nan"), 0.0], [0.0, 1.0]]), tags={"symmetric"})
    with pytest.raises(NonFiniteError, match="first at"):
        (Kronecker(bad, bad) + Identity(4)).inverse()
