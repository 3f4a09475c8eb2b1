"""Hutch++: the trace of a sketch of the range, and Hutchinson for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from woodbury.decompositions.orthonormal import orthonormalize
from woodbury.spectra.estimate import Estimate, of_samples
from woodbury.spectra.method import (
    Method,
    draw_probes,
    multiply,
    real_if_hermitian,
    require_products,
    wide,
)

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["HutchPlusPlus"]


@dataclass(frozen=True)
class HutchPlusPlus(Method):
    r"""$\operatorname{tr}(Q^H A Q) + \frac1k\sum_i \omega_i^H (I - QQ^H) A (I - QQ^H)\,\omega_i$.

    $Q$ is an orthonormal basis of $A\,\Omega$ for a block of $k = \lfloor m/3 \rfloor$ probes, and
    the sum is over $k$ other ones. Given $Q$ the samples are independent and unbiased, so that
    their standard deviation over $\sqrt k$ is an honest standard error.

    Args:
        products: $m$, at least 6; a multiple of 3 is used in full.

    Raises:
        ArgumentError: ``products`` is less than 6.

    Cost: $3k$ products, memory of three blocks ``[n, k]``, $4nk^2$ multiplications.

    Source: Meyer, Musco, Musco and Woodruff, "Hutch++: optimal stochastic trace estimation" (2021),
    algorithm 1.

    Example:
        >>> import torch
        >>> from woodbury import LowRank
        >>> from woodbury.spectra import HutchPlusPlus, trace
        >>> A = LowRank(torch.randn(200, 4).double())
        >>> found = trace(A, HutchPlusPlus(products=30))  # exact: the rank is below the sketch
        >>> torch.isclose(found.value, A.trace()), bool(found.standard_error < 1e-10)
        (tensor(True), True)
    """

    products: int = 60

    def __post_init__(self) -> None:
        require_products(self.products, 6, "Hutch++")

    def _trace(self, A: LinearOperator, generator: torch.Generator) -> Estimate:
        k, space = self.products // 3, A.space
        Y = multiply(A, draw_probes(A, k, "sign", generator))
        Q, _ = orthonormalize(Y, space)
        AQ = multiply(A, Q)
        captured = real_if_hermitian(wide(space.inner(Q, AQ)), A).sum()
        probes = draw_probes(A, k, "sign", generator)
        for _ in range(2):  # once leaves rounding of the size of the probe
            probes = probes - Q @ space.gram(Q, probes)
        rest = multiply(A, probes)
        samples = real_if_hermitian(wide(space.inner(probes, rest)), A)
        sizes = float(
            wide(space.norm(AQ)).sum() + (wide(space.norm(probes)) * wide(space.norm(rest))).max()
        )
        return of_samples(
            samples,
            offset=captured,
            bias=torch.finfo(A.dtype).eps * sizes,
            products=k + Q.shape[1] + k,
            method=self,
        )
