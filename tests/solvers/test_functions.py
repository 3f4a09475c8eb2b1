"""Functions of matrices against SciPy's dense ones in float64."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from tests.solvers.systems import definite, error_of, function, random, wide, with_spectrum

from woodbury import Dense, Diagonal, FunctionOperator, Identity
from woodbury.errors import (
    ArgumentError,
    DtypeError,
    FunctionError,
    GradientError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    SingularError,
    TagError,
)
from woodbury.solvers import matrix_function

F64 = torch.float64
n = 40
REFERENCE = {
    "sqrt": scipy.linalg.sqrtm,
    "inverse_sqrt": lambda M: scipy.linalg.inv(scipy.linalg.sqrtm(M)),
    "log": scipy.linalg.logm,
    "exp": scipy.linalg.expm,
}


def exact(name: str, M: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(REFERENCE[name](wide(M).numpy())).to(wide(b).dtype) @ wide(b)


@pytest.mark.parametrize("dtype", [F64, torch.complex128, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(n,), (n, 1), (n, 3)])
@pytest.mark.parametrize("name", REFERENCE)
def test_against_dense_functions(name: str, shape, dtype: torch.dtype) -> None:
    M = definite(n, condition=100, dtype=dtype)
    A, b = function(M, {"hermitian"}), random(*shape, dtype=dtype)
    rtol = 1e-4 if dtype == torch.float32 else 1e-11
    found = matrix_function(A, name, b, rtol=rtol)
    assert found.converged
    assert found.value.dtype == dtype
    assert found.value.shape == b.shape
    assert found.error.shape == b.shape[1:]
    assert error_of(found.value, exact(name, M, b)) < (1e-5 if dtype == torch.float32 else 1e-10)
    assert found.products == found.steps * (1 if len(shape) == 1 else shape[1])
    assert 0.0099 <= found.spectrum[0] <= found.spectrum[1] <= 1.001


def test_the_estimate_is_near_the_error() -> None:
    M = definite(200, condition=1e4)
    A, b = function(M, {"hermitian"}), random(200)
    reference = exact("inverse_sqrt", M, b)
    for steps in (20, 40, 60, 80):
        found = matrix_function(A, "inverse_sqrt", b, steps=steps, throw=False)
        assert not found.converged
        true = error_of(found.value, reference)
        assert 0.5 * true < float(found.error) < 20 * true


def test_stops_when_it_is_good_enough() -> None:
    M = definite(200, condition=1e4)
    A, b = function(M, {"hermitian"}), random(200)
    loose, tight = (matrix_function(A, "sqrt", b, rtol=rtol) for rtol in (1e-3, 1e-9))
    assert loose.steps < tight.steps < 200
    for found, rtol in ((loose, 1e-3), (tight, 1e-9)):
        assert error_of(found.value, exact("sqrt", M, b)) < rtol


def test_polynomials_are_exact() -> None:
    M = definite(n)
    b = random(n, 2)
    found = matrix_function(Dense(M, tags={"hermitian"}), lambda t: t**3 - t, b, steps=10)
    assert found.steps == 10
    assert error_of(found.value, M @ (M @ (M @ b)) - M @ b) < 1e-13
    identity = matrix_function(Dense(M, tags={"hermitian"}), torch.ones_like, b)
    assert error_of(identity.value, b) < 1e-14


def test_root_of_the_root_and_logarithm_of_the_exponential() -> None:
    A = Dense(definite(n), tags={"positive_definite"})
    b = random(n)
    root = matrix_function(A, "sqrt", matrix_function(A, "sqrt", b).value).value
    assert error_of(root, A @ b) < 1e-8
    there = matrix_function(A, "inverse_sqrt", matrix_function(A, "sqrt", b).value).value
    assert error_of(there, b) < 1e-8


def test_few_eigenvalues_exhaust_the_space() -> None:
    spectrum = torch.tensor([1.0, 2.0, 5.0], dtype=F64).repeat_interleave(10)
    M = with_spectrum(spectrum)
    b = random(30, 2)
    found = matrix_function(function(M, {"hermitian"}), "log", b, rtol=0.0)
    assert found.converged
    assert found.steps <= 5
    assert torch.equal(found.error, torch.zeros(2, dtype=F64))
    assert error_of(found.value, exact("log", M, b)) < 1e-11
    eigenvector = torch.eye(3, dtype=F64)[:, 1]
    A = Diagonal(torch.tensor([1.0, 4.0, 9.0], dtype=F64), tags={"positive_definite"})
    assert torch.allclose(matrix_function(A, "sqrt", eigenvector).value, 2 * eigenvector)


def test_edges() -> None:
    A = 4.0 * Identity(n, dtype=F64)
    b = random(n, 3)
    b[:, 1] = 0
    found = matrix_function(A, "inverse_sqrt", b)
    assert torch.allclose(found.value, b / 2)
    nothing = matrix_function(A, "log", torch.zeros(n, dtype=F64))
    assert (nothing.products, nothing.converged) == (0, True)
    assert torch.equal(nothing.value, torch.zeros(n, dtype=F64))
    one = matrix_function(Dense(torch.tensor([[9.0]]), tags={"hermitian"}), "sqrt", torch.ones(1))
    assert one.value.item() == 3
    semidefinite = Dense(with_spectrum(torch.linspace(0, 1, n, dtype=F64)), tags={"hermitian"})
    root = matrix_function(semidefinite, "sqrt", random(n), rtol=1e-6)
    twice = matrix_function(semidefinite, "sqrt", root.value, rtol=1e-6).value
    assert error_of(twice, semidefinite @ random(n)) < 1e-5


@pytest.mark.parametrize("name", ["sqrt", "log", "inverse_sqrt"])
def test_spectrum_outside_the_domain(name: str) -> None:
    A = Dense(with_spectrum(torch.linspace(-0.5, 1, n, dtype=F64)), tags={"hermitian"})
    with pytest.raises(NotPositiveDefiniteError, match=r"eigenvalue of at most -0\.\d+.*damping"):
        matrix_function(A, name, random(n))
    assert matrix_function(A, "exp", random(n)).converged


def test_singular_and_not_finite() -> None:
    A = Dense(
        with_spectrum(torch.cat([torch.zeros(1), torch.linspace(1, 2, 9)]).double()),
        tags={"hermitian"},
    )
    for name in ("log", "inverse_sqrt"):
        with pytest.raises(SingularError, match="zero to rounding"):
            matrix_function(A, name, random(10))
    with pytest.raises(NonFiniteError, match="f is not finite at the Ritz value"):
        matrix_function(A, lambda t: torch.where(t > 1.5, math.nan, t), random(10))
    b = random(10)
    b[2] = math.inf
    with pytest.raises(NonFiniteError, match="1 of 10 entries of b"):
        matrix_function(A, "exp", b)
    broken = FunctionOperator(lambda X: X * math.nan, (5, 5), tags={"hermitian"}, dtype=F64)
    with pytest.raises(NonFiniteError):
        matrix_function(broken, "exp", random(5))


def test_limit_of_steps() -> None:
    A = function(definite(200, condition=1e6), {"hermitian"})
    with pytest.raises(FunctionError, match=r"10 Lanczos steps leave.*raise steps") as caught:
        matrix_function(A, "inverse_sqrt", random(200), steps=10)
    assert caught.value.result.steps == 10
    assert not caught.value.result.converged


def test_bad_input() -> None:
    A = Dense(definite(n), tags={"hermitian"})
    with pytest.raises(ArgumentError, match="f is 'root'"):
        matrix_function(A, "root", random(n))
    with pytest.raises(ArgumentError, match="steps is 0"):
        matrix_function(A, "exp", random(n), steps=0)
    with pytest.raises(ArgumentError, match="rtol is -1"):
        matrix_function(A, "exp", random(n), rtol=-1)
    with pytest.raises(ArgumentError, match="elementwise"):
        matrix_function(A, lambda t: t.sum(), random(n))
    with pytest.raises(TagError, match="'hermitian'"):
        matrix_function(Dense(definite(n)), "exp", random(n))
    with pytest.raises(ShapeError):
        matrix_function(A, "exp", random(n + 1))
    with pytest.raises(DtypeError):
        matrix_function(A, "exp", random(n).float())


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_gradients_with_respect_to_b(dtype: torch.dtype) -> None:
    A = Dense(definite(6, condition=10, dtype=dtype), tags={"hermitian"})
    b = random(6, 2, dtype=dtype).requires_grad_()

    def value(b: torch.Tensor) -> torch.Tensor:
        return matrix_function(A, "log", b, rtol=1e-12).value

    assert torch.autograd.gradcheck(value, (b,))
    assert torch.autograd.gradgradcheck(lambda b: value(b) * value(b).conj(), (b,))


def test_transforms_and_batches() -> None:
    A = Dense(definite(6, condition=10), tags={"hermitian"})
    B = random(3, 6)

    def value(b: torch.Tensor) -> torch.Tensor:
        return matrix_function(A, "sqrt", b, rtol=1e-12).value

    each = torch.stack([value(b) for b in B])
    assert error_of(torch.func.vmap(value)(B), each) < 1e-12
    J = torch.func.jacrev(value)(B[0])
    assert error_of(J @ B[1], each[1]) < 1e-10


def test_gradient_with_respect_to_the_operator_is_refused() -> None:
    t = definite(n).requires_grad_()
    for A in (Dense(t, tags={"hermitian"}), function(t, {"hermitian"})):
        with pytest.raises(GradientError, match="none with respect to the operator"):
            matrix_function(A, "exp", random(n))
        with torch.no_grad():
            assert matrix_function(A, "exp", random(n)).converged
