"""No expression of tagged operators carries a tag that is false of its dense matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.conformance import tag_holds, wide

from woodbury import (
    BlockDiagonal,
    Dense,
    Diagonal,
    FunctionOperator,
    Identity,
    Kronecker,
    LowRank,
    Sparse,
)
from woodbury.errors import SingularError, TagError
from woodbury.operators import TAGS
from woodbury.operators.tags import close, inverse_tags, scaled_tags, sum_tags, transposed_tags

N = 4


def matrix_with(tag, dtype, seed):
    """A dense matrix that has the tag, and little else."""
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(N, N, dtype=dtype, generator=generator)
    if tag == "symmetric":
        return M + M.mT
    if tag == "hermitian":
        return M + M.mH
    if tag == "positive_semidefinite":
        return M[:, :2] @ M[:, :2].mH
    if tag == "positive_definite":
        return M @ M.mH + torch.eye(N, dtype=dtype) / 10
    if tag == "diagonal":
        return torch.diag(torch.diagonal(M))
    if tag == "lower_triangular":
        return torch.tril(M)
    if tag == "upper_triangular":
        return torch.triu(M)
    if tag == "unitary":
        return torch.linalg.qr(M).Q
    return M


@st.composite
def leaves(draw, dtype):
    tag = draw(st.sampled_from([None, *sorted(TAGS)]))
    M = matrix_with(tag, dtype, draw(st.integers(0, 3)))
    tags = set() if tag is None else {tag}
    kind = draw(
        st.sampled_from(
            ["dense", "function", "sparse", "low rank", "kronecker", "blocks", "identity"]
        )
    )
    if kind == "function":
        return FunctionOperator(
            lambda X: M @ X, (N, N), lambda Y: M.mH @ Y, tags=tags, dtype=dtype
        ), M
    if kind == "sparse":
        return Sparse(M.to_sparse(), tags=tags), M
    if kind == "low rank":
        if tag == "hermitian":
            return LowRank(M[:, :2], torch.tensor([1.0, -1.0]).to(dtype)), (
                M[:, :2] @ torch.diag(torch.tensor([1.0, -1.0]).to(dtype)) @ M[:, :2].mH
            )
        return LowRank(M[:, :1]), M[:, :1] @ M[:, :1].mH
    if kind == "kronecker":
        small = Dense(M[:2, :2], tags=tags - {"unitary"})
        return Kronecker(small, small), torch.kron(M[:2, :2].contiguous(), M[:2, :2].contiguous())
    if kind == "blocks":
        small = Dense(M[:2, :2], tags=tags - {"unitary"})
        return BlockDiagonal([small, small]), torch.block_diag(M[:2, :2], M[:2, :2])
    if kind == "identity":
        return Identity(N), torch.eye(N, dtype=dtype)
    if tag == "diagonal":
        return Diagonal(torch.diagonal(M)), M
    return Dense(M, tags=tags), M


@st.composite
def expressions(draw, dtype, depth):
    """An operator made by algebra, and the same made of dense matrices."""
    if depth == 0:
        return draw(leaves(dtype))
    rule = draw(
        st.sampled_from(
            ["sum", "difference", "product", "congruence", "gram", "scale", "T", "H", "inverse"]
        )
    )
    A, M = draw(expressions(dtype, depth - 1))
    if rule in ("sum", "difference", "product", "congruence"):
        B, K = draw(expressions(dtype, draw(st.integers(0, depth - 1))))
    if rule == "sum":
        return A + B, M + K
    if rule == "difference":
        return A - B, M - K
    if rule == "product":
        return A @ B, M @ K
    if rule == "congruence":
        if draw(st.booleans()):
            return B @ A @ B.H, K @ M @ K.mH
        return B @ A @ B.T, K @ M @ K.mT
    if rule == "gram":
        return A.H @ A, M.mH @ M
    if rule == "T":
        return A.T, M.mT
    if rule == "H":
        return A.H, M.mH
    if rule == "inverse":
        assume(float(torch.linalg.cond(M)) < 1e3)
        assume(A.dtype == dtype and A.has_inverse)
        return A.inverse(), torch.linalg.inv(M)
    numbers = [1, -1, 2.5, 0, -0.5] + ([1j, 1 - 2j, -1j] if dtype.is_complex else [])
    c = draw(st.sampled_from(numbers))
    # An identity made without a dtype is real until it meets something complex.
    assume(not (isinstance(c, complex) and not A.dtype.is_complex))
    return c * A, c * M


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@settings(max_examples=400)
@given(data=st.data())
def test_tags_of_expressions_are_true(dtype, data):
    A, M = data.draw(expressions(dtype, data.draw(st.integers(0, 3))))
    M = wide(M.to(dtype)).resolve_conj()
    scale = float(M.abs().max())
    assume(scale < 1e6)
    assert A.shape == (N, N)
    for tag in A.tags:
        assert tag_holds(tag, M, 1e-9), f"{A} is not {tag}"
    X = torch.eye(N, dtype=A.dtype)
    torch.testing.assert_close(wide(A @ X).to(dtype), M, rtol=1e-7, atol=1e-7 * max(scale, 1.0))
    torch.testing.assert_close(
        wide(A.rmatmat(X)).to(dtype), M.mH.resolve_conj(), rtol=1e-7, atol=1e-7 * max(scale, 1.0)
    )
    torch.testing.assert_close(
        wide(A.diagonal()).to(dtype), torch.diagonal(M), rtol=1e-7, atol=1e-7 * max(scale, 1.0)
    )
    if A.dtype == dtype and A.has_inverse and float(torch.linalg.cond(M)) < 1e3:
        try:
            inverse = A.inverse()
        except SingularError:
            return  # a part of it is singular though the whole is not
        want = torch.linalg.inv(M)
        torch.testing.assert_close(
            inverse.to_dense(), want, rtol=1e-6, atol=1e-6 * float(want.abs().max())
        )
        for tag in inverse.tags:
            assert tag_holds(tag, want, 1e-8), f"{inverse} is not {tag}"


def test_implications():
    real = close({"positive_definite"}, complex_dtype=False, square=True)
    assert real == {"positive_definite", "positive_semidefinite", "hermitian", "symmetric"}
    assert "symmetric" not in close({"positive_definite"}, complex_dtype=True, square=True)
    both = close({"lower_triangular", "upper_triangular"}, complex_dtype=True, square=True)
    assert both == {"diagonal", "symmetric", "lower_triangular", "upper_triangular"}
    triangular = close({"hermitian", "lower_triangular"}, complex_dtype=True, square=True)
    assert {"diagonal", "upper_triangular"} <= triangular
    assert close(set(), complex_dtype=True, square=False) == frozenset()


def test_rules():
    definite = close({"positive_definite"}, complex_dtype=False, square=True)
    semi = definite - {"positive_definite"}
    lower = frozenset({"lower_triangular"})
    assert sum_tags(definite, semi) == definite
    assert sum_tags(semi, semi) == semi
    assert sum_tags(frozenset({"unitary"}), frozenset({"unitary"})) == frozenset()
    assert scaled_tags(definite, -1) == {"symmetric", "hermitian"}
    assert scaled_tags(definite, 0) == semi
    assert scaled_tags(definite, 1j) == {"symmetric"}
    assert scaled_tags(definite, torch.tensor(2.0)) == definite
    assert scaled_tags(definite, float("nan")) == {"symmetric", "hermitian"}
    assert scaled_tags(frozenset({"unitary"}), 1j) == {"unitary"}
    assert scaled_tags(frozenset({"unitary"}), 2) == frozenset()
    assert transposed_tags(lower) == {"upper_triangular"}
    assert inverse_tags(semi) == definite


def test_unknown_tags_are_named():
    with pytest.raises(TagError, match=r"unknown tags \['spd'\]; known tags are \['diagonal'"):
        close({"spd", "symmetric"}, complex_dtype=False, square=True)
