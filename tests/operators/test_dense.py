from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance, wide

from woodbury import Dense, Diagonal, Identity
from woodbury.errors import (
    DtypeError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    SingularError,
    TagError,
)

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)


def square(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, n, dtype=dtype) + 3 * torch.eye(n, dtype=dtype)


def definite(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    root = torch.randn(n, n, dtype=dtype)
    return root @ root.mH + torch.eye(n, dtype=dtype)


class TestDense(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            M, S, R = square(5, dtype), definite(4, dtype), torch.randn(3, 5, dtype=dtype)
            lower = torch.tril(square(4, dtype))
            Q = torch.linalg.qr(square(3, dtype)).Q
            cases += [
                (Dense(M), M),
                (Dense(R), R),
                (Dense(S, tags={"positive_definite"}), S),
                (Dense(lower, tags={"lower_triangular"}), lower),
                (Dense(lower.mT, tags={"upper_triangular"}), lower.mT),
                (Dense(Q, tags={"unitary"}), Q),
            ]
        S = square(3, torch.complex128)
        S = S + S.mT  # symmetric and not hermitian
        cases.append((Dense(S, tags={"symmetric"}), S))
        for dtype in (torch.float16, torch.bfloat16):
            S = definite(3).to(dtype)
            S = (S + S.mT) / 2
            cases += [(Dense(S, tags={"positive_definite"}), S), (Dense(square(3).to(dtype)), None)]
        return [(A, wide(A.matrix if M is None else M)) for A, M in cases]

    def gradients(self):
        return [
            (Dense, (square(3),)),
            (Dense, (torch.randn(2, 3, dtype=torch.float64),)),
            (lambda L: Dense(L @ L.mT, tags={"positive_definite"}), (square(3),)),
            (lambda L: Dense(torch.tril(L), tags={"lower_triangular"}), (square(3),)),
        ]


@pytest.mark.parametrize(
    ("tag", "matrix", "message"),
    [
        ("symmetric", [[1.0, 2.0], [3.0, 1.0]], r"entry \(0, 1\) contradicts it by 1"),
        ("lower_triangular", [[1.0, 2.0], [3.0, 1.0]], r"entry \(0, 1\)"),
        ("upper_triangular", [[1.0, 0.0], [3.0, 1.0]], r"entry \(1, 0\) contradicts it by 3"),
        ("diagonal", [[1.0, 0.0], [0.1, 1.0]], r"entry \(1, 0\)"),
        ("positive_definite", [[1.0, 0.0], [0.0, 0.0]], r"diagonal entry \(1,\) is 0.0"),
        ("positive_semidefinite", [[1.0, 0.0], [0.0, -1.0]], r"diagonal entry \(1,\) is -1.0"),
    ],
)
def test_a_false_tag_is_refused(tag, matrix, message):
    with pytest.raises(TagError, match=message):
        Dense(torch.tensor(matrix), tags={tag})


def test_hermitian_is_not_symmetric_for_complex_matrices():
    S = definite(3, torch.complex128)
    assert "symmetric" not in Dense(S, tags={"hermitian"}).tags
    with pytest.raises(TagError, match="tagged symmetric"):
        Dense(S, tags={"symmetric"})


def test_rounding_does_not_contradict_a_tag():
    root = torch.randn(200, 200)
    S = root @ torch.diag(torch.rand(200)) @ root.mT  # symmetric to rounding only
    assert not torch.equal(S, S.mT)
    assert "symmetric" in Dense(S, tags={"symmetric"}).tags


def test_not_positive_definite_names_the_leading_minor():
    matrix = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])
    A = Dense(matrix, tags={"positive_definite"})
    for use in (A.inverse, A.logdet, lambda: A.solve(torch.ones(3))):
        with pytest.raises(NotPositiveDefiniteError, match="leading minor of order 3"):
            use()


def test_a_singular_matrix_is_an_error_and_not_infinity():
    for matrix in (torch.ones(3, 3), torch.zeros(2, 2), torch.diag(torch.tensor([1.0, 0.0]))):
        with pytest.raises(SingularError, match="reciprocal condition"):
            Dense(matrix).inverse()
    with pytest.raises(SingularError, match="pivot 1 is 0"):
        Dense(torch.diag(torch.tensor([1.0, 0.0])), tags={"upper_triangular"}).logdet()


def test_the_reciprocal_condition_is_that_of_the_matrix():
    n = 12
    hilbert = torch.tensor([[1.0 / (i + j + 1) for j in range(n)] for i in range(n)])
    with pytest.raises(SingularError, match=r"\d\.\de-11 is below 1\.2e-07.*use float64"):
        Dense(hilbert).inverse()
    hilbert = torch.tensor(
        [[1.0 / (i + j + 1) for j in range(15)] for i in range(15)], dtype=torch.float64
    )
    with pytest.raises(SingularError, match="is below 2.2e-16"):
        Dense(hilbert).inverse()
    # Just as badly scaled, but not singular to working precision.
    scaled = torch.diag(torch.tensor([1.0, 1e-12], dtype=torch.float64))
    assert Dense(scaled).solve(torch.ones(2, dtype=torch.float64)).tolist() == [1.0, 1e12]


def test_a_kept_factor_is_never_one_without_its_gradient():
    matrix = definite(3).requires_grad_()
    A = Dense(matrix, tags={"positive_definite"})
    b = torch.randn(3, dtype=torch.float64)
    with torch.no_grad():
        A.solve(b)  # a factor made here has no graph
    first, second = (torch.autograd.grad(A.solve(b).sum(), matrix)[0] for _ in range(2))
    y = torch.linalg.inv(matrix.detach())
    torch.testing.assert_close(
        (first + first.mT) / 2, -torch.outer(y.sum(0), y @ b) / 2 - torch.outer(y @ b, y.sum(0)) / 2
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_entries_are_found_when_factorised(bad):
    matrix = torch.eye(3)
    matrix[1, 2] = matrix[2, 1] = bad
    for A in (Dense(matrix), Dense(matrix, tags={"symmetric"})):
        with pytest.raises(NonFiniteError, match=r"first at \(1, 2\)"):
            A.inverse()


def test_the_inverse_keeps_the_factor_and_no_inverse_matrix():
    A = Dense(definite(4), tags={"positive_definite"})
    inverse = A.inverse()
    held = [value for value in vars(inverse).values() if isinstance(value, torch.Tensor)]
    assert not held
    factor = inverse._factor.factor
    torch.testing.assert_close(factor @ factor.mT, A.matrix)
    assert A.inverse()._factor is inverse._factor  # factorised once
    assert inverse.inverse() is A


def test_a_matrix_that_is_not_one_is_refused():
    with pytest.raises(ShapeError, match=r"expected \[m, n\]"):
        Dense(torch.ones(3))
    with pytest.raises(DtypeError, match="int64"):
        Dense(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(DtypeError, match="Sparse"):
        Dense(torch.eye(3).to_sparse())
    with pytest.raises(DtypeError, match="make it a tensor"):
        Dense([[1.0]])
    with pytest.raises(DtypeError, match="float8"):
        Dense(torch.ones(2, 2).to(torch.float8_e4m3fn))


def test_a_sum_with_a_dense_term_is_factorised_densely():
    S, d = definite(4), torch.rand(4, dtype=torch.float64)
    A = Dense(S, tags={"positive_definite"}) + Diagonal(d, tags={"positive_definite"})
    A = A + 1e-3 * Identity(4)
    want = torch.linalg.inv(S + torch.diag(d) + 1e-3 * torch.eye(4))
    assert "positive_definite" in A.tags
    torch.testing.assert_close(A.inverse().to_dense(), want)
    torch.testing.assert_close(A.logdet(), -torch.logdet(want))
    assert A.inverse()._factor.kind == "cholesky"


def test_empty_matrices():
    A = Dense(torch.zeros(0, 0), tags={"positive_definite"})
    assert A.solve(torch.zeros(0)).shape == (0,)
    assert A.logdet() == 0
    assert (Dense(torch.zeros(3, 0)) @ torch.zeros(0)).tolist() == [0.0, 0.0, 0.0]
