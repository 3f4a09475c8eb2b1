from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance, wide

from woodbury import LowRank
from woodbury.errors import DeviceError, DtypeError, ShapeError, TagError

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)


def dense(A):
    return wide(A.U) @ wide(A.core) @ wide(A.V).mH


class TestLowRank(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            U, V = torch.randn(5, 2, dtype=dtype), torch.randn(4, 3, dtype=dtype)
            C, W = torch.randn(2, 3, dtype=dtype), torch.randn(5, 2, dtype=dtype)
            H = torch.randn(2, 2, dtype=dtype)
            cases += [
                LowRank(U),
                LowRank(U, torch.tensor([1.0, 2.0]).to(dtype)),
                LowRank(U, torch.tensor([1.0, -2.0]).to(dtype)),
                LowRank(U, H),
                LowRank(U, H + H.mH),
                LowRank(U, C, V),
                LowRank(U, None, W),
            ]
        half = torch.randn(4, 2).to(torch.bfloat16)
        cases += [LowRank(half), LowRank(half.to(torch.float16))]
        return [(A, dense(A)) for A in cases]

    def gradients(self):
        U, V = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
        C = torch.randn(2, 2, dtype=torch.float64)
        return [(LowRank, (U,)), (LowRank, (U, C)), (LowRank, (U, C, V))]


def test_tags_are_found_and_not_invented():
    U = torch.randn(4, 2)
    assert "positive_semidefinite" in LowRank(U).tags
    assert "positive_semidefinite" in LowRank(U, torch.tensor([1.0, 0.0])).tags
    for C in (torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 2.0], [2.0, 1.0]])):
        assert LowRank(U, C).tags == {"symmetric", "hermitian"}
    assert LowRank(U, torch.tensor([[1.0, 2.0], [3.0, 1.0]])).tags == frozenset()
    assert LowRank(U, None, torch.randn(4, 2)).tags == frozenset()
    Z = torch.randn(4, 2, dtype=torch.complex64)
    assert LowRank(Z).tags == {"positive_semidefinite", "hermitian"}  # not symmetric


def test_two_of_them_join():
    U, W = torch.randn(4, 2), torch.randn(4, 1)
    A = LowRank(U, torch.tensor([1.0, -2.0])) + LowRank(W)
    assert isinstance(A, LowRank)
    assert A.U is A.V
    assert A.U.shape == (4, 3)
    plain = LowRank(U) + LowRank(W)
    assert plain.C is None
    assert "positive_semidefinite" in plain.tags
    assert "positive_semidefinite" not in (LowRank(U) - LowRank(W)).tags
    Z = torch.randn(4, 1)
    for mixed in (LowRank(U) + LowRank(W, None, Z), LowRank(W, None, Z) + LowRank(U)):
        torch.testing.assert_close(mixed.to_dense(), U @ U.T + W @ Z.T)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((torch.ones(3),), ShapeError, "U has shape"),
        ((torch.ones(3, 2), torch.ones(3, 3)), ShapeError, "they must fit"),
        ((torch.ones(3, 2), None, torch.ones(3, 1)), ShapeError, "V has 1"),
        ((torch.ones(3, 2), torch.ones(2).double()), DtypeError, "C is torch.float64"),
        ((torch.ones(3, 2), None, torch.ones(3, 2, device="meta")), DeviceError, "V is on meta"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, error, message):
    with pytest.raises(error, match=message):
        LowRank(*parts)


def test_low_rank_is_not_definite():
    with pytest.raises(TagError, match="rank 2 is below 4"):
        LowRank(torch.ones(4, 2), tags={"positive_definite"})
