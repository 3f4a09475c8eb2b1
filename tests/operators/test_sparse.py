from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from tests.conformance import OperatorConformance, wide

import woodbury.operators.sparse
from woodbury import Diagonal, Identity, Sparse
from woodbury.errors import (
    DtypeError,
    GradientError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    SingularError,
    TagError,
)
from woodbury.operators import Sum

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)


def sparse_coo(index, values, shape):
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=True)


def random_sparse(*shape, dtype=torch.float64):
    dense = torch.randn(*shape, dtype=dtype) * (torch.rand(*shape) < 0.5)
    if shape[0] == shape[1]:
        dense = dense + 3 * torch.eye(shape[0], dtype=dtype)
    return dense


def laplacian(n):
    return scipy.sparse.diags_array([-1.0, 2.1, -1.0], offsets=[-1, 0, 1], shape=(n, n))


class TestSparse(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            A, R = random_sparse(5, 5, dtype=dtype), random_sparse(3, 6, dtype=dtype)
            S = random_sparse(4, 4, dtype=dtype)
            S = S @ S.mH + torch.eye(4, dtype=dtype)
            S = (S + S.mH) / 2
            cases += [
                (Sparse(A.to_sparse()), A),
                (Sparse(scipy.sparse.csr_array(A.numpy())), A),
                (Sparse(R.to_sparse()), R),
                (Sparse(S.to_sparse(), tags={"positive_definite"}), S),
                (Sparse(torch.tril(A).to_sparse(), tags={"lower_triangular"}), torch.tril(A)),
            ]
        S = random_sparse(3, 3, dtype=torch.complex128)
        S = S + S.mT
        cases.append((Sparse(S.to_sparse(), tags={"symmetric"}), S))
        return [(A, wide(M)) for A, M in cases]

    def gradients(self):
        index = torch.tensor([[0, 0, 1, 2, 2], [0, 2, 1, 0, 2]])

        def build(values):
            return Sparse(sparse_coo(index, values, (3, 3)))

        return [(build, (torch.tensor([3.0, 1.0, 2.0, -1.0, 4.0], dtype=torch.float64),))]


class TestSparseWithoutMKL(TestSparse):
    """The same through SciPy's kernels, which serve where torch has none of its own."""

    @pytest.fixture(autouse=True)
    def without_mkl(self, monkeypatch):
        monkeypatch.setattr(woodbury.operators.sparse, "_MKL", False)


def test_indices_of_products_have_32_bits_on_the_cpu():
    A = Sparse(laplacian(6))
    x = torch.ones(6, dtype=torch.float64)
    assert (A @ x).tolist() == pytest.approx([1.1, 0.1, 0.1, 0.1, 0.1, 1.1])
    form = A._form(adjoint=False)
    if isinstance(form, torch.Tensor):
        assert form.crow_indices().dtype == form.col_indices().dtype == torch.int32
        assert form.values().data_ptr() == A.values.data_ptr()  # no second copy of the values
    else:
        assert form.indices.dtype == np.int32


@pytest.mark.parametrize("k", [24, 33])
def test_wide_blocks_of_a_matrix_with_many_entries(k):
    dense = random_sparse(160, 150)
    A = Sparse(dense.to_sparse())
    assert A.nnz > 10_000
    X, Y = torch.randn(150, k, dtype=torch.float64), torch.randn(160, k, dtype=torch.float64)
    torch.testing.assert_close(A @ X, dense @ X)
    torch.testing.assert_close(A.rmatmat(Y), dense.mT @ Y)
    torch.testing.assert_close(A @ X.mT.contiguous().mT, dense @ X)


@pytest.mark.parametrize("tag", ["symmetric", "hermitian"])
def test_the_adjoint_of_a_symmetric_matrix_is_no_second_copy(tag):
    M = random_sparse(6, 6, dtype=torch.complex128)
    M = M + (M.mT if tag == "symmetric" else M.mH)
    A = Sparse(M.to_sparse(), tags={tag})
    Y = torch.randn(6, 2, dtype=torch.complex128)
    torch.testing.assert_close(A.rmatmat(Y), M.mH @ Y)
    torch.testing.assert_close(A.H @ Y[:, 0], M.mH @ Y[:, 0])
    assert A._matrix_adjoint is None


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "lil", "dia", "bsr"])
def test_every_scipy_format(form):
    matrix = laplacian(6).asformat(form)
    A = Sparse(matrix)
    torch.testing.assert_close(A.to_dense(), torch.from_numpy(matrix.toarray()))
    assert A.dtype == torch.float64
    assert A.device.type == "cpu"


def test_old_scipy_matrices_and_torch_csr():
    dense = random_sparse(4, 4)
    torch.testing.assert_close(Sparse(scipy.sparse.csc_matrix(dense.numpy())).to_dense(), dense)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR tensors beta
        csr, csc = dense.to_sparse_csr(), dense.to_sparse_csc()
    torch.testing.assert_close(Sparse(csr).to_dense(), dense)
    torch.testing.assert_close(Sparse(csc).to_dense(), dense)


def test_entries_given_twice_are_added():
    matrix = sparse_coo([[0, 0, 1], [1, 1, 0]], [1.0, 2.0, 3.0], (2, 2))
    A = Sparse(matrix)
    assert A.nnz == 2
    assert A.to_dense().tolist() == [[0.0, 3.0], [3.0, 0.0]]
    twice = scipy.sparse.coo_array(([1.0, 2.0], ([0, 0], [1, 1])), shape=(2, 2))
    assert Sparse(twice).to_dense().tolist() == [[0.0, 3.0], [0.0, 0.0]]


def test_the_matrix_given_is_not_changed():
    matrix = scipy.sparse.csr_array(np.array([[0.0, 1.0], [1.0, 0.0]]))
    A = 2 * Sparse(matrix) + Identity(2)
    A.solve(torch.ones(2, dtype=torch.float64))
    assert matrix.toarray().tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_sums_with_sparse_and_diagonal_stay_sparse():
    M, N = random_sparse(5, 5), random_sparse(5, 5)
    A, B = Sparse(M.to_sparse()), Sparse(N.to_sparse())
    d = torch.rand(5, dtype=torch.float64)
    total = A + 2 * B - Diagonal(d) + 0.5 * Identity(5)
    assert isinstance(total, Sparse)
    want = M + 2 * N - torch.diag(d) + 0.5 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(total.to_dense(), want)
    assert total.nnz <= A.nnz + B.nnz + 5
    torch.testing.assert_close(total.inverse().to_dense(), torch.linalg.inv(want))
    rectangular = Sparse(random_sparse(2, 3).to_sparse())
    assert isinstance(rectangular + rectangular, Sparse)


def test_tags_of_a_damped_laplacian():
    A = Sparse(laplacian(50), tags={"positive_definite"}) + 1e-2 * Identity(50)
    assert "positive_definite" in A.tags
    dense = A.to_dense()
    torch.testing.assert_close(A.logdet(), torch.logdet(dense))
    b = torch.randn(50, 3, dtype=torch.float64)
    torch.testing.assert_close(dense @ A.solve(b), b)


def test_a_large_one_is_never_dense():
    n = 100_000
    A = Sparse(laplacian(n), tags={"positive_definite"})
    b = torch.ones(n, dtype=torch.float64)
    x = A.solve(b)
    assert float((A @ x - b).norm() / b.norm()) < 1e-12
    assert A.diagonal().unique().tolist() == [2.1]
    # The determinant of a tridiagonal Toeplitz matrix: sinh((n + 1) t) / sinh(t), cosh(t) = 1.05.
    t = float(np.arccosh(1.05))
    want = (n + 1) * t - np.log(2 * np.sinh(t))
    torch.testing.assert_close(float(A.logdet()), float(want), rtol=1e-10, atol=0)


def test_float32_is_factorised_in_float64():
    n = 200
    matrix = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n))
    A = Sparse(matrix.astype(np.float32), tags={"positive_definite"})
    b = torch.randn(n)
    exact = torch.from_numpy(np.linalg.solve(matrix.toarray(), b.double().numpy()))
    got = A.solve(b)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact.float(), rtol=1e-6, atol=1e-5)


def test_what_cannot_be_factorised_says_why():
    with pytest.raises(SingularError, match="singular"):
        Sparse(scipy.sparse.csr_array(np.array([[1.0, 1.0], [1.0, 1.0]]))).inverse()
    with pytest.raises(SingularError, match="singular"):
        Sparse(sparse_coo([[0], [0]], [1.0], (2, 2))).logdet()
    nearly = scipy.sparse.csr_array(np.array([[1.0, 1.0], [1.0, 1.0 + 2e-16]]))
    with pytest.raises(SingularError, match="reciprocal condition|exactly singular"):
        Sparse(nearly).inverse()
    indefinite = np.array([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(NotPositiveDefiniteError, match="pivot that is not positive"):
        Sparse(scipy.sparse.csr_array(indefinite), tags={"positive_definite"}).inverse()
    with pytest.raises(NonFiniteError, match="nan"):
        Sparse(scipy.sparse.csr_array(np.array([[1.0, np.nan], [0.0, 1.0]]))).inverse()


def test_the_gradient_of_the_log_determinant_is_refused():
    values = torch.ones(2, requires_grad=True)
    A = Sparse(sparse_coo([[0, 1], [0, 1]], values, (2, 2)))
    with pytest.raises(GradientError, match="detach"):
        A.logdet()
    with torch.no_grad():
        assert A.logdet() == 0


def test_wrong_input_is_refused():
    with pytest.raises(DtypeError, match="use Dense"):
        Sparse(torch.eye(2))
    with pytest.raises(DtypeError, match="list"):
        Sparse([[1.0]])
    with pytest.raises(DtypeError, match="float16"):
        Sparse(torch.eye(2).to(torch.float16).to_sparse())
    with pytest.raises(DtypeError, match="int64"):
        Sparse(scipy.sparse.csr_array(np.eye(2, dtype=np.int64)))
    with pytest.raises(ShapeError, match=r"\[m, n\]"):
        Sparse(torch.ones(2, 2, 2).to_sparse())
    with pytest.raises(TagError, match="mirror image by 1"):
        Sparse(scipy.sparse.csr_array(np.array([[1.0, 1.0], [0.0, 1.0]])), tags={"symmetric"})
    with pytest.raises(TagError, match="other side"):
        Sparse(
            scipy.sparse.csr_array(np.array([[1.0, 1.0], [0.0, 1.0]])), tags={"lower_triangular"}
        )


def test_empty_pattern():
    A = Sparse(sparse_coo(torch.zeros(2, 0, dtype=torch.long), [], (3, 3)), tags={"symmetric"})
    assert (A @ torch.ones(3)).tolist() == [0.0, 0.0, 0.0]
    assert isinstance(A + Identity(3), Sparse)
    assert not isinstance(A + Identity(3), Sum)
