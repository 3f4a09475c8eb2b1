"""States as tensors, numbers and words: what comes back solves as what was written."""

from __future__ import annotations

import io

import pytest
import torch

from woodbury import CG, Cholesky, Dense, Eigh, FunctionOperator, Neumann, Nystrom, solve
from woodbury.errors import DataError
from woodbury.operators import Identity
from woodbury.solvers import LU, MINRES, QR, Arnoldi, Deflation, IncompleteCholesky, Jacobi, Recipe
from woodbury.solvers.packing import pack, unpack

F64 = torch.float64
N = 8


def matrix(dtype=F64):
    torch.manual_seed(0)
    A = torch.randn(N, N, dtype=dtype)
    return Dense(A @ A.mH + torch.eye(N, dtype=dtype), tags={"positive_definite"})


def through_a_file(packed):
    file = io.BytesIO()
    torch.save(packed, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


RECIPES = [
    CG(),
    CG(preconditioner=Jacobi()),
    CG(preconditioner=Nystrom(rank=3), max_steps=200),
    MINRES(preconditioner=Nystrom(rank=4)),
    Nystrom(rank=3, damping=0.5),
    Arnoldi(rank=4),
    Deflation(rank=3),
    Neumann(terms=5, step=0.01),
    Cholesky(),
    LU(),
    QR(),
    Eigh(),
]


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.complex128])
@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_what_comes_back_solves_the_same(recipe: Recipe, dtype) -> None:
    A, b = matrix(dtype), torch.randn(N, 2, dtype=dtype)
    state = recipe.prepare(A)
    packed = pack(state)
    assert packed is not None
    back = unpack(through_a_file(packed))
    assert type(back) is type(state)
    assert back.recipe == recipe
    assert (back.shape, back.dtype, back.device, back.products) == (
        state.shape,
        state.dtype,
        state.device,
        state.products,
    )
    other = A + 0.01 * Identity(N)  # the state is used, or the answer would be another
    mine = solve(other, b, recipe, state=back, throw=False)
    wanted = solve(other, b, recipe, state=state, throw=False)
    assert torch.equal(mine.value, wanted.value)
    assert mine.products == wanted.products
    assert (mine.status, mine.steps) == (wanted.status, wanted.steps)


def test_what_holds_something_else_has_no_form() -> None:
    A = matrix()
    M = FunctionOperator(lambda x: x, (N, N), dtype=F64, tags={"positive_definite"})
    assert pack(CG(preconditioner=M).prepare(A)) is None
    assert pack(CG(preconditioner=matrix()).prepare(A)) is None
    assert pack(CG(preconditioner=IncompleteCholesky()).prepare(A)) is None  # holds functions


class Calls:
    """What must not be made from a file."""

    made = False

    def __new__(cls):
        cls.made = True
        return super().__new__(cls)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"class": "os:system", "fields": {}}, "not of this library"),
        (lambda p: {"class": f"{__name__}:Calls", "fields": {}}, "not of this library"),
        (lambda p: {"class": "woodbury.errors:DataError", "fields": {}}, "no part of one"),
        (lambda p: {"class": "woodbury.solvers.solve:solve", "fields": {}}, "no part of one"),
        (lambda p: {"class": "woodbury.none:No", "fields": {}}, "no packed state"),
        (lambda p: {"enum": "woodbury.solvers.cg:CG", "name": "x"}, "no enumeration"),
        (lambda p: {**p, "fields": {**p["fields"], "dtype": {"dtype": "load"}}}, "dtype load"),
        (lambda p: {**p, "fields": {**p["fields"], "shape": {"map": []}}}, "no packed state"),
        (lambda p: {**p, "fields": {**p["fields"], "shape": object()}}, "holds a object"),
        (lambda p: p["fields"]["recipe"], "but a Nystrom"),
        (lambda p: {}, "no packed state"),
        (lambda p: 3, "but a int"),
    ],
)
def test_other_things_are_refused(change, message: str) -> None:
    packed = pack(Nystrom(rank=2).prepare(matrix()))
    with pytest.raises(DataError, match=message):
        unpack(change(packed))
    assert not Calls.made
