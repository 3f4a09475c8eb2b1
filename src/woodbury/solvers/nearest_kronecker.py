"""The nearest Kronecker product as a preconditioner."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, NotPositiveDefiniteError, ShapeError, SingularError
from woodbury.operators.base import LinearOperator
from woodbury.operators.dense import Dense
from woodbury.operators.factorization import require_finite
from woodbury.operators.kronecker import Kronecker
from woodbury.operators.shifted_kronecker import ShiftedKronecker
from woodbury.operators.sparse import Sparse
from woodbury.solvers.nystrom import split_shift
from woodbury.solvers.preconditioned import KrylovState
from woodbury.solvers.sor import split_products
from woodbury.solvers.stationary import Stationary

__all__ = ["NearestKronecker", "NearestKroneckerState"]

# The error of power iteration falls with the square of the gap; the fit needs few digits.
_POWER_STEPS = 100


@dataclass(frozen=True, eq=False)
class NearestKroneckerState(KrylovState):
    r"""The inverse, inside the operator $M$, and what it is the inverse of.

    Attributes:
        fit: $B \otimes C$, plus a multiple of the identity where the operator had one.
        error: $\|A - B \otimes C\|_F / \|A\|_F$ of what was fitted.
    """

    fit: LinearOperator
    error: float


@dataclass(frozen=True)
class NearestKronecker(Stationary):
    r"""$M = (B \otimes C)^{-1}$ with the nearest $B \otimes C$ to $A$ in the Frobenius norm.

    With $A$ cut into blocks $A_{ij}$ of size $q \times q$ the problem is to approximate the matrix
    with rows $\operatorname{vec}(A_{ij})$ by one of rank 1: its leading singular pair is
    $\operatorname{vec}(B)$ and $\operatorname{vec}(C)$. For hermitian positive definite $A$ the
    factors are so, too, and $M$ may precondition :class:`CG`. Where $A$ shows a multiple of the
    identity (``H + mu * Identity(n)``), $H$ is fitted and $M = (B \otimes C + \mu I)^{-1}$ inverted
    through eigendecompositions. Used alone the recipe is the iteration
    $x \leftarrow x + M (b - A x)$.

    Where the structure is known, no fit is needed: ``CG(preconditioner=P.inverse())`` takes any
    operator with an inverse, such as ``P = Kronecker(B, C) + mu * Identity(n)``.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 n``.
        sweeps: steps taken where it preconditions.
        sizes: ``(p, q)``, the sizes of $B$ and $C$, with $p q = n$.

    Raises:
        ShapeError: ``p q`` is not the size of the operator.
        NotPositiveDefiniteError: the operator is tagged positive definite and a factor is not.
        SingularError: a factor is singular to working precision.
        NonFiniteError: an entry is NaN or infinite.
        ArgumentError: ``sizes`` or a limit makes no sense.

    Cost: a sparse operator takes a few dozen products with a rearrangement of its entries; others
    are formed, with ``n`` products and $n^2$ numbers, and the singular pair takes about as many
    multiplications as 100 products. Then $p^3 + q^3$ to factorise, and $n (p + q)$ multiplications
    for each product with $M$.

    Source: Van Loan and Pitsianis, "Approximation with Kronecker products" (1993).

    Example:
        >>> import scipy.sparse, torch
        >>> from woodbury import CG, Jacobi, NearestKronecker, Sparse, solve
        >>> line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(20, 20))
        >>> mass = scipy.sparse.diags_array([1.0, 4.0, 1.0], offsets=[-1, 0, 1], shape=(20, 20))
        >>> matrix = scipy.sparse.kron(line, mass) + 0.01 * scipy.sparse.eye_array(400)
        >>> A, b = Sparse(matrix, tags={"positive_definite"}), torch.ones(400).double()
        >>> fitted = solve(A, b, CG(preconditioner=NearestKronecker(sizes=(20, 20))))
        >>> fitted.steps < solve(A, b, CG(preconditioner=Jacobi())).steps / 2
        True
    """

    sizes: tuple[int, int] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sizes) != 2 or min(self.sizes) < 1:
            raise ArgumentError(f"sizes are {self.sizes}; they must be two numbers of at least 1")
        object.__setattr__(self, "sizes", tuple(int(size) for size in self.sizes))

    def check(self, A: LinearOperator) -> None:
        """As for every recipe; the sizes must multiply to that of the operator."""
        super().check(A)
        if math.prod(self.sizes) != A.shape[0]:
            p, q = self.sizes
            raise ShapeError(
                f"sizes are {p} and {q}, whose product is {p * q}; the operator has size "
                f"{A.shape[0]}"
            )

    def _prepare(self, A: LinearOperator) -> NearestKroneckerState:
        H, shift = split_shift(A)
        left, right, error = _nearest(_rearranged(H, *self.sizes), *self.sizes)
        factors = _signed(left, right, H)
        fit: LinearOperator = Kronecker(*factors, space=A.space)
        if shift and "hermitian" in fit.tags:
            assert isinstance(fit, Kronecker)
            fit = ShiftedKronecker(fit, shift)
        return NearestKroneckerState.of(
            self,
            A,
            split_products(H),
            preconditioner=fit.inverse(),
            fit=fit,
            error=error,
        )


def _rearranged(A: LinearOperator, p: int, q: int) -> Any:
    """The matrix ``[p^2, q^2]`` with rows ``vec(A_ij)``, dense or as a SciPy array."""
    if isinstance(A, Sparse) and A.device.type == "cpu":
        from scipy.sparse import csr_array

        values = A.values.detach()
        require_finite(values, "the sparse matrix")
        outer = (A.rows // q) * p + A.column_indices // q
        inner = (A.rows % q) * q + A.column_indices % q
        wide = values.to(torch.complex128 if A.dtype.is_complex else torch.float64)
        return csr_array(
            (wide.resolve_conj().numpy(), (outer.numpy(), inner.numpy())), shape=(p * p, q * q)
        )
    dense = A.to_dense().detach()
    require_finite(dense, f"the matrix of {type(A).__name__}")
    wide = dense.to(torch.complex128 if A.dtype.is_complex else torch.float64)
    return wide.view(p, q, p, q).permute(0, 2, 1, 3).reshape(p * p, q * q)


def _nearest(R: Any, p: int, q: int) -> tuple[Tensor, Tensor, float]:
    """``B`` and ``C`` from the leading singular pair, by power iteration, and the error."""
    sparse = not isinstance(R, Tensor)
    dtype = torch.complex128 if (R.dtype.kind == "c" if sparse else R.is_complex()) else None

    def times(v: Tensor) -> Tensor:
        return torch.from_numpy(R @ v.numpy()) if sparse else R @ v

    def adjoint_times(u: Tensor) -> Tensor:
        return torch.from_numpy(R.conj().T @ u.numpy()) if sparse else R.mH @ u

    whole = float(abs(R).power(2).sum()) if sparse else float(R.abs().square().sum())
    # The identity: for a positive definite A the singular vector has a part along it.
    v = torch.eye(q, dtype=dtype or torch.float64, device=None if sparse else R.device).reshape(-1)
    if not times(v).abs().any():
        v = torch.ones_like(v)
    sigma, u = 0.0, v
    for _ in range(_POWER_STEPS):
        u = times(v / v.norm())
        if not float(u.norm()) > 0:
            raise SingularError("the operator is zero: there is no product to fit")
        v = adjoint_times(u / u.norm())
        last, sigma = sigma, float(v.norm())
        if sigma - last <= 1e-12 * sigma:
            break
    left, right = times(v / v.norm()), (v / v.norm()).conj()
    error = math.sqrt(max(0.0, 1 - float(left.norm()) ** 2 / whole))
    return left.view(p, p), right.view(q, q), error


def _signed(left: Tensor, right: Tensor, A: LinearOperator) -> list[Dense]:
    """The factors with the phase that makes them hermitian, tagged as they turn out to be."""
    phase = torch.trace(right)
    if abs(phase) > 0:
        turn = phase / abs(phase)
        left, right = left * turn, right / turn
    norms = math.sqrt(float(left.norm() * right.norm()))
    factors = []
    for name, factor in (("first", left), ("second", right)):
        matrix = factor / factor.norm() * norms
        tags: set[str] = set()
        if "hermitian" in A.tags:
            matrix = (matrix + matrix.mH) / 2
            tags.add("hermitian")
            smallest = float(torch.linalg.eigvalsh(matrix)[0])
            if smallest > 0:
                tags.add("positive_definite")
            elif "positive_definite" in A.tags:
                raise NotPositiveDefiniteError(
                    f"tagged positive definite, but the {name} factor of the nearest Kronecker "
                    f"product has the eigenvalue {smallest:.3g}: drop the tag, or add damping"
                )
        factors.append(Dense._derived(matrix.to(A.dtype), tags))
    return factors
