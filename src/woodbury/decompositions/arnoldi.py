"""A low-rank approximation of a hermitian operator from one Krylov space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.decompositions.lanczos import draw
from woodbury.decompositions.lanczos_batch import lanczos_batch, require_hermitian, tridiagonal
from woodbury.decompositions.partial import PartialEigen
from woodbury.errors import ArgumentError, NotPositiveDefiniteError, RankError, SingularError
from woodbury.operators.base import LinearOperator

if TYPE_CHECKING:
    from woodbury.spaces import Space

__all__ = ["KrylovFactor", "arnoldi"]


@dataclass(frozen=True, eq=False)
class KrylovFactor:
    r"""$\hat A = U \Theta U^H \approx A$ from Ritz pairs.

    Attributes:
        basis: $U$, ``[n, r]``, orthonormal.
        eigenvalues: $\Theta$, ``[r]``, real, by descending magnitude, of either sign.
        errors: within so much of each there is an eigenvalue of ``A``, ``[r]``, float64.
        space: where the vectors live.
        products: columns that ``A`` was multiplied by.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.decompositions import arnoldi
        >>> A = Diagonal(torch.tensor([5.0, -3.0, 0.1, 0.0]).double())
        >>> arnoldi(A, rank=2, steps=4).eigenvalues
        tensor([ 5.0000, -3.0000], dtype=torch.float64)
    """

    basis: Tensor
    eigenvalues: Tensor
    errors: Tensor
    space: Space
    products: int

    def operator(self) -> PartialEigen:
        r"""$\hat A$ as an operator."""
        return PartialEigen(self.basis, self.eigenvalues, 0.0, space=self.space)

    def inverse(self, damping: float, *, outside: bool = True) -> PartialEigen:
        r"""$U (\Theta + \rho)^{-1} U^H + \frac1\rho (I - U U^H)$, the last term if ``outside``.

        Raises:
            SingularError: $\hat A + \rho I$ has an eigenvalue that is zero to working precision.
        """
        n, rank = self.basis.shape
        values = self.eigenvalues + damping
        known = [abs(damping)] if rank < n and outside else []
        known += values.abs().tolist()
        floor = torch.finfo(values.dtype).eps * max(known, default=0.0)
        if min(known, default=1.0) <= floor:
            raise SingularError(
                f"the approximation has rank {rank} of {n}, its smallest eigenvalue is "
                f"{self.eigenvalues.abs().amin().item() if rank else 0.0:.3g} and the damping "
                f"{damping:.3g}, so it has no inverse: give damping > 0, or outside='zero' and a "
                "smaller rank"
            )
        rest = 1 / damping if outside and rank < n else 0.0
        return PartialEigen(self.basis, values.reciprocal(), rest, space=self.space)

    def preconditioner(self, damping: float = 0.0) -> PartialEigen:
        r"""$|\theta_r + \mu|\,U (\Theta + \mu)^{-1} U^H + I - U U^H$ for $A + \mu I$.

        Raises:
            NotPositiveDefiniteError: an eigenvalue of $\Theta + \mu I$ is not positive.
        """
        shifted = self.eigenvalues + damping
        if shifted.numel() and shifted.amin().item() <= 0:
            raise NotPositiveDefiniteError(
                f"the approximation has the eigenvalue {shifted.amin().item():.3g} with damping "
                f"{damping:.3g}, so it cannot precondition; raise the damping"
            )
        last = shifted.amin() if shifted.numel() else shifted.new_ones(())
        return PartialEigen(self.basis, last / shifted, 1.0, space=self.space)


def arnoldi(
    A: LinearOperator,
    rank: int,
    *,
    steps: int | None = None,
    generator: torch.Generator | None = None,
) -> KrylovFactor:
    r"""The ``rank`` Ritz pairs of largest magnitude of one Krylov space, as an approximation.

    For a hermitian operator Arnoldi's iteration is Lanczos' with full reorthogonalisation, which is
    what is done: $A Q \approx Q T$, $T = S\Theta S^H$, $U = Q S$. A Krylov space of one vector sees
    one vector of every eigenspace: multiple eigenvalues are found once.

    Args:
        A: hermitian operator ``[n, n]``, definite or not.
        rank: $r$, 1 to ``n``; fewer pairs come back where the space is exhausted.
        steps: dimension of the Krylov space, ``rank`` to ``n``; default ``2 * rank``, at most
            ``n``. The pairs converge from the ends of the spectrum as it grows.
        generator: draws the start; the same one every time if not given.

    Returns:
        A :class:`KrylovFactor`.

    Raises:
        TagError: ``A`` is not tagged hermitian.
        RankError: ``rank`` is not between 1 and ``n``.
        ArgumentError: ``steps`` is not between ``rank`` and ``n``.
        NonFiniteError: a product is NaN or infinite.

    Cost: ``steps`` products, $4 n m^2$ multiplications, memory of ``steps`` vectors, of which
    ``rank`` are kept.

    Source: Schioppa, Zablotskaia, Vilar and Sokolov, "Scaling up influence functions" (AAAI 2022),
    section 3.2; Golub and Van Loan, "Matrix Computations" (4th ed.), 10.1.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.decompositions import arnoldi
        >>> A = Diagonal(2.0 ** -torch.arange(60).double())
        >>> factor = arnoldi(A, rank=4, steps=12)
        >>> factor.eigenvalues
        tensor([1.0000, 0.5000, 0.2500, 0.1250], dtype=torch.float64)
        >>> bool(factor.errors.max() < 1e-6)
        True
    """
    require_hermitian(A, "arnoldi")
    n = A.shape[0]
    if not 1 <= rank <= n:
        raise RankError(f"rank is {rank}, the operator has size {n}: the rank must be 1 to {n}")
    steps = min(n, 2 * rank) if steps is None else steps
    if not rank <= steps <= n:
        raise ArgumentError(f"steps is {steps}; a rank of {rank} takes {rank} to {n}")
    found = lanczos_batch(A, steps, draw(n, 1, A, generator))
    assert found.bases is not None  # kept with full reorthogonalisation
    T = tridiagonal(found.diagonal[0], found.off_diagonal[0])
    values, vectors = torch.linalg.eigh(T)
    order = values.abs().argsort(descending=True)[:rank]
    values, vectors = values[order], vectors[:, order]
    errors = found.remainder[0].item() * vectors[-1].abs()
    basis = found.bases[0]
    U = basis @ vectors.to(basis)
    real = U.real.dtype if U.dtype.is_complex else U.dtype
    return KrylovFactor(
        U.to(A.dtype), values.to(device=U.device, dtype=real), errors, A.space, found.products
    )
