"""What all stationary and polynomial recipes do, against the series formed in dense matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import pytest
import scipy.sparse
import torch
from tests.conformance import OperatorConformance
from tests.solvers.systems import (
    DTYPES,
    N,
    definite,
    error_of,
    eye,
    function,
    random,
    residual_of,
    solution_of,
    wide,
    with_spectrum,
)

from woodbury import (
    CG,
    SOR,
    SSOR,
    BlockJacobi,
    Chebyshev,
    Dense,
    Diagonal,
    GaussSeidel,
    Identity,
    IncompleteCholesky,
    IncompleteLU,
    Jacobi,
    LinearOperator,
    Richardson,
    Sparse,
    inverse,
    solve,
)
from woodbury.errors import (
    ArgumentError,
    NonFiniteError,
    ShapeError,
    SingularError,
    SolveError,
    TagError,
)
from woodbury.solvers import Recipe, SolveStatus

F64 = torch.float64
Make = Callable[..., Recipe]

MAKE: dict[str, Make] = {
    "richardson": Richardson,
    "richardson-jacobi": lambda **kw: Richardson(preconditioner=Jacobi(), **kw),
    "jacobi": lambda **kw: Jacobi(omega=0.6, **kw),
    "block-jacobi": lambda **kw: BlockJacobi(size=5, **kw),
    "gauss-seidel": GaussSeidel,
    "gauss-seidel-backward": lambda **kw: GaussSeidel(sweep="backward", **kw),
    "gauss-seidel-symmetric": lambda **kw: GaussSeidel(sweep="symmetric", **kw),
    "sor": lambda **kw: SOR(omega=1.2, **kw),
    "sor-backward": lambda **kw: SOR(omega=0.9, sweep="backward", **kw),
    "ssor": lambda **kw: SSOR(omega=1.3, **kw),
    "chebyshev": Chebyshev,
    "chebyshev-ssor": lambda **kw: Chebyshev(preconditioner=SSOR(), **kw),
    "incomplete-lu": lambda **kw: IncompleteLU(drop=0.1, **kw),
    "incomplete-cholesky": lambda **kw: IncompleteCholesky(drop=None, **kw),
    "incomplete-cholesky-threshold": lambda **kw: IncompleteCholesky(drop=0.1, **kw),
}
POLYNOMIAL = {"chebyshev", "chebyshev-ssor"}


def laplacian(n: int = N, dtype: torch.dtype = F64) -> torch.Tensor:
    """Diagonally dominant, with off-diagonals that are complex where the dtype is."""
    off = torch.full((n - 1,), -1.0, dtype=dtype)
    if dtype.is_complex:
        off = off * torch.tensor(0.6 + 0.8j, dtype=dtype)
    M = torch.diag(torch.linspace(2.1, 3.0, n).to(dtype))
    return M + torch.diag(off, 1) + torch.diag(off.conj(), -1)


def operators(M: torch.Tensor) -> dict[str, LinearOperator]:
    tags = {"positive_definite"}
    sparse = scipy.sparse.csr_array(M.numpy())
    return {
        "dense": Dense(M, tags=tags),
        "sparse": Sparse(sparse, tags=tags),
        "function": function(M, tags),
    }


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "sparse", "function"])
@pytest.mark.parametrize("name", MAKE)
def test_every_kind_and_dtype_converges(name: str, kind: str, dtype: torch.dtype) -> None:
    M = laplacian(dtype=dtype)
    A = operators(M)[kind]
    rtol = 1e-9 if dtype in (F64, torch.complex128) else 1e-4
    for shape in [(N,), (N, 1), (N, 4)]:
        b = random(*shape, dtype=dtype)
        solution = solve(A, b, MAKE[name](rtol=rtol))
        assert solution.status is SolveStatus.converged
        assert solution.value.dtype == dtype
        assert solution.value.shape == b.shape
        assert (residual_of(M, solution.value, b) <= 1.01 * rtol).all()
        assert torch.allclose(
            solution.residual, residual_of(M, solution.value, b), rtol=0.05, atol=rtol / 10
        )
        assert error_of(solution.value, solution_of(M, b)) < 60 * rtol


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
@pytest.mark.parametrize("name", [name for name in MAKE if name not in POLYNOMIAL])
def test_iterates_are_the_partial_sums_of_the_series(
    name: str, dtype: torch.dtype, steps: int
) -> None:
    M, B = definite(dtype=dtype) + eye().to(dtype), random(N, 2, dtype=dtype)
    if name == "incomplete-cholesky":  # complete for a full matrix
        M[N // 2 :, : N // 4] = M[: N // 4, N // 2 :] = 0.0
    A = Dense(M, tags={"positive_definite"})
    recipe = MAKE[name](rtol=0.0, max_steps=steps)
    step = recipe.as_preconditioner(A, recipe.prepare(A)).to_dense()
    G, total, power = eye().to(dtype) - step @ M, torch.zeros_like(B), step @ B
    for _ in range(steps):
        total, power = total + power, G @ power
    solution = solve(A, B, recipe, throw=False)
    assert error_of(solution.value, total) < 1e-12 if steps else not solution.value.any()
    assert solution.status is SolveStatus.max_steps
    assert solution.steps == steps
    assert solution.info["column_steps"] == [steps] * 2


@pytest.mark.parametrize("name", MAKE)
def test_as_preconditioner_it_is_so_many_steps_from_zero(name: str) -> None:
    M, B = laplacian(), random(N, 3)
    for kind, A in operators(M).items():
        for count in (1, 2, 3):
            extra = {"degree": count - 1} if name in POLYNOMIAL else {"sweeps": count}
            recipe = MAKE[name](rtol=0.0, max_steps=count, **extra)
            step = recipe.as_preconditioner(A, recipe.prepare(A))
            if name not in POLYNOMIAL:  # they have bounds of their own for that
                solution = solve(A, B, recipe, throw=False)
                assert error_of(step @ B, solution.value) < 1e-12, (kind, count)
            dense = step.to_dense()
            assert error_of(step.rmatmat(B), dense.mH @ B) < 1e-12
            if "hermitian" in step.tags:
                assert error_of(dense, dense.mH) < 1e-12
            if "positive_definite" in step.tags:
                assert torch.linalg.eigvalsh((dense + dense.mH) / 2)[0] > 0


HERMITIAN = {
    "richardson",
    "richardson-jacobi",
    "jacobi",
    "block-jacobi",
    "gauss-seidel-symmetric",
    "ssor",
    "chebyshev",
    "chebyshev-ssor",
    "incomplete-cholesky",
    "incomplete-cholesky-threshold",
}


@pytest.mark.parametrize("kind", ["dense", "sparse", "function"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_preconditions_conjugate_gradients_where_it_is_hermitian(
    name: str, dtype: torch.dtype, kind: str
) -> None:
    M = laplacian(dtype=dtype)
    A, B = operators(M)[kind], random(N, 3, dtype=dtype)
    rtol = 1e-9 if dtype in (F64, torch.complex128) else 1e-4
    recipe = CG(rtol=rtol, preconditioner=MAKE[name]())
    if name not in HERMITIAN:
        with pytest.raises(TagError, match="hermitian positive definite"):
            solve(A, B, recipe)
        return
    solution = solve(A, B, recipe)
    assert (residual_of(M, solution.value, B) <= 1.01 * rtol).all()


@pytest.mark.parametrize("name", MAKE)
def test_gradient_and_transposed_solve(name: str) -> None:
    M = laplacian()
    M[0, 1] = -0.3  # not symmetric: the backward pass needs the transpose
    if name in HERMITIAN - {"jacobi", "block-jacobi"}:
        M = laplacian()
        A = Sparse(scipy.sparse.csr_array(M.numpy()), tags={"positive_definite"})
    else:
        A = Sparse(scipy.sparse.csr_array(M.numpy()))
    b = random(N).requires_grad_(True)
    c = random(N, seed=5)
    solution = solve(A, b, MAKE[name](rtol=1e-12, max_steps=1000))
    (gradient,) = torch.autograd.grad(solution.value @ c, b)
    assert error_of(gradient, solution_of(M.T, c)) < 1e-9
    adjoint = inverse(A, MAKE[name](rtol=1e-12, max_steps=1000)).rmatmat(c)
    assert error_of(adjoint, solution_of(M.T, c)) < 1e-9


@pytest.mark.parametrize("name", MAKE)
def test_gradient_with_respect_to_the_operator(name: str) -> None:
    M, b, c = laplacian().requires_grad_(True), random(N), random(N, seed=5)
    value = solve(
        Dense(M, tags={"positive_definite"}), b, MAKE[name](rtol=1e-12, max_steps=2000)
    ).value
    (gradient,) = torch.autograd.grad(value @ c, M)
    exact = -torch.outer(solution_of(M.detach(), c), solution_of(M.detach(), b))
    assert error_of(gradient, exact) < 1e-8
    A = Dense(M.detach(), tags={"positive_definite"})
    recipe = MAKE[name](rtol=1e-10, max_steps=2000)
    many = torch.func.vmap(lambda v: solve(A, v, recipe).value)(random(3, N))
    assert error_of(many.T, solution_of(M, random(3, N).T.contiguous())) < 1e-8


# ------------------------------------------------------------------ edge cases


@pytest.mark.parametrize("name", MAKE)
def test_multiple_of_the_identity(name: str) -> None:
    b = random(N)
    solution = solve(2.0 * Identity(N, dtype=F64), b, MAKE[name](rtol=1e-10))
    assert torch.allclose(solution.value, b / 2, rtol=1e-9)
    slow = {"jacobi", "sor", "sor-backward", "ssor"}  # omega is not 1
    assert solution.steps == 1 or name in slow


@pytest.mark.parametrize("name", MAKE)
def test_diagonal_with_far_apart_entries(name: str) -> None:
    values = torch.tensor([1e-3, 0.1, 1.0, 10.0, 1.0], dtype=F64)
    A = Diagonal(values, tags={"positive_definite"})
    b = random(5)
    solution = solve(A, b, MAKE[name](rtol=1e-6, max_steps=300_000))
    assert solution.ok
    assert error_of(solution.value, b / values) < 1e-2


@pytest.mark.parametrize("name", MAKE)
def test_zero_right_hand_side_and_exact_start(name: str) -> None:
    M = laplacian()
    A = operators(M)["sparse"]
    zero = solve(A, torch.zeros(N, dtype=F64), MAKE[name]())
    assert (zero.steps, zero.products, float(zero.residual)) == (0, 0, 0.0)
    assert not zero.value.any()
    x = random(N)
    state = MAKE[name]().prepare(A)
    done = solve(A, M @ x, MAKE[name](rtol=1e-12), x0=x, state=state)
    assert (done.steps, done.products, done.status) == (0, 1, SolveStatus.converged)
    warm = solve(A, M @ x, MAKE[name](rtol=1e-6), x0=x + 1e-4 * random(N, seed=4), state=state)
    assert warm.steps <= solve(A, M @ x, MAKE[name](rtol=1e-6), state=state).steps


@pytest.mark.parametrize("name", MAKE)
def test_one_by_one(name: str) -> None:
    A = Dense(torch.tensor([[4.0]], dtype=F64), tags={"positive_definite"})
    solution = solve(A, torch.tensor([2.0], dtype=F64), MAKE[name](rtol=1e-8, max_steps=100))
    assert solution.value.item() == pytest.approx(0.5, rel=1e-7)


@pytest.mark.parametrize("name", MAKE)
def test_columns_leave_when_they_converge(name: str) -> None:
    M = laplacian()
    A = operators(M)["sparse"]
    easy = torch.linalg.eigh(M).eigenvectors[:, N // 2]
    B = torch.stack([random(N), torch.zeros(N, dtype=F64), easy, 1e-30 * random(N)], 1)
    solution = solve(A, B, MAKE[name](rtol=1e-8))
    assert solution.column_status == (SolveStatus.converged,) * 4
    assert error_of(solution.value, solution_of(M, B)) < 1e-6
    steps = solution.info["column_steps"]
    assert steps[1] == 0
    assert max(steps) == solution.steps
    prepared = solution.state.products
    assert solution.products == sum(steps) + prepared
    alone = [solve(A, b, MAKE[name](rtol=1e-8)).steps for b in B.T.contiguous()]
    assert max(abs(a - s) for a, s in zip(alone, steps, strict=True)) <= 1


@pytest.mark.parametrize("name", MAKE)
def test_no_budget(name: str) -> None:
    A, b = operators(laplacian())["sparse"], random(N)
    solution = solve(A, b, MAKE[name](max_steps=0), throw=False)
    assert solution.status is SolveStatus.max_steps
    assert not solution.value.any()
    assert float(solution.residual) == 1.0
    if "incomplete" not in name:  # their factors are complete for a tridiagonal matrix
        with pytest.raises(SolveError, match="raise max_steps"):
            solve(A, b, MAKE[name](max_steps=1, rtol=1e-14))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", MAKE)
def test_numbers_that_are_none(name: str, bad: float) -> None:
    M = laplacian()
    b = random(N)
    b[3] = bad
    with pytest.raises(NonFiniteError, match="row 3"):
        solve(operators(M)["sparse"], b, MAKE[name]())
    M[5, 5] = bad
    with pytest.raises(NonFiniteError):
        solve(function(M, {"positive_definite"}), random(N), MAKE[name]())
    assert solve(
        function(M, {"positive_definite"}), random(N), MAKE[name](), throw=False
    ).status is (SolveStatus.non_finite)


def test_product_that_turns_infinite_on_the_way() -> None:
    M, calls = laplacian(), []

    def product(X: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return M @ X * (math.inf if len(calls) > 5 else 1.0)

    A = function(M, {"positive_definite"})
    A._forward = product
    b = random(N)
    solution = solve(A, b, Richardson(step=0.3), throw=False)
    assert solution.status is SolveStatus.non_finite
    assert solution.steps == 6
    assert torch.isfinite(solution.value).all()  # the iterate before


@pytest.mark.parametrize("name", [name for name in MAKE if "incomplete" not in name])
def test_indefinite_systems_diverge_and_say_so(name: str) -> None:
    # With a positive diagonal each of them converges only for definite matrices (Ostrowski, Reich).
    M = with_spectrum(torch.linspace(-0.5, 2, N, dtype=F64))
    assert M.diagonal().min() > 0
    A, b = Dense(M, tags={"hermitian"}), random(N)
    solution = solve(A, b, MAKE[name](max_steps=5000), throw=False)
    assert solution.status is SolveStatus.diverged
    assert float(solution.residual) <= 1.0 + 1e-12  # the best iterate, not the last
    assert error_of(residual_of(M, solution.value, b), solution.residual) < 1e-9


def test_first_rise_of_the_weighted_residual_proves_divergence() -> None:
    M, b = laplacian(), random(N)
    top = float(torch.linalg.eigvalsh(M)[-1])
    A = operators(M)["dense"]
    far = solve(A, b, Richardson(step=2.2 / top, max_steps=10_000), throw=False)
    assert far.status is SolveStatus.diverged
    assert far.steps < 60
    near = solve(A, b, Richardson(step=1.99 / top, max_steps=100_000), throw=False)
    assert near.ok
    with pytest.raises(SolveError, match="diverges"):
        solve(A, b, Richardson(step=2.2 / top, max_steps=10_000))


def test_residuals_of_a_nonnormal_matrix_may_grow_before_they_fall() -> None:
    n = 30
    M = torch.eye(n, dtype=F64) - 1.5 * torch.diag(torch.ones(n - 1, dtype=F64), 1)
    b = torch.zeros(n, dtype=F64)
    b[-1] = 1.0
    solution = solve(Dense(M), b, Jacobi(rtol=1e-12), history=True)
    assert solution.history.max() > 1e5  # 1.5^29
    assert solution.steps == n
    assert error_of(solution.value, solution_of(M, b)) < 1e-12


def test_nonsymmetric_divergence() -> None:
    M = torch.tensor([[1.0, 3.0], [-3.0, 1.0]], dtype=F64)
    for recipe in (Jacobi(max_steps=1000), GaussSeidel(max_steps=1000)):
        solution = solve(Dense(M), random(2), recipe, throw=False)
        assert solution.status is SolveStatus.diverged
        assert float(solution.residual) <= 1.0


@pytest.mark.parametrize("name", ["richardson", "chebyshev"])
def test_singular_consistent_and_inconsistent(name: str) -> None:
    spectrum = torch.cat([torch.zeros(4, dtype=F64), torch.linspace(1, 2, N - 4, dtype=F64)])
    M = with_spectrum(spectrum)
    A = function(M, {"positive_semidefinite"})
    consistent = M @ random(N)
    solution = solve(A, consistent, MAKE[name](rtol=1e-8, max_steps=1000))
    assert solution.status is SolveStatus.converged
    smallest = torch.linalg.pinv(M, rtol=1e-10) @ consistent
    assert error_of(solution.value, smallest) < 1e-7  # nothing of the null space enters
    failed = solve(A, random(N), MAKE[name](rtol=1e-8, max_steps=10_000), throw=False)
    assert failed.status is SolveStatus.stagnation
    assert failed.steps < 10_000


@pytest.mark.parametrize("name", ["richardson", "chebyshev", "ssor", "gauss-seidel", "sor"])
def test_tolerance_beyond_rounding(name: str) -> None:
    M = laplacian(dtype=torch.float32)
    solution = solve(operators(M)["sparse"], random(N, dtype=torch.float32), MAKE[name](rtol=0.0))
    assert solution.status is SolveStatus.precision or float(solution.residual) == 0
    assert solution.steps < 10 * N
    assert residual_of(wide(M), solution.value, random(N, dtype=torch.float32)) < 1e-5


def test_zero_rows() -> None:
    M = laplacian()
    M[7], M[:, 7] = 0.0, 0.0
    A, b = Dense(M, tags={"positive_semidefinite"}), random(N)
    for recipe in (Jacobi(), GaussSeidel(), SOR(omega=1.1), SSOR()):
        with pytest.raises(SingularError, match="entry 7 is 0 "):
            solve(A, b, recipe)
        found = solve(A, b, recipe, throw=False)
        assert found.status is SolveStatus.singular
    b[7] = 0.0
    for recipe in (Richardson(), Chebyshev()):
        solution = solve(A, b, recipe)
        assert solution.ok
        assert solution.value[7] == 0


def test_history_and_progress() -> None:
    M, B, seen = laplacian(), random(N, 2), []
    A = operators(M)["sparse"]
    solution = solve(
        A, B, SSOR(rtol=1e-8), history=True, progress=lambda step, size: seen.append((step, size))
    )
    assert solution.history.shape == (solution.steps + 1, 2)
    assert (solution.history[0] == 1).all()
    # Every step computes the true residual, so the last line is the certificate.
    assert torch.allclose(solution.history[-1], solution.residual, rtol=1e-12)
    assert [step for step, _ in seen] == list(range(solution.steps + 1))
    for k in range(0, solution.steps, 7):
        x = solve(A, B, SSOR(rtol=1e-8, max_steps=k), throw=False).value
        assert torch.allclose(residual_of(M, x, B), solution.history[k], rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("name", MAKE)
def test_scale_of_the_operator_does_not_matter(name: str, scale: float) -> None:
    M, b = laplacian(), random(N)
    tags = {"positive_definite"}
    plain = solve(Dense(M, tags=tags), b, MAKE[name](rtol=1e-8))
    scaled = solve(Dense(scale * M, tags=tags), b, MAKE[name](rtol=1e-8))
    assert scaled.steps == plain.steps
    assert error_of(scale * scaled.value, plain.value) < 1e-6


def test_bad_arguments() -> None:
    for make, words in (
        (lambda: Jacobi(omega=0.0), "omega is 0.0"),
        (lambda: Jacobi(sweeps=0), "sweeps is 0"),
        (lambda: Jacobi(rtol=-1.0), "rtol is -1.0"),
        (lambda: SOR(omega=2.0), "0 < omega < 2"),
        (lambda: SSOR(omega=-0.1), "0 < omega < 2"),
        (lambda: SOR(omega=1.0, sweep="symmetric"), "sweep is 'symmetric'"),
        (lambda: GaussSeidel(sweep="up"), "sweep is 'up'"),
        (lambda: Richardson(step=-1.0), "step is -1.0"),
        (lambda: Richardson(sweeps=0), "sweeps is 0"),
        (lambda: Richardson(max_steps=-1), "max_steps is -1"),
        (lambda: Chebyshev(bounds=(0.0, 1.0)), "0 < a <= b"),
        (lambda: Chebyshev(bounds=(2.0, 1.0)), "0 < a <= b"),
        (lambda: Chebyshev(degree=-1), "degree is -1"),
        (lambda: BlockJacobi(), "either size or blocks"),
        (lambda: BlockJacobi(size=2, blocks=[[0]]), "either size or blocks"),
        (lambda: BlockJacobi(size=0), "size is 0"),
        (lambda: IncompleteLU(drop=1.0), "drop is 1.0"),
        (lambda: IncompleteLU(fill=0.5), "fill is 0.5"),
        (lambda: IncompleteLU(ordering="AMD"), "ordering is 'AMD'"),
        (lambda: IncompleteCholesky(drop=0.0), "drops nothing"),
        (lambda: IncompleteCholesky(shift=-1.0), "shift is -1.0"),
    ):
        with pytest.raises(ArgumentError, match=words):
            make()


def test_what_needs_symmetry_says_so() -> None:
    A, b = Dense(random(4, 4)), random(4)
    for recipe in (Richardson(), Chebyshev(), IncompleteCholesky()):
        with pytest.raises(TagError, match="hermitian"):
            solve(A, b, recipe)
    with pytest.raises(ShapeError, match="square"):
        solve(Dense(random(4, 3)), b, Jacobi())
    with pytest.raises(TagError, match="hermitian"):
        solve(Dense(eye(4), tags={"hermitian"}), b, Richardson(preconditioner=Dense(random(4, 4))))


# ---------------------------------------------------------------- random systems


@hypothesis.given(
    eigenvalues=st.lists(st.floats(0.05, 20.0), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
    columns=st.integers(1, 3),
    name=st.sampled_from(
        ["richardson", "gauss-seidel", "gauss-seidel-symmetric", "sor", "ssor", "chebyshev"]
    ),
)
@hypothesis.settings(max_examples=80)
def test_random_definite_spectra_always_converge(
    eigenvalues: list[float], seed: int, columns: int, name: str
) -> None:
    n = len(eigenvalues)
    M = with_spectrum(torch.tensor(eigenvalues, dtype=F64), seed=seed)
    b = random(n, columns, seed=seed + 1)
    solution = solve(
        Dense(M, tags={"positive_definite"}), b, MAKE[name](rtol=1e-6, max_steps=60_000)
    )
    assert solution.status is SolveStatus.converged
    assert (residual_of(M, solution.value, b) <= 1.001e-6).all()
    condition = max(eigenvalues) / min(eigenvalues)
    assert error_of(solution.value, solution_of(M, b)) <= 1.1e-6 * condition


@hypothesis.given(
    eigenvalues=st.lists(st.floats(0.1, 10.0), min_size=3, max_size=10),
    negative=st.floats(-5.0, -0.05),
    seed=st.integers(0, 1000),
    name=st.sampled_from(["richardson", "ssor", "chebyshev", "gauss-seidel"]),
)
@hypothesis.settings(max_examples=60)
def test_random_indefinite_spectra_never_pass_for_solved_wrongly(
    eigenvalues: list[float], negative: float, seed: int, name: str
) -> None:
    M = with_spectrum(torch.tensor([negative, *eigenvalues], dtype=F64), seed=seed)
    b = random(len(M), seed=seed + 1)
    solution = solve(
        Dense(M, tags={"hermitian"}), b, MAKE[name](rtol=1e-8, max_steps=3000), throw=False
    )
    true = residual_of(M, solution.value, b)
    assert torch.allclose(solution.residual, true, rtol=1e-6, atol=1e-12)
    assert solution.ok == bool(true <= 1.001e-8)
    assert true <= 1 + 1e-12  # never worse than no answer


class TestSweeps(OperatorConformance):
    differentiable_in_x = False

    def make(self):
        cases = []
        for dtype in DTYPES:
            M = definite(dtype=dtype) + eye().to(dtype)
            for tags in (set(), {"positive_definite"}):
                A = Dense(M, tags=tags)
                recipe = GaussSeidel(sweep="symmetric" if tags else "forward", sweeps=3)
                state = recipe.prepare(A)
                step = wide(state.preconditioner.to_dense())
                G = torch.eye(N, dtype=step.dtype) - step @ wide(M)
                want = step + G @ step + G @ G @ step
                cases.append((recipe.as_preconditioner(A, state), want))
        return cases


class TestChebyshevPolynomial(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            M = definite(dtype=dtype)
            A = Dense(M, tags={"positive_definite"})
            recipe = Chebyshev(bounds=(0.1, 1.1), degree=1)
            # Two steps: residual T_2((0.6 - t) / 0.5) / T_2(1.2) with T_2(x) = 2 x^2 - 1.
            shifted = (0.6 * eye().to(wide(M).dtype) - wide(M)) / 0.5
            residual = (2 * shifted @ shifted - eye().to(wide(M).dtype)) / (2 * 1.2**2 - 1)
            want = torch.linalg.solve(wide(M), eye().to(wide(M).dtype) - residual)
            cases.append((recipe.as_preconditioner(A, recipe.prepare(A)), want))
        return cases
