"""How much of the identity is added to each block before it is inverted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, ShapeError
from woodbury.operators import LinearOperator

if TYPE_CHECKING:
    from woodbury.curvature.kfac import KFAC

__all__ = [
    "PAPER",
    "Damping",
    "DampingChoice",
    "RelativeDamping",
    "choose_damping",
    "damping_for_steps",
    "damping_of",
]

_FACTORS = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class RelativeDamping:
    r"""$\lambda_l = f \cdot$ (mean eigenvalue of block $l$), for every block on its own.

    Args:
        factor: $f$; the paper on EK-FAC influence takes 0.1.

    Raises:
        ArgumentError: the factor is negative, NaN or infinite.

    Source: Grosse et al. (2023), section 3.2.

    Example:
        >>> from woodbury.curvature import RelativeDamping
        >>> RelativeDamping(1e-3)
        RelativeDamping(factor=0.001)
    """

    factor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.factor < math.inf:
            raise ArgumentError(f"factor is {self.factor}; it must be a number >= 0")


# What the paper takes.
PAPER = RelativeDamping(0.1)

Damping = float | Mapping[str, float] | RelativeDamping


def damping_of(damping: Damping, means: Mapping[str, float]) -> dict[str, float]:
    """The multiple of the identity for each block, given the blocks' mean eigenvalues.

    Where a block is zero, relative damping takes the mean over all blocks in its place.

    Raises:
        ArgumentError: a number is negative or not finite, or names do not match the blocks.
    """
    if isinstance(damping, RelativeDamping):
        overall = sum(means.values()) / max(len(means), 1)
        return {name: damping.factor * (mean or overall) for name, mean in means.items()}
    if isinstance(damping, Mapping):
        if set(damping) != set(means):
            missing, extra = sorted({*means} - {*damping}), sorted({*damping} - {*means})
            raise ArgumentError(
                f"damping does not match the blocks: missing {missing}, unknown {extra}"
            )
        found = {name: float(damping[name]) for name in means}
    elif isinstance(damping, bool) or not isinstance(damping, int | float):
        raise ArgumentError(
            f"damping is {damping!r}; give a number, a number for each block by name, or "
            "RelativeDamping(factor)"
        )
    else:
        found = dict.fromkeys(means, float(damping))
    for name, value in found.items():
        if not 0 <= value < math.inf:
            raise ArgumentError(f"damping of {name!r} is {value}; it must be a number >= 0")
    return found


@dataclass(frozen=True)
class DampingChoice:
    """Which factor of relative damping solves held-out systems best.

    Attributes:
        damping: the one with the smallest residual.
        residuals: the mean relative residual of every factor that was tried.

    Example:
        >>> from woodbury.curvature import DampingChoice, RelativeDamping
        >>> DampingChoice(RelativeDamping(0.1), {0.1: 0.4, 1.0: 0.7}).damping.factor
        0.1
    """

    damping: RelativeDamping
    residuals: dict[float, float]


def choose_damping(
    curvature: KFAC,
    matrix: LinearOperator,
    *,
    vectors: Tensor | None = None,
    factors: Sequence[float] = _FACTORS,
    generator: torch.Generator | None = None,
) -> DampingChoice:
    r"""The relative damping whose inverse solves systems with another matrix best.

    For every factor $f$ and right-hand sides $b$ the relative residual
    $\|b - A\,(K + D_f)^{-1} b\| / \|b\|$ is measured with ``matrix`` as $A$, which should belong to
    examples that ``curvature`` has not seen.

    Args:
        curvature: :class:`KFAC` or :class:`EKFAC`.
        matrix: $A$, ``[n, n]``: for instance ``GaussNewton(held_out) + mu * Identity(n)`` with the
            multiple of the identity that is wanted in the end.
        vectors: right-hand sides ``[n, k]``; default four random ones, $A z$ with normal $z$, so
            that they lie where the matrix acts.
        factors: what is tried.
        generator: for the random vectors.

    Returns:
        The choice, with all residuals.

    Raises:
        ArgumentError: no factors.
        ShapeError: ``matrix`` is of another size.

    Cost: ``k`` products with ``matrix`` for each factor.

    Example:
        >>> import torch
        >>> from woodbury import EKFAC, Identity, GaussNewton, Objective
        >>> from woodbury.curvature import choose_damping
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(64, 3), torch.randint(2, (64,))
        >>> seen, held_out = (
        ...     Objective(model, "cross_entropy", (x[i::2], y[i::2])) for i in range(2)
        ... )
        >>> choice = choose_damping(EKFAC(seen), GaussNewton(held_out) + 0.01 * Identity(8))
        >>> choice.damping.factor in choice.residuals
        True
    """
    if not factors:
        raise ArgumentError("factors is empty; give at least one to try")
    n = curvature.shape[0]
    if matrix.shape != (n, n):
        raise ShapeError(f"matrix has shape {matrix.shape}, the curvature {(n, n)}")
    if vectors is None:
        device = generator.device if generator is not None else "cpu"
        z = torch.randn(n, 4, generator=generator, device=device)
        vectors = matrix @ z.to(matrix.device, matrix.dtype)
    columns = vectors.unsqueeze(1) if vectors.dim() == 1 else vectors
    norms = columns.norm(dim=0).clamp(min=torch.finfo(columns.dtype).tiny)
    residuals = {}
    for factor in factors:
        inverse = curvature.damped_inverse(RelativeDamping(factor))
        x = inverse @ columns.to(inverse.dtype)
        residual = (columns - matrix @ x.to(columns.dtype)).norm(dim=0) / norms
        residuals[float(factor)] = float(residual.mean())
    best = min(residuals, key=residuals.__getitem__)
    return DampingChoice(RelativeDamping(best), residuals)


def damping_for_steps(shift: float, steps: int, *, accuracy: float = 0.01) -> float:
    r"""The damping of a preconditioner that is to be good after so many conjugate gradient steps.

    For $A = G + \mu I$ and the preconditioner $(K + \lambda I)^{-1}$ with $K \approx G$ it is

    $$ \lambda = \mu \max\Bigl(1, \bigl(2k / \ln(2/\epsilon)\bigr)^2\Bigr), $$

    about $\mu k^2 / 7$. Chebyshev's bound promises conjugate gradients an error of
    $2 \exp(-2k\sqrt{\mu/\lambda})$ after $k$ steps on a spectrum from $\mu$ to $\lambda$; this
    is the $\lambda$ for which that is $\epsilon$. What lies below it needs no preconditioner, and
    gets none: there $K$, whose small eigenvalues are spread over more directions than those of $G$,
    would do harm. What lies above is left to $K$. Few steps lean on $K$ with all it has
    ($\lambda = \mu$), many hardly at all ($\lambda \to \infty$: no preconditioner).

    Args:
        shift: $\mu > 0$: what ``A`` has beside the curvature, an objective's ``l2`` included.
        steps: $k \ge 0$, the steps that are meant: the ``max_steps`` of the solve where they end
            it, otherwise the number that is expected.
        accuracy: $\epsilon$, between 0 and 1. Of little weight: its logarithm enters.

    Returns:
        $\lambda$, in the unit of ``shift``, for :meth:`KFAC.damped_inverse`.

    Raises:
        ArgumentError: an argument is out of its range, NaN or infinite.

    Cost: none: no products, no right-hand side.

    Source: Chebyshev's bound as in Saad, "Iterative methods for sparse linear systems" (2003),
    equation 6.128; that it should choose the damping of a preconditioner is ours.

    Example:
        >>> import torch
        >>> from woodbury import CG, EKFAC, GaussNewton, Objective, solve
        >>> from woodbury.curvature import damping_for_steps
        >>> from woodbury.operators import Identity
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(64, 5), torch.randint(3, (64,))
        >>> objective = Objective(torch.nn.Linear(5, 3), "cross_entropy", (x, y))
        >>> A = GaussNewton(objective) + 1e-3 * Identity(18)
        >>> M = EKFAC(objective, "exact").damped_inverse(damping_for_steps(1e-3, 10))
        >>> recipe = CG(rtol=0, max_steps=10, preconditioner=M)
        >>> bool(solve(A, torch.ones(18), recipe, throw=False).residual < 0.01)
        True
    """
    if not 0 < shift < math.inf:
        raise ArgumentError(
            f"shift is {shift}; it must be a positive number. Without a shift there is no spectrum "
            "to leave to conjugate gradients: add one to the matrix, or give the damping itself"
        )
    if not 0 <= steps < math.inf:
        raise ArgumentError(f"steps is {steps}; it must be a number >= 0")
    if not 0 < accuracy < 1:
        raise ArgumentError(f"accuracy is {accuracy}; it must be between 0 and 1")
    return shift * max(1.0, (2 * steps / math.log(2 / accuracy)) ** 2)
