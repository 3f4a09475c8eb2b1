"""Cholesky factorisation of sparse matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, NotPositiveDefiniteError, SingularError, StructureError
from woodbury.operators.base import LinearOperator
from woodbury.operators.factorization import reciprocal_condition
from woodbury.operators.superlu import has_positive_pivots, superlu
from woodbury.solvers.direct import Direct, FactorState, wide
from woodbury.solvers.sparse_lu import frobenius, sparse_form, unwrapped

__all__ = ["SparseCholesky", "SparseCholeskyState"]

Backend = Literal["auto", "cholmod", "superlu"]


@dataclass(frozen=True, eq=False)
class SparseCholeskyState(FactorState):
    """A sparse factor, in double precision.

    Attributes:
        solve: ``B -> A^-1 B`` on NumPy arrays, by the factor.
        backend: ``"cholmod"`` or ``"superlu"``.
        rcond: reciprocal condition number in the 1-norm, estimated from above.
    """

    solve: Callable[[Any], Any]
    backend: str
    rcond: float


@dataclass(frozen=True)
class SparseCholesky(Direct):
    r"""Direct solve by $P A P^T = L L^H$ of a hermitian positive definite sparse matrix.

    By CHOLMOD where scikit-sparse is installed. Otherwise by SuperLU with pivots from the diagonal,
    in the order of $A + A^T$: $P A P^T = L U$ with $U = D L^H$, the same fill-reducing idea and
    the same proof of definiteness (all pivots positive), at about twice the memory. It is
    factorised in double precision whatever the operator's dtype, and the answer is refined against
    the operator's own products.

    ``info["backend"]`` says which; ``info["condition"]`` is the condition number in the 1-norm, an
    estimate that is hardly ever more than three times too small.

    Args:
        backend: ``"auto"``, ``"cholmod"`` or ``"superlu"``.

    Raises:
        StructureError: the operator is not sparse, or not on the CPU, or CHOLMOD is asked for and
            not installed.
        TagError: the operator is not tagged hermitian.
        NotPositiveDefiniteError: a pivot is not positive.
        SingularError: the matrix is singular to working precision.
        NonFiniteError: the matrix holds NaN or infinity.
        ArgumentError: the backend is unknown.

    Cost: the factorisation, whose multiplications and memory depend on the fill; then two sparse
    triangular solves and one or two products per column.

    Source: Chen, Davis, Hager and Rajamanickam, "Algorithm 887: CHOLMOD" (2008); Li, "An overview
    of SuperLU" (2005), 3.1.

    Example:
        >>> import scipy.sparse, torch
        >>> from woodbury import Sparse, SparseCholesky, solve
        >>> line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(4, 4))
        >>> A = Sparse(line, tags={"positive_definite"})
        >>> solve(A, torch.ones(4, dtype=torch.float64), SparseCholesky()).value.round(decimals=6)
        tensor([2., 3., 3., 2.], dtype=torch.float64)
    """

    backend: Backend = "auto"

    needs: ClassVar[tuple[str, ...]] = ("hermitian",)

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise ArgumentError(
                f"backend is {self.backend!r}; it must be one of {list(get_args(Backend))}"
            )

    def _prepare(self, A: LinearOperator) -> SparseCholeskyState:
        operator, flip = unwrapped(A, "SparseCholesky")
        matrix = sparse_form(operator)
        if flip == "T":  # of a hermitian matrix that is the conjugate
            matrix = matrix.conj()
        backend = self._chosen()
        n = A.shape[0]
        factor = _by_cholmod if backend == "cholmod" else _by_superlu
        solve = factor(matrix) if n else lambda B: B
        size = float(abs(matrix).sum(axis=0).max()) if n else 0.0
        like = torch.empty(n, 0, dtype=wide(A.dtype))
        rcond = reciprocal_condition(
            size, lambda B, adjoint: torch.from_numpy(solve(B.contiguous().numpy())), like
        )
        if not rcond > math.sqrt(n) * torch.finfo(torch.float64).eps:
            raise SingularError(
                "the sparse matrix is singular to working precision: reciprocal condition "
                f"{rcond:.1e}; add a multiple of the identity, or use MINRES()"
            )
        return SparseCholeskyState.of(
            self, A, norm=frobenius(matrix), solve=solve, backend=backend, rcond=rcond
        )

    def _chosen(self) -> str:
        if self.backend == "superlu":
            return "superlu"
        try:
            import sksparse.cholmod  # noqa: F401
        except ImportError as error:
            if self.backend == "auto":
                return "superlu"
            raise StructureError(
                "SparseCholesky(backend='cholmod') needs scikit-sparse (pip install scikit-sparse, "
                "with SuiteSparse); backend='superlu' does without"
            ) from error
        return "cholmod"

    def _apply(self, A: LinearOperator, state: SparseCholeskyState, B: Tensor) -> Tensor:
        block = B.to(wide(A.dtype)).resolve_conj().contiguous()
        return torch.from_numpy(state.solve(block.numpy())).to(B.dtype)

    def _info(self, state: Any) -> dict[str, Any]:
        return {"backend": state.backend, "condition": 1 / state.rcond}


def _by_superlu(matrix: Any) -> Callable[[Any], Any]:
    factor = superlu(matrix, symmetric=True)
    if not has_positive_pivots(factor):
        smallest = factor.U.diagonal().real.min()
        raise _not_definite(f"its smallest pivot is {smallest:.3g}")
    return lambda B: factor.solve(B)


def _by_cholmod(matrix: Any) -> Callable[[Any], Any]:
    from scipy.sparse import csc_matrix
    from sksparse import cholmod

    lower = csc_matrix(matrix)  # it wants the older kind
    try:
        if hasattr(cholmod, "cho_factor"):  # scikit-sparse 0.5
            factor = cholmod.cho_factor(lower)
            return lambda B: factor.solve(B)
        factor = cholmod.cholesky(lower)
    except cholmod.CholmodNotPositiveDefiniteError as error:
        raise _not_definite(str(error)) from error
    # Where it chose L D L^H, a negative pivot is no error to it.
    smallest = factor.D().real.min()
    if smallest <= 0:
        raise _not_definite(f"its smallest pivot is {smallest:.3g}")
    return lambda B: factor(B)


def _not_definite(why: str) -> NotPositiveDefiniteError:
    return NotPositiveDefiniteError(
        f"the sparse matrix has no Cholesky factor: {why}; add a multiple of the identity, or use "
        "SparseLU() or MINRES()"
    )
