"""``LinearOperator``: something you can multiply by, and its algebra."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from woodbury.errors import DeviceError, DtypeError, ShapeError, StructureError
from woodbury.operators.dtypes import real_dtype, require_dtype
from woodbury.operators.tags import Tags, close
from woodbury.spaces import Space, indexed_device

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

__all__ = ["LinearOperator"]

# Columns per product when a dense form is assembled, so that a block never exceeds 64 MiB.
_DENSE_BLOCK_BYTES = 64 * 2**20


class LinearOperator:
    r"""A linear map $A \in \mathbb{K}^{m \times n}$ known by its products.

    Operators are immutable and lazy: algebra builds new operators and multiplies nothing. A
    subclass gives ``_matmat`` (and ``_rmatmat`` unless it is hermitian); everything else follows,
    and a structured subclass overrides what it can answer without products.

    Hooks for subclasses (arguments are checked, of the operator's dtype and device, with at least
    one column, any strides; a result must not share memory with the argument):

    - ``_matmat(X)``: ``A @ X`` for ``X`` of shape ``[n, k]``. Required.
    - ``_matvec(x)``: ``A @ x`` for one vector ``[n]``, where that is faster than a block of one.
    - ``_rmatmat(Y)``: ``A^H @ Y`` for ``Y`` of shape ``[m, k]``. Default: ``_matmat`` if hermitian.
    - ``_to_dense()``, ``_diagonal()``: default by products, in blocks.
    - ``_trace()``, ``_logdet()``, ``_inverse()``, ``_transpose()`` (``A.T`` as an operator),
      ``_adjoint()`` (``A.H``, asked for complex dtypes only), ``_scale(c)``, ``_add(other)``,
      ``_compose(other)``: structural forms, ``None`` where there is none.
    - ``_has_inverse()``: whether ``_inverse()`` would give one, found without doing the work.
    - ``_columns(index)``: ``A[:, index]``; default by products with unit vectors.

    Args:
        shape: ``(m, n)``.
        dtype: dtype of products: float16, bfloat16, float32, float64, complex64 or complex128.
        device: device of products.
        tags: names from :data:`woodbury.operators.TAGS`, promised to hold; closed under
            implication.
        space: :class:`~woodbury.Space` of the vectors ``x`` in ``A @ x``; plain ``Space(n)`` if not
            given. Solvers reach inner products through it.
        out_space: space of the vectors ``A @ x``; default ``space`` for a square operator and plain
            ``Space(m)`` otherwise.

    Raises:
        TagError: unknown tags, or tags of square matrices on a rectangular operator.
        ShapeError: negative sizes or a space of another dimension than its side.
        DtypeError: a dtype not listed above.

    Example:
        >>> import torch
        >>> from woodbury import Dense, Identity
        >>> A = Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), tags={"positive_definite"})
        >>> (A + 0.5 * Identity(2)) @ torch.tensor([1.0, 0.0])
        tensor([2.5000, 1.0000])
        >>> A.T is A
        True
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    tags: Tags
    space: Space
    out_space: Space

    # What this operator was made from as ``A.T`` or ``A.H``, so that transposing twice gives ``A``.
    _transpose_of: LinearOperator | None = None
    _adjoint_of: LinearOperator | None = None

    # Attributes that hold all that products depend on: tensors, operators, tuples of either; None
    # where a class does not say. Said for the class itself, not for those derived from it.
    _made_of: ClassVar[tuple[str, ...] | None] = None
    # Attributes that are computed from those and must be None in a copy with others.
    _forgets: ClassVar[tuple[str, ...]] = ()

    # numpy must not try to broadcast ``array @ operator`` element by element.
    __array_ufunc__ = None

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        tags: Iterable[str] = (),
        space: Space | None = None,
        out_space: Space | None = None,
    ) -> None:
        rows, columns = (int(size) for size in shape)
        if rows < 0 or columns < 0:
            raise ShapeError(f"shape is {(rows, columns)}: sizes must not be negative")
        require_dtype(dtype)
        if space is not None and space.dim != columns:
            raise ShapeError(f"space has dimension {space.dim}, the operator {columns} columns")
        if out_space is not None and out_space.dim != rows:
            raise ShapeError(f"out_space has dimension {out_space.dim}, the operator {rows} rows")
        self.shape = (rows, columns)
        self.dtype = dtype
        self.device = indexed_device(device)
        self.tags = close(tags, complex_dtype=dtype.is_complex, square=rows == columns)
        self.space = Space(columns) if space is None else space
        if out_space is None:
            out_space = self.space if rows == columns else Space(rows)
        self.out_space = out_space

    # ------------------------------------------------------------------ hooks

    def _matmat(self, X: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define _matmat")

    def _matvec(self, x: Tensor) -> Tensor:
        return self._matmat(x.unsqueeze(1)).squeeze(1)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        if "hermitian" in self.tags:
            return self._matmat(Y)
        if "symmetric" in self.tags:
            return self._matmat(Y.conj().resolve_conj()).conj().resolve_conj()
        raise StructureError(
            f"{type(self).__name__} has no adjoint product: give one, or the tag 'symmetric' or "
            "'hermitian' if it equals its transpose"
        )

    def _block_width(self) -> int:
        """How many columns of the matrix make a block of reasonable size."""
        rows, columns = self.shape
        size = self.dtype.itemsize * max(rows, columns, 1)
        return max(1, min(columns, _DENSE_BLOCK_BYTES // size))

    def _to_dense(self) -> Tensor:
        columns, width = self.shape[1], self._block_width()
        if columns == 0:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        blocks = []
        for start in range(0, columns, width):
            stop = min(start + width, columns)
            block = torch.zeros(columns, stop - start, dtype=self.dtype, device=self.device)
            block[start:stop] = torch.eye(stop - start, dtype=self.dtype, device=self.device)
            blocks.append(self._matmat(block))
        return torch.cat(blocks, dim=1)

    def _diagonal(self) -> Tensor:
        if type(self)._to_dense is not LinearOperator._to_dense:
            return torch.diagonal(self._to_dense()).clone()
        index = torch.arange(self.shape[1], device=self.device)
        if len(index) == 0:
            return index.to(self.dtype)
        # One block of columns at a time is in memory.
        parts = index.split(self._block_width())
        return torch.cat([self._columns(part)[part].diagonal() for part in parts])

    def _trace(self) -> Tensor | None:
        return None

    def _logdet(self) -> Tensor | None:
        if "unitary" in self.tags:
            return torch.zeros((), dtype=real_dtype(self.dtype), device=self.device)
        return None

    def _has_inverse(self) -> bool:
        own = type(self)._inverse is not LinearOperator._inverse
        return own or "unitary" in self.tags

    def _inverse(self) -> LinearOperator | None:
        return self.H if "unitary" in self.tags else None

    def _columns(self, index: Tensor) -> Tensor:
        units = torch.zeros(self.shape[1], index.shape[0], dtype=self.dtype, device=self.device)
        units[index, torch.arange(index.shape[0], device=self.device)] = 1
        return self._matmat(units)

    def _transpose(self) -> LinearOperator | None:
        return None

    def _adjoint(self) -> LinearOperator | None:
        return None

    def _scale(self, scale: complex | Tensor) -> LinearOperator | None:
        return None

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        return None

    def _compose(self, other: LinearOperator) -> LinearOperator | None:
        return None

    # --------------------------------------------------------------- products

    def _checked(self, x: Tensor, size: int, side: str) -> Tensor:
        if not isinstance(x, Tensor):
            raise DtypeError(f"cannot multiply {type(self).__name__} with {type(x).__name__}")
        if x.dim() not in (1, 2) or x.shape[0] != size:
            raise ShapeError(
                f"operator of shape {self.shape} cannot be applied{side} to a tensor of shape "
                f"{tuple(x.shape)}; expected [{size}] or [{size}, k]"
            )
        if x.layout != torch.strided:
            raise DtypeError(f"the vector has layout {x.layout}; convert it with .to_dense()")
        if x.dtype != self.dtype:
            raise DtypeError(
                f"operator is {self.dtype}, the vector {x.dtype}; nothing is promoted silently: "
                f"convert the vector with .to({self.dtype}) or the operator where it was made"
            )
        if x.device != self.device:
            raise DeviceError(
                f"operator is on {self.device}, the vector on {x.device}; "
                f"move the vector with .to({str(self.device)!r})"
            )
        return x.resolve_conj().resolve_neg()

    def matmat(self, X: Tensor) -> Tensor:
        """``A @ X`` for a block ``[n, k]``; ``A @ X`` is the same and also takes ``[n]``."""
        if X.dim() != 2:
            raise ShapeError(f"matmat needs a block [n, k], got shape {tuple(X.shape)}")
        return self @ X

    def matvec(self, x: Tensor) -> Tensor:
        """``A @ x`` for one vector ``[n]``: the one-column case of :meth:`matmat`."""
        if x.dim() != 1:
            raise ShapeError(f"matvec needs a vector [n], got shape {tuple(x.shape)}")
        return self @ x

    def rmatmat(self, Y: Tensor) -> Tensor:
        """``A^H @ Y`` for ``Y`` of shape ``[m]`` or ``[m, k]``."""
        Y = self._checked(Y, self.shape[0], " (adjoint)")
        return _of_columns(self._rmatmat, Y, self.shape[1])

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, LinearOperator):
            from woodbury.operators.algebra import compose

            return compose(self, other)
        if not isinstance(other, Tensor):
            return NotImplemented
        x = self._checked(other, self.shape[1], "")
        if x.dim() == 1:
            return self._matvec(x)
        return _of_columns(self._matmat, x, self.shape[0])

    def __rmatmul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor):
            return NotImplemented
        # x^T A = (A^T x)^T
        if other.dim() == 1:
            return self.T @ other
        return (self.T @ other.mT).mT

    # ---------------------------------------------------------------- algebra

    @property
    def T(self) -> LinearOperator:
        """The transpose (not conjugated)."""
        from woodbury.operators.algebra import transpose

        return transpose(self)

    @property
    def H(self) -> LinearOperator:
        """The conjugate transpose; the same as ``A.T`` for a real dtype."""
        from woodbury.operators.algebra import adjoint

        return adjoint(self)

    def __add__(self, other: Any) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        from woodbury.operators.algebra import add

        return add(self, other)

    def __sub__(self, other: Any) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return self + (-1) * other

    def __neg__(self) -> LinearOperator:
        return (-1) * self

    def __mul__(self, other: Any) -> LinearOperator:
        if not _is_scalar(other):
            return NotImplemented
        from woodbury.operators.algebra import scale

        return scale(other, self)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> LinearOperator:
        if not _is_scalar(other):
            return NotImplemented
        return self * (1 / other)

    # ---------------------------------------------------------- what it knows

    @property
    def is_square(self) -> bool:
        """Whether ``m == n``."""
        return self.shape[0] == self.shape[1]

    def _require_square(self, what: str) -> None:
        if not self.is_square:
            raise ShapeError(f"{what} needs a square operator, this one is {self.shape}")

    @property
    def has_inverse(self) -> bool:
        """Whether :meth:`inverse` and :meth:`solve` have a structural form; nothing is computed."""
        return self.is_square and self._has_inverse()

    def columns(self, index: Tensor) -> Tensor:
        """The columns ``A[:, index]``, ``[m, k]``, for integer indices ``[k]``.

        Cost: ``k`` products unless the structure gives them.

        Raises:
            ShapeError: ``index`` is not one-dimensional or points outside the operator.
        """
        index = torch.as_tensor(index, device=self.device)
        n = self.shape[1]
        if index.dim() != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
            raise ShapeError(
                f"index has shape {tuple(index.shape)} and dtype {index.dtype}; "
                "expected integers [k]"
            )
        if index.numel() == 0:
            return torch.zeros(self.shape[0], 0, dtype=self.dtype, device=self.device)
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= n:
            raise ShapeError(f"index runs from {low} to {high}, the operator has {n} columns")
        return self._columns(index.long())

    def to_dense(self) -> Tensor:
        """The matrix ``[m, n]``; ``n`` products unless the structure gives it.

        It may be the tensor that the operator holds: do not change it in place.
        """
        return self._to_dense()

    def diagonal(self) -> Tensor:
        """The diagonal ``[n]`` of a square operator; ``n`` products unless structural."""
        self._require_square("diagonal()")
        return self._diagonal()

    def trace(self) -> Tensor:
        """The trace; the sum of :meth:`diagonal` unless the structure gives it directly."""
        self._require_square("trace()")
        trace = self._trace()
        return self._diagonal().sum() if trace is None else trace

    def logdet(self) -> Tensor:
        r"""$\log|\det A|$ where the structure gives it.

        Raises:
            StructureError: there is no structural form.
            SingularError: the operator is singular.
        """
        self._require_square("logdet()")
        value = self._logdet()
        if value is None:
            raise StructureError(
                f"{type(self).__name__} has no structural log-determinant; use "
                "Dense(A.to_dense()).logdet() where the matrix fits in memory"
            )
        return value

    def inverse(self) -> LinearOperator:
        """The inverse as an operator of the same kind of structure.

        Raises:
            StructureError: there is no structural inverse; ``woodbury.inverse(A, recipe)`` takes
                any recipe.
            SingularError: the operator is singular.
        """
        self._require_square("inverse()")
        value = self._inverse()
        if value is None:
            raise StructureError(
                f"{type(self).__name__} has no structural inverse; use woodbury.inverse(A, recipe)"
            )
        return value

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b`` for ``[n]`` or ``[n, k]`` by structure; see :meth:`inverse` for errors."""
        return self.inverse() @ b

    def to_scipy(self) -> ScipyLinearOperator:
        """The same map as a ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays (CPU copies)."""
        from woodbury.operators.scipy_form import scipy_form

        return scipy_form(self)

    def __repr__(self) -> str:
        tags = f", tags={{{', '.join(sorted(self.tags))}}}" if self.tags else ""
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}{tags})"


def _of_columns(apply: Callable[[Tensor], Tensor], X: Tensor, rows: int) -> Tensor:
    """The hook ``apply`` for ``[n]`` or ``[n, k]``; hooks never see an empty block."""
    if X.dim() == 1:
        return apply(X.unsqueeze(1)).squeeze(1)
    if X.shape[1] == 0:
        return X.new_zeros(rows, 0)
    return apply(X)


def _is_scalar(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    return isinstance(value, numbers.Complex)
