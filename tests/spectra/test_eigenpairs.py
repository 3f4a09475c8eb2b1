from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from tests.solvers.systems import definite, function, random
from tests.spectra.problems import DTYPES, F64, hidden, seeded

from woodbury import Dense, Diagonal, Identity
from woodbury.errors import (
    ArgumentError,
    EigenError,
    NonFiniteError,
    RankError,
    ShapeError,
    SingularError,
    TagError,
)
from woodbury.operators import FunctionOperator
from woodbury.spectra import (
    LOBPCG,
    EigenMethod,
    EigenStatus,
    ThickRestartLanczos,
    condition_number,
    eigenpairs,
)

N = 200
SPECTRA = {
    "gaps": torch.cat(
        [torch.tensor([-3.0, -2.5]), torch.linspace(0, 1, N - 5), torch.tensor([2.0, 4.0, 5.0])]
    ),
    "multiple": torch.cat([torch.linspace(0, 1, N - 5), torch.full((5,), 3.0)]),
    "low rank": torch.cat([torch.zeros(N - 4), torch.arange(1.0, 5.0)]),
    "constant": torch.full((N,), 2.0),
    "zero": torch.zeros(N),
}


def wanted(values: torch.Tensor, k: int, which: str) -> torch.Tensor:
    if which == "largest":
        return values.flip(0)[:k]
    if which == "magnitude":
        return values[values.abs().argsort(descending=True, stable=True)[:k]]
    if which == "both":
        low = (k + 1) // 2
        return torch.cat([values[:low], values[len(values) - (k - low) :]])
    return values[:k]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(
    ("which", "method"),
    [
        *[(which, ThickRestartLanczos(1e-6)) for which in ("largest", "smallest", "magnitude")],
        ("both", ThickRestartLanczos(1e-6)),
        ("largest", LOBPCG(1e-6)),
    ],
    ids=repr,
)
def test_against_lapack(name: str, which: str, method: EigenMethod, dtype: torch.dtype) -> None:
    A, M = hidden(SPECTRA[name].to(F64), dtype=dtype)
    k = 4
    found = eigenpairs(A, k, which, method, generator=seeded(1))
    exact = torch.from_numpy(scipy.linalg.eigvalsh(M.numpy()))
    single = torch.finfo(dtype).eps > 1e-10
    expected = wanted(exact, k, which)
    if which != "magnitude" or name == "gaps":
        assert torch.allclose(found.values, expected, atol=1e-4 if single else 1e-9)
    assert torch.allclose(found.values.abs(), expected.abs(), atol=1e-4 if single else 1e-9)
    assert found.status in (EigenStatus.converged, EigenStatus.precision)
    assert found.ok
    X = found.vectors.to(M.dtype)
    assert torch.allclose(X.mH @ X, torch.eye(k).to(M), atol=1e-4 if single else 1e-10)
    true = torch.linalg.vector_norm(M @ X - X * found.values, dim=0)
    assert torch.allclose(true, found.residuals, atol=2e-5 if single else 1e-13)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert (exact - value).abs().min() <= residual + 1e-5 * single + 1e-12


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_lobpcg_smallest_with_a_preconditioner(which: str) -> None:
    """The steps do not depend on how small the eigenvalues are."""
    steps = []
    for decades in (2, 4, 6):
        spectrum = torch.logspace(-decades, 0, 300, dtype=F64)
        A, M = hidden(spectrum, tags=("positive_definite",))
        P = Dense(torch.linalg.inv(M + 0.3 * spectrum[0] * torch.eye(300, dtype=F64)))
        P = function(P.matrix, {"positive_definite"})
        if which == "largest":
            A, spectrum = function(-M, {"hermitian"}), -spectrum
        found = eigenpairs(A, 3, which, LOBPCG(1e-7, preconditioner=P))
        assert found.status is EigenStatus.converged
        assert torch.allclose(found.values, spectrum[:3], rtol=1e-9)
        steps.append(found.steps)
    assert max(steps) < 60
    plain = eigenpairs(hidden(spectrum.abs())[0], 3, "smallest", LOBPCG(1e-7), throw=False)
    assert plain.steps > 3 * max(steps)


def test_multiple_eigenvalues_need_the_second_look() -> None:
    A, _ = hidden(SPECTRA["multiple"].to(F64))
    sure = eigenpairs(A, 5, method=ThickRestartLanczos())
    assert torch.allclose(sure.values, torch.full((5,), 3.0, dtype=F64))
    # Without it, the start vector shows one vector of the eigenspace, until rounding helps.
    quick = eigenpairs(A, 1, method=ThickRestartLanczos(verify=False))
    assert quick.products < eigenpairs(A, 1).products
    assert float(quick.values[0]) == pytest.approx(3)


def test_small_operators_are_formed() -> None:
    M = random(6, 6)
    M = M + M.T
    exact = torch.linalg.eigvalsh(M)
    for which in ("largest", "smallest", "magnitude", "both"):
        for k in (1, 3, 6):
            found = eigenpairs(function(M, {"hermitian"}), k, which, LOBPCG())
            assert torch.allclose(found.values, wanted(exact, k, which))
            assert found.products == 6 + k
    one = eigenpairs(Diagonal(torch.tensor([-2.0])), 1)
    assert (one.values.item(), one.status) == (-2.0, EigenStatus.converged)


def test_budget() -> None:
    A, _ = hidden(torch.logspace(-8, 0, N, dtype=F64))
    for method in (ThickRestartLanczos(max_products=50), LOBPCG(max_products=50)):
        with pytest.raises(
            EigenError, match=r"max_products in . of 2 pairs .* raise max_prod"
        ) as e:
            eigenpairs(A, 2, "smallest", method)
        partial = e.value.eigenpairs
        assert partial.status is EigenStatus.max_products
        assert not partial.ok
        assert partial.products <= 62
        assert partial.certificate()["failed_pairs"] >= 1
        same = eigenpairs(A, 2, "smallest", method, throw=False)
        assert torch.equal(same.values, partial.values)
    first = eigenpairs(A, 1, method=ThickRestartLanczos(max_products=1), throw=False)
    assert first.products == 2


def test_precision_is_a_status_of_its_own() -> None:
    A, _ = hidden(torch.linspace(0, 1, N, dtype=F64))  # no digits of the eigenvalue 0 are known
    found = eigenpairs(A, 1, "smallest")
    assert found.status is EigenStatus.precision
    assert found.residuals[0] < 1e-13
    assert eigenpairs(A, 1, "largest").status is EigenStatus.converged


def test_stagnation() -> None:
    _A, M = hidden(torch.linspace(1, 2, N, dtype=F64))
    noise = random(N, N, seed=7) * 1e-4

    def noisy(X: torch.Tensor) -> torch.Tensor:
        return M @ X + noise @ X.sign()

    B = FunctionOperator(noisy, (N, N), dtype=F64, tags={"hermitian"})
    found = eigenpairs(B, 1, "largest", LOBPCG(), throw=False)
    assert found.status is EigenStatus.stagnation


def test_weights_of_zero_products() -> None:
    for method in (ThickRestartLanczos, LOBPCG):
        with pytest.raises(ArgumentError, match="max_products is 0"):
            method(max_products=0)
        with pytest.raises(ArgumentError, match="rtol is -1"):
            method(rtol=-1)
    with pytest.raises(ArgumentError, match="basis is 2"):
        ThickRestartLanczos(basis=2)
    with pytest.raises(ArgumentError, match="guard is -1"):
        LOBPCG(guard=-1)
    with pytest.raises(TagError, match="'positive_definite'"):
        LOBPCG(preconditioner=Diagonal(torch.ones(3)))


def test_what_is_refused() -> None:
    A, M = hidden(SPECTRA["gaps"].to(F64))
    with pytest.raises(TagError, match="'hermitian'"):
        eigenpairs(function(M, set()))
    with pytest.raises(ShapeError, match="square"):
        eigenpairs(Dense(random(3, 4)))
    for k in (0, N + 1):
        with pytest.raises(RankError, match=f"k is {k}"):
            eigenpairs(A, k)
    with pytest.raises(ArgumentError, match="which is 'top'"):
        eigenpairs(A, 1, "top")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="LOBPCG takes 'largest' or 'smallest'"):
        eigenpairs(A, 1, "both", LOBPCG())
    with pytest.raises(ArgumentError, match="basis is 5 for 4 pairs"):
        eigenpairs(A, 4, method=ThickRestartLanczos(basis=5))
    wrong = Identity(3, dtype=F64)
    with pytest.raises(ShapeError, match="preconditioner has shape"):
        eigenpairs(A, 1, "smallest", LOBPCG(preconditioner=wrong))
    for method in (ThickRestartLanczos(), LOBPCG()):
        with pytest.raises(NonFiniteError):
            eigenpairs(function(M * math.inf, {"hermitian"}), 1, method=method)


def test_reproducible() -> None:
    A, _ = hidden(SPECTRA["gaps"].to(F64))
    first, same = (eigenpairs(A, 2, generator=seeded(1)).vectors for _ in range(2))
    assert torch.equal(first, same)
    assert torch.equal(eigenpairs(A, 2).vectors, eigenpairs(A, 2).vectors)


# ---------------------------------------------------------------- condition numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_condition_number(dtype: torch.dtype) -> None:
    A, M = hidden(torch.linspace(1, 30, N, dtype=F64), dtype=dtype, tags=("positive_definite",))
    found = condition_number(A)
    assert float(found.value) == pytest.approx(30, rel=1e-4 if dtype.itemsize == 4 else 1e-3)
    assert float(found.standard_error) == 0
    low, high = found.interval()
    assert low - 1e-3 <= 30 <= high + 1e-3
    general = function((2 - 1j if dtype.is_complex else -2) * M.to(dtype), set())
    assert float(condition_number(general).value) == pytest.approx(30, rel=1e-2)


def test_condition_number_of_rectangles_inverses_and_structure() -> None:
    M = random(150, 120)
    truth = torch.linalg.cond(M)
    found = condition_number(function(M, set()))
    assert float(found.value) == pytest.approx(float(truth), rel=1e-6)
    D = definite(300, condition=1e8)
    A = function(D, {"positive_definite"})
    inverse = function(torch.linalg.inv(D), {"positive_definite"})
    helped = condition_number(A, inverse=inverse)
    assert float(helped.value) == pytest.approx(1e8, rel=1e-6)
    assert helped.products < 200
    S = random(130, 130)
    helped = condition_number(function(S, set()), inverse=function(torch.linalg.inv(S), set()))
    assert float(helped.value) == pytest.approx(float(torch.linalg.cond(S)), rel=1e-6)
    Q, _ = torch.linalg.qr(random(9, 9))
    assert condition_number(Dense(Q, tags={"unitary"})).products == 0
    assert float(condition_number(Identity(200, dtype=F64)).value) == pytest.approx(1)


def test_condition_number_refuses() -> None:
    with pytest.raises(ShapeError, match="as many rows"):
        condition_number(function(random(3, 4), set()))
    with pytest.raises(ShapeError, match="the inverse has shape"):
        condition_number(function(random(4, 4), set()), inverse=Identity(3, dtype=F64))
    singular, _ = hidden(SPECTRA["low rank"].to(F64), tags=("positive_semidefinite",))
    with pytest.raises(SingularError, match="add damping"):
        condition_number(singular)
    slow, _ = hidden(torch.logspace(-9, 0, N, dtype=F64), tags=("positive_definite",))
    with pytest.raises(EigenError, match="max_products"):
        condition_number(slow, ThickRestartLanczos(max_products=60))
