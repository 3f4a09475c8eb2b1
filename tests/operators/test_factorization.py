from __future__ import annotations

import pytest
import torch

from woodbury.errors import NonFiniteError, SingularError
from woodbury.operators.dtypes import precise
from woodbury.operators.factorization import factorize, norm_of_inverse, require_finite

KINDS = {
    "cholesky": {"positive_definite"},
    "lu": set(),
    "lower": {"lower_triangular"},
    "upper": {"upper_triangular"},
}


def matrix(kind, *shape, dtype=torch.float64):
    M = torch.randn(*shape, dtype=dtype) + 4 * torch.eye(shape[-1], dtype=dtype)
    return {"cholesky": M @ M.mH, "lu": M, "lower": torch.tril(M), "upper": torch.triu(M)}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_solves_and_determinants(kind, dtype, batch):
    M = matrix(kind, *batch, 4, 4, dtype=dtype)
    factor = factorize(M, frozenset(KINDS[kind]))
    assert factor.kind == kind
    B = torch.randn(*batch, 4, 2, dtype=dtype)
    torch.testing.assert_close(M @ factor.solve(B), B)
    torch.testing.assert_close(M.mH @ factor.solve(B, adjoint=True), B)
    torch.testing.assert_close(factor.logdet(), torch.linalg.slogdet(M).logabsdet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_factorised_in_float32(kind, dtype):
    M = matrix(kind, 4, 4).to(dtype)
    factor = factorize(M, frozenset(KINDS[kind]))
    assert factor.factor.dtype == torch.float32
    x = factor.solve(torch.ones(4, 1, dtype=dtype))
    assert x.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        M.double() @ x.double(), torch.ones(4, 1).double(), rtol=0, atol=20 * eps
    )
    assert factor.logdet().dtype == dtype


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_norm_of_the_inverse_is_a_close_lower_bound(n, dtype):
    stack = matrix("lu", 5, n, n, dtype=dtype)
    inverse = torch.linalg.inv(stack)
    got = norm_of_inverse(
        lambda B, adjoint: (inverse.mH if adjoint else inverse) @ B,
        torch.Size([5, n]),
        dtype,
        torch.device("cpu"),
    )
    exact = inverse.abs().sum(-2).amax(-1)
    assert bool((got <= exact * (1 + 1e-12)).all())
    assert bool((got >= exact / 3).all())  # in practice within a factor of three (Higham 1988)


@pytest.mark.parametrize("kind", KINDS)
def test_the_border_of_singular_is_the_rounding_of_the_dtype(kind):
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        fine = torch.diag(torch.tensor([1.0, 4 * eps], dtype=dtype))
        factorize(fine, frozenset(KINDS[kind]))
        with pytest.raises(SingularError, match="reciprocal condition"):
            factorize(torch.diag(torch.tensor([1.0, eps / 4], dtype=dtype)), frozenset(KINDS[kind]))


def test_scale_does_not_make_a_matrix_singular():
    for size in (1e-200, 1e200):
        factorize(size * torch.eye(3, dtype=torch.float64), frozenset())


def test_finite():
    require_finite(torch.ones(2), "x")
    with pytest.raises(
        NonFiniteError, match=r"x has 2 non-finite entries, the first at \(1,\): inf"
    ):
        require_finite(torch.tensor([1.0, float("inf"), float("nan")]), "x")


def test_precise():
    assert precise(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float64
    assert precise(torch.ones(1, dtype=torch.complex64)).dtype == torch.complex128
