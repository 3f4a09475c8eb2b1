"""LU factorisation of sparse matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, SingularError, StructureError
from woodbury.operators.base import LinearOperator
from woodbury.operators.factorization import require_finite
from woodbury.operators.sparse import Sparse
from woodbury.operators.superlu import Ordering, sparse_condition, superlu
from woodbury.operators.transpose import Adjoint, Transpose
from woodbury.solvers.direct import Direct, FactorState, wide
from woodbury.solvers.recipe import State

__all__ = ["SparseLU", "SparseLUState", "frobenius", "sparse_form", "unwrapped"]

# What is solved with when the matrix at hand is: itself, its transpose, adjoint, or conjugate.
_ADJOINT = {"N": "H", "H": "N", "T": "C", "C": "T"}


@dataclass(frozen=True, eq=False)
class SparseLUState(FactorState):
    """SuperLU's factors of ``P A Q = L U``, in double precision.

    Attributes:
        factor: SciPy's object.
        flip: what of the factorised matrix is solved with: ``"N"`` the matrix, ``"T"`` its
            transpose, ``"H"`` its adjoint, ``"C"`` its conjugate.
        rcond: reciprocal condition number in the 1-norm, estimated from above.
        fill: entries of the factors for each entry of the matrix.
    """

    factor: Any
    flip: str
    rcond: float
    fill: float


@dataclass(frozen=True)
class SparseLU(Direct):
    r"""Direct solve by $P A Q = L U$ of a :class:`~woodbury.Sparse` matrix, by SuperLU.

    The columns are ordered for little fill, the rows exchanged for stability; where the matrix is
    tagged positive definite, in the order of $A + A^T$ and without exchanges. It is factorised in
    double precision whatever the operator's dtype, and the answer is refined against the operator's
    own products. ``A.T`` and ``A.H`` are solved with by the same factors.

    ``info["condition"]`` is the condition number in the 1-norm, an estimate that is hardly ever
    more than three times too small; ``info["fill"]`` the entries of the factors for each of ``A``.

    Args:
        ordering: ``"COLAMD"``, ``"MMD_AT_PLUS_A"``, ``"MMD_ATA"`` or ``"NATURAL"``; default
            ``"MMD_AT_PLUS_A"`` for positive definite matrices and ``"COLAMD"`` for others.
        pivot_threshold: a diagonal entry is taken as pivot where it is at least that fraction of
            the largest of its column: 1 is partial pivoting, less trades stability for fill.

    Raises:
        StructureError: the operator is not sparse, or not on the CPU.
        SingularError: the matrix is singular to working precision.
        NonFiniteError: the matrix holds NaN or infinity.
        ArgumentError: an ordering or threshold makes no sense.

    Cost: the factorisation, whose multiplications and memory depend on the fill; then two sparse
    triangular solves and one or two products per column.

    Source: Demmel, Eisenstat, Gilbert, Li and Liu, "A supernodal approach to sparse partial
    pivoting" (1999).

    Example:
        >>> import scipy.sparse, torch
        >>> from woodbury import Sparse, SparseLU, solve
        >>> bands = scipy.sparse.diags_array([-1.0, 3.0, 1.0], offsets=[-1, 0, 1], shape=(4, 4))
        >>> solution = solve(Sparse(bands), torch.ones(4, dtype=torch.float64), SparseLU())
        >>> solution.status.name, solution.info["condition"] < 5
        ('converged', True)
    """

    ordering: Ordering | None = None
    pivot_threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.ordering is not None and self.ordering not in get_args(Ordering):
            raise ArgumentError(
                f"ordering is {self.ordering!r}; it must be one of {list(get_args(Ordering))}"
            )
        if not 0 <= self.pivot_threshold <= 1:
            raise ArgumentError(f"pivot_threshold is {self.pivot_threshold}; it must be in [0, 1]")

    def _prepare(self, A: LinearOperator) -> SparseLUState:
        operator, flip = unwrapped(A, "SparseLU")
        matrix = sparse_form(operator)
        factor = superlu(
            matrix,
            symmetric="positive_definite" in A.tags,
            ordering=self.ordering,
            pivot_threshold=self.pivot_threshold,
        )
        rcond = sparse_condition(matrix, factor)
        if not rcond >= torch.finfo(torch.float64).eps:
            raise SingularError(
                "the sparse matrix is singular to working precision: reciprocal condition "
                f"{rcond:.1e}; add a multiple of the identity, or use LSMR() for the solution of "
                "smallest norm"
            )
        return SparseLUState.of(
            self,
            A,
            norm=frobenius(matrix),
            factor=factor,
            flip=flip,
            rcond=rcond,
            fill=factor.nnz / max(1, matrix.nnz),
        )

    def adjoint_state(self, A: LinearOperator, state: State) -> State:
        """The same factors, to be used for ``A.H``."""
        assert isinstance(state, SparseLUState)  # made by _prepare
        return replace(state, shape=A.H.shape, flip=_ADJOINT[state.flip])

    def _apply(self, A: LinearOperator, state: SparseLUState, B: Tensor) -> Tensor:
        block = B.to(wide(A.dtype)).resolve_conj().contiguous()
        if state.flip == "C":
            found = state.factor.solve(block.conj().resolve_conj().numpy()).conj()
        else:
            found = state.factor.solve(block.numpy(), trans=state.flip)
        return torch.from_numpy(found).to(B.dtype)

    def _info(self, state: Any) -> dict[str, Any]:
        return {"condition": 1 / state.rcond, "fill": state.fill}


def unwrapped(A: LinearOperator, what: str) -> tuple[Sparse, str]:
    """The sparse matrix that ``A`` is, or is a transpose of, and which."""
    flip = "N"
    inner = A
    if isinstance(A, Transpose):
        inner, flip = A.operator, "T"
    elif isinstance(A, Adjoint):
        inner, flip = A.operator, "H"
    if not isinstance(inner, Sparse):
        raise StructureError(
            f"{what} factorises Sparse operators, this one is {type(A).__name__}: make it one with "
            "Sparse(matrix) if its matrix is sparse, or use LU(), Cholesky() or an iterative recipe"
        )
    if inner.device.type != "cpu":
        raise StructureError(
            f"{what} runs on the CPU, this operator is on {A.device}; make it there, or use an "
            "iterative recipe"
        )
    return inner, flip


def sparse_form(operator: Sparse) -> Any:
    """The matrix as a SciPy CSC array in double precision.

    Raises:
        NonFiniteError: an entry is NaN or infinite.
    """
    require_finite(operator.values, "the sparse matrix")
    kind = "complex128" if operator.dtype.is_complex else "float64"
    return operator.to_scipy_sparse().astype(kind).tocsc()


def frobenius(matrix: Any) -> float:
    """The Frobenius norm of a SciPy sparse array."""
    return float(torch.linalg.vector_norm(torch.from_numpy(matrix.data)))
