"""Products of matrices by either library against those in float64."""

from __future__ import annotations

import pytest
import torch

from woodbury.curvature import products
from woodbury.curvature.products import crossed, gram, turned

F32, F64 = torch.float32, torch.float64


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["as it is", "all convolutions", "none"])
def library(request, monkeypatch):
    """Both ways on every machine, whichever it would take."""
    if request.param == "all convolutions":
        monkeypatch.setattr(products, "_suits", lambda x, y, n: n and x.dtype == y.dtype == F32)
    if request.param == "none":
        monkeypatch.setattr(products, "_suits", lambda *_: False)


def random(*shape, dtype=F64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("lead", [(1,), (7,), (64,), (3, 5), (512,), (4, 128), (2, 0)], ids=str)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 2), (257, 129), (256, 256)])
def test_products(threads, library, dtype, lead, k, n):
    x, Q = random(*lead, k, dtype=dtype), random(k, n, dtype=dtype)
    y = random(*lead, n, dtype=dtype)
    if not x.numel():
        found, pair = turned(x, Q), (x.flatten(0, -2), y.flatten(0, -2))
        assert found.shape == y.shape
        assert torch.equal(crossed(*pair), torch.zeros(k, n, dtype=dtype))
        return
    rows = (x.reshape(-1, k), y.reshape(-1, n))
    # Rounding of a sum of k products, against the sum of their sizes.
    eps = torch.finfo(dtype).eps
    wide = x.double() @ Q.double()
    gap = (turned(x, Q).double() - wide).abs()
    assert bool((gap <= k * eps * (x.double().abs() @ Q.double().abs())).all())
    a, b = (each.double() for each in rows)
    gap = (crossed(*rows).double() - a.T @ b).abs()
    assert bool((gap <= len(a) * eps * (a.abs().T @ b.abs())).all())


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("n", [1, 5, 511, 512, 515, 1025])
def test_symmetric_sums(library, dtype, n):
    rows, weights = random(7, n, dtype=dtype), torch.rand(7, 1, dtype=dtype)
    expected = rows.double().T @ (weights * rows).double()
    found = gram(rows * weights, rows)
    assert found.dtype == dtype
    atol = 8 * torch.finfo(dtype).eps * float(rows.norm() ** 2)
    assert torch.allclose(found.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("which", ["rows", "columns", "every second", "a part"])
def test_views(library, which):
    x = {
        "rows": random(70, 90, dtype=F32)[10:50],
        "columns": random(40, 90, dtype=F32).T.contiguous().T,
        "every second": random(80, 90, dtype=F32)[::2],
        "a part": random(40, 120, dtype=F32)[:, 7:97],
    }[which]
    Q = random(90, 80, dtype=F32).T.contiguous().T
    assert torch.allclose(turned(x, Q), x @ Q, atol=1e-4)
    assert torch.allclose(crossed(x, x[:, :33]), x.T @ x[:, :33], atol=1e-4)


def test_small_products_double_precision_and_graphs_stay_with_mm():
    wide = torch.zeros(512, 512)
    assert not products._suits(wide, wide.double(), 2**30)
    assert not products._suits(wide.double(), wide.double(), 2**30)
    assert not products._suits(wide, wide, 2**24 - 1)
    assert not products._suits(wide, wide.clone().requires_grad_(), 2**30)
    x = random(512, 512, dtype=F32).requires_grad_()
    assert turned(x, wide).requires_grad


def test_nan_stays_nan(library):
    x = random(512, 256, dtype=F32)
    x[3, 4] = torch.nan
    assert bool(turned(x, random(256, 256, dtype=F32))[3].isnan().all())
    assert bool(gram(x, x)[4].isnan().all())
