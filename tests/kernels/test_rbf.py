from __future__ import annotations

import pytest
import torch

from woodbury import Kernel
from woodbury.errors import ArgumentError, DataError, ShapeError
from woodbury.kernels import RBF, median_lengthscale
from woodbury.kernels.rbf import squared_distances


def test_rbf_equals_its_formula_far_from_the_origin() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, generator=generator) + 1000  # cancellation, without centering
    z = torch.randn(5, 3, generator=generator) + 1000
    expected = torch.exp(-((x[:, None] - z[None]) ** 2).sum(-1) / (2 * 0.8**2))
    torch.testing.assert_close(RBF(0.8)(x, z), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(RBF(0.8).diagonal(x[:5], z), expected.diagonal())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 5e-6)])
@pytest.mark.parametrize("lengthscale", [0.3, 2.0])
def test_written_values_are_those_of_the_formula(dtype, rounding, lengthscale: float) -> None:
    x, z = torch.randn(30, 4, dtype=dtype), torch.randn(20, 4, dtype=dtype)
    gaps = (x.double()[:, None] - z.double()[None]).square().sum(-1) / (2 * lengthscale**2)
    out = torch.full((30, 20), torch.nan, dtype=dtype)
    RBF(lengthscale).write(x, z, out)
    # The exponent is known to the rounding of its size.
    allowed = rounding * (1 + gaps) * torch.exp(-gaps) * 3 + torch.finfo(dtype).tiny
    assert bool(((out.double() - torch.exp(-gaps)).abs() <= allowed).all())
    assert torch.equal(RBF(lengthscale)(x, z), out)
    assert RBF(lengthscale)(x, x).diagonal().eq(1).all()
    with_gradient = RBF(lengthscale)(x.requires_grad_(), z)
    torch.testing.assert_close(with_gradient.detach(), out)


def test_distance_to_itself_is_zero() -> None:
    x = torch.randn(20, 4)
    assert squared_distances(x, x).diagonal().eq(0).all()


def test_rbf_in_a_kernel_operator() -> None:
    x = torch.randn(30, 2, dtype=torch.float64)
    K = Kernel(x, kernel=RBF(1.0), block_bytes=1000, tags={"positive_semidefinite"})
    v = torch.randn(30, 2, dtype=torch.float64)
    torch.testing.assert_close(K @ v, RBF(1.0)(x, x) @ v)
    assert torch.equal(K.diagonal(), torch.ones(30, dtype=torch.float64))


def test_gradients_reach_the_points() -> None:
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: RBF(1.0)(x, x.flip(0)), x)


def test_median_lengthscale_of_ties_and_of_equal_rows() -> None:
    assert median_lengthscale(torch.ones(5, 2)) == 1.0
    # 6 of 10 distances are zero, the others 2: the median would be 0.
    points = torch.tensor([[0.0], [0.0], [0.0], [0.0], [2.0]])
    assert median_lengthscale(points) == pytest.approx((4 * 4 / 10) ** 0.5)


def test_median_lengthscale_of_a_sample_is_near_that_of_all() -> None:
    X = torch.randn(400, 5)
    assert median_lengthscale(X, rows=100) == pytest.approx(median_lengthscale(X), rel=0.1)


def test_mistakes_are_named() -> None:
    with pytest.raises(ArgumentError, match="lengthscale is -1"):
        RBF(-1.0)
    with pytest.raises(DataError, match="needs two rows, X has 1"):
        median_lengthscale(torch.ones(1, 3))
    with pytest.raises(ShapeError, match=r"\[b, d\] and \[c, d\]"):
        RBF(1.0)(torch.ones(2, 3), torch.ones(2, 4))
