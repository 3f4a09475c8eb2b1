from __future__ import annotations

import numpy as np
import pytest
import torch

from woodbury import Space
from woodbury.errors import DeviceError, DtypeError, ShapeError

SHAPES = {"weight": (2, 3), "scale": (), "empty": (0, 2), "bias": (2,)}


def tensors(*tail, dtype=torch.float32):
    return {name: torch.randn((*shape, *tail), dtype=dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("tail", [(), (1,), (4,), (0,)])
def test_there_and_back(tail):
    space, given = Space(SHAPES), tensors(*tail)
    flat = space.flatten(given)
    assert flat.shape == (9, *tail)
    for name, view in space.unflatten(flat).items():
        assert torch.equal(view, given[name])
    # The order is that of the mapping.
    assert torch.equal(flat[:6], given["weight"].reshape(6, *tail))


def test_unflattening_copies_nothing():
    space = Space(SHAPES)
    blocks = [torch.zeros(9), torch.zeros(9, 3), torch.zeros(3, 9).mT, torch.zeros(18, 6)[::2, ::2]]
    for flat in blocks:
        space.unflatten(flat)["bias"].add_(1.0)
        assert float(flat.sum()) == 2.0 * (flat.shape[1] if flat.dim() == 2 else 1)


def test_unnamed_spaces():
    space = Space(3)
    assert not space.named
    assert space.dim == 3
    assert Space(np.int64(3)) == space
    assert repr(space) == "Space(3)"
    assert repr(Space({"w": (2, 1)})) == "Space({w: (2, 1)}, dim=2)"
    assert Space({}).dim == 0
    assert Space({}).flatten({}).shape == (0,)
    with pytest.raises(TypeError):
        Space(2.5)


def test_of_tensors():
    space = Space.of(tensors(dtype=torch.float64))
    assert space.dim == 9
    assert space.dtype == torch.float64
    assert space.device == torch.device("cpu")
    with pytest.raises(ShapeError, match="no tensors"):
        Space.of({})
    with pytest.raises(DtypeError, match="a: torch.float32, b: torch.float64"):
        Space.of({"a": torch.ones(1), "b": torch.ones(1).double()})
    with pytest.raises(DeviceError, match="b: meta"):
        Space.of({"a": torch.ones(1), "b": torch.ones(1, device="meta")})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128, torch.bfloat16])
def test_inner_products_are_per_column_and_conjugate_the_first(dtype):
    space = Space(5)
    x, y = torch.randn(5, 3).to(dtype), torch.randn(5, 3).to(dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    want = (x.to(wide).conj() * y.to(wide)).sum(0)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(space.inner(x, y).to(wide), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        space.inner(x[:, 0], y[:, 0]).to(wide), want[0], rtol=tolerance, atol=tolerance
    )
    gram = space.gram(x, y[:, :2])
    assert gram.shape == (3, 2)
    torch.testing.assert_close(gram.diagonal().to(wide), want[:2], rtol=tolerance, atol=tolerance)
    norms = space.norm(x)
    assert not norms.dtype.is_complex
    torch.testing.assert_close(
        norms.square().double(), space.inner(x, x).real.double(), rtol=tolerance, atol=tolerance
    )
    assert space.norm(x[:, 0]).shape == ()


def test_inner_products_do_not_broadcast():
    with pytest.raises(ShapeError, match=r"\(3, 3\) and \(3,\)"):
        Space(3).inner(torch.ones(3, 3), torch.ones(3))


def test_equality_is_of_names_shapes_order_dtype_and_device():
    a = Space({"w": (2,), "b": (1,)})
    assert a == Space({"w": (2,), "b": (1,)})
    assert hash(a) == hash(Space({"w": (2,), "b": (1,)}))
    assert a != Space({"b": (1,), "w": (2,)})
    assert a != Space(3)
    assert a != Space({"w": (2,), "b": (1,)}, dtype=torch.float64)
    assert a != Space({"w": (2,), "b": (1,)}, device="meta")
    assert a != "a space"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bias": None}, ShapeError, r"missing \['bias'\]"),
        ({"extra": torch.ones(1)}, ShapeError, r"unknown \['extra'\]"),
        ({"bias": torch.ones(3)}, ShapeError, r"'bias' has shape \(3,\), expected \(2,\)"),
        ({"bias": torch.ones(2, 4)}, ShapeError, "one k for all names"),
        ({"bias": torch.ones(2, 4, 4)}, ShapeError, "'bias'"),
        ({"bias": torch.ones(2).double()}, DtypeError, "several dtypes"),
    ],
)
def test_tensors_of_another_space_are_refused(change, error, message):
    given = {name: t for name, t in {**tensors(), **change}.items() if t is not None}
    with pytest.raises(error, match=message):
        Space(SHAPES).flatten(given)


def test_vectors_of_another_space_are_refused():
    space = Space(3, dtype=torch.float32, device="cpu")
    for shape in [(4,), (4, 2), (3, 1, 1), ()]:
        with pytest.raises(ShapeError, match=r"vector has shape .* expected \[3\] or \[3, k\]"):
            space.check(torch.ones(shape))
    with pytest.raises(DtypeError, match=r"right-hand side is torch.float64, the space is"):
        space.check(torch.ones(3).double(), "right-hand side")
    with pytest.raises(DeviceError, match="on meta, the space on cpu"):
        space.check(torch.ones(3, device="meta"))
    with pytest.raises(ShapeError, match="must not be negative"):
        Space({"w": (2, -1)})
