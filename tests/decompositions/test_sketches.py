from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from tests.conformance import OperatorConformance
from tests.solvers.systems import random

from woodbury import Sparse
from woodbury.decompositions import Hadamard, random_sketch
from woodbury.errors import ArgumentError

F64 = torch.float64
KINDS = pytest.mark.parametrize("kind", ["sparse_sign", "gaussian", "hadamard"])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@KINDS
def test_lengths_are_kept_in_the_mean(kind: str) -> None:
    x = random(50)
    squares = [
        float((random_sketch(20, 50, kind, generator=seeded(seed)) @ x).norm() ** 2)
        for seed in range(400)
    ]
    mean = sum(squares) / len(squares)
    spread = math.sqrt(sum((s - mean) ** 2 for s in squares) / len(squares) / (len(squares) - 1))
    assert abs(mean - float(x.norm() ** 2)) < 4 * spread
    assert spread < 0.05 * mean


@KINDS
def test_subspaces_are_embedded(kind: str) -> None:
    n, rows = 20, 80
    U, _ = torch.linalg.qr(random(1000, n))
    for seed in range(10):
        values = torch.linalg.svdvals(random_sketch(rows, 1000, kind, generator=seeded(seed)) @ U)
        # Marchenko and Pastur: within 1 +- sqrt(n / s), and a little.
        assert float(values[0]) < 1 + math.sqrt(n / rows) + 0.2
        assert float(values[-1]) > 1 - math.sqrt(n / rows) - 0.2


def test_coordinate_subspaces_are_embedded_by_sparse_signs() -> None:
    # Where sampling rows would see nothing.
    S = random_sketch(80, 1000, generator=seeded(1)).to_dense()[:, :20]
    values = torch.linalg.svdvals(S)
    assert 0.4 < float(values[-1]) < float(values[0]) < 1.7


def test_sparse_signs_are_in_bands() -> None:
    S = random_sketch(24, 300, nonzeros=4, generator=seeded(3))
    assert isinstance(S, Sparse)
    dense = S.to_dense().view(4, 6, 300)
    assert torch.equal((dense != 0).sum(1), torch.ones(4, 300, dtype=torch.long))
    assert torch.equal(dense.abs().sum(1), torch.full((4, 300), 0.5, dtype=F64))
    few = random_sketch(3, 10, nonzeros=8)  # no more than there are rows
    assert torch.allclose(few.to_dense().norm(dim=0), torch.ones(10, dtype=F64))


@KINDS
def test_draws_are_repeatable(kind: str) -> None:
    first, second = random_sketch(8, 30, kind), random_sketch(8, 30, kind, generator=seeded(0))
    other = random_sketch(8, 30, kind, generator=seeded(1))
    assert torch.equal(first.to_dense(), second.to_dense())
    assert not torch.equal(first.to_dense(), other.to_dense())
    assert random_sketch(8, 30, kind, dtype=torch.float32).dtype == torch.float32


class TestHadamard(OperatorConformance):
    def make(self):
        cases = []
        for m, rows in ((8, [0, 3, 7]), (5, [1, 2, 6, 4]), (1, [0])):
            padded = 1 << (m - 1).bit_length()
            H = torch.from_numpy(scipy.linalg.hadamard(padded)).double()
            signs = random(m).sign()
            dense = H[rows][:, :m] * signs / math.sqrt(len(rows))
            for dtype in (F64, torch.float32, torch.complex128):
                kind = torch.complex128 if dtype.is_complex else F64
                operator = Hadamard(signs.to(dtype), torch.tensor(rows))
                cases.append((operator, dense.to(kind)))
        return cases


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5), "rows is 0"),
        ((5, 0), "columns is 0"),
        ((5, 5, "fourier"), "kind is 'fourier'"),
    ],
)
def test_what_is_refused(arguments, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        random_sketch(*arguments)
    with pytest.raises(ArgumentError, match="nonzeros is 0"):
        random_sketch(5, 5, nonzeros=0)
