"""How far an answer is from the exact one: bounds where a bound on the spectrum is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from woodbury.decompositions.lanczos import draw, lanczos
from woodbury.errors import ArgumentError, ShapeError
from woodbury.solvers.spectrum_bounds import smallest_singular_value_bound

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator
    from woodbury.solvers.solution import Solution

__all__ = [
    "EnergyHistory",
    "ErrorBound",
    "Guarantee",
    "energy_history",
    "error_bound",
    "smallest_ritz_value",
]

Array = NDArray[np.float64]


class Guarantee(Enum):
    """What a number says about an error; the value of a member says why.

    Example:
        >>> from woodbury.solvers import Guarantee
        >>> print(Guarantee.estimate.value)
        not a bound: the smallest eigenvalue or singular value was estimated from above
    """

    bound = "a bound: a lower bound on the smallest eigenvalue or singular value is known"
    estimate = "not a bound: the smallest eigenvalue or singular value was estimated from above"


@dataclass(frozen=True)
class ErrorBound:
    r"""How far a value is from the exact solution at most.

    Attributes:
        value: $\|x - A^{-1}b\|_A$ (``norm`` is ``"energy"``) or $\|x - A^{-1}b\|$
            (``"euclidean"``) is at most this, if ``guarantee`` is ``bound``.
        guarantee: whether it is a bound or an estimate.
        norm: of the error: ``"energy"`` or ``"euclidean"``.
        smallest: the number below the spectrum that it rests on: of the smallest eigenvalue or, for
            the Euclidean norm, the smallest singular value.
        relative: ``value`` over a lower bound of the norm of the exact solution; ``nan`` if
            there is none.
        products: columns that ``A`` was multiplied by to find it.

    Example:
        >>> import torch
        >>> from woodbury import CG, Diagonal, solve
        >>> A = Diagonal(torch.linspace(1.0, 9.0, 50), tags={"positive_definite"})
        >>> solution = solve(A, torch.ones(50), CG(rtol=1e-2, error_bound=True))
        >>> print(solution.info["error_bound"][0])
        ||x - x*||_A <= ... (a bound: a lower bound on the smallest eigenvalue ...
    """

    value: float
    guarantee: Guarantee
    norm: str
    smallest: float
    relative: float = math.nan
    products: int = 0

    def __str__(self) -> str:
        sign = "<=" if self.guarantee is Guarantee.bound else "~"
        norm = "||x - x*||_A" if self.norm == "energy" else "||x - x*||"
        return f"{norm} {sign} {self.value:.3g} ({self.guarantee.value})"


@dataclass(frozen=True, eq=False)
class EnergyHistory:
    r"""Bounds on $\|x_k - A^{-1}b\|_A$ after each step of conjugate gradients.

    Attributes:
        upper: Gauss-Radau, ``[k]``; the entry ``j`` is of the iterate after ``j`` steps.
        lower: Gauss, ``[l]`` with ``l <= k``: as far as the steps that follow allow one to
            a relative accuracy of the square of 25 %.
        delay: steps that each entry of ``lower`` had to wait for, ``[l]``.
        smallest: $\mu$.
        last: upper bound after the last step.
        energy: lower bound of $\|A^{-1}b - x_0\|_A$.

    Example:
        >>> import torch
        >>> from woodbury import CG, Diagonal, solve
        >>> A = Diagonal(torch.linspace(1.0, 9.0, 50), tags={"positive_definite"})
        >>> solution = solve(A, torch.ones(50), CG(rtol=1e-4, error_bound=True))
        >>> history = solution.info["energy"][0]
        >>> bool((history.lower <= history.upper[: len(history.lower)]).all())
        True
    """

    upper: Array
    lower: Array
    delay: NDArray[np.int64]
    smallest: float
    last: float
    energy: float


def energy_history(
    lengths: Sequence[float], squares: Sequence[float], smallest: float
) -> EnergyHistory:
    r"""Bounds on the energy norm of the error from the scalars of conjugate gradients.

    With $\rho_j = \langle r_j, M r_j\rangle$ it is $\|x_k - x\|_A^2 = \sum_{j=k}^{k+d-1} \alpha_j
    \rho_j + \|x_{k+d} - x\|_A^2$: the sum is the lower bound of Gauss quadrature. With $0 < \mu
    \le \lambda_{min}(MA)$ the Gauss-Radau rule gives the upper bound $\omega_k \rho_k$,
    $\omega_0 = 1/\mu$, $\omega_{j+1} = (\omega_j - \alpha_j) / (\mu(\omega_j - \alpha_j) +
    \beta_{j+1})$, $\beta_{j+1} = \rho_{j+1}/\rho_j$; after the last step, where $\rho_k$ is not
    given, it is $(\omega_{k-1} - \alpha_{k-1})\rho_{k-1}$. These are local identities, which also
    hold, up to rounding, after the residuals have lost their orthogonality. The delay $d$ of the
    lower bound is the smallest for which a quarter of its square can be expected to be left out.

    Args:
        lengths: $\alpha_j$, ``[k]``.
        squares: $\rho_j$, ``[k]``, or ``[k + 1]`` with that of the last iterate.
        smallest: $\mu > 0$.

    Raises:
        ArgumentError: ``smallest`` is not positive, or there are no steps.

    Cost: no products, $O(k^2)$ additions.

    Source: Meurant and Tichy, "On computing quadrature-based bounds for the A-norm of the error in
    conjugate gradients" (2013), algorithm CGQ; Meurant, Papez and Tichy, "Accurate error estimation
    in CG" (2021), the adaptive delay.

    Example:
        >>> from woodbury.solvers.certificate import energy_history
        >>> found = energy_history([0.5, 1.0], [1.0, 0.25], smallest=0.5)
        >>> [round(float(bound), 3) for bound in found.upper], round(found.last, 3)
        ([1.414, 0.612], 0.354)
    """
    if not 0 < smallest < math.inf:
        raise ArgumentError(f"smallest is {smallest}; it must be a positive number")
    if len(lengths) == 0:
        raise ArgumentError("there are no steps to tell from")
    alpha, rho = np.asarray(lengths, dtype=float), np.asarray(squares, dtype=float)
    upper = np.empty(len(alpha))
    omega = 1 / smallest
    beyond = omega
    for j in range(len(alpha)):
        if j:
            beta = rho[j] / rho[j - 1]
            omega = beyond / (smallest * beyond + beta)
        upper[j] = omega * rho[j]
        # Rounding may cancel the difference where mu is an eigenvalue; 1 / mu is right as well.
        beyond = omega - alpha[j] if omega > alpha[j] else 1 / smallest
    last = beyond * rho[len(alpha) - 1]
    if len(rho) > len(alpha):
        beta = rho[-1] / rho[-2]
        last = beyond / (smallest * beyond + beta) * rho[-1]
    gains = alpha * rho[: len(alpha)]
    lower, delay = _gauss(gains)
    return EnergyHistory(
        np.sqrt(upper),
        lower,
        delay,
        smallest,
        math.sqrt(last),
        math.sqrt(float(gains.sum())),
    )


_ACCURACY = 0.25
# How far back the shape of the error curve is looked at.
_DECAY = 1e-4


def _gauss(gains: Array) -> tuple[Array, NDArray[np.int64]]:
    """Lower bounds with as many later terms as the curve of the error asks for."""
    total = np.concatenate([[0.0], np.cumsum(gains)])
    found: list[float] = []
    delay: list[int] = []
    at = 0
    for k in range(1, len(gains)):
        known = total[k + 1] - total[: k + 1]  # sums from each step up to k
        start = int(np.flatnonzero(known[at] <= _DECAY * known[: at + 1])[-1:].sum())
        span = slice(start, max(at, start + 1))
        safety = float(np.max(known[span] / gains[span]))
        while at < k and safety * gains[k] <= _ACCURACY * (total[k] - total[at]):
            found.append(math.sqrt(total[k] - total[at]))
            delay.append(k - at)
            at += 1
    return np.asarray(found), np.asarray(delay, dtype=np.int64)


def smallest_ritz_value(lengths: Sequence[float], squares: Sequence[float]) -> float:
    r"""The smallest eigenvalue of the tridiagonal matrix of the steps: $\ge \lambda_{min}(MA)$."""
    from scipy.linalg import eigvalsh_tridiagonal

    alpha, rho = np.asarray(lengths, dtype=float), np.asarray(squares, dtype=float)
    beta = rho[1 : len(alpha)] / rho[: len(alpha) - 1]
    diagonal = 1 / alpha
    diagonal[1:] += beta / alpha[:-1]
    if len(alpha) == 1:
        return float(diagonal[0])
    off = np.sqrt(beta) / alpha[:-1]
    return float(eigvalsh_tridiagonal(diagonal, off, select="i", select_range=(0, 0))[0])


def error_bound(
    A: LinearOperator,
    b: Tensor,
    solution: Solution,
    *,
    smallest: float | None = None,
    steps: int = 20,
    generator: torch.Generator | None = None,
) -> list[ErrorBound]:
    r"""$\|x - A^{-1}b\| \le \|b - A x\| / \sigma_{min}(A)$ for the answer of any recipe.

    It is a bound where $\sigma_{min}$ is bounded from below: by ``smallest``, or by what the
    structure proves (:func:`smallest_singular_value_bound`). Elsewhere it is an estimate, with the
    smallest Ritz value of ``steps`` Lanczos steps in the place of $\sigma_{min}$ (of $A^H A$, by
    its square root, where ``A`` is not positive semidefinite). Ritz values come from inside
    the spectrum, so that the estimate may be too small.

    Args:
        A: square operator ``[n, n]``.
        b: right-hand side ``[n]`` or ``[n, k]`` that was solved for.
        solution: the answer; its residual is used.
        smallest: a lower bound on the smallest singular value, in the unit of ``A``.
        steps: Lanczos steps of the estimate.
        generator: draws their start; the same numbers every time if not given.

    Returns:
        One :class:`ErrorBound` for each column.

    Raises:
        ShapeError: ``A`` is not square, or ``b`` is not the right-hand side of the solution.
        ArgumentError: ``smallest`` is not positive, or ``steps`` is less than 1.

    Cost: nothing for a bound; ``steps`` products for an estimate, twice as many where ``A`` is not
    positive semidefinite.

    Example:
        >>> import torch
        >>> from woodbury import CG, Diagonal, solve
        >>> from woodbury.solvers.certificate import error_bound
        >>> A = Diagonal(torch.linspace(1.0, 9.0, 50), tags={"positive_definite"})
        >>> b = torch.ones(50)
        >>> bound = error_bound(A, b, solve(A, b, CG(rtol=1e-2)))[0]
        >>> bound.guarantee.name, bound.smallest, bool(bound.relative < 0.1)
        ('bound', 1.0, True)
    """
    if not A.is_square:
        raise ShapeError(f"A is {A.shape}; an error is bounded for square systems only")
    if b.shape != solution.value.shape:
        raise ShapeError(
            f"b has shape {tuple(b.shape)}, the solution {tuple(solution.value.shape)}"
        )
    if smallest is not None and not 0 < smallest < math.inf:
        raise ArgumentError(f"smallest is {smallest}; it must be a positive number")
    if steps < 1:
        raise ArgumentError(f"steps is {steps}; it must be at least 1")
    products, guarantee = 0, Guarantee.bound
    with torch.no_grad():
        sigma = smallest_singular_value_bound(A) if smallest is None else smallest
        if sigma is None:
            sigma, products = _estimated(A, steps, generator)
            guarantee = Guarantee.estimate
        sizes = A.out_space.norm(b.detach()).double().reshape(-1).tolist()
        lengths = A.space.norm(solution.value.detach()).double().reshape(-1).tolist()
    found = []
    for residual, size, length in zip(
        solution.residual.reshape(-1).tolist(), sizes, lengths, strict=True
    ):
        error = residual * size / sigma if sigma > 0 else math.inf
        least = length - error  # a lower bound of the norm of the exact solution
        relative = error / least if least > 0 else math.nan
        found.append(ErrorBound(error, guarantee, "euclidean", sigma, relative, products))
    return found


def _estimated(
    A: LinearOperator, steps: int, generator: torch.Generator | None
) -> tuple[float, int]:
    """The smallest singular value seen from a Krylov space, and what that cost."""
    definite = "positive_semidefinite" in A.tags
    B = A if definite else A.H @ A
    start = draw(A.shape[1], 1, A, generator).squeeze(1)
    found = lanczos(B, min(steps, A.shape[1]), start=start)
    least = max(found.ritz()[0][0].item(), 0.0)
    count = found.products if definite else 2 * found.products
    return (least if definite else math.sqrt(least)), count
