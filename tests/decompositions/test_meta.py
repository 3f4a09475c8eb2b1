"""Range finder, meta-factorisation, generalised Nystrom, UTV and CUR, rectangular and complex."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from tests.conformance import OperatorConformance
from tests.solvers.systems import DTYPES, eye, function, random, wide
from tests.solvers.test_cg import Weighted

from woodbury import Dense, Space, Sparse
from woodbury.decompositions import (
    TwoSided,
    cur,
    generalized_nystrom,
    meta_factorization,
    range_finder,
    utv,
)
from woodbury.errors import ArgumentError, NonFiniteError, RankError, ShapeError

F64 = torch.float64
SHAPES = [(40, 25), (25, 40), (30, 30)]


def with_singular_values(
    m: int, n: int, values: torch.Tensor, dtype: torch.dtype = F64
) -> torch.Tensor:
    k = len(values)
    drawn = torch.complex128 if dtype.is_complex else F64
    U, _ = torch.linalg.qr(random(m, k, dtype=drawn, seed=2))
    V, _ = torch.linalg.qr(random(n, k, dtype=drawn, seed=3))
    return ((U * values.to(drawn)) @ V.mH).to(dtype)


def of_rank(rank: int, m: int, n: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return with_singular_values(m, n, torch.linspace(1, 3, rank, dtype=F64), dtype)


def decaying(m: int, n: int) -> torch.Tensor:
    return with_singular_values(m, n, torch.logspace(0, -6, min(m, n), dtype=F64))


def operator(M: torch.Tensor):
    return function(M, set())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectral(M: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(wide(M), 2))


def rounding(dtype: torch.dtype) -> float:
    return 1e-12 if dtype in (F64, torch.complex128) else 1e-4


FACTORISATIONS = {
    "generalized_nystrom": generalized_nystrom,
    "utv": utv,
    "cur": cur,
    "cur-intersection": lambda A, rank, **options: cur(A, rank, core="intersection", **options),
}
EACH = pytest.mark.parametrize("name", FACTORISATIONS)


@EACH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_where_the_rank_suffices(name: str, shape, dtype: torch.dtype) -> None:
    M = of_rank(5, *shape, dtype)
    for rank in (5, 8):  # the rank of A, and a sketch beyond it
        found = FACTORISATIONS[name](operator(M), rank)
        product = found.left @ found.core @ found.right.mH
        assert spectral(product - M) < 30 * rounding(dtype)
        assert spectral(found.operator.to_dense() - M) < 10 * rounding(dtype)
        exact = torch.from_numpy(scipy.linalg.pinv(wide(M).numpy(), rtol=1e-4))
        assert spectral(found.operator.pseudo_inverse(1e-4).to_dense() - exact) < 20 * rounding(
            dtype
        )
        assert found.left.dtype == found.right.dtype == dtype
        assert found.core.shape == (found.left.shape[1], found.right.shape[1])


@EACH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_near_the_best(name: str, shape) -> None:
    M = decaying(*shape)
    best = float(torch.linalg.svdvals(M)[10])
    for seed in range(5):
        found = FACTORISATIONS[name](operator(M), 10, generator=seeded(seed))
        error = spectral(M - found.operator.to_dense())
        # What the papers promise is a polynomial in the rank; seen is less than 20.
        assert 0.999 * best <= error < 30 * best
        assert spectral(found.left @ found.core @ found.right.mH - found.operator.to_dense()) < 1e-9


@EACH
def test_counts_its_products(name: str) -> None:
    A, counted = operator(decaying(30, 20)), []
    forward, backward = A._matmat, A._rmatmat

    def count(product, X: torch.Tensor) -> torch.Tensor:
        counted.append(X.shape[1])
        return product(X)

    A._matmat = lambda X: count(forward, X)
    A._rmatmat = lambda Y: count(backward, Y)
    found = FACTORISATIONS[name](A, 6)
    assert found.products == sum(counted)


@EACH
def test_zero_operator_and_one_by_one(name: str) -> None:
    zero = FACTORISATIONS[name](Dense(torch.zeros(6, 4, dtype=F64)), 2)
    assert torch.equal(zero.operator.to_dense(), torch.zeros(6, 4, dtype=F64))
    assert torch.equal(zero.operator.pseudo_inverse().to_dense(), torch.zeros(4, 6, dtype=F64))
    one = FACTORISATIONS[name](Dense(torch.full((1, 1), -3.0, dtype=F64)), 1)
    assert torch.allclose(one.operator.to_dense(), -3 * eye(1))


@EACH
def test_draws_are_repeatable(name: str) -> None:
    A = operator(decaying(30, 20))
    first, second = FACTORISATIONS[name](A, 6), FACTORISATIONS[name](A, 6, generator=seeded(0))
    other = FACTORISATIONS[name](A, 6, generator=seeded(1))
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    same = first.left.shape == other.left.shape and torch.equal(first.right, other.right)
    assert not same or name.startswith("cur")  # pivots may agree


@EACH
def test_what_is_refused(name: str) -> None:
    factorise = FACTORISATIONS[name]
    A = operator(decaying(12, 8))
    with pytest.raises(RankError, match=r"rank is 9, the operator has shape \(12, 8\).* 1 to 8"):
        factorise(A, 9)
    with pytest.raises(RankError, match="rank is 0"):
        factorise(A, 0)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        factorise(operator(math.inf * torch.ones(12, 8, dtype=F64)), 2)


@pytest.mark.parametrize("name", ["generalized_nystrom", "utv"])
def test_spaces_with_inner_products_of_their_own(name: str) -> None:
    M = of_rank(5, 18, 12)
    columns, rows = torch.logspace(-1, 1, 12, dtype=F64), torch.logspace(1, -1, 18, dtype=F64)
    A = operator(M)
    adjoint = (M.T * rows) / columns[:, None]  # with respect to the weights
    A._rmatmat = lambda Y: adjoint @ Y
    A.space, A.out_space = Weighted(columns), Weighted(rows)
    found = FACTORISATIONS[name](A, 6)
    assert spectral(found.operator.to_dense() - M) < 1e-10
    if name == "utv":
        assert torch.allclose(found.core, found.core.triu(), atol=1e-12)
        assert torch.allclose(A.space.gram(found.right, found.right), eye(5))
    inverse = found.operator.pseudo_inverse().to_dense()
    half = torch.diag(rows.sqrt()) @ M @ torch.diag(columns.rsqrt())
    expected = torch.diag(columns.rsqrt()) @ torch.linalg.pinv(half) @ torch.diag(rows.sqrt())
    assert spectral(inverse - expected) < 1e-9 * spectral(expected)


# ------------------------------------------------------------- meta-factorisation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projector_and_reconstruction_equations(dtype: torch.dtype) -> None:
    M = random(14, 9, dtype=dtype)
    F, H = random(14, 4, dtype=dtype, seed=5), random(9, 3, dtype=dtype, seed=6)
    B, D = random(14, 7, dtype=dtype, seed=7), random(9, 5, dtype=dtype, seed=8)
    found = meta_factorization(Dense(M), F, H, left_test=B, right_test=D)
    A, f, h, b, d = (wide(X) for X in (M, F, H, B, D))
    Yh = torch.linalg.pinv(b.mH @ f) @ b.mH
    X = d @ torch.linalg.pinv(h.mH @ d)
    assert torch.allclose(f @ Yh @ f, f)
    assert torch.allclose(h.mH @ X @ h.mH, h.mH)
    assert spectral(wide(found.core) - Yh @ A @ X) < 10 * rounding(dtype) * spectral(Yh @ A @ X)
    expected = f @ Yh @ A @ X @ h.mH
    assert spectral(wide(found.operator.to_dense()) - expected) < 1e2 * rounding(dtype)


def test_default_tests_give_the_best_core() -> None:
    M, F, H = random(14, 9), random(14, 4, seed=5), random(9, 3, seed=6)
    found = meta_factorization(Dense(M), F, H)
    flat = torch.kron(F, H)  # vec of F G H^T, by rows
    best = torch.from_numpy(scipy.linalg.lstsq(flat.numpy(), M.flatten().numpy())[0])
    assert torch.allclose(found.core.flatten(), best)


def test_bases_that_are_badly_conditioned_lose_nothing() -> None:
    # The normal equations of the bases have the condition number 1e18.
    U = of_rank(4, 30, 4)
    F = U @ torch.diag(torch.logspace(0, -9, 4, dtype=F64)) @ random(4, 4)
    M = U @ random(4, 20, seed=9)
    found = meta_factorization(Dense(M), F, M.T[:, :4])
    assert spectral(found.operator.to_dense() - M) < 1e-5
    with_squares = F @ torch.linalg.pinv(F.T @ F) @ F.T @ M
    assert spectral(with_squares - M) > 1e-3


def test_free_term_moves_the_core_and_not_the_product() -> None:
    M = of_rank(3, 10, 8)
    F, H = M @ random(8, 5), M.T @ random(10, 4, seed=4)  # of rank 3
    W = random(5, 4, seed=8)
    least, moved = (meta_factorization(Dense(M), F, H, start=start) for start in (None, W))
    for found in (least, moved):
        assert spectral(F @ found.core @ H.T - M) < 1e-10
        assert spectral(found.operator.to_dense() - M) < 1e-10
    assert float(least.core.norm()) < float(moved.core.norm())
    full = [meta_factorization(Dense(M), F[:, :3], H[:, :3], start=s) for s in (None, W[:3, :3])]
    assert torch.allclose(full[0].core, full[1].core, atol=1e-9)


def test_special_cases_are_the_equation() -> None:
    A = Dense(random(16, 11))
    found = utv(A, 5)
    assert torch.allclose(meta_factorization(A, found.left, found.right).core, found.core)
    found = cur(A, 5)
    C, R = A.matrix[:, found.columns], A.matrix[found.rows]
    assert torch.equal(found.left, C)
    assert torch.equal(found.right, R.T)
    exact = torch.linalg.pinv(C) @ A.matrix @ torch.linalg.pinv(R)
    assert torch.allclose(found.core, exact)
    found = cur(A, 5, core="intersection")
    P = eye(16)[:, found.rows], eye(11)[:, found.columns]
    tested = meta_factorization(A, C, R.T, left_test=P[0], right_test=P[1])
    assert torch.allclose(found.core, tested.core)
    assert torch.allclose(found.core, torch.linalg.inv(A.matrix[found.rows][:, found.columns]))
    # Generalised Nystrom: F = A D, H = A^T B, tests B and D.
    generator = seeded(3)
    found = generalized_nystrom(A, 4, generator=seeded(3))
    gaussian = (torch.randn(n, k, dtype=F64, generator=generator) for n, k in ((11, 4), (16, 6)))
    D, B = (torch.linalg.qr(G)[0] for G in gaussian)
    F, H = A.matrix @ D, A.matrix.T @ B
    tested = meta_factorization(A, F, H, left_test=B, right_test=D)
    assert torch.allclose(found.operator.to_dense(), tested.operator.to_dense(), atol=1e-10)
    formula = F @ torch.linalg.pinv(B.T @ A.matrix @ D) @ H.T
    assert torch.allclose(found.operator.to_dense(), formula, atol=1e-10)


def test_meta_factorization_refuses() -> None:
    A = Dense(random(6, 4))
    with pytest.raises(ShapeError, match=r"left has shape \(5, 2\), expected \[6, k\]"):
        meta_factorization(A, random(5, 2), random(4, 2))
    with pytest.raises(ShapeError, match=r"right_test has shape"):
        meta_factorization(A, random(6, 2), random(4, 2), right_test=random(6, 2))
    with pytest.raises(ShapeError, match=r"start has shape \(3, 3\)"):
        meta_factorization(A, random(6, 2), random(4, 2), start=random(3, 3))


# ------------------------------------------------------------- generalised Nystrom


def test_average_error_is_within_the_theorem() -> None:
    # Nakatsukasa 2020: E |A - A_hat|_F is within the two factors of the best of rank r.
    values = torch.logspace(0, -3, 40, dtype=F64)
    A = Dense(torch.diag(values))
    k, r, p = 12, 8, 6
    errors = []
    for seed in range(30):
        found = generalized_nystrom(A, k, oversampling=p, generator=seeded(seed))
        errors.append(float((A.matrix - found.operator.to_dense()).norm()))
    best = float(values[r:].norm())
    bound = math.sqrt(1 + k / (p - 1)) * math.sqrt(1 + r / (k - r - 1)) * best
    assert float(values[k:].norm()) <= sum(errors) / 30 <= bound


def test_oversampling_is_what_makes_it_stable() -> None:
    M = with_singular_values(60, 60, torch.logspace(0, -12, 60, dtype=F64))
    worst = {}
    for extra in (0, None):
        errors = []
        for seed in range(20):
            found = generalized_nystrom(operator(M), 20, oversampling=extra, generator=seeded(seed))
            errors.append(spectral(M - found.operator.to_dense()))
        worst[extra] = max(errors)
    assert worst[None] < 30 * float(torch.linalg.svdvals(M)[20])
    assert worst[0] > 5 * worst[None]


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_singular_core_is_rounding_not_failure(dtype: torch.dtype) -> None:
    M = with_singular_values(50, 40, torch.logspace(0, -20, 40, dtype=F64), dtype)
    found = generalized_nystrom(operator(M), 36)
    assert spectral(M - found.operator.to_dense()) < 5e2 * torch.finfo(dtype).eps
    assert found.left.shape[1] < 36


def test_oversampling_is_looked_at() -> None:
    with pytest.raises(ArgumentError, match="oversampling is -1"):
        generalized_nystrom(Dense(random(5, 4)), 2, oversampling=-1)


# -------------------------------------------------------------------- UTV


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_utv_reveals_the_rank(dtype: torch.dtype) -> None:
    values = torch.tensor([4.0, 3.0, 2.0, 1e-3, 5e-4, 1e-4], dtype=F64)
    M = with_singular_values(20, 15, values, dtype)
    found = utv(operator(M), 6, power=2)
    U, T, V = wide(found.left), wide(found.core), wide(found.right)
    unit = torch.eye(6).to(U)
    assert torch.allclose(U.mH @ U, unit, atol=10 * rounding(dtype))
    assert torch.allclose(V.mH @ V, unit, atol=10 * rounding(dtype))
    assert torch.equal(T, T.triu())
    diagonal = T.diagonal().abs()
    assert bool(((diagonal[:3] / values[:3] - 1).abs() < 0.3).all())
    assert float(diagonal[3:].max()) < 2e-3
    if dtype == F64:
        assert torch.allclose(torch.linalg.svdvals(T), values)


def test_power_sharpens_a_slow_spectrum() -> None:
    M = with_singular_values(80, 60, 1 / torch.arange(1, 61, dtype=F64))
    best = 1 / 11
    errors = [
        spectral(M - utv(operator(M), 10, power=q).operator.to_dense()) / best for q in (0, 3)
    ]
    assert 1 <= errors[1] < 1.2 < errors[0]


# -------------------------------------------------------------------- CUR


def test_cur_by_given_rows_and_columns() -> None:
    M = random(9, 7)
    J, I = torch.tensor([5, 0]), [8, 2, 3]  # noqa: E741
    found = cur(Sparse(M.to_sparse()), columns=J, rows=I)
    assert torch.equal(found.left, M[:, [5, 0]])
    assert torch.equal(found.right.T, M[[8, 2, 3]])
    assert found.products == 2 + 3 + 3
    with pytest.raises(RankError, match="rank is not given"):
        cur(Dense(M), columns=J)
    with pytest.raises(ArgumentError, match="rows must be a list of integers from 0 to 8"):
        cur(Dense(M), columns=J, rows=[9])
    with pytest.raises(ArgumentError, match="core is 'best'"):
        cur(Dense(M), 2, core="best")
    with pytest.raises(ArgumentError, match="oversampling is -2"):
        cur(Dense(M), 2, oversampling=-2)


def test_cur_finds_the_columns_that_carry_everything() -> None:
    M = torch.zeros(12, 10, dtype=F64)
    M[[3, 7, 11], [2, 9, 4]] = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    found = cur(Dense(M), 5)
    assert sorted(found.columns.tolist()) == [2, 4, 9]
    assert sorted(found.rows.tolist()) == [3, 7, 11]
    assert torch.allclose(found.operator.to_dense(), M)


# ------------------------------------------------------------------ range finder


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_range_basis(shape, dtype: torch.dtype) -> None:
    M = of_rank(5, *shape, dtype)
    for rank, power in ((5, 0), (9, 0), (9, 2)):
        found = range_finder(operator(M), rank, power=power)
        Q = wide(found.basis)
        assert Q.shape == (shape[0], 5)
        assert torch.allclose(Q.mH @ Q, torch.eye(5).to(Q), atol=rounding(dtype))
        assert spectral(wide(M) - Q @ (Q.mH @ wide(M))) < 10 * rounding(dtype)
        assert found.products == rank + power * 10 if rank == 9 else True


def test_range_of_a_block_is_that_of_the_sketch() -> None:
    M = decaying(30, 20)
    Q = range_finder(operator(M), 6, power=1, generator=seeded(8)).basis
    sketch = M @ M.T @ M @ torch.randn(20, 6, dtype=F64, generator=seeded(8))
    P, _ = torch.linalg.qr(sketch)
    assert spectral(Q @ Q.T - P @ P.T) < 1e-6


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-5])
def test_range_to_a_tolerance(tolerance: float) -> None:
    M = decaying(60, 50)
    found = range_finder(operator(M), 4, tolerance=tolerance)
    true = spectral(M - found.basis @ (found.basis.T @ M))
    assert true <= found.error <= tolerance
    fewer = range_finder(operator(M), max(1, found.basis.shape[1] // 2))
    assert spectral(M - fewer.basis @ (fewer.basis.T @ M)) > tolerance / 100
    stopped = range_finder(operator(M), 4, tolerance=1e-30, max_rank=6)
    assert stopped.basis.shape[1] == 6
    assert stopped.error > 1e-30
    whole = range_finder(operator(of_rank(5, 30, 20)), 4, tolerance=0.0)
    assert whole.basis.shape[1] == 5  # there is nothing left but rounding
    assert whole.error < 1e-12


def test_range_finder_refuses() -> None:
    A = operator(decaying(12, 8))
    with pytest.raises(ArgumentError, match="power is -1"):
        range_finder(A, 2, power=-1)
    with pytest.raises(ArgumentError, match="tolerance is nan"):
        range_finder(A, 2, tolerance=math.nan)
    with pytest.raises(RankError, match="max_rank is 1"):
        range_finder(A, 2, tolerance=0.1, max_rank=1)
    with pytest.raises(NonFiniteError):
        range_finder(operator(math.nan * decaying(12, 8)), 2)


# --------------------------------------------------------------- the operator


class TestTwoSided(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            for core in (random(3, 2, dtype=dtype, seed=4), random(3, dtype=dtype, seed=4)):
                F = random(7, 3, dtype=dtype, seed=5)
                H = random(5, 2 if core.dim() == 2 else 3, dtype=dtype, seed=6)
                G = core if core.dim() == 2 else torch.diag(core)
                dense = wide(F) @ wide(G) @ wide(H).mH
                cases.append((TwoSided(F, core, H, space=Space(5), out_space=Space(7)), dense))
        return cases


def test_singular_values() -> None:
    F, G, H = random(9, 4), random(4, 3), random(6, 3)
    A = TwoSided(F, G, H, space=Space(6), out_space=Space(9))
    U, s, V = A.singular_value_decomposition()
    assert torch.allclose((U * s) @ V.T, F @ G @ H.T)
    assert torch.allclose(s, torch.linalg.svdvals(F @ G @ H.T)[:3])
    with pytest.raises(ArgumentError, match="rcond is 1"):
        A.pseudo_inverse(1.0)
