from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance, wide

from woodbury import BlockDiagonal, Dense, Identity, Kronecker, Space
from woodbury.errors import DtypeError, ShapeError, SingularError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex128,
    torch.complex64,
)


class TestIdentity(OperatorConformance):
    def make(self):
        return [(Identity(4, dtype=d), wide(torch.eye(4, dtype=d))) for d in DTYPES]


class TestMultipleOfIdentity(OperatorConformance):
    def make(self):
        eyes = [(Identity(4, dtype=dtype), wide(torch.eye(4, dtype=dtype))) for dtype in DTYPES]
        return [(-1.5 * A, -1.5 * M) for A, M in eyes]

    def gradients(self):
        c = torch.tensor(1.5, dtype=torch.float64)
        return [(lambda c: c * Identity(3, dtype=torch.float64), (c,))]


def test_an_open_identity_takes_the_kind_of_its_partner():
    A = Dense(torch.eye(2, dtype=torch.complex128))
    for B in (A + 1e-3 * Identity(2), 2 * Identity(2) @ A, Identity(2) - A):
        assert B.dtype == torch.complex128
    assert Kronecker(Identity(2), A).dtype == torch.complex128
    assert BlockDiagonal([2 * Identity(2), A]).dtype == torch.complex128
    with pytest.raises(DtypeError, match="float32"):
        _ = A + Identity(2, dtype=torch.float32)


def test_multiples_merge():
    eye = Identity(3)
    total = eye + 2 * eye - 0.5 * eye
    assert (total @ torch.ones(3)).tolist() == [2.5, 2.5, 2.5]
    assert total.operator is eye
    assert "positive_definite" in total.tags
    assert "positive_definite" not in (eye - 2 * eye).tags
    assert (eye @ eye) is eye
    assert "unitary" in (-eye).tags


def test_zero_times_the_identity_is_singular():
    with pytest.raises(SingularError, match="multiplied by 0"):
        (0 * Identity(2)).inverse()
    with pytest.raises(SingularError, match="multiplied by 0"):
        (0 * Identity(2)).logdet()


def test_it_keeps_its_space():
    space = Space({"w": (2, 2), "b": (2,)})
    assert Identity(6, space=space).space is space
    assert Identity(6, space=space).like(Dense(torch.eye(6, dtype=torch.float64))).space is space
    with pytest.raises(ShapeError, match="dimension 6"):
        Identity(5, space=space)
    with pytest.raises(ShapeError, match="-1"):
        Identity(-1)
