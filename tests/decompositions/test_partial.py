from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance
from tests.solvers.systems import DTYPES, eye, random, wide

from woodbury.decompositions import PartialEigen
from woodbury.errors import SingularError


def basis(n: int, r: int, dtype: torch.dtype) -> torch.Tensor:
    Q, _ = torch.linalg.qr(random(n, r, dtype=dtype))
    return Q


class TestPartialEigen(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            real = dtype.to_real() if dtype.is_complex else dtype
            for r, rest in ((3, 0.5), (3, 0.0), (5, 0.0)):
                U = basis(5, r, dtype)
                values = torch.linspace(1, 2, r, dtype=real)
                W = wide(U)
                dense = (W * wide(values)) @ W.mH + rest * (eye(5) - W @ W.mH)
                cases.append((PartialEigen(U, values, rest), dense))
        empty = PartialEigen(basis(4, 0, torch.float64), torch.zeros(0).double(), 2.0)
        return [*cases, (empty, 2 * eye(4))]


def test_tags_follow_the_values() -> None:
    U = basis(4, 2, torch.float64)

    def tags(values: list[float], rest: float) -> set[str]:
        return set(PartialEigen(U, torch.tensor(values).double(), rest).tags)

    assert "positive_definite" in tags([1.0, 2.0], 0.1)
    assert "positive_definite" not in tags([1.0, 2.0], 0.0)
    assert "positive_semidefinite" in tags([1.0, 0.0], 0.0)
    assert "positive_semidefinite" not in tags([1.0, -1.0], 1.0)
    assert "positive_semidefinite" not in tags([1.0, 1.0], -1.0)
    assert "hermitian" in tags([1.0, -1.0], -1.0)


def test_singular() -> None:
    A = PartialEigen(basis(4, 2, torch.float64), torch.tensor([0.0, 2.0]).double(), 1.0)
    with pytest.raises(SingularError, match="1 of the 2 eigenvalues given are 0"):
        A.inverse()
    with pytest.raises(SingularError):
        A.logdet()
