"""Derivatives of solutions against those of ``torch.linalg.solve`` on the matrix."""

from __future__ import annotations

import pytest
import scipy.sparse
import torch
from tests.solvers.systems import definite, error_of, function, random
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from woodbury import (
    CG,
    BlockDiagonal,
    Cholesky,
    Dense,
    Diagonal,
    Eigh,
    FunctionOperator,
    Identity,
    Kernel,
    Kronecker,
    LinearOperator,
    LowRank,
    Nystrom,
    Sparse,
    inverse,
    solve,
)
from woodbury.errors import GradientError, SolveError
from woodbury.solvers import (
    GMRES,
    LDL,
    LSMR,
    LSQR,
    LU,
    MINRES,
    QR,
    Auto,
    BiCGSTAB,
    Jacobi,
    SolveReport,
    SolveStatus,
    SolveWarning,
    Structural,
)

# What torch says of itself when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is dep:DeprecationWarning")

F64 = torch.float64
n = 5
POINTS = torch.linspace(0, 2, n, dtype=F64).unsqueeze(1)
BASE = definite(n, condition=10)
GENERAL = BASE + 0.2 * random(n, n)


def exact(M: Tensor, b: Tensor) -> Tensor:
    # Not linalg.solve, whose gradient of a tangent is wrong inside torch.func (torch 2.13).
    return torch.linalg.inv(M) @ b


def symmetric(t: Tensor) -> Tensor:
    """A positive definite matrix for each ``t [n, n]`` near zero."""
    return BASE + 0.1 * (t + t.mT)


LAPLACIAN = scipy.sparse.diags_array([-1.0, 2.5, -1.0], offsets=[-1, 0, 1], shape=(n, n))


def sparse(t: Tensor) -> LinearOperator:
    stiffness = Sparse(LAPLACIAN, tags={"positive_definite"})
    return (1 + t[0] ** 2) * stiffness + Diagonal(t**2, tags={"positive_semidefinite"})


def sparse_matrix(t: Tensor) -> Tensor:
    return (1 + t[0] ** 2) * torch.from_numpy(LAPLACIAN.toarray()) + torch.diag(t**2)


def gaussian(t: Tensor, x: Tensor, z: Tensor) -> Tensor:
    scale = torch.exp(t[0])
    return torch.exp(-((x - z.mT) ** 2) / scale**2)


def kernel(t: Tensor) -> LinearOperator:
    K = Kernel(POINTS, kernel=lambda x, z: gaussian(t, x, z), tags={"positive_semidefinite"})
    return K + torch.exp(t[1]) * Identity(n, dtype=F64)


def closure(t: Tensor) -> LinearOperator:
    return FunctionOperator(
        lambda X: BASE @ X + t[:, None] ** 2 * X, (n, n), tags={"positive_definite"}, dtype=F64
    )


def one_sided(t: Tensor) -> LinearOperator:
    return FunctionOperator(
        lambda X: GENERAL @ X + t[:, None] * X.roll(1, 0),
        (n, n),
        lambda Y: GENERAL.mT @ Y + (t[:, None] * Y).roll(-1, 0),
        dtype=F64,
    )


def mixture(t: Tensor) -> LinearOperator:
    inner = Diagonal(1 + t**2, tags={"positive_definite"})
    P = function(GENERAL, set())
    return P @ inner @ P.T + t[0] ** 2 * closure(t) + 0.5 * Identity(n, dtype=F64)


def mixture_matrix(t: Tensor) -> Tensor:
    eye = torch.eye(n, dtype=F64)
    inner = GENERAL @ torch.diag(1 + t**2) @ GENERAL.mT
    return inner + t[0] ** 2 * (BASE + torch.diag(t**2)) + 0.5 * eye


def blocks(t: Tensor) -> LinearOperator:
    parts = [torch.diag(t[:2] ** 2 + 1), torch.diag(t[2:] ** 2 + 1) + 0.3]
    return BlockDiagonal([Dense(M, tags={"positive_definite"}) for M in parts])


def kronecker(t: Tensor) -> LinearOperator:
    left = torch.diag(t**2 + 1) + 0.3
    return Kronecker(
        Dense(left, tags={"positive_definite"}),
        Dense((1 + t[0] ** 2).reshape(1, 1), tags={"positive_definite"}),
    )


def low_rank(t: Tensor) -> LinearOperator:
    return LowRank(t.unsqueeze(1)) + (1 + t[0] ** 2) * Identity(n, dtype=F64)


def diagonal_matrix(t: Tensor) -> Tensor:
    return torch.diag(t**2 + 1)


HERMITIAN = {
    "dense": (lambda t: Dense(symmetric(t), tags={"positive_definite"}), symmetric, (n, n)),
    "diagonal": (
        lambda t: Diagonal(t**2 + 1, tags={"positive_definite"}),
        diagonal_matrix,
        (n,),
    ),
    "sparse": (sparse, sparse_matrix, (n,)),
    "kernel": (
        kernel,
        lambda t: gaussian(t, POINTS, POINTS) + torch.exp(t[1]) * torch.eye(n, dtype=F64),
        (2,),
    ),
    "closure": (closure, lambda t: BASE + torch.diag(t**2), (n,)),
    "mixture": (mixture, mixture_matrix, (n,)),
    "blocks": (
        blocks,
        lambda t: (
            torch.diag(t**2 + 1)
            + 0.3 * torch.block_diag(torch.zeros(2, 2), torch.ones(3, 3)).to(F64)
        ),
        (n,),
    ),
    "kronecker": (kronecker, lambda t: (torch.diag(t**2 + 1) + 0.3) * (1 + t[0] ** 2), (n,)),
    "low rank": (
        low_rank,
        lambda t: torch.outer(t, t) + (1 + t[0] ** 2) * torch.eye(n, dtype=F64),
        (n,),
    ),
}
SQUARE = {
    "dense": (lambda t: Dense(GENERAL + t), lambda t: GENERAL + t, (n, n)),
    "closure": (
        one_sided,
        lambda t: GENERAL + torch.diag(t) @ torch.eye(n, dtype=F64).roll(1, 0),
        (n,),
    ),
    "product": (
        lambda t: Dense(GENERAL + t) @ Diagonal(2 + t[0]),
        lambda t: (GENERAL + t) @ torch.diag(2 + t[0]),
        (n, n),
    ),
}
FOR_HERMITIAN = [
    CG(rtol=1e-13),
    CG(rtol=1e-13, preconditioner=Nystrom(rank=2)),
    CG(rtol=1e-13, preconditioner=Diagonal(torch.linspace(1, 2, n, dtype=F64))),
    Cholesky(),
    Eigh(),
    LU(),
    Nystrom(rank=n),
    LSMR(rtol=1e-13),
    QR(),
    MINRES(rtol=1e-13),
    LDL(),
    Auto(rtol=1e-13),
]
FOR_SQUARE = [
    LU(),
    LSMR(rtol=1e-13),
    LSQR(rtol=1e-13),
    QR(),
    GMRES(rtol=1e-13),
    GMRES(rtol=1e-13, preconditioner=Jacobi()),
    BiCGSTAB(rtol=1e-13),
    Auto(rtol=1e-13),
]
CASES = [
    *((name, *case, recipe) for name, case in HERMITIAN.items() for recipe in FOR_HERMITIAN),
    *((name, *case, recipe) for name, case in SQUARE.items() for recipe in FOR_SQUARE),
    *((name, *HERMITIAN[name], Structural()) for name in HERMITIAN if name in "dense sparse"),
]


def _id(value) -> str:
    return "" if callable(value) or isinstance(value, tuple) else str(value)[:40]


EACH_CASE = pytest.mark.parametrize(("name", "make", "matrix", "shape", "recipe"), CASES, ids=_id)
# The transforms are the same code for every recipe: one direct, one iterative, one rectangular.
OPERATORS = [
    *((name, *case, CG(rtol=1e-13)) for name, case in HERMITIAN.items()),
    *((name, *case, LU()) for name, case in SQUARE.items()),
    ("dense", *SQUARE["dense"], LSMR(rtol=1e-13)),
]
EACH_OPERATOR = pytest.mark.parametrize(
    ("name", "make", "matrix", "shape", "recipe"), OPERATORS, ids=_id
)


def point(shape) -> Tensor:
    return 0.5 * random(*shape, seed=3)


@EACH_CASE
def test_first_derivatives(name, make, matrix, shape, recipe) -> None:
    t, b, g = point(shape).requires_grad_(), random(n, 2).requires_grad_(), random(n, 2, seed=7)
    solution = solve(make(t), b, recipe)
    assert solution.ok
    found = torch.autograd.grad(solution.value, (t, b), g)
    expected = torch.autograd.grad(exact(matrix(t), b), (t, b), g)
    for a, e in zip(found, expected, strict=True):
        assert error_of(a, e) < 1e-8


@EACH_CASE
def test_second_derivatives(name, make, matrix, shape, recipe) -> None:
    t, b = point(shape).requires_grad_(), random(n).requires_grad_()
    v = random(*shape, seed=11), random(n, seed=12)

    def second(value: Tensor):
        first = torch.autograd.grad((value**3).sum(), (t, b), create_graph=True)
        along = sum((f * d).sum() for f, d in zip(first, v, strict=True))
        return torch.autograd.grad(along, (t, b))

    found = second(solve(make(t), b, recipe).value)
    expected = second(exact(matrix(t), b))
    for a, e in zip(found, expected, strict=True):
        assert error_of(a, e) < 1e-7


@EACH_OPERATOR
def test_by_differences(name, make, matrix, shape, recipe) -> None:
    t, b = point(shape).requires_grad_(), random(n, 2).requires_grad_()

    def value(t: Tensor, b: Tensor) -> Tensor:
        return solve(make(t), b, recipe).value

    assert gradcheck(value, (t, b), atol=1e-6, check_forward_ad=True)
    assert gradgradcheck(value, (t, b), atol=1e-5)


@EACH_OPERATOR
def test_transforms(name, make, matrix, shape, recipe) -> None:
    t, b = point(shape), random(n)

    def loss(t: Tensor, b: Tensor) -> Tensor:
        return (solve(make(t), b, recipe).value ** 3).sum()

    def reference(t: Tensor, b: Tensor) -> Tensor:
        return (exact(matrix(t), b) ** 3).sum()

    for transform in (
        lambda f: grad(f, argnums=(0, 1)),
        lambda f: jacrev(f, argnums=(0, 1)),
        lambda f: jacfwd(f, argnums=(0, 1)),
        lambda f: lambda *a: jvp(f, a, (torch.ones_like(t), torch.ones_like(b))),
        lambda f: lambda *a: vjp(f, *a)[1](torch.tensor(2.0, dtype=F64)),
        lambda f: hessian(f, argnums=0),
        lambda f: jacrev(grad(f)),
        lambda f: jacrev(jacfwd(f)),
    ):
        found, expected = transform(loss)(t, b), transform(reference)(t, b)
        pairs = (
            [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
        )
        for a, e in pairs:
            assert error_of(a, e) < 1e-7


@EACH_OPERATOR
def test_batches(name, make, matrix, shape, recipe) -> None:
    T = torch.stack([point(shape), 0.7 * point(shape), -point(shape)])
    B = random(3, n)

    def value(t: Tensor, b: Tensor) -> Tensor:
        return solve(make(t), b, recipe).value

    def loss(t: Tensor, b: Tensor) -> Tensor:
        return (value(t, b) ** 3).sum()

    def reference(t: Tensor, b: Tensor) -> Tensor:
        return (exact(matrix(t), b) ** 3).sum()

    each = torch.stack([exact(matrix(t), b) for t, b in zip(T, B, strict=True)])
    assert error_of(vmap(value)(T, B), each) < 1e-8
    assert error_of(vmap(value, (0, None))(T, B[0])[0], each[0]) < 1e-8
    assert error_of(vmap(value, (None, 0))(T[0], B)[0], each[0]) < 1e-8
    assert error_of(vmap(value, (None, 1), 1)(T[0], B.mT)[:, 0], each[0]) < 1e-8
    # Per-sample gradients, and the gradient of a batch.
    assert error_of(vmap(grad(loss))(T, B), vmap(grad(reference))(T, B)) < 1e-7
    total = grad(lambda T: vmap(loss)(T, B).sum())(T)
    assert error_of(total, vmap(grad(reference))(T, B)) < 1e-7


def test_a_batch_of_right_hand_sides_is_one_block() -> None:
    calls = []

    def product(X: Tensor) -> Tensor:
        calls.append(X.shape[1])
        return BASE @ X

    A = FunctionOperator(product, (n, n), tags={"positive_definite"}, dtype=F64)
    found = []

    def value(b: Tensor) -> Tensor:
        solution = solve(A, b, CG(rtol=1e-10))
        found.append(solution)
        return solution.residual

    residuals = vmap(value)(random(7, n))
    assert residuals.shape == (7,)
    assert (residuals < 1e-10).all()
    assert max(calls) == 7
    assert found[0].status is SolveStatus.converged
    assert found[0].column_status is None
    assert len(calls) <= n + 3


def test_a_backward_pass_solves_once() -> None:
    report = SolveReport()
    t, b = point((n, n)).requires_grad_(), random(n).requires_grad_()
    value = solve(Dense(GENERAL + t), b, LU(), report=report).value
    (value**2).sum().backward()
    assert report.calls == 2
    # The second order solves twice more: for the cotangents of the solution and of its adjoint.
    report = SolveReport()
    value = solve(Dense(GENERAL + t), b, LU(), report=report).value
    (first,) = torch.autograd.grad((value**2).sum(), t, create_graph=True)
    assert report.calls == 2
    first.square().sum().backward()
    assert report.calls == 4


def test_states_serve_all_derivatives() -> None:
    calls = []

    def product(X: Tensor) -> Tensor:
        calls.append(X.shape[1])
        return t @ X

    t = GENERAL.clone().requires_grad_()
    A = FunctionOperator(product, (n, n), lambda Y: t.mT @ Y, dtype=F64)
    value = solve(A, random(n), LU()).value
    (first,) = torch.autograd.grad((value**2).sum(), t, create_graph=True)
    first.square().sum().backward()
    assert calls.count(n) == 1, "the matrix was formed again"


def test_failures_in_derivatives_with_respect_to_the_operator() -> None:
    M = definite(40, condition=1e4)
    vectors = torch.linalg.eigh(M).eigenvectors
    t = M.clone().requires_grad_()
    recipe = CG(rtol=1e-8, max_steps=3)
    report = SolveReport()
    A = Dense(t, tags={"positive_definite"})
    with pytest.raises(SolveError, match="max_steps"):
        solve(A, vectors[:, 0], recipe, report=report).value.sum().backward()
    assert (report.calls, report.failures) == (2, 1)
    with pytest.warns(SolveWarning, match="max_steps"):
        solve(A, vectors[:, 0], recipe, throw=False).value.sum().backward()
    with pytest.raises(SolveError, match="max_steps"):
        grad(
            lambda t: solve(Dense(t, tags={"positive_definite"}), vectors[:, 0], recipe).value.sum()
        )(M)
    inverse_A = inverse(A, recipe, on_failure="nan")
    t.grad = None
    (inverse_A @ vectors[:, 0]).sum().backward()
    assert torch.isnan(t.grad).all()


@EACH_OPERATOR
def test_inverse_operator(name, make, matrix, shape, recipe) -> None:
    t, b = point(shape).requires_grad_(), random(n, 2).requires_grad_()

    def second(value: Tensor):
        first = torch.autograd.grad((value**3).sum(), (t, b), create_graph=True)
        return [*first, *torch.autograd.grad(sum(f.sum() for f in first), (t, b))]

    found = second(inverse(make(t), recipe) @ b)
    for a, e in zip(found, second(exact(matrix(t), b)), strict=True):
        assert error_of(a, e.detach()) < 1e-7
    by_transform = grad(lambda t: ((inverse(make(t), recipe) @ b) ** 3).sum())(t.detach())
    assert error_of(by_transform, found[0].detach()) < 1e-7


def test_systems_of_inverses() -> None:
    t = point((n, n)).requires_grad_()
    b = random(n)

    def value(t: Tensor) -> Tensor:
        A = inverse(Dense(symmetric(t), tags={"positive_definite"}), Cholesky())
        return solve(A + 2.0 * Identity(n, dtype=F64), b, CG(rtol=1e-13)).value

    value_of = exact(torch.linalg.inv(symmetric(t)) + 2 * torch.eye(n, dtype=F64), b)
    (expected,) = torch.autograd.grad((value_of**2).sum(), t)
    (found,) = torch.autograd.grad((value(t) ** 2).sum(), t)
    assert error_of(found, expected) < 1e-8


# ------------------------------------------------------------- least squares


def rectangular(rows: int, columns: int, rank: int | None = None) -> Tensor:
    M = random(rows, columns, seed=21)
    if rank is None:
        return M
    U, s, V = torch.linalg.svd(M, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ V[:rank]


@pytest.mark.parametrize("recipe", [LSMR(rtol=1e-13), QR()], ids=repr)
@pytest.mark.parametrize(("rows", "columns"), [(7, 4), (4, 7)])
def test_least_squares(rows: int, columns: int, recipe) -> None:
    t, b = rectangular(rows, columns).requires_grad_(), random(rows, 2).requires_grad_()

    def value(t: Tensor, b: Tensor) -> Tensor:
        return solve(Dense(t), b, recipe).value

    def reference(t: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.pinv(t) @ b

    assert gradcheck(value, (t, b), atol=1e-6, check_forward_ad=True)
    assert gradgradcheck(value, (t, b), atol=1e-5)
    for transform in (
        lambda f: grad(lambda t: (f(t, b.detach()) ** 3).sum()),
        lambda f: hessian(lambda t: (f(t, b.detach()) ** 3).sum()),
    ):
        found, expected = transform(value)(t.detach()), transform(reference)(t.detach())
        assert error_of(found, expected) < 1e-6


def test_damped_least_squares() -> None:
    t, b = rectangular(7, 4).requires_grad_(), random(7).requires_grad_()

    def value(t: Tensor, b: Tensor) -> Tensor:
        return solve(Dense(t), b, LSMR(rtol=1e-14, damping=0.5)).value

    assert gradcheck(value, (t, b), atol=1e-6, check_forward_ad=True)
    assert gradgradcheck(value, (t, b), atol=1e-5)
    exact = torch.linalg.solve(t.mT @ t + 0.25 * torch.eye(4, dtype=F64), t.mT @ b)
    (expected,) = torch.autograd.grad((exact**2).sum(), t)
    (found,) = torch.autograd.grad((value(t, b) ** 2).sum(), t)
    assert error_of(found, expected) < 1e-8


def test_least_squares_along_directions_of_constant_rank() -> None:
    left = random(7, 2, seed=1)
    right = random(2, 4, seed=2)
    b = random(7)

    def value(left: Tensor, right: Tensor) -> Tensor:
        return solve(Dense(left @ right), b, LSMR(rtol=1e-13)).value

    args = left.requires_grad_(), right.requires_grad_()
    assert gradcheck(value, args, atol=1e-6, check_forward_ad=True)


# ------------------------------------------------------------------- refused


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, M: Tensor, X: Tensor) -> Tensor:
        ctx.save_for_backward(M, X)
        return M @ X

    @staticmethod
    def backward(ctx, G: Tensor):
        M, X = ctx.saved_tensors
        return G @ X.mT, M.mT @ G


def test_products_that_cannot_be_followed() -> None:
    t = BASE.clone().requires_grad_()
    hidden = FunctionOperator(
        lambda X: _Hidden.apply(t, X), (n, n), tags={"positive_definite"}, dtype=F64
    )
    with pytest.raises(GradientError, match=r"out of sight.*plain tensor operations.*no_grad"):
        solve(hidden, random(n), CG()).value.sum().backward()
    with torch.no_grad():
        assert solve(hidden, random(n), CG()).ok


def curvature(w: Tensor) -> LinearOperator:
    """The Hessian of a sum of squares and quartics, by transforms inside the product."""

    def product(X: Tensor) -> Tensor:
        loss = lambda w: (w**2).sum() + (w**4).sum()  # noqa: E731
        return torch.stack([jvp(grad(loss), (w,), (x,))[1] for x in X.unbind(1)], dim=1)

    return FunctionOperator(product, (n, n), tags={"positive_definite"}, dtype=F64)


def test_transforms_inside_products() -> None:
    w, b = random(n).requires_grad_(), random(n)
    (found,) = torch.autograd.grad(solve(curvature(w), b, CG(rtol=1e-13)).value.sum(), w)
    (expected,) = torch.autograd.grad((b / (2 + 12 * w**2)).sum(), w)
    assert error_of(found, expected) < 1e-10

    def value(w: Tensor) -> Tensor:
        return solve(curvature(w), b, CG(rtol=1e-13)).value

    w = w.detach()
    assert error_of(grad(lambda w: value(w).sum())(w), expected) < 1e-10
    assert error_of(jvp(value, (w,), (w,))[1], expected * w) < 1e-10
    second = torch.diag(b * (1152 * w**2 / (2 + 12 * w**2) ** 3 - 24 / (2 + 12 * w**2) ** 2))
    assert error_of(hessian(lambda w: value(w).sum())(w), second) < 1e-9
    W = random(2, n)
    assert error_of(vmap(value)(W), b / (2 + 12 * W**2)) < 1e-10


def test_products_of_an_earlier_graph() -> None:
    w = random(n).requires_grad_()
    (slope,) = torch.autograd.grad((w**4).sum() + (w**2).sum(), w, create_graph=True)

    def product(X: Tensor) -> Tensor:
        return torch.stack(
            [
                torch.autograd.grad(slope, w, x, retain_graph=True, create_graph=True)[0]
                for x in X.unbind(1)
            ],
            dim=1,
        )

    A = FunctionOperator(product, (n, n), tags={"positive_definite"}, dtype=F64)
    with pytest.raises(GradientError, match="cannot be differentiated|out of sight"):
        solve(A, random(n), CG()).value.sum().backward()


def test_what_functions_close_over() -> None:
    class Rule:
        def __init__(self, t: Tensor) -> None:
            self.parts = {"t": t}

        def __call__(self, X: Tensor) -> Tensor:
            return BASE @ X + self.parts["t"][:, None] ** 2 * X

    def of_object(t: Tensor) -> LinearOperator:
        return FunctionOperator(Rule(t), (n, n), tags={"positive_definite"}, dtype=F64)

    t, b = point((n,)).requires_grad_(), random(n)
    layer = torch.nn.Linear(n, n, bias=False, dtype=F64)
    layer.weight.data.copy_(BASE)
    of_module = FunctionOperator(
        lambda X: layer(X.mT).mT, (n, n), tags={"positive_definite"}, dtype=F64
    )
    for A, M, of in (
        (of_object(t), BASE + torch.diag(t**2), t),
        (of_module, layer.weight, layer.weight),
    ):
        (found,) = torch.autograd.grad(solve(A, b, CG(rtol=1e-13)).value.sum(), of)
        (expected,) = torch.autograd.grad(exact(M, b).sum(), of)
        assert error_of(found, expected) < 1e-10


def test_products_that_fail_with_gradients() -> None:
    t = torch.ones(n, dtype=F64).requires_grad_()

    def product(X: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("no derivative here")
        return X * t[:, None]

    A = FunctionOperator(product, (n, n), tags={"positive_definite"}, dtype=F64)
    with pytest.raises(GradientError, match=r"cannot be differentiated.*no derivative here"):
        solve(A, random(n), CG())
    with torch.no_grad():
        assert solve(A, random(n), CG()).ok


def test_forward_mode_in_forward_mode() -> None:
    # torch would return zeros.
    def loss(t: Tensor) -> Tensor:
        return solve(Diagonal(t), torch.ones(n, dtype=F64), LU()).value.sum()

    with pytest.raises(GradientError, match="forward mode inside forward mode"):
        jacfwd(jacfwd(loss))(torch.ones(n, dtype=F64))


def test_changing_a_tensor_before_the_backward_pass() -> None:
    t = BASE.clone().requires_grad_()
    value = solve(Dense(t, tags={"positive_definite"}), random(n), CG()).value
    with torch.no_grad():
        t.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_operator_without_gradient_costs_nothing_more() -> None:
    A = function(BASE, {"positive_definite"})
    b = random(n)
    with torch.no_grad():
        plain = solve(A, b, CG())
    for right in (b, b.clone().requires_grad_()):
        assert solve(A, right, CG()).products == plain.products
