"""The one conformance suite that the tests of every operator inherit.

    class TestMine(OperatorConformance):
        def make(self):
            return [(Mine(...), dense), ...]

``make`` builds fresh operators each time, with a dense reference that is built by another path, in
float64 or complex128. Give a case of every dtype that is supported, a rectangular one where there
are such, and let a square one with a structural inverse be well conditioned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from woodbury import Dense, FunctionOperator, Identity, LinearOperator
from woodbury.errors import DeviceError, DtypeError, ShapeError, StructureError

Case = tuple[LinearOperator, Tensor]

_TOLERANCE = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float32: 2e-4,
    torch.complex64: 2e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 2e-1,
}


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64 or complex128, detached, on the CPU."""
    dtype = torch.complex128 if tensor.dtype.is_complex else torch.float64
    return tensor.detach().cpu().to(dtype)


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Equal to the rounding of ``dtype``, relative to the largest entry (at least ``scale``)."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    got, want = wide(got), wide(want)
    allowed = _TOLERANCE[dtype] * max(scale, float(want.abs().max()))
    gap = float((got - want).abs().max())
    assert gap <= allowed, f"differs by {gap:.2e}, allowed {allowed:.2e}"


def tag_holds(tag: str, dense: Tensor, tolerance: float) -> bool:
    """Whether a tag is true of a dense matrix, up to ``tolerance`` of its largest entry."""
    A = wide(dense)
    n = A.shape[0]
    allowed = tolerance * max(1e-300, float(A.abs().max())) if n else 0.0

    def small(matrix: Tensor) -> bool:
        return matrix.numel() == 0 or float(matrix.abs().max()) <= allowed

    if tag == "symmetric":
        return small(A - A.mT)
    if tag == "hermitian":
        return small(A - A.mH)
    if tag == "diagonal":
        return small(A - torch.diag(torch.diagonal(A)))
    if tag == "lower_triangular":
        return small(torch.triu(A, 1))
    if tag == "upper_triangular":
        return small(torch.tril(A, -1))
    if tag == "unitary":
        return float((A.mH @ A - torch.eye(n)).abs().max()) <= n * tolerance if n else True
    if not small(A - A.mH):
        return False
    smallest = float(torch.linalg.eigvalsh((A + A.mH) / 2).min()) if n else 1.0
    if tag == "positive_semidefinite":
        return smallest >= -n * allowed
    assert tag == "positive_definite", f"no check for the tag {tag!r}"
    # Rounding cannot tell a tiny eigenvalue from zero; a clearly negative one is a false tag.
    return smallest > -n * allowed


def assert_tags_true(operator: LinearOperator, dense: Tensor) -> None:
    """Every tag the operator carries is true of the dense matrix."""
    for tag in operator.tags:
        assert tag_holds(tag, dense, 10 * _TOLERANCE[operator.dtype]), f"{operator} is not {tag}"


def draw(*shape: int, like: LinearOperator, seed: int = 0) -> Tensor:
    """Normal numbers of the operator's dtype and device, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if like.dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=dtype, generator=generator).to(like.dtype).to(like.device)


def state_of(operator: LinearOperator) -> dict[str, Any]:
    """A copy of the tensors an operator holds, and of everything else it says about itself."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in vars(operator).items()
        if isinstance(value, (Tensor, int, float, str, tuple, frozenset, torch.dtype))
    }


class OperatorConformance:
    """What every operator has to do; a subclass gives :meth:`make`."""

    # Products can be differentiated with respect to the vectors they are applied to.
    differentiable_in_x: ClassVar[bool] = True

    def make(self) -> Sequence[Case]:
        """Fresh ``(operator, dense reference)`` pairs."""
        raise NotImplementedError

    def gradients(self) -> Sequence[tuple[Callable[..., LinearOperator], tuple[Tensor, ...]]]:
        """Functions from float64 tensors to an operator, and tensors to check gradients at."""
        return []

    def square(self) -> Iterator[Case]:
        """The square cases."""
        return ((A, M) for A, M in self.make() if A.is_square)

    def invertible(self) -> Iterator[Case]:
        """The cases with a structural inverse."""
        return ((A, M) for A, M in self.square() if A.has_inverse)

    # ------------------------------------------------------------- products

    def test_there_are_cases(self) -> None:
        cases = self.make()
        assert cases
        for A, M in cases:
            assert isinstance(A, LinearOperator)
            assert A.shape == tuple(M.shape)
            assert M.dtype in (torch.float64, torch.complex128)
            assert A.space.dim == A.shape[1]
            assert A.out_space.dim == A.shape[0]
            assert repr(A).startswith(type(A).__name__)

    def test_dense_form(self) -> None:
        for A, M in self.make():
            dense = A.to_dense()
            assert dense.dtype == A.dtype
            assert dense.device == A.device
            assert_near(dense, M, A.dtype)

    @pytest.mark.parametrize("k", [0, 1, 2, 5, 33])
    def test_block(self, k: int) -> None:
        for A, M in self.make():
            X = draw(A.shape[1], k, like=A)
            Y = A @ X
            assert Y.dtype == A.dtype
            assert Y.device == A.device
            assert_near(Y, M @ wide(X), A.dtype)
            if k:
                assert torch.equal(A.matmat(X), Y)

    def test_vector_is_the_one_column_case(self) -> None:
        for A, M in self.make():
            x = draw(A.shape[1], like=A)
            assert_near(A @ x, M @ wide(x), A.dtype)
            assert_near(A.matvec(x), M @ wide(x), A.dtype)
            assert_near((A @ x.unsqueeze(1)).squeeze(1), A @ x, A.dtype)

    def test_block_equals_its_columns(self) -> None:
        for A, _ in self.make():
            X = draw(A.shape[1], 3, like=A)
            columns = torch.stack([A @ column for column in X.unbind(1)], dim=1)
            assert_near(A @ X, columns, A.dtype)

    def test_any_strides(self) -> None:
        for A, M in self.make():
            n = A.shape[1]
            strided = [
                draw(3, n, like=A).mT,
                draw(n, 6, like=A)[:, ::2],
                draw(2 * n, 3, like=A)[::2],
                draw(n, 1, like=A).expand(n, 3),
                draw(1, 3, like=A).expand(n, 3),
                draw(3, n, like=A).mH,
            ]
            for X in strided:
                assert_near(A @ X, M @ wide(X), A.dtype)
            assert_near(A @ strided[1][:, 0], M @ wide(strided[1][:, 0]), A.dtype)

    def test_adjoint_product(self) -> None:
        for A, M in self.make():
            for shape in [(A.shape[0],), (A.shape[0], 1), (A.shape[0], 4), (A.shape[0], 0)]:
                Y = draw(*shape, like=A)
                assert_near(A.rmatmat(Y), M.mH @ wide(Y), A.dtype)

    def test_adjoint_identity(self) -> None:
        for A, M in self.make():
            x, y = draw(A.shape[1], like=A), draw(A.shape[0], like=A, seed=1)
            left = A.out_space.inner(A @ x, y)
            right = A.space.inner(x, A.rmatmat(y))
            scale = float(M.abs().sum()) if M.numel() else 1.0
            assert_near(left, right, A.dtype, scale=scale)

    def test_products_change_nothing(self) -> None:
        for A, _ in self.make():
            before = state_of(A)
            X = draw(A.shape[1], 3, like=A)
            Y = draw(A.shape[0], 3, like=A)
            kept_x, kept_y = X.clone(), Y.clone()
            first, first_adjoint = A @ X, A.rmatmat(Y)
            again = (A @ X).clone()
            for result in (first, first_adjoint):
                if result.numel() and not result.requires_grad:
                    result.add_(1.0)  # a result belongs to the caller
            assert torch.equal(X, kept_x)
            assert torch.equal(Y, kept_y)
            assert torch.equal(A @ X, again)
            if A.has_inverse:  # neither does what is made from it
                A.solve(draw(A.shape[1], like=A))
                A.logdet()
            if A.is_square:
                shifted = 2 * A + 3 * Identity(A.shape[0])
                _ = shifted @ X
            assert torch.equal(A @ X, again)
            after = state_of(A)
            for name, value in before.items():
                same = (
                    torch.equal(after[name], value)
                    if isinstance(value, Tensor)
                    else (after[name] is value or after[name] == value)
                )
                assert same, f"{name} changed"

    def test_results_belong_to_the_caller(self) -> None:
        for A, M in self.square():
            diagonal = A.diagonal()
            if not diagonal.requires_grad:
                diagonal.zero_()
            assert_near(A.diagonal(), torch.diagonal(M), A.dtype)

    # ------------------------------------------------------ tags and algebra

    def test_tags_are_true(self) -> None:
        for A, M in self.make():
            assert_tags_true(A, M)

    def test_transposes(self) -> None:
        for A, M in self.make():
            for B, N in [(A.T, M.mT), (A.H, M.mH), (A.T.T, M), (A.H.H, M), (A.T.H, M.conj())]:
                self._check(B, N.resolve_conj())
            assert A.T.space.dim == A.shape[0]
            assert A.T.out_space.dim == A.shape[1]

    def test_row_vectors(self) -> None:
        for A, M in self.make():
            Y = draw(A.shape[0], 3, like=A)
            assert_near(Y.mT @ A, wide(Y).mT @ M, A.dtype)
            assert_near(Y[:, 0] @ A, wide(Y)[:, 0] @ M, A.dtype)

    def test_sums_and_multiples(self) -> None:
        for A, M in self.make():
            other = draw(*A.shape, like=A)
            B = FunctionOperator(
                lambda X, other=other: other @ X,
                A.shape,
                lambda Y, other=other: other.mH @ Y,
                dtype=A.dtype,
                device=A.device,
            )
            N = wide(other)
            half = torch.tensor(0.5, dtype=A.dtype, device=A.device)
            for result, dense in [
                (A + B, M + N),
                (B + A, M + N),
                (A - B, M - N),
                (A + Dense(other), M + N),
                (A + A, 2 * M),
                (A - A, 0 * M),
                (A - 3 * A + B, N - 2 * M),
                (-A, -M),
                (2.5 * A, 2.5 * M),
                (A * 2, 2 * M),
                (A / 4, M / 4),
                (half * A, M / 2),
                (np.float64(0.5) * A, M / 2),
                (0 * A, 0 * M),
                (1 * A, M),
                (2 * (0.25 * A), M / 2),
                (2 * (A + B), 2 * M + 2 * N),
            ]:
                self._check(result, dense, scale=10.0)
            if A.dtype.is_complex:
                self._check((1 + 2j) * A, (1 + 2j) * M)
            else:
                with pytest.raises(DtypeError, match="complex"):
                    _ = 2j * A

    def test_identities(self) -> None:
        for A, M in self.square():
            eye = torch.eye(len(M), dtype=M.dtype)
            self._check(A + 1e-1 * Identity(len(M)), M + 1e-1 * eye)
            self._check(2 * Identity(len(M)) - A, 2 * eye - M)
            self._check(A @ Identity(len(M)), M)
            self._check(Identity(len(M)) @ A, M)
            self._check(2 * Identity(len(M)) @ A, 2 * M)

    def test_compositions(self) -> None:
        for A, M in self.make():
            P = draw(3, A.shape[0], like=A)
            Q = draw(A.shape[1], 2, like=A)
            for result, dense in [
                (Dense(P) @ A, wide(P) @ M),
                (A @ Dense(Q), M @ wide(Q)),
                (A.H @ A, M.mH @ M),
                (A @ A.H, M @ M.mH),
                (Dense(P) @ (A @ Dense(Q)), wide(P) @ M @ wide(Q)),
                ((Dense(P) @ A) @ Dense(Q), wide(P) @ M @ wide(Q)),
            ]:
                self._check(result, dense)

    def test_congruence(self) -> None:
        for A, M in self.square():
            P = draw(3, A.shape[0], like=A)
            sandwich = Dense(P)
            result = sandwich @ A @ sandwich.H
            self._check(result, wide(P) @ M @ wide(P).mH)
            assert ("hermitian" in A.tags) == ("hermitian" in result.tags)

    def _check(self, A: LinearOperator, M: Tensor, scale: float = 1.0) -> None:
        """The operator is the dense matrix: entries, both products, shape, dtype and tags."""
        assert A.shape == tuple(M.shape)
        scale = max(scale, float(M.abs().max())) if M.numel() else scale
        assert_near(A.to_dense(), M, A.dtype, scale=scale)
        X, Y = draw(A.shape[1], 2, like=A), draw(A.shape[0], 2, like=A, seed=1)
        assert (A @ X).dtype == A.dtype
        n = math.sqrt(max(A.shape))
        assert_near(A @ X, M @ wide(X), A.dtype, scale=n * scale)
        assert_near(A.rmatmat(Y), M.mH @ wide(Y), A.dtype, scale=n * scale)
        assert_tags_true(A, M)

    # ------------------------------------------------------ what it knows

    def test_diagonal_and_trace(self) -> None:
        for A, M in self.make():
            if not A.is_square:
                with pytest.raises(ShapeError, match="square"):
                    A.diagonal()
                with pytest.raises(ShapeError, match="square"):
                    A.trace()
                continue
            assert A.diagonal().dtype == A.dtype
            assert_near(A.diagonal(), torch.diagonal(M), A.dtype)
            assert_near(A.trace(), torch.diagonal(M).sum(), A.dtype, scale=len(M))

    def test_columns(self) -> None:
        for A, M in self.make():
            index = torch.tensor([*reversed(range(A.shape[1])), 0])
            assert_near(A.columns(index), M[:, index], A.dtype)
            assert A.columns(index[:0]).shape == (A.shape[0], 0)
            with pytest.raises(ShapeError, match="columns"):
                A.columns(index + 1)

    def test_inverse(self) -> None:
        for A, _ in self.make():
            if not A.is_square:
                with pytest.raises(ShapeError, match="square"):
                    A.inverse()
            elif not A.has_inverse:
                with pytest.raises(StructureError, match="woodbury.inverse"):
                    A.inverse()
        for A, M in self.invertible():
            inverse, reference = A.inverse(), torch.linalg.inv(M)
            assert inverse.dtype == A.dtype
            self._check(inverse, reference)
            b = draw(len(M), like=A)
            assert_near(A.solve(b), reference @ wide(b), A.dtype)
            assert_near(A @ A.solve(b), wide(b), A.dtype)

    def test_inverses_of_what_is_made_from_it(self) -> None:
        for A, M in self.invertible():
            for B, N in [
                (A.T, M.mT),
                (A.H, M.mH),
                (2.0 * A, 2.0 * M),
                (A @ A, M @ M),
                (A.inverse(), torch.linalg.inv(M)),
            ]:
                assert B.has_inverse
                self._check(B.inverse(), torch.linalg.inv(N))

    def test_logdet(self) -> None:
        for A, _ in self.make():
            if not A.is_square:
                with pytest.raises(ShapeError, match="square"):
                    A.logdet()
            elif not A.has_inverse:
                with pytest.raises(StructureError, match="log-determinant"):
                    A.logdet()
        for A, M in self.invertible():
            want = torch.linalg.slogdet(M).logabsdet
            assert not A.logdet().dtype.is_complex
            assert_near(A.logdet(), want, A.dtype, scale=len(M))
            assert_near(A.inverse().logdet(), -want, A.dtype, scale=len(M))
            assert_near(A.T.logdet(), want, A.dtype, scale=len(M))
            scaled = want + len(M) * math.log(3.0)
            assert_near((3 * A).logdet(), scaled, A.dtype, scale=len(M))

    def test_scipy_form(self) -> None:
        for A, M in self.make():
            if A.dtype == torch.bfloat16:
                with pytest.raises(DtypeError, match="bfloat16"):
                    A.to_scipy()
                continue
            form = A.to_scipy()
            X, Y = draw(A.shape[1], 2, like=A), draw(A.shape[0], 2, like=A)
            for got, want in [
                (form @ X.cpu().numpy(), M @ wide(X)),
                (form.matvec(X[:, 0].cpu().numpy()), M @ wide(X)[:, 0]),
                (form.rmatvec(Y[:, 0].cpu().numpy()), M.mH @ wide(Y)[:, 0]),
                (form.H @ Y.cpu().numpy(), M.mH @ wide(Y)),
            ]:
                assert got.dtype == form.dtype
                assert_near(torch.from_numpy(np.array(got)), want, A.dtype)

    # ------------------------------------------------------ what it refuses

    def test_wrong_shapes_are_refused(self) -> None:
        for A, _ in self.make():
            m, n = A.shape
            for shape in [(n + 1,), (n + 1, 2), (n, 2, 2), ()]:
                with pytest.raises(ShapeError, match="expected"):
                    _ = A @ draw(*shape, like=A)
            for shape in [(m + 1,), (m + 1, 2)]:
                with pytest.raises(ShapeError, match="expected"):
                    A.rmatmat(draw(*shape, like=A))
            with pytest.raises(ShapeError, match="block"):
                A.matmat(draw(n, like=A))
            with pytest.raises(ShapeError, match="vector"):
                A.matvec(draw(n, 1, like=A))
            with pytest.raises(ShapeError, match="cannot add"):
                _ = A + Dense(draw(m + 1, n, like=A))
            with pytest.raises(ShapeError, match="cannot multiply"):
                _ = A @ Dense(draw(n + 1, 2, like=A))

    def test_wrong_dtypes_and_devices_are_refused(self) -> None:
        for A, _ in self.make():
            x = draw(A.shape[1], like=A)
            other = torch.float32 if A.dtype != torch.float32 else torch.float64
            wrong = torch.zeros(A.shape[1], dtype=other)
            with pytest.raises(DtypeError, match=r"torch\."):
                _ = A @ wrong
            with pytest.raises(DtypeError, match="int64"):
                _ = A @ torch.ones(A.shape[1], dtype=torch.int64)
            with pytest.raises(DtypeError, match="cannot add"):
                _ = A + Dense(torch.zeros(A.shape, dtype=other))
            with pytest.raises(DtypeError, match="layout"):
                _ = A @ draw(A.shape[1], 2, like=A).to_sparse()
            with pytest.raises(DeviceError, match="meta"):
                _ = A @ x.to("meta")
            with pytest.raises(TypeError):
                _ = A @ x.tolist()
            with pytest.raises(TypeError):
                _ = A * x

    # ------------------------------------------------------ gradients

    def test_gradient_of_products_in_x(self) -> None:
        if not self.differentiable_in_x:
            pytest.skip("products of this operator carry no gradient for the vector")
        for A, M in self.make():
            if A.dtype not in (torch.float64, torch.complex128):
                continue
            X = draw(A.shape[1], 2, like=A).requires_grad_()
            G = draw(A.shape[0], 2, like=A, seed=1)
            (grad,) = torch.autograd.grad(A @ X, X, G)
            assert_near(grad, M.mH @ wide(G), A.dtype)
            Y = draw(A.shape[0], 2, like=A).requires_grad_()
            H = draw(A.shape[1], 2, like=A, seed=1)
            (grad,) = torch.autograd.grad(A.rmatmat(Y), Y, H)
            assert_near(grad, M @ wide(H), A.dtype)

    def test_gradient_of_products_in_what_it_holds(self) -> None:
        for build, tensors in self.gradients():
            inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)
            A = build(*inputs)
            X = draw(A.shape[1], 2, like=A).requires_grad_()
            Y = draw(A.shape[0], 2, like=A).requires_grad_()
            assert torch.autograd.gradcheck(lambda X, *t: build(*t) @ X, (X, *inputs))
            assert torch.autograd.gradcheck(lambda Y, *t: build(*t).rmatmat(Y), (Y, *inputs))
            assert torch.autograd.gradgradcheck(lambda X, *t: build(*t) @ X, (X, *inputs))
            if A.is_square:
                assert torch.autograd.gradcheck(lambda *t: build(*t).diagonal(), inputs)

    def test_gradient_of_inverses(self) -> None:
        for build, tensors in self.gradients():
            inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)
            A = build(*inputs)
            if not A.has_inverse:
                continue
            b = draw(A.shape[1], 2, like=A).requires_grad_()
            assert torch.autograd.gradcheck(lambda b, *t: build(*t).solve(b), (b, *inputs))

    def test_two_backward_passes(self) -> None:
        """Nothing kept from the first pass (a factor, a graph) is stale in the second."""
        for build, tensors in self.gradients():
            inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)
            A = build(*inputs)
            with torch.no_grad():
                _ = A @ draw(A.shape[1], like=A)
                if A.has_inverse:
                    A.solve(draw(A.shape[1], like=A))
            uses: list[Callable[[], Tensor]] = [lambda A=A: A @ draw(A.shape[1], like=A)]
            if A.has_inverse:
                uses.append(lambda A=A: A.solve(draw(A.shape[1], like=A)))
            for use in uses:
                first = torch.autograd.grad(use().abs().sum(), inputs, retain_graph=True)
                second = torch.autograd.grad(use().abs().sum(), inputs, retain_graph=True)
                for a, b in zip(first, second, strict=True):
                    assert torch.equal(a, b)
                    assert bool((a != 0).any())
