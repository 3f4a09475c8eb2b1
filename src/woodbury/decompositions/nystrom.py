"""The Nystrom approximation of a hermitian operator."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from woodbury.decompositions.lanczos_batch import require_hermitian
from woodbury.decompositions.nystrom_sketch import ColumnSketch, NystromSketch, RandomSketch
from woodbury.decompositions.orthonormal import orthonormalize
from woodbury.decompositions.partial import PartialEigen
from woodbury.decompositions.power import extreme_eigenvalues
from woodbury.errors import (
    ArgumentError,
    BudgetError,
    NotPositiveDefiniteError,
    RankError,
    SingularError,
)
from woodbury.operators.base import LinearOperator

if TYPE_CHECKING:
    from woodbury.spaces import Space

__all__ = ["NystromFactor", "NystromMethod", "nystrom"]

NystromMethod = Literal["gaussian", "column", "block_krylov"]

# Columns of one product: as many as fit into this, so that a block never exceeds it.
_BLOCK_BYTES = 256 * 2**20
# Lanczos steps of an estimate of the error.
_ESTIMATE_STEPS = 10


@dataclass(frozen=True, eq=False)
class NystromFactor:
    r"""$\hat A = U \Lambda U^H \approx A$.

    Attributes:
        basis: $U$, ``[n, r]``, orthonormal; ``r`` is at most the rank asked for, less where ``A``
            has no more.
        eigenvalues: $\Lambda$, ``[r]``, real, descending; positive but for the column method.
        space: where the vectors live.
        products: columns that ``A`` was multiplied by.
        error: estimate of $\|A - \hat A\|$, from above; ``None`` where no tolerance was given.

    Example:
        >>> import torch
        >>> from woodbury import LowRank
        >>> from woodbury.decompositions import nystrom
        >>> factor = nystrom(LowRank(torch.eye(6, 2, dtype=torch.float64)), rank=3)
        >>> factor.basis.shape, factor.eigenvalues.round(decimals=6)
        (torch.Size([6, 2]), tensor([1., 1.], dtype=torch.float64))
    """

    basis: Tensor
    eigenvalues: Tensor
    space: Space
    products: int
    error: float | None = None

    def operator(self) -> PartialEigen:
        r"""$\hat A$ as an operator."""
        return PartialEigen(self.basis, self.eigenvalues, 0.0, space=self.space)

    def inverse(self, damping: float) -> PartialEigen:
        r"""$(\hat A + \rho I)^{-1}$, equal to $I/\rho - U(\dots)U^H$ by the Woodbury identity.

        Raises:
            SingularError: $\hat A + \rho I$ has an eigenvalue that is zero to working precision.
        """
        n, rank = self.basis.shape
        values = self.eigenvalues + damping
        known = [damping] if rank < n else []
        known += values.abs().tolist()
        floor = torch.finfo(values.dtype).eps * max((abs(value) for value in known), default=0.0)
        if min(known, default=1.0) <= floor:
            raise SingularError(
                f"the approximation has rank {rank} of {n} and the damping is {damping:.3g}, so it "
                "has no inverse: give damping > 0, or solve with A + rho * Identity(n)"
            )
        rest = 1 / damping if rank < n else 0.0
        return PartialEigen(self.basis, values.reciprocal(), rest, space=self.space)

    def preconditioner(self, damping: float = 0.0) -> PartialEigen:
        r"""$(\lambda_r + \mu)\, U (\Lambda + \mu I)^{-1} U^H + I - U U^H$ for $A + \mu I$.

        Raises:
            NotPositiveDefiniteError: an eigenvalue of $\Lambda + \mu I$ is not positive.
        """
        shifted = self.eigenvalues + damping
        if shifted.numel() and shifted.amin().item() <= 0:
            raise NotPositiveDefiniteError(
                f"the approximation has the eigenvalue {shifted.amin().item():.3g} with damping "
                f"{damping:.3g}, so it cannot precondition; raise the damping"
            )
        last = shifted[-1:].clone()
        return PartialEigen(self.basis, last / shifted, 1.0, space=self.space)


def nystrom(
    A: LinearOperator,
    rank: int,
    *,
    method: NystromMethod = "gaussian",
    depth: int = 2,
    tolerance: float | None = None,
    max_rank: int | None = None,
    memory: int | None = None,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
) -> NystromFactor:
    r"""$\hat A = (A\Omega)\,(\Omega^H A\,\Omega)^{+}\,(A\Omega)^H$, as eigenpairs.

    ``"gaussian"``: $\Omega$ is an orthonormal basis of a Gaussian block $G$, and the stabilised
    form is used: everything is done for $A + \nu I$ with $\nu$ of the size of rounding, which is
    taken off the eigenvalues in the end. ``"block_krylov"``: the same for a basis of the Krylov
    space $[G, AG, \dots, A^{d-1}G]$, of which the ``rank`` leading eigenpairs are kept; for slowly
    decaying spectra a much better approximation of that rank, for ``depth`` times the products.
    ``"column"``: $\Omega$ picks columns uniformly without replacement; ``A`` may then be
    indefinite. In all of them directions in which the core $\Omega^H A\,\Omega$ is zero to
    rounding are dropped, so a rank below the one asked for is no failure.

    With a ``tolerance`` the rank is doubled, and what was multiplied already is kept, until an
    estimate of $\|A - \hat A\|$ is within it, or ``max_rank`` is reached. The estimate is the
    largest Ritz value of ten Lanczos steps with $A - \hat A$, plus its error bound.

    Args:
        A: hermitian operator ``[n, n]``, positive semidefinite but for the column method.
        rank: columns of the sketch, 1 to ``n``; the first ones where there is a ``tolerance``.
        method: ``"gaussian"``, ``"block_krylov"`` or ``"column"``.
        depth: $d$, for ``"block_krylov"``; 1 is the Gaussian method.
        tolerance: the target of $\|A - \hat A\|$, absolute, in the unit of ``A``. For a
            preconditioner of $A + \mu I$ a few $\mu$ are enough.
        max_rank: where the doubling ends; by default at ``n``, or where ``memory`` ends.
        memory: bytes that the blocks may take at the peak.
        chunk: columns in one product; default as many as fit into 256 MiB. It changes memory, not
            the result.
        generator: draws the sketch; the same one every time if not given.

    Returns:
        A :class:`NystromFactor`.

    Raises:
        RankError: ``rank`` is not between 1 and ``n``, or ``max_rank`` is less than ``rank``.
        TagError: ``A`` is not tagged hermitian.
        NotPositiveDefiniteError: the Gaussian method met $v^H A v < 0$ beyond rounding.
        NonFiniteError: a product is NaN or infinite.
        BudgetError: ``memory`` does not hold the blocks of the rank asked for.
        ArgumentError: ``method`` is unknown, ``tolerance`` is negative, ``chunk`` or ``depth`` is
            less than 1, or ``max_rank`` is given without ``tolerance``.

    Cost: ``rank`` products (times ``depth``), $O(n r^2)$ multiplications, memory of three blocks
    ``[n, rank]`` (times ``depth``) at the peak and one kept. With a tolerance ten products more at
    each rank, and five blocks at the peak.

    Source: Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-semidefinite
    matrix from streaming data" (2017), algorithm 3; Frangella, Tropp and Udell, "Randomized
    Nystrom preconditioning" (2023), algorithms 2.1 and E.2; Tropp and Webber, "Randomized
    algorithms for low-rank matrix approximation" (2023), and Musco and Musco, "Randomized block
    Krylov methods" (2015); Hataya and Yamada, "Nystrom method for accurate and scalable implicit
    differentiation" (2023) for the column form.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.decompositions import nystrom
        >>> A = Diagonal(torch.tensor([5.0, 3.0, 0.0, 0.0]), tags={"positive_semidefinite"})
        >>> nystrom(A, rank=3).eigenvalues[:2]
        tensor([5.0000, 3.0000])
        >>> B = Diagonal(2.0 ** -torch.arange(60), tags={"positive_semidefinite"})
        >>> nystrom(B, rank=4, tolerance=1e-3).basis.shape
        torch.Size([60, 16])
    """
    n = A.shape[0]
    require_hermitian(A, "nystrom")
    if not 1 <= rank <= n:
        raise RankError(f"rank is {rank}, the operator has size {n}: the rank must be 1 to {n}")
    check_options(rank, method, depth, tolerance, max_rank, memory, chunk)
    depth = depth if method == "block_krylov" else 1
    limit = _limit(A, rank, depth, tolerance, max_rank, memory)
    if chunk is None:
        chunk = max(1, _BLOCK_BYTES // (n * A.dtype.itemsize))
    sketch: NystromSketch
    if method == "column":
        sketch = ColumnSketch(A, chunk, generator)
    else:
        sketch = RandomSketch(A, chunk, generator, depth)
    sketch.grow(rank)
    if tolerance is None:
        return _factor(A, sketch, rank, indefinite=method == "column", last=True)
    spent = 0  # in estimates
    while True:
        factor = _factor(A, sketch, rank, indefinite=method == "column", last=False)
        residual = extreme_eigenvalues(
            _Difference(A, factor), _ESTIMATE_STEPS, generator=sketch.generator
        )
        spent += residual.products
        if residual.radius <= tolerance or rank == limit:
            return replace(factor, error=residual.radius, products=sketch.products + spent)
        more = min(rank, limit - rank)
        sketch.grow(more)
        rank += more


def check_options(
    rank: int,
    method: str,
    depth: int,
    tolerance: float | None,
    max_rank: int | None,
    memory: int | None,
    chunk: int | None,
) -> None:
    """Raise where an option of :func:`nystrom` makes no sense for any operator."""
    if method not in get_args(NystromMethod):
        raise ArgumentError(f"method is {method!r}; it must be one of {get_args(NystromMethod)}")
    for name, number in (("chunk", chunk), ("depth", depth), ("memory", memory)):
        if number is not None and number < 1:
            raise ArgumentError(f"{name} is {number}; it must be at least 1")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ArgumentError(f"tolerance is {tolerance}; it must be a number >= 0")
    if max_rank is None:
        return
    if tolerance is None:
        raise ArgumentError(
            f"max_rank is {max_rank}, but without tolerance the rank does not grow: give both"
        )
    if max_rank < rank:
        raise RankError(f"max_rank is {max_rank}, below the first rank {rank}")


def _limit(
    A: LinearOperator,
    rank: int,
    depth: int,
    tolerance: float | None,
    max_rank: int | None,
    memory: int | None,
) -> int:
    """The largest rank that the options allow."""
    n = A.shape[0]
    limit = n if max_rank is None else min(max_rank, n)
    if memory is None:
        return limit
    blocks = 3 if tolerance is None else 5
    column = blocks * n * depth * max(4, A.dtype.itemsize)
    if memory < rank * column:
        raise BudgetError(
            f"memory is {memory} bytes; the blocks of rank {rank} for {n} rows take "
            f"{rank * column}: allow that, or a rank up to {memory // column}"
        )
    return min(limit, memory // column)


class _Difference(LinearOperator):
    r"""$A - \hat A$ in the dtype of the work."""

    def __init__(self, A: LinearOperator, factor: NystromFactor) -> None:
        super().__init__(
            A.shape, dtype=factor.basis.dtype, device=A.device, tags={"hermitian"}, space=A.space
        )
        self.A, self.approximation = A, factor.operator()

    def _matmat(self, X: Tensor) -> Tensor:
        return (self.A @ X.to(self.A.dtype)).to(X.dtype) - self.approximation @ X


def _factor(
    A: LinearOperator, sketch: NystromSketch, rank: int, *, indefinite: bool, last: bool
) -> NystromFactor:
    Y, core, rounding = sketch.parts()
    B, signs = _root(Y, core, rounding, indefinite=indefinite)
    if last:
        del Y
        sketch.forget()
    basis, eigenvalues = _eigenpairs(B, signs, A.space)
    if not indefinite:
        eigenvalues = eigenvalues - rounding  # the shift
    kept = (eigenvalues.abs() > rounding).nonzero().squeeze(1)[:rank]  # below is only rounding
    return NystromFactor(basis[:, kept], eigenvalues[kept], A.space, sketch.products)


def _root(Y: Tensor, core: Tensor, noise: float, *, indefinite: bool) -> tuple[Tensor, Tensor]:
    """``B`` and signs ``s`` with ``Y core^+ Y^H = B diag(s) B^H``."""
    precise = core.to(torch.complex128 if core.is_complex() else torch.float64)
    values, vectors = torch.linalg.eigh((precise + precise.mH) / 2)
    if not indefinite and values.numel() and values[0].item() < -1000 * noise:
        raise NotPositiveDefiniteError(
            f"v^H A v / v^H v = {values[0].item():.3g} was found in the sketch: A is not positive "
            "semidefinite; add damping, use a Gauss-Newton matrix or method='column'"
        )
    kept = (values.abs() if indefinite else values) > noise
    values, vectors = values[kept], vectors[:, kept]
    B = Y @ (vectors / values.abs().sqrt()).to(Y.dtype)
    return B, torch.sign(values)


def _eigenpairs(B: Tensor, signs: Tensor, space: Space) -> tuple[Tensor, Tensor]:
    """Orthonormal ``U`` and descending ``v`` with ``B diag(signs) B^H = U diag(v) U^H``."""
    Q, R = orthonormalize(B, space)
    R = R.to(torch.complex128 if R.is_complex() else torch.float64)
    if bool((signs > 0).all()):
        U, singular, _ = torch.linalg.svd(R, full_matrices=False)
        values = singular.square()
    else:
        values, U = torch.linalg.eigh((R * signs) @ R.mH)
        values, U = values.flip(0), U.flip(1)
    real = Q.dtype.to_real() if Q.is_complex() else Q.dtype
    return Q @ U.to(Q.dtype), values.to(real)
