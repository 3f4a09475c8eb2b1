"""The largest columns of a Fisher matrix, exact, with EK-FAC for the rest: a preconditioner."""

from __future__ import annotations

import torch
from torch import Tensor

from woodbury.curvature.capture import FactoredBatch, FactoredGradients
from woodbury.curvature.damping import damping_for_steps
from woodbury.curvature.kfac import KFAC, regularizers
from woodbury.curvature.layer_matrix import LayerMatrix
from woodbury.curvature.layers import VectorGradients
from woodbury.curvature.objective import Objective
from woodbury.errors import ArgumentError, BudgetError
from woodbury.operators import Eigendecomposed, LinearOperator, LowRank
from woodbury.operators.memory import available_bytes, in_words

__all__ = ["curvature_preconditioner", "heavy_columns"]

# Vectors that are held for each column: itself, it in the eigenbasis, and the inverse applied to it
# while that is made.
_COPIES = 4
# Of damping_for_steps: what is left of the matrix is closer to flat than the whole, and EK-FAC is
# trusted less with it.
_ACCURACY = 0.1


def heavy_columns(curvature: KFAC, count: int) -> Tensor:
    r"""The columns of largest norm of the Fisher matrix that ``curvature`` approximates.

    That matrix is $\sum_{ic} v_{ic} v_{ic}^T + \operatorname{diag}(l_2)$ with
    $v_{ic} = \sqrt{w_i / N}\,J_i^T s_{ic}$: for ``"exact"`` $s_{ic}$ are the eigenvectors of the
    curvature in the outputs of example $i$ times the roots of their eigenvalues (beyond 128 outputs
    the columns of another root; for a likelihood all this is the Gauss-Newton matrix), for
    ``"sampled"`` the scores at drawn labels (those of the factors of K-FAC, or of the corrected
    eigenvalues of EK-FAC), for ``"empirical"`` there is one, the gradient of the loss.

    Args:
        curvature: :class:`~woodbury.KFAC` or :class:`~woodbury.EKFAC`.
        count: how many, :math:`\ge 0`; those that are not zero if these are fewer.

    Returns:
        ``[n, r]``, the largest first, with the dtype and device of the parameters.

    Raises:
        ArgumentError: ``count`` is negative or no integer.
        BudgetError: they would not fit into the memory that is available.

    Cost: two passes over the data with as many backward passes as columns for each example;
    ``n count`` numbers.

    Example:
        >>> import torch
        >>> from woodbury import EKFAC, Objective
        >>> from woodbury.curvature import heavy_columns
        >>> x, y = torch.tensor([[1.0], [3.0], [2.0]]), torch.zeros(3, 1)
        >>> objective = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, y))
        >>> heavy_columns(EKFAC(objective, "exact"), 2).abs()  # sqrt(2 / 3) x
        tensor([[2.4495, 1.6330]])
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ArgumentError(f"count is {count!r}; it must be an integer >= 0")
    objective, settings = curvature.objective, curvature.settings
    if count == 0:
        return _allocated(0, objective).T
    gradients = FactoredGradients(
        objective,
        settings.kind,
        samples=settings.samples,
        generator=torch.Generator().manual_seed(settings.seeds[int(curvature.corrected)]),
        dense=settings.dense,
        principal=True,
    )
    squares = torch.cat([_weights(b) * _squares(b) for b in gradients.passes("sizes of columns")])
    order = squares.argsort(descending=True, stable=True)[:count]
    order = order[squares[order] > 0]
    kept = _allocated(len(order), objective)
    place = torch.full_like(squares, -1, dtype=torch.int64)
    place[order] = torch.arange(len(order), device=place.device)
    places = {k: b.positions(objective.space).to(kept.device) for k, b in gradients.blocks.items()}
    start = 0
    for batch in gradients.passes("heavy columns") if len(order) else ():
        own = place[start : start + batch.size]
        start += batch.size
        chosen = (own >= 0).nonzero().squeeze(1)
        for name, part in batch.blocks.items() if len(chosen) else ():
            kept[own[chosen][:, None], places[name]] = part.take(chosen).dense()
        kept[own[chosen]] *= (_weights(batch)[chosen] / objective.num_examples).sqrt()[:, None]
    return kept.T


def _squares(batch: FactoredBatch) -> Tensor:
    """Squared norms of the gradients, ``[b]``."""
    return torch.stack([part.squared_norms() for part in batch.blocks.values()]).sum(0)


def _weights(batch: FactoredBatch) -> Tensor:
    if batch.weights is not None:
        return batch.weights
    first = next(iter(batch.blocks.values()))
    like = first.values if isinstance(first, VectorGradients) else first.grads
    return like.new_ones(batch.size)


def _allocated(count: int, objective: Objective) -> Tensor:
    """Zeros ``[count, n]``, if there is room for what is done with them."""
    kept = torch.zeros((), dtype=objective.dtype, device=objective.device)
    n, room = objective.space.dim, available_bytes(objective.device)
    needed = _COPIES * count * n * kept.element_size()
    if needed > room:
        raise BudgetError(
            f"{in_words(needed)} are needed for {count} columns of {n} entries, {in_words(room)} "
            "are available; ask for fewer columns"
        )
    return kept.repeat(count, n)


def curvature_preconditioner(
    curvature: KFAC, shift: float, steps: int, *, columns: int = 200
) -> LinearOperator:
    r"""A preconditioner of $G + \mu I$ for so many steps: heavy columns exact, EK-FAC for the rest.

    With the ``columns`` largest columns $V$ of $G$ (:func:`heavy_columns`) it is

    $$ \Bigl(V V^T + \mu \bigl(I + \tfrac1\lambda K'\bigr)\Bigr)^{-1}, \qquad
    K' = Q \operatorname{diag}\bigl(\Lambda - \operatorname{diag}(Q^T V V^T Q)\bigr) Q^T, $$

    where $Q$ and $\Lambda$ are the eigenvectors and eigenvalues of ``curvature``, and $K'$ what is
    left of it: with EK-FAC the diagonal of $G - V V^T$ in the basis $Q$, found without another
    pass. $\lambda$ is :func:`damping_for_steps` with ``accuracy=0.1``. A few rows that a model is
    unsure of make most of what stands out of $G$; these are where an average over all rows, which
    Kronecker factors are, is wrong by most. With all columns it is the inverse itself, with none
    the scaled ``curvature.damped_inverse(damping_for_steps(shift, steps, accuracy=0.1))``.

    Args:
        curvature: :class:`~woodbury.EKFAC` (or :class:`~woodbury.KFAC`) of the matrix;
            ``"exact"`` for a Gauss-Newton matrix.
        shift: $\mu \ge 0$: what the system has beside the curvature. A regulariser ``l2`` of the
            objective is part of the curvature and is added to it here.
        steps: that are meant, see :func:`damping_for_steps`.
        columns: how many are kept exactly; each takes four vectors of memory.

    Returns:
        A positive definite operator for ``CG(preconditioner=...)``.

    Raises:
        ArgumentError: ``shift`` plus ``l2`` is not positive, ``steps`` or ``columns`` is negative.
        BudgetError: the columns would not fit into memory.

    Cost: that of :func:`heavy_columns`, three changes of basis for every column and the Cholesky
    factor of a matrix of their number; then a product costs one with ``curvature`` and
    ``4 n columns`` operations.

    Example:
        >>> import torch
        >>> from woodbury import CG, EKFAC, GaussNewton, Identity, Objective, solve
        >>> from woodbury.curvature import curvature_preconditioner
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(200, 8).double(), torch.randint(4, (200,))
        >>> layers = torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)
        >>> objective = Objective(torch.nn.Sequential(*layers).double(), "cross_entropy", (x, y))
        >>> M = curvature_preconditioner(EKFAC(objective, "exact"), 1e-4, steps=20, columns=100)
        >>> A, b = GaussNewton(objective) + 1e-4 * Identity(212), torch.ones(212).double()
        >>> solve(A, b, CG(preconditioner=M)).steps < solve(A, b, CG()).steps
        True
    """
    penalties = regularizers(curvature.layers, curvature.objective)
    shifts = {name: shift + penalties.get(name, 0.0) for name in curvature.blocks}
    dampings = {
        name: damping_for_steps(own, steps, accuracy=_ACCURACY) for name, own in shifts.items()
    }
    V = heavy_columns(curvature, columns)
    inner = curvature.permutation._rmatmat(V)
    blocks: dict[str, LinearOperator] = {}
    start = 0
    for name, block in curvature.blocks.items():
        assert isinstance(block, Eigendecomposed)  # those of K-FAC are
        own = inner[start : start + block.shape[0]]
        start += block.shape[0]
        explained = block.basis._rmatmat(own).square().sum(1) + penalties.get(name, 0.0)
        left = (block.values - explained).clamp(min=0)
        values = shifts[name] * (1 + left / dampings[name])
        blocks[name] = Eigendecomposed(block.basis, values)
    rest = LayerMatrix(curvature.permutation, blocks)
    return (rest + LowRank(V)).inverse() if V.shape[1] else rest.inverse()
