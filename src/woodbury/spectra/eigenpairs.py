"""``eigenpairs``: the ends of the spectrum with true residuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, EigenError, RankError
from woodbury.operators.dtypes import working_dtype
from woodbury.spectra.eigen_status import EigenStatus
from woodbury.spectra.method import multiply, require_square, require_tag, seeded, wide

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from woodbury.operators.base import LinearOperator

__all__ = ["EigenMethod", "EigenProblem", "Eigenpairs", "Which", "eigenpairs"]

Which = Literal["largest", "smallest", "magnitude", "both"]

# Operators no larger than this, or than so many times k, are formed.
_FORMED, _TIMES = 100, 5


@dataclass(frozen=True)
class EigenMethod:
    """How to compute eigenpairs: a frozen description that holds no data of any operator.

    Example:
        >>> from woodbury.spectra import EigenMethod, LOBPCG, ThickRestartLanczos
        >>> all(issubclass(kind, EigenMethod) for kind in (LOBPCG, ThickRestartLanczos))
        True
    """

    rtol: float = 1e-8
    max_products: int | None = None

    def __post_init__(self) -> None:
        if not self.rtol >= 0:
            raise ArgumentError(f"rtol is {self.rtol}; it must be 0 or more")
        if self.max_products is not None and self.max_products < 1:
            raise ArgumentError(f"max_products is {self.max_products}; it must be at least 1")

    def _run(self, problem: EigenProblem) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define _run")


@dataclass(eq=False)
class EigenProblem:
    """What a method is to do, with the count of what it did.

    A method hands back orthonormal vectors ``[n, k]``, the best it found.
    """

    A: LinearOperator
    k: int
    which: Which
    generator: torch.Generator
    products: int = 0
    steps: int = 0
    scale: float = 0.0
    stalled: bool = False

    def product(self, X: Tensor) -> Tensor:
        """``A @ X``, counted, finite."""
        self.products += X.shape[1]
        return multiply(self.A, X)

    def draw(self, k: int) -> Tensor:
        """A standard normal block ``[n, k]``."""
        dtype, device = working_dtype(self.A.dtype), self.A.device
        return torch.randn(self.A.shape[0], k, dtype=dtype, device=device, generator=self.generator)

    def order(self, values: Tensor) -> Tensor:
        """Indices of ascending values from the most wanted to the least."""
        if self.which == "magnitude":
            return values.abs().argsort(descending=True)
        if self.which == "both":
            low = torch.arange(len(values), device=values.device)
            # The smallest, the largest, the second smallest, the second largest, ...
            return torch.stack([low, low.flip(0)], 1).flatten()[: len(values)]
        return values.argsort(descending=self.which == "largest")

    def limit(self, max_products: int | None) -> int:
        """The products that may be taken."""
        n = self.A.shape[0]
        return max(1000, 20 * n) if max_products is None else max_products

    def floor(self) -> float:
        """The residual that rounding leaves."""
        n = self.A.shape[0]
        return max(10.0, n**0.5) * torch.finfo(working_dtype(self.A.dtype)).eps * self.scale

    def good(self, value: float, residual: float, rtol: float) -> EigenStatus | None:
        """The status of a pair that is good enough, or None."""
        if residual <= rtol * abs(value):
            return EigenStatus.converged
        return EigenStatus.precision if residual <= self.floor() else None


@dataclass(frozen=True, eq=False, repr=False)
class Eigenpairs:
    r"""$A x_i = \lambda_i x_i$ with certificates.

    Attributes:
        values: $\lambda_i$, ``[k]``, float64 on the CPU: descending for ``"largest"``, by
            descending magnitude for ``"magnitude"``, otherwise ascending.
        vectors: $x_i$ as columns ``[n, k]``, orthonormal.
        residuals: true $\|A x_i - \lambda_i x_i\|$, recomputed with products of their own, ``[k]``;
            within that of $\lambda_i$ there is an eigenvalue.
        status: the worst of the pairs.
        pair_status: of each.
        products: columns that ``A`` was multiplied by.
        steps: restarts or iterations.
        method: what was used.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> from woodbury.spectra import eigenpairs
        >>> found = eigenpairs(Diagonal(torch.arange(1.0, 501.0).double()), 2)
        >>> found.values.round(decimals=6), found.status.name
        (tensor([500., 499.], dtype=torch.float64), 'converged')
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    status: EigenStatus
    pair_status: tuple[EigenStatus, ...]
    products: int
    steps: int
    method: EigenMethod

    @property
    def ok(self) -> bool:
        """Whether every pair is what was asked for."""
        return self.status.ok

    def certificate(self) -> dict[str, Any]:
        """What a reader needs to trust the pairs, in plain numbers and words (for reports)."""
        return {
            "ok": self.ok,
            "status": self.status.name,
            "meaning": self.status.value,
            "residual": float(self.residuals.max()),
            "pairs": len(self.values),
            "failed_pairs": sum(not status.ok for status in self.pair_status),
            "products": self.products,
            "method": repr(self.method),
        }

    def message(self) -> str:
        """One sentence: what happened, with the values, and what to do."""
        failed = [i for i, status in enumerate(self.pair_status) if not status.ok]
        where = f" in {len(failed)} of {len(self.values)} pairs" if failed else ""
        return (
            f"{type(self.method).__name__}: {self.status.name}{where} after {self.products} "
            f"products, residual {float(self.residuals.max()):.3g}: {self.status.value}"
        )

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the eigenvalues with their residuals.

        Args:
            axes: of matplotlib to draw on; new ones by default.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from woodbury.spectra.plots import plot_eigenpairs

        return plot_eigenpairs(self, axes)

    def __repr__(self) -> str:
        shown = ", ".join(f"{value:.6g}" for value in self.values[:4].tolist())
        more = ", ..." if len(self.values) > 4 else ""
        return (
            f"Eigenpairs([{shown}{more}], {self.status.name}, "
            f"residual={float(self.residuals.max()):.3g}, products={self.products}, "
            f"method={self.method!r})"
        )


def eigenpairs(
    A: LinearOperator,
    k: int = 1,
    which: Which = "largest",
    method: EigenMethod | None = None,
    *,
    throw: bool = True,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    r"""``k`` eigenpairs from the ends of the spectrum of a hermitian operator.

    Args:
        A: hermitian operator ``[n, n]``.
        k: how many, 1 to ``n``.
        which: ``"largest"``, ``"smallest"``, ``"magnitude"`` (the largest by absolute value) or
            ``"both"`` (in turn from both ends, the smallest first).
        method: :class:`ThickRestartLanczos` (default) or :class:`LOBPCG`. Operators no larger than
            100, or than ``5 k``, are formed instead: ``n`` products.
        throw: raise where a pair does not reach the tolerance; otherwise its status says so.
        generator: draws the first vectors; the same numbers every time if not given.

    Returns:
        :class:`Eigenpairs`.

    Raises:
        EigenError: a pair did not reach the tolerance; its ``eigenpairs`` holds what was found.
        TagError: ``A`` is not tagged hermitian.
        RankError: ``k`` is not between 1 and ``n``.
        ArgumentError: ``which`` is unknown, or the method cannot do it.
        NonFiniteError: a product is NaN or infinite.

    Cost: that of the method, and ``k`` products for the certificate.

    Source: see the methods.

    Example:
        >>> import torch
        >>> from woodbury import Hessian, Objective
        >>> from woodbury.spectra import eigenpairs
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(10, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1)
        ... ).double()
        >>> data = torch.randn(50, 10).double(), torch.randn(50, 1).double()
        >>> sharpness = eigenpairs(Hessian(Objective(model, "mse", data)), 1)
        >>> sharpness.ok, bool(sharpness.residuals < 1e-6)
        (True, True)
    """
    from woodbury.spectra.thick_restart import ThickRestartLanczos

    require_square(A, "eigenpairs()")
    require_tag(A, "hermitian", "eigenpairs()")
    n = A.shape[0]
    if not 1 <= k <= n:
        raise RankError(f"k is {k}, the operator has size {n}: there are 1 to {n} eigenpairs")
    if which not in ("largest", "smallest", "magnitude", "both"):
        raise ArgumentError(
            f"which is {which!r}; it must be 'largest', 'smallest', 'magnitude' or 'both'"
        )
    method = ThickRestartLanczos() if method is None else method
    problem = EigenProblem(A, k, which, seeded(A, generator))
    X = _formed(problem) if n <= max(_FORMED, _TIMES * k) else method._run(problem)
    found = _certified(problem, X, method)
    if throw and not found.ok:
        raise EigenError(found.message(), found)
    return found


def _formed(problem: EigenProblem) -> Tensor:
    """From the matrix itself."""
    A, k = problem.A, problem.k
    eye = torch.eye(A.shape[0], dtype=working_dtype(A.dtype), device=A.device)
    M = problem.product(eye)
    values, vectors = torch.linalg.eigh((M + M.mH) / 2)
    return vectors[:, problem.order(values)[:k]]


def _certified(problem: EigenProblem, X: Tensor, method: EigenMethod) -> Eigenpairs:
    """Eigenvalues as Rayleigh quotients of the vectors, residuals and statuses, in order."""
    space = problem.A.space
    AX = problem.product(X)
    values = space.inner(X, AX)
    values = values.real if values.is_complex() else values
    order = values.argsort(descending=problem.which == "largest")
    if problem.which == "magnitude":
        order = values.abs().argsort(descending=True)
    X, AX, values = X[:, order], AX[:, order], values[order]
    residuals = wide(space.norm(AX - X * values))
    problem.scale = max(problem.scale, float(values.abs().max()))
    worse = EigenStatus.stagnation if problem.stalled else EigenStatus.max_products
    statuses = tuple(
        problem.good(value, residual, method.rtol) or worse
        for value, residual in zip(values.tolist(), residuals.tolist(), strict=True)
    )
    return Eigenpairs(
        values=wide(values),
        vectors=X,
        residuals=residuals,
        status=EigenStatus.worst(statuses),
        pair_status=statuses,
        products=problem.products,
        steps=problem.steps,
        method=method,
    )
