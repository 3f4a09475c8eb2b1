"""Incomplete factorisations of sparse matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, NotPositiveDefiniteError, SingularError
from woodbury.operators.base import LinearOperator
from woodbury.operators.factorization import require_finite
from woodbury.operators.sparse import Sparse
from woodbury.solvers.level_zero import LevelZero
from woodbury.solvers.preconditioned import KrylovState
from woodbury.solvers.sor import split_products
from woodbury.solvers.stationary import Stationary
from woodbury.solvers.triangular import SparseTriangle, TriangularInverse, require_cpu

__all__ = ["IncompleteCholesky", "IncompleteCholeskyState", "IncompleteLU"]

Ordering = Literal["COLAMD", "MMD_AT_PLUS_A", "MMD_ATA", "NATURAL"]

# The first shift after a pivot that is not positive; each further one is twice as large.
_FIRST_SHIFT = 1e-3
_LARGEST_SHIFT = 1e3


@dataclass(frozen=True)
class IncompleteLU(Stationary):
    r"""$M = (\tilde L \tilde U)^{-1}$ with small entries of the factors dropped, by SuperLU.

    What it is made for is to precondition: ``GMRES(preconditioner=IncompleteLU())``. Used alone it
    is the iteration $x \leftarrow x + M (b - A x)$. $M$ is not hermitian, also where $A$ is: for
    :class:`CG` and :class:`MINRES` take :class:`IncompleteCholesky`.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 n``.
        sweeps: steps taken where it preconditions.
        drop: entries below this fraction of their column's norm are dropped, 0 to 1.
        fill: at most this many times the entries of $A$ are kept.
        ordering: of the columns, as of :func:`scipy.sparse.linalg.spilu`.

    Raises:
        SingularError: a pivot is zero.
        NonFiniteError: an entry is NaN or infinite.
        StructureError: a sparse operator is not on the CPU.
        ArgumentError: ``drop``, ``fill``, ``ordering`` or a limit makes no sense.

    Cost: one incomplete factorisation, in float64, and its memory: at most ``fill`` times the
    entries of $A$; then two sparse triangular solves per product. An operator that is not
    :class:`~woodbury.Sparse` is formed first, with ``n`` products.

    Source: Li and Shao, "A supernodal approach to incomplete LU factorization with partial
    pivoting" (2011).

    Example:
        >>> import scipy.sparse, torch
        >>> from woodbury import IncompleteLU, Sparse, solve
        >>> bands = [-1.5, 2.5, -0.5]
        >>> A = Sparse(scipy.sparse.diags_array(bands, offsets=[-1, 0, 1], shape=(50, 50)))
        >>> b = torch.ones(50, dtype=torch.float64)
        >>> solve(A, b, IncompleteLU()).ok
        True
    """

    drop: float = field(default=1e-4, kw_only=True)
    fill: float = field(default=10.0, kw_only=True)
    ordering: Ordering = field(default="COLAMD", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_fill(self.drop, self.fill)
        if self.ordering not in get_args(Ordering):
            known = list(get_args(Ordering))
            raise ArgumentError(f"ordering is {self.ordering!r}; it must be one of {known}")

    def _products(self, A: LinearOperator) -> int:
        return split_products(A)

    def _correction(self, A: LinearOperator) -> LinearOperator:
        from scipy.sparse.linalg import spilu

        matrix = _sparse_form(A, "IncompleteLU()")
        try:
            factor = spilu(
                matrix, drop_tol=self.drop, fill_factor=self.fill, permc_spec=self.ordering
            )
        except RuntimeError as error:
            raise SingularError(
                f"the incomplete factorisation of {type(A).__name__} met a zero pivot ({error}): "
                "lower drop, or add damping"
            ) from error
        found = _LUInverse(A, factor)
        ones = torch.ones(A.shape[0], 1, dtype=A.dtype)
        if not bool(torch.isfinite(found._matmat(ones)).all()):
            raise SingularError(
                f"the incomplete factors of {type(A).__name__} are singular to working precision: "
                "lower drop, or add damping"
            )
        return found


class _LUInverse(LinearOperator):
    """The two triangular solves of SuperLU's incomplete factors."""

    def __init__(self, like: LinearOperator, factor: Any) -> None:
        super().__init__(
            like.shape,
            dtype=like.dtype,
            device=like.device,
            space=like.out_space,
            out_space=like.space,
        )
        self._factor = factor
        self._dtype = torch.complex128 if like.dtype.is_complex else torch.float64

    def _matmat(self, X: Tensor) -> Tensor:
        return self._solve(X, "N")

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self._solve(Y, "H")

    def _solve(self, B: Tensor, trans: str) -> Tensor:
        right = B.detach().to(self._dtype).resolve_conj().resolve_neg().contiguous().cpu().numpy()
        return torch.from_numpy(self._factor.solve(right, trans=trans)).to(self.dtype)


@dataclass(frozen=True, eq=False)
class IncompleteCholeskyState(KrylovState):
    r"""The factor, inside the operator $M$.

    Attributes:
        shift: $\alpha$ of the matrix $A + \alpha \operatorname{diag}(A)$ that was factorised.
    """

    shift: float


@dataclass(frozen=True)
class IncompleteCholesky(Stationary):
    r"""$M = (\tilde L \tilde L^H)^{-1}$ with a sparse $\tilde L$, for hermitian matrices.

    Entries below the fraction ``drop`` of their column's norm are dropped, after an ordering that
    keeps fill low: SuperLU computes the incomplete $\tilde L \tilde U$ of the matrix scaled to a
    unit diagonal, without exchanges of rows, and $\tilde L$ and the pivots $d$ make
    $M = (\tilde L \operatorname{diag}(d) \tilde L^H)^{-1}$. With ``drop=None`` it is the factor of
    level 0 in the order given: $\tilde L$ has the pattern of the lower triangle of $A$, and
    $\tilde L \tilde L^H$ equals $A$ on it. It needs the least memory and more steps.

    An incomplete factor need not exist where $A$ is positive definite. When a pivot is not
    positive, $A + \alpha \operatorname{diag}(A)$ is factorised instead, with $\alpha = 10^{-3}$,
    doubled until it succeeds; ``state.shift`` tells. $M$ is always positive definite. Used alone
    the recipe is the iteration $x \leftarrow x + M (b - A x)$.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 n``.
        sweeps: steps taken where it preconditions.
        drop: threshold, above 0 and below 1; ``None`` for level 0.
        fill: with a threshold, at most this many times the entries of $A$ are kept.
        shift: $\alpha \ge 0$, used as it is; ``None`` to try as above.

    Raises:
        TagError: the operator is not tagged hermitian.
        NotPositiveDefiniteError: a diagonal entry is not positive, or a pivot for the ``shift``
            given; the message names the row.
        NonFiniteError: an entry is NaN or infinite.
        StructureError: a sparse operator is not on the CPU.
        ArgumentError: ``drop``, ``fill``, ``shift`` or a limit makes no sense.

    Cost: one incomplete LU, with its memory of at most ``fill`` times the entries of $A$; level 0:
    as many multiplications as there are pairs of entries in the columns of $\tilde L$ that meet
    the pattern (1.7 million for bcsstk16), and 12 bytes for each while they are done. In float64;
    then two sparse triangular solves per product. An operator that is not
    :class:`~woodbury.Sparse` is formed first, with ``n`` products.

    Source: Meijerink and van der Vorst, "An iterative solution method for linear systems of which
    the coefficient matrix is a symmetric M-matrix" (1977); Manteuffel, "An incomplete factorization
    technique for positive definite linear systems" (1980) for the shift; Lin and More, "Incomplete
    Cholesky factorizations with limited memory" (1999) for its first value.

    Example:
        >>> import scipy.sparse, torch
        >>> from woodbury import CG, IncompleteCholesky, Sparse, solve
        >>> line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(30, 30))
        >>> grid = scipy.sparse.kronsum(line, line)
        >>> A = Sparse(grid, tags={"positive_definite"})
        >>> b = torch.ones(900, dtype=torch.float64)
        >>> plain, helped = CG(rtol=1e-8), CG(rtol=1e-8, preconditioner=IncompleteCholesky())
        >>> solve(A, b, helped).steps < 0.2 * solve(A, b, plain).steps
        True
    """

    drop: float | None = field(default=1e-3, kw_only=True)
    fill: float = field(default=10.0, kw_only=True)
    shift: float | None = field(default=None, kw_only=True)

    needs: ClassVar[tuple[str, ...]] = ("hermitian",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_fill(0.5 if self.drop is None else self.drop, self.fill)
        if self.drop is not None and self.drop == 0:
            raise ArgumentError("drop is 0, which drops nothing: use SparseCholesky(), or drop > 0")
        if self.shift is not None and not 0 <= self.shift < math.inf:
            raise ArgumentError(f"shift is {self.shift}; it must be a number >= 0")

    def _prepare(self, A: LinearOperator) -> IncompleteCholeskyState:
        import numpy as np
        from scipy.sparse import diags_array

        matrix = _sparse_form(A, "IncompleteCholesky()")
        diagonal = matrix.diagonal()
        bad = ~(diagonal.real > 0)
        if bad.any():
            row = int(np.argmax(bad))
            raise NotPositiveDefiniteError(
                f"row {row} has the diagonal entry {diagonal.real[row]:.6g}, so the matrix is not "
                "positive definite and has no incomplete Cholesky factor: add damping, or use "
                "MINRES() or IncompleteLU()"
            )
        roots = np.sqrt(diagonal.real)
        scaling = diags_array(1 / roots)
        scaled = (scaling @ matrix @ scaling).tocsc()  # ones on the diagonal
        factorize = LevelZero(scaled).factorize if self.drop is None else self._threshold(scaled)
        shift = self.shift or 0.0
        while True:
            factor, failure = factorize(shift)
            if failure is None:
                break
            shift = self._next_shift(shift, failure)
        factor, order = factor if isinstance(factor, tuple) else (factor, None)
        roots = roots if order is None else roots[order]
        triangle = SparseTriangle((diags_array(roots) @ factor).astype(scaled.dtype))
        inverse = TriangularInverse(
            A,
            triangle,
            triangle,
            order=None if order is None else torch.from_numpy(order),
            tags={"positive_definite"},
        )
        return IncompleteCholeskyState.of(
            self, A, split_products(A), preconditioner=inverse, shift=shift
        )

    def _next_shift(self, shift: float, failure: tuple[int, float]) -> float:
        row, pivot = failure
        if self.shift is None and shift < _LARGEST_SHIFT:
            return max(_FIRST_SHIFT, 2 * shift)
        raise NotPositiveDefiniteError(
            f"the pivot of row {row} is {pivot:.3g} relative to its diagonal entry, with shift "
            f"{shift:.3g}: raise shift, or let shift=None find one"
        )

    def _threshold(self, scaled: Any) -> Any:
        """The incomplete factor by SuperLU, as a function of the shift."""
        import numpy as np
        from scipy.sparse import diags_array, eye_array
        from scipy.sparse.linalg import spilu

        def factorize(shift: float) -> tuple[Any, tuple[int, float] | None]:
            shifted = scaled + shift * eye_array(scaled.shape[0]) if shift else scaled
            try:
                found = spilu(
                    shifted.tocsc(),
                    drop_tol=self.drop,
                    fill_factor=self.fill,
                    permc_spec="MMD_AT_PLUS_A",
                    diag_pivot_thresh=0.0,
                    options={"SymmetricMode": True, "Equil": False},
                )
            except RuntimeError:  # a pivot is exactly zero; SuperLU does not say which
                return None, (-1, 0.0)
            order = np.argsort(found.perm_r)
            pivots = found.U.diagonal().real
            moved = found.perm_r != found.perm_c  # rows were exchanged: the diagonal was 0
            bad = ~(pivots > 0) | moved[order]
            if bad.any():
                first = int(np.argmax(bad))
                return None, (int(order[first]), float(pivots[first]))
            return (found.L @ diags_array(np.sqrt(pivots)), order), None

        return factorize


def _require_fill(drop: float, fill: float) -> None:
    if not 0 <= drop < 1:
        raise ArgumentError(f"drop is {drop}; it must be a fraction of at least 0 and below 1")
    if not 1 <= fill < math.inf:
        raise ArgumentError(f"fill is {fill}; it must be at least 1")


def _sparse_form(A: LinearOperator, what: str) -> Any:
    """The matrix as a SciPy CSC array in double precision."""
    from scipy.sparse import csc_array

    kind = "complex128" if A.dtype.is_complex else "float64"
    if isinstance(A, Sparse):
        require_cpu(A, what)
        require_finite(A.values, "the sparse matrix")
        return A.to_scipy_sparse().astype(kind).tocsc()
    dense = A.to_dense().detach().cpu()
    require_finite(dense, f"the matrix of {type(A).__name__}")
    wide = torch.complex128 if A.dtype.is_complex else torch.float64
    return csc_array(dense.to(wide).resolve_conj().numpy())
