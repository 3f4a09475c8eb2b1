from __future__ import annotations

import pytest
import torch
from tests.solvers.systems import DTYPES, eye, random, wide
from tests.solvers.test_cg import Weighted

from woodbury import Space
from woodbury.decompositions import orthonormalize


class Summed(Space):
    """The plain inner product, found by another path than a local product."""

    def gram(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return sum(a.mH @ b for a, b in zip(x.split(3), y.split(3), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("space", [Space, Summed])
def test_factors(space, dtype: torch.dtype) -> None:
    X = random(20, 5, dtype=dtype) @ torch.diag(torch.logspace(0, -2, 5)).to(dtype)
    Q, R = orthonormalize(X, space(20))
    bound = 1e-12 if dtype in (torch.float64, torch.complex128) else 1e-5
    assert torch.allclose(wide(Q @ R), wide(X), atol=bound)
    assert torch.allclose(wide(Q.mH @ Q), eye(5).to(wide(Q).dtype), atol=bound)


def test_orthonormal_in_the_inner_product_of_the_space() -> None:
    space = Weighted(torch.logspace(-1, 1, 12, dtype=torch.float64))
    Q, R = orthonormalize(random(12, 4), space)
    assert torch.allclose(space.gram(Q, Q), eye(4), atol=1e-12)
    assert torch.allclose(Q @ R, random(12, 4))


def test_dependent_columns_are_dropped_where_the_gram_matrix_is_used() -> None:
    X = random(12, 3)
    X = torch.cat([X, X[:, :1] + X[:, 1:2], torch.zeros(12, 1, dtype=X.dtype)], dim=1)
    Q, R = orthonormalize(X, Summed(12))
    assert (Q.shape, R.shape) == ((12, 3), (3, 5))
    assert torch.allclose(Q @ R, X)
    Q, R = orthonormalize(torch.zeros(12, 2), Summed(12))
    assert (Q.shape, R.shape) == ((12, 0), (0, 2))
