"""The least squares layer against LAPACK, closed forms and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.sparse
import torch
from tests.implicit.derivatives import check_derivatives
from torch import Tensor

from woodbury import CG, LSMR, QR, Dense, Sparse
from woodbury.errors import (
    ArgumentError,
    DtypeError,
    GradientError,
    NonFiniteError,
    ShapeError,
    SingularError,
    SolveError,
)
from woodbury.implicit import least_squares
from woodbury.solvers import SolveReport

# Torch itself scripts what forward mode needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is dep:DeprecationWarning")

DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def reference(A: Tensor, b: Tensor, ridge: float = 0.0) -> Tensor:
    """By the pseudo-inverse of the stacked matrix: another way than the layer's."""
    n = A.shape[-1]
    eye = (ridge**0.5 * torch.eye(n, dtype=DOUBLE)).expand(*A.shape[:-2], n, n)
    stacked = torch.cat([A, eye], -2)
    right = torch.cat([b, b.new_zeros(*b.shape[:-1], n)], -1)
    return (torch.linalg.pinv(stacked) @ right[..., None]).squeeze(-1)


@pytest.mark.parametrize("shape", [(7, 3), (3, 3), (1, 1), (2, 5)])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("recipe", [None, QR(), LSMR(rtol=1e-12)])
def test_solutions_are_lapacks(shape: tuple[int, int], ridge: float, recipe: Any) -> None:
    A, b = draw(4, *shape), draw(4, shape[0])
    if recipe is None and not ridge and shape[0] < shape[1]:
        with pytest.raises(SingularError, match="2 rows and 5 columns"):
            least_squares(A, b)
        return
    x = least_squares(A, b, ridge=ridge, recipe=recipe)
    torch.testing.assert_close(x, reference(A, b, ridge), rtol=1e-8, atol=1e-10)
    one = least_squares(A[0], b[0], ridge=ridge, recipe=recipe)
    torch.testing.assert_close(one, x[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 4, 2), (2, 1, 2)])
def test_derivatives_of_every_kind(shape: tuple[int, ...]) -> None:
    A, b, ridge = draw(*shape), draw(*shape[:-1]), torch.tensor([0.4, 0.7], dtype=DOUBLE)
    check_derivatives(lambda A, b, ridge: least_squares(A, b, ridge=ridge), A, b, ridge)


def test_derivatives_without_a_ridge_and_of_recipes() -> None:
    A, b = draw(5, 2), draw(5)
    check_derivatives(least_squares, A, b)
    ridge = torch.tensor(0.4, dtype=DOUBLE)
    at = [t.clone().requires_grad_() for t in (A, b, ridge)]
    by_factor = torch.autograd.grad(least_squares(at[0], at[1], ridge=at[2]).sum(), at)
    report = SolveReport()
    for recipe in (QR(), LSMR(rtol=1e-13)):
        x = least_squares(at[0], at[1], ridge=at[2], recipe=recipe, report=report)
        for found, expected in zip(torch.autograd.grad(x.sum(), at), by_factor, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert report.ok


def test_derivative_in_the_ridge_is_the_closed_form() -> None:
    A, b = draw(6, 3), draw(6)

    def x(ridge: Tensor) -> Tensor:
        return least_squares(A, b, ridge=ridge)

    ridge = torch.tensor(0.2, dtype=DOUBLE)
    M = A.mT @ A + 0.2 * torch.eye(3, dtype=DOUBLE)
    expected = -torch.linalg.solve(M, x(ridge))
    torch.testing.assert_close(torch.func.jacrev(x)(ridge), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.func.jacfwd(x)(ridge), expected, rtol=1e-10, atol=1e-12)
    twice = torch.func.hessian(lambda r: x(r).sum())(ridge)
    torch.testing.assert_close(twice, -2 * torch.linalg.solve(M, expected).sum())


def test_vmap_is_the_batch() -> None:
    A, b = draw(4, 5, 2), draw(4, 5)
    mapped = torch.func.vmap(lambda A, b: least_squares(A, b, ridge=0.1))(A, b)
    torch.testing.assert_close(mapped, least_squares(A, b, ridge=0.1))
    shared = least_squares(A[0], b)  # one matrix for all right-hand sides
    torch.testing.assert_close(shared, torch.stack([least_squares(A[0], one) for one in b]))


def test_operators_and_their_values() -> None:
    pattern = scipy.sparse.random_array((8, 4), density=0.6, rng=0)
    A = Sparse(pattern + scipy.sparse.eye_array(8, 4))
    A.values.requires_grad_()
    b = draw(8)
    for ridge in (0.0, 0.5):
        x = least_squares(A, b, ridge=ridge, recipe=LSMR(rtol=1e-13))
        dense = A.to_dense().detach().requires_grad_()
        expected = least_squares(dense, b, ridge=ridge)
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-10)
        (found,) = torch.autograd.grad(x.sum(), A.values)
        (full,) = torch.autograd.grad(expected.sum(), dense)
        torch.testing.assert_close(found, full[A.rows, A.column_indices], rtol=1e-7, atol=1e-9)
    block = draw(8, 3)
    found = least_squares(Dense(A.to_dense().detach()), block, ridge=0.5)
    torch.testing.assert_close(found.mT, least_squares(A.to_dense().detach(), block.mT, ridge=0.5))


def test_rank_is_asked_for() -> None:
    A, b = draw(5, 3), draw(5)
    A[:, 2] = A[:, 0] + A[:, 1]
    with pytest.raises(SingularError, match="no full column rank"):
        least_squares(A, b)
    least = least_squares(A, b, recipe=QR())
    torch.testing.assert_close(least, torch.linalg.pinv(A) @ b, rtol=1e-9, atol=1e-10)
    with pytest.raises(SingularError, match="no full column rank"):
        least_squares(torch.stack([draw(5, 3), A]), torch.stack([b, b]))
    zero = least_squares(torch.zeros(3, 2, dtype=DOUBLE), draw(3), ridge=1.0)
    assert zero.tolist() == [0.0, 0.0]


def test_small_numbers_zero_and_half_the_precision() -> None:
    A, b = draw(5, 3), draw(5)
    tiny = least_squares(1e-120 * A, b)
    torch.testing.assert_close(1e-120 * tiny, least_squares(A, b), rtol=1e-10, atol=0)
    assert least_squares(A, torch.zeros(5, dtype=DOUBLE)).abs().max() == 0
    single = least_squares(A.float(), b.float())
    assert single.dtype == torch.float32
    exact = least_squares(A.float().double(), b.float().double())
    torch.testing.assert_close(single, exact.float(), rtol=0, atol=0)


def test_bad_input() -> None:
    A, b = draw(5, 3), draw(5)
    with pytest.raises(ArgumentError, match=r"ridge is -1.0; it must be >= 0"):
        least_squares(A, b, ridge=-1.0)
    with pytest.raises(ArgumentError, match="positive where its derivative is needed"):
        least_squares(A, b, ridge=torch.zeros((), dtype=DOUBLE, requires_grad=True))
    with pytest.raises(NonFiniteError, match="ridge is NaN"):
        least_squares(A, b, ridge=float("nan"))
    with pytest.raises(NonFiniteError, match="A has an entry"):
        least_squares(A * torch.inf, b)
    with pytest.raises(NonFiniteError, match="b has an entry"):
        least_squares(A, b * torch.nan)
    with pytest.raises(DtypeError, match="A is torch.int64"):
        least_squares(A.long(), b)
    with pytest.raises(DtypeError, match="convert one"):
        least_squares(A.float(), b)
    with pytest.raises(ShapeError, match=r"b \(4,\)"):
        least_squares(A, b[:4])
    with pytest.raises(ShapeError, match="do not broadcast"):
        least_squares(A.expand(2, 5, 3), b.expand(3, 5))
    with pytest.raises(ShapeError, match="ridge has shape"):
        least_squares(A.expand(2, 5, 3), b, ridge=torch.ones(3))
    with pytest.raises(GradientError, match="it is a scalar"):
        least_squares(A, b, ridge=torch.ones(2), recipe=QR())
    with pytest.raises(SolveError):
        least_squares(A, b, recipe=LSMR(rtol=1e-12, max_steps=1))
    loose = least_squares(A, b, recipe=LSMR(rtol=1e-12, max_steps=1), throw=False)
    assert torch.isfinite(loose).all()
    with pytest.raises(ShapeError):
        least_squares(A, b, recipe=CG())  # of square systems
