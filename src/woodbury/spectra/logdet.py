"""``logdet``: the sum of the logarithms of the eigenvalues, from products."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from woodbury.decompositions.nystrom import nystrom
from woodbury.decompositions.partial import PartialEigen
from woodbury.errors import ArgumentError, NotPositiveDefiniteError, RankError
from woodbury.operators.dtypes import precise
from woodbury.operators.function import FunctionOperator
from woodbury.spectra.enclosure import enclosed
from woodbury.spectra.estimate import Estimate, exactly
from woodbury.spectra.method import Exact, require_square, require_tag, seeded
from woodbury.spectra.slq import SLQ, eigenvalues_by_products

if TYPE_CHECKING:
    from torch import Tensor

    from woodbury.decompositions.lanczos_batch import LanczosBatch
    from woodbury.operators.base import LinearOperator

__all__ = ["logdet"]


def logdet(
    A: LinearOperator,
    method: SLQ | None = None,
    *,
    rank: int = 0,
    lower: float | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""$\log\det A = \operatorname{tr} \log A$ of a positive definite operator.

    With ``rank`` the variance is reduced by a Nystrom approximation $P$ of that rank, which has a
    determinant of its own: $\log\det A = \log\det P + \operatorname{tr}\log(P^{-1/2} A P^{-1/2})$.
    The better $P$, the nearer the last matrix is to a multiple of the identity, whose trace has no
    variance, and the fewer steps it needs.

    The error of the quadrature is in ``bias``: half of the distance between the rules of Gauss and
    Gauss-Radau, which enclose the truth, where a lower bound of the spectrum is known; otherwise
    extrapolated from shorter rules, an estimate.

    Args:
        A: hermitian positive definite operator ``[n, n]``.
        method: default the structure of the operator where it has a log-determinant (dense and
            sparse ones factorise themselves), otherwise ``SLQ()``.
        rank: of the Nystrom approximation; 0 for none.
        lower: a bound $0 < a \le \lambda_{min}$, for example the damping in ``H + a * Identity(n)``
            with positive semidefinite ``H``. With ``rank`` it is not used.
        generator: draws the probes; the same numbers every time if not given.

    Returns:
        An :class:`Estimate`.

    Raises:
        TagError: ``A`` is not tagged hermitian.
        NotPositiveDefiniteError: an eigenvalue that is not positive was found.
        SingularError: the structure of the operator says that it is singular.
        RankError: ``rank`` is negative or more than ``n``.
        ArgumentError: ``lower`` is not positive, or an eigenvalue below it was found.
        NonFiniteError: a product is NaN or infinite.

    Cost: ``probes * steps`` products of :class:`SLQ` and its memory; ``rank`` products more, and
    $8 n r$ multiplications more for each.

    Source: Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"
    (2017); Gardner et al., "GPyTorch" (2018), section 4, and Wenger et al., "Preconditioning for
    scalable Gaussian process hyperparameter optimization" (2022) for variance reduction; Golub and
    Meurant (2010), theorem 6.4, for the enclosure.

    Example:
        >>> import torch
        >>> from woodbury import FunctionOperator
        >>> from woodbury.spectra import SLQ, logdet
        >>> values = torch.linspace(0.5, 2, 2500).double()
        >>> A = FunctionOperator(
        ...     lambda X: values[:, None] * X, (2500, 2500), dtype=values.dtype, tags={"symmetric"}
        ... )
        >>> low, high = logdet(A, SLQ(probes=20, steps=20, kind="sphere")).interval()
        >>> bool(low < values.log().sum() < high)
        True
    """
    require_square(A, "logdet()")
    if method is None:
        known = A._logdet()
        if known is not None:
            return exactly(precise(known).cpu(), Exact())
        method = SLQ()
    require_tag(A, "hermitian", "logdet()")
    n = A.shape[0]
    if not 0 <= rank <= n:
        raise RankError(f"rank is {rank}, the operator has size {n}: the rank must be 0 to {n}")
    if lower is not None and not lower > 0:
        raise ArgumentError(f"lower is {lower}; a bound of positive eigenvalues is positive")
    if not method._spares(n):
        values = eigenvalues_by_products(A)
        _require_positive(values)
        rounding = n * torch.finfo(A.dtype).eps * float(values.max() / values.min())
        return exactly(values.log().sum(), method, n, rounding)
    generator = seeded(A, generator)
    if rank == 0:
        run = method.run(A, generator)
        return enclosed(run, torch.log, n, method, _positive(run), lower)
    factor = nystrom(A, rank, generator=generator)
    last = float(factor.eigenvalues[-1])
    root = PartialEigen(factor.basis, factor.eigenvalues.rsqrt(), last**-0.5, space=A.space)
    dtype = A.dtype
    B = FunctionOperator(
        lambda X: (root @ (A @ (root @ X.to(root.dtype)).to(dtype)).to(root.dtype)).to(dtype),
        A.shape,
        tags={"hermitian"},
        dtype=dtype,
        device=A.device,
        space=A.space,
    )
    run = method.run(B, generator)
    found = enclosed(run, torch.log, n, method, _positive(run))
    known = precise(factor.operator().values).log().sum().cpu()
    known = known + (n - factor.basis.shape[1]) * torch.tensor(last, dtype=torch.float64).log()
    return replace(found, value=found.value + known, products=found.products + factor.products)


def _positive(run: LanczosBatch) -> tuple[Tensor, Tensor]:
    rule = run.quadrature()
    _require_positive(rule[0])
    return rule


def _require_positive(values: Tensor) -> None:
    low = float(values.min())
    if not low > 0:
        raise NotPositiveDefiniteError(
            f"the eigenvalue {low:.3g} was found, so the log-determinant does not exist: add "
            "damping, for example A + 1e-3 * Identity(n)"
        )
