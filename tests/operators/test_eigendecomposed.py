from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance, wide

from woodbury import Dense, Diagonal, Identity, Kronecker
from woodbury.errors import (
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    SingularError,
    TagError,
)
from woodbury.operators import Eigendecomposed, FunctionOperator

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)


def unitary(n, dtype):
    return Dense(
        torch.linalg.qr(torch.randn(n, n, dtype=wide(torch.ones((), dtype=dtype)).dtype))[0].to(
            dtype
        ),
        tags={"unitary"},
    )


def dense(A):
    Q = wide(A.basis.to_dense())
    return Q @ torch.diag(wide(A.values).to(Q.dtype)) @ Q.mH


class TestEigendecomposed(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            values = torch.linspace(1, 2, 6, dtype=torch.float64).to(
                torch.ones((), dtype=dtype).real.dtype
            )
            signed = values * torch.tensor([1, -1, 1, 1, -1, 1])
            structured = Kronecker(unitary(2, dtype), Identity(3, dtype=dtype))
            for basis in (
                unitary(6, dtype),
                Kronecker(unitary(2, dtype), unitary(3, dtype)),
                structured,
            ):
                for d in (values, signed):
                    A = Eigendecomposed(basis, d)
                    cases.append((A, dense(A)))
        return cases


def test_what_is_added_and_multiplied_stays_in_the_basis():
    Q = unitary(4, torch.float64)
    A, B = (Eigendecomposed(Q, torch.rand(4, dtype=torch.float64)) for _ in range(2))
    for C, wanted in (
        (A + 0.5 * Identity(4), dense(A) + 0.5 * torch.eye(4)),
        (A + B, dense(A) + dense(B)),
        (3.0 * A, 3 * dense(A)),
    ):
        assert isinstance(C, Eigendecomposed)
        assert torch.allclose(C.to_dense(), wanted)
    assert (A + 0.5 * Identity(4)).tags >= {"positive_definite"}
    assert "positive_semidefinite" not in ((-1.0) * A).tags


def test_square_root_and_powers():
    A = Eigendecomposed(
        Kronecker(unitary(2, torch.float64), unitary(3, torch.float64)),
        torch.rand(6, dtype=torch.float64) + 0.1,
    )
    root = A.sqrt().to_dense()
    assert torch.allclose(root @ root, A.to_dense())
    assert torch.allclose(A.power(-0.5).to_dense() @ root, torch.eye(6, dtype=torch.float64))
    with pytest.raises(NotPositiveDefiniteError, match="smallest eigenvalue"):
        ((-1.0) * A).sqrt()


def test_bases_without_structure_give_the_diagonal_by_products():
    Q = unitary(4, torch.float64).matrix
    basis = FunctionOperator(
        lambda X: Q @ X, (4, 4), lambda X: Q.T @ X, dtype=torch.float64, tags={"unitary"}
    )
    A = Eigendecomposed(basis, torch.rand(4, dtype=torch.float64))
    assert torch.allclose(A.diagonal(), A.to_dense().diagonal())
    flipped = Eigendecomposed(
        Diagonal(torch.tensor([1.0, -1.0]), tags={"unitary"}), torch.tensor([2.0, 3.0])
    )
    assert torch.equal(flipped.diagonal(), torch.tensor([2.0, 3.0]))


def test_singular_and_bad_input():
    Q = unitary(3, torch.float64)
    A = Eigendecomposed(Q, torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    for what in (A.inverse, A.logdet, lambda: A.power(-1)):
        with pytest.raises(SingularError, match="multiple of the identity"):
            what()
    with pytest.raises(TagError, match="unitary"):
        Eigendecomposed(Dense(torch.eye(2)), torch.ones(2))
    with pytest.raises(ShapeError, match="basis of 3"):
        Eigendecomposed(Q, torch.ones(2, dtype=torch.float64))
    with pytest.raises(NonFiniteError, match="eigenvalue 1"):
        Eigendecomposed(Q, torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64))
