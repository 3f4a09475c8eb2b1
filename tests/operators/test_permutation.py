from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance

from woodbury.errors import DtypeError, ShapeError
from woodbury.operators import Permutation


class TestPermutation(OperatorConformance):
    def make(self):
        cases = []
        for dtype in (torch.float64, torch.float32, torch.complex128, torch.bfloat16):
            places = torch.tensor([3, 0, 4, 1, 2])
            dense = torch.zeros(5, 5, dtype=torch.float64)
            for i, place in enumerate(places.tolist()):
                dense[place, i] = 1
            dense = dense.to(torch.complex128) if dtype.is_complex else dense
            cases.append((Permutation(places, dtype=dtype), dense))
        return cases


def test_composition_is_one_permutation():
    P, Q = (Permutation(torch.randperm(7), dtype=torch.float64) for _ in range(2))
    assert isinstance(P @ Q, Permutation)
    assert torch.equal((P @ Q).to_dense(), P.to_dense() @ Q.to_dense())
    assert torch.equal((P @ P.T).to_dense(), torch.eye(7, dtype=torch.float64))


@pytest.mark.parametrize(
    "places", [torch.tensor([0, 0]), torch.tensor([1, 2]), torch.zeros(2, 2).long()]
)
def test_what_is_no_permutation_is_refused(places):
    with pytest.raises(ShapeError, match="places"):
        Permutation(places)


def test_places_are_integers():
    with pytest.raises(DtypeError, match="integers"):
        Permutation(torch.tensor([0.0, 1.0]))
