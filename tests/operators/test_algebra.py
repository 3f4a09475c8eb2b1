from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.conformance import OperatorConformance, wide

from woodbury import Dense, Diagonal, FunctionOperator, Identity, Space
from woodbury.errors import DeviceError, DtypeError, ShapeError, SingularError
from woodbury.operators import Adjoint, Product, Scaled, Sum, Transpose

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)


def function(M, tags=()):
    return FunctionOperator(
        lambda X: M @ X, tuple(M.shape), lambda Y: M.mH @ Y, tags=tags, dtype=M.dtype
    )


def pair(dtype, *shape):
    M = torch.randn(*shape, dtype=dtype)
    if shape[0] == shape[1]:
        M = M + 3 * torch.eye(shape[0], dtype=dtype)
    return M, wide(M)


class TestSum(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            (A, M), (B, N) = pair(dtype, 3, 4), pair(dtype, 3, 4)
            cases.append((function(A) + function(B), M + N))
            (A, M), (B, N) = pair(dtype, 4, 4), pair(dtype, 4, 4)
            cases.append((Sum([function(A), Dense(B)]), M + N))
        return cases

    def gradients(self):
        A, B = torch.randn(2, 2).double(), torch.randn(2, 2).double()
        return [(lambda A, B: function(A) + Dense(B), (A, B))]


class TestScaled(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            (A, M), c = pair(dtype, 4, 4), 1.5 - 0.5j if dtype.is_complex else -1.5
            cases += [
                (c * Dense(A), c * M),
                (torch.tensor(c, dtype=dtype) * function(A[:3]), c * M[:3]),
            ]
        return cases

    def gradients(self):
        A, c = torch.randn(2, 2).double(), torch.tensor(0.7).double()
        return [(lambda A, c: c * Dense(A), (A, c))]


class TestProduct(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            (A, M), (B, N), (C, K) = pair(dtype, 3, 4), pair(dtype, 4, 5), pair(dtype, 5, 3)
            (S, T), (d, _) = pair(dtype, 3, 3), pair(dtype, 3, 1)
            Q = torch.linalg.qr(S).Q
            D = Diagonal(d[:, 0].abs().to(dtype) + 1, tags={"positive_definite"})
            P = Dense(Q, tags={"unitary"})
            cases += [
                (function(A) @ Dense(B) @ function(C), M @ N @ K),
                (Dense(A) @ Dense(B), M @ N),
                (Dense(S) @ D, T @ torch.diag(wide(D.values))),
                (P @ D @ P.H, wide(Q) @ torch.diag(wide(D.values)) @ wide(Q).mH),
            ]
        return cases

    def gradients(self):
        A, B = torch.randn(2, 2).double(), torch.randn(2, 2).double()
        return [(lambda A, B: Dense(A) @ Dense(B), (A, B))]


class TestTranspose(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            A, M = pair(dtype, 3, 4)
            cases.append((function(A).T, M.mT))
            A, M = pair(dtype, 4, 4)
            cases.append((Dense(A).inverse().T, torch.linalg.inv(M).mT))
        assert all(isinstance(A, Transpose) for A, _ in cases)
        return cases

    def gradients(self):
        return [(lambda A: function(A).T, (torch.randn(2, 3).double(),))]


class TestAdjoint(OperatorConformance):
    def make(self):
        cases = []
        for dtype in (torch.complex128, torch.complex64):
            A, M = pair(dtype, 3, 4)
            cases.append((function(A).H, M.mH.resolve_conj()))
            A, M = pair(dtype, 4, 4)
            cases.append((Dense(A).inverse().H, torch.linalg.inv(M).mH.resolve_conj()))
        assert all(isinstance(A, Adjoint) for A, _ in cases)
        return cases


def test_what_is_simplified_is_the_same_object():
    A = function(torch.randn(3, 3))
    S = function(torch.eye(3), tags={"symmetric"})
    eye = Identity(3)
    assert A.T.T is A
    assert A.H.H is A
    assert S.T is S
    assert 1 * A is A
    assert A @ eye is A
    assert eye @ A is A
    Z = function(torch.randn(3, 3, dtype=torch.complex64))
    assert Z.T.T is Z
    assert Z.H.H is Z
    assert Z.H is not Z.T


def test_sums_and_products_are_flat_and_numbers_leave_products():
    A, B, C = (function(torch.randn(3, 3)) for _ in range(3))
    assert len(((A + B) + (C + A)).terms) == 4
    assert ((A @ B) @ (C @ A)).factors == (A, B, C, A)
    product = (2 * A) @ (3 * (B @ C))
    assert isinstance(product, Scaled)
    assert product.factor == 6
    assert product.operator.factors == (A, B, C)


def test_nothing_is_multiplied_by_algebra():
    def never(X):
        raise AssertionError("multiplied")

    A = FunctionOperator(never, (3, 3), never)
    _ = 2 * (A + A.T - 3 * A) @ A.H @ (A / 2) + 1e-3 * Identity(3)


def test_numbers_of_other_libraries_do_not_promote():
    A = Dense(torch.eye(2))
    for number in (np.float64(2), np.float32(2), np.int64(2), True, torch.tensor(2.0).double()):
        assert (number * A @ torch.ones(2)).dtype == torch.float32
        assert (A * number).dtype == torch.float32
    with pytest.raises(DtypeError, match="complex"):
        _ = np.complex128(2) * A
    with pytest.raises(DtypeError, match="complex"):
        _ = torch.tensor(2j) * A
    with pytest.raises(TypeError):
        _ = A * torch.ones(2)
    with pytest.raises(TypeError):
        _ = A + 1.0
    with pytest.raises(TypeError):
        _ = A - torch.eye(2)
    with pytest.raises(ZeroDivisionError):
        _ = A / 0


def test_a_factor_elsewhere_is_refused():
    with pytest.raises(DeviceError, match="factor is on meta"):
        _ = torch.tensor(2.0, device="meta") * Dense(torch.eye(2))
    meta = Dense(torch.eye(2, device="meta"))
    with pytest.raises(DeviceError, match="cannot add operators on cpu and meta"):
        _ = Dense(torch.eye(2)) + meta
    with pytest.raises(DeviceError, match="cannot multiply"):
        _ = Dense(torch.eye(2)) @ meta


def test_a_vanishing_factor_has_no_inverse():
    with pytest.raises(SingularError, match="multiplied by 0"):
        (0 * Dense(torch.eye(2))).inverse()
    with pytest.raises(SingularError, match="multiplied by 0"):
        (torch.tensor(0.0) * Dense(torch.eye(2))).logdet()


def test_a_gradient_flows_through_a_damping():
    damping = torch.tensor(0.5, requires_grad=True)
    S = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    A = Dense(S, tags={"positive_definite"}) + damping * Identity(2)
    A.logdet().backward()
    want = torch.linalg.inv(S + 0.5 * torch.eye(2)).trace()
    torch.testing.assert_close(damping.grad, want)


def test_congruence_tags():
    P = Dense(torch.randn(4, 3, dtype=torch.complex128))
    H = torch.randn(3, 3, dtype=torch.complex128)
    M = Dense(H @ H.mH + torch.eye(3), tags={"positive_definite"})
    assert (P @ M @ P.H).tags == {"positive_semidefinite", "hermitian"}
    assert (P.H @ P).tags == {"positive_semidefinite", "hermitian"}
    assert (P @ M @ P.T).tags == frozenset()
    S = Dense(H + H.mT, tags={"symmetric"})
    assert (P @ S @ P.T).tags == {"symmetric"}
    assert (P @ S @ P.H).tags == frozenset()
    Q = Dense(torch.linalg.qr(H).Q, tags={"unitary"})
    assert "positive_definite" in (Q @ M @ Q.H).tags
    assert "positive_definite" in (P @ Q @ M @ Q.H @ P.H + Identity(4)).tags
    assert (2j * (P @ M @ P.H)).tags == frozenset()
    assert "hermitian" in (-2 * P @ M @ P.H).tags
    # Real: the same names, the transpose is the adjoint.
    R = Dense(torch.randn(4, 3))
    assert (R @ R.T).tags == {"positive_semidefinite", "hermitian", "symmetric"}
    assert (R.T @ Dense(torch.randn(4, 4)) @ R).tags == frozenset()
    # A matrix that only looks like the transpose is not known to be it.
    assert (R @ Dense(R.matrix.mT.clone())).tags == frozenset()


def test_unitary_congruence_is_inverted_through_its_middle():
    Q = Dense(torch.linalg.qr(torch.randn(3, 3).double()).Q, tags={"unitary"})
    values = torch.tensor([0.0, 1.0, 2.0]).double()
    A = Q @ Diagonal(values, tags={"positive_semidefinite"}) @ Q.T
    damped = 3.0 * A + 0.5 * Identity(3)
    assert isinstance(damped, Product)
    assert "positive_definite" in damped.tags
    dense = 3 * Q.matrix @ torch.diag(values) @ Q.matrix.mT + 0.5 * torch.eye(3).double()
    torch.testing.assert_close(damped.inverse().to_dense(), torch.linalg.inv(dense))
    torch.testing.assert_close(damped.logdet(), torch.logdet(dense))
    torch.testing.assert_close(damped.trace(), torch.trace(dense))
    assert "positive_definite" in damped.inverse().tags
    # A unitary operator needs no structure: its inverse is its adjoint.
    assert function(Q.matrix, tags={"unitary"}).inverse() @ torch.ones(3).double() is not None


def test_spaces_follow_the_vectors():
    inputs, outputs = Space({"w": (2, 2)}), Space({"y": (3,)})
    M = torch.randn(3, 4)
    A = FunctionOperator(lambda X: M @ X, (3, 4), lambda Y: M.T @ Y, space=inputs)
    assert A.space == inputs
    assert A.out_space == Space(3)
    assert A.T.space == Space(3)
    assert A.T.out_space == inputs
    assert (A.T @ A).space == inputs
    assert (A.T @ A).T.space == inputs
    assert (A @ A.T).space == Space(3)
    gram = A.T @ A + 1e-3 * Identity(4)
    assert gram.space == inputs
    assert (2 * gram).T.space == inputs
    assert (Identity(4) + A.T @ A).space == inputs
    assert Dense(torch.eye(4), space=inputs).inverse().space == inputs
    assert outputs != Space(3)


def test_wrong_products_are_refused():
    A = Dense(torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"\(2, 3\) and \(2, 3\)"):
        _ = A @ A
    with pytest.raises(ShapeError, match=r"cannot add operators of shapes \(2, 3\) and \(3, 2\)"):
        _ = A + A.T
    with pytest.raises(DtypeError, match="nothing is promoted silently"):
        _ = A @ Dense(torch.ones(3, 1).double())
    with pytest.raises(ShapeError, match="square"):
        A.logdet()
