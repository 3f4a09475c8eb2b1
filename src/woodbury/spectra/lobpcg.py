"""The locally optimal block preconditioned conjugate gradient method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, ShapeError, TagError
from woodbury.spectra.eigenpairs import EigenMethod, EigenProblem
from woodbury.spectra.method import multiply

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator
    from woodbury.spaces import Space

__all__ = ["LOBPCG"]

# Iterations without progress of the worst wanted residual before it is called stalled.
_PATIENCE = 100


@dataclass(frozen=True)
class LOBPCG(EigenMethod):
    r"""Rayleigh-Ritz on $[X, M R, P]$: iterates, preconditioned residuals, last directions.

    Minimises (or maximises) the Rayleigh quotient of a block. With a preconditioner
    $M \approx A^{-1}$ the number of iterations for the smallest eigenvalues does not depend on
    their size, where Lanczos needs more the smaller they are. The block has ``guard`` vectors more
    than pairs are wanted. The residuals of converged pairs take no further products.

    Args:
        rtol: largest residual of a pair, relative to its eigenvalue.
        max_products: a limit; default the larger of 1,000 and ``20 n``.
        preconditioner: hermitian positive definite operator; ``None`` for the identity.
        guard: additional vectors; default ``max(2, k // 2)``.

    Raises:
        ArgumentError: ``guard`` is negative; ``which`` is ``"magnitude"`` or ``"both"``.
        TagError: the preconditioner is not tagged positive definite.
        ShapeError: the preconditioner has another shape.

    Cost: per iteration, a product (and one of the preconditioner) for every pair that has not
    converged, and $O(n b^2)$ multiplications for a block of $b$; memory of 7 blocks.

    Source: Knyazev, "Toward the optimal preconditioned eigensolver" (2001); Hetmaniuk and Lehoucq,
    "Basis selection in LOBPCG" (2006); Stathopoulos and Wu (2002) for the orthogonalisation.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.spectra import LOBPCG, eigenpairs
        >>> values = torch.logspace(-4, 0, 500).double()
        >>> A = Diagonal(values, tags={"positive_definite"})
        >>> M = Diagonal(1 / (values + 1e-5), tags={"positive_definite"})
        >>> found = eigenpairs(A, 2, "smallest", LOBPCG(preconditioner=M))
        >>> torch.allclose(found.values, values[:2], rtol=1e-8)
        True
    """

    preconditioner: LinearOperator | None = None
    guard: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guard is not None and self.guard < 0:
            raise ArgumentError(f"guard is {self.guard}; it must be 0 or more")
        M = self.preconditioner
        if M is not None and "positive_definite" not in M.tags:
            raise TagError(
                f"LOBPCG needs a preconditioner with the tag 'positive_definite', "
                f"{type(M).__name__} has {sorted(M.tags)}"
            )

    def _run(self, problem: EigenProblem) -> Tensor:
        A, k = problem.A, problem.k
        n, space, M = A.shape[0], A.space, self.preconditioner
        if problem.which not in ("largest", "smallest"):
            raise ArgumentError(
                f"which is {problem.which!r}; LOBPCG takes 'largest' or 'smallest': use "
                "ThickRestartLanczos"
            )
        if M is not None and M.shape != A.shape:
            raise ShapeError(f"the preconditioner has shape {M.shape}, the operator {A.shape}")
        guard = max(2, k // 2) if self.guard is None else self.guard
        b, limit = min(k + guard, n // 3), problem.limit(self.max_products)
        X, _ = _orthonormal(problem.draw(b), None, space)
        AX = problem.product(X)
        X, AX, values = _rayleigh_ritz(problem, X, AX, b)[:3]
        P: Tensor | None = None
        AP: Tensor | None = None
        best, since, sure = float("inf"), 0, True
        while True:
            R = AX - X * values
            norms = space.norm(R).tolist()
            pairs = zip(values.tolist(), norms, strict=True)
            good = [problem.good(value, norm, self.rtol) is not None for value, norm in pairs]
            if (all(good[:k]) or since == _PATIENCE // 2) and not sure:
                AX, sure = problem.product(X), True  # what was carried along may have drifted
                continue
            worst = max(norms[:k])
            best, since = (worst, 0) if worst < 0.9 * best else (best, since + 1)
            problem.stalled = since >= _PATIENCE
            if all(good[:k]) or problem.products >= limit or problem.stalled:
                return X[:, :k]
            problem.steps += 1
            sure = False
            active = [j for j, fine in enumerate(good) if not fine]
            W = R[:, active]
            if M is not None:
                W = multiply(M, W)
            W, _ = _orthonormal(W, X, space)
            AW = problem.product(W)
            parts, images = [X, W], [AX, AW]
            if P is not None and AP is not None:
                P, change = _orthonormal(P, torch.cat([X, W], 1), space)
                outside = b + W.shape[1]
                AP = AP @ change[outside:] - torch.cat([AX, AW], 1) @ change[:outside]
                parts, images = [*parts, P], [*images, AP]
            S, AS = torch.cat(parts, 1), torch.cat(images, 1)
            X, AX, values, C = _rayleigh_ritz(problem, S, AS, b)
            P, AP = S[:, b:] @ C[b:], AS[:, b:] @ C[b:]


def _rayleigh_ritz(
    problem: EigenProblem, S: Tensor, AS: Tensor, b: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``b`` best vectors in the span of a block, with images and coordinates.

    The block is orthonormal up to rounding, which would add up over the steps: hence its Gram
    matrix, whose Cholesky factor makes the vectors orthonormal anew.
    """
    space = problem.A.space
    H, gram = space.gram(S, AS), space.gram(S, S)
    L = torch.linalg.cholesky((gram + gram.mH) / 2)
    H = torch.linalg.solve_triangular(L, (H + H.mH) / 2, upper=False)
    H = torch.linalg.solve_triangular(L, H.mH, upper=False)
    values, vectors = torch.linalg.eigh((H + H.mH) / 2)
    problem.scale = max(problem.scale, float(values.abs().max()))
    order = problem.order(values)[:b]
    C = torch.linalg.solve_triangular(L.mH, vectors[:, order], upper=True)
    return S @ C, AS @ C, values[order], C


def _orthonormal(W: Tensor, Q: Tensor | None, space: Space) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of ``W`` orthogonal to ``Q``, without directions lost to rounding.

    Returns it and how it was made: ``basis = W @ change[-k:] - Q @ change[:-k]``.
    """
    k = W.shape[1]
    outside = 0 if Q is None else Q.shape[1]
    change = torch.eye(outside + k, dtype=W.dtype, device=W.device)[:, outside:]
    W = W / (norm := space.norm(W).clamp_min(torch.finfo(W.dtype).tiny))
    change = change / norm
    for _ in range(3):
        if Q is not None:
            inside = space.gram(Q, W)
            W = W - Q @ inside
            change[:outside] += inside
        gram = space.gram(W, W)
        values, vectors = torch.linalg.eigh((gram + gram.mH) / 2)
        # The images go through the same change: a direction nearly lost would amplify their error.
        kept = values > torch.finfo(W.dtype).eps ** 0.5 * values[-1:].clamp_min(1e-30)
        turn = vectors[:, kept] / values[kept].sqrt()
        W, change = W @ turn, change @ turn
    return W, change
