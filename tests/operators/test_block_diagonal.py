from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance, wide

from woodbury import BlockDiagonal, Dense, Diagonal, Identity, Kronecker
from woodbury.errors import (
    DtypeError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    SingularError,
    TagError,
)
from woodbury.operators import Product

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)


def square(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype) + 3 * torch.eye(shape[-1], dtype=dtype)


def definite(*shape, dtype=torch.float64):
    root = torch.randn(*shape, dtype=dtype)
    return root @ root.mH + torch.eye(shape[-1], dtype=dtype)


def block(*matrices):
    return torch.block_diag(*[wide(matrix) for matrix in matrices])


class TestBlockDiagonal(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            A, B, S = (
                square(2, 2, dtype=dtype),
                square(3, 3, dtype=dtype),
                definite(2, 2, dtype=dtype),
            )
            R = torch.randn(2, 3, dtype=dtype)
            d = torch.tensor([1.0, -2.0]).to(dtype)
            definite_blocks = [Dense(S, tags={"positive_definite"}), 2.0 * Identity(2)]
            kron = Kronecker(A, S)
            cases += [
                (BlockDiagonal([A, B]), block(A, B)),
                (BlockDiagonal([A, R, B]), block(A, R, B)),
                (BlockDiagonal([B]), block(B)),
                (
                    BlockDiagonal([Dense(A).inverse(), Diagonal(d), kron]),
                    block(torch.linalg.inv(wide(A)), torch.diag(d), torch.kron(wide(A), wide(S))),
                ),
                (BlockDiagonal(definite_blocks), block(S, 2 * torch.eye(2))),
            ]
        half = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.bfloat16)
        cases.append((BlockDiagonal([half, half]), block(half, half)))
        return [(A, M.to(torch.complex128) if A.dtype.is_complex else M) for A, M in cases]

    def gradients(self):
        return [(lambda A, B: BlockDiagonal([A, B]), (square(2, 2), square(1, 1)))]


class TestBlockDiagonalStack(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            A, S = square(3, 2, 2, dtype=dtype), definite(2, 3, 3, dtype=dtype)
            R = torch.randn(2, 2, 3, dtype=dtype)
            cases += [
                (BlockDiagonal(A), block(*A)),
                (BlockDiagonal(S, tags={"positive_definite"}), block(*S)),
                (BlockDiagonal(torch.tril(S), tags={"lower_triangular"}), block(*torch.tril(S))),
                (BlockDiagonal(R), block(*R)),
            ]
        half = torch.tensor([[[2.0, 1.0], [0.0, 1.0]]] * 2, dtype=torch.float16)
        cases.append((BlockDiagonal(half), block(*half)))
        return cases

    def gradients(self):
        return [
            (BlockDiagonal, (square(2, 2, 2),)),
            (BlockDiagonal, (torch.randn(2, 1, 2).double(),)),
        ]


def test_matching_blocks_merge():
    S, T, A = definite(2, 2, 2), definite(2, 2, 2), [square(2, 2), square(2, 2)]
    stack = BlockDiagonal(S, tags={"positive_definite"})
    other = BlockDiagonal(T, tags={"positive_definite"})
    listed = BlockDiagonal(A)
    for merged, dense in [
        (stack + other, block(*S) + block(*T)),
        (stack - 2 * other, block(*S) - 2 * block(*T)),
        (stack + listed, block(*S) + block(*A)),
        (listed + listed, 2 * block(*A)),
        (listed @ listed, block(*A) @ block(*A)),
        (listed @ stack, block(*A) @ block(*S)),
        (stack + Identity(4), block(*S) + torch.eye(4).double()),
        (listed + 2 * Identity(4), block(*A) + 2 * torch.eye(4).double()),
        (stack + Diagonal(torch.arange(4.0).double()), block(*S) + torch.diag(torch.arange(4.0))),
        (Diagonal(torch.arange(4.0).double()) + listed, block(*A) + torch.diag(torch.arange(4.0))),
    ]:
        assert isinstance(merged, BlockDiagonal)
        assert merged.has_inverse
        torch.testing.assert_close(merged.to_dense(), dense)
    assert "positive_definite" in (stack + other).tags
    assert (stack + other).stack is not None  # still one batched product
    assert "positive_definite" in (stack + Identity(4)).tags
    # Blocks of other sizes: no merging, the same operator.
    small = BlockDiagonal(square(4, 1, 1))
    torch.testing.assert_close((stack + small).to_dense(), stack.to_dense() + small.to_dense())
    assert isinstance(stack @ other, Product)
    assert isinstance(BlockDiagonal([square(1, 1), square(3, 3)]) @ listed, Product)


def test_structure_inside_the_blocks_is_kept():
    """The shape of K-FAC: blocks of Kronecker products, damped."""
    blocks, dense = [], []
    for n in (2, 3):
        A, G = definite(n, n), definite(2, 2)
        factors = [Dense(X, tags={"positive_definite"}) for X in (G, A)]
        blocks.append(Kronecker(*factors))
        dense.append(torch.kron(G, A) + 1e-3 * torch.eye(2 * n))
    damped = BlockDiagonal(blocks) + 1e-3 * Identity(10)
    inverse = damped.inverse()
    torch.testing.assert_close(inverse.to_dense(), torch.linalg.inv(block(*dense)))
    assert "positive_definite" in inverse.tags
    torch.testing.assert_close(damped.logdet(), torch.logdet(block(*dense)))


def test_a_block_that_cannot_be_inverted_is_named():
    stack = torch.stack([torch.eye(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])])
    with pytest.raises(NotPositiveDefiniteError, match=r"order 2 of block \(1,\)"):
        BlockDiagonal(stack, tags={"positive_definite"}).inverse()
    stack[1] = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-7]])
    with pytest.raises(SingularError, match=r"block 1"):
        BlockDiagonal(stack).inverse()
    stack[1] = 0
    with pytest.raises(SingularError, match=r"\(1, 0\)"):
        BlockDiagonal(stack).logdet()
    stack[1, 0, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"\(1, 0, 1\)"):
        BlockDiagonal(stack).inverse()


def test_rectangular_blocks_of_a_square_whole_are_singular():
    for A in (
        BlockDiagonal([torch.ones(1, 2), torch.ones(2, 1)]),
        BlockDiagonal([torch.eye(1), torch.ones(1, 2), torch.ones(2, 1)]),
    ):
        assert A.is_square
        with pytest.raises(SingularError, match="1 x 2"):
            A.inverse()
        with pytest.raises(SingularError, match="1 x 2"):
            A.logdet()
        torch.testing.assert_close(A.diagonal(), torch.diagonal(A.to_dense()))
        torch.testing.assert_close(
            (A + Identity(A.shape[0])).to_dense(), A.to_dense() + torch.eye(A.shape[0])
        )


def test_wrong_blocks_are_refused():
    with pytest.raises(ShapeError, match="no blocks"):
        BlockDiagonal([])
    with pytest.raises(ShapeError, match=r"\[b, m, n\]"):
        BlockDiagonal(torch.eye(2))
    with pytest.raises(DtypeError, match="float64"):
        BlockDiagonal([torch.eye(2), torch.eye(2).double()])
    with pytest.raises(TagError, match=r"entry \(1, 0, 1\)"):
        BlockDiagonal(torch.stack([torch.eye(2), torch.triu(torch.ones(2, 2))]), tags={"symmetric"})


def test_the_blocks_of_a_stack_are_views():
    stack = definite(3, 2, 2)
    blocks = BlockDiagonal(stack, tags={"positive_definite"}).blocks
    assert blocks[1].matrix.data_ptr() == stack[1].data_ptr()
    assert all("positive_definite" in b.tags for b in blocks)
