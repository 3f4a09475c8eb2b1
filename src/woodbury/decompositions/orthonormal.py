"""An orthonormal basis of the columns of a block, in any space."""

from __future__ import annotations

import torch
from torch import Tensor

from woodbury.spaces import Space

__all__ = ["orthonormalize"]


def orthonormalize(X: Tensor, space: Space) -> tuple[Tensor, Tensor]:
    r"""$X = Q R$ with $Q^H Q = I$ in the inner product of the space.

    Householder reflections where the space is plain; where it has inner products of its own (a
    sharded vector), twice the factorisation of the Gram matrix, which drops directions that are
    zero to working precision.

    Args:
        X: block ``[n, k]``, ``k <= n``.
        space: where its columns live.

    Returns:
        ``Q`` ``[n, r]`` and ``R`` ``[r, k]`` with ``r <= k``; ``R`` need not be triangular.

    Cost: $2 n k^2$ multiplications, memory of two blocks.

    Source: Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm" (2015).

    Example:
        >>> import torch
        >>> from woodbury import Space
        >>> from woodbury.decompositions import orthonormalize
        >>> Q, R = orthonormalize(torch.tensor([[3.0], [4.0]]), Space(2))
        >>> torch.allclose(Q @ R, torch.tensor([[3.0], [4.0]])), Q.abs().squeeze().tolist()
        (True, [0.6..., 0.8...])
    """
    if type(space).gram is Space.gram:
        Q, R = torch.linalg.qr(X)
        return Q, R
    Q, R = X, torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
    for _ in range(2):
        values, vectors = torch.linalg.eigh(space.gram(Q, Q))
        floor = X.shape[1] * torch.finfo(X.dtype).eps * values[-1:].clamp_min(0)
        kept = values > floor
        roots, vectors = values[kept].sqrt(), vectors[:, kept]
        Q = Q @ (vectors / roots)
        R = (roots.unsqueeze(1) * vectors.mH) @ R
    return Q, R
