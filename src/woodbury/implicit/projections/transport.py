"""Projection onto matrices with given row and column sums, through the dual."""

from __future__ import annotations

import torch
from torch import Tensor

from woodbury.errors import NonFiniteError, ShapeError, SingularError
from woodbury.implicit.projections.common import bound, need_real, observe, refuse

__all__ = ["project_birkhoff", "project_transport"]

_STEPS = 500  # Newton ends after some ten; this only bounds a failure


def project_transport(Y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    r"""Projection onto $\{X \ge 0,\ X 1 = a,\ X^T 1 = b\}$ in the Frobenius norm.

    $X = (Y + u 1^T + 1 v^T)_+$ with potentials that maximise the concave dual
    $\langle a, u\rangle + \langle b, v\rangle - \frac12 \|(Y + u 1^T + 1 v^T)_+\|^2$. They are
    found by a semi-smooth Newton method with line search, which ends after finitely many steps:
    the dual is piecewise quadratic. On the support $S = [X > 0]$ the answer then solves linear
    equations exactly, and its derivatives are those of that closed form: with the matrix
    $M = \begin{pmatrix} \operatorname{diag}(S 1) & S \\ S^T & \operatorname{diag}(S^T 1)
    \end{pmatrix}$, $dX = S \odot (dY + du\,1^T + 1\,dv^T)$,
    $(du, dv) = M^+ (da - (S \odot dY) 1,\ db - (S \odot dY)^T 1)$. An entry on the point of
    leaving the support counts as outside.

    Args:
        Y: matrices ``[..., m, n]``, float32 or float64.
        rows: $a \ge 0$, broadcasts to ``[..., m]``; differentiable along ``sum(a) = sum(b)``.
        columns: $b \ge 0$, broadcasts to ``[..., n]``; with the same sum.

    Returns:
        The projections ``[..., m, n]``. Exact to rounding, as linear equations are, on the
        support that Newton's method found; the sums are those asked for to about ``10 eps``.

    Raises:
        ArgumentError: a negative sum, or different totals: the set is empty.
        DtypeError: ``Y`` is not real, or a sum has another dtype.
        NonFiniteError: ``Y`` or a sum is NaN or infinite.
        ShapeError: the shapes do not fit.
        SingularError: Newton's method did not end.

    Cost: some ten Cholesky factorisations and a pseudo-inverse of order ``m + n``, each
    ``O((m + n)^3)``.

    Source: Blondel, Seguy and Rolet 2018, section 4 (dual); Qi and Sun 1993 (Newton's method).

    Example:
        >>> import torch
        >>> from woodbury.implicit import project_transport
        >>> Y = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        >>> project_transport(Y, torch.tensor([1.0, 2.0]), torch.ones(3))
        tensor([[0.7500, 0.2500, 0.0000],
                [0.2500, 0.7500, 1.0000]])
    """
    need_real(Y, "Y", 2)
    a = bound(rows, Y, Y.shape[:-1], "rows")
    b = bound(columns, Y, torch.Size((*Y.shape[:-2], Y.shape[-1])), "columns")
    refuse(lambda t: t < 0, "a row sum is {}; X >= 0 needs sums >= 0", a)
    refuse(lambda t: t < 0, "a column sum is {}; X >= 0 needs sums >= 0", b)
    allowed = 10 * (Y.shape[-1] + Y.shape[-2]) * torch.finfo(Y.dtype).eps
    refuse(
        lambda p, q: (p - q).abs() > allowed * torch.maximum(p, q),
        "the row sums add up to {} and the column sums to {}: no matrix has both",
        a.sum(-1),
        b.sum(-1),
    )
    m, dtype = Y.shape[-2], Y.dtype
    Y, a, b = Y.double(), a.double(), b.double()  # which entries are zero is decided in float64
    found = observe(_potentials, Y, a, b)
    # Relative to the potentials found, what is left to solve for is small and cancels nothing.
    near = Y + found[..., :m].unsqueeze(-1) + found[..., m:].unsqueeze(-2)
    support = near.detach() > 0
    kept = torch.where(support, near, 0)
    inverse = torch.linalg.pinv(_matrix(support), hermitian=True)
    missing = torch.cat([a - kept.sum(-1), b - kept.sum(-2)], -1)
    more = (inverse @ missing.unsqueeze(-1)).squeeze(-1)
    exact = near + more[..., :m].unsqueeze(-1) + more[..., m:].unsqueeze(-2)
    return torch.where(support & (exact.detach() > 0), exact, 0).to(dtype)


def project_birkhoff(Y: Tensor) -> Tensor:
    r"""Projection onto the doubly stochastic matrices, $\{X \ge 0,\ X 1 = 1,\ X^T 1 = 1\}$.

    The transport polytope with all sums 1, see :func:`project_transport`, whose closed-form
    derivatives it has.

    Args:
        Y: matrices ``[..., n, n]``, float32 or float64.

    Returns:
        The projections ``[..., n, n]``, exact to rounding.

    Raises:
        DtypeError: ``Y`` is not real.
        NonFiniteError: ``Y`` is NaN or infinite.
        ShapeError: ``Y`` is not square.
        SingularError: Newton's method did not end.

    Cost: as :func:`project_transport`.

    Source: Li, Sun and Toh 2020, section 2 (dual and Newton's method).

    Example:
        >>> import torch
        >>> from woodbury.implicit import project_birkhoff
        >>> project_birkhoff(torch.tensor([[1.0, 0.0], [0.5, 0.0]]))
        tensor([[0.6250, 0.3750],
                [0.3750, 0.6250]])
    """
    need_real(Y, "Y", 2)
    if Y.shape[-1] != Y.shape[-2]:
        raise ShapeError(f"Y has shape {tuple(Y.shape)}; it must be square, [..., n, n]")
    ones = torch.ones(Y.shape[:-1], dtype=Y.dtype, device=Y.device)
    return project_transport(Y, ones, ones)


def _matrix(support: Tensor) -> Tensor:
    """``M``: minus the Hessian of the dual, the signless Laplacian of the support."""
    S = support.double()
    top = torch.cat([torch.diag_embed(S.sum(-1)), S], -1)
    return torch.cat([top, torch.cat([S.mT, torch.diag_embed(S.sum(-2))], -1)], -2)


def _potentials(Y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``(u, v)`` of the dual maximum ``[..., m + n]``, all of a batch at once."""
    if not (torch.isfinite(Y).all() and torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise NonFiniteError("Y or a sum is NaN or infinite; a projection needs finite entries")
    m, n = Y.shape[-2:]
    wanted = torch.cat([a, b], -1).reshape(-1, m + n)
    Y = Y.reshape(-1, m, n)

    def at(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        Z = Y + w[:, :m, None] + w[:, None, m:]
        X = Z.clamp_min(0)
        value = X.square().sum((-1, -2)) / 2 - (wanted * w).sum(-1)
        return value, wanted - torch.cat([X.sum(-1), X.sum(-2)], -1), Z > 0

    # Start where the sums would be right without the constraint of sign.
    left = wanted[:, :m] - Y.sum(-1)
    total = left.sum(-1, keepdim=True)
    right = wanted[:, m:] - Y.sum(-2)
    w = torch.cat([left / n - total / (2 * m * n), right / m - total / (2 * m * n)], -1)
    scale = 1 + wanted.amax(-1) + Y.abs().amax((-1, -2))
    eye = torch.eye(m + n, dtype=Y.dtype, device=Y.device)
    value, slope, support = at(w)
    for _ in range(_STEPS):
        size = slope.abs().amax(-1)
        running = size > 8 * (m + n) * torch.finfo(Y.dtype).eps * scale
        if not bool(running.any()):
            break
        # Rows of M can be empty, and constants can move between u and v: a little ridge.
        ridge = (size / scale).clamp(max=1) * 1e-3 + 1e-13
        factor = torch.linalg.cholesky(_matrix(support) + ridge[:, None, None] * eye)
        step = torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
        gain = (slope * step).sum(-1)
        length = running.to(Y.dtype)
        noise = 4 * torch.finfo(Y.dtype).eps * value.abs()
        for _ in range(60):
            new_value, new_slope, new_support = at(w + length[:, None] * step)
            # Near the maximum the gain is below rounding: then the slope decides.
            good = (new_value <= value - 1e-4 * length * gain) | (
                (new_value <= value + noise) & (new_slope.abs().amax(-1) < size)
            )
            if bool((good | ~running).all()):
                break
            length = torch.where(good | ~running, length, length / 2)
        moved = running & good
        if not bool(moved.any()):
            break  # nothing left but rounding
        w = torch.where(moved[:, None], w + length[:, None] * step, w)
        value = torch.where(moved, new_value, value)
        slope = torch.where(moved[:, None], new_slope, slope)
        support = torch.where(moved[:, None, None], new_support, support)
    if bool((slope.abs().amax(-1) > 1e-9 * scale).any()):
        worst = slope.abs().amax().item()
        raise SingularError(
            f"the projection was not found in {_STEPS} Newton steps (sums are wrong by {worst:.1e})"
            "; scale Y and the sums to about one"
        )
    return w.reshape(*a.shape[:-1], m + n)
