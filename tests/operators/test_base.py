from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.conformance import OperatorConformance

from woodbury import LinearOperator, Space
from woodbury.errors import DtypeError, ShapeError, StructureError
from woodbury.operators import base

M = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 1.0]], dtype=torch.float64)


class OnlyMatmat(LinearOperator):
    """The least an operator has to define."""

    def __init__(self, tags=("symmetric",), space=None):
        super().__init__((3, 3), dtype=torch.float64, device="cpu", tags=tags, space=space)
        self.blocks = []

    def _matmat(self, X):
        self.blocks.append(X.shape[1])
        return M @ X


class TestDefaults(OperatorConformance):
    def make(self):
        return [(OnlyMatmat(), M)]


def test_a_dense_form_is_assembled_in_blocks(monkeypatch):
    monkeypatch.setattr(base, "_DENSE_BLOCK_BYTES", 2 * 3 * 8)
    A = OnlyMatmat()
    assert torch.equal(A.to_dense(), M)
    assert A.blocks == [2, 1]
    monkeypatch.setattr(base, "_DENSE_BLOCK_BYTES", 1)
    A = OnlyMatmat()
    assert torch.equal(A.to_dense(), M)
    assert A.blocks == [1, 1, 1]


def test_empty_blocks_never_reach_the_hooks():
    A = OnlyMatmat()
    assert (A @ torch.zeros(3, 0, dtype=torch.float64)).shape == (3, 0)
    assert A.rmatmat(torch.zeros(3, 0, dtype=torch.float64)).shape == (3, 0)
    assert A.blocks == []


def test_nothing_defined():
    A = LinearOperator((2, 2), dtype=torch.float32, device="cpu")
    with pytest.raises(NotImplementedError, match="_matmat"):
        _ = A @ torch.ones(2)
    with pytest.raises(StructureError, match="has no adjoint product"):
        A.rmatmat(torch.ones(2))
    assert not A.has_inverse


def test_a_unitary_operator_inverts_by_its_adjoint():
    class Flip(LinearOperator):
        def _matmat(self, X):
            return X.roll(1, 0)

        def _rmatmat(self, Y):
            return Y.roll(-1, 0)

    A = Flip((4, 4), dtype=torch.float32, device="cpu", tags={"unitary"})
    assert A.solve(torch.arange(4.0)).tolist() == [1.0, 2.0, 3.0, 0.0]
    assert A.logdet() == 0
    assert A.inverse().inverse().inverse().T is A


def test_spaces_have_to_fit():
    space = Space({"w": (3,)})
    assert OnlyMatmat(space=space).out_space is space
    with pytest.raises(ShapeError, match="space has dimension 2, the operator 3 columns"):
        OnlyMatmat(space=Space(2))
    with pytest.raises(ShapeError, match="out_space has dimension 2, the operator 4 rows"):
        LinearOperator((4, 3), dtype=torch.float32, device="cpu", out_space=Space(2))


def test_numpy_arrays_are_not_taken_apart():
    A = OnlyMatmat()
    with pytest.raises(TypeError):
        _ = np.ones(3) @ A
    with pytest.raises(TypeError):
        _ = A @ np.ones(3)
    assert (np.float64(2.0) * A).shape == (3, 3)


def test_columns_are_checked():
    A = OnlyMatmat()
    for wrong in (torch.tensor([[0]]), torch.tensor([0.0]), torch.tensor([True, False, True])):
        with pytest.raises(ShapeError, match=r"expected integers \[k\]"):
            A.columns(wrong)
    with pytest.raises(ShapeError, match="index runs from -1 to 1, the operator has 3 columns"):
        A.columns(torch.tensor([-1, 1]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e5m2, torch.complex32])
def test_dtypes_that_cannot_be_multiplied_are_refused(dtype):
    with pytest.raises(DtypeError, match="needs one of float16, bfloat16"):
        LinearOperator((2, 2), dtype=dtype, device="cpu")
