"""Traces of functions between two quadrature rules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from woodbury.decompositions.lanczos_batch import LanczosBatch
from woodbury.errors import ArgumentError
from woodbury.spectra.estimate import Estimate, of_samples
from woodbury.spectra.slq import SLQ, means, tail

__all__ = ["enclosed"]


def enclosed(
    run: LanczosBatch,
    f: Callable[[Tensor], Tensor],
    n: int,
    method: SLQ,
    rule: tuple[Tensor, Tensor],
    lower: float | None = None,
) -> Estimate:
    r"""$\operatorname{tr} f(A)$ for ``f`` whose even derivatives are negative, odd ones positive.

    So are $\log x$ and $x / (x + \lambda)$. The rule of Gauss is then too large, that of
    Gauss-Radau with a node at a lower bound too small, and the middle is off by no more than half
    of their distance.

    Args:
        run: the tridiagonal matrices.
        f: the function.
        n: size of the operator.
        method: what was used.
        rule: nodes and weights of ``run``.
        lower: a lower bound of the spectrum; without it the error is extrapolated.

    Raises:
        ArgumentError: an eigenvalue below ``lower`` was found.
    """
    nodes, weights = rule
    gauss = means(nodes, weights, f)
    rounding = torch.finfo(torch.float64).eps * float(means(nodes, weights, _size(f)).max())
    if lower is None:
        samples, gap = gauss, float(tail(run, f, gauss).mean())
    else:
        low = float(nodes.min())
        if not low > lower:
            raise ArgumentError(
                f"lower is {lower:.6g}, but the eigenvalue {low:.6g} was found: it is no lower "
                "bound of the spectrum"
            )
        radau = means(*run.quadrature(radau=lower), f)
        samples, gap = (gauss + radau) / 2, float((gauss - radau).abs().mean()) / 2
    return of_samples(
        n * samples,
        bias=n * (gap + rounding),
        products=run.products,
        method=method,
        enclosed=lower is not None,
    )


def _size(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x).abs()
