"""The Nystrom approximation of a hermitian operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from woodbury.decompositions.lanczos import draw
from woodbury.decompositions.orthonormal import orthonormalize
from woodbury.decompositions.partial import PartialEigen
from woodbury.errors import (
    ArgumentError,
    NonFiniteError,
    NotPositiveDefiniteError,
    RankError,
    SingularError,
    TagError,
)

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator
    from woodbury.spaces import Space

__all__ = ["NystromFactor", "NystromMethod", "nystrom"]

NystromMethod = Literal["gaussian", "column"]

# Columns of one product: as many as fit into this, so that a block never exceeds it.
_BLOCK_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class NystromFactor:
    r"""$\hat A = U \Lambda U^H \approx A$.

    Attributes:
        basis: $U$, ``[n, r]``, orthonormal; ``r`` is at most the rank asked for, less where ``A``
            has no more.
        eigenvalues: $\Lambda$, ``[r]``, real, descending; not negative for the Gaussian method.
        space: where the vectors live.
        products: columns that ``A`` was multiplied by.

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
    chunk: int | None = None,
    generator: torch.Generator | None = None,
) -> NystromFactor:
    r"""$\hat A = (A\Omega)\,(\Omega^H A\,\Omega)^{+}\,(A\Omega)^H$, as eigenpairs.

    ``"gaussian"``: $\Omega$ is an orthonormal basis of a Gaussian block, and the stabilised form is
    used: everything is done for $A + \nu I$ with $\nu$ of the size of rounding, which is taken off
    the eigenvalues in the end. ``"column"``: $\Omega$ picks columns uniformly without replacement;
    ``A`` may then be indefinite. Either way directions in which the core $\Omega^H A\,\Omega$ is
    zero to rounding are dropped, so a rank below the one asked for is no failure.

    Args:
        A: hermitian operator ``[n, n]``, positive semidefinite for the Gaussian method.
        rank: columns of the sketch, 1 to ``n``.
        method: ``"gaussian"`` or ``"column"``.
        chunk: columns in one product; default as many as fit into 256 MiB. It changes memory, not
            the result.
        generator: draws the sketch; the same one every time if not given.

    Returns:
        A :class:`NystromFactor`.

    Raises:
        RankError: ``rank`` is not between 1 and ``n``.
        TagError: ``A`` is not tagged hermitian.
        NotPositiveDefiniteError: the Gaussian method met $v^H A v < 0$ beyond rounding.
        NonFiniteError: a product is NaN or infinite.
        ArgumentError: ``method`` is unknown or ``chunk`` is less than 1.

    Cost: ``rank`` products, $O(n r^2)$ multiplications, memory of three blocks ``[n, rank]`` at the
    peak and one kept.

    Source: Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-semidefinite
    matrix from streaming data" (2017), algorithm 3; Frangella, Tropp and Udell, "Randomized
    Nystrom preconditioning" (2023), algorithm 2.1; Hataya and Yamada, "Nystrom method for accurate
    and scalable implicit differentiation" (2023) for the column form.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.decompositions import nystrom
        >>> A = Diagonal(torch.tensor([5.0, 3.0, 0.0, 0.0]), tags={"positive_semidefinite"})
        >>> nystrom(A, rank=3).eigenvalues[:2]
        tensor([5.0000, 3.0000])
    """
    n = A.shape[0]
    if "hermitian" not in A.tags:
        raise TagError(
            f"nystrom needs the tag 'hermitian', {type(A).__name__} has {sorted(A.tags)}; promise "
            "it where the operator is made if it holds"
        )
    if not 1 <= rank <= n:
        raise RankError(f"rank is {rank}, the operator has size {n}: the rank must be 1 to {n}")
    if method not in ("gaussian", "column"):
        raise ArgumentError(f"method is {method!r}; it must be 'gaussian' or 'column'")
    if chunk is not None and chunk < 1:
        raise ArgumentError(f"chunk is {chunk}; it must be at least 1")
    if chunk is None:
        chunk = max(1, _BLOCK_BYTES // (n * A.dtype.itemsize))
    sketch = _gaussian if method == "gaussian" else _columns
    Y, core, shift = sketch(A, rank, chunk, generator)
    if not math.isfinite(shift):
        raise NonFiniteError(f"a product with {type(A).__name__} holds NaN or infinity")
    B, signs = _root(Y, core, shift, indefinite=method == "column")
    basis, eigenvalues = _eigenpairs(B, signs, A.space)
    if method == "gaussian":
        eigenvalues = eigenvalues - shift
    kept = eigenvalues.abs() > shift  # below there is nothing but rounding
    return NystromFactor(basis[:, kept], eigenvalues[kept], A.space, rank)


Sketch = tuple[Tensor, Tensor, float]


def _gaussian(
    A: LinearOperator, rank: int, chunk: int, generator: torch.Generator | None
) -> Sketch:
    omega, _ = orthonormalize(draw(A.shape[0], rank, A, generator), A.space)
    Y = torch.empty_like(omega)
    for start in range(0, omega.shape[1], chunk):
        part = slice(start, start + chunk)
        Y[:, part] = A @ omega[:, part].contiguous().to(A.dtype)
    shift = _rounding(Y, A)
    Y.add_(omega, alpha=shift)
    return Y, A.space.gram(omega, Y), shift


def _columns(A: LinearOperator, rank: int, chunk: int, generator: torch.Generator | None) -> Sketch:
    if generator is None:
        generator = torch.Generator(A.device).manual_seed(0)
    index = torch.randperm(A.shape[0], device=A.device, generator=generator)[:rank]
    work = torch.float32 if A.dtype.itemsize == 2 else A.dtype
    Y = torch.cat([A.columns(part).to(work) for part in index.split(chunk)], dim=1)
    return Y, Y[index], _rounding(Y, A)


def _rounding(Y: Tensor, A: LinearOperator) -> float:
    """How large the rounding errors in the products ``Y`` may be."""
    squares = A.space.inner(Y, Y)
    total = squares.real if squares.is_complex() else squares
    return torch.finfo(A.dtype).eps * float(total.sum().sqrt())


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
