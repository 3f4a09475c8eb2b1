"""Blocks of the diagonal, read or multiplied out, against blocks cut from the dense matrix."""

from __future__ import annotations

import pytest
import scipy.sparse
import torch
from tests.conformance import OperatorConformance
from tests.solvers.systems import (
    DTYPES,
    N,
    definite,
    error_of,
    function,
    random,
    wide,
    with_spectrum,
)

from woodbury import (
    CG,
    BlockJacobi,
    Dense,
    Diagonal,
    Identity,
    Jacobi,
    LinearOperator,
    Sparse,
    solve,
)
from woodbury.errors import (
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    SingularError,
)
from woodbury.solvers import SolveStatus

F64 = torch.float64
UNEVEN = ((0, 5, 7), (1, 2, 3), (4,), tuple(range(8, N)), (6,))


def reference(M: torch.Tensor, blocks) -> torch.Tensor:
    inverse = torch.zeros_like(M)
    for block in blocks:
        index = torch.tensor(list(block))
        inverse[index[:, None], index] = torch.linalg.inv(M[index[:, None], index])
    return inverse


def consecutive(size: int) -> list[range]:
    return [range(i, min(i + size, N)) for i in range(0, N, size)]


def operators(dtype: torch.dtype) -> dict[str, LinearOperator]:
    M = definite(dtype=dtype)
    tags = {"positive_definite"}
    return {
        "dense": Dense(M, tags={"hermitian"}),
        "sparse": Sparse(scipy.sparse.csr_array(M.numpy()), tags={"hermitian"}),
        "function": function(M, tags),
    }


@pytest.mark.parametrize("kind", ["dense", "sparse", "function"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_inverse_of_the_blocks(dtype: torch.dtype, kind: str) -> None:
    A = operators(dtype)[kind]
    M = wide(A.to_dense())
    rounding = 1e-4 if dtype in (torch.float32, torch.complex64) else 1e-11
    for recipe, blocks in (
        (BlockJacobi(size=1), consecutive(1)),
        (BlockJacobi(size=4), consecutive(4)),
        (BlockJacobi(size=7), consecutive(7)),
        (BlockJacobi(size=100), [range(N)]),
        (BlockJacobi(blocks=UNEVEN), UNEVEN),
        (BlockJacobi(blocks=[torch.arange(12, N), torch.arange(12)]), [range(12), range(12, N)]),
    ):
        state = recipe.prepare(A)
        P = recipe.as_preconditioner(A, state)
        want = reference(M, blocks)
        assert error_of(P.to_dense(), want) < rounding
        assert {"hermitian", "positive_definite"} <= P.tags
        B = random(N, 2, dtype=dtype)
        assert error_of(P.rmatmat(B), want.mH @ wide(B)) < rounding
        assert state.products == (N if kind == "function" else 0)


def test_blocks_of_one_are_jacobi() -> None:
    A, b = operators(F64)["dense"], random(N)
    for count in (1, 3):
        one, other = BlockJacobi(size=1, sweeps=count), Jacobi(sweeps=count)
        P, Q = (r.as_preconditioner(A, r.prepare(A)) for r in (one, other))
        assert error_of(P @ b, Q @ b) < 1e-12


def test_columns_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woodbury.operators.base._DENSE_BLOCK_BYTES", 8 * N * 7)
    widest = []
    M = definite()

    def product(X: torch.Tensor) -> torch.Tensor:
        widest.append(X.shape[1])
        return M @ X

    A = function(M, {"positive_definite"})
    A._forward = product
    for size in (3, 5):
        P = BlockJacobi(size=size).prepare(A).preconditioner
        assert error_of(P.to_dense(), reference(M, consecutive(size))) < 1e-11
    diagonal = A.diagonal()
    assert error_of(diagonal, M.diagonal()) < 1e-14
    assert max(widest) <= 7
    assert Jacobi().prepare(A).products == N
    assert Jacobi().prepare(A + 2.0 * Identity(N)).products == N
    assert Jacobi().prepare(Diagonal(random(N))).products == 0


def test_strongly_coupled_unknowns_belong_together() -> None:
    spectrum = torch.tensor([1e-3, 1.0], dtype=F64)
    parts = [with_spectrum(spectrum, seed=i) for i in range(12)]
    M = torch.block_diag(*parts) + 1e-4 * definite()
    A, b = Dense(M, tags={"positive_definite"}), random(N)
    point = solve(A, b, CG(rtol=1e-8, preconditioner=Jacobi())).steps
    block = solve(A, b, CG(rtol=1e-8, preconditioner=BlockJacobi(size=2))).steps
    assert block < point / 2
    order = torch.randperm(N)
    shuffled = Dense(M[order][:, order], tags={"positive_definite"})
    place = torch.argsort(order)
    blocks = [(int(place[2 * i]), int(place[2 * i + 1])) for i in range(12)]
    again = solve(shuffled, b[order], CG(rtol=1e-8, preconditioner=BlockJacobi(blocks=blocks)))
    assert abs(again.steps - block) <= 1


def test_bad_blocks() -> None:
    A = operators(F64)["dense"]
    for blocks, words in (
        ([range(N - 1)], "1 are missing, 0 repeated"),
        ([range(N), [3]], "0 are missing, 1 repeated"),
        ([range(N), [N]], "outside are \\[24\\]"),
    ):
        with pytest.raises(ShapeError, match=words):
            BlockJacobi(blocks=blocks).prepare(A)


def test_singular_and_indefinite_blocks() -> None:
    M = torch.eye(6, dtype=F64)
    M[2:4, 2:4] = 1.0
    with pytest.raises(SingularError, match="block of rows 2, 3 is singular"):
        BlockJacobi(size=2).prepare(Dense(M))
    with pytest.raises(SingularError, match="block of rows 2, 3"):
        BlockJacobi(size=2).prepare(Dense(M, tags={"hermitian"}))
    found = solve(Dense(M), random(6), BlockJacobi(size=2), throw=False)
    assert found.status is SolveStatus.singular
    M[3, 3] = -1.0
    P = BlockJacobi(size=2).prepare(Dense(M, tags={"hermitian"})).preconditioner
    assert "hermitian" in P.tags
    assert "positive_definite" not in P.tags
    assert error_of(P.to_dense(), torch.linalg.inv(M)) < 1e-12
    with pytest.raises(NotPositiveDefiniteError, match="block of rows 2, 3 is not"):
        BlockJacobi(size=2).prepare(function(M, {"positive_definite"}))
    M[0, 1] = float("nan")
    with pytest.raises(NonFiniteError):
        BlockJacobi(size=2).prepare(Dense(M))


def test_recipes_compare() -> None:
    assert BlockJacobi(blocks=[[0, 1], [2]]) == BlockJacobi(blocks=((0, 1), (2,)))
    assert hash(BlockJacobi(size=3)) == hash(BlockJacobi(size=3))


class TestBlockInverse(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            for size in (4, 7):
                A = operators(dtype)["dense"]
                P = BlockJacobi(size=size).prepare(A).preconditioner
                cases.append((P, reference(wide(A.to_dense()), consecutive(size))))
        return cases
