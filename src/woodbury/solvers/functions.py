"""Functions of a hermitian matrix times a vector, by Lanczos."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from woodbury.decompositions.lanczos_batch import (
    LanczosBatch,
    lanczos_batch,
    require_hermitian,
    tridiagonal,
)
from woodbury.errors import (
    ArgumentError,
    FunctionError,
    GradientError,
    NonFiniteError,
    NotPositiveDefiniteError,
    SingularError,
)
from woodbury.operators.parts import is_opaque, parts
from woodbury.solvers.checks import check_system, largest_entries

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["MatrixFunction", "NamedFunction", "matrix_function"]

NamedFunction = Literal["sqrt", "inverse_sqrt", "log", "exp"]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt": torch.sqrt,
    "inverse_sqrt": torch.rsqrt,
    "log": torch.log,
    "exp": torch.exp,
}


@dataclass(frozen=True, eq=False)
class MatrixFunction:
    r"""$f(A)\,b$ with an estimate of its error.

    Attributes:
        value: ``[n]`` or ``[n, k]`` as ``b``.
        converged: whether the estimated errors are all within the tolerance.
        error: estimated relative error, a scalar or ``[k]``, float64: how much the last five steps
            changed, $\|y_m - y_{m-5}\| / \|y_m\|$, or, where convergence is slow, what is left of a
            geometric series with the ratio of the last two changes. 0 where the Krylov space is
            exhausted, so that the value is exact to rounding.
        steps: Lanczos steps taken.
        products: columns that ``A`` was multiplied by.
        spectrum: the smallest and the largest Ritz value met.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.solvers import matrix_function
        >>> found = matrix_function(Diagonal(torch.tensor([0.0, 1.0])), "exp", torch.ones(2))
        >>> found.value, found.steps, round(found.spectrum[1], 3)
        (tensor([1.0000, 2.7183]), 2, 1.0)
    """

    value: Tensor
    converged: bool
    error: Tensor
    steps: int
    products: int
    spectrum: tuple[float, float]


def matrix_function(
    A: LinearOperator,
    f: NamedFunction | Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    steps: int = 300,
    rtol: float = 1e-8,
    throw: bool = True,
) -> MatrixFunction:
    r"""$f(A)\,b$ for a hermitian operator, by Lanczos from each column of ``b``.

    With $A Q_m = Q_m T_m + \dots$ started from $b$, $y_m = \|b\|\,Q_m f(T_m) e_1$. It is exact
    where $f$ is a polynomial of degree below ``m``, and its error is at most $2 \|b\|$ times that
    of the best polynomial of degree $m - 1$ on the spectrum. It stops when the estimated error of
    no column is above ``rtol``. The value is differentiable with respect to ``b``, to any order:
    $f(A)$ is hermitian for real $f$, so a gradient $g$ becomes $f(A)\,g$.

    Args:
        A: hermitian operator ``[n, n]``.
        f: ``"sqrt"``, ``"inverse_sqrt"``, ``"log"``, ``"exp"``, or a real function of tensors,
            applied to Ritz values elementwise (float64).
        b: ``[n]`` or a block ``[n, k]``.
        steps: limit of Lanczos steps.
        rtol: tolerance of the estimated relative error.
        throw: raise where the limit comes before the tolerance; otherwise ``converged`` is false.

    Returns:
        A :class:`MatrixFunction`.

    Raises:
        TagError: ``A`` is not tagged hermitian.
        NotPositiveDefiniteError: a negative Ritz value, which root or logarithm do not take: ``A``
            has an eigenvalue at most that large.
        SingularError: a Ritz value that is zero to rounding, which the logarithm or the inverse
            root do not take.
        NonFiniteError: ``b`` is not finite, or ``f`` is not finite at a Ritz value.
        FunctionError: the limit of steps came first, and ``throw`` is true.
        ArgumentError: ``f`` is unknown, or ``steps`` or ``rtol`` make no sense.
        GradientError: tensors that ``A`` is made of require a gradient, which there is none of.

    Cost: at most ``steps`` products a column, memory of ``steps`` blocks, and $4 n k m^2$
    multiplications.

    Source: Druskin and Knizhnerman, "Two polynomial methods of calculating functions of symmetric
    matrices" (1989); Musco, Musco and Sidford, "Stability of the Lanczos method for matrix
    function approximation" (2018).

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.solvers import matrix_function
        >>> A = Diagonal(torch.tensor([1.0, 4.0, 9.0]), tags={"positive_definite"})
        >>> matrix_function(A, "sqrt", torch.ones(3)).value
        tensor([1.0000, 2.0000, 3.0000])
    """
    check_system(A, b, None)
    require_hermitian(A, "matrix_function")
    if isinstance(f, str) and f not in _FUNCTIONS:
        raise ArgumentError(f"f is {f!r}; it must be a function or one of {sorted(_FUNCTIONS)}")
    if steps < 1:
        raise ArgumentError(f"steps is {steps}; it must be at least 1")
    if not 0 <= rtol < math.inf:
        raise ArgumentError(f"rtol is {rtol}; it must be a number >= 0")
    _refuse_gradients(A)
    found: list[MatrixFunction] = []

    def run(block: Tensor) -> Tensor:
        with torch.no_grad():
            found.append(_evaluate(A, f, block, steps, rtol, throw))
        return found[-1].value

    value: Tensor = _Apply.apply(b, run)
    last = found[-1]
    if value.shape != last.value.shape:  # a batch inside vmap
        return replace(last, value=value, error=last.error.amax())
    return replace(last, value=value)


class _Apply(torch.autograd.Function):
    """A linear map that equals its adjoint."""

    @staticmethod
    def forward(b: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        return run(b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.run = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _Apply.apply(gradients[0].resolve_conj(), ctx.run), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Apply.apply(tangents[0], ctx.run)

    @staticmethod
    def vmap(info: Any, in_dims: Any, b: Tensor, run: Any) -> Any:
        columns = b.movedim(in_dims[0], 1)
        value = _Apply.apply(columns.reshape(columns.shape[0], -1), run)
        return value.reshape(columns.shape), 1


def _refuse_gradients(A: LinearOperator) -> None:
    if not torch.is_grad_enabled():
        return
    carries = any(tensor.requires_grad for tensor in parts(A))
    if not carries and is_opaque(A):
        X = torch.zeros(A.shape[1], 1, dtype=A.dtype, device=A.device)
        carries = A._matmat(X).requires_grad
    if carries:
        raise GradientError(
            f"the products of {type(A).__name__} carry a gradient, and matrix_function has none "
            "with respect to the operator: call it under torch.no_grad(), or detach the tensors "
            "that the operator is made of"
        )


def _evaluate(
    A: LinearOperator,
    f: NamedFunction | Callable[[Tensor], Tensor],
    b: Tensor,
    steps: int,
    rtol: float,
    throw: bool,
) -> MatrixFunction:
    block = b if b.dim() == 2 else b.unsqueeze(1)
    largest = largest_entries(block, "b")
    active = [j for j, size in enumerate(largest) if size > 0]
    value, error = torch.zeros_like(block), torch.zeros(block.shape[1], dtype=torch.float64)
    if not active:
        empty = (math.nan, math.nan)
        return MatrixFunction(torch.zeros_like(b), True, error.reshape(b.shape[1:]), 0, 0, empty)
    coefficients = _Coefficients(A, f)

    def settled(batch: LanczosBatch) -> bool:
        return bool((coefficients.of(batch)[1] <= rtol).all())

    batch = lanczos_batch(A, steps, block[:, active].contiguous(), until=settled)
    weights, change = coefficients.of(batch)
    assert batch.bases is not None  # full reorthogonalisation keeps them
    columns = torch.einsum("pnm,pm->np", batch.bases, weights.to(batch.bases))
    value[:, active], error[active] = columns.to(b.dtype), change
    converged = bool((error <= rtol).all())
    result = MatrixFunction(
        value if b.dim() == 2 else value.squeeze(1),
        converged,
        error if b.dim() == 2 else error[0],
        max(batch.sizes),
        batch.products,
        coefficients.spectrum,
    )
    if throw and not converged:
        raise FunctionError(
            f"{max(batch.sizes)} Lanczos steps leave an estimated relative error of "
            f"{float(error.max()):.3g}, rtol is {rtol:.3g}: raise steps, loosen rtol, or take the "
            "value with throw=False",
            result,
        )
    return result


# Steps whose effect is the estimate of the error.
_DELAY = 5


class _Coefficients:
    """The coefficients of ``f(A) b`` in the Krylov basis, and how much the last steps changed."""

    def __init__(self, A: LinearOperator, f: NamedFunction | Callable[[Tensor], Tensor]) -> None:
        self.name = f if isinstance(f, str) else None
        self.function = _FUNCTIONS[f] if isinstance(f, str) else f
        self.rounding = A.shape[0] * torch.finfo(A.dtype).eps
        self.spectrum = (math.nan, math.nan)

    def of(self, batch: LanczosBatch) -> tuple[Tensor, Tensor]:
        """``[p, m]`` and relative changes ``[p]``."""
        m = batch.diagonal.shape[1]
        earlier = [self._at(batch, m - delay) for delay in (0, _DELAY, 2 * _DELAY) if m > delay]
        now, *before = (torch.nn.functional.pad(y, (0, m - y.shape[1])) for y in earlier)
        sizes = torch.linalg.vector_norm(now, dim=1)
        changes = [torch.linalg.vector_norm(now - y, dim=1) for y in before]
        change = changes[0] if changes else sizes
        if len(changes) == 2:  # what is left of a geometric series
            ratio = (change / torch.linalg.vector_norm(before[0] - before[1], dim=1)).clamp(0, 0.95)
            change = torch.where(ratio > 0.5, change * ratio / (1 - ratio), change)
        relative = torch.where(sizes > 0, change / sizes, change)
        exhausted = (batch.remainder == 0) | torch.tensor([size < m for size in batch.sizes])
        return now, torch.where(exhausted, 0.0, relative)

    def _at(self, batch: LanczosBatch, m: int) -> Tensor:
        T = tridiagonal(batch.diagonal[:, :m], batch.off_diagonal[:, : m - 1])
        theta, S = torch.linalg.eigh(T)
        self.spectrum = float(theta.min()), float(theta.max())
        return batch.norms[:, None] * torch.einsum(
            "pij,pj->pi", S, self._values(theta) * S[:, 0, :]
        )

    def _values(self, theta: Tensor) -> Tensor:
        least, largest = self.spectrum
        zero = self.rounding * max(abs(least), abs(largest))
        if self.name in ("sqrt", "log", "inverse_sqrt") and least < -zero:
            raise NotPositiveDefiniteError(
                f"the operator has an eigenvalue of at most {least:.6g}, where {self.name} is not "
                f"defined; add damping above {-least:.3g}"
            )
        if self.name in ("log", "inverse_sqrt") and least <= zero:
            raise SingularError(
                f"the operator has an eigenvalue of {least:.3g} beside one of {largest:.3g}, zero "
                f"to rounding, where {self.name} is not defined; add damping"
            )
        found = self.function(theta.clamp(min=0) if self.name == "sqrt" else theta)
        if not isinstance(found, Tensor) or found.shape != theta.shape:
            raise ArgumentError("f must map a tensor to one of the same shape, elementwise")
        if not bool(torch.isfinite(found).all()):
            place = int((~torch.isfinite(found)).reshape(-1).nonzero()[0])
            raise NonFiniteError(
                f"f is not finite at the Ritz value {theta.reshape(-1)[place].item():.6g}; the "
                f"spectrum reaches from {least:.6g} to {largest:.6g}"
            )
        return found.to(theta.dtype)
