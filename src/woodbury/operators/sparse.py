"""A sparse matrix."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import DtypeError, ShapeError, StructureError, TagError
from woodbury.operators.base import LinearOperator
from woodbury.operators.diagonal import Diagonal
from woodbury.operators.identity import multiple_of_identity
from woodbury.operators.parts import transforms_active
from woodbury.operators.tags import scaled_tags, sum_tags
from woodbury.spaces import Space

__all__ = ["Sparse"]

# Without MKL torch has no CSR product on some platforms, and a slow one on others.
_MKL = torch.backends.mkl.is_available()
# Entries from which on a product is bound by its reads from memory.
_MANY = 10_000
_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class Sparse(LinearOperator):
    r"""A sparse matrix, kept by rows (CSR).

    Products run in torch's CSR kernels, on the CPU with indices of 32 bits: those of MKL read them
    as they are, and a product is bound by what it reads. Complex products on the CPU, and all where
    torch was built without MKL, run in SciPy, which is then the faster. They can be differentiated
    with respect to the stored values.

    Sums with sparse and diagonal matrices are sparse again, so ``A + c * Identity(n)`` has the
    structural inverse.

    Args:
        matrix: a torch tensor of a sparse layout, or any SciPy sparse matrix or array. A SciPy
            matrix is placed on the CPU.
        tags: names from :data:`woodbury.operators.TAGS`; ``symmetric``, ``hermitian``, ``diagonal``
            and triangular ones are verified (one pass over the stored entries).
        space: :class:`~woodbury.Space` of the vectors ``x`` in ``A @ x``.

    Raises:
        ShapeError: the matrix is not two-dimensional.
        DtypeError: a dense tensor, or a dtype other than float32, float64, complex64, complex128.
        TagError: a tag is not true of the matrix.

    Cost: a product with ``k`` columns is ``nnz k`` multiplications. The first adjoint product of a
    matrix that is neither tagged symmetric nor hermitian keeps a second copy of it. The inverse is
    one sparse LU factorisation (SuperLU, in float64, on the CPU only) whose memory is the fill-in.

    Example:
        >>> import scipy.sparse, torch
        >>> from woodbury import Sparse
        >>> bands = [-1.0, 2.0, -1.0]
        >>> laplacian = scipy.sparse.diags_array(bands, offsets=[-1, 0, 1], shape=(3, 3))
        >>> A = Sparse(laplacian, tags={"positive_definite"})
        >>> A.solve(torch.ones(3, dtype=torch.float64))
        tensor([1.5000, 2.0000, 1.5000], dtype=torch.float64)
    """

    _made_of = ("values", "rows", "column_indices")
    _forgets = ("_matrix", "_matrix_adjoint")

    def __init__(
        self, matrix: Any, *, tags: Iterable[str] = (), space: Space | None = None
    ) -> None:
        rows, columns, values, shape = _triplets(matrix)
        self._init(rows, columns, values, shape, tags, space)
        self._verify_tags()

    def _init(
        self,
        rows: Tensor,
        columns: Tensor,
        values: Tensor,
        shape: tuple[int, int],
        tags: Iterable[str],
        space: Space | None,
    ) -> None:
        if values.dtype not in _DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise DtypeError(f"the matrix is {values.dtype}; a sparse one needs one of {names}")
        LinearOperator.__init__(
            self, shape, dtype=values.dtype, device=values.device, tags=tags, space=space
        )
        self.rows, self.column_indices, self.values = rows, columns, values
        self._matrix: Any = None
        self._matrix_adjoint: Any = None

    def _of(self, values: Tensor, tags: Iterable[str]) -> Sparse:
        """The same pattern with other values."""
        result = Sparse.__new__(Sparse)
        result._init(self.rows, self.column_indices, values, self.shape, tags, self.space)
        return result

    def _verify_tags(self) -> None:
        values = self.values.detach()
        if values.numel() == 0:
            return
        tolerance = torch.finfo(self.dtype).eps ** 0.75 * values.abs().max()
        for tag, wrong in (
            ("lower_triangular", self.rows < self.column_indices),
            ("upper_triangular", self.rows > self.column_indices),
        ):
            if tag in self.tags and bool((values[wrong] != 0).any()):
                raise TagError(f"tagged {tag}, but there are entries on the other side")
        for tag, flipped in (("symmetric", values), ("hermitian", values.conj())):
            if tag in self.tags:
                rows = torch.cat([self.rows, self.column_indices])
                columns = torch.cat([self.column_indices, self.rows])
                _, _, gap = _coalesced(rows, columns, torch.cat([values, -flipped]), self.shape)
                if bool((gap.abs() > tolerance).any()):
                    raise TagError(
                        f"tagged {tag}, but an entry differs from its mirror image by "
                        f"{gap.abs().max().item():.3g}; drop the tag, or make it true first"
                    )

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return self.values.shape[0]

    def _matmat(self, X: Tensor) -> Tensor:
        return self._product_with_gradient(X, adjoint=False)

    def _matvec(self, x: Tensor) -> Tensor:
        form = self._matrix
        if isinstance(form, Tensor) and not torch.is_grad_enabled():
            return torch.mv(form, x)  # with nothing around it, for iterations on small matrices
        return self._product_with_gradient(x, adjoint=False)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self._product_with_gradient(Y, adjoint=True)

    def _product_with_gradient(self, X: Tensor, *, adjoint: bool) -> Tensor:
        if transforms_active():
            return self._gathered_product(X, adjoint=adjoint)
        if torch.is_grad_enabled() and (X.requires_grad or self.values.requires_grad):
            result = _SparseProduct.apply(self.values, X, self, adjoint)
            assert isinstance(result, Tensor)
            return result
        return self._raw_product(X, adjoint=adjoint)

    def _gathered_product(self, X: Tensor, *, adjoint: bool) -> Tensor:
        """By plain tensor operations, which torch.func can transform."""
        outer, inner, values = self.rows, self.column_indices, self.values
        if adjoint:
            outer, inner, values = inner, outer, values.conj()
        scaled = (values if X.dim() == 1 else values.unsqueeze(1)) * X[inner]
        size = self.shape[1] if adjoint else self.shape[0]
        nothing = torch.zeros(size, *X.shape[1:], dtype=self.dtype, device=self.device)
        return nothing.index_add(0, outer, scaled)

    def _raw_product(self, X: Tensor, *, adjoint: bool) -> Tensor:
        if adjoint and "hermitian" in self.tags:
            adjoint = False
        if adjoint and "symmetric" in self.tags:
            return self._raw_product(X.conj().resolve_conj(), adjoint=False).conj().resolve_conj()
        form = self._form(adjoint=adjoint)
        if isinstance(form, Tensor):
            if X.dim() == 1:
                return torch.mv(form, X)
            if X.shape[1] == 1:  # one vector has a kernel of its own, twice as fast
                return torch.mv(form, X[:, 0]).unsqueeze(1)
            if self.device.type != "cpu" or X.shape[1] < 24 or self.nnz < _MANY:
                return form @ X
            # As many columns as the caches hold: up to a quarter faster than all at once.
            return torch.cat([form @ part for part in X.split(16, dim=1)], dim=1)
        block = X.detach().resolve_conj().resolve_neg().numpy()
        if X.dim() == 2 and X.shape[1] == 1:
            return torch.from_numpy(form @ block[:, 0]).unsqueeze(1)
        return torch.from_numpy(form @ block)

    def _form(self, *, adjoint: bool) -> Any:
        """``A`` or ``A^H`` as what multiplies fastest: a CSR tensor, or a SciPy matrix."""
        kept = self._matrix_adjoint if adjoint else self._matrix
        if kept is None:
            on_cpu = self.device.type == "cpu"
            if not on_cpu or (_MKL and self._is_short and not self.dtype.is_complex):
                kept = self._torch_form(adjoint=adjoint)
            else:
                kept = self.to_scipy_sparse()
                if adjoint:
                    kept = kept.conj().T if self.dtype.is_complex else kept.T
            if adjoint:
                self._matrix_adjoint = kept
            else:
                self._matrix = kept
        return kept

    @property
    def _is_short(self) -> bool:
        """Whether indices of 32 bits will do: half the memory to read in every product."""
        return max(*self.shape, self.nnz) < 2**31

    def _torch_form(self, *, adjoint: bool) -> Tensor:
        rows, columns, values = self.rows, self.column_indices, self.values.detach()
        shape = self.shape
        if adjoint:
            order = torch.argsort(columns, stable=True)
            rows, columns, values = columns[order], rows[order], values.conj()[order]
            shape = shape[1], shape[0]
        starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=self.device)
        starts[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
        if self._is_short:
            starts, columns = starts.int(), columns.int()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                starts,
                columns,
                values.resolve_conj().resolve_neg(),
                size=shape,
                check_invariants=False,
            )

    def to_scipy_sparse(self) -> Any:
        """The matrix as a SciPy CSR array; on the CPU it shares the values."""
        from scipy.sparse import csr_array

        starts = torch.zeros(self.shape[0] + 1, dtype=torch.int64)
        starts[1:] = torch.bincount(self.rows.cpu(), minlength=self.shape[0]).cumsum(0)
        values = self.values.detach().cpu().resolve_conj().resolve_neg().numpy()
        columns, offsets = self.column_indices.cpu().numpy(), starts.numpy()
        if self._is_short:
            columns, offsets = columns.astype("int32"), offsets.astype("int32")
        return csr_array((values, columns, offsets), shape=self.shape)

    def _to_dense(self) -> Tensor:
        dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return dense.index_put((self.rows, self.column_indices), self.values)

    def _diagonal(self) -> Tensor:
        on = self.rows == self.column_indices
        diagonal = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        return diagonal.index_put((self.rows[on],), self.values[on])

    def _trace(self) -> Tensor:
        return self.values[self.rows == self.column_indices].sum()

    def _logdet(self) -> Tensor | None:
        return -self.inverse().logdet()

    def _has_inverse(self) -> bool:
        return self.is_square and self.device.type == "cpu"

    def _inverse(self) -> LinearOperator:
        from woodbury.operators.sparse_inverse import SparseInverse

        if self.device.type != "cpu":
            raise StructureError(
                f"the sparse LU factorisation runs on the CPU, this operator is on {self.device}; "
                "make it on the CPU, or use an iterative recipe: woodbury.inverse(A, recipe)"
            )
        return SparseInverse(self)

    def _scale(self, factor: complex | Tensor) -> LinearOperator:
        return self._of(factor * self.values, scaled_tags(self.tags, factor))

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        shift = multiple_of_identity(other)
        if isinstance(other, Sparse):
            added = other.rows, other.column_indices, other.values
        elif isinstance(other, Diagonal) or shift is not None:
            index = torch.arange(self.shape[0], device=self.device)
            added = index, index, other._diagonal()
        else:
            return None
        rows, columns, values = _coalesced(
            torch.cat([self.rows, added[0]]),
            torch.cat([self.column_indices, added[1]]),
            torch.cat([self.values, added[2]]),
            self.shape,
        )
        result = Sparse.__new__(Sparse)
        tags = sum_tags(self.tags, other.tags)
        result._init(rows, columns, values, self.shape, tags, self.space)
        return result


class _SparseProduct(torch.autograd.Function):
    """``A X`` or ``A^H X`` with gradients for the stored values and for ``X``, of any order."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, X: Tensor, operator: Sparse, adjoint: bool) -> Tensor:
        ctx.save_for_backward(values, X)
        ctx.operator, ctx.adjoint = operator, adjoint
        return operator._raw_product(X, adjoint=adjoint)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        values, X = ctx.saved_tensors
        operator = ctx.operator
        grad_X = grad_values = None
        if ctx.needs_input_grad[1]:
            grad_X = _SparseProduct.apply(values, G, operator, not ctx.adjoint)
        if ctx.needs_input_grad[0]:
            left, right = (X, G) if ctx.adjoint else (G, X)
            grad_values = entries(left, right, operator)
        return grad_values, grad_X, None, None


def entries(left: Tensor, right: Tensor, pattern: Sparse) -> Tensor:
    """The entries of ``left right^H`` where ``pattern`` has stored ones: ``[nnz]``."""
    products = left[pattern.rows] * right[pattern.column_indices].conj()
    return products if products.dim() == 1 else products.sum(1)


def _triplets(matrix: Any) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Rows, columns, values and shape, coalesced and sorted by rows."""
    if isinstance(matrix, Tensor):
        if matrix.layout == torch.strided:
            raise DtypeError("the matrix is a dense tensor; use Dense, or matrix.to_sparse()")
        if matrix.dim() != 2:
            raise ShapeError(f"the matrix has shape {tuple(matrix.shape)}, expected [m, n]")
        coo = matrix.to_sparse_coo().coalesce()
        rows, columns = coo.indices()
        return rows, columns, coo.values(), (matrix.shape[0], matrix.shape[1])
    import scipy.sparse

    if not scipy.sparse.issparse(matrix):
        raise DtypeError(f"matrix is {type(matrix).__name__}; give a sparse tensor or SciPy matrix")
    if len(matrix.shape) != 2:
        raise ShapeError(f"the matrix has shape {matrix.shape}, expected [m, n]")
    csr = matrix.tocsr(copy=True)
    csr.sum_duplicates()
    coo = csr.tocoo()
    rows = torch.from_numpy(coo.row.astype("int64"))
    columns = torch.from_numpy(coo.col.astype("int64"))
    return rows, columns, torch.from_numpy(coo.data), (matrix.shape[0], matrix.shape[1])


def _coalesced(
    rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries at the same place added up, sorted by rows."""
    keys, place = torch.unique(rows * shape[1] + columns, return_inverse=True)
    summed = torch.zeros(len(keys), dtype=values.dtype, device=values.device)
    return keys // shape[1], keys % shape[1], summed.index_add(0, place, values)
