"""Bounds on errors against the errors themselves, in float64 and at the limit of rounding."""

from __future__ import annotations

import gzip
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.sparse
import torch
from tests.solvers.systems import definite, function, random, solution_of, with_spectrum
from torch import Tensor

from woodbury import (
    CG,
    BlockDiagonal,
    Dense,
    Diagonal,
    Eigh,
    Identity,
    Kronecker,
    LowRank,
    Nystrom,
    Sparse,
    solve,
)
from woodbury.errors import ArgumentError, ShapeError
from woodbury.solvers import (
    LU,
    SolveStatus,
    smallest_eigenvalue_bound,
    smallest_singular_value_bound,
)
from woodbury.solvers.certificate import (
    ErrorBound,
    Guarantee,
    energy_history,
    error_bound,
)

F64 = torch.float64
n = 60


def energy_error(M: Tensor, x: Tensor, exact: Tensor) -> float:
    e = x.double() - exact
    return math.sqrt(float(e @ (M @ e)))


def errors_by_step(A, b: Tensor, exact: Tensor, steps: int, **options) -> list[float]:
    M = A.to_dense()
    found = [energy_error(M, torch.zeros_like(exact), exact)]
    for k in range(1, steps):
        x = solve(A, b, CG(rtol=0, max_steps=k, **options), throw=False).value
        found.append(energy_error(M, x, exact))
    return found


SPECTRA = {
    "even": torch.linspace(0.1, 1, n, dtype=F64),
    "decaying": torch.logspace(-6, 0, n, dtype=F64),
    "clustered": torch.cat([torch.full((n - 3,), 1.0), torch.tensor([1e-3, 2e-3, 10.0])]).double(),
    # Strakos: rounding costs CG its orthogonality early on.
    "strakos": 0.1
    + torch.arange(n, dtype=F64) / (n - 1) * 99.9 * 0.7 ** torch.arange(n - 1, -1, -1),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("known", [0.999, 0.3])
def test_gauss_below_and_gauss_radau_above_the_error(name: str, known: float) -> None:
    spectrum = SPECTRA[name]
    M = with_spectrum(spectrum)
    A, b = function(M, {"positive_definite"}), random(n)
    exact = solution_of(M, b)
    mu = known * float(spectrum.min())
    solution = solve(A, b, CG(rtol=1e-8, max_steps=2000, error_bound=mu))
    history = solution.info["energy"][0]
    steps = len(history.upper)
    assert steps == solution.steps
    true = np.array(errors_by_step(A, b, exact, steps))
    # Below this the reference itself is rounding.
    clear = true > 1e-10 * true[0]
    slack = 1 + 1e-6
    assert (true <= history.upper * slack)[clear].all()
    lower = history.lower
    assert (lower <= true[: len(lower)] * slack)[clear[: len(lower)]].all()
    # A quarter of the square is expected to be missing at most.
    ratios = (lower / true[: len(lower)])[clear[: len(lower)]]
    assert np.median(ratios) > (0.5 if name == "clustered" else math.sqrt(0.75))
    assert (history.delay >= 1).all()
    bound = solution.info["error_bound"][0]
    assert bound.guarantee is Guarantee.bound
    error = energy_error(M, solution.value, exact)
    assert error <= bound.value
    size = math.sqrt(float(exact @ M @ exact))
    assert error / size <= bound.relative <= 1
    if known == 0.999 and name in ("even", "decaying"):
        assert bound.value < 30 * error, "so loose says nothing"


@hypothesis.given(
    exponents=st.lists(st.floats(-5, 3), min_size=2, max_size=30),
    fraction=st.floats(0.01, 1.0),
    rtol=st.sampled_from([1e-2, 1e-5, 1e-9]),
    seed=st.integers(0, 1000),
)
@hypothesis.settings(max_examples=60)
def test_bound_over_spectra(exponents, fraction: float, rtol: float, seed: int) -> None:
    spectrum = 10.0 ** torch.tensor(exponents, dtype=F64)
    M = with_spectrum(spectrum, seed=seed)
    b = random(len(exponents), seed=seed)
    least = float(torch.linalg.eigvalsh(M).min())
    recipe = CG(rtol=rtol, max_steps=3000, error_bound=fraction * least)
    solution = solve(function(M, {"positive_definite"}), b, recipe, throw=False)
    bound = solution.info["error_bound"][0]
    assert bound.guarantee is Guarantee.bound
    # Rounding of the reference, which the bound knows nothing of.
    exact = solution_of(M, b)
    condition = float(spectrum.max() / spectrum.min())
    rounding = 1e-14 * (condition * float(spectrum.max())) ** 0.5 * float(exact.norm())
    assert energy_error(M, solution.value, exact) <= bound.value * (1 + 1e-6) + rounding


def test_stiffness_matrix_where_orthogonality_is_lost(data_folder) -> None:
    with gzip.open(data_folder / "matrices" / "bcsstk01.triplets.gz") as lines:
        rows, columns, values = np.loadtxt(lines).T
    half = scipy.sparse.coo_array((values, (rows.astype(int), columns.astype(int))))
    stiffness = (half + half.T - scipy.sparse.diags_array(half.diagonal())).tocsr()
    A = Sparse(stiffness, tags={"positive_definite"})
    M = torch.from_numpy(stiffness.toarray())
    spectrum = torch.linalg.eigvalsh(M)
    b = random(A.shape[0])
    exact = solution_of(M, b)
    recipe = CG(rtol=1e-8, error_bound=0.9 * float(spectrum[0]))
    solution = solve(A, b, recipe)
    assert solution.steps > 2 * A.shape[0], "in exact arithmetic there were n steps at most"
    bound = solution.info["error_bound"][0]
    assert energy_error(M, solution.value, exact) <= bound.value
    history = solution.info["energy"][0]
    true = np.array(errors_by_step(A, b, exact, 120))
    assert (true <= history.upper[:120] * (1 + 1e-6)).all()
    assert (history.lower[:100] <= true[:100] * (1 + 1e-6)).all()


def test_bound_from_the_structure_and_estimate_without() -> None:
    M = with_spectrum(torch.logspace(-8, 0, n, dtype=F64))
    b = random(n)
    H = function(M, {"positive_semidefinite"})
    shifted = solve(H + 1e-3 * Identity(n), b, CG(rtol=1e-6, error_bound=True))
    bound = shifted.info["error_bound"][0]
    assert (bound.guarantee, bound.smallest) == (Guarantee.bound, 1e-3)
    exact = solution_of(M + 1e-3 * torch.eye(n, dtype=F64), b)
    total = M + 1e-3 * torch.eye(n, dtype=F64)
    assert energy_error(total, shifted.value, exact) <= bound.value
    assert str(bound).startswith("||x - x*||_A <= ")
    plain = solve(function(definite(n), {"positive_definite"}), b, CG(error_bound=True))
    estimate = plain.info["error_bound"][0]
    assert estimate.guarantee is Guarantee.estimate
    assert str(estimate).startswith("||x - x*||_A ~ ")
    error = energy_error(definite(n), plain.value, solution_of(definite(n), b))
    assert error <= estimate.value < 30 * error
    report = plain.certificate()
    assert report["error"] == estimate.value
    assert report["error_guarantee"] == "estimate"
    assert "error_bound" not in solve(H + Identity(n), b, CG()).info


@pytest.mark.parametrize("b_scale", [1.0, 1e120])
def test_preconditioned(b_scale: float) -> None:
    M = with_spectrum(torch.logspace(-6, 0, n, dtype=F64))
    total = M + 1e-4 * torch.eye(n, dtype=F64)
    A = function(M, {"positive_semidefinite"}) + 1e-4 * Identity(n)
    b = b_scale * random(n)
    exact = solution_of(total, b)
    recipe = CG(rtol=1e-5, preconditioner=Nystrom(rank=20), error_bound=True)
    solution = solve(A, b, recipe)
    bound = solution.info["error_bound"][0]
    assert (bound.guarantee, bound.smallest) == (Guarantee.bound, 1e-4)
    error = b_scale * energy_error(total, solution.value / b_scale, exact / b_scale)
    assert error <= bound.value
    unknown = solve(function(total, {"positive_definite"}), b, recipe).info["error_bound"][0]
    assert unknown.guarantee is Guarantee.estimate
    assert error / 30 <= unknown.value <= 30 * error


def test_blocks_zero_columns_and_limits() -> None:
    A = Dense(definite(n), tags={"positive_definite"})
    B = random(n, 3)
    B[:, 1] = 0
    solution = solve(A, B, CG(rtol=1e-4, error_bound=0.02))
    exact = solution_of(A.matrix, B)
    for j in range(3):
        bound = solution.info["error_bound"][j]
        assert isinstance(bound, ErrorBound)
        assert energy_error(A.matrix, solution.value[:, j], exact[:, j]) <= bound.value
    assert solution.info["error_bound"][1].value == 0
    early = solve(A, B[:, 0], CG(max_steps=3, error_bound=0.02), throw=False)
    assert early.status is SolveStatus.max_steps
    error = energy_error(A.matrix, early.value, exact[:, 0])
    assert error <= early.info["error_bound"][0].value < 50 * error
    none = solve(A, B[:, 0], CG(max_steps=0, error_bound=0.02), throw=False)
    assert energy_error(A.matrix, none.value, exact[:, 0]) <= none.info["error_bound"][0].value
    started = solve(A, B[:, 0], CG(rtol=1e-4, error_bound=0.02), x0=exact[:, 0] + 1e-3 * random(n))
    error = energy_error(A.matrix, started.value, exact[:, 0])
    assert error <= started.info["error_bound"][0].value
    assert math.isnan(started.info["error_bound"][0].relative)


def test_at_the_limit_of_float32() -> None:
    M = with_spectrum(torch.logspace(-5, 0, n, dtype=F64))
    A = Dense(M.float(), tags={"positive_definite"})
    solution = solve(A, random(n).float(), CG(rtol=1e-9, error_bound=5e-6))
    assert solution.status is SolveStatus.precision
    exact = solution_of(A.matrix, random(n).float())
    error = energy_error(A.matrix.double(), solution.value, exact)
    assert error <= solution.info["error_bound"][0].value


def test_false_bound_is_found_out() -> None:
    A = Dense(definite(n, condition=50), tags={"positive_definite"})
    with pytest.raises(ArgumentError, match=r"error_bound is 0.5, but the operator has an eigen"):
        solve(A, random(n), CG(rtol=1e-8, error_bound=0.5))
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ArgumentError, match="error_bound is"):
            CG(error_bound=wrong)
    with pytest.raises(ArgumentError, match="smallest is 0"):
        energy_history([1.0], [1.0], smallest=0)
    with pytest.raises(ArgumentError, match="no steps"):
        energy_history([], [], smallest=1)


def test_the_iteration_is_the_same_with_bounds() -> None:
    A, b = Dense(definite(n), tags={"positive_definite"}), random(n, 2)
    plain, bounded = solve(A, b, CG()), solve(A, b, CG(error_bound=True))
    assert torch.equal(plain.value, bounded.value)
    assert plain.products == bounded.products


# --------------------------------------------------------------- other systems


def _dominant() -> Tensor:
    return 3 * torch.eye(n, dtype=F64) + random(n, n) / n


@pytest.mark.parametrize(
    ("make", "exact"),
    [
        (lambda: LowRank(random(n, 3)) + 0.5 * Identity(n, dtype=F64), True),
        (lambda: Diagonal(torch.linspace(0.5, 3, n, dtype=F64)), True),
        (lambda: 2.0 * Diagonal(torch.linspace(0.5, 3, n, dtype=F64)), True),
        (lambda: BlockDiagonal([Diagonal(torch.full((9,), 2.0)), Diagonal(torch.ones(4))]), True),
        (lambda: function(definite(n), {"positive_semidefinite"}) + Identity(n), False),
        (lambda: Dense(3 * torch.eye(n, dtype=F64) + definite(n) / 10, tags={"hermitian"}), False),
    ],
)
def test_smallest_eigenvalues_that_structure_proves(make, exact: bool) -> None:
    A = make()
    least = float(torch.linalg.eigvalsh(A.to_dense()).min())
    bound = smallest_eigenvalue_bound(A)
    assert bound is not None
    assert 0.1 * least <= bound <= least * (1 + 1e-6)
    if exact:
        assert bound == pytest.approx(least, rel=1e-5)


def test_smallest_eigenvalues_that_it_does_not() -> None:
    for A in (
        Dense(definite(n), tags={"positive_definite"}),
        function(definite(n), {"positive_definite"}),
        Diagonal(torch.linspace(-1, 1, n)),
        Dense(_dominant()),
        Kronecker(Dense(definite(3)), Dense(definite(2))),
        -1 * Identity(n),
        Dense(torch.zeros(0, 0)),
    ):
        assert smallest_eigenvalue_bound(A) is None


def test_smallest_singular_value_of_dominant_matrices() -> None:
    for M in (_dominant(), _dominant().to(torch.complex128) * 1j):
        sigma = float(torch.linalg.svdvals(M).min())
        bound = smallest_singular_value_bound(Dense(M))
        assert 0.3 * sigma <= bound <= sigma
        sparse = smallest_singular_value_bound(Sparse(M.to_sparse()))
        assert sparse == pytest.approx(bound)
    assert smallest_singular_value_bound(Dense(random(n, n))) is None
    assert smallest_singular_value_bound(Identity(n)) == 1


@pytest.mark.parametrize("columns", [None, 3])
def test_residuals_bound_errors(columns: int | None) -> None:
    M = _dominant()
    A = Dense(M)
    b = random(n) if columns is None else random(n, columns)
    exact = solution_of(M, b).reshape(n, -1)
    sloppy = solve(A, b, LU())
    bounds = error_bound(A, b, sloppy)
    for j, bound in enumerate(bounds):
        error = float((sloppy.value.reshape(n, -1)[:, j] - exact[:, j]).norm())
        assert error <= bound.value + 1e-14
        assert bound.guarantee is Guarantee.bound
        assert bound.products == 0


def test_residuals_estimate_errors() -> None:
    definite_one = function(definite(n, condition=20), {"positive_definite"})
    indefinite = function(with_spectrum(torch.linspace(-1, 2, n, dtype=F64)), {"hermitian"})
    general = function(_dominant(), set())
    for A, recipe in ((definite_one, CG(rtol=1e-3)), (indefinite, Eigh()), (general, LU())):
        b = random(n)
        M = A.to_dense()
        solution = solve(A, b, recipe)
        bound = error_bound(A, b, solution, steps=40)[0]
        assert bound.guarantee is Guarantee.estimate
        assert bound.products == (40 if A is definite_one else 80)
        sigma = float(torch.linalg.svdvals(M).min())
        assert bound.smallest >= sigma * (1 - 1e-8)  # from inside the spectrum
        given = error_bound(A, b, solution, smallest=0.99 * sigma)[0]
        error = float((solution.value - solution_of(M, b)).norm())
        assert error <= given.value + 1e-13
        assert given.guarantee is Guarantee.bound


def test_what_cannot_be_bounded() -> None:
    A, b = Dense(definite(n)), random(n)
    solution = solve(A, b)
    with pytest.raises(ArgumentError, match="smallest is -1"):
        error_bound(A, b, solution, smallest=-1)
    with pytest.raises(ArgumentError, match="steps is 0"):
        error_bound(A, b, solution, steps=0)
    with pytest.raises(ShapeError, match="square"):
        error_bound(Dense(random(n, 3)), b, solution)
    with pytest.raises(ShapeError, match="right-hand side|b has shape"):
        error_bound(A, random(n, 2), solution)
