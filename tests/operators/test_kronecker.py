from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance, wide

from woodbury import Dense, Diagonal, FunctionOperator, Identity, Kronecker, Sparse
from woodbury.errors import DeviceError, DtypeError, ShapeError, SingularError
from woodbury.operators import Product

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)


def square(n, dtype):
    return torch.randn(n, n, dtype=dtype) + 3 * torch.eye(n, dtype=dtype)


def definite(n, dtype):
    root = torch.randn(n, n, dtype=dtype)
    return root @ root.mH / n + torch.eye(n, dtype=dtype)


def kron(*factors):
    dense = wide(factors[0])
    for factor in factors[1:]:
        dense = torch.kron(dense.contiguous(), wide(factor).contiguous())
    return dense


class TestKronecker(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            A, B, C = square(2, dtype), square(3, dtype), square(2, dtype)
            R, T = torch.randn(2, 3, dtype=dtype), torch.randn(4, 2, dtype=dtype)
            S = definite(3, dtype)
            d = torch.tensor([1.0, 2.0]).to(dtype)
            lower = torch.tril(B)
            cases += [
                (Kronecker(A, B), kron(A, B)),
                (Kronecker(A, B, C), kron(A, B, C)),
                (Kronecker(R, T), kron(R, T)),
                (Kronecker(T, A, R), kron(T, A, R)),
                (Kronecker(B), kron(B)),
                (
                    Kronecker(*[Dense(X, tags={"positive_definite"}) for X in (S, S[:2, :2])]),
                    kron(S, S[:2, :2]),
                ),
                (Kronecker(Diagonal(d), B, Identity(2)), kron(torch.diag(d), B, torch.eye(2))),
                (
                    Kronecker(Identity(2, dtype=dtype), Identity(2)),
                    kron(torch.eye(2, dtype=dtype), torch.eye(2)),
                ),
                (
                    Kronecker(Sparse(A.to_sparse()), Dense(B).inverse()),
                    kron(A, torch.linalg.inv(wide(B))),
                ),
                (
                    Kronecker(Dense(lower, tags={"lower_triangular"}), Diagonal(d)),
                    kron(lower, torch.diag(d)),
                ),
            ]
        A = square(2, torch.float64).to(torch.bfloat16)
        cases.append((Kronecker(A, A), kron(A, A)))
        complex_or_not = [
            (A, M.to(torch.complex128) if A.dtype.is_complex else M) for A, M in cases
        ]
        return complex_or_not

    def gradients(self):
        A, B = square(2, torch.float64), square(2, torch.float64)
        return [(Kronecker, (A, B)), (Kronecker, (A[:1], B[:, :1]))]


def test_wide_blocks_and_thin_ones_agree():
    """Both ways of multiplying along an axis, on each side of where they change over."""
    A, B = Dense(square(3, torch.float64)), Dense(square(4, torch.float64))
    K, M = Kronecker(A, B), kron(A.matrix, B.matrix)
    for k in (1, 31, 32, 40):
        X = torch.randn(12, k, dtype=torch.float64)
        torch.testing.assert_close(K @ X, M @ X)
        torch.testing.assert_close(K.rmatmat(X), M.mH @ X)


def test_a_product_takes_the_multiplications_of_the_factors():
    calls = []

    def counting(M):
        def product(X):
            calls.append(M.shape[0] * M.shape[1] * X.shape[1])
            return M @ X

        return FunctionOperator(product, tuple(M.shape), dtype=M.dtype)

    A, B = torch.randn(20, 20), torch.randn(30, 30)
    Kronecker(counting(A), counting(B)) @ torch.randn(600)
    assert sum(calls) == 600 * (20 + 30)
    # A factor that shrinks the vector is applied first, wherever it stands.
    calls.clear()
    Kronecker(counting(torch.randn(20, 20)), counting(torch.randn(1, 30))) @ torch.randn(600)
    assert sum(calls) == 30 * 20 + 20 * 20


def test_factors_of_a_linear_layer():
    """The order of the factors is that of a flattened weight [out, in]."""
    out_factor, in_factor, W = torch.randn(2, 2), torch.randn(3, 3), torch.randn(2, 3)
    got = (Kronecker(out_factor, in_factor) @ W.flatten()).view(2, 3)
    torch.testing.assert_close(got, out_factor @ W @ in_factor.T)


def test_products_of_matching_factors_merge():
    A, B, C, D = (Dense(square(n, torch.float64)) for n in (2, 3, 2, 3))
    merged = Kronecker(A, B) @ Kronecker(C, D)
    assert isinstance(merged, Kronecker)
    assert merged.has_inverse
    torch.testing.assert_close(merged.to_dense(), kron(A.matrix @ C.matrix, B.matrix @ D.matrix))
    assert isinstance(Kronecker(A, B) @ Kronecker(B, A), Product)  # the sizes do not match
    assert (Kronecker(A, B) @ Kronecker(A.inverse(), B)).shape == (6, 6)


def test_multiples_and_nested_products_stay_kronecker_products():
    A, B = square(2, torch.float64), definite(3, torch.float64)
    K = Kronecker(A, Dense(B, tags={"positive_definite"}))
    assert isinstance(-2 * K, Kronecker)
    assert isinstance(Kronecker(K, Identity(2)).factors[1], Dense)
    assert len(Kronecker(K, Identity(2)).factors) == 3
    definite_tags = Kronecker(Dense(B, tags={"positive_definite"}), Identity(2)).tags
    assert "positive_definite" in definite_tags
    assert "positive_definite" in (2 * Kronecker(Dense(B, tags={"positive_definite"}))).tags
    assert "positive_definite" not in (-2 * Kronecker(Dense(B, tags={"positive_definite"}))).tags


def test_rectangular_factors_of_a_square_whole_are_singular():
    K = Kronecker(torch.randn(2, 3), torch.randn(3, 2))
    assert K.is_square
    torch.testing.assert_close(K.diagonal(), torch.diagonal(K.to_dense()))
    torch.testing.assert_close(K.trace(), torch.trace(K.to_dense()))
    for use in (K.inverse, K.logdet):
        with pytest.raises(SingularError, match="not all square"):
            use()


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="no factors"):
        Kronecker()
    with pytest.raises(ShapeError, match="shape"):
        Kronecker(torch.ones(2))
    with pytest.raises(DtypeError, match="float64"):
        Kronecker(torch.eye(2), torch.eye(2).double())
    with pytest.raises(DeviceError, match="meta"):
        Kronecker(torch.eye(2), torch.eye(2, device="meta"))


def test_a_singular_factor_is_named_by_its_error():
    with pytest.raises(SingularError, match="pivot"):
        Kronecker(torch.eye(2), torch.zeros(2, 2)).inverse()
