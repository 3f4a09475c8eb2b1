from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance, wide

from woodbury import FunctionOperator
from woodbury.errors import DeviceError, DtypeError, ShapeError, StructureError, TagError

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)


def operator(M, *, vectorized=True, tags=(), adjoint=True):
    return FunctionOperator(
        lambda X: M @ X,
        tuple(M.shape),
        (lambda Y: M.mH @ Y) if adjoint else None,
        tags=tags,
        dtype=M.dtype,
        vectorized=vectorized,
    )


class TestFunctionOperator(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            M, S = torch.randn(3, 4, dtype=dtype), torch.randn(3, 3, dtype=dtype)
            H, S = S + S.mH, S + S.mT
            Q = torch.linalg.qr(H).Q
            cases += [
                (operator(M), M),
                (operator(M, vectorized=False), M),
                (operator(H, tags={"hermitian"}, adjoint=False), H),
                (operator(S, tags={"symmetric"}, adjoint=False), S),
                (operator(Q, tags={"unitary"}), Q),
            ]
        return [(A, wide(M)) for A, M in cases]

    def gradients(self):
        return [(operator, (torch.randn(2, 3, dtype=torch.float64),))]


def test_functions_of_one_vector_are_called_with_contiguous_vectors():
    seen = []

    def matvec(x):
        seen.append((tuple(x.shape), x.is_contiguous()))
        return 2 * x

    A = FunctionOperator(matvec, (3, 3), tags={"symmetric"}, vectorized=False)
    A @ torch.ones(3, 2)
    A @ torch.ones(3)
    A.rmatmat(torch.ones(4, 3).mT)
    assert seen == [((3,), True)] * 7


def test_functions_of_blocks_are_called_once_with_contiguous_blocks():
    seen = []

    def matmat(X):
        seen.append((tuple(X.shape), X.is_contiguous()))
        return 2 * X

    A = FunctionOperator(matmat, (3, 3), tags={"symmetric"})
    A @ torch.ones(4, 3).mT
    A @ torch.ones(3)
    A @ torch.ones(3, 0)  # nothing to do: not called
    assert seen == [((3, 4), True), ((3, 1), True)]


def test_a_missing_adjoint_says_what_to_do():
    A = FunctionOperator(lambda X: X[:2], (2, 3))
    with pytest.raises(StructureError, match="give one, or the tag"):
        A.rmatmat(torch.ones(2))
    with pytest.raises(StructureError, match="give one, or the tag"):
        A.T @ torch.ones(2)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda X: X[:1], ShapeError, r"matmat returned shape \(1, 2\), expected \(3, 2\)"),
        (lambda X: X[:, 0], ShapeError, r"shape \(3,\)"),
        (lambda X: X.double(), DtypeError, "matmat returned torch.float64"),
        (lambda X: X.to("meta"), DeviceError, "meta"),
        (lambda X: X.numpy(), DtypeError, "ndarray"),
    ],
)
def test_a_function_that_returns_something_else_is_refused(function, error, message):
    with pytest.raises(error, match=message):
        FunctionOperator(function, (3, 3)) @ torch.ones(3, 2)


def test_a_wrong_rmatmat_is_named():
    A = FunctionOperator(lambda X: X, (3, 3), lambda Y: Y[:2])
    with pytest.raises(ShapeError, match="rmatmat returned"):
        A.rmatmat(torch.ones(3))


def test_wrong_tags_and_shapes_are_refused():
    with pytest.raises(TagError, match=r"unknown tags \['spd'\]"):
        FunctionOperator(lambda X: X, (3, 3), tags={"spd"})
    with pytest.raises(TagError, match="not square"):
        FunctionOperator(lambda X: X, (3, 2), tags={"symmetric"})
    with pytest.raises(TagError, match="give a set of names"):
        FunctionOperator(lambda X: X, (3, 3), tags="symmetric")
    with pytest.raises(ShapeError, match="negative"):
        FunctionOperator(lambda X: X, (-1, 2))
    with pytest.raises(DtypeError, match="int64"):
        FunctionOperator(lambda X: X, (2, 2), dtype=torch.int64)


def test_the_tag_rules_of_transposes_reach_functions():
    A = FunctionOperator(
        lambda X: torch.cumsum(X, 0),
        (3, 3),
        lambda Y: Y.flip(0).cumsum(0).flip(0),
        tags={"lower_triangular"},
    )
    assert A.T.tags == {"upper_triangular"}
    assert A.T.T is A
