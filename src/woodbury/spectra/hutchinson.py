"""Hutchinson's estimator of traces and diagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from woodbury.spectra.estimate import Estimate, of_samples
from woodbury.spectra.method import (
    Method,
    Probes,
    draw_probes,
    multiply,
    real_if_hermitian,
    require_probes,
    require_products,
    wide,
    width,
)

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["Hutchinson"]


@dataclass(frozen=True)
class Hutchinson(Method):
    r"""$\operatorname{tr} A \approx \frac1m\sum_i \omega_i^H A\,\omega_i$, isotropic $\omega_i$.

    The diagonal is estimated as $\frac1m\sum_i \bar\omega_i \odot A\,\omega_i$. Samples are
    independent and unbiased; the standard error is their standard deviation over $\sqrt m$. It
    falls like $m^{-1/2}$ whatever the spectrum: for a decaying one take :class:`XTrace`.

    Args:
        products: $m$, at least 2.
        probes: ``"sign"`` (the variance is $2\sum_{i \ne j} a_{ij}^2$ for a real symmetric matrix),
            ``"sphere"`` (radius $\sqrt n$; the variance does not depend on the basis), or
            ``"gaussian"`` (a larger variance than the sphere's). Diagonals take signs only.

    Raises:
        ArgumentError: ``products`` is less than 2, or ``probes`` is unknown.

    Cost: ``products`` products; for traces memory of two blocks of at most 256 MiB (or one column),
    for diagonals of four blocks ``[n, products]``.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1989); Bekas,
    Kokiopoulou and Saad, "An estimator for the diagonal of a matrix" (2007).

    Example:
        >>> import torch
        >>> from woodbury import Dense
        >>> from woodbury.spectra import Hutchinson, trace
        >>> A = Dense(torch.eye(100) + 0.1)
        >>> found = trace(A, Hutchinson(products=50))
        >>> abs(found.value - 110) < 4 * found.standard_error
        tensor(True)
    """

    products: int = 60
    probes: Probes = "sign"

    def __post_init__(self) -> None:
        require_products(self.products, 2, "Hutchinson's standard error")
        require_probes(self.probes)

    def _trace(self, A: LinearOperator, generator: torch.Generator) -> Estimate:
        samples, size = [], 0.0
        for start in range(0, self.products, width(A)):
            count = min(width(A), self.products - start)
            probes = draw_probes(A, count, self.probes, generator)
            Y = multiply(A, probes)
            samples.append(wide(A.space.inner(probes, Y)))
            # Rounding of the inner products: as far as all of their terms may be off together.
            sizes = wide(A.space.norm(probes)) * wide(A.space.norm(Y))
            size = max(size, float(sizes.max()))
        return of_samples(
            real_if_hermitian(torch.cat(samples), A),
            bias=torch.finfo(A.dtype).eps * size,
            products=self.products,
            method=self,
        )

    def _diagonal(self, A: LinearOperator, generator: torch.Generator) -> Estimate:
        probes = draw_probes(A, self.products, "sign", generator)
        Y = multiply(A, probes)
        samples = real_if_hermitian((probes.conj() * Y).T, A)
        rounding = torch.finfo(A.dtype).eps * Y.abs().amax(1)
        return of_samples(samples, bias=rounding, products=self.products, method=self)
